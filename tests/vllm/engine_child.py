"""What `test_vllm_engine.py` has checked inside vLLM's own environment; not a test module.

    .vllm/venv/bin/python tests/vllm/engine_child.py MODEL SITE_PACKAGES...

Runs every `case_...` on one real engine and prints a line of JSON for each: its name, and what went wrong or null.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
sys.path += sys.argv[2:]  # of llmmw's own environment, behind vLLM's: what is not there

PATIENCE_S = 300
OPTIONS = {
    "served_model_name": "tiny",
    "dtype": "bfloat16",
    "seed": 0,
    "generation_config": "vllm",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "enable_prompt_tokens_details": True,
    "scheduling_policy": "priority",
}
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}},
    "required": ["mood"],
    "additionalProperties": False,
}
CHANGING = {"id", "created", "system_fingerprint"}


def say(name, problem=None):
    print(json.dumps({"case": name, "problem": problem}), flush=True)


def children():
    """Processes below this one, without Python's resource tracker, which lives as long as we do."""
    parents = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if state not in "ZX" and "resource_tracker" not in command:
            parents[int(stat.parent.name)] = int(parent)
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def shared_memory():
    """Shared memory that a process below this one has mapped; other programs have some too."""
    maps = []
    for pid in children():
        with contextlib.suppress(OSError):
            maps.append(pathlib.Path(f"/proc/{pid}/maps").read_text())
    return set(re.findall(r"/dev/shm/psm_\w+", "".join(maps)))


async def until(holds):
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)


class World:
    """One engine and a client of it."""

    def __init__(self, model, **options):
        import llmmw
        from llmmw import Client, Stack, VLLMEngine

        self.llmmw = llmmw
        self.engine = VLLMEngine(model, **OPTIONS, **options)
        stack = Stack.recommended(timeout=PATIENCE_S, concurrency=64)
        self.client = Client(self.engine, model="tiny", stack=stack)

    def unfinished(self):
        return self.engine.gauges()["unfinished"]

    async def refused(self, **request):
        try:
            await self.client.chat(**{"messages": "hello", **request})
        except self.llmmw.StatusError as error:
            return error
        raise AssertionError("it was not refused")

    async def post(self, op, payload):
        """A request as it is, past the client."""
        call = self.llmmw.Call(op, "tiny", {"model": "tiny", **payload}, target=self.engine.name)
        return await self.client.engine.call(call)

    async def tokens(self, text):
        reply = await self.post("complete", {"prompt": text, "max_tokens": 1, "return_token_ids": True})
        return reply.body["choices"][0]["prompt_token_ids"]


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def case_chat(world):
    reply = await world.client.chat("hello there", max_tokens=8, temperature=0)
    body = reply.body
    assert len(reply.text) > 0
    assert (body["object"], body["model"], body["choices"][0]["finish_reason"]) == ("chat.completion", "tiny", "length")
    assert (reply.usage.output_tokens, reply.usage.reported) == (8, True)
    assert reply.usage.input_tokens > 3, "the chat template was not applied"
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
    other = await world.client.chat(conversation, max_tokens=8, temperature=0)
    assert other.usage.input_tokens > reply.usage.input_tokens


async def case_completions_of_text_of_tokens_and_of_lists(world):
    text = await world.client.complete("hello there", max_tokens=8, temperature=0)
    listed = await world.post("complete", {"prompt": ["hello there", "and you"], "max_tokens": 8, "temperature": 0})
    choices = sorted(listed.body["choices"], key=lambda choice: choice["index"])
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["text"] == text.text
    ids = await world.tokens("hello there")
    by_ids = await world.post("complete", {"prompt": ids, "max_tokens": 8, "temperature": 0})
    assert by_ids.text == text.text


async def case_a_batch_is_one_request_and_says_what_single_calls_say(world):
    questions = [f"question {number}" for number in range(40)]
    single = [await world.client.chat(question, max_tokens=4, temperature=0) for question in questions[:3]]
    before = world.client.get_performance_stats()["upstream_requests"]
    outcomes = await world.client.generate_batch(messages=questions, max_tokens=4, temperature=0)
    assert all(outcome.ok for outcome in outcomes)
    assert [outcome.text for outcome in outcomes[:3]] == [reply.text for reply in single]
    assert world.client.get_performance_stats()["upstream_requests"] - before < 40
    joint = await world.post(
        "chat_batch",
        {"messages": [[{"role": "user", "content": q}] for q in questions[:3]], "max_tokens": 4, "temperature": 0},
    )
    assert [choice["message"]["content"] for choice in joint.body["choices"]] == [reply.text for reply in single]


