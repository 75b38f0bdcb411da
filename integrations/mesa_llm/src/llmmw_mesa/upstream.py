"""LiteLLM as an endpoint: one attempt per call, and its exceptions told apart by what happened, not by their names."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import litellm
import mesa_llm.module_llm as upstream
import msgspec
from anyio import CapacityLimiter, to_thread

from llmmw import AmbiguousOutcome, ConnectionFailed, UpstreamTimeout
from llmmw.answer import usage_of
from llmmw.call import Reply
from llmmw.endpoints.base import counted
from llmmw.env import Env
from llmmw.pool.guard import is_loopback
from llmmw_mesa.figures import Account  # noqa: TC001 — msgspec evaluates it

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from llmmw.call import Call

_THREADS = 512
"""Upper bound on threads for somebody's own `completion`; the stack's concurrency is what is meant to bind."""
_LITELLM = {"max_retries": 0, "num_retries": 0}
"""The stack owns retries: neither LiteLLM nor the SDK below it repeats anything."""
_REFUSED, _TOO_MANY, _BUSY = 400, 429, 503
_NOT_SENT = frozenset({
    "ConnectTimeout", "ConnectError", "ConnectionRefusedError", "ClientConnectorError", "ClientConnectorDNSError",
})  # fmt: skip
_LOST = frozenset({"APIConnectionError", "ReadError", "WriteError", "RemoteProtocolError", "ServerDisconnectedError"})
ORIGINAL = "_llmmw_original"
"""Attribute of a function that `install()` put in place of another."""


class Question(msgspec.Struct, frozen=True):
    """What LiteLLM is asked."""

    kwargs: dict[str, Any]
    plain: bool = False
    """From plain code: `completion` is meant, where somebody has put their own in its place."""
    once: bool = False
    """Exactly one attempt: however it ends, that is the end."""
    account: Account | None = None
    """On whom it is counted."""


class OnlyTry(Exception):
    """How an attempt ended that nothing may repeat or send elsewhere: a one-shot call's, or one that nothing heals."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class LiteLLMEndpoint:
    """Runs `mesa_llm.module_llm.acompletion` (looked up anew for each call) on the engine's loop.

    Args:
        name: identity of what is asked, without secrets.
        api_base: where it is, if that is known; a server on this machine may be asked twice without harm.
    """

    def __init__(self, name: str, api_base: str | None) -> None:
        self.name = name
        local = api_base is not None and is_loopback(urlsplit(api_base).hostname or "")
        self.capabilities: frozenset[str] = frozenset({"idempotent"}) if local else frozenset()
        self._env = Env()
        self._threads: CapacityLimiter | None = None
        self._given_up: set[asyncio.Future[Any]] = set()

    def start(self, env: Env) -> None:
        """The engine's env."""
        self._env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Make one attempt; a refusal is a Reply with LiteLLM's exception as `native`."""
        return await counted(self._env, self.name, call, self._work)

    async def _work(self, call: Call) -> Reply:
        question: Question = call.native
        if question.account is not None:
            question.account.sent()
        try:
            answer = await self._ask(question)
        except Exception as error:
            if question.once:
                raise OnlyTry(error) from error
            return told(error)
        reply = reply_of(answer)
        if question.account is not None:
            question.account.used(reply.usage)
        return reply

    async def _ask(self, question: Question) -> Any:
        ask, ask_plain = _original(upstream.acompletion), _original(upstream.completion)
        if question.plain and not _is_litellms(ask_plain):
            if self._threads is None:
                self._threads = CapacityLimiter(_THREADS)
            # Whoever gives up need not wait for a thread that hangs; it keeps its place until it ends.
            return await to_thread.run_sync(
                lambda: ask_plain(**question.kwargs), limiter=self._threads, abandon_on_cancel=True
            )
        own = _LITELLM if _is_litellms(ask) else {}  # somebody else's function may not know them
        return await self._in_a_task(ask(**question.kwargs | own))

    async def _in_a_task(self, work: Awaitable[Any]) -> Any:
        """LiteLLM takes a cancellation for a lost connection, unless the running task has been told to cancel.

        Ours reach the coroutine alone (`llmmw.interrupt`): a task of its own makes them known.
        """
        task = asyncio.ensure_future(work)
        try:
            return await task
        finally:
            if not task.done():
                self._given_up.add(task)
                task.add_done_callback(self._gone)
                task.cancel()

    def _gone(self, task: asyncio.Future[Any]) -> None:
        self._given_up.discard(task)
        if not task.cancelled():
            task.exception()  # nobody waits for it

    def rehome(self) -> None:
        """What belongs to a loop that is gone."""
        self._threads, self._given_up = None, set()

    async def aclose(self) -> None:
        """Close what LiteLLM has opened on this loop: it keeps a client per loop, for a loop that ends as well."""
        if self._given_up:
            await asyncio.wait(self._given_up)
        await _close_clients()

    def __repr__(self) -> str:
        return f"LiteLLMEndpoint({self.name!r})"


