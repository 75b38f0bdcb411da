"""The control plane under /_control (JSON, loopback clients only), and conditions on the statistics.

GET stats?requests=N    counters and the newest N request summaries (200); see ``Stats.report`` and ``Record``
POST reset              counters, draws, limits, prefix cache, fault counts start afresh -> {"ok": true}
GET|POST config         the settings in force; POST takes the ones to change
GET|POST|DELETE faults  {"rules": [...], "counts": {id: {kind, matched, fired}}}; POST one rule or many -> {"ids": []}
POST wait               {"at_least": {"engine.waiting": 3}, "at_most": {}, "timeout_s": 60} -> {"ok": true, "stats": {}}

What is refused is answered by status 400 and {"error": text}.
"""

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from .core import Core
from .exchange import encode
from .faults import FaultRule
from .wire import as_dict

NEWEST = 200


class Wait(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /_control/wait: dotted statistics and their bounds, e.g. ``{"engine.waiting": 3}``."""

    at_least: dict[str, float] = {}
    at_most: dict[str, float] = {}
    timeout_s: float = 60.0


def figure(report: Mapping[str, Any], path: str) -> float:
    """One number of the report by its dotted path; a missing count is 0."""
    node: Any = report
    for part in path.split(".", 1):
        node = as_dict(node).get(part, 0)
    return float(node) if isinstance(node, (int, float)) else 0.0


def bounds(at_least: Mapping[str, float], at_most: Mapping[str, float]) -> Callable[[dict[str, Any]], bool]:
    """The condition that all bounds hold."""

    def hold(report: dict[str, Any]) -> bool:
        return all(figure(report, path) >= value for path, value in at_least.items()) and all(
            figure(report, path) <= value for path, value in at_most.items()
        )

    return hold


def add_faults(core: Core, body: bytes) -> list[str]:
    """Arm one rule, or a list of them; their ids."""
    text = body.lstrip()
    if text.startswith(b"["):
        rules = msgspec.json.decode(body, type=list[FaultRule])
    else:
        rules = [msgspec.json.decode(body, type=FaultRule)]
    return [core.faults.add(rule) for rule in rules]


async def control(core: Core, request: web.BaseRequest, path: str) -> web.Response:
    """Answer a request under /_control."""
    if not _local(request.remote):
        return _json({"error": "the control plane answers loopback clients only"}, 403)
    body = await request.read()
    try:
        return await _answer(core, request, path.removeprefix("/_control/"), body)
    except (ValueError, msgspec.MsgspecError) as error:
        return _json({"error": str(error)}, 400)


async def _answer(core: Core, request: web.BaseRequest, name: str, body: bytes) -> web.Response:
    content: Any
    match request.method, name:
        case "GET", "stats":
            content = core.report(int(request.query.get("requests", NEWEST)))
        case "POST", "reset":
            core.reset()
            content = {"ok": True}
        case "GET", "config":
            content = _options(core)
        case "POST", "config":
            core.configure(msgspec.json.decode(body, type=dict[str, Any]))
            content = _options(core)
        case "POST", "faults":
            content = {"ids": add_faults(core, body)}
        case ("GET" | "DELETE") as method, "faults":
            if method == "DELETE":
                core.configure({"faults": []})
            content = {"rules": core.faults.rules(), "counts": core.faults.report()}
        case "POST", "wait":
            wait = msgspec.json.decode(body, type=Wait)
            ok = await core.wait(bounds(wait.at_least, wait.at_most), wait.timeout_s)
            content = {"ok": ok, "stats": core.report(0)}
        case _:
            return _json({"error": f"no control {name!r}; there are stats, reset, config, faults, wait"}, 404)
    return _json(content)


def _options(core: Core) -> dict[str, Any]:
    return {option: getattr(core.config, option) for option in core.config.__struct_fields__}


def _local(remote: str | None) -> bool:
    try:
        return remote is None or ipaddress.ip_address(remote).is_loopback
    except ValueError:
        return False


def _json(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=encode(content), status=status, content_type="application/json")
