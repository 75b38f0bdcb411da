"""Figures in Mesa's own DataCollector: exact, per agent and per step, of this model only, in bounded memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle

import pytest
from llmmw_mesa import ModuleLLM, StepError, agent_reporters, global_stats, install, model_reporters, step_agents
from llmmw_mesa.acting import Part
from llmmw_mesa.collect import _OfAgent
from llmmw_mesa.figures import Account, Figures, _ledger
from mesa import Agent, DataCollector, Model
from worlds import MODEL, Thinker, World

from llmmw.call import Reply, Usage
from llmmw.testing.server import FaultRule, Match


class Watched(World):
    """Collects after each step, as Mesa's examples do."""

    parallel = False

    def __init__(self, agents, api_base, **options):
        super().__init__(agents, api_base, **options)
        self.datacollector = DataCollector(model_reporters=model_reporters(), agent_reporters=agent_reporters())

    def step(self):
        if self.parallel:
            step_agents(self.agents)
        else:
            self.agents.shuffle_do("step")
        self.datacollector.collect(self)


class Parallel(Watched):
    parallel = True


class Lenient(Watched):
    """Mesa 3.5 never steps a model again whose step has raised; this one keeps it to itself."""

    def step(self):
        with contextlib.suppress(StepError):
            step_agents(self.agents)
        self.datacollector.collect(self)


class Asking(Thinker):
    """Asks as often as its id says, always the same."""

    def question(self):
        return f"I am {self.unique_id}"

    def step(self):
        for _ in range(self.unique_id):
            self.llm.generate(self.question())

    async def astep(self):
        for _ in range(self.unique_id):
            await self.llm.agenerate(self.question())


def by_agent(model, name):
    frame = model.datacollector.get_agent_vars_dataframe()[name]
    return {index: int(value) for index, value in frame.items()}


@pytest.mark.parametrize("kind", [Watched, Parallel])
def test_each_agents_calls_hits_and_tokens_of_each_step(server, kind):
    with install(enable_caching=True):
        model = kind(3, server.base_url, kind=Asking)
        for _ in range(2):
            model.step()
    asked = [1, 2, 3]
    assert by_agent(model, "llm_calls") == {(step, n): n for step in (1, 2) for n in asked}
    assert by_agent(model, "llm_upstream") == {(1, 1): 1, (1, 2): 1, (1, 3): 1, (2, 1): 0, (2, 2): 0, (2, 3): 0}
    assert by_agent(model, "llm_hits") == {(step, n): n - (step == 1) for step in (1, 2) for n in asked}
    tokens = model.datacollector.get_agent_vars_dataframe()[["llm_tokens_in", "llm_tokens_out", "llm_tokens_saved"]]
    assert (tokens.loc[1][["llm_tokens_in", "llm_tokens_out"]] > 0).all(axis=None)
    assert (tokens.loc[2][["llm_tokens_in", "llm_tokens_out"]] == 0).all(axis=None)
    assert (tokens.loc[2]["llm_tokens_saved"] > 0).all()
    rows = model.datacollector.get_model_vars_dataframe()
    assert list(rows["llm_calls"]) == [6, 6]
    assert list(rows["llm_hits"]) == [3, 6]
    assert list(rows["llm_upstream"]) == [3, 0]
    for name in ("llm_tokens_in", "llm_tokens_out", "llm_tokens_saved"):
        agents = model.datacollector.get_agent_vars_dataframe()[name].groupby(level=0).sum()
        assert list(rows[name]) == list(agents)
    [stats] = global_stats().values()
    assert rows["llm_tokens_in"].sum() == stats["tokens_in"]
    assert rows["llm_tokens_saved"].sum() == stats["tokens_saved"]


def test_failures_and_repetitions(server):
    server.add_fault(FaultRule(kind="status", status=400))
    with install():
        model = Lenient(2, server.base_url)
        model.step()
        server.clear_faults()
        server.add_fault(FaultRule(kind="status", status=500, match=Match(first=1)))
        model.step()
    rows = model.datacollector.get_model_vars_dataframe()
    assert list(rows["llm_calls"]) == [2, 2]
    assert list(rows["llm_failures"]) == [2, 0]
    assert list(rows["llm_upstream"]) == [2, 3]


def test_totals_instead_of_steps(server):
    with install():
        model = World(2, server.base_url)
        collector = DataCollector(
            model_reporters=model_reporters(per_step=False), agent_reporters=agent_reporters(per_step=False)
        )
        for _ in range(3):
            model.step()
            collector.collect(model)
    assert list(collector.get_model_vars_dataframe()["llm_calls"]) == [2, 4, 6]
    assert list(collector.get_agent_vars_dataframe()["llm_calls"]) == [1, 1, 2, 2, 3, 3]


