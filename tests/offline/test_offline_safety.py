"""Offline batches whose fate is unclear: nothing is paid twice, no stranger's batch is touched, no deadline missed."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from llmmw import errors
from llmmw.call import Context, Reply
from llmmw.layers.cache import TTLCache
from llmmw.offline import OfflineBatch
from llmmw.offline.run import cancel, run
from llmmw.offline.shelf import Shelf
from llmmw.stack import Stack
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import chat_call, error_reply

APIS = ("openai", "anthropic")
SUBMIT = {"openai": "/v1/batches", "anthropic": "/v1/messages/batches"}
RESULTS = {"openai": "/v1/files/content", "anthropic": "/v1/messages/batches/results"}


def calls_until(deadline, *prompts):
    context = Context(deadline=deadline)
    return [chat_call(prompt, model="llmmw-embedded", max_tokens=4, context=context) for prompt in prompts]


def stored(mine):
    return list(mine.options.directory.glob("batch-*.json"))


async def killed_in_submission(mine, api, moment):
    """A run that ends before (or after) the server made its batch, with nobody told."""
    getattr(mine.world, moment)[SUBMIT[api]] = [asyncio.CancelledError()]
    with pytest.raises(asyncio.CancelledError):
        await mine.run("a", "b", temperature=0)


@pytest.mark.parametrize("api", APIS)
def test_a_deadline_ends_also_the_reading_of_earlier_batches(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api, tries=1000)
        assert all(outcome.ok for outcome in await mine.run("a", "b"))
        mine.world.before[f"{SUBMIT[api]}/look"] = [error_reply(503)] * 1000
        until = clock.monotonic() + 100
        outcomes = await mine.run_calls(calls_until(until, "a", "b"))
        assert [type(outcome.error) for outcome in outcomes] == [errors.DeadlineExceeded] * 2
        assert not any(outcome.error.sent for outcome in outcomes)
        assert clock.monotonic() == pytest.approx(until)
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("left_s", [-1.0, 0.0])
def test_nothing_is_submitted_after_the_deadline(desk, world, api, left_s):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        outcomes = await mine.run_calls(calls_until(clock.monotonic() + left_s, "a", "b"))
        assert [type(outcome.error) for outcome in outcomes] == [errors.DeadlineExceeded] * 2
        assert not any(outcome.error.sent for outcome in outcomes)
        assert not mine.world.bodies
        assert not stored(mine)

    go()


@pytest.mark.parametrize("api", APIS)
def test_a_clock_that_was_set_back_does_not_prolong_the_search(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api, settle=30)
        await killed_in_submission(mine, api, "before")
        (path,) = stored(mine)
        path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "sent": clock.wall() + 1e6}))
        before = clock.monotonic()
        assert all(outcome.ok for outcome in await mine.run("a", "b", temperature=0))
        assert clock.monotonic() - before < 40
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_batch_11_our_own_batch_with_strange_results_is_not_submitted_again(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        mine.world.after[RESULTS[api]] = [Reply(data=b'{"custom_id":"nobody"}')] * 3
        outcomes = await mine.run("a", "b", temperature=0)
        assert [type(outcome.error) for outcome in outcomes] == [errors.ProtocolError] * 2
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_a_result_that_names_its_request_twice_is_nobodys(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)

        def ambiguous(_):
            first, second = (item.custom_id for item in mine.world.batches[0].items)
            return Reply(data=f'{{"custom_id":"{first}","custom_id":"{second}"}}'.encode())

        mine.world.after[RESULTS[api]] = [ambiguous] * 3
        outcomes = await mine.run("a", "b", temperature=0)
        assert ["without a result" in str(outcome.error) for outcome in outcomes] == [True, True]

    go()


def test_only_what_is_certainly_ours_is_cancelled(desk, world, tmp_path):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=10_000), api="anthropic")
        await killed_in_submission(mine, "anthropic", "before")
        stranger = OfflineBatch(tmp_path / "stranger", api="anthropic")
        async with mine.engine() as engine:
            other = asyncio.ensure_future(run(engine, mine.world, stranger, calls_until(None, "x", "y"), None))
            while not mine.world.batches:
                await asyncio.sleep(0.1)
            assert await cancel(engine, mine.world, mine.options) == 0
            ours = asyncio.ensure_future(mine.run("a", "b", temperature=0))  # takes it for its own for now
            await asyncio.sleep(300)
            assert await cancel(engine, mine.world, mine.options) == 0
            mine.world.core.configure({"offline_looks": 1})
            assert all(outcome.ok for outcome in [*await other, *await ours])
        assert len(mine.world.batches) == 2

    go()


def test_a_batch_found_by_its_metadata_is_cancelled(desk, world):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=10_000))
        await killed_in_submission(mine, "openai", "after")
        async with mine.engine() as engine:
            assert await cancel(engine, mine.world, mine.options) == 1
        (batch,) = mine.world.batches
        assert batch.canceled

    go()


@pytest.mark.parametrize("status", [404, 401])
def test_cancelling_leaves_out_batches_that_are_gone(desk, world, status):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(offline_looks=10_000), max_requests=1)
        until = clock.monotonic() + 50
        await mine.run_calls(calls_until(until, "a", "b"))
        mine.world.before["/v1/batches/look"] = [error_reply(status)]
        async with mine.engine() as engine:
            if status == 404:
                assert await cancel(engine, mine.world, mine.options) == 1
            else:
                with pytest.raises(errors.StatusError):
                    await cancel(engine, mine.world, mine.options)

    go()


@pytest.mark.parametrize("api", APIS)
def test_hundreds_of_answers_are_kept_and_recalled(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api, stack=Stack(TTLCache(3600)))
        prompts = [f"question {number}" for number in range(450)]
        async with mine.engine() as engine:
            calls = [chat_call(prompt, model="llmmw-embedded", max_tokens=1000, temperature=0) for prompt in prompts]
            first = await run(engine, mine.world, mine.options, calls, None)
            asked = len(mine.world.bodies)
            again = await run(engine, mine.world, mine.options, calls, None)
        assert [outcome.text for outcome in again] == [outcome.text for outcome in first]
        assert {outcome.reply.source for outcome in again} == {"cache"}
        assert len(mine.world.bodies) == asked

    go()


@pytest.mark.parametrize("api", APIS)
def test_batch_11_refusal_after_an_unknown_outcome_leaves_a_manifest_to_look_for(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api, settle=5)
        mine.world.before[SUBMIT[api]] = [errors.AmbiguousOutcome("lost"), error_reply(400)]
        outcomes = await mine.run("a", "b")
        assert [type(outcome.error) for outcome in outcomes] == [errors.StatusError] * 2
        assert len(stored(mine)) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_batch_11_closing_in_the_middle_of_a_submission_leaves_a_manifest_to_look_for(desk, world, api):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        mine.world.after[SUBMIT[api]] = [errors.Closed("closed")]
        outcomes = await mine.run("a", "b")
        assert [type(outcome.error) for outcome in outcomes] == [errors.Closed] * 2
        assert len(stored(mine)) == 1
        assert all(outcome.ok for outcome in await mine.run("a", "b"))
        assert len(mine.world.batches) == 1

    go()


@pytest.mark.parametrize("api", APIS)
def test_a_manifest_that_cannot_be_written_stops_the_submission(desk, world, api, monkeypatch):
    @manual_time
    async def go(clock):
        mine = desk(clock, world(), api=api)
        with monkeypatch.context() as full:
            full.setattr(Shelf, "save", no_space)
            with pytest.raises(errors.ConfigError, match="no space"):
                await mine.run("a")
        assert not mine.world.bodies
        assert all(outcome.ok for outcome in await mine.run("a"))

    go()


def no_space(_shelf, _manifest):
    raise errors.ConfigError("no space")
