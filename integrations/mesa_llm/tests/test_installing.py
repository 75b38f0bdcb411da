"""install() and uninstall(): everybody goes through one stack, and everything is afterwards as it was."""

from __future__ import annotations

import contextvars
import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import warnings

import llmmw_mesa
import mesa_llm.module_llm as upstream
import pytest
from llmmw_mesa import (
    ModuleLLM,
    disable_automatic_parallel_stepping,
    enable_automatic_parallel_stepping,
    global_stats,
    install,
    is_installed,
    uninstall,
)
from llmmw_mesa.parallel import agent_set_classes
from mesa_llm.llm_agent import LLMAgent
from mesa_llm.memory.episodic_memory import EpisodicMemory
from mesa_llm.memory.lt_memory import LongTermMemory
from mesa_llm.memory.st_lt_memory import STLTMemory
from worlds import MODEL, Thinker, World

from llmmw import ConfigError, Stack, TTLCache
from llmmw.testing.server import FaultRule

WAIT_S = 60
PATCHED = [upstream.ModuleLLM, LLMAgent, *agent_set_classes()]


def attributes():
    """Every attribute of the classes that may be patched."""
    return [dict(vars(owner)) for owner in PATCHED]


def same(before):
    """Whether they are the identical objects again."""
    return [
        f"{owner.__name__}.{name}"
        for owner, was, now in zip(PATCHED, before, attributes(), strict=True)
        for name in was.keys() | now.keys()
        if was.get(name) is not now.get(name)
    ] == []


def went_through(server):
    """Requests that the server got, and those of them that llmmw sent."""
    return server.stats(0)["received"], sum(stats["upstream_requests"] for stats in global_stats().values())


@pytest.fixture
def plain(server):
    """A ModuleLLM of Mesa-LLM's own."""
    return lambda **options: upstream.ModuleLLM(MODEL, api_base=server.base_url, **options)


# ── everybody goes through it ───────────────────────────────────────────────────────────────────────────────────────


def test_mesa_m02_all_agents_and_memories_share_one_engine(server):
    with install(enable_caching=True):
        world = World(6, server.base_url)
        for _ in range(3):
            world.step()
        assert went_through(server) == (18, 18)
        assert len(global_stats()) == 1


@pytest.mark.parametrize("kind", [STLTMemory, LongTermMemory, EpisodicMemory])
def test_every_kind_of_memory_asks_through_the_shared_engine(server, kind):
    class Remembering(Thinker):
        def __init__(self, model, api_base, **options):
            super().__init__(model, api_base, **options)
            self.memory = kind(agent=self, llm_model=MODEL, display=False)
            self.memory.llm.api_base = api_base

        def step(self):
            self.memory.add_to_memory(type="observation", content={"seen": self.question()})
            super().step()

    with install():
        world = World(2, server.base_url, Remembering)
        for _ in range(3):
            world.step()
        for agent in world.agents:
            if kind is STLTMemory:
                consolidate = agent.memory._update_long_term_memory  # 0.2 never comes to it, later ones at step 8
                consolidate(*([[]] if inspect.signature(consolidate).parameters else []))
        received, sent = went_through(server)
        assert received == sent > 2 * 3
        assert len(global_stats()) == 1


def test_agents_made_before_are_included_and_afterwards_are_themselves_again(server):
    world = World(3, server.base_url)
    world.step()
    with install():
        world.step()
        assert went_through(server) == (6, 3)
    world.step()
    assert went_through(server) == (9, 3)
    assert all(len(agent.done) == 3 for agent in world.agents)


def test_mesa_m12_a_users_subclass_that_overrides_generate_still_calls_ours(server, plain):
    class Shouting(upstream.ModuleLLM):
        __hash__ = None  # type: ignore[assignment]  # — a user's class may be what it likes

        def __eq__(self, other):
            return True

        def generate(self, prompt, *args, **kwargs):
            return super().generate(prompt.upper(), *args, **kwargs)

    asks = Shouting(MODEL, api_base=server.base_url)
    with install(enable_caching=True, cache_scope="model"):
        shouted = asks.generate("hello").choices[0].message.content
        assert plain().generate("HELLO").choices[0].message.content == shouted
        assert asks.get_performance_stats()["request_count"] == 1
        agent = next(iter(World(1, server.base_url).agents))
        agent.llm = asks
        assert agent.llm.generate("hello").choices[0].message.content == shouted
    assert went_through(server) == (1, 1)


