"""One engine for many ModuleLLMs: replays, descriptors, closing, forks, copies. Whole programs where that matters."""

from __future__ import annotations

import asyncio
import inspect
import textwrap

import litellm
import mesa_llm.module_llm as upstream
import pytest
from llmmw_mesa import ModuleLLM, Options, close_all, global_stats, install, step_agents
from programs import HEAD, Programs, fresh
from worlds import MODEL, Thinker

from llmmw import Coalescer, ConfigError, Stack, TTLCache
from llmmw.testing.server import FaultRule, Match


@pytest.fixture
def llm(server):
    return lambda **options: ModuleLLM(MODEL, api_base=server.base_url, **options)


@pytest.fixture(scope="module")
def _programs():
    running = Programs()
    yield running
    running.close()


@pytest.fixture
def program(server, _programs):
    """Run a program to its end; what it printed. Nothing may be on its standard error."""
    return lambda text, *more: _programs.run(HEAD + textwrap.dedent(text), server.base_url, *more)


# ── the constructor ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_constructor_takes_what_options_takes():
    """The settings stand in both, for help() and type checkers; this keeps them equal."""
    ours = list(inspect.signature(ModuleLLM).parameters.values())[3:]
    theirs = list(inspect.signature(Options).parameters.values())
    assert [(one.name, one.default, one.kind) for one in ours] == [(one.name, one.default, one.kind) for one in theirs]
    assert list(inspect.signature(ModuleLLM).parameters)[:3] == ["llm_model", "api_base", "system_prompt"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"enable_caching": "no"}, "enable_caching"),
        ({"enable_batching": 1}, "enable_batching"),
        ({"cache_size": 0}, "cache_size"),
        ({"cache_ttl": 0}, "cache_ttl"),
        ({"batch_size": 0}, "batch_size"),
        ({"stack": [1]}, "stack"),
        ({"stack": Stack(), "rpm": 5}, "rpm"),
        ({"sampling": "often", "enable_caching": True}, "sampling"),
        ({"cache_scope": "everybody"}, "cache_scope"),
        ({"cache_dir": 5, "enable_caching": True}, "cache_dir"),
        ({"cache_dir": "here"}, "enable_caching"),
        ({"run_seed": 1}, "enable_caching"),
        ({"run_seed": True, "enable_caching": True}, "run_seed"),
        ({"run_seed": 1.5, "enable_caching": True}, "run_seed"),
        ({"run_seed": "", "enable_caching": True}, "run_seed"),
        ({"flush_interval": 0}, "flush_interval"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"rpm": 0}, "rpm"),
        ({"tpm": -1}, "tpm"),
        ({"timeout": "soon"}, "timeout"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"deadline": float("nan")}, "deadline"),
    ],
)
def test_what_cannot_work_is_said_with_its_name(llm, wrong, named):
    with pytest.raises(ConfigError, match=named):
        llm(**wrong)


def test_equal_settings_share_whatever_their_spelling(llm):
    for timeout in (60, 60.0, "60s", "1m"):
        llm(timeout=timeout).generate("hello")
    assert [found["request_count"] for found in global_stats().values()] == [4]


def test_a_stack_of_ones_own(llm, server):
    one = llm(stack=Stack(TTLCache(60), Coalescer()))
    assert [one.generate("hello").id for _ in range(2)]
    assert server.stats(0)["completed"] == 1
    assert "retry" not in one.get_performance_stats()["layers"]


def test_mesa_m12_subclasses_fields_and_functions_are_looked_up_late(llm, server, monkeypatch):
    class Mine(ModuleLLM):
        def generate(self, prompt=None, **others):
            return super().generate(f"{prompt}, please", **others)

    server.configure(log_body_bytes=4000)
    mine = Mine(MODEL, api_base="http://127.0.0.1:9/v1", system_prompt="old")
    assert (mine.api_key, mine.system_prompt) == ("sk-test", "old")
    mine.api_base, mine.system_prompt, mine.llm_model = server.base_url, "new", "openai/other"
    mine.generate("hello")
    body = server.stats()["requests"][-1]["body"]
    assert all(word in body for word in ("hello, please", "new", "other"))
    server.configure(log_body_bytes=0)
    answer = litellm.ModelResponse(choices=[{"message": {"role": "assistant", "content": "mine"}}])

    async def replaced(**_):
        return answer

    monkeypatch.setattr(upstream, "completion", lambda **_: answer)
    monkeypatch.setattr(upstream, "acompletion", replaced)
    assert mine.generate("hello").choices[0].message.content == "mine"
    assert asyncio.run(mine.agenerate("hello")).choices[0].message.content == "mine"
    assert callable(ModuleLLM.generate.retry_with)
    assert callable(ModuleLLM.generate.__wrapped__)


