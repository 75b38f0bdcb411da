"""What a function is besides its name: its code, and what it reads that its arguments do not tell.

Two programs both have a `__main__.ask`, a factory makes many functions of one name, and a prompt often stands in a
global: in a shared cache directory the name alone would give one the answers of the other. What counts:

- the code, so an edited function starts afresh; also of functions and classes that it uses, defaults included, unless
  they belong to the standard library or an installed package;
- the globals it reads, variables it closes over, attributes of own modules and objects: plain values, lists and
  mappings of them, objects with a declared form, SDK clients by address and account. A changed one is noticed at the
  next call. What the function sets itself, such as counters, or only adds to, such as a log, does not count;
- context variables that it reads itself;
- of other objects the type. An object of unknown content that a function closes over may be what tells it from another
  function of the same factory: such a function shares its answers with no other, and no other process.

What does not count is the environment, files and the clock, what changes within other objects, and what functions of
other modules read, when it changes while the program runs. Processes of one Python version agree on the digest.
"""

from __future__ import annotations

import inspect
import secrets
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any

from llmmw.keys.bytecode import names_in
from llmmw.keys.canonical import Uncacheable, tagged_form
from llmmw.keys.objects import name_of
from llmmw.keys.reading import Reading

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import ContextVar

_UNSET = object()


class FunctionCode:
    """A function's identity, which follows what the function reads. From any thread.

    Args:
        function: any callable; of a bound method only the function, for its object is an argument.
        ignore: names of globals and closed-over variables that do not change its answers.
    """

    def __init__(self, function: Callable[..., Any], ignore: tuple[str, ...] = ()) -> None:
        self._function = function
        self._ignore = frozenset(ignore)
        self._secret = secrets.token_hex(16)
        self._reading: Reading | None = None

    @property
    def private_for(self) -> str:
        """Name of the closed-over variable whose content is unknown, so that nothing is shared; "" for none."""
        reading = self._reading or self._read()
        return reading.private_for

    def variant(self) -> tuple[tuple[str, str], ...]:
        """What a call says about the function: a digest of 32 hexadecimal digits, as it is now, and its context."""
        reading = self._reading
        if reading is None or not reading.is_current():
            reading = self._read()
        if not reading.context_variables:
            return reading.variant
        return (*reading.variant, *map(_context_of, reading.context_variables))

    def _read(self) -> Reading:
        """At the first call, when the whole module has been run."""
        self._reading = reading = Reading(self._function, self._ignore, self._secret)
        return reading


def _context_of(variable: ContextVar[Any]) -> tuple[str, str]:
    value = variable.get(_UNSET)
    if value is _UNSET:
        return (variable.name, "")
    try:
        return (variable.name, tagged_form((), {"value": value}).decode())
    except Uncacheable:
        return (variable.name, name_of(type(value)))


def names_outside(function: Callable[..., Any]) -> set[str]:
    """Globals and closed-over variables that a function reads; of a bound method also `self`."""
    bound = isinstance(function, MethodType)
    code: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
    found = set[str]() if code is None else {*code.co_freevars, *names_in(code).loaded}
    return found | {"self"} if bound else found
