"""`shuffle_do("step")`, `do("step")` and `do_async("astep")` in parallel, on every kind of agent set, and back."""

from __future__ import annotations

import asyncio
import threading
import warnings

import pytest
from llmmw_mesa import (
    StepError,
    disable_automatic_parallel_stepping,
    enable_automatic_parallel_stepping,
    install,
    last_report,
    uninstall,
)
from llmmw_mesa.parallel import agent_set_classes, is_enabled
from mesa import Agent, Model
from mesa.agent import AgentSet
from mesa_llm import parallel_stepping as upstream
from worlds import Thinker, World

from llmmw import ConfigError

PATIENCE_S = 90


class Meeting(Model):
    """Its agents' steps end when all are stepping."""

    def __init__(self, agents=5, parallel=True):
        super().__init__()
        self.parallel_stepping = parallel
        self.barrier = threading.Barrier(agents)
        self.order = []
        for _ in range(agents):
            Attendant(self)

    def sets(self):
        """One of each class."""
        found = [self.agents, AgentSet(list(self.agents), random=self.random)]
        return list({type(one): one for one in found}.values())


class Attendant(Agent):
    steps = 0

    def step(self):
        self.model.barrier.wait(PATIENCE_S)
        self.steps += 1


class Alone(Agent):
    """Nothing to wait for."""

    def step(self):
        self.model.order.append(self.unique_id)


def state():
    return [dict(vars(owner)) for owner in agent_set_classes()], upstream._enhanced_shuffle_do, AgentSet.do_async


def test_mesa_m01_every_kind_of_set_steps_in_parallel_returns_itself_and_is_as_before():
    before = state()
    model = Meeting()
    sets = model.sets()
    assert len(agent_set_classes()) == len(sets)
    enable_automatic_parallel_stepping(max_concurrent=None)
    enable_automatic_parallel_stepping(max_concurrent=8)
    for count, found in enumerate(sets):
        assert found.shuffle_do("step") is found
        assert last_report().most_at_once == 5
        assert found.do("step") is found
        assert [result.agent for result in last_report()] == list(found)
        assert asyncio.run(found.do_async("astep")) == [None] * 5
        assert {agent.steps for agent in found} == {3 * (count + 1)}
    disable_automatic_parallel_stepping()
    assert state() == before
    assert not is_enabled()
    disable_automatic_parallel_stepping()
    assert state() == before


def test_opt_in_only_and_other_methods_are_left_alone():
    model = Model()
    model.order = []
    agents = [Alone(model) for _ in range(3)]
    enable_automatic_parallel_stepping(max_concurrent=None)
    before = last_report()
    assert model.agents.do("step") is model.agents
    model.parallel_stepping = True
    model.agents.do(lambda agent: agent.step())
    for found in (model.agents, AgentSet(agents, random=model.random)):
        assert found.shuffle_do("advance") is found
    assert Model().agents.shuffle_do("step") is not None
    assert model.order == [agent.unique_id for agent in agents] * 2
    assert last_report() is before
    with pytest.raises(AttributeError):
        asyncio.run(model.agents.do_async("step"))
    model.agents.do("step")
    assert last_report() is not before


@pytest.mark.parametrize(
    "switch", [upstream.enable_automatic_parallel_stepping, upstream.disable_automatic_parallel_stepping]
)
def test_mesa_llms_own_switch_does_not_switch_ours(switch):
    before = AgentSet.__dict__["shuffle_do"]
    enable_automatic_parallel_stepping(max_concurrent=None)
    switch()
    model = Meeting()
    for found in model.sets():
        assert found.shuffle_do("step") is found
    disable_automatic_parallel_stepping()
    assert AgentSet.__dict__["shuffle_do"] is before


def test_what_an_installation_switches_on_ends_with_it():
    model = Meeting(parallel=False)
    enable_automatic_parallel_stepping(max_concurrent=7, on_error="skip")
    for agent in model.agents:
        agent.llm = None
    with install(parallel="overlap"):
        with install(parallel="snapshot"):
            model.agents.shuffle_do("step")
        model.agents.shuffle_do("step")
        for agent in model.agents:
            del agent.llm
        model.barrier = threading.Barrier(1)
        before = last_report()
        model.agents.shuffle_do("step")
        assert last_report() is before  # these have nothing to wait for
    assert is_enabled()
    uninstall()
    disable_automatic_parallel_stepping()
    assert not is_enabled()


def test_the_report_of_a_step_that_raised_is_there_too():
    class Wrong(Alone):
        def step(self):
            super().step()
            if self.unique_id == 2:
                raise ValueError("two")

    model = Meeting(0)
    for _ in range(3):
        Wrong(model)
    enable_automatic_parallel_stepping()
    with pytest.raises(StepError):
        model.agents.shuffle_do("step")
    assert last_report().failed_ids == [2]
    assert sorted(model.order) == [1, 2, 3]
    enable_automatic_parallel_stepping(on_error="continue")
    with pytest.warns(RuntimeWarning, match="1 of 3 agents did not step: 2"):
        assert model.agents.shuffle_do("step") is model.agents


def test_mesa_m01_it_is_said_once_when_nothing_overlaps(server):
    class Blocking(Thinker):
        async def astep(self):
            self.done.append(self.llm.generate(self.question()))

    class InTurn(Thinker):
        async def astep(self):
            async with self.model.lock:
                await super().astep()

    for kind, told in ((Blocking, "no two steps"), (InTurn, "no two calls")):
        model = World(4, server.base_url, kind=kind)
        model.parallel_stepping, model.lock = True, asyncio.Lock()
        enable_automatic_parallel_stepping()
        with install():
            with pytest.warns(RuntimeWarning, match=told):
                model.agents.shuffle_do("step")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model.agents.shuffle_do("step")


def test_nothing_is_said_of_agents_without_anything_to_wait_for_or_where_one_at_a_time_was_asked_for(server):
    model = Meeting(0)
    Alone(model), Alone(model)
    world = World(3, server.base_url)
    world.parallel_stepping = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        enable_automatic_parallel_stepping()
        model.agents.shuffle_do("step")
        with install():
            world.agents.shuffle_do("step")
            enable_automatic_parallel_stepping(max_concurrent=1)
            world.agents.shuffle_do("step")
    assert last_report().most_at_once == 1


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "x"}, {"max_concurrent": 0}, {"request_timeout": -1}, {"on_error": "x"}, {"max_concurrent": True}],
)
def test_what_cannot_work_is_said_when_it_is_asked_for(wrong):
    with pytest.raises(ConfigError):
        enable_automatic_parallel_stepping(**wrong)
    assert not is_enabled()
