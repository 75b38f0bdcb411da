"""A real vLLM server on this machine's CPU: installed, started, waited for, and always stopped again.

    python benchmarks/vllm_cpu/server.py serve                       # until Ctrl-C; prints the URL
    python benchmarks/vllm_cpu/server.py run -- pytest -m vllm       # around one command; its exit code

`run` gives the command LLMMW_VLLM_URL (http://127.0.0.1:PORT/v1) and LLMMW_VLLM_MODEL, and LLMMW_VLLM_API_KEY when
the server asks for a key. More vLLM arguments: `--vllm-args "--max-num-queued-reqs 8"` or LLMMW_VLLM_ARGS; step
padding, slots and the rest of serve.sh's settings come from the environment: `STEP_PAD=1 MAX_NUM_SEQS=4 python ...`.

Standard library only, Linux. `with server(...) as running:` is the same for another script in this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Self

import make_model
import ready

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = pathlib.Path(__file__).resolve().parent
STATE = HERE.parent.parent / ".vllm"  # git-ignored: venv, model, compiled kernels, logs, lock
STOP_GRACE_S = 6.0  # a ready server needs 0.4 s; one that starts does not listen to SIGTERM
GROUP_GRACE_S = 2.0
KEPT_LOGS = 5
TAIL_LINES = 40


class ServerError(Exception):
    """The server could not be installed, started or kept running; the text says why and shows its last words."""


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into `Stopped`, except while `held`: then they wait."""

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: int | None = None

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._arrived)

    def _arrived(self, signum: int, _frame: object) -> None:
        if self._depth:
            self._waiting = signum
        else:
            raise Stopped(signum)

    @contextlib.contextmanager
    def held(self, *, drop: bool = False) -> Iterator[None]:
        """Starting and stopping processes is not interrupted; a signal counts afterwards, or not at all (*drop*)."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if not self._depth:
            waiting, self._waiting = self._waiting, None
            if waiting is not None and not drop:
                raise Stopped(waiting)


SIGNALS = Signals()


# Reads until the pipe from this program closes, which happens however it ends, then ends the group it was given.
GUARD = 'read -r _; kill -TERM -- "-$0"; sleep 5; kill -KILL -- "-$0"'


def group_members(group: int) -> list[int]:
    """The processes of *group* that still run, from /proc."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


class Child:
    """A process with a group of its own, which ends with the block, or with this program when that is killed."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, log: pathlib.Path | None = None
    ) -> None:
        self._argv = list(argv)
        self._env = env
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            with SIGNALS.held(), self._log.open("wb") if self._log else contextlib.nullcontext() as out:
                self._process = subprocess.Popen(
                    self._argv,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=out or sys.stderr,  # standard output is the command's alone
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._guard = subprocess.Popen(
                    ["bash", "-c", GUARD, str(self._process.pid)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except Stopped:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def ended(self) -> int | None:
        """The exit code, or None while it runs. Does not reap: until `stop`, the pid and group stay ours."""
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status

    def wait(self, timeout: float) -> int | None:
        """Like `ended`, after waiting up to *timeout* seconds for it."""
        deadline = time.monotonic() + timeout
        while (code := self.ended()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return code

    def stop(self) -> None:
        """SIGTERM to the process, time to finish, then SIGKILL to whatever is left of its group."""
        if self._process is None or self._process.returncode is not None:
            return
        with SIGNALS.held(drop=True):
            if self.ended() is None:
                os.kill(self.pid, signal.SIGTERM)
                self.wait(STOP_GRACE_S)
            # Python's resource tracker outlives the server a little, to free its shared memory.
            deadline = time.monotonic() + (GROUP_GRACE_S if self.ended() is not None else 0.0)
            while group_members(self.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            if self._guard is not None:  # before the pid is free for others
                self._guard.kill()
                self._guard.communicate()
            self._process.wait()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where things lie and how the server is started."""

    venv: pathlib.Path = STATE / "venv"
    model: pathlib.Path = STATE / "model"
    port: int = 0  # 0: a free one
    timeout: float = 900.0
    vllm_args: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        return os.environ.get("MODEL_NAME") or "tiny"

    @property
    def api_key(self) -> str | None:
        """The key in the vLLM arguments, if there is one."""
        for i, arg in enumerate(self.vllm_args):
            if arg == "--api-key" and i + 1 < len(self.vllm_args):
                return self.vllm_args[i + 1]
            if arg.startswith("--api-key="):
                return arg.partition("=")[2]
        return os.environ.get("VLLM_API_KEY") or None


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers."""

    base: str
    pid: int
    log: pathlib.Path
    model_name: str
    api_key: str | None
    child: Child

    @property
    def url(self) -> str:
        return f"{self.base}/v1"

    def environment(self) -> dict[str, str]:
        """What a command needs to find the server; no proxy may stand between."""
        found = {"LLMMW_VLLM_URL": self.url, "LLMMW_VLLM_MODEL": self.model_name}
        if self.api_key:
            found["LLMMW_VLLM_API_KEY"] = self.api_key
        exempt = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1")))
        return found | {"NO_PROXY": exempt, "no_proxy": exempt}


def engine_environment() -> dict[str, str]:
    """What serve.sh sets for the server, for an engine inside a process of one's own."""
    cache = STATE / "cache"
    found = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"), "1")
    return found | {
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "PYTHONPATH": str(HERE),  # for step_pad
    }


