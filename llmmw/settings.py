"""Checked settings: one decorator for every settings object, and the checks its fields use.

A wrong value fails when the object is built, with a `ConfigError` that names option, value and what is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

from llmmw.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*", re.IGNORECASE)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen, comparable settings class whose constructor raises ConfigError instead of TypeError."""
    built = dataclasses.dataclass(frozen=True)(cls)
    plain_init = built.__init__
    allowed = ", ".join(field.name for field in dataclasses.fields(built) if field.init)  # type: ignore[arg-type]  # built is a dataclass

    @functools.wraps(plain_init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            plain_init(self, *args, **kwargs)
        except TypeError as error:
            if isinstance(error, ConfigError):
                raise
            text = str(error).replace(f"{cls.__name__}.__init__() got an ", "")
            raise ConfigError(f"{cls.__name__}: {text} (options: {allowed})") from None

    setattr(built, "__init__", checked_init)  # noqa: B010 — a plain assignment is refused by both type checkers
    return built


def seconds(option: str, value: float | str | None) -> float:
    """A duration in seconds from a number or text such as "250ms", "10m", "1h30m", "12h", "1w".

    Raises:
        ConfigError: not a duration, negative, NaN or infinite.
    """
    if isinstance(value, str):
        total, position = 0.0, 0
        for match in _DURATION.finditer(value):
            if match.start() != position:
                break
            total += float(match[1]) * _UNITS[match[2].lower()]
            position = match.end()
        if position and position == len(value):
            return total
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f'{option}={value!r}: expected seconds >= 0 or text such as "250ms", "10m", "12h"')
    return float(value)


def positive_seconds(option: str, value: float | str | None) -> float:
    """A duration above zero.

    Raises:
        ConfigError: not a duration, or zero.
    """
    found = seconds(option, value)
    if found == 0:
        raise ConfigError(f"{option}={value!r}: must be greater than 0 seconds")
    return found


def number(
    option: str, value: float | None, *, low: float = 0, high: float = math.inf, open_low: bool = False
) -> float:
    """A finite number within bounds.

    Raises:
        ConfigError: not a number or out of bounds (`open_low`: the lower bound itself is not allowed).
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value is None or value > high or value < low or (open_low and value == low):
        above = f"greater than {low:g}" if open_low else f"at least {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ConfigError(f"{option}={value!r}: must be a number {above}{most}")
    return value


def whole(option: str, value: int | None, *, low: int = 1, high: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
        ConfigError: not an int or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise ConfigError(f"{option}={value!r}: must be a whole number, at least {low}{most}")
    return value


def choice(option: str, value: object, allowed: Iterable[str]) -> str:
    """One of a few words.

    Raises:
        ConfigError: any other value.
    """
    words = tuple(allowed)
    if not isinstance(value, str) or value not in words:
        raise ConfigError(f"{option}={value!r}: must be one of {', '.join(map(repr, words))}")
    return value
