"""The demo's embedded world makes the trouble it promises, and llmmw comes through it."""

from __future__ import annotations

from llmmw.demo.ways import Setting, bare, through_llmmw
from llmmw.demo.workload import Trouble, Workload
from llmmw.demo.worlds import EMBEDDED_MODEL, EmbeddedWorld


async def test_llmmw_answers_everything_through_rate_limit_and_broken_upstream():
    trouble = Trouble(limited_tick=0, limit_requests=3, limit_window_s=1.0, broken_tick=1)
    workload = Workload(agents=5, ticks=3)
    told = []
    with EmbeddedWorld(trouble) as world:
        ours = await through_llmmw(world, Setting(workload, EMBEDDED_MODEL), lambda *counts: told.append(counts))
    assert (ours.answers, ours.failures) == (workload.total, 0)
    assert told[-1] == (workload.total, 0)
    assert ours.stats["fallbacks"] >= 1
    assert ours.stats["layers"]["limit"]["paused"] >= 1
    assert ours.hit_rate > 0
    assert len(ours.stats["by_agent"]) == 5


async def test_the_bare_sdk_counts_what_it_cannot_answer():
    trouble = Trouble(limited_tick=9, broken_tick=0)
    with EmbeddedWorld(trouble) as world:
        setting = Setting(Workload(agents=2, ticks=1), EMBEDDED_MODEL)
        found = await bare(world, setting, lambda *_: None, concurrently=True)
    # Harbour's own question and its memory fail, each after the SDK's two retries.
    assert (found.answers, found.failures, found.upstream_calls) == (4, 2, 10)


def test_the_workload_is_the_same_every_time():
    workload = Workload(agents=4, ticks=2)
    assert list(workload.tick(1)) == list(workload.tick(1))
    kinds = [question.kind for question in workload.tick(0)]
    assert kinds.count("shared") == kinds.count("own") == kinds.count("memory") == 4
    shared = {question.messages[1]["content"] for question in workload.tick(0) if question.kind == "shared"}
    assert len(shared) == 1