def say(text: str) -> None:
    print(f"vllm_cpu: {text}", file=sys.stderr, flush=True)


def tail(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"--- last {len(lines)} lines of {log}", *lines, "---"])


def prepare(settings: Settings) -> None:
    """Install vLLM and build the model where they are missing or out of date; one process at a time."""
    STATE.mkdir(exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _step("installing vLLM", [str(HERE / "install.sh"), str(settings.venv)])
        recipe = settings.model / make_model.RECIPE
        if not (recipe.exists() and recipe.read_text().strip() == make_model.recipe_digest()):
            python = str(settings.venv / "bin" / "python")
            _step("building the model", [python, str(HERE / "make_model.py"), str(settings.model)])


def _step(what: str, argv: list[str]) -> None:
    with Child(argv) as child:
        code = child.wait(float("inf"))
    if code:
        raise ServerError(f"{what} failed (exit code {code}): {shlex.join(argv)}")


def choose_port(port: int) -> int:
    """*port* when it is free, or any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(f"port {port} on 127.0.0.1 is not free ({error}); choose another: --port N") from None
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(settings: Settings) -> Iterator[Running]:
    """A ready, warmed-up server for the length of the block."""
    prepare(settings)
    for old in sorted(STATE.glob("server-*.log"), key=lambda log: log.stat().st_mtime)[: 1 - KEPT_LOGS]:
        old.unlink(missing_ok=True)
    port = choose_port(settings.port)
    base = f"http://127.0.0.1:{port}"
    log = STATE / f"server-{port}.log"
    argv = [str(HERE / "serve.sh"), str(settings.model), str(port), *settings.vllm_args]
    with contextlib.ExitStack() as stack:
        # vLLM leaves its sockets behind; the folder is under the system's, since a socket's path must be short.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmmw-vllm-", ignore_cleanup_errors=True))
        env = os.environ | {"VENV": str(settings.venv), "TMPDIR": scratch}
        child = stack.enter_context(Child(argv, env=env, log=log))
        say(f"starting on {base} (pid {child.pid}, log {log})")

        def alive() -> None:
            if (code := child.ended()) is not None:
                raise ServerError(f"the server ended with exit code {code} before it was ready\n{tail(log)}")

        try:
            waited = ready.wait(base, timeout=settings.timeout, check=alive)
            warmed = ready.warm_up(base, api_key=settings.api_key)
        except (ready.NotReadyError, *ready.NOT_UP) as error:
            raise ServerError(f"the server did not get ready: {error}\n{tail(log)}") from error
        say(f"ready after {waited:.1f} s, warmed up in {warmed:.1f} s")
        yield Running(base, child.pid, log, settings.model_name, settings.api_key, child)
        began = time.monotonic()
        child.stop()
        say(f"stopped in {time.monotonic() - began:.1f} s")


def run(settings: Settings, command: list[str]) -> int:
    """Run *command* beside a server; returns its exit code (128 + n when signal n ended it)."""
    with server(settings) as running:
        with SIGNALS.held():  # in our own process group: it may read the terminal, and Ctrl-C reaches it by itself
            try:
                process = subprocess.Popen(command, env=os.environ | running.environment())
            except OSError as error:
                raise ServerError(f"cannot start {command[0]!r}: {error}") from None
        code = _wait_for_command(process, running)
    return 128 - code if code < 0 else code


def _wait_for_command(process: subprocess.Popen[bytes], running: Running) -> int:
    warned = False
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)
            if not warned and (code := running.child.ended()) is not None:
                warned = True
                say(f"the server ended with exit code {code} under the command\n{tail(running.log)}")
    except Stopped as stopped:
        with SIGNALS.held(drop=True):
            return _end_command(process, stopped.signum)


def _end_command(process: subprocess.Popen[bytes], signum: int) -> int:
    """Pass the signal on (a terminal's Ctrl-C has already reached the command), then insist."""
    first = 5.0 if signum == signal.SIGINT else 0.0
    for patience, following in ((first, signum), (10.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(patience)
        process.send_signal(following)
    return process.wait()


def serve(settings: Settings) -> int:
    """Keep a server up until Ctrl-C."""
    try:
        with server(settings) as running:
            print("\nvLLM is ready. To use it from another shell:\n")
            for name, value in running.environment().items():
                if name.startswith("LLMMW_"):
                    print(f"    export {name}={shlex.quote(value)}")
            print(f"\nIts log: {running.log}\nTo stop it: Ctrl-C here, or  kill {os.getpid()}\n", flush=True)
            try:
                while (code := running.child.wait(3600.0)) is None:
                    pass
            except Stopped as stopped:
                say(f"stopping ({stopped})")
                return 0
            raise ServerError(f"the server ended by itself with exit code {code}\n{tail(running.log)}")
    finally:
        sys.stdout.flush()


def parse(argv: Sequence[str] | None) -> tuple[str, Settings, list[str]]:
    """The action, its settings and the command after `--`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--venv", type=pathlib.Path, default=STATE / "venv", help="default: .vllm/venv")
    common.add_argument("--model", type=pathlib.Path, default=STATE / "model", help="default: .vllm/model")
    common.add_argument("--timeout", type=float, default=900.0, help="seconds until ready (default: %(default)g)")
    common.add_argument(
        "--vllm-args",
        default=os.environ.get("LLMMW_VLLM_ARGS", ""),
        metavar="'--flag value ...'",
        help="more arguments for vLLM, as one string (default: $LLMMW_VLLM_ARGS)",
    )
    parser = argparse.ArgumentParser(description="A real vLLM server on this machine's CPU.")
    actions = parser.add_subparsers(dest="action", required=True)
    keep = actions.add_parser("serve", parents=[common], help="keep a server up until Ctrl-C")
    keep.add_argument("--port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    around = actions.add_parser("run", parents=[common], help="run a command beside a server, then stop the server")
    around.add_argument("--port", type=int, default=0, help="default: a free one")
    around.add_argument("command", nargs="+", metavar="-- command ...")
    actions.add_parser("prepare", parents=[common], help="only install vLLM and build the model")
    args = parser.parse_args(argv)
    settings = Settings(
        venv=args.venv.absolute(),
        model=args.model.absolute(),
        port=getattr(args, "port", 0),
        timeout=args.timeout,
        vllm_args=tuple(shlex.split(args.vllm_args)),
    )
    return args.action, settings, getattr(args, "command", [])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action named on the command line; returns the exit code."""
    action, settings, command = parse(argv)
    SIGNALS.install()
    try:
        if action == "run":
            return run(settings, command)
        if action == "serve":
            return serve(settings)
        prepare(settings)
    except ServerError as error:
        say(f"error: {error}")
        return 1
    except Stopped as stopped:
        say(f"stopped by {stopped}")
        return 128 + stopped.signum
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
