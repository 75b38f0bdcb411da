"""How a ModuleLLM, ours or Mesa-LLM's own, asks: its state, its call, its answer. `module.py` has the methods."""

from __future__ import annotations

import functools
import inspect
import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import mesa_llm.module_llm as upstream

from llmmw import Closed
from llmmw.call import Call
from llmmw_mesa import acting
from llmmw_mesa.beside import Beside
from llmmw_mesa.failures import failed, refused
from llmmw_mesa.figures import Account, Figures
from llmmw_mesa.options import Options
from llmmw_mesa.shared import Shared, is_ending, shared_by
from llmmw_mesa.upstream import Question, answer_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from llmmw import Reply

_once: ContextVar[bool] = ContextVar("llmmw_mesa_once", default=False)
OPTIONS = "_llmmw_options"
"""Attribute of a ModuleLLM of ours: with Mesa-LLM's own, all that copies and pickles carry."""
_KEYLESS = frozenset({"OLLAMA", "OLLAMA_CHAT"})
_NOT_ASKED = frozenset({"api_base", "num_retries", "max_retries", "fallbacks"})
"""Arguments that say where and how often, not what."""


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

    def __init__(self) -> None:
        self.token = acting.fresh_token()
        self.figures = Figures()
        """Of all its calls."""
        self.alone = Figures()
        """Of those that belong to no agent's step."""
        self.owners: WeakSet[Any] = WeakSet()
        """Agents that were seen to have it; `collect.py` asks."""
        self.shared: Shared | None = None


class Installed:
    """What `install()` has set for ModuleLLMs that were given nothing of their own."""

    options = Options()


_states = Beside(State)


def state_of(llm: Any) -> State:
    """The state of a ModuleLLM, also of one that Mesa-LLM made itself."""
    return _states.of(llm)


def _options_of(llm: Any) -> Options:
    found: Options | None = llm.__dict__.get(OPTIONS)
    return found or Installed.options


def _credential_of(llm: Any) -> str | None:
    """The key that LiteLLM will use: it reads the environment anew for each call."""
    provider = llm.llm_model.partition("/")[0].upper()
    if provider in _KEYLESS:
        return None
    return os.environ.get(f"{provider}_API_KEY") or getattr(llm, "api_key", None)


def shared_of(llm: Any) -> Shared:
    """The engine's owner for what this ModuleLLM is now: its fields may have changed since the last call."""
    state, options = state_of(llm), _options_of(llm)
    found = shared_by(llm.llm_model, llm.api_base, _credential_of(llm), options)
    if state.shared is not found:
        if state.shared is not None:
            state.shared.users.discard(state)
        state.shared = found
    return found


def _messages(llm: Any, prompt: Any, system_prompt: str | None) -> list[dict[str, Any]]:
    build: Any = getattr(llm, "_build_messages", None) or llm.get_messages  # before 0.3
    if system_prompt is not None and "system_prompt" in inspect.signature(build).parameters:
        found: list[dict[str, Any]] = build(prompt, system_prompt=system_prompt)
        return found
    messages: list[dict[str, Any]] = build(prompt)
    if system_prompt is None:
        return messages
    others = messages[1:] if messages and messages[0].get("role") == "system" else messages
    return [{"role": "system", "content": system_prompt}, *others]


def _call(llm: Any, shared: Shared, kwargs: dict[str, Any], *, plain: bool, once: bool) -> Call:
    state = state_of(llm)
    payload = {name: value for name, value in kwargs.items() if value is not None and name not in _NOT_ASKED}
    if "response_format" in payload:
        payload["response_format"] = _schema(payload["response_format"])
    return Call(
        "chat",
        llm.llm_model,
        payload,
        context=acting.context_of_call(llm),
        native=Question(kwargs, plain, once, Account(acting.current_part(), state.figures, state.alone)),
        target=shared.name,
        namespace=shared.namespace,
        variant=_variant(shared, state, once=once),
        inherits_context=True,
    )