# ── answers ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Repeater(Thinker):
    """Asks all the same, twice a step: only lanes keep them apart."""

    def question(self):
        return "What now?"

    def step(self):
        super().step()
        super().step()


def run_of(world, steps=2, agents=4, order="given"):
    model = world(agents, kind=Repeater)
    for _ in range(steps):
        found = list(model.agents)
        step_agents(found[::-1] if order == "reversed" else found)
    return [agent.done for agent in sorted(model.agents, key=lambda agent: agent.unique_id)]


@pytest.mark.parametrize("scope", ["agent", "model"])
def test_mesa_14_a_rerun_asks_nothing_and_goes_the_same_way_in_any_order(world, server, scope):
    with install(enable_caching=True, sampling="lanes", run_seed=7, cache_scope=scope):
        first = run_of(world)
        asked = server.stats(0)["received"]
        assert asked == 16
        server.configure(latency_s=0.0)
        assert run_of(world, order="reversed") == first
        assert server.stats(0)["received"] == asked
    with install(enable_caching=True, sampling="lanes", run_seed=8, cache_scope=scope):
        run_of(world)
    assert server.stats(0)["received"] == 2 * asked


def test_mesa_14_a_rerun_in_another_process_asks_nothing(program, server, tmp_path):
    """Agents' calls and those of modules alone."""
    text = """
    options = dict(enable_caching=True, sampling="lanes", cache_dir=sys.argv[2])
    with install(run_seed="night", **options):
        model = World(3, BASE)
        step_agents(model.agents)
        answers = [agent.done for agent in model.agents]
    modules = [llm(run_seed="day", **options) for _ in range(3)]
    answers += [[one.generate("hello").choices[0].message.content for _ in range(2)] for one in modules]
    close_all()
    print(answers)
    """
    first = program(text, tmp_path)
    asked = server.stats(0)["received"]
    assert asked == 3 + 6
    assert fresh(HEAD + textwrap.dedent(text), server.base_url, tmp_path) == first
    assert server.stats(0)["received"] == asked


def test_mesa_15_a_group_of_one_and_a_call_that_fails_among_others(llm, server):
    one = llm(enable_batching=True, batch_size=1)
    assert one.generate("hello").choices
    assert one.get_performance_stats()["batch_count"] == 1
    server.add_fault(FaultRule(kind="status", status=400, match=Match(contains="broken")))
    some = llm(enable_batching=True, batch_size=4)

    async def together():
        asked = [some.agenerate(text) for text in ("a", "b", "broken", "c")]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(together())
    assert [type(one) is litellm.ModelResponse for one in found] == [True, True, False, True]


# ── lifetimes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mesa_07_a_descriptor_limit_of_256_and_a_hundred_steps_of_twenty_agents(program, server):
    """Every tenth step all twenty ask at once; in between they ask the same, which is one request."""
    found = program("""
    from worlds import Thinker
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    class Some(Thinker):
        def question(self):
            return f"{self.model.number}" + f" from {self.unique_id}" * (self.model.number % 10 == 0)
    with install(parallel="overlap", enable_caching=True, cache_scope="model"):
        model = World(20, BASE, kind=Some)
        counts = []
        for model.number in range(100):
            step_agents(model.agents)
            counts.append(descriptors())
    assert all(len(agent.done) == 100 for agent in model.agents)
    assert max(counts) <= counts[0] + 20, counts
    print("flat")
    """)
    assert "flat" in found
    assert server.stats(0)["received"] == 10 * 20 + 90


