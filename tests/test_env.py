"""An env and its kin: one list of sinks, each its own capabilities, told when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmmw.env import Env
from llmmw.events import CacheMiss

if TYPE_CHECKING:
    from llmmw.events import Event

EVENT = CacheMiss()


def test_capabilities_are_asked_for_whenever_they_matter() -> None:
    now: set[str] = set()
    env = Env()
    live, fixed = env.endowed(lambda: now), env.endowed({"n"})
    assert (env.capabilities, live.capabilities, fixed.capabilities) == (frozenset(), frozenset(), {"n"})
    now.add("batch:chat")
    assert live.capabilities == {"batch:chat"}
    assert live.endowed({"x"}).capabilities == {"x"}
    assert (live.clock, live.rng) == (env.clock, env.rng)


def test_a_sink_hears_all_kin_whoever_it_was_added_to() -> None:
    env = Env()
    before = env.endowed({"a"})
    heard: list[list[Event]] = [[], []]
    env.add_sink(heard[0].append, own=True)
    after = before.endowed({"b"})
    for one in (env, before, after):
        assert not one.observed
        one.emit(EVENT)
    after.add_sink(heard[1].append)
    for one in (env, before, after):
        assert one.observed
        one.emit(EVENT)
    assert [len(each) for each in heard] == [6, 3]


def test_a_broken_sink_is_dropped_for_all_kin() -> None:
    heard: list[Event] = []
    broken: list[Event] = []

    def fails(event: Event) -> None:
        broken.append(event)
        raise ValueError

    env = Env(sinks=(fails, heard.append))
    kin = env.endowed({"a"})
    kin.emit(EVENT)
    env.emit(EVENT)
    assert (len(broken), len(heard)) == (1, 2)
    assert repr(kin) == repr(env)
