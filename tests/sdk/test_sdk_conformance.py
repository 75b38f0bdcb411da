"""Unmodified SDKs over every edge behave as they do without llmmw: types, streams, errors, cancellation.

Each scenario is written once; `kind` runs it for each SDK (openai, anthropic), mode (async, sync) and edge (the
httpx transport, the httpx2 transport, wrap_client). `test_sdk_openai2.py` repeats the openai ones of this folder on
openai 2. Here: answers, streams and what is shared; errors and structured outputs have files of their own.
"""

from __future__ import annotations

import asyncio

import pytest

from llmmw import Coalescer, Stack, TTLCache
from llmmw.testing.server import FaultRule

CACHED = Stack(TTLCache(300), Coalescer())
only = pytest.mark.only


async def test_answers_have_the_sdks_own_type(connect):
    driver = connect()
    answer = await driver.ask()
    assert type(answer).__name__ == {"openai": "ChatCompletion", "anthropic": "Message"}[driver.sdk]
    assert driver.text(answer)
    assert answer.usage.model_dump()
    assert driver.stats["request_count"] == driver.stats["upstream_requests"] == 1


async def test_a_stream_yields_the_sdks_chunks_and_the_whole_text(connect, server):
    driver = connect()
    fixed = {"extra_body": {"temperature": 0}}
    chunks = await driver.stream(**fixed)
    expected = {"openai": "ChatCompletionChunk", "anthropic": "RawMessageStartEvent"}[driver.sdk]
    assert type(chunks[0]).__name__ == expected
    assert driver.streamed_text(chunks) == driver.text(await driver.ask(**fixed))
    assert driver.stats["answered_upstream"] == 2
    assert server.stats(0)["completed"] == 2


async def test_tools_come_back_as_tool_calls(connect):
    driver = connect(CACHED)
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    if driver.sdk == "openai":
        tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    else:
        tool = {"name": "weather", "input_schema": schema}
    for _ in range(2):
        answer = await driver.ask("[tool] Paris?", tools=[tool])
        if driver.sdk == "openai":
            call = answer.choices[0].message.tool_calls[0]
            assert (call.type, call.function.name) == ("function", "weather")
        else:
            assert (answer.content[0].type, answer.content[0].name) == ("tool_use", "weather")
    assert driver.stats["cache_hits"] == 1


async def test_an_earlier_answer_goes_back_into_the_conversation(connect):
    driver = connect(CACHED)
    first = await driver.ask()
    message = first.choices[0].message if driver.sdk == "openai" else {"role": "assistant", "content": first.content}
    messages = [{"role": "user", "content": "hello"}, message, {"role": "user", "content": "and then?"}]
    second, third = [await driver.run(driver.resource.create, **driver.arguments() | {"messages": messages})
                     for _ in range(2)]  # fmt: skip
    assert second == third
    assert driver.stats["upstream_requests"] == 2


async def test_streams_at_once_share_one_upstream_stream(connect, server):
    driver = connect(CACHED)
    server.add_fault(FaultRule(kind="slow", seconds=0.005))
    streams = await asyncio.gather(*(driver.stream() for _ in range(10)))
    texts = {driver.streamed_text(chunks) for chunks in streams}
    assert len(texts) == 1
    assert texts != {""}
    assert server.stats(0)["received"] == 1
    stats = driver.stats
    assert stats["request_count"] == 10 == stats["coalesced"] + stats["cache_hits"] + stats["answered_upstream"]


async def test_the_recommended_stack_serves_many(connect, server):
    driver = connect(Stack.recommended(cache_ttl=600, rpm=60_000, tpm=100_000_000, concurrency=8, deadline=600))
    prompts = [f"prompt {number % 20}" for number in range(40)]
    answers = await asyncio.gather(*(driver.ask(prompt) for prompt in prompts))
    assert len({driver.text(answer) for answer in answers}) == 20
    assert await driver.stream("a stream")
    assert server.stats(0)["received"] == 21
    assert server.stats(0)["peak_in_flight"] <= 8
    stats = driver.stats
    assert stats["request_count"] == 41
    assert stats["warnings"] == {}
    assert stats["errors"] == stats["in_flight"] == 0


@only("openai")
async def test_embeddings_are_floats_and_shared(connect, server):
    driver = connect(CACHED)
    first, second = [
        await driver.run(driver.client.embeddings.create, model="llmmw-embedded", input=["a", "b"]) for _ in range(2)
    ]
    assert first == second
    assert [type(value) for value in first.data[1].embedding[:2]] == [float, float]
    assert server.stats(0)["received"] == 1


@only("openai")
async def test_completions_and_responses_are_shared(connect, server):
    driver = connect(CACHED)
    for _ in range(2):
        asked = {"model": "llmmw-embedded", "prompt": "once", "max_tokens": 200}
        completion = await driver.run(driver.client.completions.create, **asked)
        assert completion.choices[0].text
        response = await driver.run(driver.client.responses.create, model="llmmw-embedded", input="hello")
        assert response.output_text
    assert server.stats(0)["received"] == 2

    def events():
        return driver.client.responses.create(model="llmmw-embedded", input="streamed", stream=True)

    for _ in range(2):
        if driver.is_async:
            found = [event.type async for event in await events()]
        else:
            found = await driver.run(lambda: [event.type for event in events()])
        assert found[-1] == "response.completed"
    assert server.stats(0)["received"] == 3


