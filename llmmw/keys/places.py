"""Where a function's names are looked up, so that a change can be told by the identity of what is found."""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol, cast

ABSENT = object()


class Place(Protocol):
    """Where a name is looked up: a module's globals, an object's attributes, or a closure."""

    def get(self, name: str, default: object, /) -> object:
        """What it holds under a name."""
        ...


class Cell:
    """A closed-over variable as a place."""

    def __init__(self, cell: Any) -> None:
        self._cell = cell

    def get(self, name: str, default: object, /) -> object:
        """What it holds; `default` before it is set."""
        del name
        try:
            return cast("object", self._cell.cell_contents)
        except ValueError:
            return default


class Slots:
    """An object without a mapping of its attributes as a place."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder

    def get(self, name: str, default: object, /) -> object:
        """What an attribute holds."""
        return getattr(self._holder, name, default)


class Environment:
    """The process's environment as a place."""

    def get(self, name: str, default: object, /) -> object:
        """A variable; the same text is the same object."""
        value = os.environ.get(name)
        return default if value is None else sys.intern(value)
