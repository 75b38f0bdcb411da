"""Checked settings: one decorator for every settings object, and the checks its fields use.

A wrong value fails when the object is built, with a `ConfigError` that names option, value and what is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar, dataclass_transform

from llmmw.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*", re.IGNORECASE)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen, comparable settings class whose constructor raises ConfigError instead of TypeError.

    Fields annotated `bool` take nothing but True and False (a text such as "no" would switch them on).
    """
    own_checks: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)
    switches: list[str] = []

    def check(self: Any) -> None:
        for name in switches:
            switch(f"{cls.__name__}({name}=)", getattr(self, name))
        if own_checks is not None:
            own_checks(self)

    setattr(cls, "__post_init__", check)  # noqa: B010 — a plain assignment is refused by both type checkers
    built = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(built)  # type: ignore[arg-type]  # built is a dataclass
    switches += [field.name for field in fields if field.type in {bool, "bool"}]
    setattr(built, "__init__", accepting(built.__init__))  # noqa: B010 — a plain assignment is refused by the type checkers
    return built


def accepting(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, but arguments that do not fit it raise ConfigError with its options instead of TypeError.

    Values are not shown: under a misspelt option may stand a key.
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            signature = inspect.signature(function)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as misfit:
                options = ", ".join(option for option in signature.parameters if option not in {"self", "cls"})
                text = str(misfit).removeprefix("got an ")
                is_init = function.__name__ == "__init__" and args
                shown = type(args[0]).__name__ if is_init else function.__qualname__
                raise ConfigError(f"{shown}: {text} (options: {options})") from None
            raise  # not about the arguments

    return checked


@contextlib.contextmanager
def named_as_given(owner: str, options: Mapping[str, str]) -> Generator[None]:
    """Let refusals inside name the option that the user gave.

    Args:
        owner: what it was given to.
        options: by the layer's option ("Retry(attempts="), the user's ("max_attempts").
    """
    try:
        yield
    except ConfigError as error:
        message = error.message
        for theirs, ours in options.items():
            message = message.replace(theirs, f"{owner}({ours}=")
        raise type(error)(message) from None


def _is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number (and no bool) that fits into a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


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
        if position and position == len(value) and math.isfinite(total):
            return total
        with contextlib.suppress(ValueError):
            value = float(value)
    if not _is_finite(value) or value < 0:
        raise ConfigError(f'{_as_set(option, value)}: expected seconds >= 0 or text such as "250ms", "10m", "12h"')
    return float(value)


def _as_set(option: str, value: object) -> str:
    """The option as the user wrote it: "Timeout(total='x')"."""
    return f"{option[:-1]}{value!r})" if option.endswith("=)") else f"{option}={value!r}"


def positive_seconds(option: str, value: float | str | None) -> float:
    """A duration above zero.

    Raises:
        ConfigError: not a duration, or zero.
    """
    found = seconds(option, value)
    if found == 0:
        raise ConfigError(f"{_as_set(option, value)}: must be greater than 0 seconds")
    return found


def number(
    option: str, value: float | None, *, low: float = 0, high: float = math.inf, open_low: bool = False
) -> float:
    """A finite number within bounds.

    Raises:
        ConfigError: not a number or out of bounds (`open_low`: the lower bound itself is not allowed).
    """
    if not _is_finite(value) or value > high or value < low or (open_low and value == low):
        above = f"greater than {low:g}" if open_low else f"at least {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ConfigError(f"{_as_set(option, value)}: must be a number {above}{most}")
    return value


def whole(option: str, value: int | None, *, low: int = 1, high: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
        ConfigError: not an int or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise ConfigError(f"{_as_set(option, value)}: must be a whole number, at least {low}{most}")
    return value


def choice(option: str, value: object, allowed: Iterable[str]) -> str:
    """One of a few words.

    Raises:
        ConfigError: any other value.
    """
    words = tuple(allowed)
    if not isinstance(value, str) or value not in words:
        raise ConfigError(f"{_as_set(option, value)}: must be one of {', '.join(map(repr, words))}")
    return value


def switch(option: str, value: object) -> bool:
    """True or False.

    Raises:
        ConfigError: anything else, also 0, 1 and texts.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{_as_set(option, value)}: must be True or False")
    return value


def text(option: str, value: object, *, secret: bool = False) -> str:
    """A text that is not empty.

    Raises:
        ConfigError: anything else (`secret`: without showing it).
    """
    if not isinstance(value, str) or not value:
        hidden = secret and value != ""
        shown = f"{option} (a {type(value).__name__}, not shown)" if hidden else _as_set(option, value)
        raise ConfigError(f"{shown}: must be a text that is not empty")
    return value


def texts(option: str, value: object) -> tuple[str, ...]:
    """Several texts, none empty.

    Raises:
        ConfigError: anything else, also a single text, which would be taken letter by letter.
    """
    several: Any = value
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        found = tuple(several)
        if all(isinstance(one, str) and one for one in found):
            return found
    raise ConfigError(f"{_as_set(option, several)}: must be a list of texts, none of them empty")


def instance(option: str, value: object, kind: type[T], example: str) -> T:
    """An object of a class; `example` says how to make one.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{_as_set(option, value)}: must be a {kind.__name__}, e.g. {example}")
    return value