def test_a_method_that_somebody_kept_goes_through_it_as_well(server, plain):
    llm = plain()
    with install():
        kept = llm.generate
        kept("hello")
    kept("hello again")  # it was ours when it was taken
    assert went_through(server) == (2, 2)


def test_positional_and_keyword_arguments_as_before(server, plain):
    wanted = {"type": "json_object"}
    with install():
        llm = plain(system_prompt="You are terse.")
        assert llm.generate("hello", None, "auto", wanted).choices
        assert llm.generate(prompt=["one", "two"], tool_schema=None, tool_choice="none").choices
        assert llm.generate(prompt="hello", system_prompt="You are verbose.").choices
        with pytest.raises(TypeError):
            llm.generate("hello", wrong=1)


def test_mesa_m12_wrapped_and_retry_with_stay_and_are_one_attempt(server, plain):
    server.add_fault(FaultRule(kind="status", status=429))
    with install():
        method = upstream.ModuleLLM.generate
        again = method.retry_with(stop=lambda state: state.attempt_number >= 2, wait=lambda state: 0)
        for once, requests in ((method.__wrapped__, 1), (again, 2)):
            server.reset()
            with pytest.raises(upstream.RateLimitError):
                once(plain(), "hello")
            assert server.stats(0)["received"] == requests
        assert inspect.iscoroutinefunction(upstream.ModuleLLM.agenerate)
        assert callable(method.retry.copy)


def test_hooks_stay_async_where_they_were():
    before = {
        name: inspect.iscoroutinefunction(getattr(LLMAgent, name))
        for name in ("pre_step", "post_step", "apre_step", "apost_step")
        if hasattr(LLMAgent, name)
    }
    with install():
        assert {name: inspect.iscoroutinefunction(getattr(LLMAgent, name)) for name in before} == before


# ── and back ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_attribute_is_the_identical_object_again():
    before = attributes()
    with install(parallel="overlap", max_concurrency=8):
        assert not same(before)
        assert is_installed()
    assert same(before)
    assert not is_installed()


def test_an_error_in_the_block_passes_and_all_is_undone():
    before = attributes()
    for error in (ZeroDivisionError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), install(parallel="snapshot"):
            raise error
        assert same(before)


def test_uninstall_ends_all_and_may_be_called_often():
    before = attributes()
    uninstall()
    install()
    install(rpm=7)
    uninstall()
    uninstall()
    assert same(before)


def test_in_nested_blocks_the_innermost_options_hold(server, plain):
    llm = plain()
    with install(enable_caching=True):
        outer = [llm.generate("hello") for _ in range(2)]
        with install():
            llm.generate("hello")
            llm.generate("hello")
        outer += [llm.generate("hello")]
        assert len({answer.choices[0].message.content for answer in outer}) == 1
    assert server.stats(0)["received"] == 1 + 2
    assert not is_installed()


def test_the_same_options_again_have_the_same_cache(server, plain):
    llm = plain()
    for _ in range(3):
        with install(enable_caching=True):
            llm.generate("hello")
    assert server.stats(0)["received"] == 1


def test_blocks_may_end_in_any_order():
    before = attributes()
    first, second = install(rpm=1), install(rpm=2, parallel="overlap")
    first.undo()
    assert llmmw_mesa.asking.Installed.options.rpm == 2
    assert not same(before)
    first.undo()
    uninstall()
    third = install(rpm=3)
    second.undo()  # long over: it must not end somebody else's
    assert is_installed()
    third.undo()
    assert same(before)
    with pytest.raises(ConfigError, match="over"), third:
        pass


def test_a_way_of_stepping_of_ones_own_comes_back():
    def wanted():
        return llmmw_mesa.parallel._state.wanted

    enable_automatic_parallel_stepping("snapshot", max_concurrent=3, request_timeout=9.0, on_error="skip")
    mine, patched = wanted(), attributes()
    with install():
        assert wanted() is mine
        with install(parallel="overlap", max_concurrency=5):
            assert (wanted().mode, wanted().max_concurrent, wanted().always) == ("overlap", 5, True)
            with install():
                assert wanted().mode == "overlap"
        assert wanted() is mine
    assert wanted() is mine
    assert same(patched)
    disable_automatic_parallel_stepping()


def test_what_somebody_else_put_in_our_place_stays_and_is_told(monkeypatch):
    handle = install()
    theirs = lambda self, prompt=None: "theirs"  # noqa: E731 — as short as they come
    monkeypatch.setattr(upstream.ModuleLLM, "generate", theirs)
    with pytest.warns(RuntimeWarning, match=r"ModuleLLM\.generate was replaced by somebody else"):
        handle.undo()
    assert vars(upstream.ModuleLLM)["generate"] is theirs


