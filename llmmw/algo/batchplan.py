"""Which calls may travel together, when a group goes, and whose part of a joint answer is whose. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import msgspec

from llmmw.answer import Usage, items, mapping, text_of, usage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.call import Call

K = TypeVar("K")
T = TypeVar("T")

_PROMPT = {"chat": "messages", "complete": "prompt"}
"""The field in which calls of one group may differ."""

_APART = frozenset({
    "tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "ignore_eos", "min_tokens", "best_of",
    "echo", "suffix", "stream_options",
})  # fmt: skip
"""Fields that a joint request ignores or gets wrong (vLLM's batch chat drops tools and ignore_eos silently)."""


class Kind(NamedTuple):
    """What calls that travel together have in common."""

    op: str
    model: str
    target: str
    namespace: str
    tenant: str | None
    variant: tuple[tuple[str, str], ...]
    priority: int
    headers: tuple[tuple[str, str], ...] = ()
    """Headers that the caller added (a client's call carries them as `native`)."""
    rest: bytes = b""
    """Everything else of the body but the prompt."""


class Grouping(msgspec.Struct, frozen=True):
    """Where a call belongs."""

    kind: Kind
    joint: bool
    """Whether they may share one request, where the endpoint takes that."""
    twin: bytes | None = None
    """Calls of one group and twin have one answer (temperature 0, same prompt); None: every call has its own."""


def grouping(call: Call) -> Grouping | None:
    """The group of a call, or None for one that always goes alone (a stream, n > 1, tools, unknown operations).

    A transport edge's own request never shares one: its headers hold the credential.
    """
    if call.stream or call.direct:
        return None
    kind = Kind(call.op, call.model, call.target, call.namespace, call.context.tenant, call.variant, call.priority)
    if call.op == "function":
        return Grouping(kind, joint=False)
    field = _PROMPT.get(call.op)
    if field is None or call.payload.get("n") not in {None, 1} or not _APART.isdisjoint(call.payload):
        return None
    if not _is_one_prompt(call.payload.get(field)):
        return None
    rest = {name: value for name, value in call.payload.items() if name not in {field, "stream"}}
    try:
        shared = msgspec.json.encode(rest, order="deterministic")
        greedy = call.payload.get("temperature") == 0
        twin = msgspec.json.encode(call.payload[field], order="deterministic") if greedy else None
    except (TypeError, ValueError, RecursionError):
        return None
    native: Any = call.native
    headers = cast("tuple[tuple[str, str], ...]", native) if isinstance(native, tuple) else ()
    return Grouping(kind._replace(headers=headers, rest=shared), joint=native is None or native is headers, twin=twin)


def _is_one_prompt(prompt: object) -> bool:
    """A conversation, a text or a list of token ids; not already a list of several."""
    if isinstance(prompt, str):
        return True
    found = items(prompt)
    return bool(found) and isinstance(found[0], dict | int)


def joint_call(calls: Sequence[Call]) -> Call:
    """One call for several of one group: "chat" becomes "chat_batch", "complete" gets a list of prompts.

    It is as urgent as its most urgent and may last as long as its latest member, and belongs to nobody.
    """
    first = calls[0]
    field = _PROMPT[first.op]
    deadlines = [call.deadline for call in calls]
    latest = None if None in deadlines else max(moment for moment in deadlines if moment is not None)
    context = msgspec.structs.replace(
        first.context, agent=None, sample=None, tags=(), priority=min(call.priority for call in calls), deadline=latest
    )
    return first.replace(
        op="chat_batch" if first.op == "chat" else first.op,
        payload={**first.payload, field: [call.payload[field] for call in calls]},
        context=context,
        urgency=None,
        key=b"",
        fill=None,
    )


def split_answer(body: object, calls: Sequence[Call]) -> list[tuple[dict[str, Any], Usage] | str]:
    """Each call's own answer in a joint one, in order: (body, usage), or why it has none.

    Choices are matched by index; a missing or repeated index fails its call only, an unknown one nobody. The usage,
    reported once for all, is divided in proportion to the lengths of prompts and answers, without losing a token.
    """
    root = mapping(body)
    found: dict[int, list[dict[str, Any]]] = {}
    for choice in map(mapping, items(root.get("choices"))):
        index = choice.get("index")
        if isinstance(index, int) and not isinstance(index, bool):
            found.setdefault(index, []).append(choice)
    bodies = [{**root, "choices": [{**choice, "index": 0} for choice in found.get(i, ())]} for i in range(len(calls))]
    usages = _divide_usage(usage_of(root), calls, bodies)
    parts: list[tuple[dict[str, Any], Usage] | str] = []
    for own, usage in zip(bodies, usages, strict=True):
        count = len(own["choices"])
        if count != 1:
            parts.append(f"{count} answers instead of one in the batch's answer")
            continue
        if usage.reported:
            told = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
            own["usage"] = {**told, "total_tokens": usage.total_tokens}
        parts.append((own, usage))
    return parts


def _divide_usage(usage: Usage, calls: Sequence[Call], bodies: Sequence[dict[str, Any]]) -> list[Usage]:
    lengths = [len(repr(call.payload[_PROMPT[call.op]])) for call in calls]
    outputs = [len(text_of(own)) + 1 if own["choices"] else 0 for own in bodies]
    inputs = divide(usage.input_tokens, lengths)
    cached = divide(usage.cached_tokens, inputs)
    written = divide(usage.output_tokens, outputs)
    return [Usage(*part, reported=usage.reported) for part in zip(inputs, written, cached, strict=True)]


def divide(total: int, weights: Sequence[int]) -> list[int]:
    """Whole shares in proportion to the weights that add up to `total` (largest remainders first)."""
    weight = sum(weights)
    if weight == 0:
        weights, weight = [1] * len(weights), len(weights)
    shares = [total * part // weight for part in weights]
    rest = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % weight), i))
    for index in rest[: total - sum(shares)]:
        shares[index] += 1
    return shares


