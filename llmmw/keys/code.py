"""What a function is besides its name: its code, and what it reads that its arguments do not tell.

Two programs both have a `__main__.ask`, a factory makes many functions of one name, and a prompt often stands in a
global: in a shared cache directory the name alone would give one the answers of the other. What counts:

- the code, so an edited function starts afresh; also of functions of its own module that it calls;
- the globals it reads and the variables it closes over: plain values, small lists and mappings (as they were when they
  were first read), objects with a declared form, SDK clients by address and account. A changed one is noticed at the
  next call. Those that it sets itself, such as counters, do not count;
- of other objects the type. An object of unknown content that a function closes over may be what tells it from another
  function of the same factory: such a function shares its answers with no other, and no other process.

What does not count is what changes within an object after all that, and what functions of other modules do.
Processes of one Python version agree on the digest.
"""

from __future__ import annotations

import datetime as dt
import decimal
import dis
import functools
import inspect
import pathlib
import re
import secrets
from hashlib import sha256
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from llmmw.keys.canonical import tagged_form

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, EllipsisType})
_TOLD_BY_TEXT = (pathlib.PurePath, dt.date, dt.time, dt.timedelta, decimal.Decimal)
_NO_CONTENT = frozenset({"logging", "asyncio", "threading", "_thread", "queue", "concurrent", "contextvars"})
"""Modules of the standard library whose objects change no answer."""
_CLIENTS = frozenset({"openai", "anthropic"})
_CLIENT_FIELDS = ("base_url", "api_key", "auth_token", "organization", "project")
_CLIENT_EXTRAS = ("_custom_headers", "_custom_query")
_PROVIDERS = ("_api_key_provider", "_azure_ad_token_provider")
_CONTAINERS = frozenset({list, dict, set, tuple, frozenset})
_MAX_PARTS = 1000
"""A list or mapping of more parts is an object of unknown content."""
_MAX_WATCHED = 64
_ABSENT = object()


class _Place(Protocol):
    """Where a name is looked up: a module's globals, or a closure."""

    def get(self, name: str, default: object, /) -> object: ...


class _Cell:
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
        self._reading: _Reading | None = None

    @property
    def private_for(self) -> str:
        """Name of the closed-over variable whose content is unknown, so that nothing is shared; "" for none."""
        return self._now().private_for

    def variant(self) -> tuple[tuple[str, str], ...]:
        """What a call says about the function: a digest of 32 hexadecimal digits, as it is now."""
        return self._now().variant

    def _now(self) -> _Reading:
        reading = self._reading
        if reading is not None:
            for place, name, value in reading.watched:
                if place.get(name, _ABSENT) is not value:
                    break
            else:
                return reading
        # Read at the first call, when the whole module has been run.
        self._reading = reading = _Reading(self._function, self._ignore, self._secret, reading)
        return reading


