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
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters.values()
        outside = names_outside(function)
        unknown = set(ignore) - outside - {parameter.name for parameter in parameters}
        if unknown:
            names = ", ".join(self._signature.parameters)
            raise ConfigError(
                f"ignore={sorted(unknown)!r}: {function.__name__} has no such parameter (it has: {names}), "
                f"nor reads such a variable ({', '.join(sorted(outside)) or 'none'})"
            )
        self._ignore = [name for name in ignore if name in self._signature.parameters]
        # What a bound method is bound to is an argument like any other.
        holder = function.__self__ if isinstance(function, MethodType) else type
        self._bound = {} if isinstance(holder, type) or "self" in ignore else {"self": holder}
        plain = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        self._simple = all(parameter.kind in plain for parameter in parameters)
        self._positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self._names = frozenset(self._signature.parameters)
        self._can_be_plain = self._simple and len(self._positional) == len(self._names)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The payload.

        Raises:
            TypeError: the arguments do not fit, with Python's own message.
        """
        if self._can_be_plain and not kwargs and len(args) == len(self._positional):
            payload = dict(zip(self._positional, args, strict=True))
        else:
            payload = self._bind_named(args, kwargs)
        for name in self._ignore:
            payload.pop(name, None)
        return self._bound | payload if self._bound else payload

    def _bind_named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(zip(self._positional, args, strict=False))
        fits = (
            self._simple
            and len(args) <= len(self._positional)
            and given.keys().isdisjoint(kwargs)
            and self._names >= kwargs.keys()
        )
        payload = {**self._defaults, **given, **kwargs} if fits else {}
        return payload if fits and len(payload) == len(self._names) else self._bind_slowly(args, kwargs)

    def _bind_slowly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        payload = dict(bound.arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                payload[parameter.name] = list(payload[parameter.name])
        return payload
