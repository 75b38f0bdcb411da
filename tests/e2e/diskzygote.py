"""A process that has imported everything and forks workers on one cache directory; a fresh interpreter takes 50 times
as long to start. Talks JSON lines: a job comes in, the workers' process ids go out, then what they report, then their
exit statuses.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

import patience  # noqa: F401 — the machine may be loaded

from llmmw.env import Env
from llmmw.events import CacheTrouble
from llmmw.stores import place as place_module
from llmmw.stores import rows, table  # noqa: F401 — imported once, before the forks
from llmmw.stores.base import Match
from llmmw.stores.disk import DiskStore
from llmmw.stores.entry import Entry, Header
from llmmw.stores.upkeep import prune, usage

table._OPEN_TRIES = place_module._CLAIM_TRIES = 50_000  # else a write that finds another opening is dropped


def key_of(number):
    return hashlib.sha256(b"%d" % number).digest()


def data_of(number, size):
    """What may stand under a key: made from its number, so a wrong answer shows."""
    return hashlib.sha256(b"data %d" % number).digest() * (size // 32)


def is_right(number, data):
    return data == data_of(number, len(data)) and len(data) >= 32


def entry_of(number, size, ttl=300.0):
    return Entry(Header(time.time(), ttl, tags=(f"t{number % 10}",)), data_of(number, size))


def report(what):
    os.write(1, json.dumps(what).encode() + b"\n")


class Worker:
    """One process with its own store."""

    def __init__(self, place, index, max_bytes):
        self.told = []
        self.rng = random.Random(index)
        self.place = place
        self.store = DiskStore(Path(place), Env(sinks=(self._note,)), max_bytes=max_bytes)

    def _note(self, event):
        if isinstance(event, CacheTrouble):
            self.told.append(event.kind)

    async def drained(self, left=0):
        while len(self.store._backlog) > left:
            await asyncio.sleep(0)

    async def write_for_ever(self):
        """Until killed; tells of every eighth write that was handed over."""
        number = 0
        report("ready")
        while True:
            number += 1
            self.store.put(key_of(self.rng.randrange(300)), entry_of(number, 64), 300)
            known = self.rng.randrange(300)
            self.store.put(key_of(known), entry_of(known, self.rng.choice((100, 3_000, 90_000))), 300)
            if number % 7 == 0:
                self.store.delete(key_of(self.rng.randrange(300)))
            await self.drained(16)
            if number % 8 == 0:
                report("wrote")

    async def mix(self, steps):
        """Reads, writes, deletions, invalidations and pruning; returns what was wrong."""
        wrong, hits = [], 0
        for step in range(steps):
            number = self.rng.randrange(200)
            lot = self.rng.random()
            if lot < 0.55:
                found = await self.store.get(key_of(number))
                if found is not None:
                    hits += 1
                    if not is_right(number, found.data):
                        wrong.append(number)
            elif lot < 0.93:
                self.store.put(key_of(number), entry_of(number, self.rng.choice((64, 2_000, 40_000))), 300)
            elif lot < 0.97:
                self.store.delete(key_of(number))
            elif lot < 0.98:
                self.store.discard(Match("tag", f"t{number % 10}"))
            elif lot < 0.99:
                await asyncio.to_thread(prune, self.place)
            else:
                await asyncio.to_thread(usage, self.place)
            if step % 20 == 0:
                await self.drained(64)
        await self.drained()
        return {"wrong": wrong, "hits": hits}


async def work(job, index):
    worker = Worker(job["place"], job.get("seed", 0) + index, job["max_bytes"])
    if job["do"] == "write":
        await worker.write_for_ever()
    report(await worker.mix(job["steps"]))
    await worker.store.aclose()
    report({"told": worker.told})


def main():
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for index in range(job.get("processes", 1)):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    asyncio.run(work(job, index))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        report(children)
        report({"ended": [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]})


if __name__ == "__main__":
    main()
