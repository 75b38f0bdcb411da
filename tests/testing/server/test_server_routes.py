import json
import math
from typing import Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from llmmw.testing.server.tokens import count, pieces, words

MODEL = "llmmw-embedded"
TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
USER = [{"role": "user", "content": "hi"}]
CALL = [{"role": "user", "content": "[tool] hi"}]


@pytest.fixture
async def server(serve):
    return await serve()


@pytest.fixture
async def sdk(server):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(server):
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        yield client


async def test_completions_lists_number_choices_by_prompt_then_k(server, sdk, post):
    many = await sdk.completions.create(model=MODEL, prompt=["a", "b"], n=2, seed=3, temperature=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    one = await sdk.completions.create(model=MODEL, prompt="b", seed=4, temperature=1)
    assert many.choices[3].text == one.choices[0].text
    assert many.usage.completion_tokens == sum(count(choice.text) for choice in many.choices)
    ids = await sdk.completions.create(model=MODEL, prompt=[[1, 2, 3], [4]], temperature=0)
    assert ids.usage.prompt_tokens == 4
    flat = await sdk.completions.create(model=MODEL, prompt=[1, 2, 3], temperature=0, logprobs=1)
    assert flat.choices[0].text == ids.choices[0].text
    assert "".join(flat.choices[0].logprobs.tokens) == flat.choices[0].text
    for bad in ([], [[]], [{}], [["a"]], ["a"] * 1025):
        assert (await post(server, "/v1/completions", {"prompt": bad}))[0] == 400
    for bad in ({"logprobs": 30}, {"prompt": ["a"] * 1000, "n": 1000}):
        assert (await post(server, "/v1/completions", {"prompt": "a", **bad}))[0] == 400


async def test_completion_stream_equals_plain(sdk):
    ask = {"model": MODEL, "prompt": ["a", "b"], "temperature": 0, "echo": True}
    plain = await sdk.completions.create(**ask)
    texts, usage = ["", ""], None
    async for chunk in await sdk.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in plain.choices]
    assert texts[1].startswith("b")
    assert usage == plain.usage


async def test_embeddings_base64_and_float_agree(server, sdk, post):
    coded = await sdk.embeddings.create(model=MODEL, input=["a", "b"])
    _, plain, _ = await post(server, "/v1/embeddings", {"input": ["a", "b"]})
    for one, other in zip(coded.data, plain["data"], strict=True):
        assert one.embedding == pytest.approx(other["embedding"], abs=1e-6)
        assert math.isclose(sum(value * value for value in other["embedding"]), 1.0)
    assert plain["data"][0]["embedding"] != plain["data"][1]["embedding"]
    small = await sdk.embeddings.create(model=MODEL, input="a", dimensions=3)
    assert len(small.data[0].embedding) == 3
    for bad in ({"encoding_format": "hex"}, {"dimensions": 0}, {"dimensions": 10**9}):
        assert (await post(server, "/v1/embeddings", {"input": "a", **bad}))[0] == 400


async def test_anthropic_sdk_plain_and_stream_agree(claude):
    ask = {"model": MODEL, "max_tokens": 9, "extra_body": {"temperature": 0}, "system": "be brief", "messages": USER}
    whole = await claude.messages.create(**ask)
    async with claude.messages.stream(**ask) as stream:
        final = await stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert (whole.stop_reason, final.stop_reason) == ("max_tokens", "max_tokens")
    assert final.usage.output_tokens == whole.usage.output_tokens == 9


async def test_anthropic_tool_use(claude):
    ask = {"model": MODEL, "max_tokens": 99, "extra_body": {"temperature": 0}, "messages": CALL, "tools": [TOOL]}
    whole = await claude.messages.create(**ask)
    async with claude.messages.stream(**ask) as stream:
        final = await stream.get_final_message()
    assert whole.stop_reason == "tool_use"
    assert final.content[0].input == whole.content[0].input
    assert isinstance(whole.content[0].input["n"], int)
    forced = {"type": "tool", "name": "look"}
    assert (await claude.messages.create(**{**ask, "messages": USER}, tool_choice=forced)).content[0].name == "look"
    answered = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "ok"}]}
    assert (await claude.messages.create(**{**ask, "messages": [*CALL, answered]})).content[0].type == "text"


class Found(BaseModel):
    n: int
    kind: Literal["a", "b"]
    parts: list[str]


async def test_anthropic_structured_outputs(claude):
    ask = {"model": MODEL, "max_tokens": 99, "extra_body": {"temperature": 0}, "messages": USER}
    parsed = await claude.messages.parse(**ask, output_format=Found)
    assert isinstance(parsed.parsed_output, Found)
    assert parsed.stop_reason == "end_turn"
    async with claude.messages.stream(**ask, output_format=Found) as stream:
        pieces_seen = [event.text async for event in stream if event.type == "text"]
        streamed = await stream.get_final_message()
    assert len(pieces_seen) > 2
    assert streamed.parsed_output == parsed.parsed_output
    assert (await claude.beta.messages.parse(**ask, output_format=Found)).parsed_output == parsed.parsed_output
    form = {"type": "json_schema", "schema": Found.model_json_schema()}
    for wanted in ({"output_config": {"format": form}}, {"extra_body": {"output_format": form}}):
        formed = await claude.messages.create(**{**ask, **wanted})
        Found.model_validate_json(formed.content[0].text)
    called = {**ask, "messages": CALL, "tools": [TOOL], "output_config": {"format": form}}
    assert (await claude.messages.create(**called)).content[0].type == "tool_use"
    cut = await claude.messages.create(**{**ask, "max_tokens": 2}, output_config={"format": form})
    assert cut.stop_reason == "max_tokens"
    effort = await claude.messages.create(**ask, output_config={"effort": "low", "format": None})
    assert not effort.content[0].text.startswith("{")


