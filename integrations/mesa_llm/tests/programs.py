"""Whole programs for tests, which need not wait for LiteLLM's imports: children of a process that has done them.

That process has one thread and has done nothing but import. A program ends as any other does: the interpreter's whole
way out, and its exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HEAD = """
import asyncio, gc, logging, os, resource, sys, threading
from llmmw_mesa import ModuleLLM, Options, close_all, global_stats, install, step_agents
from worlds import MODEL, World
BASE = sys.argv[1]
logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)  # its logging worker stumbles when loops change
def descriptors(): return len(os.listdir("/proc/self/fd"))
def llm(**options): return ModuleLLM(MODEL, api_base=BASE, **options)
"""
_SILENT = ("Traceback", "Exception ignored", "Warning: coroutine", "never retrieved", "Unclosed")


def environment():
    """As these tests have it."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "sk-test"}


def fresh(code, *arguments):
    """In an interpreter of its own, with other hashes; what it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    return _checked(ended.returncode, ended.stdout, ended.stderr)


def _checked(status, out, error):
    assert status == 0, error
    for word in _SILENT:
        assert word not in error, error
    return out


class Programs:
    """Runs them, one after the other."""

    def __init__(self):
        self._place = tempfile.TemporaryDirectory()
        self._parent = None

    def run(self, code, *arguments):
        """One to its end; what it printed. Nothing may be wrong on its standard error."""
        if self._parent is None:
            self._parent = subprocess.Popen(
                [sys.executable, __file__], env=environment(), start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        out, error = (Path(self._place.name, name) for name in ("out", "error"))
        job = {"code": code, "argv": ["-c", *map(str, arguments)], "out": str(out), "error": str(error)}
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        status = self._parent.stdout.readline()
        return _checked(int(status or -1), out.read_text(encoding="utf-8"), error.read_text(encoding="utf-8"))

    def close(self):
        """With whatever hangs."""
        if self._parent is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._parent.pid, signal.SIGKILL)
            self._parent.communicate()
        self._place.cleanup()


def _next_program():
    """In a child, what it is to be; None at the parent's own end."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    exec(HEAD.partition("BASE")[0], {})
    _job = _next_program()
    if _job is not None:
        for _number, _name in ((0, os.devnull), (1, _job["out"]), (2, _job["error"])):
            _file = os.open(_name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(_file, _number)
            os.close(_file)
        sys.argv = _job["argv"]
        exec(compile(_job["code"], "<program>", "exec"), {"__name__": "__main__"})
