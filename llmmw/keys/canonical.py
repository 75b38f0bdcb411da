"""One injective byte form per request: equal bytes mean the same question, in every process.

Three ways, from fast to careful, and the request alone decides which one it takes:
plain chat bodies and arguments are checked by a few type tests and encoded as msgpack, which copies texts where JSON
looks at every character; other JSON is encoded and proven by decoding it again; whatever is not JSON (and every other
function's arguments) is written out with a tag per type. No JSON text begins as one of the msgpack forms does. Never
`repr`, `hash` or `id`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, cast

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_DEPTH = 100
"""Containers inside containers; a question nested deeper is sent, but not cached."""

SCHEMA_FIELDS = frozenset({
    "parameters", "input_schema", "output_schema", "json_schema", "guided_json", "schema", "json", "format",
    "response_schema", "responseSchema", "responseJsonSchema", "parametersJsonSchema", "documents",
    "chat_template_kwargs",
})  # fmt: skip
"""Subtrees that become prompt text as they stand: the order of their mappings can change the answer."""

_BULK = frozenset({"messages", "prompt", "input", "contents", "system"})
"""The large fields, in which no schema stands."""

_LINKS = frozenset({"image_url", "video_url", "audio_url", "file_url", "file_uri"})
_LINKS_OR_DATA = frozenset({"image", "video", "audio"})
"""Hold a link, or the content itself in base64, in some embedding APIs."""
_LIVE_TOOLS = ("web_search", "web_fetch", "file_search", "mcp", "url_context", "google_search")
"""Types of tools that the server itself runs, over content that changes."""
_LIVE_FIELDS = ("web_search_options", "search_parameters", "mcp_servers", "plugins")
_TOLD_BY_TEXT = frozenset({
    "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "decimal.Decimal", "uuid.UUID",
})  # fmt: skip
_ZONES = frozenset({"builtins.NoneType", "datetime.timezone", "zoneinfo.ZoneInfo"})
SCALARS = frozenset({str, int, bool, type(None)})

_encode_flat = msgspec.msgpack.Encoder(order="deterministic").encode
_encode_sorted = msgspec.json.Encoder(order="deterministic").encode
_encode_ordered = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Uncacheable(Exception):
    """The request has no injective form (or its answer can change): it is sent, counted and not shared.

    `reason` is one of a few fixed texts, so it can be counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def json_form(head: tuple[object, ...], body: dict[str, Any], *, remote_content: bool = False) -> bytes:
    """The form of a JSON request: mapping order ignored except inside schemas, values as they go over the wire.

    Args:
        head: what identifies the request besides its body; strings, ints, None and tuples of them.
        body: JSON-shaped; other values are tolerated where `tagged_form` knows them.
        remote_content: whether a link to content that can change is part of the question like any other text.

    Raises:
        Uncacheable: no injective form.
    """
    try:
        if is_flat(body):
            return _flat_form(head, body)
        encoded = _encode_sorted((*head, body))
        is_json = bool(_decode(encoded)[-1] == body)
    except UnicodeEncodeError:
        raise Uncacheable("lone surrogate") from None
    except RecursionError:
        raise Uncacheable("nested too deep") from None
    except (TypeError, ValueError):
        is_json, encoded = False, b""
    try:
        if not remote_content and _is_live(body, b"" if not is_json else encoded):
            raise Uncacheable("remote content that can change")
        if is_json:
            return encoded + b"".join(_schemas(body))
    except RecursionError:
        raise Uncacheable("nested too deep") from None
    return tagged_form(head, body)


def arguments_form(head: tuple[object, ...], arguments: Mapping[str, Any]) -> bytes:
    """The form of a function's arguments.

    Raises:
        Uncacheable: no injective form.
    """
    if is_flat(arguments):
        try:
            return _flat_form(head, arguments)
        except UnicodeEncodeError:
            raise Uncacheable("lone surrogate") from None
        except (TypeError, ValueError):  # no plain mapping, a key in it that is no text, an int too large: told below
            pass
    return tagged_form(head, arguments)


