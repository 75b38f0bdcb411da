"""Why two requests do not share an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from llmmw.keys.canonical import tagged_form
from llmmw.keys.sharing import TRANSPORT_FIELDS, head_of, key_of, wire_body

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmmw.call import Call


def explain_difference(first: Call, second: Call) -> str | None:
    """The first field in which two calls differ for the cache, such as "messages[1].content"; None if they share.

    Raises:
        Uncacheable: one of them has no key.
    """
    if key_of(first) == key_of(second):
        return None
    bodies: list[Any] = []
    for call in (first, second):
        wire, reduced = (call.payload, call) if call.op == "function" else wire_body(call.payload, call)
        names = ("schema", "op", "target", "model", "namespace", "tenant", "variant")
        bodies.append(dict(zip(names, head_of(reduced, call.context.tenant), strict=True)) | {"body": dict(wire)})
    return _first_difference(*bodies).removeprefix("body.")


def _first_difference(one: Any, other: Any) -> str:
    """The path to the first difference; "" where the values differ as a whole."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        for name in dict.fromkeys((*pairs[0], *pairs[1])):
            if name not in pairs[0] or name not in pairs[1] or not _same(name, pairs[0][name], pairs[1][name]):
                inner = _first_difference(pairs[0].get(name), pairs[1].get(name))
                return f"{name}{'' if not inner or inner.startswith('[') else '.'}{inner}"
        return "(key order)"
    if isinstance(one, list) and isinstance(other, list):
        lists = cast("list[object]", one), cast("list[object]", other)
        for index, pair in enumerate(zip(*lists, strict=False)):
            if not _same("", *pair):
                inner = _first_difference(*pair)
                return f"[{index}]{'' if not inner or inner.startswith('[') else '.'}{inner}"
        return f"[{min(map(len, lists))}]"
    return ""


def _same(name: str, one: Any, other: Any) -> bool:
    return tagged_form((), {name: one}) == tagged_form((), {name: other})


def uncounted_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The fields in which two bodies differ although no key depends on them."""
    missing = object()
    return sorted(name for name in TRANSPORT_FIELDS if first.get(name, missing) != second.get(name, missing))
