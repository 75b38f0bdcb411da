"""Steps that fail, hang or are cancelled: nobody waits for them, and nothing half stays behind."""

from __future__ import annotations

import asyncio
import threading

import pytest
from llmmw_mesa import StepError, astep_agents, install, step_agents
from llmmw_mesa.halves import undo_half_steps
from mesa import Agent, Model
from mesa_llm.llm_agent import LLMAgent
from mesa_llm.memory.lt_memory import LongTermMemory
from mesa_llm.memory.memory import Memory
from mesa_llm.memory.st_lt_memory import STLTMemory
from mesa_llm.memory.st_memory import ShortTermMemory
from worlds import MODEL, Questioner, StandingClock, World

PATIENCE_S = 90


class Composite(Memory):
    """Somebody's own: two others, and a list."""

    def __init__(self, agent):
        super().__init__(agent, display=False)
        self.near = ShortTermMemory(agent=agent, n=3, display=False)
        self.notes = []

    def process_step(self, pre_step=False):
        self.near.step_content = self.step_content
        self.near.process_step(pre_step)
        self.step_content = self.near.step_content

    async def aprocess_step(self, pre_step=False):
        self.process_step(pre_step)

    def get_prompt_ready(self):
        return ""

    get_communication_history = get_prompt_ready


MEMORIES = {
    "short": lambda agent: ShortTermMemory(agent=agent, n=5, display=False),
    "both": lambda agent: STLTMemory(agent=agent, llm_model=MODEL, display=False),
    "long": lambda agent: LongTermMemory(agent=agent, llm_model=MODEL, display=False),
    "composite": Composite,
}


def halves(memory):
    """Entries without a step, wherever they are."""
    found = []
    for value in vars(memory).values():
        if isinstance(value, Memory):
            found += halves(value)
        else:
            entries = value if hasattr(value, "append") else [value]
            found += [entry for entry in entries if getattr(entry, "step", 0) is None and hasattr(entry, "content")]
    return found


def content(memory):
    return [value for value in (memory.step_content, getattr(memory, "near", memory).step_content) if value]


class Troubled(Questioner):
    """Has heard something before its step; then has trouble in it, as `model.trouble` says."""

    def __init__(self, model, memory, api_base="http://127.0.0.1:9", **options):
        super().__init__(model, api_base, **options)
        self.memory = MEMORIES[memory](self)
        self.memory.add_to_memory(type="message", content={"message": "psst", "sender": 99})

    def trouble(self):
        self.memory.add_to_memory(type="plan", content={"plan": "half done"})
        self.model.here.release()
        if self.model.trouble == "raises":
            raise ValueError("trouble")


class TroubledPlainly(Troubled):
    def step(self):
        self.trouble()
        self.model.release.wait(PATIENCE_S)


class TroubledAwaiting(Troubled):
    async def astep(self):
        self.trouble()
        await asyncio.Event().wait()


def troubled(trouble, kind, memories=("short", "short")):
    model = Model()
    model.trouble = trouble
    model.here, model.release = threading.Semaphore(0), threading.Event()
    for memory in memories:
        kind(model, memory)
    return model


async def step_and_cancel(model, mode="overlap"):
    task = asyncio.create_task(astep_agents(model.agents, mode=mode))
    for _ in model.agents:
        await asyncio.to_thread(model.here.acquire)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    model.release.set()


def step_in_trouble(trouble, kind, mode):
    model = troubled(trouble, kind, MEMORIES)
    if trouble == "is cancelled":
        asyncio.run(step_and_cancel(model, mode))
    else:
        with pytest.raises(StepError) as caught:
            step_agents(model.agents, mode=mode, timeout=0.3 if trouble == "hangs" else None)
        assert len(caught.value.report.timed_out) == len(model.agents) * (trouble == "hangs")
    model.release.set()
    return model


@pytest.mark.parametrize("trouble", ["raises", "hangs", "is cancelled"])
def test_mesa_m08_no_half_entry_and_what_was_heard_stays(trouble):
    for kind in (TroubledPlainly, TroubledAwaiting):
        for mode in ("overlap", "snapshot"):
            for agent in step_in_trouble(trouble, kind, mode).agents:
                where = f"{type(agent.memory).__name__} {kind.__name__} {mode}"
                assert halves(agent.memory) == [], where
                heard = str(content(agent.memory))
                assert "psst" in heard, where
                assert "half done" not in heard, where


def test_mesa_03_after_a_cancelled_step_the_next_one_is_whole():
    model = troubled("is cancelled", TroubledPlainly)

    async def both():
        await step_and_cancel(model)
        assert (await astep_agents(model.agents)).ok

    asyncio.run(both())
    for agent in model.agents:
        assert halves(agent.memory) == []
        assert [entry.step for entry in agent.memory.short_term_memory] == [model.steps]
        assert "psst" in str(agent.memory.short_term_memory[0].content)