async def case_several_samples_of_one_call(world):
    reply = await world.client.chat("hello", n=3, temperature=1, seed=5, max_tokens=8)
    assert [choice["index"] for choice in reply.body["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in reply.body["choices"]}) > 1


async def case_a_stream_says_what_the_whole_answer_says(world):
    whole = await world.client.chat("tell me more", max_tokens=12, temperature=0)
    pieces = [piece async for piece in world.client.stream("tell me more", max_tokens=12, temperature=0)]
    assert "".join(pieces) == whole.text
    assert len(pieces) > 6
    text = await world.client.complete("tell me more", max_tokens=12, temperature=0)
    pieces = [piece async for piece in world.client.stream(prompt="tell me more", max_tokens=12, temperature=0)]
    assert "".join(pieces) == text.text


async def case_a_raw_stream_has_usage_and_end(world):
    payload = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    call = world.llmmw.Call(
        "chat",
        "tiny",
        {"model": "tiny", **payload, "stream_options": {"include_usage": True}},
        stream=True,
        target=world.engine.name,
    )
    reply = await world.client.engine.call(call)
    data = b"".join([piece async for piece in reply.chunks])
    assert data.endswith(b"data: [DONE]\n\n")
    assert reply.chunks.usage.output_tokens == 3


async def case_sampling_fields_reach_the_engine(world):
    ask = world.client.chat
    first = await ask("dice", temperature=1, seed=11, max_tokens=12)
    assert (await ask("dice", temperature=1, seed=11, max_tokens=12)).text == first.text
    assert (await ask("dice", temperature=1, seed=12, max_tokens=12)).text != first.text
    plain = (await ask("dice", temperature=0, max_tokens=12)).text
    stopped = await ask("dice", temperature=0, max_tokens=12, stop=[plain[4]])
    assert stopped.text == plain[: plain.index(plain[4])]
    assert stopped.body["choices"][0]["finish_reason"] == "stop"
    assert (await ask("dice", temperature=0, max_completion_tokens=2)).usage.output_tokens == 2
    allowed = (await world.tokens("a"))[-1:]
    reply = await ask("dice", temperature=0, max_tokens=4, extra_body={"allowed_token_ids": allowed, "min_tokens": 4})
    assert len(set(reply.text)) == 1, reply.text


async def case_log_probabilities(world):
    reply = await world.client.chat("hello", max_tokens=2, temperature=0, logprobs=True, top_logprobs=2)
    entries = reply.body["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2]


async def case_structured_outputs(world):
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA}}
    reply = await world.client.chat("how are you?", response_format=form, max_tokens=64, temperature=0)
    assert json.loads(reply.text)["mood"] in {"good", "bad"}
    reply = await world.client.chat("x", structured_outputs={"regex": "[ab]{5}"}, max_tokens=16, temperature=0)
    assert set(reply.text) <= {"a", "b"}
    assert len(reply.text) == 5


async def case_what_the_server_answers_the_engine_answers(world):
    """Bodies of both, field by field; only where `make test-vllm` has a server at hand."""
    url = os.environ.get("LLMMW_VLLM_URL")
    if not url:
        return
    chat = {"messages": [{"role": "user", "content": "compare"}], "max_tokens": 8, "temperature": 0}
    text = {"prompt": "compare", "max_tokens": 8, "temperature": 0}
    questions = [
        ("chat", chat),
        ("chat", chat | {"logprobs": True, "top_logprobs": 1}),
        ("chat", chat | {"temperature": -1}),
        ("chat", chat | {"max_tokens": 99_999}),
        ("chat", chat | {"max_tokens": "many"}),
        ("chat", chat | {"messages": [{"role": "user", "content": "long " * 9000}]}),
        ("chat", chat | {"model": "other"}),
        ("chat", chat | {"n": 100_001}),
        ("complete", text),
        ("complete", text | {"prompt": ["a", "b"]}),
        ("chat_batch", chat | {"messages": [chat["messages"], chat["messages"]]}),
        ("/nothing/here", {}),
    ]
    from llmmw import Stack
    from llmmw.endpoints.openai import HTTPEndpoint

    async with Stack().bind(HTTPEndpoint(url)) as server, Stack().bind(world.engine_again()) as engine:
        for op, payload in questions:
            asked = [
                await each.call(world.llmmw.Call(op, "tiny", {"model": "tiny", **payload})) for each in (server, engine)
            ]
            theirs, ours = (
                (reply.status, {key: value for key, value in reply.body.items() if key not in CHANGING})
                for reply in asked
            )
            assert theirs == ours, f"{op} {str(payload)[:200]}: {str(theirs)[:600]} != {str(ours)[:600]}"


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def case_bad_values_are_refused_as_by_the_server(world):
    for request in ({"temperature": -1}, {"n": 100_001}, {"max_tokens": "many"}, {"stop": 3}):
        error = await world.refused(**request)
        assert (error.status, error.fault) == (400, "invalid"), (request, error)
    error = await world.refused(model="other")
    assert (error.status, error.fault) == (404, "invalid"), error


async def case_too_long_is_known_as_that(world):
    error = await world.refused(messages="long " * 9000)
    assert (error.status, error.fault) == (400, "context_length"), error


async def case_an_item_that_is_refused_fails_alone(world):
    prompts = ["a", "long " * 9000, *(f"b{number}" for number in range(40))]
    outcomes = await world.client.generate_batch(prompts=prompts, max_tokens=2)
    assert [position for position, outcome in enumerate(outcomes) if not outcome.ok] == [1]
    assert outcomes[1].error.fault == "context_length"


# ── leaving, urgency, loops ─────────────────────────────────────────────────────────────────────────────────────────


async def case_cancelled_calls_are_aborted(world):
    calls = {
        "chat": world.client.chat("go on", max_tokens=3500),
        "complete": world.client.complete("go on", max_tokens=3500),
        "batch": world.post(
            "chat_batch", {"messages": [[{"role": "user", "content": "go on"}]] * 3, "max_tokens": 3500}
        ),
        "list": world.post("complete", {"prompt": ["go", "on"], "max_tokens": 3500}),
    }
    for kind, work in calls.items():
        task = asyncio.create_task(work)
        await until(lambda: world.unfinished() > 0 or task.done())  # noqa: B023 — awaited here
        assert not task.done(), kind
        task.cancel()
        began = time.monotonic()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: world.unfinished() == 0)
        assert time.monotonic() - began < 120, kind


