"""Which calls are the same question: the key of a call, and which calls may share an answer.

`key_of` is the identity of a request. `Sharing` decides, for cache and coalescer alike, whether and under which
key a call may be answered by another call's answer.
"""

from __future__ import annotations

import heapq
import os
import threading
import weakref
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from llmmw.keys.canonical import SCALARS, Uncacheable, arguments_form, json_form
from llmmw.keys.identity import VARIANT_HEADERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmmw.call import Call

__all__ = [
    "KEY_SCHEMA", "NOT_SHARED", "TRANSPORT_FIELDS", "Draw", "Lanes", "Sampling", "Sharing", "Uncacheable", "head_of",
    "is_deterministic", "key_of", "wire_body",
]  # fmt: skip

KEY_SCHEMA = 2
"""Part of every key; raised when the form changes, so that old entries are not found rather than misread."""

Sampling = Literal["share", "lanes", "deterministic"]

TRANSPORT_FIELDS = frozenset({
    "stream", "stream_options", "timeout", "max_retries", "metadata", "idempotency_key", "extra_headers",
    "request_id", "priority",
})  # fmt: skip
"""Body fields that cannot change the answer; every other field counts. The last two are vLLM's (name of the
request, place in its queue)."""

_KEPT_BY_SERVER = ("conversation", "container")
_SPECIAL = TRANSPORT_FIELDS | {"extra_body", *_KEPT_BY_SERVER}
_MAX_LANES = 500_000


def key_of(call: Call, *, lane: str = "", remote_content: bool = False) -> bytes:
    """The 32-byte key of a request. Equal keys mean: the same answer would do.

    Args:
        call: for op "function" every argument counts; otherwise fields of the transport are left out,
            `extra_body` is merged first, and mapping order counts inside schemas only.
        lane: sets apart independent samples of one request.
        remote_content: whether a request that links to remote content has a key.

    Raises:
        Uncacheable: the request has no injective form, or its answer depends on more than itself.
    """
    context = call.context
    if call.op == "function":
        digest = sha256(arguments_form(head_of(call, context.tenant), call.payload)).digest()
    else:
        payload = call.payload
        body: dict[str, Any] = payload if type(payload) is dict else dict(payload)  # pyright: ignore[reportUnknownVariableType]
        if not _SPECIAL.isdisjoint(body):
            body, call = wire_body(body, call)
        form = json_form(head_of(call, context.tenant), body, remote_content=remote_content)
        digest = sha256(form).digest()
    return _in_lane(digest, lane) if lane else digest


def head_of(call: Call, tenant: str | None) -> tuple[object, ...]:
    """What identifies a call besides its body."""
    return (KEY_SCHEMA, call.op, call.target, call.model, call.namespace, tenant, call.variant)


def _in_lane(base: bytes, lane: str) -> bytes:
    try:
        return sha256(base + lane.encode()).digest()
    except UnicodeEncodeError:
        raise Uncacheable("lone surrogate") from None


def wire_body(body: Mapping[str, Any], call: Call) -> tuple[dict[str, Any], Call]:
    """The body as it is sent, without fields of the transport; headers that matter move to the call's variant."""
    merged = dict(body)
    extra = merged.pop("extra_body", None)
    if isinstance(extra, dict):
        merged.update(cast("dict[str, Any]", extra))
    elif extra is not None:
        raise Uncacheable("extra_body that is not a mapping")
    if call.op in {"messages", "responses"} and any(merged.get(name) is not None for name in _KEPT_BY_SERVER):
        raise Uncacheable("state kept by the server")
    headers = merged.get("extra_headers")
    if isinstance(headers, dict):
        named = cast("dict[object, object]", headers)
        added = {(str(name).lower(), str(value)) for name, value in named.items()}
        kept = {(name, value) for name, value in added if name in VARIANT_HEADERS}
        if kept:
            call = call.replace(variant=tuple(sorted({*call.variant, *kept})))
    return {name: value for name, value in merged.items() if name not in TRANSPORT_FIELDS}, call


def is_deterministic(call: Call) -> bool:
    """Whether the same request should get the same answer again: temperature 0 or an explicit seed, and one sample.

    Embeddings always are. A function is judged by its arguments: it is where it was given `temperature=0` or a
    `seed` (also inside a mapping argument named `extra_body`). No temperature is not temperature 0.
    """
    if call.op == "embed":
        return True
    fields: Mapping[str, Any] = call.payload
    extra = fields.get("extra_body")
    if isinstance(extra, dict):
        fields = {**fields, **cast("dict[str, Any]", extra)}
    if not (_is_one(fields.get("n")) and _is_one(fields.get("best_of"))):
        return False
    temperature, seed = fields.get("temperature"), fields.get("seed")
    is_zero = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0
    return is_zero or (isinstance(seed, int) and not isinstance(seed, bool))


