"""RateLimiter: requests, tokens and concurrency of an endpoint, with one queue and one gate for refusals.

Where it stands and why: `order.py`. What it decides: `algo/` (bucket, queue, aimd, pace, headers, estimate). How it
works: `limiter.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from llmmw.algo.throttle import RAMP_PERIOD_S
from llmmw.errors import ConfigError
from llmmw.layers.allowance import Limits
from llmmw.layers.base import Positioned
from llmmw.layers.limiter import BoundLimiter
from llmmw.layers.shared import SharedCounter
from llmmw.order import Role
from llmmw.settings import choice, instance, number, positive_seconds, settings, switch, text, whole

if TYPE_CHECKING:
    from llmmw.call import Handler
    from llmmw.env import Env

_BOUNDS = re.compile(r"\s*(\d+)\s*-\s*(\d+)\s*-\s*(\d+)\s*")

Per = Literal["key+model", "key", "model", "endpoint"]


@settings
class RateLimiter(Positioned):
    """Keeps an endpoint's calls within its limits and closes the gate for everybody when it refuses one.

    Args:
        rpm: requests per `window` (a minute unless changed). None: the rate is learnt from refusals.
        tpm: tokens per window, prompt and output together.
        concurrency: calls under way at once: a number, or text "floor-start-ceiling" such as "4-20-80". A call that
            makes calls of its own (a wrapped function that asks itself) lends them its place meanwhile. A joint request
            takes a place for each of its calls; it goes when one is free.
        window: seconds (or "1s", "10s") that rpm and tpm refer to.
        input_tpm, output_tpm: tokens per window where the provider counts them apart.
        burst: calls that may leave at once after idle time; default rpm // 12, within [1, 50].
        per: what shares one bucket: calls with the same credential and model ("key+model"), "key", "model", or
            "endpoint" for all.
        oversize: a call above a whole token limit is admitted alone and paid off ("debt") or RateLimited ("refuse").
        reserve: output tokens reserved per call: what was learnt from earlier answers, up to the call's maximum
            ("learned"), or that maximum, as OpenAI and Anthropic count at admission ("max").
        cached_input: whether prompt tokens from the provider's cache count ("charged") or not ("free", Anthropic).
        adaptive: lower the concurrency on 429, 503 and time-outs and raise it again. Where the server tells how long
            its queue is (VLLMEndpoint asks), keep that short and its places filled; of a plain number it takes at most
            7/8 for that.
            "gradient2" besides follows the time to the first token of streams (never the total latency). Without rpm
            also start gently at a server whose limits are unknown: 8 calls at first, then two more for each good
            answer, and twice as many each 200 ms (50 ms at a local server) where answers take longer. Calls one after
            the other never wait.
        headers: let the server's rate-limit headers lower the limits, and raise them again up to the configured ones;
            and hear of its queue.
        age_bound: seconds after which a waiter is not passed by smaller ones any more, and gets an eighth of all
            grants whatever its priority.
        weights: shares of tenants (and of agents where no tenant is set) against each other, and of the agents of one
            tenant; 1 unless named.
        shared: counts rpm and tpm together with other processes, e.g. SharedCounter("~/.cache/llmmw/limits").

    Raises:
        ConfigError: a value that cannot work.
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | str | None = None
    _: dataclasses.KW_ONLY
    window: float | str = 60.0
    input_tpm: int | None = None
    output_tpm: int | None = None
    burst: int | None = None
    per: Per = "key+model"
    oversize: Literal["debt", "refuse"] = "debt"
    reserve: Literal["learned", "max"] = "learned"
    cached_input: Literal["charged", "free"] = "charged"
    adaptive: bool | Literal["gradient2"] = True
    headers: bool = True
    age_bound: float | str = 10.0
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float], hash=False)
    shared: SharedCounter | None = None

    role: ClassVar[Role] = Role.LIMIT

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("rpm", "tpm", "input_tpm", "output_tpm", "burst"):
            if getattr(self, name) is not None:
                whole(f"RateLimiter({name}=)", getattr(self, name))
        if self.burst is not None and (self.rpm is None or self.burst > self.rpm):
            raise ConfigError(f"RateLimiter(burst={self.burst!r}): needs rpm, and may not exceed it")
        positive_seconds("RateLimiter(window=)", self.window)
        positive_seconds("RateLimiter(age_bound=)", self.age_bound)
        choice("RateLimiter(per=)", self.per, ("key+model", "key", "model", "endpoint"))
        choice("RateLimiter(oversize=)", self.oversize, ("debt", "refuse"))
        choice("RateLimiter(reserve=)", self.reserve, ("learned", "max"))
        if self.adaptive != "gradient2":
            switch("RateLimiter(adaptive=)", self.adaptive)
        elif self.concurrency is None:
            raise ConfigError("RateLimiter(adaptive='gradient2'): needs concurrency, e.g. \"4-16-64\"")
        choice("RateLimiter(cached_input=)", self.cached_input, ("charged", "free"))
        if not isinstance(self.weights, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's value
            raise ConfigError(
                f"RateLimiter(weights={self.weights!r}): must be a mapping from tenant or agent to number"
            )
        for name, weight in self.weights.items():
            text("RateLimiter(weights=) for", name)
            number(f"RateLimiter(weights=) of {name!r}", weight, open_low=True)
        if self.shared is not None:
            instance("RateLimiter(shared=)", self.shared, SharedCounter, 'SharedCounter("~/.cache/llmmw/limits")')
            if not (self.rpm or self.tpm or self.input_tpm or self.output_tpm):
                raise ConfigError("RateLimiter(shared=): needs rpm, tpm, input_tpm or output_tpm to share")
        self.limits()

    def limits(self) -> Limits:
        """The settings of one bucket."""
        tokens = (("total", self.tpm), ("input", self.input_tpm), ("output", self.output_tpm))
        return Limits(
            rpm=self.rpm,
            tokens=tuple((name, units) for name, units in tokens if units is not None),
            slots=_slots(self.concurrency, adaptive=bool(self.adaptive)),
            ramp_s=RAMP_PERIOD_S
            if self.adaptive and self.rpm is None and not isinstance(self.concurrency, str)
            else 0.0,
            window=positive_seconds("window", self.window),
            burst=self.burst,
            age_bound=positive_seconds("age_bound", self.age_bound),
            weights=dict(self.weights),
            cached_free=self.cached_input == "free",
            gradient=self.adaptive == "gradient2",
        )

    def bind(self, inner: Handler, env: Env) -> BoundLimiter:
        """Running state around one endpoint."""
        return BoundLimiter(self, inner, env)


def _slots(concurrency: int | str | None, *, adaptive: bool) -> tuple[int, int, int] | None:
    option = "RateLimiter(concurrency=)"
    if concurrency is None:
        return None
    if isinstance(concurrency, str):
        match = _BOUNDS.fullmatch(concurrency)
        if match is not None:
            floor, start, ceiling = (int(part) for part in match.groups())
            if 1 <= floor <= start <= ceiling and adaptive:
                return floor, start, ceiling
        raise ConfigError(
            f'{option} {concurrency!r}: must be a whole number, or with adaptive=True text "floor-start-ceiling" such '
            f'as "4-20-80" with 1 <= floor <= start <= ceiling'
        )
    most = whole(option, concurrency)
    return (1 if adaptive else most), most, most