class _Reading:
    """What a function was at one moment."""

    def __init__(
        self, function: Callable[..., Any], ignore: frozenset[str], secret: str, former: _Reading | None
    ) -> None:
        self._ignore = ignore
        self._known: dict[int, tuple[object, object]] = {} if former is None else former.seen
        self.seen: dict[int, tuple[object, object]] = {}
        """Lists and mappings by identity, with their form when they were first read."""
        self.watched: list[tuple[_Place, str, object]] = []
        """What was read where."""
        self.private_for = ""
        named = ""
        if isinstance(function, MethodType):
            named = _name_of(function.__self__) if isinstance(function.__self__, type) else ""
            function = function.__func__
        form = repr((named, self._form(function, frozenset()), secret if self.private_for else ""))
        self.variant = (("code", sha256(form.encode("utf-8", "surrogatepass")).hexdigest()[:32]),)
        self._known = {}

    # ── forms: plain values in lists and tuples, whose `repr` is the same in every process ───────────────────────

    def _form(self, value: Any, within: frozenset[int]) -> object:
        kind = cast("type[object]", type(value))
        if kind in _PLAIN:
            return value if kind is not int else ("int", hex(value))  # decimal digits have an upper bound
        if id(value) in within:  # a function that names itself
            return "within itself"
        within |= {id(value)}
        try:
            return self._form_of(value, within)
        except Exception:  # noqa: BLE001 — anybody's objects are asked for their attributes here
            return _unknown(value)

    def _form_of(self, value: Any, within: frozenset[int]) -> object:
        if isinstance(value, FunctionType):
            form = self._function_form(value, within)
        elif isinstance(value, CodeType):
            form = self._code_form(value, within)
        elif isinstance(value, MethodType | BuiltinFunctionType):
            form = self._method_form(value, within)
        elif isinstance(value, functools.partial):
            form = self._partial_form(cast("object", value), within)
        elif type(value) in _CONTAINERS:
            form = self._container_form(value, within)
        elif not isinstance(value, type) and callable(value) and hasattr(value, "__wrapped__"):
            inner: object = getattr(value, "__wrapped__")  # noqa: B009 — such as functools.cache makes
            form = ("object", _name_of(type(value)), self._form(inner, within))
        else:
            form = _object_form(value)
        return form

    def _function_form(self, function: FunctionType, within: frozenset[int]) -> object:
        wrapped = cast("object", getattr(function, "__wrapped__", None))
        code = function.__code__
        loaded, own = _names_in(code)
        own |= self._ignore
        cells: list[object] = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name not in own:
                form = self._read_form(_Cell(cell), name, within)
                # What a decorator closes over besides the function is its settings.
                if _is_unknown(form) and wrapped is None:
                    self.private_for = self.private_for or name
                cells.append((name, form))
        names = sorted(name for name in loaded - own if name in function.__globals__)
        found = [(name, self._global_form(function, name, within)) for name in names]
        return ("function", self._form(code, within), cells, found, self._form(wrapped, within))

    def _code_form(self, code: CodeType, within: frozenset[int]) -> object:
        consts = [self._form(const, within) for const in code.co_consts]
        return ("code", code.co_code, code.co_names, code.co_varnames, code.co_freevars, consts)

    def _global_form(self, function: FunctionType, name: str, within: frozenset[int]) -> object:
        value = function.__globals__[name]
        if isinstance(value, FunctionType) and value.__module__ != function.__module__:
            return ("named", _name_of(value))
        before = self.private_for
        form = self._read_form(function.__globals__, name, within)
        self.private_for = before  # there is one of a global, but many of what a factory's functions close over
        return form

    def _read_form(self, place: _Place, name: str, within: frozenset[int]) -> object:
        value = place.get(name, _ABSENT)
        if len(self.watched) < _MAX_WATCHED:
            self.watched.append((place, name, value))
        return "empty" if value is _ABSENT else self._form(value, within)

    def _container_form(self, value: Any, within: frozenset[int]) -> object:
        known = self._known.get(id(value)) or self.seen.get(id(value))
        form = known[1] if known is not None and known[0] is value else self._parts_form(value, within)
        self.seen[id(value)] = (value, form)
        return form

    def _parts_form(self, value: Any, within: frozenset[int]) -> object:
        kind = cast("type[object]", type(value))
        parts: Any = value.items() if kind is dict else value
        forms = [self._form(part, within) for part in parts] if len(value) <= _MAX_PARTS else [_unknown(value)]
        if any(map(_is_unknown, forms)):
            return _unknown(value)
        return (_name_of(kind), sorted(map(repr, forms)) if kind in {set, frozenset} else forms)

    def _method_form(self, method: Any, within: frozenset[int]) -> object:
        """Of a bound method of Python or of C, or a plain function of C."""
        holder = cast("object", method.__self__)
        bound = self._form(holder, within)
        if _is_unknown(bound):
            return bound
        inner = getattr(method, "__func__", None)
        return ("method", bound, _name_of(method) if inner is None else self._form(inner, within))

    def _partial_form(self, partial: Any, within: frozenset[int]) -> object:
        parts = [self._form(part, within) for part in (partial.func, partial.args, partial.keywords)]
        return _unknown(partial) if any(map(_is_unknown, parts)) else ("partial", parts)


def _object_form(value: Any) -> object:
    kind = cast("type[object]", type(value))
    root = kind.__module__.partition(".")[0]
    if isinstance(value, type | ModuleType):
        return ("named", _name_of(value))
    if isinstance(value, _TOLD_BY_TEXT):
        return ("object", _name_of(kind), str(value))
    if isinstance(value, re.Pattern):
        pattern: Any = cast("object", value)
        return ("pattern", repr(pattern.pattern), pattern.flags)
    if root in _NO_CONTENT:
        return ("object", _name_of(kind))
    if root in _CLIENTS and hasattr(value, "base_url"):
        return _client_form(value)
    return ("declared", tagged_form((), {"value": value}))


def _client_form(client: Any) -> object:
    if any(getattr(client, name, None) is not None for name in _PROVIDERS):
        return _unknown(client)  # its credential changes by itself
    extras = [sorted((k, v) for k, v in getattr(client, name).items() if type(v) is str) for name in _CLIENT_EXTRAS]
    return ("client", _name_of(type(client)), [str(getattr(client, name, None)) for name in _CLIENT_FIELDS], extras)


def names_outside(function: Callable[..., Any]) -> set[str]:
    """Globals and closed-over variables that a function reads; of a bound method also `self`."""
    bound = isinstance(function, MethodType)
    code: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
    found = set[str]() if code is None else {*code.co_freevars, *_names_in(code)[0]}
    return found | {"self"} if bound else found


def _unknown(value: object) -> object:
    return ("unknown", _name_of(type(value)))


def _is_unknown(form: object) -> bool:
    return isinstance(form, tuple) and cast("tuple[object, ...]", form)[:1] == ("unknown",)


def _name_of(value: Any) -> str:
    module = getattr(value, "__module__", None)
    return f"{module}.{getattr(value, '__qualname__', None) or getattr(value, '__name__', '')}"


def _names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """Names of globals that code reads, and of globals and closed-over variables that it sets itself."""
    loaded: set[str] = set()
    own: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
            loaded.add(str(step.argval))
        elif step.opname in {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}:
            own.add(str(step.argval))
    for const in code.co_consts:  # functions defined within
        if isinstance(const, CodeType):
            inner = _names_in(const)
            loaded |= inner[0]
            own |= inner[1]
    return loaded, own
