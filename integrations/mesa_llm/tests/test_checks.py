"""check(): each thing that bites is found where it bites, and nowhere else; each message carries its cure."""

from __future__ import annotations

import asyncio
import os
import resource
import runpy
import sys
from types import SimpleNamespace

import llmmw_mesa.checks
import mesa_llm.module_llm as upstream
import pytest
from llmmw_mesa import Finding, ModuleLLM, check, install
from llmmw_mesa.__main__ import main
from mesa import Agent, Model
from mesa.agent import AgentSet
from mesa_llm import parallel_stepping
from mesa_llm.memory.episodic_memory import EpisodicMemory
from worlds import MODEL, World

from llmmw import ConfigError

_getrlimit = resource.getrlimit
BASE = "http://127.0.0.1:8000/v1"


@pytest.fixture(autouse=True)
def _well(monkeypatch):
    """A machine where nothing is wrong."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield
    parallel_stepping.enable_automatic_parallel_stepping("asyncio")


def ids(*args, **kwargs):
    return [finding.id for finding in check(*args, **kwargs)]


def found(name, *args, **kwargs):
    [finding] = [finding for finding in check(*args, **kwargs) if finding.id == name]
    assert "Cure: " in finding.message
    assert str(finding) == f"{finding.severity}: {finding.message} [{name}]"
    return finding


def test_a_simulation_that_is_well_has_no_findings():
    with install(parallel="overlap"):
        model = World(3, BASE)
        model.parallel_stepping = True
        findings = check(model)
    assert findings == ()
    assert findings.ok
    assert "nothing" in str(findings)
    assert check() == ()


def test_mesa_m13_what_a_fresh_machine_lacks_is_told_by_the_command(monkeypatch, capsys):
    """No `mcp`, 256 descriptors, no key."""
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr(resource, "getrlimit", _getrlimit)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert main(["--model", MODEL]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mesa-llm ")
    assert [line.rpartition("[")[2] for line in lines[1:]] == ["mcp]", "api-key]", "descriptors]"]
    assert [line.partition(":")[0] for line in lines[1:]] == ["error", "error", "warning"]
    assert all("Cure: " in line for line in lines[1:])
    assert "pip install mcp" in lines[1]
    assert "export OPENAI_API_KEY" in lines[2]
    assert "ulimit -n 1024" in lines[3]


class Meeting(Agent):
    """Counts how many step at once."""

    def step(self):
        self.model.most = max(self.model.most, 1)

    async def astep(self):
        self.model.here += 1
        self.model.most = max(self.model.most, self.model.here)
        for _ in range(5):
            await asyncio.sleep(0)
        self.model.here -= 1


def test_mesa_m13_parallel_is_reported_exactly_where_nothing_overlaps():
    model = Model()
    model.parallel_stepping, model.here, model.most = True, 0, 0
    for _ in range(4):
        Meeting(model)
    model.agents.shuffle_do("step")  # as Mesa-LLM does it by itself
    assert model.most in {1, 4}
    assert ("parallel" in ids(model)) == (model.most == 1)
    with install(parallel="overlap"):
        assert ids(model) == []
        model.agents.shuffle_do("step")
    assert model.most == 4
    model.parallel_stepping = False
    assert ids(model) == []


def by_itself(agents):
    """Kept in the set that Mesa-LLM's own parallel stepping reaches, whatever the version."""
    return SimpleNamespace(agents=AgentSet(agents, random=Model().random), parallel_stepping=True)


