"""Calls made together: `generate_batch` shares requests where the endpoint takes that, with or without a Batcher."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from llmmw import errors
from llmmw.answer import Usage
from llmmw.call import Call, Context, Outcome, Party, Reply
from llmmw.edges.client import Client
from llmmw.endpoints.base import BatchEndpoint
from llmmw.endpoints.batching import generate_batch
from llmmw.env import Env
from llmmw.layers.base import Bound
from llmmw.layers.batch import Batcher, BoundBatcher, PartyBatcher
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.cache import TTLCache
from llmmw.layers.coalesce import Coalescer
from llmmw.layers.limit import RateLimiter
from llmmw.layers.retry import Retry
from llmmw.layers.route import ErrorRouter
from llmmw.layers.timeout import Timeout
from llmmw.order import Role
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, chat_body, chat_call, error_reply

from .test_batch import BatchServer, flushed, joint_body, sizes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llmmw.call import Handler
    from llmmw.events import Event

JOINT = frozenset({"batch:chat", "batch:complete"})
FULL = (TTLCache(60, sampling="lanes"), Coalescer(), ErrorRouter(), Retry(attempts=2, backoff=0.1), CircuitBreaker())
"""What stands outside the limiter."""


class Server(BatchServer):
    """Takes joint requests while `capabilities` says so."""

    capabilities = JOINT

    async def generate_batch(self, calls: Sequence[Call]) -> list[Outcome]:
        return await generate_batch(self, calls, self._env)


def client_of(server: Server, clock: ManualClock, *layers: Any, events: list[Event] | None = None) -> Client:
    env = Env(clock=clock, seed=1, sinks=() if events is None else (events.append,))
    return Client(server, stack=Stack(*(layers or [Timeout(60)])), model="m", env=env)


def prompts(count: int, first: int = 0) -> list[str]:
    return [f"question {number:03}" for number in range(first, first + count)]


def echoes(asked: Sequence[str]) -> list[str]:
    return [f"echo: {prompt}" for prompt in asked]


def texts(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.text for outcome in outcomes]


# ── the party itself ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_party_tells_when_nobody_is_on_the_way() -> None:
    told: list[int] = []
    party = Party()

    def tell() -> None:
        told.append(party.coming)

    party.watch(tell)
    party.watch(tell)
    first, second = party.join(), party.join()
    assert first.settle() is party
    assert first.settle() is None
    assert not told
    party.close()
    assert (party.is_whole, told) == (True, [])
    assert second.settle() is party
    assert told == [0]


# ── without a Batcher in the stack ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "layers", [(Timeout(60),), (RateLimiter(concurrency=200), Timeout(60)), (*FULL, RateLimiter(concurrency=200))]
)
def test_like_calls_share_requests(layers: tuple[Any, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        events: list[Event] = []
        server, asked = Server(), prompts(200)
        async with client_of(server, clock, *layers, events=events) as client:
            outcomes = await client.generate_batch(messages=asked, temperature=1)
            told = client.get_performance_stats()
        assert texts(outcomes) == echoes(asked)
        assert sizes(server) == [128, 72]
        assert clock.monotonic() == pytest.approx(1001, abs=0.5)  # a limiter begins gently
        assert [size for size, _ in flushed(events)] == [128, 72]
        assert {outcome.reply.source for outcome in outcomes if outcome.reply} == {"batch"}
        assert (told["request_count"], told["upstream_requests"], told["batched_requests"]) == (200, 2, 200)
        assert (told["tokens_in"], told["tokens_out"]) == (2000, 400)
        assert sum(outcome.reply.usage.input_tokens for outcome in outcomes if outcome.reply) == 2000

    run()


@manual_time
async def test_as_many_as_may_be_under_way_go_at_once(clock: ManualClock) -> None:
    for count, slots in ((64, 64), (50, 64), (120, 128)):
        server = Server()
        async with client_of(server, clock, RateLimiter(concurrency=slots)) as client:
            assert texts(await client.generate_batch(messages=prompts(count))) == echoes(prompts(count))
        assert sizes(server) == [count]


@manual_time
async def test_few_calls_go_side_by_side_and_wait_for_nothing(clock: ManualClock) -> None:
    server, asked = Server(), prompts(31)
    async with client_of(server, clock, *FULL) as client:
        outcomes = await client.generate_batch(messages=asked)
        told = client.get_performance_stats()
    assert texts(outcomes) == echoes(asked)
    assert sizes(server) == [1] * 31
    assert clock.monotonic() == 1001
    assert (told["batch_count"], told["upstream_requests"]) == (0, 31)


@manual_time
async def test_calls_that_nobody_made_together_pass(clock: ManualClock) -> None:
    server = Server()
    engine = Stack(*FULL).bind(server, env=Env(clock=clock, seed=1))
    replies = await asyncio.gather(*(engine.call(chat_call(prompt)) for prompt in prompts(64)))
    assert [reply.source for reply in replies] == ["upstream"] * 64
    assert sizes(server) == [1] * 64
    await engine.aclose()


@manual_time
async def test_only_misses_are_sent_and_each_is_stored(clock: ManualClock) -> None:
    server, asked = Server(), prompts(100)
    async with client_of(server, clock, TTLCache(60), Coalescer()) as client:
        await client.generate_batch(messages=asked[:60], temperature=0)
        outcomes = await client.generate_batch(messages=[*asked, *asked[:40]], temperature=0)
        assert texts(outcomes) == echoes([*asked, *asked[:40]])
        assert sizes(server) == [60, 40]
        told = client.get_performance_stats()
        assert (told["cache_hits"], told["cache_misses"]) == (100, 100)
        again = await client.generate_batch(messages=asked, temperature=0)
        assert {outcome.reply.source for outcome in again if outcome.reply} == {"cache"}
    assert sizes(server) == [60, 40]


@manual_time
async def test_the_same_question_twice_is_asked_once(clock: ManualClock) -> None:
    server, asked = Server(), [*prompts(32)] * 4
    async with client_of(server, clock, Coalescer()) as client:
        outcomes = await client.generate_batch(messages=asked, temperature=0)
        assert client.get_performance_stats()["coalesced"] == 96
    assert texts(outcomes) == echoes(asked)
    assert sizes(server) == [32]
    assert clock.monotonic() == 1001  # the 96 who wait for others' flights held up nobody


def test_answers_on_disk_do_not_tear_a_batch_apart(tmp_path: Path) -> None:
    """Reading takes a thread and turns of the loop; how long, and so how many requests, is the machine's say."""

    async def main() -> None:
        server = Server(latency_s=0)
        stack = Stack(TTLCache(60, directory=tmp_path), Coalescer())
        async with Client(server, stack=stack, model="m") as client:
            outcomes = await client.generate_batch(messages=prompts(120), temperature=0)
        assert all(outcome.ok for outcome in outcomes)
        assert sum(sizes(server)) == 120

    asyncio.run(main())


