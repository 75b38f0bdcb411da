"""What the two batch APIs have in common: how a batch stands, and what became of one request in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from llmmw.answer import mapping, problem_with, usage_of
from llmmw.call import Reply
from llmmw.errors import Closed, ProtocolError, StatusError, UpstreamTimeout
from llmmw.fault import error_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Sequence

    from llmmw.call import Call
    from llmmw.offline.api import Api
    from llmmw.offline.shelf import Manifest

    Save = Callable[[Manifest], Awaitable[None]]

Ending = Literal["completed", "expired", "canceled", "failed"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_JSON = (("content-type", "application/json"),)
_FIRST_REFUSAL, _LAST_STATUS = 400, 599


class Standing(msgspec.Struct, frozen=True):
    """How a batch stands."""

    batch: str
    ended: Ending | None = None
    """None while it is under way."""
    finished: int = 0
    """Requests that have an outcome."""
    files: tuple[str, ...] = ()
    """What holds the results."""
    spoilt: tuple[tuple[int | None, StatusError], ...] = ()
    """Why a batch was refused as a whole: the index of a request that is to blame, or None, and the error."""


class Dialect(Protocol):
    """One of the APIs."""

    name: str
    max_requests: int
    max_bytes: int
    overhead: int
    """Bytes of a submission besides its lines."""
    proves: bool
    """Whether a batch that `find` finds is certainly the manifest's."""

    def translated(self, call: Call) -> Call:
        """The call as this API makes it.

        Raises:
            ConfigError: it has no such call.
        """
        ...

    def batch_of(self, call: Call) -> Hashable:
        """Calls of equal value may be in one batch."""
        ...

    def line(self, call: Call, custom_id: str) -> bytes:
        """A request, as it stands in the submission."""
        ...

    async def submit(self, api: Api, manifest: Manifest, lines: Sequence[bytes], save: Save) -> str:
        """Make the batch; its name. The manifest is saved with `sent` before the request that makes it."""
        ...

    async def find(self, api: Api, manifest: Manifest, taken: frozenset[str]) -> str | None:
        """The batch of a manifest whose submission had no known outcome, if there is one.

        Args:
            api: asks the server.
            manifest: with `sent`.
            taken: batches that are known to be others.
        """
        ...

    async def look(self, api: Api, batch: str) -> Standing:
        """How a batch stands."""
        ...

    async def results(self, api: Api, standing: Standing) -> list[tuple[str, Reply | Exception]]:
        """Outcomes by custom id, in any order, of a batch that has ended."""
        ...

    async def cancel(self, api: Api, batch: str) -> None:
        """Have it stop."""
        ...


def reply_of(op: str, status: object, body: object, endpoint: str) -> Reply | Exception:
    """One request's outcome from the status and body that the server recorded."""
    if not isinstance(status, int) or not 100 <= status <= _LAST_STATUS:  # noqa: PLR2004 — HTTP
        return ProtocolError("a result without a status", endpoint=endpoint)
    data = msgspec.json.encode(body)
    reply = Reply(data=data, usage=usage_of(body), source="batch", endpoint=endpoint, status=status, headers=_JSON)
    if status >= _FIRST_REFUSAL:
        return error_of(reply)
    problem = problem_with(op, body)
    return reply if problem is None else ProtocolError(f"a result that is no answer: {problem}", endpoint=endpoint)


def never_run(why: Ending, endpoint: str, *, batch: str) -> Exception:
    """The error of a request that a batch ended without."""
    if why == "expired":
        return UpstreamTimeout(f"batch {batch} expired before this request was run", endpoint=endpoint, sent=False)
    if why == "canceled":
        return Closed(f"batch {batch} was canceled before this request was run")
    return ProtocolError(f"batch {batch} has ended without a result for this request", endpoint=endpoint)


def refused_whole(error: Any, endpoint: str) -> StatusError:
    """The error of a batch that was refused after its submission, from {"code", "message"}."""
    said = mapping(error)
    body = {"error": {"message": said.get("message"), "type": "invalid_request_error", "code": said.get("code")}}
    return error_of(Reply(data=msgspec.json.encode(body), status=_FIRST_REFUSAL, endpoint=endpoint))


def name_of(found: object, endpoint: str = "") -> str:
    """A name that the server gave, fit for a path."""
    if not isinstance(found, str) or _NAME.fullmatch(found) is None:
        raise ProtocolError("an object without a usable id", endpoint=endpoint)
    return found