def test_mesa_m13_the_cap_on_threads(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    model = Model()
    agents = [Meeting(model) for _ in range(7)]
    parallel_stepping.enable_automatic_parallel_stepping("threading")
    assert "at most 6 agents at once" in found("threads", by_itself(agents)).message
    assert ids(by_itself(agents[:6])) == []
    with install(parallel="overlap"):
        assert ids(by_itself(agents)) == []


def test_agents_without_an_astep_do_not_overlap_by_themselves():
    class Plain(Agent):
        def step(self):
            pass

    model = Model()
    agents = by_itself([Plain(model), Plain(model), Meeting(model)])
    assert "2 agents (Plain)" in found("sync-steps", agents).message
    assert ids(by_itself([Meeting(model)])) == []


def test_mesa_m13_signatures_that_nobody_knows(monkeypatch):
    def generate(self, prompt, tool_schema=None, tool_choice="auto", response_format=None, audio=None):
        raise AssertionError

    monkeypatch.setattr(upstream.ModuleLLM, "generate", generate)
    assert "audio" in found("signatures").message
    with pytest.raises(ConfigError, match="audio"):
        install()
    monkeypatch.delattr(upstream.ModuleLLM, "generate")
    assert "no generate()" in found("signatures").message


def test_a_model_name_without_a_provider_and_a_key_that_is_not_there(monkeypatch):
    assert 'write "provider/gpt-4o"' in found("model-name", llm_model="gpt-4o").cure
    assert ids(llm_model="ollama/llama3") == []
    assert "MISTRAL_API_KEY" in found("api-key", llm_model="mistral/small").problem
    model = World(2, BASE)
    monkeypatch.delenv("OPENAI_API_KEY")
    with install():
        assert ids(model) == ["api-key"]  # for the four ModuleLLMs together


def test_an_address_that_is_none():
    assert found("api-base", api_base="127.0.0.1:8000").severity == "error"
    assert ids(api_base="https://example.org/v1") == []


def test_a_proxy_before_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://10.0.0.1:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert "NO_PROXY" in found("proxy", api_base=BASE).cure
    assert ids(api_base="http://10.1.2.3/v1") == []
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ids(api_base=BASE) == []


async def test_what_mesa_llm_does_by_itself_is_told_until_it_is_installed(monkeypatch):
    model = World(3, BASE)
    message = found("not-installed", model).message
    assert "ModuleLLMs of this model are Mesa-LLM's own" in message
    with install():
        assert ids(model) == []
    asked = {}

    async def acompletion(**kwargs):
        asked.update(kwargs)
        return SimpleNamespace()

    monkeypatch.setattr(upstream, "acompletion", acompletion)
    await next(iter(model.agents)).llm.agenerate("hello")  # Mesa-LLM's own: 0.2 loses the address
    assert ("api-base-ignored" in ids(model)) == ("api_base" not in asked)
    for agent in model.agents:
        agent.llm = ModuleLLM(MODEL, api_base=BASE)
    assert "api-base-ignored" not in ids(model)


def test_an_ollama_on_this_machine_is_where_it_is_looked_for():
    agent = SimpleNamespace(llm=upstream.ModuleLLM("ollama/llama3"))
    assert ids(SimpleNamespace(agents=[agent])) == ["not-installed"]


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("LLMMW_DISABLE", "1")
    assert "unset LLMMW_DISABLE" in found("disabled").cure


def test_more_agents_than_the_rate_serves_within_the_deadline():
    model = World(20, BASE)
    with install(rpm=30, deadline="1m"):
        finding = found("deadline", model)
        assert "40 calls" in finding.problem
        assert "deadline=160" in finding.cure
    with install(rpm=30):
        assert ids(model) == []
    with install():
        assert ids(model) == []


def test_what_makes_prompts_and_calls_many():
    model = World(20, BASE, vision=-1)
    agent = next(iter(model.agents))
    agent.memory = EpisodicMemory(agent=agent, llm_model=MODEL)
    with install():
        assert ids(model) == ["vision", "episodic"]
        agent.vision = 3
        assert ids(model) == ["episodic"]


def test_few_descriptors(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert "max_concurrency=64" in found("descriptors").cure
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert ids() == []
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert ids() == []


def test_a_table_of_prices_that_could_not_be_fetched(monkeypatch):
    told = SimpleNamespace(get_model_cost_map_source_info=lambda: {"fallback_reason": "no network"})
    monkeypatch.setitem(sys.modules, llmmw_mesa.checks._COST_MAP, told)
    assert "LITELLM_LOCAL_MODEL_COST_MAP" in found("cost-map").cure
    monkeypatch.setitem(sys.modules, llmmw_mesa.checks._COST_MAP, SimpleNamespace())
    assert ids() == []


def test_a_model_that_mesa_has_given_up():
    class Failing(Model):
        count = 0

        def step(self):
            self.count += 1
            raise ValueError("once")

    model = Failing()
    with pytest.raises(ValueError, match="once"):
        model.step()
    assert ids(model) == []
    try:
        model.step()
    except ValueError:
        assert model.count == 2  # Mesa before 3.5
        assert ids(model) == []
    else:
        assert model.count == 1
        assert "never steps such a model again" in found("stopped", model).problem


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["--strict"], 1)])
def test_the_command_ends_with_a_status(monkeypatch, capsys, arguments, status):
    monkeypatch.setenv("LLMMW_DISABLE", "1")
    assert main(arguments) == status
    assert "LLMMW_DISABLE" in capsys.readouterr().out


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llmmw_mesa", "--help"])
    monkeypatch.delitem(sys.modules, "llmmw_mesa.__main__")  # this test's import of it
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("llmmw_mesa", run_name="__main__")
    assert ended.value.code == 0
    assert "--api-base" in capsys.readouterr().out


def test_findings_are_values():
    finding = Finding("a", "warning", "b", "c")
    assert finding == Finding("a", "warning", "b", "c")
    assert finding.message == "b. Cure: c"
