"""Snapshot steps: think side by side, act in order; who answers first changes nothing."""

from __future__ import annotations

import asyncio
import copy
import pickle
import random
import threading

import numpy as np
import pytest
from llmmw_mesa import StepError, astep_agents, install, step_agents
from llmmw_mesa.acting import StepAbandoned
from llmmw_mesa.turns import Turns
from mesa import Agent, Model
from mesa.experimental.meta_agents.meta_agent import MetaAgent
from worlds import Questioner, StandingClock, Thinker, World

PATIENCE_S = 90


class Gated(Agent):
    """Thinks until its gate opens; draws before and after; acts on the world in `apply_plan`."""

    def think(self):
        self.draws = [self.random.random(), self.random.gauss(), int(self.model.rng.integers(1000))]
        assert self.model.gates[self.unique_id].wait(PATIENCE_S)
        self.draws += [self.random.choice(range(100)), self.random.getrandbits(16), self.random.gauss()]

    def apply_plan(self, plan):
        self.model.log.append((self.unique_id, plan, self.random.random()))
        if self.random.random() < 0.5:
            self.model.born.append(type(self)(self.model).unique_id)

    def step(self):
        self.think()
        self.apply_plan(self.draws)


class AsyncGated(Gated):
    step = None

    async def astep(self):
        self.think()
        self.apply_plan(self.draws)


class Gates(Model):
    """Opens the gates in an order of its own."""

    def __init__(self, agents, kind, seed):
        super().__init__(seed=seed)
        self.log, self.born = [], []
        self.gates = {}
        for _ in range(agents):
            self.gates[kind(self).unique_id] = threading.Event()

    def step_with(self, opening, **options):
        first = self.gates[opening[0]]
        first.set()

        def open_others():
            for number in opening[1:]:
                self.gates[number].set()

        thread = threading.Thread(target=open_others)
        thread.start()
        try:
            return step_agents(self.agents, **options)
        finally:
            thread.join()


@pytest.mark.filterwarnings("ignore:The use of the `seed` keyword:FutureWarning")
@pytest.mark.parametrize("kind", [Gated, AsyncGated])
def test_mesa_14_results_do_not_depend_on_who_answers_first(kind):
    ways = set()
    for trial in range(8):
        model = Gates(6, kind, seed=7)
        opening = list(model.gates)
        random.Random(trial).shuffle(opening)
        report = model.step_with(opening, mode="snapshot")
        assert report.ok
        assert type(model.random) is random.Random
        assert type(model.rng) is np.random.Generator
        assert [who for who, _, _ in model.log] == [result.agent.unique_id for result in report]
        ways.add(repr((model.log, model.born, model.random.random(), model.rng.random())))
    assert len(ways) == 1


@pytest.mark.filterwarnings("ignore:The use of the `seed` keyword:FutureWarning")
def test_what_an_agent_draws_in_overlapping_steps_does_not_depend_on_the_others():
    ways = set()
    for trial in range(6):
        model = Gates(5, Gated, seed=3)
        opening = list(model.gates)
        random.Random(trial).shuffle(opening)
        model.step_with(opening)
        ways.add(repr(sorted((who, plan) for who, plan, _ in model.log)))
    assert len(ways) == 1


class Drawing(Agent):
    """Does everything that one can do with a generator."""

    def step(self):
        dice = self.model.kept  # the object that cells and sets keep
        assert dice is self.model.random
        assert isinstance(self.model.rng, np.random.Generator)
        self.copied = copy.deepcopy(self.model.random)
        self.pickled = pickle.loads(pickle.dumps(self.model.random))
        state = dice.getstate()
        first = dice.random()
        dice.setstate(state)
        assert dice.random() == first
        dice.seed(5)
        self.drawn = [dice.random(), dice.sample(range(9), 3), dice.normalvariate(), self.rng.normal()]


@pytest.mark.filterwarnings("ignore:The use of the `seed` keyword:FutureWarning")
def test_the_models_generators_stay_whole():
    model = Model(seed=1)
    model.kept = model.random
    agents = [Drawing(model) for _ in range(3)]
    step_agents(model.agents, order="given")
    assert type(model.random) is random.Random
    for agent in agents:
        assert type(agent.copied) is type(agent.pickled) is random.Random
        assert agent.drawn[:3] == agents[0].drawn[:3]
    after = model.random.random()
    twin = random.Random(1)
    twin.getrandbits(64)
    assert after == twin.random()


def test_turns_are_an_order():
    turns = Turns(3)
    log = []

    def act(number):
        turns.wait(number)
        assert turns.holds(number)
        log.append(number)
        turns.done(number)

    threads = [threading.Thread(target=act, args=(number,)) for number in (2, 0)]
    for thread in threads:
        thread.start()
    turns.done(1)
    turns.done(1)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert log == [0, 2]
    with pytest.raises(StepAbandoned):
        turns.wait(1)


class Acting(Agent):
    """Plain: acts in its own `apply_plan`."""

    def __init__(self, model, wrong=False):
        super().__init__(model)
        self.wrong = wrong

    def apply_plan(self, plan):
        self.model.log.append(("acts", self.unique_id))
        if self.wrong:
            raise ValueError("in the middle")

    def step(self):
        self.model.log.append(("thinks", self.unique_id))
        self.apply_plan(None)