def bisect_budget(size: int) -> int:
    """How many extra requests the search for one bad item among `size` may take."""
    return 2 * (size - 1).bit_length() + 1


class Limits(msgspec.Struct, frozen=True):
    """When a group is full; None is no limit."""

    max_size: int = 20
    max_bytes: int | None = None
    max_tokens: int | None = None
    interval_s: float = 0.02


class Due(msgspec.Struct, frozen=True):
    """Until when an item may wait."""

    at: float
    hurried: bool = False
    """The deadline says so rather than the interval."""


def when_due(now: float, interval_s: float, deadline: float | None) -> Due:
    """An item waits for the interval, but leaves at least half of the time until its deadline for its answer."""
    if deadline is not None and (deadline - now) / 2 < interval_s:
        return Due(now + max(deadline - now, 0.0) / 2, hurried=True)
    return Due(now + interval_s)


class Entry(msgspec.Struct, Generic[T], eq=False):
    """One waiting item."""

    item: T
    size_bytes: int
    tokens: int
    due: Due


class Flush(msgspec.Struct, Generic[T], frozen=True):
    """A group that goes now."""

    cause: str
    items: tuple[T, ...]


class Plan(Generic[K, T]):
    """What waits, by group. Decides who goes when; sends nothing itself."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._groups: dict[K, list[Entry[T]]] = {}
        self.max_size = limits.max_size
        """May be lowered (to 1 at least) and raised again while running."""

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def add(self, key: K, item: T, due: Due, *, size_bytes: int = 0, tokens: int = 0) -> list[Flush[T]]:
        """Take in an item; what is full goes, before it if it no longer fits.

        Args:
            key: its group.
            item: any object, told apart by identity.
            due: until when it may wait.
            size_bytes: what it adds to a request.
            tokens: likewise.
        """
        flushes: list[Flush[T]] = []
        group = self._groups.setdefault(key, [])
        too_much = self._full(group, size_bytes, tokens)
        if group and too_much:
            flushes.append(self._take(key, too_much))
            group = self._groups.setdefault(key, [])
        group.append(Entry(item, size_bytes, tokens, due))
        alone = self._full([], size_bytes, tokens)
        if alone or len(group) >= self.max_size:
            flushes.append(self._take(key, alone or "size"))
        return flushes

    def remove(self, key: K, item: T) -> bool:
        """An item leaves; whether it was still here."""
        group = self._groups.get(key, [])
        for index, entry in enumerate(group):
            if entry.item is item:
                del group[index]
                if not group:
                    del self._groups[key]
                return True
        return False

    def due(self, now: float) -> list[Flush[T]]:
        """Groups with an item that has waited long enough."""
        flushes: list[Flush[T]] = []
        for key, group in list(self._groups.items()):
            late = [entry.due for entry in group if entry.due.at <= now]
            if late:
                flushes.append(self._take(key, "deadline" if late[0].hurried else "interval"))
        return flushes

    def next_at(self) -> float | None:
        """When `due` has something to say; None while nothing waits."""
        return min((entry.due.at for group in self._groups.values() for entry in group), default=None)

    def drain(self, cause: str, where: Callable[[K], bool] | None = None) -> list[Flush[T]]:
        """All groups, or those whose key is accepted."""
        return [self._take(key, cause) for key in list(self._groups) if where is None or where(key)]

    def _full(self, group: Sequence[Entry[T]], size_bytes: int, tokens: int) -> str:
        """Which limit one more item would exceed."""
        limits = self.limits
        if limits.max_bytes is not None and sum(entry.size_bytes for entry in group) + size_bytes > limits.max_bytes:
            return "bytes"
        if limits.max_tokens is not None and sum(entry.tokens for entry in group) + tokens > limits.max_tokens:
            return "tokens"
        return ""

    def _take(self, key: K, cause: str) -> Flush[T]:
        return Flush(cause, tuple(entry.item for entry in self._groups.pop(key)))
