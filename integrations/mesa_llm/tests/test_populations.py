"""Who steps: agents that come and go, groups, odd kinds of step, several models; and the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from llmmw_mesa import StepError, astep_agents, install, step_agents
from mesa import Agent, Model
from mesa.experimental.meta_agents.meta_agent import MetaAgent
from mesa_llm.memory.episodic_memory import EpisodicMemory
from worlds import MODEL, Questioner, World

PATIENCE_S = 90


class Counting(Agent):
    steps = 0

    def step(self):
        self.steps += 1


class CountingAsync(Agent):
    steps = 0

    async def astep(self):
        self.steps += 1


class Stepless(Agent):
    steps = 0


def removing(kind):
    """Of that kind, and removes those in `victims` in its step."""

    def remove(self):
        for agent in self.victims:
            agent.remove()

    if kind is CountingAsync:

        class Removing(CountingAsync):
            async def astep(self):
                await super().astep()
                remove(self)

    else:

        class Removing(Counting):
            def step(self):
                super().step()
                remove(self)

    return Removing


@pytest.mark.parametrize("kind", [Counting, CountingAsync])
def test_mesa_10_who_is_removed_before_its_turn_does_not_step_and_is_named(kind):
    model = Model()
    first = removing(kind)(model)
    stays, goes, last = kind(model), kind(model), Stepless(model)
    first.victims = [goes]
    for steps in (1, 2):
        report = step_agents(model.agents, order="given", max_concurrency=1)
        assert [result.agent for result in report] == [first, stays, last]
        assert report.removed == ([goes] if steps == 1 else [])
        assert report.ok
        assert (first.steps, stays.steps, goes.steps) == (steps, steps, 0)
        first.victims = []


@pytest.mark.parametrize("on_error", ["raise", "retry"])
def test_mesa_10_in_a_snapshot_who_is_removed_before_its_turn_thinks_and_does_not_act(on_error):
    class Acting(Agent):
        thoughts = acts = 0

        def apply_plan(self, victims):
            self.acts += 1
            for agent in victims:
                agent.remove()

        def step(self):
            self.thoughts += 1
            self.apply_plan(self.model.victims.get(self.unique_id, ()))

    model = Model()
    one, two, three = Acting(model), Acting(model), Acting(model)
    model.victims = {one.unique_id: [two], three.unique_id: [three]}
    report = step_agents(model.agents, mode="snapshot", order="given", on_error=on_error)
    assert [result.agent for result in report] == [one, three]
    assert report.removed == [two]
    assert report.ok
    assert [agent.thoughts for agent in (one, two, three)] == [1, 1, 1]
    assert [agent.acts for agent in (one, two, three)] == [1, 0, 1]


@pytest.mark.parametrize("mode", ["overlap", "snapshot"])
def test_mesa_10_who_is_added_meanwhile_steps_the_next_time(mode):
    class Parent(Counting):
        def step(self):
            super().step()
            Counting(self.model)

    model = Model()
    parent = Parent(model)
    assert len(step_agents(model.agents, mode=mode)) == 1
    (child,) = [agent for agent in model.agents if agent is not parent]
    assert child.steps == 0
    assert len(step_agents(model.agents, mode=mode)) == 2
    assert child.steps == 1


@pytest.mark.parametrize("mode", ["overlap", "snapshot"])
def test_mesa_10_members_of_a_group_step_once(mode):
    class Leading(MetaAgent):
        def step(self):
            for member in self._constituting_set:
                member.step()

    class Idle(MetaAgent):
        """Mesa's own step, which does nothing: its members step by themselves."""

    for kind in (Leading, Idle):
        model = Model()
        members, outsider = [Counting(model) for _ in range(3)], CountingAsync(model)
        group = kind(model, set(members))
        report = step_agents(model.agents, mode=mode)
        assert report.ok
        assert [agent.steps for agent in (*members, outsider)] == [1] * 4
        assert {result.agent for result in report} == {group, outsider} | (set() if kind is Leading else set(members))


@pytest.mark.parametrize("mode", ["overlap", "snapshot"])
def test_a_step_that_is_a_generator_is_a_failure_and_what_can_be_awaited_is_awaited(mode):
    class Generator(Agent):
        def step(self):
            self.model.ran.append("generator")
            yield

    class AsyncGenerator(Agent):
        async def astep(self):
            self.model.ran.append("async generator")
            yield

    class Coroutine(Agent):
        async def step(self):
            await asyncio.sleep(0)
            self.model.ran.append("coroutine")

    class Answering(Agent):
        """Plain, and gives something to await."""

        def step(self):
            async def rest():
                await asyncio.sleep(0)
                self.model.ran.append("awaitable")

            return rest()

    model = Model()
    model.ran = []
    for kind in (Generator, AsyncGenerator, Coroutine, Answering):
        kind(model)
    with pytest.raises(StepError) as caught:
        step_agents(model.agents, mode=mode)
    assert sorted(model.ran) == ["awaitable", "coroutine"]
    assert [type(error) for error in caught.value.exceptions] == [TypeError, TypeError]
    assert all("generator" in str(error) for error in caught.value.exceptions)