def test_installing_from_many_threads(server):
    before, failed = attributes(), []
    together, llms = threading.Barrier(8), [upstream.ModuleLLM(MODEL, api_base=server.base_url) for _ in range(8)]

    def one(number):
        try:
            together.wait(WAIT_S)
            for n in range(3):
                with install(rpm=1000 + number, parallel="overlap" if number % 2 else "off"):
                    assert llms[number].generate(f"{number} {n}").choices
                    assert is_installed()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert failed == []
    assert same(before)
    assert went_through(server) == (24, 24)


# ── copies, pickles, processes ──────────────────────────────────────────────────────────────────────────────────────


def copies(thing):
    return [copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))]


def test_mesa_m03_modules_are_copied_and_pickled_before_under_and_after(server, plain):
    llm = plain(system_prompt="You think.")
    before = pickle.dumps(llm)
    with install(enable_caching=True):
        llm.generate("hello")
        assert pickle.dumps(llm) == before, "it carries nothing of ours"
        made = copies(llm)
        assert all(one.generate("hello").choices for one in [*made, pickle.loads(before)])
        assert all(one.get_performance_stats()["request_count"] == 1 for one in made)
        assert llm.get_performance_stats()["request_count"] == 1
    assert pickle.dumps(llm) == before
    assert [vars(one) for one in (*made, *copies(llm))] == [vars(llm)] * 4


def test_mesa_m03_our_modules_carry_their_settings_and_no_more(server):
    llm = ModuleLLM(MODEL, api_base=server.base_url, system_prompt="You think.", enable_caching=True, rpm=600)
    bare = vars(upstream.ModuleLLM(MODEL, api_base=server.base_url, system_prompt="You think."))
    before = pickle.dumps(llm)
    llm.generate("hello")
    assert pickle.dumps(llm) == before
    for one in (*copies(llm), copy.copy(llm)):
        assert vars(one) == vars(llm)
        assert vars(one).keys() - bare.keys() == {"_llmmw_options"}
        assert one.get_performance_stats()["request_count"] == 0
        one.generate("hello")
        assert llm.get_performance_stats()["request_count"] == 1
    assert len(global_stats()) == 1


def test_mesa_m03_models_and_agents_are_copied_and_pickled_before_under_and_after(server):
    world = World(3, server.base_url)
    made = copies(world)
    with install(enable_caching=True):
        world.step()
        made += copies(world)
        for one in made:
            one.step()
    made += copies(world)
    received = server.stats(0)["received"]
    with install(enable_caching=True):
        for one in made:
            one.step()
            assert all(agent.model is one for agent in one.agents)
    assert server.stats(0)["received"] > received
    assert [len(agent.done) for one in made for agent in one.agents] == [2] * 6 + [3] * 6 + [2] * 6


def test_a_copied_agent_is_somebody_else(server):
    with install(enable_caching=True):
        world = World(1, server.base_url)
        agent = next(iter(world.agents))
        agent.step()
        next(iter(copy.deepcopy(world).agents)).step()
        assert server.stats(0)["received"] == 2, "its answers are not the other's"


