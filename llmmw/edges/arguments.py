"""The arguments of a function as the mapping that layers read."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

from llmmw.errors import ConfigError
from llmmw.keys.code import names_outside

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Binder:
    """Arguments of a call as a mapping by parameter name, defaults filled in: the payload that layers read.

    So layers find `temperature`, `max_tokens`, `model`, `messages` or `prompt` where the function has them.
    """

    def __init__(self, function: Callable[..., Any], ignore: tuple[str, ...]) -> None:
        signature = inspect.signature(function)
        names = signature.parameters
        outside = names_outside(function)
        unknown = set(ignore) - outside - names.keys()
        if unknown:
            raise ConfigError(
                f"ignore={sorted(unknown)!r}: {function.__name__} has no such parameter (it has: {', '.join(names)}), "
                f"nor reads such a variable ({', '.join(sorted(outside)) or 'none'})"
            )
        # What a bound method is bound to is an argument like any other.
        holder = function.__self__ if isinstance(function, MethodType) else type
        self._bound = {} if isinstance(holder, type) or "self" in ignore else {"self": holder}
        self._named = _named(signature, ignore)
        self._named.__qualname__ = function.__qualname__

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The payload.

        Raises:
            TypeError: the arguments do not fit, with Python's own message.
        """
        payload = self._named(*args, **kwargs)
        return self._bound | payload if self._bound else payload


class _Default:
    """Stands for a default in the text of a signature."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _named(signature: inspect.Signature, ignore: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    """A function of the same parameters that returns them by name: nothing binds as fast as Python's own call."""
    defaults: dict[str, Any] = {}
    stripped: list[inspect.Parameter] = []
    pairs: list[str] = []
    for name, parameter in signature.parameters.items():
        default = parameter.default
        if default is not parameter.empty:
            defaults[place := f"_{len(defaults)}"] = default
            default = _Default(place)
        stripped.append(parameter.replace(default=default, annotation=parameter.empty))
        if name not in ignore:
            pairs.append(f"{name!r}: [*{name}]" if parameter.kind is parameter.VAR_POSITIONAL else f"{name!r}: {name}")
    parameters = str(inspect.Signature(stripped))[1:-1]
    found: Callable[..., dict[str, Any]] = eval(f"lambda {parameters}: {{{', '.join(pairs)}}}", defaults)  # noqa: S307 — of names that are identifiers, or `inspect` refuses them
    return found
