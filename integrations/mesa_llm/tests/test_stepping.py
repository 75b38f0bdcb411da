"""Stepping: each agent exactly once, no failure lost, nobody held up, no half memory left."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings

import litellm
import pytest
from llmmw_mesa import (
    StepError,
    astep_agents,
    disable_automatic_parallel_stepping,
    enable_automatic_parallel_stepping,
    install,
    last_report,
    step_agents,
)
from llmmw_mesa.parallel import agent_set_classes
from mesa import Agent, Model
from worlds import Questioner, StandingClock, Thinker, World

from llmmw import ConfigError
from llmmw.testing.server import FaultRule, Match


class Counting(Agent):
    def __init__(self, model):
        super().__init__(model)
        self.steps = 0

    def step(self):
        self.steps += 1


class Waiting(Counting):
    """Waits until all of its kind are stepping."""

    async def astep(self):
        self.steps += 1
        await self.model.meet()


class Meeting(Model):
    def __init__(self, agents, kind):
        super().__init__()
        self.parallel_stepping = True
        self.here = 0
        self.all_here = asyncio.Event()
        self.barrier = threading.Barrier(agents)
        for _ in range(agents):
            kind(self)

    async def meet(self):
        self.here += 1
        if self.here == len(self.agents):
            self.all_here.set()
        await self.all_here.wait()

    def step(self):
        self.agents.shuffle_do("step")


class MeetingInThreads(Counting):
    def step(self):
        super().step()
        self.model.barrier.wait(30)


@pytest.mark.parametrize(
    ("kind", "mode"), [(Waiting, "overlap"), (MeetingInThreads, "overlap"), (MeetingInThreads, "snapshot")]
)
def test_mesa_m01_steps_really_overlap_without_any_patch(kind, mode):
    model = Meeting(8, kind)
    report = step_agents(model.agents, mode=mode)
    assert report.most_at_once == 8
    assert [agent.steps for agent in model.agents] == [1] * 8


def test_mesa_01_a_cap_steps_everybody_every_time():
    model = Model()
    agents = [Counting(model) for _ in range(20)]
    for _ in range(3):
        report = step_agents(model.agents, max_concurrency=10)
        assert report.most_at_once <= 10
        assert len(report.succeeded) == 20
    assert [agent.steps for agent in agents] == [3] * 20


class Failing(Questioner):
    async def astep(self):
        answer = await self.llm.agenerate(self.question())
        self.done.append(answer.choices[0].message.content)
        if self.unique_id == 4:
            raise ValueError("four does not like it")


def test_mesa_02_one_fails_and_the_others_have_stepped(server):
    model = World(10, server.base_url, kind=Failing)
    with install(), pytest.raises(StepError) as caught:
        step_agents(model.agents)
    report = caught.value.report
    assert (len(report.succeeded), len(report.failed)) == (9, 1)
    assert [type(error) for error in caught.value.exceptions] == [ValueError]
    assert "agent 4" in caught.value.exceptions[0].__notes__[0]
    for agent in model.agents:
        assert getattr(agent.memory, "_current_step_entry", None) is None
        assert all(entry.step is not None for entry in agent.memory.short_term_memory)
        assert len(agent.done) == 1


def test_mesa_m07_skip_warns_and_reports_and_results_are_triples(server):
    model = World(5, server.base_url, kind=Failing)
    with install(), pytest.warns(RuntimeWarning, match="did not step: 4"):
        report = step_agents(model.agents, on_error="skip")
    assert sorted(success for _, success, _ in report) == [False] + [True] * 4
    assert {agent.unique_id for agent, success, _ in report if not success} == {4}


def test_mesa_m07_retry_steps_again_only_who_did_nothing_yet(server):
    class Late(Thinker):
        tries = 0

        async def astep(self):
            Late.tries += self.unique_id == 2
            if self.unique_id == 2 and Late.tries == 1:
                raise ValueError("the first time")
            if self.unique_id == 3:
                self.send_message("hello", [])
                raise ValueError("after it spoke")

    model = World(4, server.base_url, kind=Late)
    with install(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = step_agents(model.agents, on_error="retry")
    by_id = {result.agent.unique_id: result for result in report}
    assert (by_id[2].success, by_id[2].attempts) == (True, 2)
    assert (by_id[3].success, by_id[3].attempts) == (False, 1)
    assert (by_id[1].success, by_id[1].attempts) == (True, 1)


async def test_mesa_03_a_cancelled_step_leaves_nothing(server):
    class Endless(Thinker):
        async def astep(self):
            self.model.stepping += 1
            await asyncio.Event().wait()

    model = World(10, server.base_url, kind=Endless)
    model.stepping = 0
    with install():
        task = asyncio.create_task(astep_agents(model.agents))
        while model.stepping < 10:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for agent in model.agents:
        assert getattr(agent.memory, "_current_step_entry", None) is None
        assert list(agent.memory.short_term_memory) == []


async def test_mesa_16_one_that_hangs_holds_nobody_back(server, monkeypatch):
    class Hanging(Thinker):
        async def astep(self):
            if self.unique_id == 3:
                while sum(len(agent.done) for agent in self.model.agents) < 4:
                    await asyncio.sleep(0)
                clock.advance()
                await asyncio.Event().wait()
            await super().astep()

    clock = StandingClock(monkeypatch)
    model = World(5, server.base_url, kind=Hanging)
    with install(), pytest.warns(RuntimeWarning):
        report = await astep_agents(model.agents, timeout=0.1, on_error="skip")
    assert [result.agent.unique_id for result in report.timed_out] == [3]
    assert len(report.succeeded) == 4


def test_a_thread_that_hangs_is_left_behind_and_asks_nothing_more(server, monkeypatch):
    release = threading.Event()
    told = []

    class Stuck(Questioner):
        def step(self):
            if self.unique_id == 2:
                clock.advance()
                release.wait(60)
                try:
                    self.llm.generate("too late")
                except RuntimeError as error:
                    told.append(str(error))
                release.clear()

    clock = StandingClock(monkeypatch)
    model = World(2, server.base_url, kind=Stuck)
    with install(), pytest.warns(RuntimeWarning):
        report = step_agents(model.agents, timeout=0.1, on_error="skip", order="given", max_concurrency=1)
        assert [result.agent.unique_id for result in report.timed_out] == [2]
        release.set()
        ends = time.monotonic() + 30
        while release.is_set() and time.monotonic() < ends:
            time.sleep(0.01)
    assert "given up" in told[0]
    assert server.stats(0)["received"] == 0


async def test_mesa_08_in_a_running_loop_the_agents_own_error_comes_out(server):
    class Broken(Thinker):
        async def astep(self):
            raise RuntimeError("mine")

    model = World(3, server.base_url, kind=Broken)
    with install(), pytest.raises(StepError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        step_agents(model.agents)
    assert [str(error) for error in caught.value.exceptions] == ["mine"] * 3


def test_mesa_10_mixed_removed_added_and_empty():
    class Stepless(Agent):
        pass

    class Remover(Counting):
        async def astep(self):
            self.steps += 1
            for agent in list(self.model.agents):
                if isinstance(agent, Counting) and agent is not self and not agent.steps:
                    agent.remove()
            Counting(self.model)

    model = Model()
    assert len(step_agents(model.agents)) == 0
    Stepless(model)
    Counting(model)
    Remover(model)
    report = step_agents(model.agents, order="given")
    assert len(report) == 3
    assert report.ok


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_snapshot_acts_in_order_after_everybody_has_thought(server, count):
    log = []

    class Free(Thinker):
        async def astep(self):
            await self.llm.agenerate(self.question())
            log.append(("thought", self.unique_id))
            self.send_message("hello", [self])
            log.append(("acted", self.unique_id))

    model = World(count, server.base_url, kind=Free)
    with install():
        step_agents(model.agents, mode="snapshot", order="given", max_concurrency=2)
    assert [what for what, _ in log] == ["thought"] * count + ["acted"] * count
    assert [who for what, who in log if what == "acted"] == sorted(agent.unique_id for agent in model.agents)


def test_parallel_shuffle_do_on_every_kind_of_set_and_back():
    before = {owner: owner.__dict__["shuffle_do"] for owner in agent_set_classes()}
    assert len(before) >= 1
    model = Meeting(6, Waiting)
    enable_automatic_parallel_stepping(max_concurrent=None)
    enable_automatic_parallel_stepping(max_concurrent=None)
    assert model.agents.shuffle_do("step") is model.agents or model.agents.shuffle_do("do") is not None
    assert last_report().most_at_once == 6
    disable_automatic_parallel_stepping()
    disable_automatic_parallel_stepping()
    assert {owner: owner.__dict__["shuffle_do"] for owner in agent_set_classes()} == before


def test_it_is_said_when_nothing_overlaps():
    class Blocking(Counting):
        async def astep(self):
            self.steps += 1

    model = Meeting(3, Blocking)
    enable_automatic_parallel_stepping()
    with pytest.warns(RuntimeWarning, match="no two steps"):
        model.step()


def test_mesa_04_nobody_asks_before_the_retry_after_is_over(server):
    server.add_fault(FaultRule(kind="status", status=429, retry_after="1", match=Match(first=3)))
    model = World(8, server.base_url)
    with install():
        step_agents(model.agents)
    assert all(len(agent.done) == 1 for agent in model.agents)
    assert server.stats(0)["received"] == 8 + 3


@pytest.mark.parametrize(
    "wrong", [{"mode": "x"}, {"order": "x"}, {"on_error": "x"}, {"timeout": 0}, {"max_concurrency": 0}]
)
def test_what_cannot_work_is_said_at_once(wrong):
    with pytest.raises(ConfigError):
        step_agents([], **wrong)


def test_steps_of_a_run_share_one_loop(server):
    class Keeper(Thinker):
        async def astep(self):
            self.model.loops.add(id(asyncio.get_running_loop()))

    model = World(3, server.base_url, kind=Keeper)
    model.loops = set()
    with install():
        for _ in range(5):
            step_agents(model.agents)
    assert len(model.loops) == 1


def test_litellm_exceptions_come_out_of_steps(server):
    server.add_fault(FaultRule(kind="status", status=401))
    model = World(2, server.base_url)
    with install(), pytest.raises(StepError) as caught:
        step_agents(model.agents)
    assert {type(error) for error in caught.value.exceptions} == {litellm.AuthenticationError}