def _is_one(count: object) -> bool:
    return count is None or count == 1


class Draw(msgspec.Struct, frozen=True):
    """A call's place among those that share its answer."""

    key: bytes
    """Sharing key; b"" where the call may share with nobody."""
    base: bytes = b""
    """Key of the request without its lane; what `invalidate` goes by."""
    agent: bytes = b""
    index: int = -1
    """Which sample of its agent this is; -1 where samples are not told apart."""


NOT_SHARED = Draw(b"")


class Sharing:
    """The sampling policy: under which key, if any, a call may be answered by another call's answer.

    Args:
        sampling: "share": the same request, the same answer. "lanes": each agent has its own k-th sample of a
            request, so agents do not become clones and a rerun replays the same diversity. "deterministic":
            only requests that would get the same answer anyway.
        remote_content: whether requests that link to remote content take part.
    """

    def __init__(self, sampling: Sampling = "deterministic", *, remote_content: bool = False) -> None:
        self.sampling: Sampling = sampling
        self.remote_content = remote_content
        self._lanes = Lanes()

    def draw(self, call: Call) -> Draw:
        """The call's place; `NOT_SHARED` where the policy keeps it apart. Thread-safe.

        Raises:
            Uncacheable: the request has no key.
        """
        sampling = self.sampling
        told_apart = sampling != "share" and not is_deterministic(call)
        if told_apart and sampling == "deterministic":
            return NOT_SHARED
        base = key_of(call, remote_content=self.remote_content)
        if not told_apart:
            return Draw(base, base)
        return self._lanes.draw(base, call.context.agent, call.context.sample)

    def begin_run(self) -> None:
        """Every agent draws from its first sample again."""
        self._lanes.forget()

    def is_still(self, call: Call, draw: Draw) -> bool:
        """Whether the call is the request that it was when it was drawn."""
        for value in call.payload.values():
            if type(value) not in SCALARS:
                break
        else:
            return True  # nothing in it can have changed
        try:
            return key_of(call, remote_content=self.remote_content) == draw.base
        except (Uncacheable, RuntimeError):  # the latter: it changes at this moment, in another thread
            return False

    def give_back(self, draw: Draw) -> None:
        """The draw got no answer: the agent's next draw of this request takes its place."""
        if draw.index >= 0:
            self._lanes.give_back(draw)


class Lanes:
    """Which sample of a request each agent draws next; never depends on the order between agents.

    Counts live as long as the engine (one run), for at most 500,000 pairs of agent and request; beyond that the
    oldest pair is forgotten and would start again from sample 0.
    """

    def __init__(self) -> None:
        self._next: dict[bytes, int] = {}
        self._returned: dict[bytes, list[int]] = {}
        self.after_fork()
        _lanes.add(self)

    def after_fork(self) -> None:
        """The lock may have been held by a thread that does not exist in the child."""
        self._lock = threading.Lock()

    def draw(self, base: bytes, agent: str | None, sample: int | None) -> Draw:
        """The agent's next sample of a request, or the one it names."""
        lane = "" if agent is None else "a" + agent
        if sample is not None:
            return Draw(_in_lane(base, f"{sample} {lane}"), base)
        owner = _in_lane(base, "owner " + lane)
        with self._lock:
            returned = self._returned.get(owner)
            if returned:
                index = heapq.heappop(returned)
                if not returned:
                    del self._returned[owner]
            else:
                index = self._next.get(owner, 0)
                self._next[owner] = index + 1
                if len(self._next) > _MAX_LANES:
                    oldest = next(iter(self._next))
                    del self._next[oldest]
                    self._returned.pop(oldest, None)
        return Draw(_in_lane(base, f"{index} {lane}"), base, owner, index)

    def give_back(self, draw: Draw) -> None:
        """The draw was not used."""
        with self._lock:
            returned = self._returned.setdefault(draw.agent, [])
            if draw.index not in returned:  # a refusal, then its broken body
                heapq.heappush(returned, draw.index)

    def forget(self) -> None:
        """Begin a new run: every agent draws from sample 0 again."""
        with self._lock:
            self._next.clear()
            self._returned.clear()


_lanes: weakref.WeakSet[Lanes] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lanes in list(_lanes):
        lanes.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
