"""What objects that a function reads say about its answers: plain lists and tuples for `repr`."""

from __future__ import annotations

import datetime as dt
import decimal
import functools
import pathlib
import re
import sys
from types import EllipsisType
from typing import Any, cast

from llmmw.keys.canonical import module_name
from llmmw.keys.identity import account_of, has_provider

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, EllipsisType})
CONTAINERS = frozenset({list, dict, set, tuple, frozenset})
_TOLD_BY_TEXT = (pathlib.PurePath, dt.date, dt.time, dt.timedelta, dt.tzinfo, decimal.Decimal)
_PROGRAM = frozenset({"__main__", "__mp_main__"})
_NO_CONTENT = frozenset({"logging", "asyncio", "threading", "_thread", "queue", "concurrent", "contextvars"})
"""Modules of the standard library whose objects change no answer."""
_CLIENTS = frozenset({"openai", "anthropic"})
_CLIENT_EXTRAS = ("_custom_headers", "_custom_query")


def plain_form(value: object) -> object:
    """Of one of the `PLAIN`; its `repr` is the same in every process."""
    return ("int", hex(value)) if type(value) is int else value  # decimal digits have an upper bound


def known_form(value: Any) -> object | None:
    """Of an object of a known library, or None."""
    kind = cast("type[object]", type(value))
    root = kind.__module__.partition(".")[0]
    if isinstance(value, _TOLD_BY_TEXT):
        return ("object", name_of(kind), str(value))
    if isinstance(value, re.Pattern):
        pattern: Any = cast("object", value)
        return ("pattern", repr(pattern.pattern), pattern.flags)
    if root in _NO_CONTENT:
        return ("object", name_of(kind))
    return _client_form(value) if root in _CLIENTS and hasattr(value, "base_url") else None


def _client_form(client: Any) -> object | None:
    if has_provider(client):
        return None
    extras = [sorted((k, v) for k, v in getattr(client, name).items() if type(v) is str) for name in _CLIENT_EXTRAS]
    return ("client", name_of(type(client)), str(client.base_url), sorted(account_of(client).items()), extras)


@functools.lru_cache(maxsize=256)
def schema_of(kind: type) -> str:
    """The JSON schema of a pydantic class, or ""."""
    schema = getattr(kind, "model_json_schema", None)
    return repr(schema()) if callable(schema) else ""


@functools.lru_cache(maxsize=4096)
def is_own(module: str) -> bool:
    """Whether a module is the user's: neither of the standard library nor of an installed package."""
    root = module.partition(".")[0]
    if root in _PROGRAM:  # a notebook's runs in another's file
        return True
    if root in sys.stdlib_module_names or root == "llmmw":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & set(pathlib.PurePath(file).parts)


def is_standard(module: str) -> bool:
    """Whether a module is of the standard library."""
    return module.partition(".")[0] in sys.stdlib_module_names


def name_of(value: Any) -> str:
    """Module and qualified name."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    return f"{module_name(value)}.{name}"
