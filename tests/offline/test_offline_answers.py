"""What the batch APIs may say, also what they should not: nobody gets another's answer, everybody gets one."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from llmmw import errors
from llmmw.call import Call, Reply
from llmmw.offline import OfflineBatch
from llmmw.offline.dialect import name_of
from llmmw.offline.run import cancel, run
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import chat_call
from llmmw.testing.server.batches import Batch

APIS = ("openai", "anthropic")
CREATE = {"openai": "/v1/batches", "anthropic": "/v1/messages/batches"}
RESULTS = {"openai": "/v1/files/content", "anthropic": "/v1/messages/batches/results"}


def jsonl(*lines):
    body = b"\n".join(line if isinstance(line, bytes) else msgspec.json.encode(line) for line in lines)
    return Reply(data=body, headers=(("content-type", "application/octet-stream"),))


def said(api, custom_id, text):
    if api == "openai":
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = {"object": "chat.completion", "choices": [choice]}
        return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}
    message = {"type": "message", "content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
    return {"custom_id": custom_id, "result": {"type": "succeeded", "message": message}}


@pytest.mark.parametrize("api", APIS)
def test_batch_12_duplicate_unknown_and_missing_ids_fail_only_their_items(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)

        def strange(_):
            ids = [item.custom_id for item in mine.world.batches[0].items]
            lines = [said(api, name, f"answer {number}") for number, name in enumerate(ids)]
            strange = {"custom_id": 5}, b"{cut", b"", [], said(api, "f" * 64, "nobody's")
            return jsonl(lines[2], *strange, lines[1], lines[0], said(api, ids[1], "another"))

        mine.world.after[RESULTS[api]] = [strange]
        outcomes = await mine.run("a", "b", "c", "d", temperature=0)
        assert [outcome.text for outcome in outcomes] == ["answer 0", "", "answer 2", ""]
        assert [type(outcome.error) for outcome in outcomes[1::2]] == [errors.ProtocolError] * 2
        assert "2 results" in str(outcomes[1].error)

    go()


ODD = {
    "openai": [
        {"response": None, "error": None},
        {"response": {"status_code": "200", "body": {}}},
        {"response": {"status_code": 200, "body": {"object": "chat.completion", "choices": []}}},
        {"response": {"status_code": 200, "body": None}},
        {"response": {"status_code": 429, "body": {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}}},
        {"error": {"code": "strange", "message": "who knows"}},
        {"error": {"code": "batch_cancelled", "message": "x"}},
        {"response": [1], "error": "text"},
    ],
    "anthropic": [
        {"result": None},
        {"result": {"type": "new"}},
        {"result": {"type": "succeeded", "message": {"content": None}}},
        {"result": {"type": "succeeded"}},
        {"result": {"type": "errored", "error": {"type": "rate_limit_error", "message": "slow down"}}},
        {
            "result": {
                "type": "errored",
                "error": {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
            }
        },
        {"result": {"type": "canceled"}},
        {"result": {"type": "errored"}},
    ],
}


@pytest.mark.parametrize("api", APIS)
def test_odd_results_are_typed_errors(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)

        def odd(_):
            ids = [item.custom_id for item in mine.world.batches[0].items]
            return jsonl(*({"custom_id": name, **line} for name, line in zip(ids, ODD[api], strict=True)))

        mine.world.after[RESULTS[api]] = [odd]
        outcomes = await mine.run(*map(str, range(8)))
        kinds = [type(outcome.error) for outcome in outcomes]
        assert kinds[:4] == [errors.ProtocolError] * 4
        assert kinds[4] is errors.StatusError
        assert outcomes[4].error.status == 429
        assert kinds[5] is errors.StatusError
        assert kinds[6] is errors.Closed
        assert issubclass(kinds[7], errors.UpstreamError)

    go()


@manual_time
async def test_a_bad_line_fails_alone_and_the_others_are_submitted_without_it(clock, desk, world):
    mine = desk(clock, world(models=("llmmw-embedded",)))
    # The key of a model is part of the file, so the same bad line twice in one file: the server tells which.
    mine.world.after["/v1/batches/look"] = [failed_because_of(mine, 1)]
    outcomes = await mine.run("a", "b", "c", temperature=0)
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, errors.StatusError)
    assert outcomes[1].error.code == "bad_line"
    assert [len(batch.items) for batch in mine.world.batches] == [3, 2]


def failed_because_of(mine, index):
    def answer(_):
        batch = mine.world.batches[-1]
        spoilt = {"code": "bad_line", "line": None if index is None else index + 1, "message": "no", "param": None}
        body = {"id": batch.id, "status": "failed", "errors": {"data": [spoilt]}}
        return Reply(data=msgspec.json.encode(body), headers=(("content-type", "application/json"),))

    return answer


@manual_time
async def test_a_batch_that_is_refused_whole_fails_everybody_with_the_reason(clock, desk, world):
    mine = desk(clock, world())
    mine.world.after["/v1/batches/look"] = [failed_because_of(mine, None)]
    outcomes = await mine.run("a", "b")
    assert [outcome.error.code for outcome in outcomes] == ["bad_line"] * 2
    assert outcomes[0].error is not outcomes[1].error
    assert all(outcome.ok for outcome in await mine.run("a", "b"))


@manual_time
async def test_unknown_models_are_named_by_the_server(clock, desk, world):
    mine = desk(clock, world())
    calls = [chat_call("a", model="llmmw-embedded"), chat_call("a", model="unknown")]
    good, bad = await mine.run_calls(calls)
    assert good.ok
    assert bad.error.code == "model_not_found"
    assert [len(batch.items) for batch in mine.world.batches] == [1, 1]


@manual_time
async def test_endpoints_and_models_have_files_of_their_own(clock, desk, world):
    mine = desk(clock, world(any_model=True))
    calls = [
        chat_call("a", model="m1", max_tokens=3),
        Call("complete", "m1", {"model": "m1", "prompt": "a", "max_tokens": 3}, target="http://fake.test/v1"),
        Call("embed", "m1", {"model": "m1", "input": "a"}, target="http://fake.test/v1"),
        Call("responses", "m1", {"model": "m1", "input": "a"}, target="http://fake.test/v1"),
        chat_call("a", model="m2", max_tokens=3),
    ]
    outcomes = await mine.run_calls(calls)
    assert all(outcome.ok for outcome in outcomes)
    assert outcomes[2].reply.body["data"][0]["embedding"]
    assert len(mine.world.batches) == 5


@pytest.mark.parametrize("api", APIS)
def test_cancelling_keeps_what_is_answered(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=10_000), api=api)
        waiting = asyncio.ensure_future(mine.run("a", "b", "c", "d", temperature=0))
        while not mine.world.asked[f"{CREATE[api]}/look"]:
            await asyncio.sleep(0.1)
        async with mine.engine() as engine:
            assert await cancel(engine, mine.world, mine.options) == 1
        outcomes = await waiting
        assert [outcome.ok for outcome in outcomes] == [True, True, False, False]
        assert [type(outcome.error) for outcome in outcomes[2:]] == [errors.Closed] * 2
        async with mine.engine() as engine:
            assert await cancel(engine, mine.world, mine.options) == 0
        mine.world.core.configure({"offline_looks": 1})
        assert all(outcome.ok for outcome in await mine.run("a", "b", "c", "d", temperature=0))
        assert [len(batch.items) for batch in mine.world.batches] == [4, 2]

    go()


@pytest.mark.parametrize("ended", [True, False])
def test_batch_11_strangers_batch_of_the_same_size_is_not_taken_for_ours(desk, world, tmp_path, ended):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=1 if ended else 50), api="anthropic")
        stranger = OfflineBatch(tmp_path / "stranger", api="anthropic")
        mine.world.before[CREATE["anthropic"]] = [None, errors.AmbiguousOutcome("lost")]
        calls = [chat_call(p, model="llmmw-embedded", max_tokens=4) for p in ("x", "y")]
        async with mine.engine() as engine:
            other = asyncio.ensure_future(run(engine, mine.world, stranger, calls, None))
            while not mine.world.batches or (ended and not other.done()):
                await asyncio.sleep(0.01)
            outcomes = await mine.run("a", "b", temperature=0)
            assert all(outcome.ok for outcome in outcomes)
            assert all(outcome.ok for outcome in await other)
        assert [len(batch.items) for batch in mine.world.batches] == [2, 2]
        assert len({item.custom_id for batch in mine.world.batches for item in batch.items}) == 4

    go()


def test_batch_11_batch_is_found_beyond_the_first_page(desk, world):
    @manual_time
    async def go(clock):
        mine = desk(clock, world())
        mine.world.after["/v1/batches"] = [asyncio.CancelledError()]
        with pytest.raises(asyncio.CancelledError):
            await mine.run("a", temperature=0)
        book = mine.world.core.offline
        for _ in range(120):
            other = Batch(book.new_id("batch_"), "", clock.wall(), [], mine.world.batches[0].asked | {"metadata": {}})
            book.batches[other.id] = other
        assert all(outcome.ok for outcome in await mine.run("a", temperature=0))
        assert len(mine.world.batches) == 121
        assert mine.world.asked["/v1/batches/list"] == 2

    go()


def test_manifests_of_other_servers_and_apis_are_left_alone(desk, world):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=10_000))
        mine.world.before["/v1/batches/look"] = [asyncio.CancelledError()]
        with pytest.raises(asyncio.CancelledError):
            await mine.run("a", temperature=0)
        elsewhere = desk(clock, world())
        elsewhere.world.name = "http://other.test/v1"
        assert (await elsewhere.run("a", temperature=0))[0].ok
        async with elsewhere.engine() as engine:
            assert await cancel(engine, elsewhere.world, elsewhere.options) == 0
        assert len(list(mine.options.directory.glob("batch-*.json"))) == 2

    go()


@pytest.mark.parametrize("name", ["../secret", "..", "a/b", "a?b", "", 5, None, "é", "x" * 300, "a b", "a\n"])
def test_names_that_the_server_gives_cannot_lead_elsewhere(name):
    with pytest.raises(errors.ProtocolError):
        name_of(name)
    assert name_of("batch_67aB-9.x") == "batch_67aB-9.x"