def test_two_models_step_in_two_threads():
    barrier = threading.Barrier(6)

    class Meeting(Counting):
        """Its step ends when all agents of both models are stepping."""

        def step(self):
            barrier.wait(PATIENCE_S)
            super().step()
            self.drawn = [self.random.random(), float(self.model.rng.random())]

    def stepped(model):
        for _ in range(3):
            assert step_agents(model.agents).most_at_once == 3
        return [agent.drawn for agent in sorted(model.agents, key=lambda agent: agent.unique_id)]

    models = [Model(), Model()]
    for model in models:
        model.random.seed(7)
        model.rng = np.random.default_rng(7)
        for _ in range(3):
            Meeting(model)
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(stepped, models))
    assert [agent.steps for model in models for agent in model.agents] == [3] * 6
    assert drawn[0] == drawn[1]  # and neither drew from the other's


class Turning:
    """A task that counts its turns, in the loop that steps agents."""

    def __init__(self):
        self.turns = 0
        self.turned = threading.Condition()

    async def __aenter__(self):
        self.task = asyncio.create_task(self.turn())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()

    async def turn(self):
        while True:
            await asyncio.sleep(0.001)
            with self.turned:
                self.turns += 1
                self.turned.notify_all()

    def wait(self):
        """Until the loop has gone round thrice; for threads. On the loop itself that would never be."""
        with self.turned:
            ends = self.turns + 3
            assert self.turned.wait_for(lambda: self.turns >= ends, PATIENCE_S), "the loop stood still"


@pytest.mark.parametrize("mode", ["overlap", "snapshot"])
async def test_another_task_goes_on_while_agents_step(mode):
    class Patient(Counting):
        def step(self):
            super().step()
            self.model.turning.wait()

    class PatientAsync(CountingAsync):
        async def astep(self):
            await super().astep()
            await asyncio.to_thread(self.model.turning.wait)

    model = Model()
    for kind in (Patient, PatientAsync) * 3:
        kind(model)
    async with Turning() as model.turning:
        report = await astep_agents(model.agents, mode=mode)
    assert report.ok
    assert [agent.steps for agent in model.agents] == [1] * 6


@pytest.mark.parametrize("how", ["astep", "step"])
async def test_mesa_17_ten_agents_tell_ten_and_no_grade_blocks_the_loop(server, how):
    class Grading(EpisodicMemory):
        def grade_event_importance(self, *args, **kwargs):
            self.agent.model.turning.wait()
            with self.agent.model.lock:
                self.agent.model.grades += 1
            return super().grade_event_importance(*args, **kwargs)

    class Speaking(Questioner):
        def __init__(self, model, api_base, **options):
            super().__init__(model, api_base, **options)
            self.memory = Grading(agent=self, llm_model=MODEL, display=False)
            self.memory.llm.api_base = api_base

        def speak(self):
            self.done.append(self.send_message("hello", list(self.model.agents)))

    async def astep(self):
        self.speak()

    Speaker = type("Speaker", (Speaking,), {"astep": astep} if how == "astep" else {"step": Speaking.speak})
    model = World(10, server.base_url, kind=Speaker)
    model.grades, model.lock = 0, threading.Lock()
    with install():
        async with Turning() as model.turning:
            report = await astep_agents(model.agents)
    assert report.ok
    assert all(len(agent.done) == 1 for agent in model.agents)
    assert model.grades >= 10 * 9  # at least one for each message that reached somebody
    assert server.stats(0)["received"] == report.calls >= 10 * 9


@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize("mode", ["overlap", "snapshot"])
def test_mesa_m04_context_variables_cross_into_steps_and_stay_in_each(mode, most):
    class Looking(Agent):
        def step(self):
            self.seen = said.get()
            said.set(f"by {self.unique_id}")
            self.own = said.get()

    class LookingAsync(Looking):
        async def astep(self):
            Looking.step(self)
            await asyncio.sleep(0)
            self.own = said.get()

    said = contextvars.ContextVar("said", default="nothing")
    model = Model()
    for kind in (Looking, LookingAsync) * 3:
        kind(model)
    said.set("by the caller")
    assert step_agents(model.agents, mode=mode, max_concurrency=most).ok
    for agent in model.agents:
        assert (agent.seen, agent.own) == ("by the caller", f"by {agent.unique_id}")
    assert said.get() == "by the caller"


def of_steps():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mesa-step")]


@pytest.mark.parametrize("beside", [False, True])
def test_no_thread_is_left_after_a_step(beside):
    class Mixed(Counting):
        def step(self):
            super().step()
            self.model.barrier.wait(PATIENCE_S)

    model = Model()
    model.barrier = threading.Barrier(4)
    for _ in range(4):
        Mixed(model)
    CountingAsync(model)
    before = set(of_steps())

    async def main():
        step_agents(model.agents)

    for _ in range(3):
        if beside:
            asyncio.run(main())
        else:
            step_agents(model.agents)
    for thread in set(of_steps()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
