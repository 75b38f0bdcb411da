"""vLLM's own API application around an engine in this process: all of vLLM that llmmw touches by name is here.

What vLLM's server does with a request (fields to sampling parameters, chat templates, tool and reasoning parsers, log
probabilities, bodies, error bodies) is 10,000 lines that change with every release. Two functions have led there since
0.6 (`build_app` and `init_app_state`, which RL frameworks and plugins call as well), and ASGI does not change at all.
So the application is built as the server builds it, from the server's own options, and asked through ASGI; what
differs between releases is where the functions live and which arguments they take, and arguments go by name.
"""

from __future__ import annotations

import difflib
import inspect
import os
from contextlib import asynccontextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from llmmw.endpoints.hosting import Hosted
from llmmw.errors import ConfigError, ConnectionFailed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

_PLACES = {
    "FlexibleArgumentParser": ("vllm.utils.argparse_utils", "vllm.utils"),
    "make_arg_parser": ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"),
    "validate_parsed_serve_args": ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"),
    "build_app": ("vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server"),
    "init_app_state": ("vllm.entrypoints.launchers.api_server.app_state", "vllm.entrypoints.openai.api_server"),
    "AsyncEngineArgs": ("vllm.engine.arg_utils",),
    "AsyncLLM": ("vllm.v1.engine.async_llm",),
}
"""Where vLLM keeps what, the newest place first."""

_FOR_THE_NETWORK = frozenset({
    "AuthenticationMiddleware", "CORSMiddleware", "PrometheusInstrumentatorMiddleware",
})  # fmt: skip
"""Keys, origins and HTTP metrics: nobody comes over a network here, and they cost a fifth of a call."""


_SHUTDOWN_S = 60.0


def _from_vllm(name: str) -> Any:
    for place in _PLACES[name]:
        try:
            return getattr(import_module(place), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    version = getattr(import_module("vllm"), "__version__", "?")
    raise ConfigError(f"VLLMEngine cannot work with this vLLM ({version}): it has no {name}; use a server and its URL")


def options_of(given: Mapping[str, Any]) -> Any:
    """The options of vLLM's server (engine and API), those given in place of its defaults.

    Raises:
        ConfigError: vLLM has no such option.
    """
    args = _from_vllm("make_arg_parser")(_from_vllm("FlexibleArgumentParser")()).parse_args([])
    # Its statistics go to logs and to /metrics, which nobody reads here, and cost time at every step.
    args.disable_log_stats = True
    for name, value in given.items():
        if not hasattr(args, name):
            known = cast("dict[str, Any]", vars(args))
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"VLLMEngine({name}=): vLLM has no such option{hint}")
        setattr(args, name, value)
    names = args.served_model_name
    args.served_model_name = [names] if isinstance(names, str) else names
    return args


@asynccontextmanager
async def started(model: str, given: Mapping[str, Any]) -> AsyncGenerator[Hosted]:
    """An engine of our own, and its application, as long as the block lasts. Starting takes 20 s and more.

    Raises:
        ConfigError: vLLM refuses its options.
        ConnectionFailed: it did not start.
    """
    # As vLLM's server does it: forking a process that has threads, as this one has, may hang.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    args = options_of({**given, "model": model})
    try:
        _from_vllm("validate_parsed_serve_args")(args)
        engine_args = _from_vllm("AsyncEngineArgs").from_cli_args(args)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"VLLMEngine: vLLM refuses its options: {error}") from error
    for name in given:
        if hasattr(engine_args, name):  # made into vLLM's own types, which the application reads
            setattr(args, name, getattr(engine_args, name))
    try:
        engine = _from_vllm("AsyncLLM").from_engine_args(engine_args)
    except ValueError as error:
        raise ConfigError(f"VLLMEngine: vLLM refuses its options: {error}") from error
    except RuntimeError as error:
        raise ConnectionFailed(
            f"vLLM did not start: {error} (what went wrong stands above, in its log; a script that starts it needs "
            "`if __name__ == '__main__':` around its work)"
        ) from error
    try:
        async with _hosted(engine, args) as hosted:
            yield hosted
    finally:
        # Its own 5 s are short for a busy machine, and what is killed leaves shared memory behind. Meanwhile the loop
        # stands still: vLLM's tasks on it would take the end of the processes for a failure.
        patience = {"timeout": _SHUTDOWN_S} if "timeout" in inspect.signature(engine.shutdown).parameters else {}
        engine.shutdown(**patience)
        del engine  # an error that vLLM has kept while it read its options holds this frame


@asynccontextmanager
async def joined(engine: Any, given: Mapping[str, Any]) -> AsyncGenerator[Hosted]:
    """An application around somebody else's engine, who closes it."""
    config = engine.vllm_config.model_config
    names = getattr(config, "served_model_name", None) or config.model
    async with _hosted(engine, options_of({"model": config.model, "served_model_name": names, **given})) as hosted:
        yield hosted


@asynccontextmanager
async def _hosted(engine: Any, args: Any) -> AsyncGenerator[Hosted]:
    tasks = await engine.get_supported_tasks()
    facts = {
        "engine_client": engine,
        "args": args,
        "supported_tasks": tasks,
        "vllm_config": engine.vllm_config,
        "model_config": engine.vllm_config.model_config,
    }
    app = _with(_from_vllm("build_app"), facts)
    app.user_middleware = [each for each in app.user_middleware if each.cls.__name__ not in _FOR_THE_NETWORK]
    app.middleware_stack = None  # made anew of these with the first request; one of vLLM's plugins has made it already
    await _with(_from_vllm("init_app_state"), {**facts, "state": app.state})
    app.state.server = SimpleNamespace(should_exit=False)  # which it tells to stop when the engine has died
    scheduler = engine.vllm_config.scheduler_config

    def broken() -> str | None:
        now = engine
        return f"vLLM's engine is dead: {now.dead_error}" if now is not None and now.errored else None

    def unfinished() -> int | None:
        count = getattr(engine, "get_num_unfinished_requests", None)
        return None if count is None else count()

    try:
        yield Hosted(app, broken, unfinished, by_priority=getattr(scheduler, "policy", "") == "priority")
    finally:
        # As vLLM's server does: the application is a knot, and the engine should not hang in it, nor in those above.
        del app.state
        engine = None


def _with(function: Any, facts: Mapping[str, Any]) -> Any:
    """Call a function of vLLM with those of the facts that its parameters name."""
    return function(**{name: facts[name] for name in inspect.signature(function).parameters if name in facts})
