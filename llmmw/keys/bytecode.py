"""What a function's code reads from outside itself, and what it only changes there."""

from __future__ import annotations

import dis
import functools
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_GLOBALS"})
_STORES = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_NO_STEPS = frozenset({"EXTENDED_ARG", "CACHE", "PUSH_NULL", "RESUME", "PRECALL", "NOT_TAKEN"})
_CHANGES = frozenset({
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "remove", "reverse", "sort", "update",
})  # fmt: skip
"""Methods of containers that change them and tell nothing."""


class Names(NamedTuple):
    """Names from outside in a piece of code, those of functions defined in it included."""

    loaded: frozenset[str]
    """Globals and closed-over variables."""
    stored: frozenset[str]
    """Those that it sets, or whose items it sets: counters, a memory of its own."""
    added: frozenset[str]
    """Those that it adds to, such as a log."""
    looked_at: frozenset[str]
    """Those that it reads otherwise than to add to them or to see how many there are."""
    attributes: frozenset[tuple[str, str]]
    """Attributes that it reads, by variable."""

    @property
    def own(self) -> frozenset[str]:
        """What the function keeps for itself rather than answers from."""
        return self.stored | (self.added - self.looked_at)


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> Names:
    """The names in code."""
    loaded, stored, added, looked_at = set[str](), set[str](), set[str](), set[str]()
    attributes = set[tuple[str, str]]()
    steps = [(step.opname, str(step.argval)) for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    last = ("", "")
    for index, (step, name) in enumerate(steps):
        if step in _STORES:
            stored.add(name)
        elif step in _LOADS:
            loaded.add(name)
            (after, attribute), (second, _), (third, _) = [*steps[index + 1 : index + 4], last, last, last][:3]
            if second in {"STORE_SUBSCR", "DELETE_SUBSCR"} or second == third == "COPY":  # x[key] = …, x[key] += …
                stored.add(name)
            elif after in _ATTRIBUTES:
                attributes.add((name, attribute))
                (added if attribute in _CHANGES else looked_at).add(name)
            elif not (after == "CALL" and index and steps[index - 1] == ("LOAD_GLOBAL", "len")):
                looked_at.add(name)
    parts: list[Iterable[Any]] = [(loaded, stored, added, looked_at, attributes)]
    parts += [names_in(const) for const in code.co_consts if isinstance(const, CodeType)]
    return Names._make(frozenset[Any]().union(*kinds) for kinds in zip(*parts, strict=True))