class Trickle(Bound):
    """Lets one call through per tenth of a millisecond, as a disk does."""

    passed = 0

    async def __call__(self, call: Call) -> Reply:
        self.passed += 1
        await asyncio.sleep(self.passed / 10_000)
        return await self.inner(call)


class TrickleLayer:
    role = Role.CUSTOM

    def bind(self, inner: Handler, env: Env) -> Bound:
        return Trickle(inner, env)


@manual_time
async def test_those_at_hand_wait_for_those_on_their_way(clock: ManualClock) -> None:
    server = Server()
    async with client_of(server, clock, TrickleLayer(), Coalescer(), Timeout(60)) as client:
        began = clock.monotonic()
        assert texts(await client.generate_batch(messages=prompts(100))) == echoes(prompts(100))
        assert sizes(server) == [100]
        assert clock.monotonic() - began == pytest.approx(1.01, abs=0.001)  # and no longer than for the last of them


@manual_time
async def test_unlike_calls_do_not_share(clock: ManualClock) -> None:
    server = Server()
    requests = [
        {"messages": [{"role": "user", "content": prompt}], "seed": number % 40 if number % 2 else None}
        for number, prompt in enumerate(prompts(80))
    ]
    async with client_of(server, clock) as client:
        outcomes = await client.map(requests, temperature=1)
    assert texts(outcomes) == echoes(prompts(80))
    assert sorted(sizes(server)) == [1] * 40 + [40]  # those without a seed; of each seed there are two


