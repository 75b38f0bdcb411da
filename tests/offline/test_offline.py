"""Offline batches on manual time: whatever breaks wherever, one outcome per item and no batch twice."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from llmmw import errors
from llmmw.call import Context, Reply
from llmmw.layers.cache import TTLCache
from llmmw.offline import OfflineBatch, offline_of
from llmmw.offline.run import run
from llmmw.stack import Stack
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import chat_call, error_reply

APIS = ("openai", "anthropic")
SUBMIT = {"openai": "/v1/batches", "anthropic": "/v1/messages/batches"}
LOST = errors.AmbiguousOutcome("the answer was lost")


def texts(outcomes):
    return [outcome.text for outcome in outcomes]


def single_answers(desk, *prompts):
    """What single calls would have been answered."""
    items = {
        json.loads(item.body)["messages"][-1]["content"]: item for batch in desk.world.batches for item in batch.items
    }
    return [Reply(data=msgspec.json.encode(items[prompt].answer)).text for prompt in prompts]


@pytest.mark.parametrize("api", APIS)
def test_batch_12_unordered_results_are_mapped_by_id(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=3), api=api)
        prompts = [f"question {number}" for number in range(20)]
        prompts[3] += " [expire]"
        outcomes = await mine.run(*prompts, temperature=0)
        assert [outcome.ok for outcome in outcomes] == [number != 3 for number in range(20)]
        assert texts(outcomes[:3]) == single_answers(mine, *prompts[:3])
        assert texts(outcomes[4:]) == single_answers(mine, *prompts[4:])
        assert len(set(texts(outcomes))) == 20
        expired = outcomes[3].error
        assert isinstance(expired, errors.UpstreamTimeout)
        assert not expired.sent
        assert "expired" in str(expired)
        assert {outcome.reply.source for outcome in outcomes if outcome.ok} == {"batch"}
        assert all(outcome.reply.usage.output_tokens == 4 for outcome in outcomes if outcome.ok)
        assert mine.told == [(0, 20), (20, 20)]
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_batch_12_every_kind_of_failure_is_a_typed_error_of_its_own(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(max_model_len=200), api=api)
        calls = [
            chat_call("good", model="llmmw-embedded", max_tokens=4),
            chat_call("too long " * 500, model="llmmw-embedded", max_tokens=4),
            chat_call("headers", model="llmmw-embedded", max_tokens=4).replace(native=(("x", "y"),)),
            chat_call("no JSON", model="llmmw-embedded", max_tokens=4, seed=object()),
            chat_call("embed", model="llmmw-embedded", max_tokens=4).replace(op="tokenize"),
        ]
        good, long, headers, broken, unknown = await mine.run_calls(calls)
        assert good.ok
        assert isinstance(long.error, errors.StatusError)
        assert long.error.status == 400
        assert [type(outcome.error) for outcome in (headers, broken, unknown)] == [errors.ConfigError] * 3

    go()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("ahead_s", [0, 7200, -7200])
def test_batch_11_lost_submission_is_found_or_made_again_never_doubled(desk, world, api, moment, ahead_s):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        mine.world.ahead_s = ahead_s
        getattr(mine.world, moment)[SUBMIT[api]] = [LOST]
        began = clock.monotonic()
        outcomes = await mine.run("a", "b", temperature=0)
        assert all(outcome.ok for outcome in outcomes)
        assert len(mine.world.batches) == 1
        # Whether it arrived cannot be known at once; that it did not is believed only after a while.
        assert (clock.monotonic() - began >= 30) == (moment == "before")
        assert mine.world.asked[SUBMIT[api]] == (2 if moment == "before" else 1)

    go()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("where", ["submit", "look", "results"])
def test_batch_11_run_killed_anywhere_is_resumed(desk, world, api, moment, where):
    """A cancellation stands for a kill: whatever the run would do afterwards, it does not."""
    names = {
        "submit": SUBMIT[api],
        "look": f"{SUBMIT[api]}/look",
        "results": "/v1/files/content" if api == "openai" else f"{SUBMIT[api]}/results",
    }

    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=2), api=api)
        getattr(mine.world, moment)[names[where]] = [asyncio.CancelledError()]
        with pytest.raises(asyncio.CancelledError):
            await mine.run("a", "b [expire]", "c", temperature=0)
        if (where, moment) == ("submit", "before"):
            assert mine.world.batches == []
        outcomes = await mine.run("a", "b [expire]", "c", temperature=0)
        assert [outcome.ok for outcome in outcomes] == [True, False, True]
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_second_run_repeats_only_the_failures(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        first = await mine.run("a", "b [expire]", "c", temperature=0)
        assert [outcome.ok for outcome in first] == [True, False, True]
        mine.world.core.configure({"offline_expire": "no more"})
        second = await mine.run("a", "b [expire]", "c", "d", temperature=0)
        assert all(outcome.ok for outcome in second)
        assert [len(batch.items) for batch in mine.world.batches] == [3, 2]
        assert texts(second)[:3:2] == texts(first)[::2]
        third = await mine.run("d", "c", "b [expire]", "a", temperature=0)
        assert texts(third) == texts(second)[::-1]
        assert len(mine.world.batches) == 2

    go()


@pytest.mark.parametrize("api", APIS)
def test_what_exceeds_a_batch_goes_into_several(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api, max_requests=3)
        prompts = [str(number) for number in range(8)]
        outcomes = await mine.run(*prompts, temperature=0)
        assert texts(outcomes) == single_answers(mine, *prompts)
        assert [len(batch.items) for batch in mine.world.batches] == [3, 3, 2]
        sized = desk(clock, world(), api=api, max_bytes=1000)
        outcomes = await sized.run("a" * 300, "b" * 300, "c" * 300, "d" * 2000, temperature=0)
        assert [outcome.ok for outcome in outcomes] == [True, True, True, False]
        assert isinstance(outcomes[3].error, errors.ConfigError)
        name = "/v1/files" if api == "openai" else SUBMIT[api]
        sent = [body for asked, body in sized.world.bodies if asked == name]
        assert len(sent) >= 2
        if api == "anthropic":
            assert all(len(body) <= 1000 for body in sent)

    go()


@pytest.mark.parametrize("api", APIS)
def test_duplicates_are_asked_once_only_where_one_answer_would_do(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        same = await mine.run("a", "a", "b", "a", temperature=0)
        assert [len(batch.items) for batch in mine.world.batches] == [2]
        assert len({*texts(same)}) == 2
        varied = desk(clock, world(), api=api)
        varied.options = OfflineBatch(str(varied.options.directory) + "-2", api=api)
        samples = await varied.run("a", "a", "a", temperature=1)
        assert [len(batch.items) for batch in varied.world.batches] == [3]
        again = await varied.run("a", "a", "a", temperature=1)
        assert texts(again) == texts(samples)
        assert len(varied.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_answers_go_into_the_cache_and_are_not_asked_for_again(desk, world, api, tmp_path):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api, stack=Stack(TTLCache(10_000)))
        calls = [chat_call(prompt, model="llmmw-embedded", max_tokens=500, temperature=0) for prompt in "abc"]
        async with mine.engine() as engine:
            first = await run(engine, mine.world, mine.options, calls[:2], None)
            second = await run(engine, mine.world, OfflineBatch(tmp_path / "elsewhere", api=api), calls[1:], None)
            assert second[0].text == first[1].text
            assert [outcome.reply.source for outcome in second] == ["cache", "batch"]
            if api == "openai":  # one question to single calls too, whose endpoint would refuse here
                assert (await engine.call(calls[0])).text == first[0].text
        assert [len(batch.items) for batch in mine.world.batches] == [2, 1]

    go()


@pytest.mark.parametrize("api", APIS)
def test_deadline_ends_the_waiting_and_not_the_batch(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=1000), api=api)
        until = clock.monotonic() + 100
        calls = [chat_call(p, model="llmmw-embedded", max_tokens=4, context=Context(deadline=until)) for p in "ab"]
        outcomes = await mine.run_calls(calls)
        assert clock.monotonic() == pytest.approx(until)
        assert [type(outcome.error) for outcome in outcomes] == [errors.DeadlineExceeded] * 2
        assert all(outcome.error.sent for outcome in outcomes)
        mine.world.core.configure({"offline_looks": 1})
        assert all(outcome.ok for outcome in await mine.run("a", "b"))
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_polls_come_less_often_and_never_rarer_than_wanted(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=200), api=api, poll=20)
        began = clock.monotonic()
        await mine.run("a")
        took = clock.monotonic() - began
        looks = mine.world.asked[f"{SUBMIT[api]}/look"]
        assert looks == 200
        assert took <= 20 * looks
        assert took >= 20 * (looks - 10)

    go()


@pytest.mark.parametrize("api", APIS)
def test_outage_of_minutes_is_waited_out(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=2), api=api)
        down = [error_reply(503), errors.ConnectionFailed("down"), error_reply(429, retry_after="7"), LOST] * 3
        results = "/v1/files/content" if api == "openai" else f"{SUBMIT[api]}/results"
        mine.world.before = {f"{SUBMIT[api]}/look": [*down], results: [*down], "/v1/files": [*down]}
        assert all(outcome.ok for outcome in await mine.run("a", "b"))
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_a_refused_submission_is_the_outcome_of_its_items(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        mine.world.before[SUBMIT[api]] = [error_reply(401, code="invalid_api_key")]
        outcomes = await mine.run("a", "b")
        assert [outcome.error.status for outcome in outcomes] == [401, 401]
        assert outcomes[0].error is not outcomes[1].error
        assert not list(mine.options.directory.glob("batch-*.json"))
        assert all(outcome.ok for outcome in await mine.run("a", "b"))

    go()


@pytest.mark.parametrize("api", APIS)
def test_submission_that_never_succeeds_leaves_a_manifest_to_look_for(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api, settle=5)
        mine.world.before[SUBMIT[api]] = [LOST] * 3
        outcomes = await mine.run("a", "b")
        assert [type(outcome.error) for outcome in outcomes] == [errors.AmbiguousOutcome] * 2
        assert len(list(mine.options.directory.glob("batch-*.json"))) == 1
        # It turns up late all the same: the next run finds it.
        mine.world.before[SUBMIT[api]] = []
        mine.world.after[SUBMIT[api]] = [asyncio.CancelledError()]
        with pytest.raises(asyncio.CancelledError):
            await mine.run("a", "b")
        assert all(outcome.ok for outcome in await mine.run("a", "b"))
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_batch_that_nobody_knows_is_not_submitted_again_behind_the_users_back(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=5), api=api)
        mine.world.before[f"{SUBMIT[api]}/look"] = [asyncio.CancelledError()]
        with pytest.raises(asyncio.CancelledError):
            await mine.run("a")
        mine.world.core.reset()  # another account, or another server at this address
        with pytest.raises(errors.ConfigError, match=r"batch-.*\.json"):
            await mine.run("a")
        for path in mine.options.directory.glob("batch-*.json"):
            path.unlink()
        assert all(outcome.ok for outcome in await mine.run("a"))

    go()


@pytest.mark.parametrize("api", APIS)
def test_results_that_the_server_no_longer_has_are_asked_for_anew(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        await mine.run("a", "b")
        mine.world.core.reset()
        assert all(outcome.ok for outcome in await mine.run("a", "b"))
        assert len(mine.world.batches) == 1
        assert len(list(mine.options.directory.glob("batch-*.json"))) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_progress_never_goes_back(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=3), api=api, max_requests=2)
        await mine.run(*map(str, range(7)), temperature=0)
        done = [told[0] for told in mine.told]
        assert done == sorted(set(done))
        assert mine.told[-1] == (7, 7)

    go()


@pytest.mark.parametrize("api", APIS)
def test_an_empty_list_asks_nothing(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        assert await mine.run() == []
        assert not mine.world.asked

    go()


def test_settings_that_cannot_work_are_refused():
    for options in ({"api": "x"}, {"poll": 0}, {"settle": -1}, {"max_requests": 0}, {"max_bytes": 0}, {"tries": 0}):
        with pytest.raises(errors.ConfigError, match=next(iter(options))):
            OfflineBatch("x", **options)
    with pytest.raises(errors.ConfigError, match="directory"):
        OfflineBatch("")
    with pytest.raises(errors.ConfigError, match="must be an OfflineBatch or a directory"):
        offline_of(5)
    assert offline_of("x") == OfflineBatch("x")
    assert OfflineBatch("x", poll="1m") == OfflineBatch("x")
