"""`ModuleLLM`: Mesa-LLM's, with its questions going through a stack of llmmw."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

import mesa_llm.module_llm as upstream
import tenacity

from llmmw.call import Call
from llmmw_mesa import acting
from llmmw_mesa.failures import failed, refused
from llmmw_mesa.options import Options
from llmmw_mesa.shared import Shared, shared_by
from llmmw_mesa.upstream import Question, answer_of

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType
    from typing import Self

    from llmmw import Reply, Stack
    from llmmw_mesa.options import Scope

_once: ContextVar[bool] = ContextVar("llmmw_mesa_once", default=False)
_STATE = "_llmmw_state"
_KEYLESS = frozenset({"OLLAMA", "OLLAMA_CHAT"})


@contextmanager
def one_shot() -> Generator[None]:
    """Inside, every call is exactly one attempt: no repetition, no other endpoint."""
    token = _once.set(True)
    try:
        yield
    finally:
        _once.reset(token)


class State:
    """What belongs to one ModuleLLM and not to its configuration; copies and pickles start anew."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options
        """None: what `install()` was given."""
        self.token = acting.fresh_token()
        self.lock = threading.Lock()
        self.requests = self.hits = self.misses = self.joined = self.errors = 0
        self.shared: Shared | None = None

    def __reduce__(self) -> tuple[type[State], tuple[Options | None]]:
        return State, (self.options,)

    def count(self, reply: Reply | None) -> None:
        """One call has ended."""
        source = None if reply is None else reply.source
        with self.lock:
            self.requests += 1
            self.hits += source == "cache"
            self.joined += source == "coalesced"
            self.misses += source != "cache"
            self.errors += reply is None or not reply.ok


class Installed:
    """What `install()` has set for ModuleLLMs that were given nothing of their own."""

    options = Options()


def state_of(llm: Any) -> State:
    """The state of a ModuleLLM, also of one that Mesa-LLM made itself."""
    found: State | None = llm.__dict__.get(_STATE)
    if found is None:
        found = llm.__dict__.setdefault(_STATE, State())
    return found


def _options_of(llm: Any) -> Options:
    return state_of(llm).options or Installed.options


def _credential_of(llm: Any) -> str | None:
    """The key that LiteLLM will use: it reads the environment anew for each call."""
    provider = llm.llm_model.partition("/")[0].upper()
    if provider in _KEYLESS:
        return None
    return os.environ.get(f"{provider}_API_KEY") or getattr(llm, "api_key", None)


def _shared_of(llm: Any) -> Shared:
    state, options = state_of(llm), _options_of(llm)
    found = shared_by(llm.llm_model, llm.api_base, _credential_of(llm), options)
    if state.shared is not found:
        if state.shared is not None:
            state.shared.users.discard(llm)
        state.shared = found
    return found


def _messages(llm: Any, prompt: Any, system_prompt: str | None) -> list[dict[str, Any]]:
    if hasattr(llm, "_build_messages"):
        build = llm._build_messages  # noqa: SLF001 — Mesa-LLM has no public name for it
        found: list[dict[str, Any]] = build(prompt, system_prompt=system_prompt)
        return found
    messages: list[dict[str, Any]] = llm.get_messages(prompt)
    if system_prompt is not None and messages and messages[0].get("role") == "system":
        messages = [{**messages[0], "content": system_prompt}, *messages[1:]]
    return messages


def _call(llm: Any, shared: Shared, kwargs: dict[str, Any], *, plain: bool, once: bool) -> Call:
    options = shared.identity.options
    payload = {name: value for name, value in kwargs.items() if value is not None and name != "api_base"}
    if "response_format" in payload:
        payload["response_format"] = _schema(payload["response_format"])
    variant = [("mesa-run", str(options.run_seed))] if options.run_seed is not None else []
    if options.cache_scope == "agent":
        variant.insert(0, ("mesa-agent", acting.scope(options.run_seed, state_of(llm).token)))
    return Call(
        "chat",
        llm.llm_model,
        payload,
        context=acting.context_of_call(llm),
        native=Question(kwargs, plain, once),
        target=shared.name,
        namespace=shared.identity.namespace,
        variant=tuple(variant),
        inherits_context=True,
    )