async def case_a_closed_stream_is_aborted(world):
    stream = world.client.stream("go on", max_tokens=3500)
    async for _ in stream:
        break
    assert world.unfinished() == 1
    await stream.aclose()
    await until(lambda: world.unfinished() == 0)


async def case_urgent_calls_overtake_those_that_wait(world):
    finished = []

    async def ask(name, priority):
        with world.llmmw.using(priority=priority):
            await world.client.complete(f"{name} {len(finished)}", max_tokens=200, temperature=1)
        finished.append(name)

    crowd = [asyncio.create_task(ask(f"patient {number}", 10)) for number in range(40)]
    await until(lambda: world.unfinished() + len(finished) >= 40)
    urgent = [asyncio.create_task(ask(f"urgent {number}", -5)) for number in range(4)]
    await asyncio.gather(*crowd, *urgent)
    last = max(finished.index(f"urgent {number}") for number in range(4))
    assert last < 30, finished


def case_one_loop_after_the_other(world):
    def step(number):
        return asyncio.run(world.client.complete(f"step {number}", max_tokens=2))

    assert all(step(number).text for number in range(3))
    with world.llmmw.SyncClient(world.engine_again(), model="tiny") as client:
        assert client.chat("hello", max_tokens=2).text


async def case_an_engine_that_is_already_made(world):
    theirs = world.engine._hosting.app.state.engine_client
    async with world.llmmw.Client(world.engine_again(), model="tiny") as client:
        mine = await client.chat("hello there", max_tokens=8, temperature=0)
        assert mine.text == (await world.client.chat("hello there", max_tokens=8, temperature=0)).text
        assert [piece async for piece in client.stream("hello there", max_tokens=3)]
    assert not theirs.errored
    assert (await world.client.chat("still there?", max_tokens=2)).text


CASES = {name: work for name, work in globals().items() if name.startswith("case_")}


def again(world):
    """Another endpoint on the same engine, as somebody has who made an AsyncLLM."""
    return world.llmmw.VLLMEngine(world.engine._hosting.app.state.engine_client, enable_prompt_tokens_details=True)


def main():
    model = sys.argv[1]
    processes = children()
    World.engine_again = again
    world = World(model)
    asyncio.run(world.engine.ready())
    for name, work in CASES.items():
        try:
            if asyncio.iscoroutinefunction(work):
                asyncio.run(asyncio.wait_for(work(world), PATIENCE_S))
            else:
                work(world)
            say(name)
        except BaseException:
            say(name, traceback.format_exc())
    check("case_closed_it_leaves_nothing_behind", closes, world, processes)
    world = World(model)
    asyncio.run(world.engine.ready())
    check("case_an_engine_that_dies_is_an_upstream_error", dies, world, processes)


def check(name, work, *values):
    try:
        work(*values)
        say(name)
    except BaseException:
        say(name, traceback.format_exc())


def closes(world, processes):
    memory = shared_memory()
    assert memory, "vLLM shares no memory with its worker any more: look for another sign"
    asyncio.run(world.client.aclose())
    asyncio.run(world.engine.aclose())
    left = children() - processes
    assert not left, [pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
    assert not [name for name in memory if pathlib.Path(name).exists()]
    assert not [thread for thread in threading.enumerate() if "llmmw" in thread.name]


def dies(world, processes):
    llmmw = world.llmmw

    async def die():
        call = asyncio.create_task(world.engine(llmmw.Call("complete", "tiny", {"prompt": "x", "max_tokens": 3500})))
        await until(lambda: world.unfinished() == 1)
        for pid in children() - processes:
            os.kill(pid, signal.SIGKILL)
        try:
            await asyncio.wait_for(call, PATIENCE_S)
        except llmmw.UpstreamError as error:
            print(f"# in flight: {type(error).__name__}: {error}", flush=True)
        else:
            raise AssertionError("the call was answered")
        await until(lambda: world.engine.gauges()["state"] == "failed")
        try:
            await world.client.chat("hello")
        except (llmmw.UpstreamError, llmmw.Refused) as error:
            print(f"# afterwards: {type(error).__name__}: {error}", flush=True)
        await world.client.aclose()

    asyncio.run(die())
    assert not children() - processes


if __name__ == "__main__":
    main()