def test_mesa_m03_hundreds_of_steps_and_loops_leave_no_socket(program):
    """Each step on a loop of its own, as Mesa-LLM makes them; and engines that come and go."""
    found = program("""
    one = llm()
    async def step(): await one.agenerate("hello")
    for n in range(300):
        asyncio.run(step())
        if n == 10: before = descriptors()
    assert descriptors() <= before + 4, (before, descriptors())
    one.close()
    for n in range(30):
        with llm() as short: short.generate("hello")
        if n == 5: before, threads = descriptors(), threading.active_count()
    assert descriptors() <= before + 2, (before, descriptors())
    assert threading.active_count() <= threads
    for n in range(40):
        llm(enable_caching=True, run_seed=n).generate("hello")
    assert threading.active_count() <= threads + 20
    print("flat")
    """)
    assert "flat" in found


def test_mesa_13_cleanup_sends_what_is_queued(llm, server):
    one = llm(enable_batching=True, batch_size=50, flush_interval="1h")
    server.configure(latency_s=0.2)

    async def queued_and_closed():
        first = asyncio.create_task(one.agenerate("first"))  # under way, so that the others wait for mates
        while not server.stats(0)["in_flight"]:
            await asyncio.sleep(0)
        others = [asyncio.create_task(one.agenerate(f"q{n}")) for n in range(3)]
        while one.get_performance_stats()["in_flight"] < 4:
            await asyncio.sleep(0)
        await one.cleanup()
        return await asyncio.gather(first, *others)

    assert len(asyncio.run(queued_and_closed())) == 4


def test_mesa_13_async_with_and_with_close(llm):
    async def inside():
        async with llm() as one:
            await one.agenerate("hello")
        return one

    one = asyncio.run(inside())
    assert one.get_performance_stats()["upstream_requests"] == 1
    with llm() as other:
        other.generate("hello")
    assert other.get_performance_stats()["upstream_requests"] == 1


def test_mesa_13_in_del_at_exit_and_with_calls_under_way(program, server):
    server.add_fault(FaultRule(kind="hang", match=Match(contains="never mind")))
    found = program("""
    import contextlib
    class Owner:
        def __init__(self): self.llm, self.own = llm(), self
        def __del__(self): self.llm.close(); self.llm.close()
    for _ in range(5):
        owner = Owner()
        owner.llm.generate("hello")
    del owner
    gc.collect()
    one = llm(enable_batching=True, flush_interval="1h")
    def hangs():
        with contextlib.suppress(Exception):  # may or may not be told that the engine was closed at exit
            one.generate("never mind")
    threading.Thread(target=hangs, daemon=True).start()
    while not one.get_performance_stats()["in_flight"]: os.sched_yield()
    left = Owner()
    left.llm.generate("hello")
    print("end")
    """)
    assert "end" in found


def test_mesa_13_closed_from_the_engines_own_thread(llm, monkeypatch):
    """As when the collector runs somebody's `__del__` there."""
    one = llm()
    answer = litellm.ModelResponse(choices=[{"message": {"role": "assistant", "content": "mine"}}])

    async def closes(**_):
        one.close()
        return answer

    monkeypatch.setattr(upstream, "acompletion", closes)
    assert one.generate("hello").choices[0].message.content == "mine"
    monkeypatch.undo()


def test_mesa_m03_a_forked_child_asks_for_itself(program, server):
    found = program("""
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    one = llm(enable_caching=True)
    one.generate("hello")
    child = os.fork()
    if not child:
        assert one.generate("hello").choices and one.generate("another").choices
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    print("both" if one.generate("third").choices else "")
    """)
    assert "both" in found


def test_figures_survive_the_close_and_close_all_forgets_them(llm):
    one = llm()
    assert one.get_performance_stats()["upstream_requests"] == 0
    one.generate("hello")
    one.close()
    assert next(iter(global_stats().values()))["upstream_requests"] == 1
    other = ModuleLLM(MODEL, api_base=one.api_base, max_attempts=2)
    other.generate("hello")
    assert len(global_stats()) == 2
    close_all()
    assert global_stats() == {}
    assert other.generate("hello").choices
