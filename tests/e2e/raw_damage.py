"""A server process whose answers are wrong on the wire: `python raw_damage.py SEED`, until standard input ends.

What a request gets is drawn from the seed. It prints its origin; GET /count tells how many model calls arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import sys

from llmmw.testing.rawserver import RawServer, answer_bytes, chunked

WRONG = "the answer to somebody else's question"
JSON = "application/json"
SSE = "text/event-stream"


def body_of(text):
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps({"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}).encode()


def events_of(text):
    def event(delta, finish=None):
        chunk = {"id": "c", "object": "chat.completion.chunk", "model": "m", "created": 1}
        return (
            b"data: "
            + json.dumps({**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode()
        )

    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
    return [
        *(event({"content": piece}) + b"\n\n" for piece in pieces),
        event({}, "stop") + b"\n\n",
        b"data: [DONE]\n\n",
    ]


class Damage:
    """The ways of going wrong: each writes an answer to `text`, plain or streamed."""

    def __init__(self, rng):
        self.rng = rng
        self.ways = [way for name, way in vars(type(self)).items() if not name.startswith("_")]

    async def __call__(self, text, stream, writer):
        if self.rng.random() < 0.6:
            await Damage.good(self, text, stream, writer)
        else:
            await self.rng.choice(self.ways)(self, text, stream, writer)

    def _whole(self, text, stream):
        if stream:
            return answer_bytes(content_type=SSE, transfer_encoding="chunked", body=b"") + chunked(*events_of(text))
        return answer_bytes(body=body_of(text))

    async def good(self, text, stream, writer):
        writer.write(self._whole(text, stream))

    async def crlf_and_comments(self, text, stream, writer):
        pings = [b": ping\r\n\r\n" + event.replace(b"\n", b"\r\n") for event in events_of(text)]
        head = answer_bytes(content_type=SSE, transfer_encoding="chunked", body=b"")
        writer.write(head + chunked(*pings) if stream else self._whole(text, stream))

    async def byte_by_byte(self, text, stream, writer):
        whole = self._whole(text, stream)
        for at in range(0, len(whole), 7):
            writer.write(whole[at : at + 7])
            await writer.drain()

    async def early_hints(self, text, stream, writer):
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + self._whole(text, stream))

    async def half_closed(self, text, stream, writer):
        writer.write(self._whole(text, stream))
        writer.write_eof()

    async def half_closed_in_the_middle(self, text, stream, writer):
        whole = self._whole(text, stream)
        writer.write(whole[: len(whole) // 2])
        writer.write_eof()

    async def two_answers(self, text, stream, writer):
        writer.write(self._whole(text, stream) + self._whole(WRONG, stream))

    async def too_long_a_body(self, text, stream, writer):
        body = body_of(text)
        writer.write(answer_bytes(body=body, content_length=str(len(body) - 5)))

    async def too_short_a_body(self, text, stream, writer):
        body = body_of(text)
        writer.write(answer_bytes(body=body, content_length=str(len(body) + 5)))
        writer.close()

    async def reset_in_the_head(self, text, stream, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-ty")
        await writer.drain()
        writer.transport.abort()

    async def reset_in_the_body(self, text, stream, writer):
        whole = self._whole(text, stream)
        writer.write(whole[: len(whole) * 2 // 3])
        await writer.drain()
        writer.transport.abort()

    async def no_http(self, text, stream, writer):
        writer.write(b"\x16\x03\x01\x00\xff nonsense\r\n\r\n")
        writer.close()

    async def no_status(self, text, stream, writer):
        writer.write(b"HTTP/1.1 twohundred\r\n\r\n")
        writer.close()

    async def bad_chunks(self, text, stream, writer):
        writer.write(answer_bytes(transfer_encoding="chunked", body=b"zz\r\n" + body_of(text)))
        writer.close()

    async def unfinished_chunks(self, text, stream, writer):
        head = answer_bytes(content_type=SSE if stream else JSON, transfer_encoding="chunked", body=b"")
        writer.write(head + chunked(*(events_of(text)[:-2] if stream else [body_of(text)]))[:-5])
        writer.close()

    async def old_http(self, text, stream, writer):
        kind, body = (SSE, b"".join(events_of(text))) if stream else (JSON, body_of(text))
        writer.write(f"HTTP/1.0 200 OK\r\ncontent-type: {kind}\r\n\r\n".encode() + body)
        writer.close()

    async def old_http_cut(self, text, stream, writer):
        kind, body = (SSE, b"".join(events_of(text))) if stream else (JSON, body_of(text))
        writer.write(f"HTTP/1.0 200 OK\r\ncontent-type: {kind}\r\n\r\n".encode() + body[: len(body) // 2])
        writer.close()

    async def compressed(self, text, stream, writer):
        kind, body = (SSE, b"".join(events_of(text))) if stream else (JSON, body_of(text))
        writer.write(answer_bytes(body=gzip.compress(body), content_type=kind, content_encoding="gzip"))

    async def compressed_and_cut(self, text, stream, writer):
        kind, body = (SSE, b"".join(events_of(text))) if stream else (JSON, body_of(text))
        packed = gzip.compress(body)
        writer.write(answer_bytes(body=packed[: len(packed) - 12], content_type=kind, content_encoding="gzip"))

    async def no_known_coding(self, text, stream, writer):
        writer.write(answer_bytes(body=body_of(text), content_encoding="rot13"))

    async def closing(self, text, stream, writer):
        writer.write(self._whole(text, stream).replace(b"content-type", b"connection: close\r\ncontent-type", 1))
        writer.close()

    async def no_stream(self, text, stream, writer):
        writer.write(self._whole(text, not stream))

    async def nothing(self, text, stream, writer):
        writer.write(answer_bytes(204, b""))

    async def redirect(self, text, stream, writer):
        writer.write(answer_bytes(307, b"", location="http://127.0.0.1:9/v1/chat/completions"))

    async def silent_for_a_while(self, text, stream, writer):
        await asyncio.sleep(0.05)
        writer.close()


async def main(seed):
    damage, asked = Damage(random.Random(seed)), 0

    async def answer(request, writer):
        nonlocal asked
        if request.target == "/count":
            writer.write(answer_bytes(body=str(asked).encode()))
            return
        asked += 1
        content = json.loads(request.body)
        with contextlib.suppress(ConnectionError, RuntimeError):  # the client reset it, or asks on what we half closed
            await damage(content["messages"][-1]["content"], bool(content.get("stream")), writer)

    async with RawServer(answer) as server:
        print(server.origin, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