def _original(function: Any) -> Any:
    return getattr(function, ORIGINAL, function)


def _is_litellms(thing: Any) -> bool:
    """Also a function that a tracing tool has wrapped, as `functools.wraps` does: that passes on what it is given."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "litellm"


async def _close_clients() -> None:
    clients: dict[str, Any] = getattr(litellm.in_memory_llm_clients_cache, "cache_dict", {})
    ending = f"-{id(asyncio.get_running_loop())}"
    for client in [clients.pop(key) for key in list(clients) if key.endswith(ending)]:
        close = getattr(client, "close", None) or getattr(client, "aclose", None)
        with contextlib.suppress(Exception):  # whatever it is, it is not needed any more
            closing = close() if close is not None else None
            if inspect.isawaitable(closing):
                await closing


def reply_of(answer: Any) -> Reply:
    """An answer of LiteLLM's: its JSON is what is stored, and every hit gets an object of its own from it."""
    try:
        data = answer.model_dump_json().encode()
    except (AttributeError, TypeError, ValueError):
        return Reply(native=answer)  # a stand-in in somebody's tests
    if not isinstance(answer, litellm.ModelResponse):
        return Reply(native=answer)
    return Reply(data=data, native=answer, usage=usage_of(msgspec.json.decode(data)))


def answer_of(reply: Reply) -> Any:
    """The caller's own object: nobody else's changes show in it."""
    if reply.data is None or (reply.source == "upstream" and reply.native is not None):
        return reply.native
    return litellm.ModelResponse(**msgspec.json.decode(reply.data))


def told(error: Exception) -> Reply:
    """A refusal as a Reply.

    LiteLLM calls every error that speaks of "rate_limit" a RateLimitError, a missing package a connection error, a lost
    connection an InternalServerError, and gives each a status of its own making; what the server said is in the
    exception that it was made from.

    Raises:
        LLMMWError: nothing was refused: the connection failed or timed out; LiteLLM's exception is its cause.
        OnlyTry: a package is missing.
        Exception: the error itself, where it is none of these.
    """
    chain = sorted(_chain(error), key=_is_litellms)  # whose exceptions make up a response of their own
    answer = next((found for found in map(_answer, chain) if found is not None), None)
    if answer is not None:
        said, headers, body = answer
        return Reply(data=body or _made_up(error), status=said, headers=headers, native=error)
    if any(isinstance(found, ImportError) for found in chain) or "No module named" in str(error):
        raise OnlyTry(error) from error
    names = {type(found).__name__ for found in chain}
    if names & _NOT_SENT:
        raise ConnectionFailed(f"no connection ({type(error).__name__})") from error
    if isinstance(error, litellm.Timeout):
        raise UpstreamTimeout(f"no answer in time ({type(error).__name__})") from error
    if names & _LOST:
        raise AmbiguousOutcome(f"the connection broke ({type(error).__name__})") from error
    status = getattr(error, "status_code", None)
    if not isinstance(status, int) or status < _REFUSED:
        raise error
    # No server has said 429, so there is none to wait for: a failure like any other.
    return Reply(data=_made_up(error), status=_BUSY if status == _TOO_MANY else status, native=error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was made from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _answer(error: BaseException) -> tuple[int, tuple[tuple[str, str], ...], bytes] | None:
    """Status, headers and body that a server gave. Only responses that LiteLLM makes up have no headers."""
    response = getattr(error, "response", None)
    status, headers = getattr(response, "status_code", None), getattr(response, "headers", None)
    if not isinstance(status, int) or status < _REFUSED or not headers:
        return None
    body = b""
    with contextlib.suppress(Exception):  # it was not read, or is no such response
        body = bytes(response.content)  # type: ignore[union-attr]  # — as above
    return status, tuple((str(name).lower(), str(value)) for name, value in headers.items()), body


def _made_up(error: Exception) -> bytes:
    said = {"message": str(getattr(error, "message", error)), "code": getattr(error, "code", None)}
    return msgspec.json.encode({"error": said}, enc_hook=str)
