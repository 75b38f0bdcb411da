"""A user function's return values as bytes and back, for caching and for handing copies to several callers.

Only what comes back equal and of the same type is encoded: JSON values, pydantic models, dataclasses and msgspec
structs. Bytes from disk never choose a class: one is accepted only if the function declares it or has returned it
in this process.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import msgspec

from llmmw.keys.canonical import module_name

_PLAIN: tuple[type, ...] = (str, dict, list, int, float, bool, type(None))
_JSON_TAG, _TYPED_TAG = b"j", b"t"


class Undecodable(Exception):
    """Stored bytes that this process cannot turn back into the value they were."""


class Codec:
    """Encodes the values of one function.

    Args:
        declared: the function's return annotation, or None.
    """

    def __init__(self, declared: Any = None) -> None:
        self._classes: dict[str, type] = {}
        for found in _classes_in(declared):
            self._classes[_name_of(found)] = found

    def encode(self, value: object) -> bytes | None:
        """Bytes that `decode` turns into an equal value of the same type, or None where that cannot be had."""
        kind = type(value)
        try:
            if kind is str:
                return _JSON_TAG + msgspec.json.encode(value)
            if kind in _PLAIN:
                data = msgspec.json.encode(value)
                return _JSON_TAG + data if msgspec.json.decode(data) == value else None
            return self._encode_model(kind, value) if _is_model(kind) else None
        except Exception:  # noqa: BLE001 — a user's model may raise anything; the call itself must not fail for it
            return None

    def _encode_model(self, kind: type, value: object) -> bytes | None:
        data = _dump(value)
        if _load(kind, data) != value:
            return None
        name = _name_of(kind)
        self._classes[name] = kind
        return _TYPED_TAG + name.encode() + b"\n" + data

    def decode(self, data: bytes) -> Any:
        """The value that `encode` was given.

        Raises:
            Undecodable: not our form, or a class that this function is not known to return.
        """
        tag, rest = data[:1], data[1:]
        try:
            if tag == _JSON_TAG:
                return msgspec.json.decode(rest)
            if tag == _TYPED_TAG:
                name, _, body = rest.partition(b"\n")
                return _load(self._classes[name.decode()], body)
        except Exception as error:
            raise Undecodable(str(error)) from error
        raise Undecodable("unknown form")


def json_of(data: bytes) -> bytes:
    """The JSON within an encoded value, whatever its class."""
    return data[1:] if data[:1] == _JSON_TAG else data.partition(b"\n")[2]


def _name_of(kind: type) -> str:
    return f"{module_name(kind)}:{kind.__qualname__}"


def _is_model(kind: type) -> bool:
    return hasattr(kind, "model_validate_json") or dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct)


def _dump(value: Any) -> bytes:
    if hasattr(value, "model_dump_json"):
        return str(value.model_dump_json(by_alias=True, exclude_unset=True)).encode()
    return msgspec.json.encode(value)


def _load(kind: type[Any], data: bytes) -> Any:
    validate = getattr(kind, "model_validate_json", None)
    if validate is not None:
        return validate(data)
    return msgspec.json.decode(data, type=kind)


def _classes_in(annotation: Any) -> set[type]:
    """Every encodable class that an annotation such as `list[Model] | None` or `AsyncIterator[Model]` mentions."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return {annotation} if _is_model(annotation) else set()
    found: set[type] = set()
    for argument in typing.get_args(annotation):
        found |= _classes_in(argument)
    return found
