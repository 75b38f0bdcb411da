"""Which requests go wrong, and how: rules as data, decided before a request is answered."""

import random
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Kind = Literal[
    "status",
    "hang",
    "reset",
    "close",
    "html",
    "error_200",
    "garbage",
    "gzip_bomb",
    "delay",
    "truncate",
    "reset_mid",
    "close_mid",
    "slow",
    "empty",
    "no_finish",
    "no_done",
    "sse_error",
    "close_after",
    "duplicate_header",
]
STREAM_ONLY = frozenset({"no_finish", "no_done", "sse_error"})

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Seconds = Annotated[float, Meta(ge=0.0)]


class Match(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which requests a rule looks at; everything given must hold.

    Attributes:
        route: a path (``/v1/chat/completions``) or its ending (``chat/completions``, ``embeddings``).
        model: the request's ``model``.
        contains: text that occurs in the raw request body.
        stream: only streamed (true) or only plain (false) requests.
        skip: let this many matching requests pass first.
        first: then only the first n.
        every: then only each n-th (n, 2n, ...).
        after_s, until_s: only in this span, seconds since start or reset.
        probability: then a seeded coin.
    """

    route: str | None = None
    model: str | None = None
    contains: str | None = None
    stream: bool | None = None
    skip: Annotated[int, Meta(ge=0)] = 0
    first: Count | None = None
    every: Count | None = None
    after_s: Seconds = 0.0
    until_s: Seconds | None = None
    probability: Share = 1.0


class FaultRule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One way to go wrong, and for whom.

    Attributes:
        kind: instead of an answer: ``status`` (``status``, ``body``, ``headers``, ``retry_after``), ``hang``
            (silent for ``seconds``, else until the client leaves; then the connection closes), ``reset`` (TCP
            reset before any byte), ``close`` (orderly close before any byte), ``html`` (200 and a web page),
            ``error_200`` (200 and an error object), ``garbage`` (200 and bytes that are no JSON),
            ``gzip_bomb`` (``size`` bytes of blanks, compressed about 1000 to 1).
            The true answer, damaged: ``delay`` (``seconds`` before it), ``truncate`` (JSON cut, framing
            complete), ``reset_mid`` and ``close_mid`` (cut inside the body by a TCP reset, an orderly close),
            ``slow`` (in ``parts`` pieces, ``seconds`` apart), ``empty`` (no choices), ``close_after``
            (complete, announced as keep-alive, then closed), ``duplicate_header`` (two Content-Type lines).
            Streams only: ``no_finish`` (ends before a finish reason), ``no_done`` (last event missing),
            ``sse_error`` (an error event after ``after`` events; 0 is before the first token).
        match: which requests.
        id: the name under which it is counted; the default is the kind and its number.
        status: HTTP status of ``status``.
        body: response text of ``status``, ``html``, ``garbage``; a plausible one by default.
        headers: extra response headers of ``status``.
        retry_after: Retry-After header of ``status``, verbatim (so garbage can be sent).
        seconds: duration of ``hang``, ``delay``, and of each pause of ``slow``.
        after: events (stream) or bytes (plain) that still go out; half by default.
        parts: pieces of ``slow``.
        size: decoded bytes of ``gzip_bomb``.
    """

    kind: Kind
    match: Match = Match()
    id: str = ""
    status: Annotated[int, Meta(ge=200, le=599)] = 500
    body: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    retry_after: str | None = None
    seconds: Seconds | None = None
    after: Annotated[int, Meta(ge=0)] | None = None
    parts: Count = 10
    size: Count = 200_000_000


class _Peek(Struct):
    model: Any = None
    stream: Any = None


_peek = msgspec.json.Decoder(_Peek)


class _Armed:
    """A rule and what it has seen."""

    def __init__(self, rule: FaultRule, seed: int) -> None:
        self.rule = rule
        self.name = rule.id
        self.matched = 0
        self.fired = 0
        # Its own generator per rule: adding a rule never changes the draws of another.
        self._random = random.Random(f"{seed}:{rule.id}")  # noqa: S311 — reproducible, not secret

    def matches(self, route: str, body: bytes, peek: _Peek, now_s: float) -> bool:
        match = self.rule.match
        streamed = peek.stream is True
        return (
            (match.route is None or route.endswith(match.route))
            and (match.model is None or peek.model == match.model)
            and (match.stream is None or streamed is match.stream)
            and (streamed or self.rule.kind not in STREAM_ONLY)
            and match.after_s <= now_s
            and (match.until_s is None or now_s < match.until_s)
            and (match.contains is None or match.contains.encode() in body)
        )

    def fires(self) -> bool:
        match = self.rule.match
        self.matched += 1
        turn = self.matched - match.skip
        if turn < 1 or (match.first is not None and turn > match.first):
            return False
        if match.every is not None and turn % match.every:
            return False
        if match.probability < 1.0 and self._random.random() >= match.probability:
            return False
        self.fired += 1
        return True


class FaultBook:
    """The rules in force; the first that fires decides."""

    def __init__(self, rules: tuple[FaultRule, ...], seed: int) -> None:
        self._armed: list[_Armed] = []
        self._seed = seed
        for rule in rules:
            self.add(rule)

    def __bool__(self) -> bool:
        return bool(self._armed)

    def add(self, rule: FaultRule) -> str:
        """Arm one more rule; its id. A rule with a known id replaces that one."""
        name = rule.id or f"{rule.kind}-{len(self._armed) + 1}"
        self._armed = [armed for armed in self._armed if armed.name != name]
        self._armed.append(_Armed(msgspec.structs.replace(rule, id=name), self._seed))
        return name

    def pick(self, route: str, body: bytes, now_s: float) -> FaultRule | None:
        """The fault of this request; ``now_s`` counts from start or reset."""
        try:
            peek = _peek.decode(body)
        except msgspec.MsgspecError:
            peek = _Peek()
        for armed in self._armed:
            if armed.matches(route, body, peek, now_s) and armed.fires():
                return armed.rule
        return None

    def rules(self) -> tuple[FaultRule, ...]:
        """The rules in force, in order."""
        return tuple(armed.rule for armed in self._armed)

    def report(self) -> dict[str, dict[str, Any]]:
        """Per rule id: its kind, how many requests matched, how often it fired."""
        return {
            armed.name: {"kind": armed.rule.kind, "matched": armed.matched, "fired": armed.fired}
            for armed in self._armed
        }
