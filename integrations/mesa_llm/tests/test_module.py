"""ModuleLLM: its constructor, its answers, its figures, its sharing."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import litellm
import pytest
from llmmw_mesa import ModuleLLM, global_stats, one_shot
from llmmw_mesa.shared import Shared
from worlds import MODEL

from llmmw import ConfigError
from llmmw.testing.server import FaultRule


@pytest.fixture
def llm(server):
    return lambda **options: ModuleLLM(MODEL, api_base=server.base_url, **options)


def test_an_answer_is_what_litellm_answers(llm):
    answer = llm().generate("hello")
    assert type(answer) is litellm.ModelResponse
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > 0


def test_the_four_keys_of_pull_request_270_and_the_cores_besides(llm):
    one = llm(enable_caching=True)
    assert one.get_performance_stats()["cache_hit_rate"] == 0.0
    for _ in range(4):
        one.generate("hello")
    stats = one.get_performance_stats()
    assert (stats["request_count"], stats["cache_hits"], stats["cache_hit_rate"], stats["batch_count"]) == (
        4,
        3,
        0.75,
        0,
    )
    assert stats["upstream_requests"] == 1
    assert stats["layers"]


def test_batching_counts_flushes(llm):
    one = llm(enable_batching=True, batch_size=3)

    async def several():
        await asyncio.gather(*(one.agenerate(f"question {n}") for n in range(6)))

    asyncio.run(several())
    assert one.get_performance_stats()["batch_count"] >= 2


def test_mesa_11_a_caller_who_changes_an_answer_changes_nobody_elses(llm):
    one = llm(enable_caching=True)
    first = one.generate("hello")
    text = first.choices[0].message.content
    first.choices[0].message.content = "changed"
    second, third = one.generate("hello"), one.generate("hello")
    assert second.choices[0].message.content == third.choices[0].message.content == text
    assert second is not third


def test_mesa_12_another_base_key_or_system_prompt_is_another_question(llm, server, monkeypatch):
    options = {"enable_caching": True, "cache_scope": "model"}
    llm(**options).generate("hello")
    assert llm(**options).get_performance_stats()["shared"]["request_count"] == 1
    llm(system_prompt="other", **options).generate("hello")
    ModuleLLM(MODEL, api_base=server.base_url.replace("127.0.0.1", "localhost"), **options).generate("hello")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    llm(**options).generate("hello")
    assert server.stats(0)["completed"] == 4
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    llm(**options).generate("hello")
    assert server.stats(0)["completed"] == 4


def test_two_modules_share_an_engine_but_not_answers_unless_asked(llm, server):
    first, second = llm(enable_caching=True), llm(enable_caching=True)
    first.generate("hello")
    second.generate("hello")
    assert server.stats(0)["completed"] == 2
    assert len(global_stats()) == 1
    first, second = (llm(enable_caching=True, cache_scope="model") for _ in range(2))
    first.generate("hello")
    second.generate("hello")
    assert server.stats(0)["completed"] == 3


def test_mesa_09_threads_and_loops_have_one_cache(llm, server):
    one = llm(enable_caching=True)

    async def several():
        return [(await one.agenerate(f"q{n}")).choices[0].message.content for n in range(5)]

    found = []
    threads = [threading.Thread(target=lambda: found.append([one.generate(f"q{n}").choices[0].message.content
                                                             for n in range(5)])) for _ in range(8)]  # fmt: skip
    threads += [threading.Thread(target=lambda: found.append(asyncio.run(several()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 10
    assert server.stats(0)["completed"] == 5


async def test_mesa_m04_generate_inside_a_running_loop(llm):
    assert llm().generate("hello").choices[0].message.content


def test_copies_and_pickles_keep_the_settings_and_start_anew(llm):
    one = llm(enable_caching=True, rpm=600)
    one.generate("hello")
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (other.llm_model, other.api_base, other.api_key) == (one.llm_model, one.api_base, one.api_key)
        assert other.get_performance_stats()["request_count"] == 0
        assert other.generate("hello").choices
        assert other.get_performance_stats()["shared"]["request_count"] >= 2


def test_mesa_13_cleanup_twice_elsewhere_and_a_call_after_it(llm):
    one = llm(enable_caching=True)
    one.generate("hello")
    asyncio.run(one.cleanup())
    asyncio.run(one.cleanup())
    one.close()
    assert one.get_performance_stats()["request_count"] == 1
    assert one.generate("hello again").choices
    assert one.get_performance_stats()["request_count"] == 2
    one.close()


def test_mesa_13_a_call_whose_engine_somebody_closes_before_it_asks_opens_it_again(llm, monkeypatch):
    one, opened, closed = llm(), Shared.engine, []

    def engine(self, user):
        found = opened(self, user)
        if not closed:
            closed.append(found)
            found.close()  # as a `__del__` that the collector runs right then
        return found

    monkeypatch.setattr(Shared, "engine", engine)
    assert one.generate("now").choices
    closed.clear()
    assert asyncio.run(one.agenerate("and on a loop")).choices
    assert closed[0].closed


def test_the_last_user_closes_the_engine(llm):
    first, second = llm(), llm()
    first.generate("a")
    second.generate("b")
    first.close()
    second.generate("c")
    assert second.get_performance_stats()["upstream_requests"] == 3
    second.close()


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "AuthenticationError"), (400, "BadRequestError"), (404, "NotFoundError")]
)
def test_mesa_05_what_cannot_be_healed_is_tried_once(llm, server, status, kind):
    server.add_fault(FaultRule(kind="status", status=status))
    with pytest.raises((getattr(litellm, kind), ValueError)) as caught:
        llm().generate("hello")
    assert server.stats(0)["received"] == 1
    assert kind in (type(caught.value).__name__, type(caught.value.__cause__).__name__)


def test_a_permanent_500_is_tried_so_often_and_keeps_its_type(llm, server):
    server.add_fault(FaultRule(kind="status", status=500))
    with pytest.raises(litellm.InternalServerError) as caught:
        llm(max_attempts=3).generate("hello")
    assert server.stats(0)["received"] == 3
    assert any("3 times" in note for note in caught.value.__notes__)


def test_nobody_there_is_a_connection_error(server):
    with pytest.raises((litellm.APIConnectionError, litellm.InternalServerError), match="onnection"):
        ModuleLLM(MODEL, api_base="http://127.0.0.1:9/v1", max_attempts=2).generate("hello")


def test_mesa_06_a_missing_package_is_told_at_once(llm, server, monkeypatch):
    async def broken(**kwargs):
        try:
            raise ModuleNotFoundError("No module named 'mcp'")
        except ModuleNotFoundError as error:
            raise litellm.APIConnectionError(message=str(error), llm_provider="openai", model=MODEL)  # noqa: B904 — as LiteLLM raises it

    asked = []
    monkeypatch.setattr("mesa_llm.module_llm.acompletion", lambda **kwargs: asked.append(1) or broken(**kwargs))
    with pytest.raises(litellm.APIConnectionError, match="mcp"):
        llm().generate("hello")
    assert len(asked) == 1


def test_one_shot_is_one_attempt(llm, server):
    server.add_fault(FaultRule(kind="status", status=429))
    with one_shot(), pytest.raises(litellm.RateLimitError):
        llm().generate("hello")
    assert server.stats(0)["received"] == 1
    with pytest.raises(litellm.RateLimitError):
        ModuleLLM.generate.__wrapped__(llm(), "hello")
    assert server.stats(0)["received"] == 2


@pytest.mark.parametrize("wrong", [{"cache_scope": "everybody"}, {"stack": [1]}, {"timeout": -1}, {"rpm": 0}])
def test_what_cannot_work_is_said_at_once(llm, wrong):
    with pytest.raises(ConfigError):
        llm(**wrong)
