"""An instance that satisfies a JSON schema: small, deterministic, good enough for tools and json_schema.

Understood: type (or a list of types), properties, required, items, prefixItems, minItems, enum, const, anyOf, oneOf,
allOf (merged), $ref into $defs or definitions, minimum, maximum, exclusive bounds, multipleOf, minLength, maxLength,
format. Not understood: pattern, not, if/then, dependent keywords, uniqueItems beyond two items.
"""

import math
from hashlib import shake_128
from typing import Any, Final, cast

from .tokens import words
from .wire import as_list

MAX_DEPTH: Final = 12
MAX_NODES: Final = 5000
FORMATS: Final = {
    "date-time": "2024-01-02T03:04:05Z",
    "date": "2024-01-02",
    "time": "03:04:05Z",
    "duration": "PT1H",
    "email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def instance(schema: dict[str, Any], seed: bytes) -> Any:
    """A JSON value for the schema, a pure function of both."""
    return _Maker(schema, seed).make(schema, "$", 0)


class _Maker:
    def __init__(self, root: dict[str, Any], seed: bytes) -> None:
        self._root = root
        self._seed = seed
        self._nodes = 0

    def _draw(self, path: str, below: int) -> int:
        digest = shake_128(self._seed + path.encode()).digest(4)
        return int.from_bytes(digest, "big") % max(1, below)

    def make(self, schema: Any, path: str, depth: int) -> Any:
        """A value for one subschema; ``path`` makes sibling values differ."""
        self._nodes += 1
        if not isinstance(schema, dict):
            return None
        if self._nodes > MAX_NODES:
            depth = 2 * MAX_DEPTH  # a schema that only endless values satisfy gets a finite one
        node = self._resolve(cast("dict[str, Any]", schema), path, depth)
        if "const" in node:
            return node["const"]
        if node.get("enum"):
            options = node["enum"]
            return options[self._draw(path, len(options))]
        return self._typed(node, path, depth)

    def _typed(self, node: dict[str, Any], path: str, depth: int) -> Any:
        match self._kind(node, depth):
            case "object":
                made: Any = self._object(node, path, depth)
            case "array":
                made = self._array(node, path, depth)
            case "integer":
                made = int(self._number(node, path))
            case "number":
                made = self._number(node, path) + (0.0 if _bounded(node) else 0.5)
            case "boolean":
                made = bool(self._draw(path, 2))
            case "null":
                made = None
            case _:
                made = self._string(node, path)
        return made

    def _resolve(self, schema: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """Follow $ref, choose of anyOf/oneOf, merge allOf."""
        node = schema
        for _ in range(MAX_DEPTH):
            if "$ref" in node:
                rest = {key: value for key, value in node.items() if key != "$ref"}
                node = {**self._pointer(str(node["$ref"])), **rest}
                continue
            union = node.get("anyOf") or node.get("oneOf")
            if union:
                rest = {key: value for key, value in node.items() if key not in {"anyOf", "oneOf"}}
                node = {**rest, **self._choose(cast("list[Any]", union), path, depth)}
                continue
            if node.get("allOf"):
                node = _merged(node)
                continue
            break
        return node

    def _choose(self, union: list[Any], path: str, depth: int) -> dict[str, Any]:
        options = [cast("dict[str, Any]", option) for option in union if isinstance(option, dict)]
        if not options:
            return {}
        if depth >= MAX_DEPTH // 2:  # recursive schemas end at their null branch
            for option in options:
                if option.get("type") == "null":
                    return option
        plain = [option for option in options if option.get("type") != "null"] or options
        return plain[self._draw(path + "|", len(plain))]

    def _pointer(self, ref: str) -> dict[str, Any]:
        node: Any = self._root
        for part in ref.removeprefix("#").strip("/").split("/"):
            if part:
                name = part.replace("~1", "/").replace("~0", "~")
                node = cast("dict[str, Any]", node).get(name, {}) if isinstance(node, dict) else {}
        return cast("dict[str, Any]", node) if isinstance(node, dict) else {}

    @staticmethod
    def _kind(node: dict[str, Any], depth: int) -> str:
        kind = node.get("type")
        if isinstance(kind, list):
            kinds = [str(item) for item in as_list(kind)]
            if depth >= MAX_DEPTH // 2 and "null" in kinds:
                return "null"
            return next((item for item in kinds if item != "null"), "null")
        if isinstance(kind, str):
            return kind
        if "properties" in node:
            return "object"
        return "array" if "items" in node or "prefixItems" in node else "string"

    def _object(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        if depth >= 2 * MAX_DEPTH:
            return {}
        properties = cast("dict[str, Any]", node.get("properties") or {})
        required = cast("list[str]", node.get("required") or [])
        deep = depth >= MAX_DEPTH // 2
        names = [name for name in properties if name in required or not deep]
        made = {name: self.make(properties[name], f"{path}.{name}", depth + 1) for name in names}
        for name in required:
            made.setdefault(name, self._string({}, f"{path}.{name}"))
        return made

    def _array(self, node: dict[str, Any], path: str, depth: int) -> list[Any]:
        if depth >= 2 * MAX_DEPTH:
            return []
        prefix = cast("list[Any]", node.get("prefixItems") or [])
        least = int(node.get("minItems", 0))
        most = int(node.get("maxItems", max(least, 2)))
        deep = depth >= MAX_DEPTH // 2
        amount = max(least, len(prefix) or (0 if deep else min(2, most)))
        item = node.get("items")
        return [self.make(prefix[i] if i < len(prefix) else item, f"{path}[{i}]", depth + 1) for i in range(amount)]

    def _number(self, node: dict[str, Any], path: str) -> float:
        whole = self._kind(node, 0) == "integer"
        low, high = _range(node, whole=whole)
        step = node.get("multipleOf")
        if step:
            return float(math.ceil(low / step) * step)
        value = low + self._draw(path, max(1, int(high - low) + 1))
        return value if value <= high else (low + high) / 2

    def _string(self, node: dict[str, Any], path: str) -> str:
        named = FORMATS.get(str(node.get("format")))
        if named is not None:
            return named
        text = words(self._seed + path.encode(), 2)
        least = int(node.get("minLength", 0))
        if len(text) < least:
            text += "x" * (least - len(text))
        return text[: int(node["maxLength"])] if "maxLength" in node else text


def _bounded(node: dict[str, Any]) -> bool:
    return any(key in node for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))


def _range(node: dict[str, Any], *, whole: bool) -> tuple[float, float]:
    """Smallest and largest value, a hundred apart where the schema leaves a side open."""
    nudge = 1.0 if whole else 1e-6
    low = node.get("minimum")
    if isinstance(node.get("exclusiveMinimum"), (int, float)):
        low = node["exclusiveMinimum"] + nudge
    high = node.get("maximum")
    if isinstance(node.get("exclusiveMaximum"), (int, float)):
        high = node["exclusiveMaximum"] - nudge
    if low is None:
        low = 0 if high is None or high >= 0 else high - 100
    if whole:
        low = math.ceil(low)
    return low, (low + 100 if high is None else high)


def _merged(node: dict[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in node.items() if key != "allOf"}
    for part in cast("list[dict[str, Any]]", node["allOf"]):
        for key, value in part.items():
            if key == "properties":
                merged[key] = {**merged.get(key, {}), **value}
            elif key == "required":
                merged[key] = [*merged.get(key, []), *value]
            else:
                merged[key] = value
    return merged
