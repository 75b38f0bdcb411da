"""The real vLLM server that `make test-vllm` starts, a second one that is small and asks for a key, and their figures.

Nothing here goes through llmmw: `raw` and `raw_stream` ask with plain httpx, the figures are vLLM's own /metrics.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from llmmw import Stack

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "vllm_cpu"
SECOND_SERVER = (
    "--max-num-seqs", "4", "--max-num-queued-reqs", "4", "--api-key", "sk-test",
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
)  # fmt: skip
PATIENCE_S = 600.0
"""Only what hangs takes so long: a machine may be twenty times slower than a quiet one."""
_SAMPLE = re.compile(r"^([\w:]+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_FIGURES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:request_success_total": "answers",
}
_OWN_FIELDS = ("structured_outputs", "cache_salt", "priority", "ignore_eos", "min_tokens", "return_token_ids")


@dataclass(frozen=True)
class VLLM:
    """A running server, asked and read without llmmw."""

    url: str
    model: str
    api_key: str | None = None

    # ── questions ───────────────────────────────────────────────────────────────────────────────────────────────

    def question(self, text: str, **fields) -> dict:
        """A greedy chat whose answer of 40 letters ends with finish_reason "stop", so that it may be cached."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 64,
            "structured_outputs": {"regex": "[a-z ]{40}"},
        } | fields

    def long_question(self, text: str, **fields) -> dict:
        """A chat of 12 long samples: over ten seconds of work, so that a reader short of CPU is still in time."""
        body = self.question(text, max_tokens=4000, ignore_eos=True, temperature=1, seed=1, n=12)
        del body["structured_outputs"]
        return body | fields

    def streamed(self, body: dict) -> dict:
        """The same question as a stream with usage, as `Client.stream` asks."""
        return body | {"stream": True, "stream_options": {"include_usage": True}}

    def for_sdk(self, body: dict) -> dict:
        """The same question as keyword arguments of the openai SDK."""
        extra = {name: value for name, value in body.items() if name in _OWN_FIELDS}
        return {name: value for name, value in body.items() if name not in _OWN_FIELDS} | {"extra_body": extra}

    # ── answers, past llmmw ─────────────────────────────────────────────────────────────────────────────────────

    def post(self, path: str, body: dict) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.post(
            self.url + path, json=body, headers=headers, timeout=PATIENCE_S, trust_env=False, verify=False
        )

    async def raw(self, body: dict, path: str = "/chat/completions") -> httpx.Response:
        return await asyncio.to_thread(self.post, path, body)

    def plain(self, answer: dict) -> dict:
        """An answer or an event of a stream without what differs from request to request."""
        return {name: value for name, value in answer.items() if name not in {"id", "created"}}

    def events(self, stream: bytes | str) -> list[dict]:
        """The events of a stream, plain; it must end with its terminator."""
        text = stream.decode() if isinstance(stream, bytes) else stream
        *events, last, nothing = text.split("\n\n")
        assert (last, nothing) == ("data: [DONE]", "")
        return [self.plain(json.loads(event.removeprefix("data: "))) for event in events]

    # ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────

    def figures(self) -> Counter:
        """What /metrics says now; `posts` are HTTP requests for completions, whatever became of them."""
        found: Counter = Counter()
        page = httpx.get(self.url.removesuffix("/v1") + "/metrics", timeout=PATIENCE_S, trust_env=False, verify=False)
        for name, labels, value in _SAMPLE.findall(page.text):
            if name in _FIGURES:
                found[_FIGURES[name]] += int(float(value))
            elif name == "http_requests_total" and 'method="POST"' in labels:
                found["posts"] += int(float(value))
        return found

    def wait_until(self, holds, what: str) -> Counter:
        """The first figures for which `holds` is true; another process is awaited, so they are read again and again."""
        ends = time.monotonic() + PATIENCE_S
        while not holds(figures := self.figures()):
            assert time.monotonic() < ends, f"vLLM did not get to: {what}; it says {dict(figures)}"
            time.sleep(0.02)
        return figures

    def wait_idle(self) -> Counter:
        """The figures when nothing runs or waits, and nothing is counted late."""
        last = Counter()

        def holds(now: Counter) -> bool:
            nonlocal last
            last, same = now, last == now
            return same and not now["running"] and not now["waiting"]

        return self.wait_until(holds, "no requests")

    def wait_grown(self, since: Counter, **by: int) -> None:
        """Once the server is idle, its figures have grown by exactly this."""

        def holds(now: Counter) -> bool:
            return not now["running"] and not now["waiting"] and all(now[k] - since[k] == n for k, n in by.items())

        self.wait_until(holds, f"{by} more than {dict(since)}")

    async def idle(self) -> Counter:
        return await asyncio.to_thread(self.wait_idle)

    async def grown(self, since: Counter, **by: int) -> None:
        await asyncio.to_thread(self.wait_grown, since, **by)

    async def freed(self, since: Counter) -> None:
        """The long question that was asked since then is no longer worked on, and was not answered."""
        now = await self.idle()
        assert now["answers"] == since["answers"]

    async def busy(self, requests: int = 1) -> None:
        """Returns when the server has that many requests in hand (/metrics is too slow for that while it generates)."""

        def load() -> int:
            page = httpx.get(self.url.removesuffix("/v1") + "/load", timeout=PATIENCE_S, trust_env=False, verify=False)
            return page.json()["server_load"]

        async with asyncio.timeout(PATIENCE_S):
            while await asyncio.to_thread(load) < requests:
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def full(self, places: int):
        """Long answers hold every place, so that a newcomer is refused; one that ends is followed by another."""
        body = self.long_question("holds a place", n=1)
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

        async def hold(client: httpx.AsyncClient) -> None:
            while True:
                await client.post(self.url + "/chat/completions", json=body, headers=headers)

        async with httpx.AsyncClient(timeout=None, trust_env=False, verify=False) as client:
            holders = [asyncio.create_task(hold(client)) for _ in range(places)]
            try:
                await asyncio.to_thread(self.wait_until, lambda now: now["running"] == places, "all places held")
                yield
            finally:
                for holder in holders:
                    holder.cancel()
                await asyncio.gather(*holders, return_exceptions=True)


@pytest.fixture(scope="session")
def _first_server() -> VLLM:
    url, model = os.environ.get("LLMMW_VLLM_URL"), os.environ.get("LLMMW_VLLM_MODEL")
    if not url or not model:
        pytest.exit("LLMMW_VLLM_URL and LLMMW_VLLM_MODEL name no server: run `make test-vllm`", returncode=1)
    return VLLM(url, model)


@pytest.fixture
def vllm(_first_server) -> VLLM:
    """The server, idle: what an earlier test cancelled is gone."""
    _first_server.wait_idle()
    return _first_server


@pytest.fixture(scope="session")
def _second_server(_first_server):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        serving = importlib.import_module("server")
        with serving.server(serving.Settings(vllm_args=SECOND_SERVER, timeout=PATIENCE_S)) as running:
            yield VLLM(running.url, running.model_name, running.api_key)


@pytest.fixture
def small(_second_server) -> VLLM:
    """A server with 4 slots and a queue of 4, which asks for a key and reads tool calls; its start takes 40 s."""
    _second_server.wait_idle()
    return _second_server


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch):
    for name in ("LLMMW_CACHE", "LLMMW_CACHE_DIR", "LLMMW_DISABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stack() -> Stack:
    """What most programs use."""
    return Stack.recommended(cache_ttl=3600, timeout=PATIENCE_S)