def test_a_pickle_of_an_installed_process_needs_nothing_of_ours(tmp_path, server, plain):
    place = tmp_path / "llm"
    with install():
        llm = plain()
        llm.generate("hello")
        place.write_bytes(pickle.dumps(llm))
    code = (
        "import pickle, sys\nsys.modules['llmmw_mesa'] = None\n"
        "llm = pickle.load(open(sys.argv[1], 'rb'))\nprint(llm.llm_model)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout.strip()) == (0, MODEL), told.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_mesa_m03_a_forked_child_asks_and_ends(server, plain):
    with install(enable_caching=True, cache_scope="model"):
        llm = plain()
        llm.generate("hello")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks of threads
            child = os.fork()
        if child == 0:
            try:
                answered = bool(plain().generate("from the child").choices) and bool(llm.generate("also").choices)
            except BaseException:
                answered = False
            os._exit(0 if answered else 9)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert llm.generate("and the parent").choices
    assert server.stats(0)["received"] == 4


def test_what_is_gone_is_forgotten(server, plain):
    states = llmmw_mesa.asking._states._found
    with install():
        gc.collect()
        before = len(states)
        llm = plain()
        llm.generate("hello")
        assert len(states) == before + 1
        del llm
        gc.collect()
        assert len(states) == before


# ── nothing by itself, and nothing unknown ──────────────────────────────────────────────────────────────────────────

_SNAPSHOT = """
import sys, types
import litellm, mesa, mesa_llm, mesa_llm.llm_agent, mesa_llm.recording.simulation_recorder
import anyio, httpx, openai, tenacity, asyncio, threading

def seen():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in {"mesa", "mesa_llm", "litellm", "openai", "tenacity", "asyncio"}:
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                for attribute, content in list(vars(value).items()):
                    found[name, key, attribute] = content
    return found

def changed(before, after):
    # pydantic finishes a class when somebody first needs it
    late = {"__warningregistry__", "_registry", "_abc_impl", "__annotations_cache__"}
    return sorted(
        ".".join(key) for key in before.keys()
        if key[-1] not in late and not key[-1].startswith("__pydantic_")
        and before[key] is not after.get(key) and not isinstance(before[key], (int, float, str))
    )

before = seen()
import llmmw_mesa
imported = changed(before, seen())
with llmmw_mesa.install(parallel="overlap"):
    under = changed(before, seen())
afterwards = changed(before, seen())
print(imported, bool(under), afterwards)
"""


def test_importing_this_package_patches_nothing():
    told = subprocess.run([sys.executable, "-c", _SNAPSHOT], capture_output=True, text=True, check=False)
    assert told.stdout.strip().splitlines()[-1:] == ["[] True []"], told.stderr


def another(generate, init=None):
    class Other:
        agenerate = generate

    Other.generate = generate
    Other.__init__ = init or upstream.ModuleLLM.__init__
    return Other


@pytest.mark.parametrize(
    "theirs",
    [
        another(lambda self, prompt, tool_schema, tool_choice, response_format, temperature: None),
        another(lambda self, text, tool_schema, tool_choice, response_format: None),
        another(lambda self, prompt, tool_schema, tool_choice: None),
        another(lambda self, prompt, tool_schema, tool_choice, response_format, suppress_thinking, system_prompt: None),
        another(lambda self, *args, **kwargs: None),
        another(upstream.ModuleLLM.generate, lambda self, llm_model, fallback_model, api_base, system_prompt: None),
        type("Empty", (), {"__init__": upstream.ModuleLLM.__init__}),
    ],
)
def test_mesa_m13_unknown_signatures_are_refused_loudly_and_nothing_is_patched(monkeypatch, theirs):
    monkeypatch.setattr(upstream, "ModuleLLM", theirs)
    before = attributes()
    with pytest.raises(ConfigError, match="this Mesa-LLM's ModuleLLM"):
        install(parallel="overlap")
    assert same(before)
    assert not is_installed()


def test_mesa_m13_the_shape_of_mesa_llms_main_is_known(monkeypatch):
    def generate(self, prompt=None, tool_schema=None, tool_choice="auto", response_format=None, system_prompt=None,
                 suppress_thinking=False):  # fmt: skip
        raise AssertionError("replaced")

    def init(self, llm_model, api_base=None, system_prompt=None, max_retries=5):
        raise AssertionError("not called")

    monkeypatch.setattr(upstream, "ModuleLLM", another(generate, init))
    with install():
        assert upstream.ModuleLLM.generate is not generate
    assert upstream.ModuleLLM.generate is generate


@pytest.mark.parametrize("how", ["contextvar", "max_retries"])
def test_mesa_m06_mesa_llms_own_one_shot_is_one_attempt(monkeypatch, server, plain, how):
    server.add_fault(FaultRule(kind="status", status=503))
    once = contextvars.ContextVar("mesa_llm_one_shot_completion", default=False)
    monkeypatch.setattr(upstream, "_ONE_SHOT_COMPLETION", once, raising=False)
    with install(max_attempts=3, deadline=WAIT_S):
        llm = plain()
        if how == "max_retries":
            llm.max_retries = 0
        token = once.set(how == "contextvar")
        try:
            with pytest.raises(upstream.litellm.ServiceUnavailableError):
                llm.generate("hello")
        finally:
            once.reset(token)
        assert server.stats(0)["received"] == 1
        llm.max_retries = 5
        with pytest.raises(upstream.litellm.ServiceUnavailableError):
            llm.generate("hello")
        assert server.stats(0)["received"] == 1 + 3


@pytest.mark.parametrize(
    "wrong", [{"paralel": "overlap"}, {"parallel": "on"}, {"rpm": 0}, {"stack": Stack(TTLCache(9)), "rpm": 3}]
)
def test_what_cannot_work_is_refused_and_nothing_is_patched(wrong):
    before = attributes()
    with pytest.raises(ConfigError):
        install(**wrong)
    assert same(before)