def test_a_thread_that_comes_back_too_late_does_nothing_any_more():
    class Late(TroubledPlainly):
        def apply_plan(self, plan):
            self.model.acted.append(self.unique_id)

        def step(self):
            try:
                self.trouble()
                self.model.release.wait(PATIENCE_S)
                self.tries()
            finally:
                self.model.back.release()

        def tries(self):
            for act in (
                lambda: self.apply_plan(None),
                lambda: self.send_message("too late", [self]),
                lambda: self.memory.add_to_memory(type="plan", content={"plan": "too late"}),
                self.memory.process_step,
                self.remove,
                lambda: self.llm.generate("too late"),
            ):
                try:
                    act()
                except RuntimeError as error:
                    self.model.refused.append(str(error))

    model = troubled("hangs", Late)
    model.acted, model.refused, model.back = [], [], threading.Semaphore(0)
    with install():
        with pytest.raises(StepError):
            step_agents(model.agents, timeout=0.3)
        model.release.set()
        for _ in range(2):
            assert model.back.acquire(timeout=PATIENCE_S)
    assert model.acted == []
    assert len(model.refused) == 12
    assert all("too late" in told for told in model.refused)
    assert len(model.agents) == 2
    for agent in model.agents:
        assert list(agent.memory.short_term_memory) == []
        assert "plan" not in agent.memory.step_content


@pytest.mark.parametrize("on_error", ["skip", "retry"])
def test_mesa_m07_a_time_out_touches_who_is_pending_and_steps_nobody_again(on_error, monkeypatch):
    class Once(Agent):
        steps = 0

        async def astep(self):
            self.steps += 1
            while self.unique_id == 2:
                if sum(agent.steps for agent in self.model.agents) == 5:
                    clock.advance()
                await asyncio.sleep(0.001)

    clock = StandingClock(monkeypatch)
    model = Model()
    for _ in range(5):
        Once(model)
    with pytest.warns(RuntimeWarning, match="1 of 5 agents did not step: 2"):
        report = step_agents(model.agents, timeout=0.1, on_error=on_error)
    assert [agent.steps for agent in model.agents] == [1] * 5
    assert report.failed_ids == [2]
    assert len(report.timed_out) == 1
    assert [result.attempts for result in report] == [1] * 5


def test_an_agent_whose_step_was_given_up_steps_again():
    class Once(Agent):
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == 1:
                self.model.release.wait(PATIENCE_S)

    model = Model()
    model.release = threading.Event()
    agent = Once(model)
    with pytest.raises(StepError):
        step_agents(model.agents, timeout=0.2)
    assert step_agents(model.agents).ok
    model.release.set()
    assert agent.steps == 2


def test_mesa_m09_one_that_will_not_be_cancelled_is_left_behind(monkeypatch):
    class Stubborn(Agent):
        async def astep(self):
            while self.model.quick < 2:
                await asyncio.sleep(0)
            clock.advance()
            while not self.model.release.is_set():
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    self.model.asked += 1
                    clock.advance()
            self.model.ended.set()

    class Quick(Agent):
        async def astep(self):
            self.model.quick += 1

    async def main(model):
        with pytest.raises(StepError) as caught:
            await astep_agents(model.agents, timeout=0.1)
        model.release.set()
        await model.ended.wait()
        return caught.value.report

    clock = StandingClock(monkeypatch)
    model = Model()
    model.release, model.ended, model.asked, model.quick = threading.Event(), asyncio.Event(), 0, 0
    Stubborn(model), Quick(model), Quick(model)
    report = asyncio.run(main(model))
    assert len(report.succeeded) == model.quick == 2
    assert len(report.timed_out) == 1
    assert model.asked >= 1


def test_a_step_that_ends_although_it_was_cancelled_was_too_late_all_the_same():
    class Polite(Agent):
        async def astep(self):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return

    model = Model()
    Polite(model)
    with pytest.raises(StepError) as caught:
        step_agents(model.agents, timeout=0.2)
    assert len(caught.value.report.timed_out) == 1
    assert "longer than 0.2 s" in str(caught.value.exceptions[0])


@pytest.mark.parametrize("mode", ["overlap", "snapshot"])
def test_an_agent_that_cancels_itself_has_failed(mode):
    class Confused(Agent):
        async def astep(self):
            raise asyncio.CancelledError

    class Suicidal(Agent):
        async def astep(self):
            asyncio.current_task().cancel()
            await asyncio.sleep(0)

    model = Model()
    Confused(model), Suicidal(model), Agent(model)
    with pytest.raises(StepError) as caught:
        step_agents(model.agents, mode=mode)
    assert len(caught.value.report.failed) == 2
    assert len(caught.value.report.succeeded) == 1


def test_undoing_looks_into_groups_and_bears_strange_memories():
    class Strange:
        step_content = None

    class Group:
        def __init__(self, *parts):
            self._constituting_set = parts

    model = World(1, "http://127.0.0.1:9", kind=Questioner)
    (agent,) = model.agents
    agent.memory.process_step(pre_step=True)
    agent.memory.last_observation = {"self_state": 1}
    strange = type("Somebody", (), {"memory": Strange()})()
    undo_half_steps(Group(agent, strange, object()))
    assert halves(agent.memory) == []
    assert agent.memory.last_observation == {}
    assert isinstance(agent, LLMAgent)