@pytest.mark.parametrize("fields", [{"n": 2}, {"tools": [{}]}, {"ignore_eos": True}, {"min_tokens": 3}])
def test_what_a_joint_request_gets_wrong_goes_alone(fields: dict[str, Any]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        server = Server()
        async with client_of(server, clock) as client:
            assert all(outcome.ok for outcome in await client.generate_batch(messages=prompts(40), **fields))
        assert sizes(server) == [1] * 40
        assert clock.monotonic() == 1001

    run()


@manual_time
async def test_completions_and_token_ids_share_too(clock: ManualClock) -> None:
    def answer(call: Call) -> Reply:
        listed = call.payload["prompt"]
        choices = [{"index": i, "text": str(t), "finish_reason": "stop"} for i, t in enumerate(listed)]
        return Reply(data=joint_body([], choices=choices, usage=None))

    for items in (prompts(50), [[1, number] for number in range(50)]):
        server = Server()
        server._script = [answer]
        async with client_of(server, clock) as client:
            outcomes = await client.generate_batch(prompts=items)
        assert texts(outcomes) == [str(item) for item in items]
        assert len(server.calls) == 1


@manual_time
async def test_one_bad_item_fails_alone(clock: ManualClock) -> None:
    server, asked = Server(latency_s=0.01), [*prompts(40), "bad", *prompts(20, 50)]
    async with client_of(server, clock, *FULL) as client:
        outcomes = await client.generate_batch(messages=asked)
    assert [outcome.ok for outcome in outcomes] == [True] * 40 + [False] + [True] * 20
    error = outcomes[40].error
    assert isinstance(error, errors.StatusError)
    assert error.status == 400
    assert len(server.calls) <= 1 + 12 + 1


@manual_time
async def test_answers_too_large_together_are_fetched_in_parts(clock: ManualClock) -> None:
    class Wordy(Server):
        async def _answer(self, call: Call, number: int) -> Reply:
            if call.op == "chat_batch" and len(call.payload["messages"]) > 40:
                raise errors.ResponseTooLarge("the body exceeds 64 MiB")
            return await super()._answer(call, number)

    server = Wordy(latency_s=0.1)
    async with client_of(server, clock) as client:
        assert texts(await client.generate_batch(messages=prompts(128), temperature=1)) == echoes(prompts(128))
        assert sizes(server) == [128, 64, 64, 32, 32, 32, 32]
        server.calls.clear()
        assert texts(await client.generate_batch(messages=prompts(128), temperature=1)) == echoes(prompts(128))
        assert max(sizes(server)) < 70  # remembered; with each that is answered one more is tried


@manual_time
async def test_what_takes_too_long_together_is_asked_in_smaller_parts_later(clock: ManualClock) -> None:
    class Slowly(Server):
        async def _answer(self, call: Call, number: int) -> Reply:
            await asyncio.sleep(len(call.payload["messages"]) / 10 if call.op == "chat_batch" else 0)
            return await super()._answer(call, number)

    server = Slowly(latency_s=0)
    layers = (Retry(attempts=3, backoff=0.001, duplicate_ok=True), Timeout(10))
    async with client_of(server, clock, *layers) as client:
        outcomes = await client.generate_batch(messages=prompts(120), temperature=1)
        assert texts(outcomes) == echoes(prompts(120))
        assert sizes(server)[0] == 120
        assert max(sizes(server)[1:]) <= 64


@pytest.mark.parametrize("oversize", ["debt", "refuse"])
def test_a_limit_that_each_call_keeps_refuses_no_batch(oversize: Any) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        server = Server(latency_s=0.1)
        limiter = RateLimiter(tpm=1000, window=1, concurrency=64, adaptive=False, oversize=oversize)
        async with client_of(server, clock, limiter) as client:
            outcomes = await client.generate_batch(messages=prompts(64), temperature=1, max_tokens=20)
        assert texts(outcomes) == echoes(prompts(64))

    run()


@pytest.mark.parametrize("odd", [object(), "lone \ud800", float])
def test_what_is_no_json_spoils_nobodys_request(odd: object) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        server = Server()
        conversations = [[{"role": "user", "content": prompt}] for prompt in [*prompts(40), odd]]
        async with client_of(server, clock) as client:
            outcomes = await client.generate_batch(messages=conversations, temperature=1)
        assert texts(outcomes)[:40] == echoes(prompts(40))
        assert sorted(sizes(server)) == [1, 40]

    run()


@manual_time
async def test_an_endpoint_that_finds_out_late_is_believed_at_once(clock: ManualClock) -> None:
    server = Server()
    server.capabilities = frozenset()
    async with client_of(server, clock, *FULL) as client:
        await client.generate_batch(messages=prompts(40))
        assert sizes(server) == [1] * 40
        server.calls.clear()
        server.capabilities = JOINT
        await client.generate_batch(messages=prompts(40, 100))
        assert sizes(server) == [40]
        server.capabilities = frozenset()
        await client.generate_batch(messages=prompts(40, 200))
        assert sizes(server) == [40] + [1] * 40


@manual_time
async def test_a_server_that_does_not_know_the_path_is_asked_once(clock: ManualClock) -> None:
    server = Server(latency_s=0.1)
    server._script = [error_reply(405)]
    async with client_of(server, clock, Retry(attempts=1)) as client:
        assert all(outcome.ok for outcome in await client.generate_batch(messages=prompts(40)))
        assert sizes(server) == [40] + [1] * 40
        assert all(outcome.ok for outcome in await client.generate_batch(messages=prompts(40)))
    assert sizes(server) == [40] + [1] * 80


@manual_time
async def test_more_items_than_are_in_work_at_a_time_go_in_full_requests(clock: ManualClock) -> None:
    server, asked = Server(latency_s=1), prompts(3000)
    async with client_of(server, clock, Coalescer()) as client:
        outcomes = await client.generate_batch(messages=iter(asked))
    assert texts(outcomes) == echoes(asked)
    assert sizes(server) == [128] * 23 + [56]
    assert clock.monotonic() == pytest.approx(1003)


@pytest.mark.parametrize(("slots", "groups"), [(64, 32), (256, 128), (1000, 128), (512, 128), (40, 1)])
def test_no_more_are_under_way_than_there_may_be(slots: int, groups: int) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        server, asked = Server(latency_s=1), prompts(512)
        layers = (Coalescer(), Retry(), CircuitBreaker(), RateLimiter(concurrency=slots, adaptive=False), Timeout(3))
        most = 0
        async with client_of(server, clock, *layers) as client:
            task = asyncio.ensure_future(client.generate_batch(messages=asked))
            while not task.done():
                await asyncio.sleep(0.5)
                most = max(most, client.get_performance_stats()["layers"]["limit"]["in_use"])
            outcomes = task.result()
        assert texts(outcomes) == echoes(asked)
        assert set(sizes(server)) == {groups}
        assert most == min(slots, 512)

    run()


@manual_time
async def test_how_many_there_may_be_is_read_as_it_changes(clock: ManualClock) -> None:
    server = Server(latency_s=1)
    async with client_of(server, clock, RateLimiter(concurrency=64, adaptive=False)) as client:
        await client.generate_batch(messages=prompts(64))
        client.engine.reconfigure("limit", concurrency=200)
        await client.generate_batch(messages=prompts(201, 100))
        client.engine.reconfigure("limit", concurrency=10)
        await client.generate_batch(messages=prompts(40, 400))
    assert sizes(server) == [64, 100, 100, 1, *[1] * 40]


@manual_time
async def test_the_bound_grows_with_every_call_that_goes_well(clock: ManualClock) -> None:
    """As it does with single calls: twice as many a round trip, until something says that it is too much."""
    server, asked = Server(latency_s=1), prompts(1000)
    async with client_of(server, clock, RateLimiter(concurrency="8-64-512")) as client:
        assert texts(await client.generate_batch(messages=asked)) == echoes(asked)
        assert client.get_performance_stats()["layers"]["limit"]["concurrency"] >= 256
    assert clock.monotonic() < 1007
    assert len(server.calls) < 45  # those that were gathered before it grew are small


@manual_time
async def test_a_wide_request_holds_others_back_until_there_is_room(clock: ManualClock) -> None:
    server = Server(latency_s=1)
    stack = (Batcher(min_size=1, max_size=50), RateLimiter(concurrency=10, adaptive=False))
    async with client_of(server, clock, *stack) as client:
        wide = asyncio.ensure_future(client.generate_batch(messages=prompts(50)))
        await asyncio.sleep(0.5)
        late = asyncio.ensure_future(client.generate_batch(messages=prompts(1, 60)))
        await asyncio.sleep(0.4)
        assert sizes(server) == [50]
        await asyncio.gather(wide, late)
        assert sizes(server) == [50, 1]
        assert client.get_performance_stats()["layers"]["limit"]["in_use"] == 0


@manual_time
async def test_leaving_a_batch_cancels_its_requests(clock: ManualClock) -> None:
    server = Server(latency_s=10)
    async with client_of(server, clock, *FULL) as client:
        task = asyncio.ensure_future(client.generate_batch(messages=prompts(200)))
        await asyncio.sleep(1)
        assert server.in_flight == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        assert (server.in_flight, server.cancelled) == (0, 2)
        (batcher,) = [bound for _, bound in client.engine._bounds if isinstance(bound, BoundBatcher)]
        assert (batcher.gauges(), batcher._gathering.entrance.inside) == ({"waiting": 0, "active": 0, "joint": True}, 0)


@manual_time
async def test_samples_that_are_merged_hold_up_nobody(clock: ManualClock) -> None:
    server = Server()
    server.capabilities = JOINT | {"n"}

    def answer(call: Call) -> Reply:
        assert call.payload["n"] == 8
        return Reply(data=joint_body(["same"] * 8))

    server._script = [answer]
    asked = [*["same"] * 8, *prompts(50)]
    async with client_of(server, clock, Coalescer(merge_samples=True)) as client:
        outcomes = await client.generate_batch(messages=asked, temperature=1)
    assert texts(outcomes) == echoes(asked)
    assert sizes(server) == [1, 50]
    assert clock.monotonic() == 1001


class Slow(Bound):
    """Holds some calls back."""

    async def __call__(self, call: Call) -> Reply:
        if "slow" in str(call.payload):
            await asyncio.sleep(5)
        return await self.inner(call)


class SlowLayer:
    role = Role.CUSTOM

    def bind(self, inner: Handler, env: Env) -> Bound:
        return Slow(inner, env)


@manual_time
async def test_who_is_held_up_elsewhere_holds_up_the_others_no_longer_than_the_interval(clock: ManualClock) -> None:
    server, asked = Server(latency_s=1), [*prompts(50), "slow"]
    began = clock.monotonic()
    async with client_of(server, clock, SlowLayer(), Timeout(60)) as client:
        task = asyncio.ensure_future(client.generate_batch(messages=asked))
        await asyncio.sleep(0.5)
        assert sizes(server) == [50]
        assert texts(await task) == echoes(asked)
    assert clock.monotonic() - began == pytest.approx(6, abs=0.05)


@manual_time
async def test_somebodys_own_layer_inside_sees_single_calls(clock: ManualClock) -> None:
    server = Server()
    async with client_of(server, clock, Timeout(60), SlowLayer()) as client:
        assert all(outcome.ok for outcome in await client.generate_batch(messages=prompts(64)))
    assert sizes(server) == [1] * 64


def test_only_an_endpoint_that_may_take_batches_pays_for_it() -> None:
    def gathering(endpoint: object, *layers: Any) -> int:
        engine = Stack(*layers).bind(endpoint)
        return sum(isinstance(bound, BoundBatcher) for _, bound in engine._bounds)

    assert isinstance(Server(), BatchEndpoint)
    assert not isinstance(FakeUpstream(), BatchEndpoint)
    assert gathering(Server()) == 1
    assert gathering(Server(), Timeout(1)) == 1
    assert gathering(FakeUpstream(), *FULL) == 0
    assert gathering(Server(), Batcher()) == 1
    assert gathering("http://127.0.0.1:9/v1", Timeout(1)) == 1
    assert gathering(FakeUpstream(), ErrorRouter(fallbacks=[Server()]), Timeout(1)) == 2


def test_llmmw_disable_leaves_single_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        server = Server()
        async with client_of(server, clock, *FULL) as client:
            assert all(outcome.ok for outcome in await client.generate_batch(messages=prompts(40)))
        assert sizes(server) == [1] * 40

    monkeypatch.setenv("LLMMW_DISABLE", "1")
    run()


def test_it_is_told_where_it_stands() -> None:
    engine = Stack(Retry(), Timeout(1)).bind(Server())
    assert [role for role, _ in engine._bounds] == ["retry", "batch", "timeout"]
    assert repr(PartyBatcher()) == "PartyBatcher()"


@manual_time
async def test_a_fallback_that_takes_batches_gets_them(clock: ManualClock) -> None:
    first, second = FakeUpstream([errors.ConnectionFailed("down")] * 64, name="http://down.test/v1"), Server()
    env = Env(clock=clock, seed=1)
    stack = Stack(ErrorRouter(fallbacks=[second]), Retry(attempts=1))
    async with Client(first, stack=stack, model="m", env=env) as client:
        outcomes = await client.generate_batch(messages=prompts(64))
    assert texts(outcomes) == echoes(prompts(64))
    assert sizes(second) == [64]


@manual_time
async def test_a_closed_client_says_so_item_by_item(clock: ManualClock) -> None:
    client = client_of(Server(), clock)
    await client.aclose()
    outcomes = await client.generate_batch(messages=prompts(40))
    assert {type(outcome.error) for outcome in outcomes} == {errors.Closed}


# ── with a Batcher ──────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_a_batchers_own_sizes_hold(clock: ManualClock) -> None:
    server = Server()
    async with client_of(server, clock, Batcher(max_size=10, min_size=4)) as client:
        outcomes = await client.generate_batch(messages=prompts(33))
    assert texts(outcomes) == echoes(prompts(33))
    assert sorted(sizes(server)) == [1] * 3 + [10] * 3


@manual_time
async def test_a_small_group_is_full_for_a_batcher_that_allows_no_larger(clock: ManualClock) -> None:
    server = Server()
    async with client_of(server, clock, Batcher(max_size=20)) as client:
        await client.generate_batch(messages=prompts(45))
    assert sorted(sizes(server)) == [1] * 5 + [20] * 2


@manual_time
async def test_among_few_nobody_waits_for_mates(clock: ManualClock) -> None:
    events: list[Event] = []
    server = Server(latency_s=1)
    env = Env(clock=clock, seed=1, sinks=(events.append,))
    engine = Stack(Batcher(flush_interval=10)).bind(server, env=env)
    first = asyncio.ensure_future(engine.call(chat_call("first")))
    await asyncio.sleep(0.5)
    began = clock.monotonic()
    await asyncio.gather(*(engine.call(chat_call(prompt)) for prompt in prompts(20)))
    assert clock.monotonic() - began == 1
    assert flushed(events) == [(1, "idle"), (20, "few")]
    # Where so many are about that a group may come together, they do wait for one.
    many = [asyncio.ensure_future(engine.call(chat_call(prompt))) for prompt in prompts(40)]
    await asyncio.sleep(0.5)
    more = [asyncio.ensure_future(engine.call(chat_call(prompt))) for prompt in prompts(20, 100)]
    await asyncio.sleep(0.2)
    more += [asyncio.ensure_future(engine.call(chat_call(prompt))) for prompt in prompts(20, 120)]
    await asyncio.gather(first, *many, *more)
    assert flushed(events)[2:] == [(40, "idle"), (40, "idle")]
    assert sizes(server) == [1] * 21 + [40, 40]
    await engine.aclose()


@manual_time
async def test_a_full_queue_holds_up_no_party(clock: ManualClock) -> None:
    server = Server(latency_s=1)
    async with client_of(server, clock, Batcher(max_queue=40)) as client:
        outcomes = await client.generate_batch(messages=prompts(80))
    assert texts(outcomes) == echoes(prompts(80))
    assert sizes(server) == [40, 40]
    assert clock.monotonic() == pytest.approx(1002, abs=0.001)


@manual_time
async def test_a_steps_barrier_goes_before_the_party(clock: ManualClock) -> None:
    server = Server(latency_s=1)
    env = Env(clock=clock, seed=1)
    batcher = Batcher(barrier=40, flush_interval=600, min_size=2).bind(server, env.endowed(JOINT))
    server.start(env)
    party = Party()
    calls = [
        chat_call(prompt, context=Context(agent=prompt, step=1)).replace(place=party.join()) for prompt in prompts(39)
    ]
    party.close()
    tasks = [asyncio.ensure_future(batcher(call)) for call in calls]
    await asyncio.sleep(5)
    assert not server.calls
    tasks.append(asyncio.ensure_future(batcher(chat_call("last", context=Context(agent="last", step=1)))))
    await asyncio.gather(*tasks)
    assert sizes(server) == [40]


@manual_time
async def test_prompts_that_begin_alike_stand_together(clock: ManualClock) -> None:
    asked = [f"{topic}: {number}" for number in range(12) for topic in ("weather", "sports", "art")]
    bodies: list[Any] = []
    for order in (asked, asked[::-1]):
        server = Server()
        async with client_of(server, clock) as client:
            assert texts(await client.generate_batch(messages=order)) == echoes(order)
        (call,) = server.calls
        bodies.append(call.payload)
        topics = [conversation[0]["content"].partition(":")[0] for conversation in call.payload["messages"]]
        assert topics == ["art"] * 12 + ["sports"] * 12 + ["weather"] * 12
    assert bodies[0] == bodies[1]


# ── an endpoint on its own ──────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_an_endpoint_answers_a_batch_itself(clock: ManualClock) -> None:
    events: list[Event] = []
    server = Server(latency_s=0.1)
    server.start(Env(clock=clock, seed=1, sinks=(events.append,)))
    calls = [chat_call(prompt) for prompt in [*prompts(40), "bad"]]
    outcomes = await server.generate_batch(calls)
    assert [outcome.ok for outcome in outcomes] == [True] * 40 + [False]
    assert texts(outcomes)[:40] == echoes(prompts(40))
    assert isinstance(outcomes[-1].error, errors.StatusError)
    assert sizes(server)[0] == 41
    assert sum(outcome.reply.usage.total_tokens for outcome in outcomes if outcome.reply) > 0
    assert await server.generate_batch([]) == []


@manual_time
async def test_an_endpoints_batch_that_is_left_leaves_nothing_behind(clock: ManualClock) -> None:
    server = Server(latency_s=10)
    server.start(Env(clock=clock, seed=1))
    server._script = [asyncio.CancelledError("from inside"), *[Reply(data=chat_body("x"))] * 3]
    found = await server.generate_batch([chat_call(prompt) for prompt in prompts(2)])
    assert [type(outcome.error) for outcome in found] == [errors.AmbiguousOutcome, type(None)]
    task = asyncio.ensure_future(server.generate_batch([chat_call(prompt) for prompt in prompts(64)]))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.in_flight == 0


@manual_time
async def test_without_batches_an_endpoint_works_side_by_side(clock: ManualClock) -> None:
    server = Server()
    server.capabilities = frozenset()
    server.start(Env(clock=clock, seed=1))
    outcomes = await server.generate_batch([chat_call(prompt) for prompt in prompts(64)])
    assert texts(outcomes) == echoes(prompts(64))
    assert sizes(server) == [1] * 64
    assert clock.monotonic() == 1001


def test_a_joint_answers_usage_is_divided_without_loss() -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        server = Server()
        server.start(Env(clock=clock, seed=1))
        outcomes = await server.generate_batch([chat_call(prompt) for prompt in prompts(33)])
        total = Usage()
        for outcome in outcomes:
            assert outcome.reply is not None
            total += outcome.reply.usage
        assert total == Usage(330, 66, reported=True)

    run()


def test_what_passes_costs_no_gathering() -> None:
    bound = PartyBatcher().bind(FakeUpstream(), Env())
    assert bound.gauges() == {}
