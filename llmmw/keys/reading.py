"""A function at one moment: its code and what it reads, function after function, as one digest."""

from __future__ import annotations

import contextvars
import copy
import enum
import functools
from hashlib import sha256
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, cast

from llmmw.keys.bytecode import Names, names_in
from llmmw.keys.canonical import fields_of
from llmmw.keys.objects import (
    CONTAINERS,
    PLAIN,
    is_own,
    is_standard,
    known_form,
    name_of,
    plain_form,
    schema_of,
)
from llmmw.keys.places import ABSENT, Cell, Environment, Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llmmw.keys.places import Place

_MAX_PARTS = 1000
"""A list or mapping of more parts is an object of unknown content."""
_MAX_PARTS_IN_ALL = 20 * _MAX_PARTS
_MAX_DEPTH = 50
"""Values within values."""
_MAX_WATCHED = 64
_ENVIRONMENT = frozenset({"environ", "getenv"})
_ENVIRON = Environment()


class Reading:
    """What a function was when this was made.

    Args:
        function: to be read.
        ignore: names that do not count.
        secret: counts where the function closes over something unknown, which may tell it from its like.
    """

    def __init__(self, function: Callable[..., Any], ignore: frozenset[str], secret: str) -> None:
        self._ignore = ignore
        self._watched: dict[tuple[int, str], tuple[Place, str, object]] = {}
        self._codes: dict[int, tuple[FunctionType, CodeType, object]] = {}
        self._contents: dict[int, tuple[object, object]] = {}
        self._ordinals: dict[int, int] = {}
        self._queue: list[tuple[object, bool]] = []
        """Functions and classes, in the order in which they are come across, and whether by way of closures only."""
        self._within: list[int] = []
        self._room = _MAX_PARTS_IN_ALL
        self._unknown = 0
        self._itself: dict[int, str] = {}
        """The function and those that its decorators wrap, with their modules."""
        self._is_near = self._by_closure = True
        self.private_for = ""
        """Name of a closed-over variable whose content is unknown; "" for none."""
        self.context_variables: list[contextvars.ContextVar[Any]] = []
        """Those that the function itself reads."""
        form = repr((self._head(function), self._table(), secret if self.private_for else ""))
        self.variant = (("code", sha256(form.encode("utf-8", "surrogatepass")).hexdigest()[:32]),)
        self.watched = list(self._watched.values())
        self.codes = list(self._codes.values())
        """Functions whose code an editor may exchange."""
        self.contents = list(self._contents.values())
        """Lists and mappings, and what was in them."""
        del self._queue

    def is_current(self) -> bool:
        """Whether all that was read is what it was."""
        for place, name, value in self.watched:
            if place.get(name, ABSENT) is not value:
                return False
        for function, code, defaults in self.codes:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
        try:
            for container, content in self.contents:
                if container != content:
                    return False
        except Exception:  # noqa: BLE001 — compared are anybody's objects, perhaps while another thread changes them
            return False
        return True

    # ── functions and classes, each told once ────────────────────────────────────────────────────────────────────

    def _head(self, function: Any) -> object:
        holder: object = None
        if isinstance(function, MethodType):
            holder, function = function.__self__, function.__func__
        outermost = function
        kind = holder if isinstance(holder, type) else _class_around(function) if holder is None else type(holder)
        while isinstance(function, FunctionType) and id(function) not in self._itself:
            self._itself[id(function)] = _module_of(function)
            function = getattr(function, "__wrapped__", None)
        head = self._form(outermost)
        self._by_closure = False
        return (head, name_of(kind) if isinstance(holder, type) else "", None if kind is None else self._form(kind))

    def _table(self) -> Iterable[object]:
        forms: list[object] = []
        for value, by_closure in self._queue:  # which grows meanwhile
            self._by_closure = by_closure
            if isinstance(value, FunctionType):
                self._is_near = by_closure or _module_of(value) in self._itself.values()
                forms.append(self._function_form(value))
            else:
                self._is_near = False
                forms.append(self._class_form(cast("type", value)))
        return forms

    def _told_later(self, value: object, kind: str) -> object:
        ordinal = self._ordinals.get(id(value))
        if ordinal is None:
            ordinal = self._ordinals[id(value)] = len(self._queue)
            self._queue.append((value, self._by_closure))
        return (kind, ordinal)

    def _function_form(self, function: FunctionType) -> object:
        wrapped = cast("object", getattr(function, "__wrapped__", None))
        code, names = function.__code__, names_in(function.__code__)
        skipped = self._ignore | names.own
        if len(self._codes) < _MAX_WATCHED:
            self._codes[id(function)] = (function, code, function.__defaults__)
        cells: list[object] = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name not in skipped:
                before = self._unknown
                cells.append((name, self._read(Cell(cell), name)))
                # What a decorator closes over besides the function is its settings.
                if self._unknown > before and self._by_closure and wrapped is None:
                    self.private_for = self.private_for or name
        defaults: object = None
        if id(function) not in self._itself:  # those of the function itself are arguments
            defaults = (self._form(function.__defaults__), self._form(function.__kwdefaults__))
        closure, self._by_closure = self._by_closure, False
        found = self._globals(function, names, skipped)
        self._by_closure = closure
        return (self._code_form(code, 0), defaults, cells, found, self._form(wrapped))

    def _globals(self, function: FunctionType, names: Names, skipped: frozenset[str]) -> list[object]:
        place, found = function.__globals__, list[object]()
        if not is_own(_module_of(function)):
            return found
        for name in sorted(names.loaded - skipped):
            value: Any = place.get(name, ABSENT)
            if type(value) is contextvars.ContextVar and id(function) in self._itself:
                self.context_variables.append(value)  # pyright: ignore[reportUnknownArgumentType]  # of anything
            if value is not ABSENT:
                found.append((name, self._read(place, name)))
        for name, attribute in sorted(names.attributes):
            if name not in skipped:
                found += self._attribute(name, place.get(name), attribute)
        if _ENVIRONMENT & {*function.__code__.co_names}:
            texts = [const for const in function.__code__.co_consts if isinstance(const, str)]
            found += [("environment", self._read(_ENVIRON, text)) for text in texts if text.isidentifier()]
        return found

    def _attribute(self, name: str, holder: Any, attribute: str) -> list[object]:
        """What an attribute of a global holds, unless the global counts as a whole anyway."""
        places: list[Place]
        if isinstance(holder, ModuleType):
            if is_standard(holder.__name__):
                return []
            only_plain = not is_own(holder.__name__)
            places = [holder.__dict__]
        else:
            kind = holder if isinstance(holder, type) else type(holder)
            only_plain = not is_own(kind.__module__)
            places = [vars(kind)] if kind is holder else [getattr(holder, "__dict__", {}), vars(kind)]
            if hasattr(kind, attribute) and isinstance(vars(kind).get(attribute), MemberDescriptorType):
                places = [Slots(holder)]
        found: list[object] = []
        for place in places:
            value = place.get(attribute, ABSENT)
            if value is ABSENT or not only_plain or type(value) in PLAIN:
                found.append((name, attribute, self._read(place, attribute)))
        return found

    def _class_form(self, kind: type) -> object:
        """Of a class of the user's: what its methods do, its plain attributes, its schema."""
        if enum.Enum in kind.__mro__:
            named: dict[str, enum.Enum] = dict(getattr(kind, "__members__", {}))
            return (name_of(kind), [(name, self._form(member.value)) for name, member in named.items()])
        members: list[object] = []
        for name, member in sorted(vars(kind).items()):
            value: object = getattr(cast("object", member), "__func__", member)
            parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
            if name == "__doc__" or not name.startswith("__") or isinstance(value, FunctionType):
                members.append((name, [self._form(part) for part in parts]))
        return (name_of(kind), [self._form(base) for base in kind.__bases__], members, schema_of(kind))

    def _code_form(self, code: CodeType, depth: int) -> object:
        consts = [
            self._code_form(const, depth) if isinstance(const, CodeType) else self._form(const, depth)
            for const in code.co_consts
        ]
        names = (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return ("code", code.co_code, code.co_exceptiontable, names, counts, consts)

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, place: Place, name: str) -> object:
        value = place.get(name, ABSENT)
        if self._is_near and len(self._watched) < _MAX_WATCHED:
            self._watched[id(place), name] = (place, name, value)
        return "empty" if value is ABSENT else self._form(value)

    def _form(self, value: Any, depth: int = 0) -> object:
        if type(value) in PLAIN:
            return plain_form(value)
        try:
            form = None if depth > _MAX_DEPTH else self._form_of(value, depth + 1)
        except Exception:  # noqa: BLE001 — anybody's objects are asked for their attributes here
            form = None
        if form is None:
            self._unknown += 1
            form = ("unknown", name_of(cast("object", type(value))))
        return form

    def _form_of(self, value: Any, depth: int) -> object | None:
        """None where the content is unknown."""
        kind = cast("type[object]", type(value))
        if isinstance(value, FunctionType):
            form = self._told_later(value, "function") if _tells(value) else ("named", name_of(value))
        elif isinstance(value, type):
            form = self._told_later(value, "class") if is_own(value.__module__) else ("named", name_of(value))
        elif isinstance(value, ModuleType):
            form = ("module", value.__name__)
        elif isinstance(value, MethodType | BuiltinFunctionType):
            form = self._method_form(value, depth)
        elif isinstance(value, functools.partial):
            partial: Any = cast("object", value)
            form = ("partial", [self._form(part, depth) for part in (partial.func, partial.args, partial.keywords)])
        elif kind in CONTAINERS:
            form = self._container_form(value, depth)
        elif callable(cast("object", value)) and hasattr(value, "__wrapped__"):  # such as functools.cache makes
            form = ("wrapper", name_of(kind), self._form(value.__wrapped__, depth))
        else:
            form = self._object_form(value, depth)
        return form

    def _method_form(self, method: Any, depth: int) -> object:
        """Of a bound method of Python or of C, or a plain function of C."""
        inner = getattr(method, "__func__", None)
        bound = self._form(cast("object", method.__self__), depth)
        return ("method", bound, name_of(method) if inner is None else self._form(inner, depth))

    def _container_form(self, value: Any, depth: int) -> object | None:
        if id(value) in self._within:
            return ("within itself", self._within.index(id(value)))
        if len(value) > min(_MAX_PARTS, self._room):
            return None
        self._room -= len(value)
        self._watch_content(value)
        kind = cast("type[object]", type(value))
        parts: list[object] = list(value.items() if kind is dict else value)
        self._within.append(id(value))
        forms = [self._form(part, depth) for part in parts]
        self._within.pop()
        return (name_of(kind), sorted(map(repr, forms)) if kind in {set, frozenset} else forms)

    def _object_form(self, value: Any, depth: int) -> object | None:
        known = known_form(value)
        if known is not None:
            return known
        kind = cast("type[object]", type(value))
        if isinstance(value, enum.Enum):
            return ("enum", self._form(kind), value.name)
        fields = fields_of(value)
        if fields is not None:
            self._watch_content(getattr(value, "__dict__", None))
            parts = [(name, self._form(part, depth)) for name, part in sorted(fields.items())]
            return ("object", self._form(kind), name_of(kind), parts)
        if not is_own(kind.__module__):
            return None
        self._unknown += 1
        return ("unknown", self._form(kind), name_of(kind))  # what its methods do counts nevertheless

    def _watch_content(self, container: object) -> None:
        if self._is_near and type(container) in {list, dict, set} and len(self._contents) < _MAX_WATCHED:
            self._contents[id(container)] = (container, copy.copy(container))


def _module_of(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__"))


def _tells(function: FunctionType) -> bool:
    """Whether a function is read: the user's, or one that others were made into."""
    return is_own(_module_of(function)) or bool(function.__closure__) or hasattr(function, "__wrapped__")


def _class_around(function: Any) -> type | None:
    """The class in whose body a function was written, where it can be found by its name."""
    around, _, _ = str(getattr(function, "__qualname__", "")).rpartition(".")
    found: object = getattr(function, "__globals__", {}).get(around)
    return found if isinstance(found, type) else None