def _variant(shared: Shared, state: State, *, once: bool) -> tuple[tuple[str, str], ...]:
    """Who may share the answer besides those who ask the same, by name and sorted."""
    options, part, token = shared.identity.options, acting.current_part(), state.token
    found: dict[str, str] = {}
    if options.run_seed is not None:
        found["mesa-run"] = str(options.run_seed)
        token = f"{options.run_seed}#{shared.number_of(state)}"
        if part is not None and part.model is not None:
            shared.steps_for(part.model)
    if options.cache_scope == "agent":
        found["mesa-agent"] = acting.scope(options.run_seed, token)
    if once:  # who is patient must not get the outcome of who is not, and the other way round
        found["mesa-once"] = "1"
    return tuple(sorted(found.items()))


def _schema(wanted: Any) -> Any:
    """A pydantic class as what it is sent as; two classes of one schema ask the same."""
    return _schema_of(wanted) if isinstance(wanted, type) and hasattr(wanted, "model_json_schema") else wanted


@functools.lru_cache(maxsize=256)
def _schema_of(wanted: Any) -> dict[str, Any]:
    """Once a class: pydantic makes it anew each time, in milliseconds."""
    return {"type": "json_schema", "name": wanted.__name__, "schema": wanted.model_json_schema()}


def kwargs_of(
    llm: Any, prompt: Any, tools: Any, choice: Any, format_: Any, system: str | None, *, quiet: bool = False
) -> dict[str, Any]:
    """What Mesa-LLM passes to LiteLLM."""
    messages = _messages(llm, prompt, system)
    build = getattr(llm, "_build_completion_kwargs", None)  # after 0.3
    if build is not None:
        found: dict[str, Any] = build(messages, tools, choice, format_, quiet)
        return found
    if quiet:
        raise TypeError("this Mesa-LLM's ModuleLLM has no suppress_thinking")
    found = {
        "model": llm.llm_model,
        "messages": messages,
        "tools": tools,
        "tool_choice": choice if tools else None,
        "response_format": format_,
    }
    if llm.api_base:
        found["api_base"] = llm.api_base
    return found


def _is_once(llm: Any) -> bool:
    """Whether this call is to be one attempt: by our `one_shot()`, by Mesa-LLM's own way, or by its `max_retries=0`."""
    theirs: Any = getattr(upstream, "_ONE_SHOT_COMPLETION", None)  # after 0.3
    return _once.get() or (theirs is not None and bool(theirs.get())) or getattr(llm, "max_retries", None) == 0


def _value(llm: Any, call: Call, outcome: Reply | Exception) -> Any:
    call.native.account.ended(None if isinstance(outcome, Exception) else outcome)
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


def ask(llm: Any, kwargs: dict[str, Any], *, once: bool) -> Any:
    """LiteLLM's answer, from plain code; `once`: exactly one attempt."""
    shared = shared_of(llm)
    call = _call(llm, shared, kwargs, plain=True, once=once or _is_once(llm))
    outcome: Reply | Exception
    while True:
        try:
            with acting.counted():
                outcome = shared.engine(state_of(llm)).call_sync(call)
        except Exception as error:  # noqa: BLE001 — raised below, as what Mesa-LLM's users know
            if _came_too_late(error, call):
                continue
            outcome = error
        return _value(llm, call, outcome)


async def aask(llm: Any, kwargs: dict[str, Any]) -> Any:
    """LiteLLM's answer, on any loop."""
    shared = shared_of(llm)
    call = _call(llm, shared, kwargs, plain=False, once=_is_once(llm))
    outcome: Reply | Exception
    while True:
        try:
            with acting.counted():
                outcome = await shared.engine(state_of(llm)).call(call)
        except Exception as error:  # noqa: BLE001 — as above
            if _came_too_late(error, call):
                continue
            outcome = error
        return _value(llm, call, outcome)


def _came_too_late(error: Exception, call: Call) -> bool:
    """Whether somebody closed the engine between its opening and the call: it opens again, as for any later call."""
    return isinstance(error, Closed) and not call.native.account.requests and not is_ending()
