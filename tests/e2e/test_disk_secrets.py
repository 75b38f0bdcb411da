"""What must not be found in a cache directory, nor told of it; and whose directory it must be."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import patience
import pytest

from llmmw import Client, Coalescer, Stack, TTLCache
from llmmw.env import Env
from llmmw.events import CacheTrouble
from llmmw.stores.disk import DiskStore
from llmmw.stores.entry import Entry, Header
from llmmw.stores.upkeep import Unusable, usage
from llmmw.testing.rawserver import RawServer, answer_bytes

KEY = "sk-very-secret-0123456789"
PROMPT, ANSWER = "a prompt nobody else may read", "an answer nobody else may read"
CODEC_KEY = "the key of the codec"


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


@dataclasses.dataclass
class Xor:
    """No encryption, but it looks like one from outside."""

    key: str
    name: str = "xor"

    def seal(self, data):
        return bytes(byte ^ 0x5A for byte in data)

    open = seal


async def answer(request, writer):
    assert KEY in request.headers["authorization"]
    message = {"role": "assistant", "content": ANSWER}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    writer.write(answer_bytes(body=msgspec.json.encode(body)))


def everything_in(place):
    """Names and contents of all files, as one piece."""
    files = [path for path in place.rglob("*") if path.is_file()]
    return b"\n".join(str(path.relative_to(place)).encode() + b"\n" + path.read_bytes() for path in files)


@pytest.mark.parametrize("sealed", [False, True])
async def test_disk_01_no_credential_and_sealed_no_prompt_is_on_disk_or_told(place, caplog, sealed):
    caplog.set_level(logging.DEBUG)
    told = []
    stack = Stack(TTLCache(300, directory=place, codec=Xor(CODEC_KEY) if sealed else None), Coalescer())
    sources = []
    async with RawServer(answer) as server:
        for _ in range(2):
            async with Client(f"{server.origin}/v1", api_key=KEY, model="m", stack=stack) as client:
                reply = await client.chat([{"role": "user", "content": PROMPT}])
                assert reply.text == ANSWER
                sources.append(reply.source)
                told += [repr(client), repr(reply), repr(client.engine), json.dumps(client.get_performance_stats())]
                while client.get_performance_stats()["layers"]["cache"]["waiting writes"]:
                    await asyncio.sleep(0.001)
                told.append(everything_in(place).decode("latin-1"))  # with the log
    assert sources == ["upstream", "cache"]
    on_disk = everything_in(place)
    told += [on_disk.decode("latin-1"), repr(stack), stack.explain(), caplog.text, repr(usage(place))]
    for text in told:
        assert KEY not in text
        assert CODEC_KEY not in text
        assert PROMPT not in text  # the key is a digest
    assert (ANSWER.encode() in on_disk) is not sealed


OTHER_USER = """
import asyncio, os, sys, time
from pathlib import Path
from llmmw.env import Env
from llmmw.events import CacheTrouble
from llmmw.stores import disk
from llmmw.stores.entry import Entry, Header
import llmmw.stores.rows  # while it can be read
told = []
os.setgid(65534); os.setuid(65534)

async def main(place):
    env = Env(sinks=(lambda event: told.append(event.kind) if isinstance(event, CacheTrouble) else None,))
    store = disk.DiskStore(Path(place), env, max_bytes=2**26)
    store.put(b"k" * 32, Entry(Header(time.time(), 300.0), b"poison"), 300)
    await store.aclose()
    print(",".join(told))

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("whose", ["theirs", "ours", "theirs in ours"])
def test_security_07_rows_of_another_user_are_not_read_nor_ours_written_by_them(whose):
    with tempfile.TemporaryDirectory() as base:  # below a directory that everybody may write, with the sticky bit
        os.chmod(base, 0o1777)  # noqa: PTH101
        place = Path(base) / "cache"

        def as_other():
            return subprocess.run(
                [sys.executable, "-c", patience.FOR_A_CHILD + OTHER_USER, str(place)],
                check=False,
                capture_output=True,
                text=True,
            )

        if whose == "ours":
            asked_by_us(place)
            before = everything_in(place)
            done = as_other()
            if done.returncode:
                pytest.skip("another user cannot run this Python here")
            assert done.stdout.startswith("refused")
            assert everything_in(place) == before
            return
        if as_other().returncode:
            pytest.skip("another user cannot run this Python here")
        assert usage_is_refused(place)
        if whose == "theirs in ours":
            os.chown(place, 0, 0)  # the directory is ours now, the database in it is not
            assert usage_is_refused(place)
        before = everything_in(place)
        assert asked_by_us(place) == ["refused"]
        assert everything_in(place) == before


def usage_is_refused(place):
    with pytest.raises(Unusable, match="another user"):
        usage(place)
    return True


def asked_by_us(place):
    told = []

    async def ask():
        store = DiskStore(
            place,
            Env(sinks=(lambda event: told.append(event.kind) if isinstance(event, CacheTrouble) else None,)),
            max_bytes=2**26,
        )
        assert await store.get(b"k" * 32) is None
        store.put(b"k" * 32, Entry(Header(1.0, 300.0), b"ours"), 300)
        await store.aclose()

    asyncio.run(ask())
    return told
