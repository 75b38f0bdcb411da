"""Record what a real vLLM answers when a call goes wrong, for the tests of fault classification.

    python benchmarks/vllm_cpu/record_errors.py [--out tests/data/vllm_errors.json]

Starts a server with a key, then one with a key, four slots and a cap on queued requests; sends each wrong call once and
writes a list of {case, method, path, status, headers, body}: `headers` holds those of HEADERS that were there, `body`
the parsed JSON (or the text). Run it again when the pinned vLLM changes, and read the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import threading
import time
from typing import Any

import ready
import server

KEY = "sk-test"
QUEUE_CAP = 8
SLOTS = 4
HEADERS = ("content-type", "retry-after", "allow", "www-authenticate")
OUT = server.HERE.parent.parent / "tests" / "data" / "vllm_errors.json"

CHAT, BATCH, COMPLETIONS = "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
LONG = [{"role": "user", "content": "word " * 6000}]
TOOL = {"type": "function", "function": {"name": "move", "parameters": {"type": "object", "properties": {}}}}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and the status it should get; a dict body is completed with the model and sent as JSON."""

    name: str
    status: int
    path: str = CHAT
    body: dict[str, Any] | str | None = dataclasses.field(default_factory=dict)
    method: str = "POST"
    key: str | None = KEY
    content_type: str = "application/json"


CASES = (
    Case("unknown_model", 404, body={"model": "nobody"}),
    Case("unknown_path", 404, path="/v1/nowhere"),
    Case("wrong_method", 405, method="GET", body=None),
    Case("prompt_too_long", 400, body={"messages": LONG}),
    Case("prompt_too_long_stream", 400, body={"messages": LONG, "stream": True}),
    Case("prompt_too_long_in_batch", 400, path=BATCH, body={"messages": [HELLO, LONG]}),
    Case("prompt_too_long_in_list", 400, path=COMPLETIONS, body={"prompt": ["hello", "word " * 6000]}),
    Case("too_many_prompts_in_list", 400, path=COMPLETIONS, body={"prompt": ["hello"] * 1025}),
    Case("max_tokens_too_large", 400, body={"max_tokens": 100_000}),
    Case("bad_json", 400, body='{"model": "tiny", '),
    Case("wrong_type", 400, body={"temperature": "hot"}),
    Case("wrong_content_type", 400, body='{"model": "tiny"}', content_type="text/plain"),
    Case("missing_messages", 400, body={"messages": None}),
    Case("empty_messages", 400, body={"messages": []}),
    Case("bad_value", 400, body={"temperature": -1}),
    Case("too_many_logprobs", 400, body={"logprobs": True, "top_logprobs": 30}),
    Case("n_too_large", 400, body={"n": 100_001}),
    Case("n_above_one_and_greedy", 400, body={"n": 2, "temperature": 0}),
    Case("n_above_one_in_batch", 400, path=BATCH, body={"messages": [HELLO], "n": 2}),
    Case(
        "bad_json_schema",
        400,
        body={"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nonsense"}}}},
    ),
    Case("tool_choice_not_enabled", 400, body={"tools": [TOOL], "tool_choice": "auto"}),
    Case("no_key", 401, key=None),
    Case("wrong_key", 401, key="sk-wrong"),
)
# Sent to a second server with a cap on queued requests, which comes before every check but the key and the syntax:
# these three can never succeed there, and n_too_large would be a 503 as well.
OVER_THE_CAP = (
    Case("overload_batch", 503, path=BATCH, body={"messages": [HELLO] * (QUEUE_CAP + 4)}),
    Case("overload_list", 503, path=COMPLETIONS, body={"prompt": ["hello"] * (QUEUE_CAP + 4)}),
    Case("overload_n", 503, body={"n": QUEUE_CAP + 4, "temperature": 1}),
)
# Sent to the same server while the cap is filled by other calls.
UNDER_LOAD = (
    Case("overload", 503),
    Case("overload_stream", 503, body={"stream": True}),
    Case("overload_completions", 503, path=COMPLETIONS, body={"prompt": "hello"}),
)


def payload(case: Case, model: str) -> bytes | None:
    """The bytes *case* sends."""
    if not isinstance(case.body, dict):
        return case.body.encode() if case.body is not None else None
    subject = {} if case.path == COMPLETIONS else {"messages": HELLO}
    whole = {"model": model, "max_tokens": 4} | subject | case.body
    return json.dumps({k: v for k, v in whole.items() if v is not None}).encode()


def send(case: Case, running: server.Running) -> dict[str, Any]:
    """Send *case* and describe the answer; complains when the status is another than expected."""
    host = running.base.removeprefix("http://")
    headers = {"Content-Type": case.content_type} | ({"Authorization": f"Bearer {case.key}"} if case.key else {})
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request(case.method, case.path, payload(case, running.model_name), headers)
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != case.status:
        raise server.ServerError(f"{case.name}: expected status {case.status}, got {answer.status}: {text[:500]}")
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    found = {name: answer.headers[name] for name in HEADERS if name in answer.headers}
    return {
        "case": case.name,
        "method": case.method,
        "path": case.path,
        "status": answer.status,
        "headers": found,
        "body": body,
    }


def occupy(running: server.Running) -> threading.Thread:
    """Fill the queue up to its cap with one long batch; returns once the server counts all of it."""
    body = {"model": running.model_name, "messages": [HELLO] * QUEUE_CAP, "max_tokens": 4000, "temperature": 0}

    def hold() -> None:
        with contextlib.suppress(*ready.NOT_UP):  # the server is stopped under it
            ready.request(running.base + BATCH, body, api_key=KEY, timeout=300)

    holder = threading.Thread(target=hold)
    holder.start()
    while holder.is_alive() and running_requests(running) < SLOTS:
        time.sleep(0.02)
    return holder


def running_requests(running: server.Running) -> float:
    """How many sequences the engine works on, from /metrics."""
    for line in ready.request(running.base + "/metrics").decode().splitlines():
        if line.startswith("vllm:num_requests_running"):
            return float(line.rpartition(" ")[2])
    return 0.0


def record() -> list[dict[str, Any]]:
    """Start the servers and send every case."""
    key = ("--api-key", KEY)
    with server.server(server.Settings(vllm_args=key)) as running:
        rows = [send(case, running) for case in CASES]
    os.environ["MAX_NUM_SEQS"] = str(SLOTS)
    os.environ["STEP_PAD"] = "1"  # the calls that fill the queue last long enough, whatever the machine
    with server.server(server.Settings(vllm_args=(*key, "--max-num-queued-reqs", str(QUEUE_CAP)))) as running:
        rows += [send(case, running) for case in OVER_THE_CAP]
        holder = occupy(running)
        rows += [send(case, running) for case in UNDER_LOAD]
        if not holder.is_alive():
            raise server.ServerError("the calls that fill the queue ended before the overload was recorded")
    return rows


def main() -> int:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description="Record vLLM's error answers.")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args()
    server.SIGNALS.install()
    try:
        rows = record()
    except server.ServerError as error:
        server.say(f"error: {error}")
        return 1
    except server.Stopped as stopped:
        return 128 + stopped.signum
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    server.say(f"{len(rows)} answers in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
