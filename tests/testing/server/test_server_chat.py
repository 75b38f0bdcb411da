import json

import msgspec
import openai
import pytest

from llmmw.testing.server.tokens import count

CHAT = "/v1/chat/completions"
MODEL = "llmmw-embedded"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
        },
    },
}


def said(text, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def text(answer):
    return answer["choices"][0]["message"]["content"]


@pytest.fixture
async def sdk(serve):
    server = await serve()
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="k", max_retries=0) as client:
        yield client


async def test_openai_sdk_chat_and_stream_agree(sdk):
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    whole = await sdk.chat.completions.create(**ask)
    stream = await sdk.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == count(streamed)
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason == "stop"
    assert whole.system_fingerprint == "llmmw-embedded-no-model"


async def test_openai_sdk_tool_call_plain_and_streamed(sdk):
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "tools": [WEATHER], "temperature": 0}
    whole = await sdk.chat.completions.create(**ask, tool_choice="required")
    (call,) = whole.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert isinstance(arguments["city"], str)
    assert 1 <= arguments["days"] <= 7
    named = {"type": "function", "function": {"name": "weather"}}
    pieces = []
    async for chunk in await sdk.chat.completions.create(**ask, tool_choice=named, stream=True):
        pieces += chunk.choices[0].delta.tool_calls or []
    assert pieces[0].function.name == "weather"
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments


