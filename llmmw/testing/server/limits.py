"""Rate limits per API key, and the headers with which providers announce them."""

import math
from collections import OrderedDict, deque
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from .config import ServerConfig
from .errors import no_quota, rate_limited

MAX_KEYS: Final = 10_000


class Meter(Protocol):
    """One limited quantity of one key."""

    limit: int

    def remaining(self, now: float) -> float:
        """Units free now."""
        ...

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until ``amount`` fits; 0 when it does."""
        ...

    def take(self, amount: int, now: float) -> None:
        """Use units."""
        ...

    def reset_s(self, now: float) -> float:
        """Seconds until everything is free again."""
        ...


class Bucket:
    """Token bucket: ``limit`` at once, refilled evenly over the window."""

    def __init__(self, limit: int, window_s: float, now: float) -> None:
        self.limit = limit
        self._rate = limit / window_s
        self._level = float(limit)
        self._at = now

    def remaining(self, now: float) -> float:
        """Units free now."""
        self._level = min(self.limit, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until ``amount`` fits; an amount over the limit waits for a full bucket."""
        return max(0.0, (min(amount, self.limit) - self.remaining(now)) / self._rate)

    def take(self, amount: int, now: float) -> None:
        """Use units; more than the limit leaves a debt."""
        self._level = self.remaining(now) - amount

    def reset_s(self, now: float) -> float:
        """Seconds until the bucket is full."""
        return (self.limit - self.remaining(now)) / self._rate


class Sliding:
    """Exact: never more than ``limit`` in any half-open window."""

    def __init__(self, limit: int, window_s: float) -> None:
        self.limit = limit
        self._window_s = window_s
        self._taken: deque[tuple[float, int]] = deque()
        self._sum = 0

    def remaining(self, now: float) -> float:
        """Units free now."""
        while self._taken and self._taken[0][0] <= now - self._window_s:
            self._sum -= self._taken.popleft()[1]
        return float(self.limit - self._sum)

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until enough old use has left the window."""
        missing = min(amount, self.limit) - self.remaining(now)
        for at, used in self._taken:
            if missing <= 0:
                break
            missing -= used
            if missing <= 0:
                return at + self._window_s - now
        return 0.0

    def take(self, amount: int, now: float) -> None:
        """Use units."""
        self._taken.append((now, amount))
        self._sum += amount

    def reset_s(self, now: float) -> float:
        """Seconds until the window is empty."""
        return self._taken[-1][0] + self._window_s - now if self._taken else 0.0


class Limits:
    """All keys of one server; keys not seen for long are forgotten."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.active = bool(config.rpm or config.tpm or config.quota_requests is not None)
        self._keys: OrderedDict[str, tuple[dict[str, Meter], list[int]]] = OrderedDict()

    def admit(self, key: str, tokens: int, now: float) -> dict[str, str]:
        """Take one request and its tokens, or raise a 429; the headers of the answer.

        Tokens are what the request will really use: its reply is known beforehand.
        """
        meters, used = self._state(key, now)
        quota = self.config.quota_requests
        if quota is not None and used[0] >= quota:
            raise no_quota()
        asked = {"requests": 1, "tokens": tokens}
        waits = {name: meter.wait_s(asked[name], now) for name, meter in meters.items()}
        worst = max(waits, key=lambda name: waits[name], default="")
        if worst and waits[worst] > 0.0:
            headers = self._headers(meters, now)
            if self.config.limit_style != "none":
                headers["retry-after"] = str(max(1, math.ceil(waits[worst])))
            if self.config.limit_style == "openai":
                headers["retry-after-ms"] = str(math.ceil(waits[worst] * 1000))
            raise rate_limited(worst, waits[worst], headers)
        used[0] += 1
        for name, meter in meters.items():
            meter.take(asked[name], now)
        return self._headers(meters, now)

    def _state(self, key: str, now: float) -> tuple[dict[str, Meter], list[int]]:
        state = self._keys.get(key)
        if state is None:
            limits = {"requests": self.config.rpm, "tokens": self.config.tpm}
            meters = {name: self._meter(limit, now) for name, limit in limits.items() if limit}
            state = self._keys[key] = (meters, [0])
            if len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)
        self._keys.move_to_end(key)
        return state

    def _meter(self, limit: int, now: float) -> Meter:
        if self.config.limit_kind == "sliding":
            return Sliding(limit, self.config.limit_window_s)
        return Bucket(limit, self.config.limit_window_s, now)

    def _headers(self, meters: dict[str, Meter], now: float) -> dict[str, str]:
        style = self.config.limit_style
        if style not in {"openai", "anthropic"}:
            return {}
        headers: dict[str, str] = {}
        for name, meter in meters.items():
            left = str(max(0, int(meter.remaining(now))))
            reset_s = max(0.0, meter.reset_s(now))
            if style == "openai":
                headers[f"x-ratelimit-limit-{name}"] = str(meter.limit)
                headers[f"x-ratelimit-remaining-{name}"] = left
                headers[f"x-ratelimit-reset-{name}"] = go_duration(reset_s)
            else:
                reset = datetime.now(UTC) + timedelta(seconds=reset_s)
                headers[f"anthropic-ratelimit-{name}-limit"] = str(meter.limit)
                headers[f"anthropic-ratelimit-{name}-remaining"] = left
                headers[f"anthropic-ratelimit-{name}-reset"] = reset.strftime("%Y-%m-%dT%H:%M:%SZ")
        return headers


def go_duration(seconds: float) -> str:
    """OpenAI's spelling of a duration: ``12ms``, ``1.5s``, ``6m0s``, ``1h0m0s``."""
    if seconds < 1.0:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
