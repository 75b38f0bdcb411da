"""How agents are stepped, and what of it can work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

from llmmw import ConfigError

Mode = Literal["overlap", "snapshot"]
Order = Literal["shuffle", "given"]
OnError = Literal["raise", "skip", "continue", "retry"]


@dataclass(frozen=True)
class Settings:
    """How to step."""

    mode: Mode = "overlap"
    on_error: OnError = "raise"
    timeout: float | None = None
    """Seconds for each agent."""
    max_concurrency: int | None = None


def check_settings(mode: Mode, order: str, on_error: OnError, timeout: float | None, most: int | None) -> Settings:
    """The values, if they can work; else ConfigError."""
    if mode not in {"overlap", "snapshot"}:
        raise ConfigError(f'mode={mode!r}: must be "overlap" or "snapshot"')
    if order not in {"shuffle", "given"}:
        raise ConfigError(f'order={order!r}: must be "shuffle" or "given"')
    if on_error not in {"raise", "skip", "continue", "retry"}:
        raise ConfigError(f'on_error={on_error!r}: must be "raise", "skip", "continue" or "retry"')
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError(f"timeout={timeout!r}: must be a positive number of seconds, or None")
    if most is not None and (isinstance(most, bool) or not isinstance(cast("object", most), int) or most < 1):
        raise ConfigError(f"max_concurrency={most!r}: must be a whole number of at least 1, or None")
    return Settings(mode, on_error, timeout, most)
