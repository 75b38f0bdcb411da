"""What these tests share: servers in their own process or streaming as the test says, and books that must balance."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from pathlib import Path

import msgspec
import pytest

import llmmw
from llmmw import Stack
from llmmw.algo.circuit import Circuit
from llmmw.layers.allowance import Allowance
from llmmw.testing.rawserver import RawServer, answer_bytes, chunked
from llmmw.testing.server import ServerConfig, server_process

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
ERROR = b'data: {"error": {"message": "engine died", "type": "InternalServerError", "code": 500}}\n\n'
DONE = b"data: [DONE]\n\n"


def sse(content, name=""):
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + msgspec.json.encode(content) + b"\n\n"


def chat(delta, finish=None, **more):
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


def _messages():
    message = {"id": "a", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None}
    began = sse(
        {"type": "message_start", "message": {**message, "usage": {"input_tokens": 3, "output_tokens": 1}}},
        "message_start",
    ) + sse(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        "content_block_start",
    )

    def delta(text):
        content = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        return sse(content, "content_block_delta")

    return [
        began + delta("one"),
        delta(" two"),
        delta(" three"),
        sse({"type": "content_block_stop", "index": 0}, "content_block_stop"),
        sse(
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}},
            "message_delta",
        ),
        sse({"type": "message_stop"}, "message_stop"),
    ]


_TWO = chat({"content": " two"})
CHAT = [
    chat({"role": "assistant", "content": "one"}),
    _TWO[:25],  # a chunk need not hold a whole event,
    _TWO[25:] + chat({"content": " three"}),  # nor only one
    chat({}, "stop"),
    sse({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": USAGE}),
    DONE,
]
MESSAGES = _messages()
TEXT = "one two three"


class StreamServer(RawServer):
    """Streams in HTTP chunks; the prompt ("ending" or "ending:anything") says how a stream goes.

    finish; reset (after two chunks); no_done; no_finish; stall (after two chunks, until `go`); error_later; at the
    first request also error_first. With `pause`, "finish" waits for `go` after the first chunk.
    """

    CHAT, MESSAGES, TEXT, USAGE = CHAT, MESSAGES, TEXT, USAGE

    def __init__(self, *, pause=False):
        super().__init__(self._answer)
        self.go = asyncio.Event()
        self.pause = pause
        self.prompts = Counter()

    async def _answer(self, request, writer):
        body = msgspec.json.decode(request.body)
        prompt = body["messages"][-1]["content"]
        pieces = MESSAGES if request.target.endswith("/messages") else CHAT
        self.prompts[prompt] += 1
        ending = prompt.partition(":")[0]
        writer.write(answer_bytes(content_type="text/event-stream", transfer_encoding="chunked", body=b""))
        if ending == "error_first":
            writer.write(chunked(ERROR) if self.prompts[prompt] == 1 else chunked(*pieces))
        elif ending == "error_later":
            writer.write(chunked(*pieces[:3], ERROR))
        elif ending == "no_done":
            writer.write(chunked(*pieces[:-1]))
        elif ending == "no_finish":
            writer.write(chunked(*pieces[:3]))
        elif ending in {"reset", "stall"} or self.pause:
            first = 1 if ending == "finish" else 3
            writer.write(chunked(*pieces[:first])[: -len(chunked())])
            await writer.drain()
            if ending == "reset":
                writer.transport.abort()
                return
            await self.go.wait()
            writer.write(chunked(*pieces[first:]))
        else:
            writer.write(chunked(*pieces))


class Books:
    """Counts grants and releases of permits, and admissions and outcomes of circuits, in every engine."""

    def __init__(self, monkeypatch):
        self.counts = Counter()
        for owner, name in ((Allowance, "grant"), (Allowance, "_release"), (Circuit, "admit"), (Circuit, "record")):
            self._count(monkeypatch, owner, name)

    def _count(self, monkeypatch, owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            self.counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    def _is_busy(self, engine):
        # A collected stream tells its end before its upstream is closed, so permits may be a moment late.
        late = self.counts["grant"] > self.counts["_release"]
        return late or engine.get_performance_stats()["in_flight"] or bool(_tasks())

    async def settled(self, engine):
        """Wait until no call is in flight, then check that everything was given back, once."""
        async with asyncio.timeout(120):
            while self._is_busy(engine):
                gc.collect()  # the SDKs' streams are cycles, and what one round finds goes with the next loop turns
                await asyncio.sleep(0)
        stats, counts = engine.get_performance_stats(), self.counts
        ended = ("cache_hits", "coalesced", "answered_upstream", "errors", "cancelled")
        assert stats["request_count"] == sum(stats[name] for name in ended)
        assert counts["grant"] == counts["_release"]
        assert counts["admit"] == counts["record"]
        layers = stats["layers"]
        assert layers["limit"]["in_use"] == layers["limit"]["waiting"] == 0
        assert layers["coalesce"]["flights"] == layers["coalesce"]["waiting"] == 0
        pool = layers.get("pool")
        assert pool is None or pool["in_flight"] == pool["waiting"] == 0
        return stats


def _tasks():
    """Tasks of the library itself (the servers of the tests run on the same loop)."""
    files = [task.get_coro().cr_code.co_filename for task in asyncio.all_tasks() if hasattr(task.get_coro(), "cr_code")]
    home = Path(llmmw.__file__).parent
    return [
        name for name in files if Path(name).is_relative_to(home) and not Path(name).is_relative_to(home / "testing")
    ]


@pytest.fixture
def books(monkeypatch):
    gc.freeze()  # collecting the imported world as well would take most of these tests' time
    yield Books(monkeypatch)
    gc.unfreeze()


@pytest.fixture
def stream_server():
    return StreamServer


@pytest.fixture(scope="module")
def process():
    """The embedded server in a process of its own, for all tests of a module."""
    with server_process(ServerConfig(latency="fixed", latency_s=0.005)) as server:
        yield server


@pytest.fixture
def server(process):
    """The same, without what an earlier test left in it."""
    process.clear_faults()
    process.reset()
    return process


@pytest.fixture
def place(tmp_path):
    """Where a cache directory may be made: nobody else can write there."""
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


@pytest.fixture
def stack(place):
    """The recommended one, with a cache in memory and on disk."""
    return Stack.recommended(cache_ttl=300, cache_directory=str(place))
