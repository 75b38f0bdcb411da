"""The server as a separate process, for tests that need real sockets between real processes."""

import http.client
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec

from .config import ServerConfig, plain_options
from .faults import FaultRule
from .wire import as_dict


class ServerProcess:
    """A server process and its control plane; every call here blocks (about a millisecond).

    The child ends with this process: it watches its standard input, which closes when the parent is gone.
    """

    def __init__(
        self, config: ServerConfig | None = None, *, uvloop: bool = False, start_timeout_s: float = 120.0
    ) -> None:
        self.config = config or ServerConfig()
        self.url = ""
        self._flags = ["--announce", "--until-stdin-closes", *(["--uvloop"] if uvloop else [])]
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[str] | None = None

    @property
    def base_url(self) -> str:
        """What SDKs call ``base_url``: the url with ``/v1``."""
        return self.url + "/v1"

    @property
    def pid(self) -> int:
        """Process id; 0 when it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> Self:
        """Start and wait until it listens; RuntimeError carries what the child wrote."""
        values = plain_options(self.config)
        command = [sys.executable, "-m", __package__ or "llmmw.testing.server", "--config-json", json.dumps(values)]
        with tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(  # noqa: S603 — our own interpreter and module
                [*command, *self._flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            line = self._first_line()
            if not line:
                self.stop()
                errors.seek(0)
                raise RuntimeError(f"the embedded server did not start: {errors.read()[-2000:]}")
        self.url = json.loads(line)["url"]
        return self

    def stop(self, grace_s: float = 5.0) -> None:
        """End the process, by force after the grace time; safe to call twice."""
        process, self._process = self._process, None
        self.url = ""
        if process is None:
            return
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def stats(self, requests: int = 200) -> dict[str, Any]:
        """The statistics, with at most that many request summaries."""
        return self._ask("GET", f"stats?requests={requests}")

    def reset(self) -> None:
        """Start counters, draws, limits and prefix cache afresh."""
        self._ask("POST", "reset")

    def configure(self, **options: Any) -> dict[str, Any]:
        """Change settings while it runs; the settings in force."""
        return self._ask("POST", "config", options)

    def add_fault(self, rule: FaultRule) -> str:
        """Arm a fault rule; its id."""
        return str(self._ask("POST", "faults", rule)["ids"][0])

    def clear_faults(self) -> None:
        """Forget all fault rules."""
        self._ask("DELETE", "faults")

    def wait(
        self,
        *,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """Wait until dotted statistics are within bounds (``at_least={"engine.waiting": 3}``), else TimeoutError."""
        body = {"at_least": at_least or {}, "at_most": at_most or {}, "timeout_s": timeout_s}
        answer = self._ask("POST", "wait", body, timeout_s + 60.0)
        if not answer["ok"]:
            raise TimeoutError(f"after {timeout_s} s: {answer['stats']}")
        return as_dict(answer["stats"])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _first_line(self) -> str:
        lines: list[str] = []
        output = self._process.stdout if self._process is not None else None
        if output is None:
            return ""
        reader = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
        reader.start()
        reader.join(self._start_timeout_s)
        return lines[0] if lines else ""

    def _ask(self, method: str, name: str, body: Any = None, timeout_s: float = 120.0) -> dict[str, Any]:
        if not self.url:
            raise RuntimeError("the embedded server is not running; use it in a with block")
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout_s)
        try:
            payload = None if body is None else msgspec.json.encode(body)
            connection.request(method, f"/_control/{name}", payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ValueError(answer["error"])
        return as_dict(answer)


@contextmanager
def server_process(config: ServerConfig | None = None, *, uvloop: bool = False) -> Generator[ServerProcess]:
    """A server process for the length of the block; it is always stopped."""
    process = ServerProcess(config, uvloop=uvloop)
    try:
        yield process.start()
    finally:
        process.stop()
