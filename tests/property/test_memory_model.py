"""The memory tier against a plain mapping, in any order of steps: nothing lost, nothing back, no byte drifts."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmmw.stores.base import Match
from llmmw.stores.entry import Entry, Header
from llmmw.stores.memory import MemoryStore

KEYS = st.integers(0, 30).map(lambda number: bytes([number]))


class MemoryModel(RuleBasedStateMachine):
    """What was put last is found until its end, unless it was deleted, refused or evicted for want of room."""

    @initialize(max_bytes=st.integers(14_000, 60_000), max_entries=st.integers(1, 20))
    def begin(self, max_bytes, max_entries):
        self.store = MemoryStore(max_bytes, max_entries)
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.now = 100.0
        self.held = {}
        self.puts = self.refused = 0

    @rule(
        key=KEYS, size=st.integers(0, 4_000), cost=st.floats(0, 60), fresh=st.floats(0.01, 50), grace=st.floats(0, 20),
        tag=st.sampled_from(["", "a", "b"]), namespace=st.sampled_from(["", "n"]),
    )  # fmt: skip
    def put(self, key, size, cost, fresh, grace, tag, namespace):
        tags = (tag,) if tag else ()
        header = Header(created=0.0, ttl_s=1.0, base=key, cost_s=cost, tags=tags, namespace=namespace)
        entry = Entry(header, bytes([self.puts % 256]) * size)
        self.puts += 1
        gone = self.now + fresh + grace
        before, evicted = self.residents(), self.store.evicted
        found = self.store.put(key, entry, self.now + fresh, gone, self.now)
        self.held.pop(key, None)
        if entry.size > self.max_bytes // 10:
            assert found is None
            self.refused += 1
            return
        assert found is not None
        assert found.entry is entry
        self.held[key] = (entry, gone)
        others = [one for name, one in before.items() if name != key and one.gone > self.now]
        room = sum(one.entry.size for one in others) + entry.size <= self.max_bytes
        if room and len(others) < self.max_entries and len(before) == len(others):
            assert self.store.evicted == evicted

    @rule(key=KEYS)
    def get(self, key):
        found = self.store.get(key, self.now)
        entry, gone = self.held.get(key, (None, 0.0))
        if found is None:
            assert entry is None or gone <= self.now or key not in self.residents()
        else:
            assert found.entry is entry
            assert gone > self.now

    @rule(key=KEYS)
    def delete(self, key):
        assert (key in self.residents()) == self.store.delete(key)
        self.held.pop(key, None)
        assert self.store.get(key, self.now) is None

    @rule(match=st.sampled_from([Match("tag", "a"), Match("namespace", "n"), Match("base", bytes([3]))]))
    def discard(self, match):
        fitting = [key for key, found in self.residents().items() if match.fits(found.entry)]
        assert self.store.discard(match) == len(fitting)
        for key in fitting:
            del self.held[key]
        assert not any(match.fits(found.entry) for found in self.residents().values())

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds):
        self.now += seconds

    def residents(self):
        return dict(self.store._entries)

    @invariant()
    def nothing_drifts(self):
        if not hasattr(self, "store"):
            return
        store, residents = self.store, self.residents()
        assert store.size == sum(found.entry.size for found in residents.values()) <= self.max_bytes
        assert len(store) == len(residents) == len(store._policy) == len(store._ends) <= self.max_entries
        assert store.refused == self.refused
        for key, found in residents.items():
            assert self.held[key] == (found.entry, found.gone)
            assert found.slot.alive
            assert found.slot.size == found.entry.size


MemoryModel.TestCase.settings = settings(max_examples=120, stateful_step_count=50, derandomize=True, deadline=None)
TestMemoryModel = MemoryModel.TestCase
