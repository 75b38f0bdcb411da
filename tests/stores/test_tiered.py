"""Two tiers behave as one store."""

from __future__ import annotations

import asyncio

from llmmw.stores.base import Match
from llmmw.stores.entry import Entry, Header
from llmmw.stores.memory import MemoryStore
from llmmw.stores.tiered import TieredStore
from llmmw.testing.clock import manual_time


class Slow:
    """A backing tier in memory that takes a second to read."""

    max_item_bytes = 1_000

    def __init__(self):
        self.entries = {}
        self.log = []

    async def get(self, key):
        found = self.entries.get(key)
        await asyncio.sleep(1)
        return found

    def put(self, key, entry, keep_s, lease=None):
        self.entries[key] = entry
        self.log.append(("put", key, keep_s))

    def delete(self, key):
        self.entries.pop(key, None)

    def discard(self, match):
        self.entries = {key: entry for key, entry in self.entries.items() if not match.fits(entry)}

    def rehome(self):
        self.log.append("rehome")

    async def aclose(self):
        self.log.append("aclose")

    def gauges(self):
        return {"disk": "ok"}


def entry(clock, data=b"x", ttl=10.0, age=0.0, **fields):
    return Entry(Header(created=clock.wall() - age, ttl_s=ttl, **fields), data)


def tiers(clock, grace=0.0, backing=True):
    return TieredStore(MemoryStore(5_000_000, 100), Slow() if backing else None, clock, grace_s=grace)


@manual_time
async def test_what_is_found_behind_moves_to_the_front_with_its_remaining_time(clock):
    store = tiers(clock)
    store.backing.entries[b"k"] = entry(clock, age=4.0)
    found = await store.fetch(b"k")
    assert found.expires == clock.monotonic() + 5.0
    assert store.peek(b"k", clock.monotonic()) is found
    assert await store.fetch(b"other") is None


@manual_time
async def test_what_is_too_old_or_from_the_future_is_not_found(clock):
    store = tiers(clock)
    for age in (10.0, -6.5):
        store.backing.entries[b"k"] = entry(clock, age=age)
        assert await store.fetch(b"k") is None
    store = tiers(clock, grace=5.0)
    store.backing.entries[b"k"] = entry(clock, age=10.0)
    found = await store.fetch(b"k")
    assert found.expires < clock.monotonic() < found.gone


@manual_time
async def test_what_was_stored_while_the_disk_was_read_wins(clock):
    store = tiers(clock)
    store.backing.entries[b"k"] = entry(clock, b"old")
    reading = asyncio.create_task(store.fetch(b"k"))
    await asyncio.sleep(0.5)
    assert store.put(b"k", entry(clock, b"new"), since=store.generation)
    assert (await reading).entry.data == b"new"


@manual_time
async def test_what_was_stored_while_the_disk_was_read_in_vain_is_found(clock):
    store = tiers(clock)
    reading = asyncio.create_task(store.fetch(b"k"))
    await asyncio.sleep(0.5)
    store.put(b"k", entry(clock, b"new"), since=store.generation)
    assert (await reading).entry.data == b"new"


@manual_time
async def test_what_was_forgotten_while_the_disk_was_read_stays_forgotten(clock):
    for forget in (lambda store: store.forget(b"k"), lambda store: store.discard(Match("tag", "t"))):
        store = tiers(clock)
        store.backing.entries[b"k"] = entry(clock, base=b"k", tags=("t",))
        reading = asyncio.create_task(store.fetch(b"k"))
        await asyncio.sleep(0.5)
        assert forget(store) == 0
        assert await reading is None
        assert store.peek(b"k", clock.monotonic()) is None


@manual_time
async def test_what_was_forgotten_during_a_fill_is_not_stored_and_the_rest_is(clock):
    store = tiers(clock)
    since = store.generation
    store.forget(b"a")
    assert not store.put(b"a", entry(clock, base=b"a"), since=since)
    assert store.put(b"b", entry(clock, base=b"b"), since=since)
    assert store.put(b"a", entry(clock, base=b"a"), since=store.generation)
    assert store.forget(b"a") == 1
    assert b"a" not in store.backing.entries


@manual_time
async def test_each_tier_takes_what_fits_it(clock):
    store = tiers(clock, grace=3.0)
    large, huge = entry(clock, b"x" * 2_000), entry(clock, b"x" * 600_000)
    assert store.put(b"large", large, since=0)
    assert not store.put(b"huge", huge, since=0)
    assert store.backing.log == []
    store.put(b"k", entry(clock), since=0)
    assert store.backing.log == [("put", b"k", 13.0)]
    assert store.max_item_bytes == 500_000


@manual_time
async def test_lifetimes_are_passed_on(clock):
    store = tiers(clock)
    store.rehome()
    await store.aclose()
    assert store.backing.log == ["rehome", "aclose"]
    assert store.gauges() == {"entries": 0, "bytes": 0, "evicted": 0, "too large": 0, "disk": "ok"}


@manual_time
async def test_memory_alone_is_a_store_too(clock):
    store = tiers(clock, backing=False)
    assert store.put(b"k", entry(clock), since=0)
    assert await store.fetch(b"other") is None
    assert store.forget(b"k") == 1
    assert store.discard(Match("tag", "t")) == 0
    store.rehome()
    await store.aclose()
    assert store.max_item_bytes == 500_000