def _schema(wanted: Any) -> Any:
    """A pydantic class as what it is sent as; two classes of one schema ask the same."""
    make = getattr(wanted, "model_json_schema", None)
    return {"type": "json_schema", "name": wanted.__name__, "schema": make()} if make is not None else wanted


def _kwargs(llm: Any, prompt: Any, tools: Any, choice: Any, format_: Any, system: str | None) -> dict[str, Any]:
    """What Mesa-LLM passes to LiteLLM."""
    found = {
        "model": llm.llm_model,
        "messages": _messages(llm, prompt, system),
        "tools": tools,
        "tool_choice": choice if tools else None,
        "response_format": format_,
    }
    if llm.api_base:
        found["api_base"] = llm.api_base
    return found


def _value(llm: Any, outcome: Reply | Exception) -> Any:
    reply = None if isinstance(outcome, Exception) else outcome
    state_of(llm).count(reply)
    try:
        if isinstance(outcome, Exception):
            raise _rewritten(llm, failed(outcome, llm.llm_model))
        if not outcome.ok:
            raise _rewritten(llm, refused(outcome, llm.llm_model))
        return answer_of(outcome)
    finally:
        del outcome  # an exception's traceback holds this frame


def _rewritten(llm: Any, error: Exception) -> Exception:
    """The words that Mesa-LLM itself gives to some errors."""
    rate, model = getattr(llm, "_build_rate_limit_error", None), getattr(llm, "_build_invalid_model_error", None)
    if rate is not None and isinstance(error, upstream.RateLimitError):
        made: Exception = rate(error)
    elif model is not None and (
        isinstance(error, upstream.NotFoundError) or str(error).startswith("This model isn't mapped yet.")
    ):
        made = model(error)
    else:
        return error
    made.__cause__ = error
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    return made


def _ask(llm: Any, kwargs: dict[str, Any], *, once: bool) -> Any:
    shared = _shared_of(llm)
    call = _call(llm, shared, kwargs, plain=True, once=once or _once.get())
    outcome: Reply | Exception
    try:
        outcome = shared.engine(llm).call_sync(call)
    except Exception as error:  # noqa: BLE001 — raised below, as what Mesa-LLM's users know
        outcome = error
    return _value(llm, outcome)


async def _aask(llm: Any, kwargs: dict[str, Any]) -> Any:
    shared = _shared_of(llm)
    call = _call(llm, shared, kwargs, plain=False, once=_once.get())
    outcome: Reply | Exception
    try:
        outcome = await shared.engine(llm).call(call)
    except Exception as error:  # noqa: BLE001 — as above
        outcome = error
    return _value(llm, outcome)


@tenacity.retry(stop=tenacity.stop_after_attempt(1), reraise=True)
def _generate_once(
    self: Any,
    prompt: str | list[str] | None = None,
    tool_schema: list[dict[str, Any]] | None = None,
    tool_choice: str = "auto",
    response_format: dict[str, Any] | object | None = None,
    system_prompt: str | None = None,
) -> Any:
    kwargs = _kwargs(self, prompt, tool_schema, tool_choice, response_format, system_prompt)
    return _ask(self, kwargs, once=True)


def generate(
    self: Any,
    prompt: str | list[str] | None = None,
    tool_schema: list[dict[str, Any]] | None = None,
    tool_choice: str = "auto",
    response_format: dict[str, Any] | object | None = None,
    system_prompt: str | None = None,
) -> Any:
    """Ask the model.

    `generate.__wrapped__` and what `generate.retry_with(...)` makes are one attempt each, as in Mesa-LLM.

    Args:
        self: a ModuleLLM, ours or Mesa-LLM's.
        prompt: one user message, several, or none.
        tool_schema: the tools it may call.
        tool_choice: which of them.
        response_format: a schema, or a pydantic class.
        system_prompt: for this call, in place of the module's.

    Returns:
        A litellm ModelResponse; every hit is an object of its own.

    Raises:
        litellm.exceptions.APIError: and its kin, with a note that lists the attempts.
    """
    kwargs = _kwargs(self, prompt, tool_schema, tool_choice, response_format, system_prompt)
    return _ask(self, kwargs, once=False)


