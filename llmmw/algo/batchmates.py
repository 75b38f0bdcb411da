"""Which calls may travel together, what they ask jointly, and whose part of a joint answer is whose. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from llmmw.algo.estimate import output_cap, prompt_tokens
from llmmw.answer import Usage, items, mapping, problem_with, text_of, usage_of
from llmmw.context import Urgency
from llmmw.keys import is_deterministic

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llmmw.call import Call

_PROMPT = {"chat": "messages", "complete": "prompt"}
"""The field in which calls of one group may differ."""
HAVE_JOINT_FORM = frozenset(_PROMPT)

_APART = frozenset({
    "tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "ignore_eos", "min_tokens", "best_of",
    "echo", "suffix", "stream_options",
})  # fmt: skip
"""Fields that a joint request ignores or gets wrong (vLLM's batch chat drops tools and ignore_eos silently)."""

_NO_SAMPLES = frozenset({"best_of", "use_beam_search"})
"""Fields beside which `n` means something else."""


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
    prompt: bytes = b""
    """As JSON. In its order those whose prompts begin alike stand together: a server that fills its prefix cache as it
    goes finds each prefix at once, and the same calls make the same request, in whatever order they came."""
    greedy: bool = False

    @property
    def twin(self) -> bytes | None:
        """Calls of one group and twin have one answer (temperature 0, same prompt); None: every call has its own."""
        return self.prompt if self.greedy else None


def grouping(call: Call) -> Grouping | None:
    """The group of a call, or None for one that goes alone (a stream, n > 1, tools, unknown operations, no JSON).

    A transport edge's own request never shares one: its headers hold the credential.
    """
    if call.stream or call.direct:
        return None
    kind = _kind_of(call)
    if call.op == "function":
        return Grouping(kind, joint=False)
    field = _PROMPT.get(call.op)
    if field is None or call.payload.get("n") not in (None, 1) or not _APART.isdisjoint(call.payload):
        return None
    if not _is_one_prompt(call.payload.get(field)):
        return None
    try:
        # No list of prompts may hold texts and token ids.
        shared = msgspec.json.encode((isinstance(call.payload[field], str), _fields(call, {field, "stream"})))
        prompt = msgspec.json.encode(call.payload[field])
    except (TypeError, ValueError, RecursionError):
        return None
    native: Any = call.native
    headers = cast("tuple[tuple[str, str], ...]", native) if isinstance(native, tuple) else ()
    kind, greedy = kind._replace(headers=headers, rest=shared), call.payload.get("temperature") == 0
    return Grouping(kind, native is None or native is headers, prompt, greedy)


def sampling(call: Call) -> Kind | None:
    """What calls have in common that ask the same and may each have an answer of their own: one with `n` has them all.

    None where the answer is determined, or where n would not mean that: a stream, a seed (equal draws), `best_of`, a
    transport edge's own request.
    """
    fields, native = call.payload, call.native
    field = _PROMPT.get(call.op)
    if field is None or call.stream or call.direct or not (native is None or isinstance(native, tuple)):
        return None
    if fields.get("seed") is not None or fields.get("n") not in (None, 1) or not _NO_SAMPLES.isdisjoint(fields):
        return None
    if is_deterministic(call) or not _is_one_prompt(fields.get(field)):
        return None
    try:
        rest = msgspec.json.encode(_fields(call, {"n", "stream"}))
    except (TypeError, ValueError, RecursionError):
        return None
    headers = cast("tuple[tuple[str, str], ...]", native or ())
    return _kind_of(call)._replace(headers=headers, rest=rest)


def _kind_of(call: Call) -> Kind:
    return Kind(call.op, call.model, call.target, call.namespace, call.context.tenant, call.variant, call.priority)


def _fields(call: Call, without: set[str]) -> list[tuple[str, object]]:
    # In the order they were given below the first level: that of a schema's fields can change the answer.
    return [pair for pair in sorted(call.payload.items()) if pair[0] not in without]


def _is_one_prompt(prompt: object) -> bool:
    """A conversation, a text or a list of token ids; not already a list of several."""
    if isinstance(prompt, str):
        return True
    found = items(prompt)
    return bool(found) and isinstance(found[0], dict | int)


def weight(call: Call, group: Grouping) -> tuple[int, int]:
    """What a call adds to its group: bytes of its prompt as JSON, and tokens of prompt and permitted output.

    Of a function's arguments that are no JSON the texts count.
    """
    tokens = prompt_tokens(call.payload)
    try:
        size = len(group.prompt or msgspec.json.encode(call.payload))
    except (TypeError, ValueError, RecursionError):
        size = 4 * tokens
    return size, tokens + (output_cap(call.payload) or 0)


def urgency_of(calls: Iterable[Call]) -> Urgency:
    """How urgent work for all of them is: the smallest priority, and time until the last of them gives up."""
    every = list(calls)
    deadlines = [call.deadline for call in every]
    latest = None if None in deadlines else max(moment for moment in deadlines if moment is not None)
    return Urgency(min(call.priority for call in every), latest)


def joint_call(calls: Sequence[Call], urgency: Urgency) -> Call:
    """One call for several of one group: "chat" becomes "chat_batch", "complete" gets a list of prompts.

    It belongs to nobody: neither agent nor sample nor tags.
    """
    first = calls[0]
    field = _PROMPT[first.op]
    return _nobodys(calls, urgency).replace(
        op="chat_batch" if first.op == "chat" else first.op,
        payload={**first.payload, field: [call.payload[field] for call in calls]},
    )


def sampled_call(calls: Sequence[Call], urgency: Urgency) -> Call:
    """One call for as many samples as calls that ask the same; likewise nobody's."""
    return _nobodys(calls, urgency).replace(payload={**calls[0].payload, "n": len(calls)})


def _nobodys(calls: Sequence[Call], urgency: Urgency) -> Call:
    first = calls[0]
    waits = [call.rate_wait_s for call in calls]
    patience = None if None in waits else max(wait for wait in waits if wait is not None)
    return first.within(agent=None, sample=None, tags=(), priority=urgency.priority, deadline=urgency.deadline).replace(
        urgency=urgency, key=b"", fill=None, place=None, width=len(calls), rate_wait_s=patience
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
        problem = problem_with(calls[0].op, own)
        parts.append((own, usage) if problem is None else f"no answer in the batch's answer: {problem}")
    return parts


def _divide_usage(usage: Usage, calls: Sequence[Call], bodies: Sequence[dict[str, Any]]) -> list[Usage]:
    lengths = [prompt_tokens({_PROMPT[call.op]: call.payload[_PROMPT[call.op]]}) for call in calls]
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
    """How many extra requests the search for bad items among `size` may take: 2 * log2(size) + 1, rounded down."""
    return (size * size).bit_length()


def pieces_of(size: int, budget: int) -> list[int]:
    """Into how many parts of which sizes a refused group of at least two is divided, to find who spoilt it.

    Halves; three go one by one, which finds one bad item in fewer requests (and keeps the bound for every size). What
    the budget does not cover goes one by one too: everybody still gets an outcome of their own.
    """
    if size <= 3 or budget < 2:  # noqa: PLR2004 — see above
        return [1] * size
    return [size // 2, size - size // 2]