async def test_marker_calls_a_tool_once_and_its_result_ends_the_loop(serve, post):
    server = await serve()
    ask = said("please [tool] now", tools=[WEATHER])
    _, first, _ = await post(server, CHAT, ask)
    message = first["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "weather"
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    _, second, _ = await post(server, CHAT, {**ask, "messages": [*ask["messages"], message, result]})
    assert text(second)
    _, none, _ = await post(server, CHAT, {**ask, "tool_choice": "none"})
    assert text(none)
    _, plain, _ = await post(server, CHAT, said("no marker", tools=[WEATHER]))
    assert text(plain)


async def test_structured_outputs_satisfy_the_schema(serve, post):
    class Answer(msgspec.Struct):
        name: str
        score: float
        tags: list[str]

    server = await serve()
    schema = msgspec.json.schema(Answer)
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    _, answer, _ = await post(server, CHAT, said("x", response_format=wanted))
    assert msgspec.json.decode(text(answer), type=Answer)
    _, answer, _ = await post(server, CHAT, said("x", response_format={"type": "json_object"}))
    assert isinstance(json.loads(text(answer)), dict)
    _, answer, _ = await post(server, CHAT, said("x", structured_outputs={"json": schema}))
    assert msgspec.json.decode(text(answer), type=Answer)


async def test_greedy_ignores_other_sampling_and_spelling_of_the_body(serve, post):
    server, other = await serve(), await serve()
    _, one, _ = await post(server, CHAT, said("x", seed=1, top_p=0.5))
    _, two, _ = await post(other, CHAT, {"temperature": 0.0, "messages": [{"content": "x", "role": "user"}]})
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    _, three, _ = await post(other, CHAT, {"temperature": 0, "messages": parts})
    assert text(one) == text(two) == text(three)
    _, else_, _ = await post(server, CHAT, said("y"))
    assert text(else_) != text(one)
    server.configure(seed=1)
    _, reseeded, _ = await post(server, CHAT, said("x"))
    assert text(reseeded) != text(one)


async def test_seeded_calls_repeat_and_unseeded_ones_draw_reproducibly(serve, post):
    server, other = await serve(), await serve()
    seeded = [text((await post(server, CHAT, said("x", temperature=1, seed=s)))[1]) for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    draws = [[text((await post(s, CHAT, said("x", temperature=1)))[1]) for _ in range(3)] for s in (server, other)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 3
    server.reset()
    assert text((await post(server, CHAT, said("x", temperature=1)))[1]) == draws[0][0]


async def test_n_choices_differ_and_seed_counts_up(serve, post):
    server = await serve()
    _, three, _ = await post(server, CHAT, said("x", temperature=1, seed=5, n=3))
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert len(set(texts)) == 3
    assert text((await post(server, CHAT, said("x", temperature=1, seed=7)))[1]) == texts[2]


async def test_longer_answers_start_with_shorter_ones_and_stop_cuts(serve, post):
    server = await serve(reply_tokens=20, reply_spread=0)
    _, short, _ = await post(server, CHAT, said("x", max_tokens=5))
    _, long, _ = await post(server, CHAT, said("x", max_completion_tokens=500))
    assert text(long).startswith(text(short))
    assert [a["choices"][0]["finish_reason"] for a in (short, long)] == ["length", "stop"]
    assert [a["usage"]["completion_tokens"] for a in (short, long)] == [5, 20]
    mark = text(long).split()[7]
    _, cut, _ = await post(server, CHAT, said("x", stop=["never", mark]))
    assert mark not in text(cut)
    assert cut["choices"][0]["finish_reason"] == "stop"
    _, endless, _ = await post(server, CHAT, said("x", max_tokens=50, ignore_eos=True))
    assert endless["usage"]["completion_tokens"] == 50
    _, least, _ = await post(server, CHAT, said("x", min_tokens=33))
    assert least["usage"]["completion_tokens"] == 33


async def test_reply_modes(serve, post):
    server = await serve(reply="echo")
    assert text((await post(server, CHAT, said("say this again")))[1]) == "say this again"
    server.configure(reply_text="fixed")
    assert text((await post(server, CHAT, said("x")))[1]) == "fixed"


async def test_logprobs(serve, post):
    server = await serve()
    _, answer, _ = await post(server, CHAT, said("x", logprobs=True, top_logprobs=2, max_tokens=3))
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(item["token"] for item in content) == text(answer)
    assert all(len(item["top_logprobs"]) == 2 for item in content)
    assert (await post(server, CHAT, said("x", logprobs=True, top_logprobs=30)))[0] == 400


async def test_batch_chat_equals_single_calls(serve, post):
    server = await serve()
    talks = [[{"role": "user", "content": word}] for word in "abc"]
    status, batch, _ = await post(server, CHAT + "/batch", {"messages": talks, "temperature": 0, "stream": True})
    singles = [text((await post(server, CHAT, said(word)))[1]) for word in "abc"]
    assert status == 200
    assert [choice["message"]["content"] for choice in batch["choices"]] == singles
    assert server.stats()["requests"][0]["sequences"] == 3
    assert (await post(server, CHAT + "/batch", {"messages": talks, "n": 2}))[0] == 400
    assert (await post(server, CHAT + "/batch", {"messages": []}))[0] == 400


@pytest.mark.parametrize(
    ("body", "status", "kind", "param"),
    [
        (said("x", model="other"), 404, "NotFoundError", "model"),
        (said("x", max_tokens="many"), 400, "Bad Request", "body.max_tokens"),
        ({"model": MODEL}, 400, "Bad Request", "body.messages"),
        (said("x" * 500, max_tokens=50), 400, "BadRequestError", "input_tokens"),
        (said("x", max_tokens=101), 400, "BadRequestError", "max_tokens"),
        (said("x", max_tokens=0), 400, "BadRequestError", "max_tokens"),
        (said("x", n=100001), 400, "BadRequestError", "n"),
        (said("x", n=2), 400, "BadRequestError", "n"),
        (said("x", temperature=-1), 400, "BadRequestError", "temperature"),
        (said("x", top_p=2), 400, "BadRequestError", "top_p"),
        ({"messages": []}, 400, "BadRequestError", "messages"),
        ({"messages": [{"content": "x"}]}, 400, "BadRequestError", "messages"),
        (said("x", response_format={"type": "xml"}), 400, "BadRequestError", "response_format"),
        (said("x", response_format={"type": "json_schema"}), 400, "BadRequestError", "response_format"),
        (said("x", tools=[WEATHER], tool_choice="maybe"), 400, "BadRequestError", "tool_choice"),
        (said("x", tools=[WEATHER], tool_choice={"function": {"name": "no"}}), 400, "BadRequestError", "tool_choice"),
        (said("x", tools=[WEATHER], tool_choice={}), 400, "BadRequestError", "tool_choice"),
        (said("x", tools=[{}]), 400, "BadRequestError", "tools"),
    ],
)
async def test_refusals_speak_vllm(serve, post, body, status, kind, param):
    server = await serve(max_model_len=100)
    got, content, _ = await post(server, CHAT, body)
    assert (got, content["error"]["type"], content["error"]["param"]) == (status, kind, param)
    assert content["error"]["code"] == status
    assert server.stats()["by_outcome"] == {f"http_{status}": 1}


async def test_context_error_in_vllm_words_and_openai_shape(serve, post):
    server = await serve(max_model_len=100, error_style="openai")
    _, content, _ = await post(server, CHAT, said("x" * 500, max_tokens=50))
    assert content["error"]["message"].startswith("This model's maximum context length is 100 tokens. However, ")
    assert content["error"]["code"] == "context_length_exceeded"
    assert content["error"]["type"] == "invalid_request_error"


async def test_broken_json_content_type_size_and_verbs(serve, http):
    server = await serve(max_body_bytes=1000)
    header = {"Content-Type": "application/json"}
    for data, headers, status in (
        (b"{", header, 400),
        (b'{"messages": ' + b"[" * 900, header, 400),
        (b'{"messages": "\xff"}', header, 400),
        (b"{}", {"Content-Type": "text/plain"}, 400),
        (b" " * 2000, header, 413),
    ):
        async with http.post(server.url + CHAT, data=data, headers=headers) as response:
            assert response.status == status
            assert "error" in await response.json()
    async with http.get(server.url + CHAT) as response:
        assert (response.status, await response.json()) == (405, {"detail": "Method Not Allowed"})
    async with http.post(server.url + "/v1/nothing") as response:
        assert (response.status, await response.json()) == (404, {"detail": "Not Found"})


async def test_keys_protect_v1_only(serve, http, post):
    server = await serve(api_keys=("secret", "other"))
    assert (await post(server, CHAT, said("x")))[:2] == (401, {"error": "Unauthorized"})
    right = {"Authorization": "Bearer secret"}
    assert (await post(server, CHAT, said("x"), headers=right))[0] == 200
    assert (await post(server, "/tokenize", {"prompt": "x"}))[0] == 200
    for path, headers, status in (("/v1/models", {}, 401), ("/v1/models", right, 200), ("/metrics", {}, 200)):
        async with http.get(server.url + path, headers=headers) as response:
            assert response.status == status
    assert server.stats()["requests"][1]["key"] == "cret"


async def test_any_model_and_request_ids(serve, post):
    server = await serve(any_model=True)
    _, answer, _ = await post(server, CHAT, said("x", model="mine"), headers={"X-Request-Id": "abc"})
    assert (answer["model"], answer["id"]) == ("mine", "chatcmpl-abc")
    assert server.stats()["requests"][0]["request_id"] == "abc"


async def test_draws_of_old_requests_are_forgotten(serve, post, monkeypatch):
    monkeypatch.setattr("llmmw.testing.server.plan.MAX_DRAWS", 1)
    server = await serve()
    first, other, again = [text((await post(server, CHAT, said(w, temperature=1)))[1]) for w in "xyx"]
    assert first == again != other