def test_two_models_with_agents_of_the_same_ids_are_kept_apart(server):
    with install():
        one, other = Watched(2, server.base_url, kind=Asking), Watched(3, server.base_url, kind=Asking)
        for _ in range(2):
            one.step()
            other.step()
        later = Watched(1, server.base_url)
        later.step()
    assert list(one.datacollector.get_model_vars_dataframe()["llm_calls"]) == [3, 3]
    assert list(other.datacollector.get_model_vars_dataframe()["llm_calls"]) == [6, 6]
    assert list(later.datacollector.get_model_vars_dataframe()["llm_calls"]) == [1]
    assert by_agent(one, "llm_calls") == {(1, 1): 1, (1, 2): 2, (2, 1): 1, (2, 2): 2}


class Plain(Agent):
    """No LLMAgent; has a ModuleLLM of its own, and one with everybody."""

    def __init__(self, model, own, shared):
        super().__init__(model)
        self.own, self.shared = own, shared

    def step(self):
        self.own.generate("mine")
        self.shared.generate("ours")


@pytest.mark.parametrize("parallel", [False, True])
def test_modules_of_ones_own_without_an_installation(server, parallel):
    def make():
        return ModuleLLM(MODEL, api_base=server.base_url)

    model, shared = Model(), make()
    for _ in range(3):
        Plain(model, make(), shared)
    collector = DataCollector(model_reporters=model_reporters(), agent_reporters=agent_reporters())
    for _ in range(2):
        model.step()
        step_agents(model.agents) if parallel else model.agents.shuffle_do("step")
        collector.collect(model)
    assert list(collector.get_model_vars_dataframe()["llm_calls"]) == [6, 6]
    # Outside of a step that we know of, what everybody shares is nobody's in particular.
    each = 2 if parallel else 1
    assert list(collector.get_agent_vars_dataframe()["llm_calls"]) == [each] * 6


def test_what_an_agent_that_left_has_asked_stays_in_the_models_sums(server):
    class Leaving(Thinker):
        def step(self):
            super().step()
            self.remove()
            self.llm.generate("one more")

    with install():
        model = Watched(2, server.base_url, kind=Leaving)
        model.step()
        gc.collect()
        model.step()
    assert list(model.datacollector.get_model_vars_dataframe()["llm_calls"]) == [4, 0]


def test_reporters_and_their_models_can_be_copied_and_pickled(server):
    with install():
        model = World(1, server.base_url)
        model.watch = model_reporters() | {f"agent_{name}": made for name, made in agent_reporters().items()}
        model.step()
        assert model.watch["llm_calls"](model) == 1
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            [agent] = twin.agents
            assert (twin.watch["llm_calls"](twin), twin.watch["agent_llm_calls"](agent)) == (0, 0)
            twin.step()
            assert (twin.watch["llm_calls"](twin), twin.watch["agent_llm_calls"](agent)) == (1, 1)
        assert model.watch["llm_calls"](model) == 1


def test_figures_as_a_table(server):
    with install():
        World(2, server.base_url).step()
        found = global_stats()
    frame = found.to_frame()
    assert list(frame.index) == list(found)
    assert frame.loc[f"{MODEL}@{server.base_url}", "request_count"] == 2
    assert "layers" not in frame.columns
    assert len(type(found)().to_frame()) == 0


def test_memory_stays_bounded_over_ten_thousand_steps():
    model, answer = Model(), Reply(usage=Usage(input_tokens=3, output_tokens=2))
    per_agent = [_OfAgent(name, per_step=True) for name in ("calls", "tokens_in")]
    lasting, model_wide = Agent(model), model_reporters()
    before = len(_ledger.agents)
    for step in range(10_000):
        model.steps += 1
        mayfly = Agent(model) if step % 10 == 0 else lasting
        account = Account(Part(mayfly), Figures(), Figures())
        account.sent()
        account.used(answer.usage)
        account.ended(answer)
        assert [reporter(mayfly) for reporter in per_agent] == [1, 3]
        assert model_wide["llm_calls"](model) == 1
        if mayfly is not lasting:
            mayfly.remove()
    del mayfly, account
    gc.collect()
    assert len(_ledger.agents) <= before + 1
    assert [len(reporter._marks) for reporter in per_agent] == [1, 1]
