"""Wrong hits: does a cache answer a question with the answer to one that differs in a single field?

The question is asked with the field first and without it second, of a server that keeps what it was asked. Two requests
are right. One is a wrong hit, if the field was in it; if it was not, the peer does not pass the field on.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from client_cpu import FILLER, MODEL, messages

from llmmw.testing.server import ServerConfig, server_process
from peers.protocol import CannotError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llmmw.testing.server import ServerProcess
    from peers.rows import Way

Verdict = Literal["ok", "WRONG", "not sent", "not cached", "refused"]
_TOOL = {"type": "function", "function": {"name": "look", "description": "look", "parameters": {"type": "object"}}}
_PAST = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good evening."}]


def _changes(number: int, elsewhere: str) -> dict[str, dict[str, Any]]:
    """What is changed, by the name of the field; `number` makes each question a new one."""
    system, question = messages(f"probe {number}")
    return {
        "base_url": {"base_url": elsewhere},
        "api_key": {"api_key": "another"},
        "extra_body": {"extra_body": {"guided_choice": ["yes", "no"]}},
        "model": {"model": f"{MODEL}2"},
        "system message": {"messages": [{"role": "system", "content": f"Shout. {FILLER}"}, question]},
        "earlier turns": {"messages": [system, *_PAST, question]},
        "temperature": {"temperature": 0.1},
        "seed": {"seed": 7},
        "max_tokens": {"max_tokens": 7},
        "top_p": {"top_p": 0.5},
        "stop": {"stop": ["word"]},
        "tools": {"tools": [_TOOL]},
        "response_format": {"response_format": {"type": "json_object"}},
        "logit_bias": {"logit_bias": {"50": 3}},
    }


FIELDS = tuple(_changes(0, ""))
_ALIASES = {"max_tokens": "max_completion_tokens"}
_SENT: Mapping[str, Callable[[dict[str, Any]], bool]] = {
    "extra_body": lambda body: "guided_choice" in body,
    "model": lambda body: body.get("model") != MODEL,
    "temperature": lambda body: body.get("temperature") == 0.1,
    "system message": lambda body: "Shout." in json.dumps(body),
    "earlier turns": lambda body: "Good evening." in json.dumps(body),
}


def probe(way: Way) -> dict[str, Verdict | str]:
    """The verdict on each field.

    Raises:
        CannotError: the way has no cache, or does not cache a question asked twice.
    """
    config = ServerConfig(any_model=True, log_body_bytes=65536, log_headers=True)
    with server_process(config) as here, server_process(config) as elsewhere:
        way.do("open", **way.job("probe", here.base_url))
        for _ in range(2):
            way.do("ask", prompt="control", changes={})
        if here.stats(0)["received"] != 1:
            raise CannotError("does not cache")
        found = dict[str, Verdict | str]()
        for number, field in enumerate(FIELDS):
            here.reset()
            elsewhere.reset()
            changes = _changes(number, elsewhere.base_url)[field]
            try:
                way.do("ask", prompt=f"probe {number}", changes=changes)
            except (RuntimeError, CannotError) as error:
                found[field] = f"refused: {error}"[:120]
                continue
            sent = _was_sent(field, here, elsewhere)
            way.do("ask", prompt=f"probe {number}", changes={})
            asked = here.stats(0)["received"] + elsewhere.stats(0)["received"]
            found[field] = "not sent" if not sent else "ok" if asked > 1 else "WRONG"
    return found


def _was_sent(field: str, here: ServerProcess, elsewhere: ServerProcess) -> bool:
    """Whether the only request so far carries the field."""
    if field == "base_url":
        return bool(elsewhere.stats(0)["received"])
    request = here.stats(1)["requests"][0]
    if field == "api_key":
        return bool(request["key"].endswith("ther"))
    body: dict[str, Any] = json.loads(request["body"])
    of = _SENT.get(field)
    return of(body) if of is not None else bool({field, _ALIASES.get(field, field)} & body.keys())