def tagged_form(head: tuple[object, ...], body: Mapping[str, Any]) -> bytes:
    """The form in which every container and object carries the name of its type.

    Raises:
        Uncacheable: no injective form.
    """
    tree = ["dict", *_pairs(body, 0, ordered=False)]
    try:
        return _encode_ordered(("tagged", *head, tree))
    except UnicodeEncodeError:
        raise Uncacheable("lone surrogate") from None
    except ValueError:  # an int of more digits than Python converts
        raise Uncacheable("int too large") from None


def _flat_form(head: tuple[object, ...], body: Mapping[str, Any]) -> bytes:
    try:
        return _encode_flat((head, body))
    except OverflowError:  # an int of more than 64 bits
        return _encode_sorted((head, body))


def is_flat(body: Mapping[str, Any]) -> bool:
    """Whether a body is only texts, numbers and messages of texts (then what is encoded is injective without proof)."""
    for name, value in body.items():
        kind: type = type(value)  # pyright: ignore[reportUnknownVariableType]  # a cast costs more than the test
        if kind in SCALARS:
            continue
        if kind is float:
            if value - value != 0:  # NaN and the infinities would be written as null
                return False
        elif name != "messages" or kind is not list or not _are_texts(value):
            return False
    return True


def _are_texts(messages: list[Any]) -> bool:
    """Whether every message is a mapping of texts."""
    for message in messages:
        if type(message) is not dict:
            return False
        for part in message.values():  # pyright: ignore[reportUnknownVariableType]  # checked in the next line
            if type(part) is not str:  # pyright: ignore[reportUnknownArgumentType]
                return False
    return True


def _schemas(body: dict[str, Any]) -> Iterable[bytes]:
    """Every schema in the body with its own order of keys; their places are fixed by the sorted form before."""
    found: list[bytes] = []
    for name in sorted(body):
        value = body[name]
        if name not in _BULK and isinstance(value, dict | list):
            _collect_schemas(cast("object", {name: value}), found)
    return found


def _collect_schemas(value: object, found: list[bytes]) -> None:
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        for name in sorted(mapping):
            child = mapping[name]
            if name in SCHEMA_FIELDS and isinstance(child, dict | list):
                found.append(_encode_ordered(child))
            else:
                _collect_schemas(child, found)
    elif isinstance(value, list):
        for child in cast("list[object]", value):
            _collect_schemas(child, found)


def _is_live(body: dict[str, Any], encoded: bytes) -> bool:
    """Whether the answer depends on content elsewhere: a link, a search, a stored prompt without a version.

    Args:
        body: of the request.
        encoded: the same as JSON, to see quickly that there is no link; b"" where it is none.
    """
    if any(body.get(name) is not None for name in _LIVE_FIELDS):
        return True
    prompt, tools = body.get("prompt"), body.get("tools")
    if isinstance(prompt, dict) and cast("dict[str, object]", prompt).get("version") is None:
        return True
    if isinstance(tools, list | tuple):
        kinds = [cast("dict[str, object]", tool).get("type") for tool in tools if isinstance(tool, dict)]  # pyright: ignore[reportUnknownVariableType]  # JSON
        if any(isinstance(kind, str) and kind.startswith(_LIVE_TOOLS) for kind in kinds):
            return True
    may_link = not encoded or b"_ur" in encoded or b'"url"' in encoded or b"://" in encoded
    return may_link and _links_out(body)


def _links_out(value: object) -> bool:
    """Whether content is referred to by a link that is not a data URL (its bytes may change behind it)."""
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        for name, child in mapping.items():
            if name in _LINKS or (name == "url" and mapping.get("type") == "url"):
                url: object = cast("dict[str, Any]", child).get("url") if isinstance(child, dict) else child
                if isinstance(url, str) and url.lstrip()[:5].lower() != "data:":
                    return True
            elif name in _LINKS_OR_DATA and isinstance(child, str) and "://" in child[:12]:
                return True
            if _links_out(cast("object", child)):
                return True
    elif isinstance(value, list | tuple):
        return any(_links_out(child) for child in cast("list[object]", value))
    return False


