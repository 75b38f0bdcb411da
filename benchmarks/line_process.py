"""A child process that answers each line written to it with one line of its own."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class LineProcess:
    """Starts at once and ends with `close()`; it also ends by itself, when its standard input closes.

    Args:
        command: the program and its arguments.
        environment: all its variables; None: those of this process.
        limit_s: seconds that one answer may take before the process is ended.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, limit_s: float = 600.0
    ) -> None:
        self.limit_s = limit_s
        self._failure = ""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 — a pipe that nobody reads would fill up and block it
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, line: str) -> str:
        """What it answers to this line.

        Raises:
            RuntimeError: it ended, or was ended for taking too long; the message is the last line it wrote.
        """
        process, answer = self._process, ""
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(self.limit_s, self._give_up)
        watchdog.start()
        try:
            with contextlib.suppress(OSError):  # a broken pipe: it ended, and says why below
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
                answer = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not answer:
            raise RuntimeError(self._why())
        return answer

    def _give_up(self) -> None:
        self._failure = f"no answer within {self.limit_s:g} s"
        self._process.kill()

    def _why(self) -> str:
        if not self._failure:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:]
            self._failure = last[0] if last else f"the process ended with status {self._process.returncode}"
        return self._failure

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError):
            self._process.communicate(timeout=10)
        self._process.kill()
        self._process.wait()
        self._errors.close()