async def test_anthropic_structured_outputs_refuse_what_is_no_schema(claude):
    form = {"type": "json_schema", "schema": {"type": "object"}}
    for bad in (
        {"output_config": {"format": {"type": "json_object"}}},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"output_config": {"format": "json"}},
        {"output_config": {"format": form}, "output_format": form},
    ):
        with pytest.raises(anthropic.BadRequestError, match="output_"):
            await claude.messages.create(model=MODEL, max_tokens=9, messages=USER, extra_body=bad)


async def test_anthropic_errors_have_their_own_shape(claude, server):
    with pytest.raises(anthropic.NotFoundError) as caught:
        await claude.messages.create(model="other", max_tokens=9, messages=USER)
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        await claude.messages.create(model=MODEL, max_tokens=0, messages=USER)


async def test_responses_plain_stream_tools_and_format(sdk):
    plain = await sdk.responses.create(model=MODEL, input="hi", temperature=0, instructions="x")
    async with sdk.responses.stream(model=MODEL, input="hi", temperature=0, instructions="x") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == plain.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    tool = {"type": "function", "name": "look", "parameters": TOOL["input_schema"], "strict": False}
    called = await sdk.responses.create(model=MODEL, input=CALL, temperature=0, tools=[tool])
    assert called.output[0].type == "function_call"
    async with sdk.responses.stream(model=MODEL, input=CALL, temperature=0, tools=[tool]) as stream:
        again = await stream.get_final_response()
    assert again.output[0].arguments == called.output[0].arguments
    back = [*CALL, {"type": "function_call_output", "call_id": called.output[0].call_id, "output": "ok"}]
    assert (await sdk.responses.create(model=MODEL, input=back, tools=[tool])).output_text
    wanted = {"format": {"type": "json_schema", "name": "s", "schema": TOOL["input_schema"]}}
    formed = await sdk.responses.create(model=MODEL, input="hi", text=wanted)
    assert isinstance(json.loads(formed.output_text)["n"], int)
    cut = await sdk.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert cut.status == "incomplete"


async def test_tokenize_counts_like_usage(server, post):
    _, answer, _ = await post(server, "/tokenize", {"prompt": "hello world"})
    assert answer["count"] == len(answer["tokens"]) == count("hello world") == 3
    _, chat, _ = await post(server, "/v1/chat/completions", {"messages": USER})
    _, rendered, _ = await post(server, "/tokenize", {"messages": USER})
    assert rendered["count"] == chat["usage"]["prompt_tokens"]


async def test_side_routes_say_that_this_is_no_model(server, sdk, http):
    (card,) = (await sdk.models.list()).data
    assert card.id == MODEL
    assert "not a model" in card.owned_by
    for path in ("/health", "/ping"):
        async with http.get(server.url + path) as response:
            assert response.status == 200
            assert "not a model" in response.headers["Server"]
    async with http.get(server.url + "/version") as response:
        assert "embedded" in (await response.json())["version"]
    async with http.get(server.url + "/load") as response:
        assert await response.json() == {"server_load": 0}


async def test_metrics_use_vllm_names(server, post, http):
    await post(server, "/v1/chat/completions", {"messages": USER, "max_tokens": 1})
    async with http.get(server.url + "/metrics") as response:
        page = await response.text()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    label = f'{{engine="0",model_name="{MODEL}"}}'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total"):
        assert float(values[f"vllm:{name}{label}"]) == 0
    assert values[f"vllm:generation_tokens_total{label}"] == "1"
    assert values[f'vllm:request_success_total{{engine="0",model_name="{MODEL}",finished_reason="length"}}'] == "1"
    assert values[f"vllm:e2e_request_latency_seconds_count{label}"] == "1"


async def test_load_header_on_request(server, post):
    for kind, start in (("JSON", 'JSON {"named_metrics": {"kv'), ("TEXT", "TEXT named_metrics.kv")):
        ask = {"headers": {"endpoint-load-metrics-format": kind}}
        _, _, headers = await post(server, "/v1/chat/completions", {"messages": USER}, **ask)
        assert headers["endpoint-load-metrics"].startswith(start)
    told = {"headers": {"endpoint-load-metrics-format": "JSON"}}
    for path, body in (
        ("/v1/chat/completions", {"messages": USER, "stream": True}),
        ("/v1/chat/completions/batch", {"messages": [USER]}),
        ("/v1/chat/completions", {"messages": USER, "n": -1}),
    ):
        _, _, headers = await post(server, path, body, **told)
        assert "endpoint-load-metrics" not in headers, "as vLLM: whole answers only"


def test_tokens_are_runs_of_four_characters():
    assert "".join(pieces("hello world")) == "hello world"
    assert [count(text) for text in ("", "a", "abcd", "abcde")] == [0, 1, 1, 2]
    assert count(words(b"x", 9)) == 9
