"""``python -m llmmw.testing.server``: every option of ``ServerConfig`` as a flag."""

import argparse
import asyncio
import signal
import sys
import typing
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import msgspec

from .app import ModelServer
from .config import FIELDS, ServerConfig, from_mapping

EPILOG = """\
The server is not a model: texts are made up, deterministic, and say nothing about the prompt. Tokens are runs of four
characters. Latency "engine" emulates continuous batching with the step times given; label such figures "emulated".
Statistics and run-time changes: /_control/stats, reset, config, faults, wait.
"""


def parser() -> argparse.ArgumentParser:
    """One flag per option; lists are comma separated, faults are JSON."""
    made = argparse.ArgumentParser(
        prog="llmmw serve",
        description="An OpenAI-shaped server with deterministic made-up answers (not a model), for tests and demos.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--config-json", metavar="JSON", help="options as one JSON object; flags override it")
    made.add_argument("--announce", action="store_true", help="print {url, pid} as JSON on one line")
    made.add_argument("--until-stdin-closes", action="store_true", help="stop when standard input ends")
    made.add_argument("--uvloop", action="store_true", help="run on uvloop (the extra llmmw[speed])")
    defaults = ServerConfig()
    for name, hint in typing.get_type_hints(ServerConfig, include_extras=True).items():
        default = getattr(defaults, name)
        about = " ".join(meta.description for meta in hint.__metadata__ if meta.description)
        flag = "--" + name.replace("_", "-")
        shown = ",".join(cast("tuple[str, ...]", default)) if isinstance(default, tuple) else default
        text = f"{about} (default: {shown if shown not in {None, ''} else 'none'})".replace("%", "%%")
        if isinstance(default, bool):
            made.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            made.add_argument(flag, metavar=name.rpartition("_")[2].upper(), help=text)
    return made


def config_from(options: dict[str, Any]) -> ServerConfig:
    """The config of parsed flags; ValueError names option, value and what is allowed."""
    values: dict[str, Any] = {}
    if "config_json" in options:
        values = _json("--config-json", options["config_json"], dict[str, Any])
    for name in FIELDS:
        if name not in options:
            continue
        value = options[name]
        if name == "faults":
            value = _json("--faults", value, list[Any])
        elif isinstance(getattr(ServerConfig(), name), tuple):
            value = [item for item in value.split(",") if item]
        elif isinstance(value, str):
            value = _number(name, value)
        values[name] = value
    return from_mapping(values)


def _json(flag: str, text: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{flag}: {text!r} is not allowed; {error}") from None


def _number(name: str, text: str) -> Any:
    """A flag's text as the option's type: texts stay, ``none`` is null, else a JSON number."""
    if isinstance(getattr(ServerConfig(), name), str):
        return text
    if text.lower() == "none":
        return None
    with suppress(msgspec.DecodeError):
        return msgspec.json.decode(text)
    return text


async def serve(config: ServerConfig, *, announce: bool, until_stdin_closes: bool) -> None:
    """Run until a signal (or the end of standard input)."""
    server = ModelServer(config)
    await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    if until_stdin_closes:
        await _watch_stdin(loop, stop)
    if announce:
        line = msgspec.json.encode({"url": server.url}).decode()
    else:
        line = f"llmmw embedded server (not a model) on {server.base_url}, model {config.models[0]}; Ctrl-C stops it"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    try:
        await stop.wait()
    finally:
        await server.stop()


async def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    class Watch(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 — asyncio's signature
            stop.set()

    await loop.connect_read_pipe(Watch, sys.stdin)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; the exit status."""
    options = vars(parser().parse_args(argv))
    try:
        config = config_from(options)
        factory = _loop_factory(wanted=options.get("uvloop", False))
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(
                serve(
                    config,
                    announce=options.get("announce", False),
                    until_stdin_closes=options.get("until_stdin_closes", False),
                )
            )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _loop_factory(*, wanted: bool) -> Any:
    if not wanted:
        return None
    try:
        import uvloop  # noqa: PLC0415 — an optional extra
    except ImportError:
        raise ValueError("--uvloop needs uvloop: pip install 'llmmw[speed]'") from None
    return uvloop.new_event_loop