@pytest.mark.parametrize("most", [1, 2, None])
def test_with_few_places_everybody_thinks_before_anybody_acts(most):
    model = Model()
    model.log = []
    for _ in range(5):
        Acting(model)
    report = step_agents(model.agents, mode="snapshot", order="given", max_concurrency=most)
    assert report.ok
    assert [what for what, _ in model.log] == ["thinks"] * 5 + ["acts"] * 5
    assert [who for what, who in model.log if what == "acts"] == [1, 2, 3, 4, 5]


def test_one_that_fails_while_it_acts_lets_the_next_act():
    model = Model()
    model.log = []
    for number in range(4):
        Acting(model, wrong=number == 1)
    with pytest.raises(StepError) as caught:
        step_agents(model.agents, mode="snapshot", order="given")
    assert [who for what, who in model.log if what == "acts"] == [1, 2, 3, 4]
    assert [result.agent.unique_id for result in caught.value.report.failed] == [2]


def test_retry_in_a_snapshot_only_before_it_acts():
    class Late(Acting):
        thoughts = 0

        def step(self):
            self.thoughts += 1
            if self.unique_id == 2 and self.thoughts == 1:
                raise ValueError("thinks badly")
            super().step()

    model = Model()
    model.log = []
    Late(model, wrong=True), Late(model), Late(model)
    with pytest.warns(RuntimeWarning, match="1 of 3"):
        report = step_agents(model.agents, mode="snapshot", order="given", on_error="retry")
    assert [result.attempts for result in report] == [1, 2, 1]
    assert [who for what, who in model.log if what == "acts"] == [1, 2, 3]


def test_waiting_for_ones_turn_is_not_ones_own_time(monkeypatch):
    class Slow(Acting):
        """Time passes while it acts and the others wait; then the loop has looked who is late."""

        def apply_plan(self, plan):
            looked = threading.Event()
            self.model.loop.call_soon_threadsafe(looked.set)
            assert looked.wait(PATIENCE_S)
            super().apply_plan(plan)
            clock.advance()

    async def main():
        model.loop = asyncio.get_running_loop()
        return await astep_agents(model.agents, mode="snapshot", order="given", timeout=PATIENCE_S)

    clock = StandingClock(monkeypatch)
    model = Model()
    model.log = []
    for _ in range(5):
        Slow(model)
    assert asyncio.run(main()).ok
    assert [who for what, who in model.log if what == "acts"] == [1, 2, 3, 4, 5]


def test_members_of_a_group_act_on_the_groups_turn():
    class Group(MetaAgent):
        def step(self):
            self.model.log.append(("thinks", self.unique_id))
            for member in self._constituting_set:
                member.step()

    model = Model()
    model.log = []
    members = [Acting(model) for _ in range(2)]
    Acting(model)
    Group(model, set(members))
    report = step_agents(model.agents, mode="snapshot", order="given")
    assert len(report) == 2
    acts = [place for place, (what, _) in enumerate(model.log) if what == "acts"]
    assert model.log.index(("thinks", 4)) < acts[0]
    assert next(model.log[place][1] for place in acts) == 3


def test_steps_inside_a_step_act_on_its_turn():
    class Leader(Agent):
        def step(self):
            self.model.log.append(("thinks", self.unique_id))
            step_agents(self.followers)

    model = Model()
    model.log = []
    leaders = [Leader(model) for _ in range(3)]
    for leader in leaders:
        leader.followers = [Acting(model) for _ in range(2)]
    step_agents(leaders, mode="snapshot", order="given")
    acts = [who for what, who in model.log if what == "acts"]
    assert [sorted(acts[place : place + 2]) for place in (0, 2, 4)] == [[4, 5], [6, 7], [8, 9]]


def test_messages_arrive_after_everybody_has_thought(server):
    class Chatty(Thinker):
        def step(self):
            self.seen = str(self.memory.step_content) + str(getattr(self.memory, "_current_step_entry", ""))
            self.llm.generate(self.question())
            self.send_message("hello", [agent for agent in self.model.agents if agent is not self])

    model = World(4, server.base_url, kind=Chatty)
    with install():
        step_agents(model.agents, mode="snapshot")
        assert all("hello" not in agent.seen for agent in model.agents)
        step_agents(model.agents, mode="snapshot")


def test_mesa_14_a_replay_asks_nothing_and_is_the_same(server, tmp_path):
    class Wanderer(Questioner):
        def question(self):
            return f"{self.unique_id} at {self.model.steps}: {self.place} {self.random.randrange(1000)} {self.heard}"

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.place, self.heard = 0, []

        def apply_plan(self, plan):
            self.place += len(plan) + self.random.randrange(10)
            for agent in self.model.agents:
                agent.heard = [*agent.heard[-2:], (self.unique_id, self.place)]

        def step(self):
            self.apply_plan(self.llm.generate(self.question()).choices[0].message.content)

    def trajectory(most):
        model = World(4, server.base_url, kind=Wanderer)
        model.random.seed(11)
        for _ in range(3):
            step_agents(model.agents, mode="snapshot", max_concurrency=most)
        return [(agent.unique_id, agent.place, agent.heard) for agent in model.agents]

    with install(enable_caching=True, cache_dir=str(tmp_path), run_seed="one"):
        first = trajectory(None)
        asked = server.stats(0)["received"]
        assert asked == 12
        assert trajectory(1) == trajectory(3) == first
    assert server.stats(0)["received"] == asked