def _tagged(value: object, depth: int, *, ordered: bool) -> object:
    """The value as nested lists that begin with a type; scalars stand for themselves."""
    kind = type(value)
    if kind in SCALARS:
        return value
    if kind is float:
        number = cast("float", value)
        if number - number != 0:
            raise Uncacheable("not a finite number")
        return number
    if depth >= MAX_DEPTH:
        raise Uncacheable("nested too deep")
    if kind is list or kind is tuple:
        items = cast("list[object]", value)
        return [kind.__name__, *(_tagged(item, depth + 1, ordered=ordered) for item in items)]
    if kind is dict:
        return ["dict", *_pairs(cast("dict[Any, Any]", value), depth, ordered=ordered)]
    return _tagged_object(value, depth)


def _pairs(mapping: Mapping[Any, Any], depth: int, *, ordered: bool) -> list[object]:
    for name in mapping:
        if type(name) is not str:
            raise Uncacheable("mapping key that is not text")
    found: list[object] = []
    for name in mapping if ordered else sorted(mapping):
        value = mapping[name]
        if type(value) not in SCALARS:  # most arguments are, and every call passes through here
            value = _tagged(value, depth + 1, ordered=ordered or name in SCHEMA_FIELDS)
        found.append([name, value])
    return found


def _tagged_object(value: object, depth: int) -> object:
    """Objects with a declared form: enums, dataclasses, msgspec and pydantic objects, pydantic classes, times."""
    kind: type = type(value)  # pyright: ignore[reportUnknownVariableType]  # any class at all
    if isinstance(value, type):
        schema = getattr(value, "model_json_schema", None)
        if not callable(schema):
            raise Uncacheable("a class")
        return ["class", _name_of(value), _tagged(schema(), depth + 1, ordered=True)]
    if isinstance(value, enum.Enum):
        meant = cast("object", value.value)
        return ["enum", _name_of(kind), value.name, meant if type(meant) in SCALARS else None]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return ["object", _name_of(kind), *(_tagged(item, depth + 1, ordered=False) for item in cast("Any", value))]
    if _name_of(kind) in _TOLD_BY_TEXT:
        known: Any = cast("Any", value)
        zone: Any = getattr(known, "tzinfo", None)
        zone_kind: type[Any] = type(zone)  # pyright: ignore[reportUnknownVariableType]  # any class at all
        if _name_of(zone_kind) in _ZONES:
            fold: object = getattr(known, "fold", 0)
            return ["object", _name_of(kind), str(known), fold, _name_of(zone_kind), str(zone)]
    fields = fields_of(cast("Any", value))
    if fields is None:
        raise Uncacheable(f"no codec for {kind.__name__}")
    return ["object", _name_of(kind), *_pairs(fields, depth, ordered=False)]


def fields_of(value: Any) -> dict[str, Any] | None:
    """Everything an object of a declared kind holds, or None for another kind or for hidden state."""
    kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]  # any class at all
    held: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    if isinstance(value, msgspec.Struct):
        fields: dict[str, Any] = msgspec.structs.asdict(value)
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    elif hasattr(kind, "__pydantic_fields__"):
        if getattr(value, "__pydantic_private__", None):
            return None
        fields = held | dict(getattr(value, "__pydantic_extra__", None) or {})
    else:
        return None
    return fields if held.keys() <= fields.keys() else None


def _name_of(kind: type) -> str:
    return f"{module_name(kind)}.{kind.__qualname__}"


def module_name(value: Any) -> str | None:
    """Of a class or function; the program's own module is called the same in processes that it spawns."""
    module = getattr(value, "__module__", None)
    return "__main__" if module == "__mp_main__" else module