async def test_the_sdks_stream_helper_works_and_is_cached_where_it_comes_by(connect, server):
    driver = connect(CACHED)
    read = {"openai": "get_final_completion", "anthropic": "get_final_message"}[driver.sdk]
    for _ in range(2):
        answer = await driver.entered(driver.resource.stream(**driver.arguments()), read)
        assert driver.text(answer)
    past_us = (
        driver.sdk == "anthropic" and driver.edge == "wrap"
    )  # openai's helper calls create(), anthropic's does not
    assert server.stats(0)["received"] == (2 if past_us else 1)


async def test_raw_responses_carry_headers(connect):
    driver = connect(CACHED)
    create = driver.resource.with_raw_response.create
    first = await driver.run(create, **driver.arguments())
    second = await driver.run(create, **driver.arguments())
    assert "json" in first.headers["content-type"]
    assert int(first.headers["content-length"]) == len(first.http_response.content)
    if driver.edge != "wrap":  # raw responses of a wrapped client are the SDK's own
        assert [raw.headers["x-llmmw-source"] for raw in (first, second)] == ["upstream", "cache"]
        assert [raw.headers["x-llmmw-attempts"] for raw in (first, second)] == ["1", "0"]
        assert first.http_response.content == second.http_response.content


async def test_streaming_responses_can_be_read_as_lines(connect):
    driver = connect()
    arguments = driver.arguments(stream=True)
    lines = []
    if driver.is_async:
        async with driver.resource.with_streaming_response.create(**arguments) as response:
            lines = [line async for line in response.iter_lines()]
    else:

        def read():
            with driver.resource.with_streaming_response.create(**arguments) as response:
                lines.extend(response.iter_lines())

        await driver.run(read)
    assert sum(line.startswith("data:") for line in lines) > 3


async def test_a_hundred_at_once_and_a_thousand_after_ask_once(connect, server):
    driver = connect(CACHED)
    answers = await asyncio.gather(*(driver.ask() for _ in range(100)))
    assert len({driver.text(answer) for answer in answers}) == 1
    assert server.stats(0)["received"] == 1
    if driver.is_async:
        for _ in range(1000):
            await driver.ask()
    else:

        def one_after_another():
            for _ in range(1000):
                driver.resource.create(**driver.arguments())

        await driver.run(one_after_another)
    stats = driver.stats
    assert server.stats(0)["received"] == 1
    assert stats["request_count"] == 1100
    assert stats["cache_hits"] + stats["coalesced"] + stats["answered_upstream"] == 1100


async def test_cache_15_changing_an_answer_changes_no_other(connect):
    driver = connect(CACHED)
    first = await driver.ask()
    kept = first.model_copy(deep=True)
    if driver.sdk == "openai":
        first.choices[0].message.content = "changed"
    else:
        first.content[0].text = "changed"
    second = await driver.ask()
    assert second.model_dump() == kept.model_dump()
    second.usage = None
    assert (await driver.ask()).usage is not None


async def test_streams_are_recorded_and_replayed(connect, server):
    driver = connect(CACHED)
    first, second = await driver.stream(), await driver.stream()
    assert [chunk.model_dump() for chunk in first] == [chunk.model_dump() for chunk in second]
    assert server.stats(0)["received"] == 1
    assert driver.stats["cache_hits"] == 1


async def test_cache_08_another_key_or_version_does_not_share(connect, server):
    driver = connect(CACHED)
    await driver.ask()
    await driver.ask(extra_headers={"anthropic-beta": "b", "openai-beta": "b"})
    assert server.stats(0)["received"] == 2
    await driver.ask(extra_headers={"x-whatever": "1"})
    await driver.ask(timeout=7)
    assert server.stats(0)["received"] == 2
    other = driver.client.with_options(api_key="another")
    resource = other.chat.completions if driver.sdk == "openai" else other.messages
    await driver.run(resource.create, **driver.arguments())
    assert server.stats(0)["received"] == 3
    await driver.run(resource.create, **driver.arguments())
    assert server.stats(0)["received"] == 3


async def test_cache_02_extra_body_counts(connect, server):
    driver = connect(CACHED)
    for choice in ("yes", "no", "yes"):
        await driver.ask(extra_body={"guided_choice": [choice]})
    assert server.stats(0)["received"] == 2


@only("openai", "transport")  # the embedded server lists models in OpenAI's shape
async def test_other_paths_go_straight_through(connect):
    driver = connect(CACHED)
    for _ in range(2):
        page = await driver.run(driver.client.models.list)
        assert page.data[0].id == "llmmw-embedded"
    assert driver.stats["upstream_requests"] == 2
    assert driver.stats["cache_hits"] == driver.stats["cache_misses"] == 0


async def test_security_secrets_are_not_shown(connect, server):
    driver = connect(api_key="sk-very-secret-key")
    await driver.ask()
    shown = f"{driver.engine!r} {driver.stats!r}"
    assert "very-secret" not in shown


@only("async")
def test_async_one_run_per_step(kind, connect_in_run):
    driver = connect_in_run()
    for step in range(3):
        for prompt in ("same", f"step {step}"):
            asyncio.run(driver.ask(prompt))
    assert driver.stats["upstream_requests"] == 4
    asyncio.run(driver.close())


async def test_closing_the_client_closes_the_engine(connect):
    driver = connect()
    await driver.ask()
    await driver.run(driver.client.close)
    assert driver.engine.closed