for _name in ("__wrapped__", "retry", "retry_with"):
    setattr(generate, _name, getattr(_generate_once, _name))


async def agenerate(
    self: Any,
    prompt: str | list[str] | None = None,
    tool_schema: list[dict[str, Any]] | None = None,
    tool_choice: str = "auto",
    response_format: dict[str, Any] | object | None = None,
    system_prompt: str | None = None,
) -> Any:
    """`generate` for async code, on any loop."""
    kwargs = _kwargs(self, prompt, tool_schema, tool_choice, response_format, system_prompt)
    return await _aask(self, kwargs)


def get_performance_stats(self: Any) -> dict[str, Any]:
    """What was asked. Pull request #270's keys and those beside them count this object's own calls.

    request_count: calls, hits included; cache_hits, cache_hit_rate (0.0 before the first call), cache_misses,
    coalesced, errors. All else is the engine's, which all with the same server, credential and options share:
    batch_count, upstream_requests, tokens, latencies, layers, by_agent and so on; "shared" holds the engine's own
    figures of the first six.
    """
    state, found = state_of(self), dict(_shared_of(self).stats())
    with state.lock:
        own = {
            "request_count": state.requests,
            "cache_hits": state.hits,
            "cache_misses": state.misses,
            "cache_hit_rate": state.hits / state.requests if state.requests else 0.0,
            "coalesced": state.joined,
            "errors": state.errors,
        }
    return found | {"shared": {name: found[name] for name in own}} | own


async def cleanup(self: Any) -> None:
    """Send what waits and give up this object's part of the engine; the last user closes it. Idempotent.

    The statistics stay, and a later call opens it again.
    """
    shared = state_of(self).shared
    engine = None if shared is None else shared.leave(self)
    if engine is not None:
        await engine.aclose()


def close(self: Any) -> None:
    """`cleanup` for plain code."""
    shared = state_of(self).shared
    engine = None if shared is None else shared.leave(self)
    if engine is not None:
        engine.close()


METHODS = {
    "generate": generate,
    "agenerate": agenerate,
    "get_performance_stats": get_performance_stats,
    "cleanup": cleanup,
    "close": close,
}
"""What `install()` gives to Mesa-LLM's own class."""


class ModuleLLM(upstream.ModuleLLM):
    """Mesa-LLM's ModuleLLM with caching, joining, rate limits, retries and one loop; see `Options` for the settings.

    All with the same model, api_base, credential and options share one engine. `async with` it, or `cleanup()`.

    Raises:
        ConfigError: a value that cannot work.
        ValueError: as Mesa-LLM's own.
    """

    def __init__(
        self,
        llm_model: str,
        api_base: str | None = None,
        system_prompt: str | None = None,
        enable_caching: bool = False,  # noqa: FBT001, FBT002 — pull request #270's constructor
        enable_batching: bool = False,  # noqa: FBT001, FBT002 — as above
        cache_size: int = 1000,
        cache_ttl: float | str = 300.0,
        batch_size: int = 10,
        *,
        stack: Stack | None = None,
        sampling: Literal["share", "lanes", "deterministic"] = "share",
        cache_scope: Scope = "agent",
        cache_dir: str | None = None,
        run_seed: int | str | None = None,
        flush_interval: float | str = 0.005,
        max_concurrency: int | str = 64,
        rpm: int | None = None,
        tpm: int | None = None,
        timeout: float | str = 60.0,
        max_attempts: int = 4,
        deadline: float | str = 180.0,
    ) -> None:
        options = Options(
            enable_caching, enable_batching, cache_size, cache_ttl, batch_size, stack, sampling, cache_scope,
            cache_dir, run_seed, flush_interval, max_concurrency, rpm, tpm, timeout, max_attempts, deadline,
        )  # fmt: skip
        super().__init__(llm_model=llm_model, api_base=api_base, system_prompt=system_prompt)
        self.__dict__[_STATE] = State(options)

    generate = generate
    agenerate = agenerate
    get_performance_stats = get_performance_stats
    cleanup = cleanup
    close = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
