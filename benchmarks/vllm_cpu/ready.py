"""Wait until a vLLM server answers, then warm it up, so that no test pays for its first requests.

    python benchmarks/vllm_cpu/ready.py http://127.0.0.1:8000 [--timeout 300] [--api-key KEY]

Standard library only. `/health` turns 200 when the engine is up; before that the port refuses connections. The
first request with logprobs or a structured output compiles or loads something (2 to 12 s), so each kind is sent once.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

NOT_UP = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
WARM_UP: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0, "structured_outputs": {"choice": ["yes", "no"]}},
)


class NotReadyError(Exception):
    """The server did not come up in time."""


def request(
    url: str,
    body: dict[str, Any] | None = None,
    *,
    api_key: str | None = None,
    timeout: float = 60.0,
) -> bytes:
    """GET *url*, or POST *body* to it as JSON; returns the answer's bytes."""
    call = urllib.request.Request(url)
    if api_key:
        call.add_header("Authorization", f"Bearer {api_key}")
    if body is not None:
        call.data = json.dumps(body).encode()
        call.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(call, timeout=timeout) as answer:
        return answer.read()


def wait(base: str, *, timeout: float, check: Callable[[], None] = lambda: None) -> float:
    """Seconds until `/health` of *base* answered; *check* runs between tries and may raise to give up early."""
    start = time.monotonic()
    while True:
        check()
        try:
            request(f"{base}/health", timeout=10)
        except NOT_UP as error:
            waited = time.monotonic() - start
            if waited > timeout:
                raise NotReadyError(f"{base}/health did not answer within {timeout:g} s ({error})") from None
            time.sleep(0.2)
        else:
            return time.monotonic() - start


def warm_up(base: str, *, api_key: str | None = None) -> float:
    """Send each kind of request once; returns the seconds it took."""
    start = time.monotonic()
    model = json.loads(request(f"{base}/v1/models", api_key=api_key))["data"][0]["id"]
    hello = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    for extra in WARM_UP:
        request(f"{base}/v1/chat/completions", hello | extra, api_key=api_key)
    return time.monotonic() - start


def main() -> int:
    """Wait for the server named on the command line."""
    parser = argparse.ArgumentParser(description="Wait for a vLLM server and warm it up.")
    parser.add_argument("base", help="for example http://127.0.0.1:8000")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--api-key")
    args = parser.parse_args()
    base = args.base.rstrip("/").removesuffix("/v1")
    try:
        waited = wait(base, timeout=args.timeout)
    except NotReadyError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"ready after {waited:.1f} s, warmed up in {warm_up(base, api_key=args.api_key):.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
