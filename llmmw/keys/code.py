"""What a function is besides its name: a digest of its code and of the plain values that it closes over.

Two programs both have a `__main__.ask`, and a factory makes many functions of one name: in a shared cache directory
the name alone would give one the answers of the other. Processes of one Python version agree on the digest, and an
edited function starts afresh. Globals, `self` and the code of other functions that it calls are not part of it.
"""

from __future__ import annotations

from hashlib import sha256
from types import CodeType, EllipsisType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, EllipsisType})


def code_digest(function: Callable[..., Any]) -> str:
    """32 hexadecimal digits; of a callable without code of its own, all that is known is its type."""
    form = repr(_form(function, frozenset()))
    return sha256(form.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _form(value: Any, within: frozenset[int]) -> object:
    """Plain values in lists and tuples, whose `repr` is the same in every process."""
    kind = cast("type[object]", type(value))
    if kind in _PLAIN:
        return value
    if isinstance(value, MethodType):
        value = value.__func__
    if id(value) in within:  # a function that names itself
        return "within itself"
    return _compound(value, within | {id(value)})


def _compound(value: Any, within: frozenset[int]) -> object:
    if isinstance(value, CodeType):
        consts = [_form(const, within) for const in value.co_consts]
        return ("code", value.co_code, value.co_names, value.co_varnames, value.co_freevars, consts)
    if isinstance(value, FunctionType):
        cells = [_cell(cell, within) for cell in value.__closure__ or ()]
        return ("function", _form(value.__code__, within), cells, _form(getattr(value, "__wrapped__", None), within))
    kind = cast("type[object]", type(value))
    if kind is tuple or kind is frozenset:
        parts = [repr(_form(part, within)) for part in value]
        return (kind.__name__, parts if kind is tuple else sorted(parts))
    wrapped = getattr(value, "__wrapped__", None) if callable(value) else None  # such as functools.cache makes
    return ("object", kind.__module__, kind.__qualname__, _form(wrapped, within))


def _cell(cell: Any, within: frozenset[int]) -> object:
    try:
        return _form(cell.cell_contents, within)
    except ValueError:
        return "empty"
