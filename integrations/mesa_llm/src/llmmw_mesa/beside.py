"""Values kept beside objects that are not ours: nothing is written into them, so copies and pickles carry nothing."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Beside(Generic[T]):
    """One value for each object, made when it is first asked for; it goes when the object goes.

    Objects are told apart by identity: they may be equal to others, and need not be hashable.

    Args:
        make: a new value.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._found: dict[int, tuple[weakref.ref[Any], T]] = {}

    def of(self, owner: Any) -> T:
        """The owner's value, from any thread."""
        number = id(owner)
        entry = self._found.get(number)
        if entry is None:
            entry = self._found.setdefault(number, (weakref.ref(owner, self._forget(number)), self._make()))
        return entry[1]

    def _forget(self, number: int) -> Callable[[weakref.ref[Any]], None]:
        found = self._found

        def forget(ref: weakref.ref[Any]) -> None:
            # It runs before the memory, and with it the number, can be anybody else's: no lock is needed.
            if number in found and found[number][0] is ref:
                del found[number]

        return forget
