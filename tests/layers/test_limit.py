"""The rate limiter: permits are exact, orderly and given back."""

import asyncio
import gc
import weakref

import pytest

from llmmw.algo.gradient import Gradient2
from llmmw.answer import Usage
from llmmw.call import Context, Reply, Urgency
from llmmw.env import Env
from llmmw.errors import Closed, ConfigError, ConnectionFailed, DeadlineExceeded, RateLimited, UpstreamTimeout
from llmmw.events import LimiterPaused, LimiterWaited, RefusedEarly
from llmmw.interrupt import mark_unsent
from llmmw.layers import gate as gates
from llmmw.layers.allowance import Allowance
from llmmw.layers.limit import RateLimiter
from llmmw.layers.timeout import Timeout
from llmmw.order import Role
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply


class Recorder:
    """An upstream that notes when it was asked; service takes `latency_s`."""

    def __init__(self, clock, latency_s=0.0, answer=None):
        self.clock = clock
        self.latency_s = latency_s
        self.answer = answer
        self.times = []
        self.prompts = []
        self.busy = 0
        self.peak = 0

    async def __call__(self, call):
        self.times.append(self.clock.monotonic())
        self.prompts.append(call.payload["messages"][-1]["content"])
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        try:
            await asyncio.sleep(self.latency_s)
            return self.answer(call) if self.answer else answered(3, 2)
        finally:
            self.busy -= 1


def answered(prompt, completion, **fields):
    usage = Usage(prompt, completion, reported=True)
    return Reply(data=chat_body("ok", prompt_tokens=prompt, completion_tokens=completion), usage=usage, **fields)


def limiter(clock, inner, *args, events=None, **options):
    sinks = () if events is None else (events.append,)
    return RateLimiter(*args, **options).bind(inner, Env(clock=clock, seed=1, sinks=sinks))


def most_in_any_window(times, window):
    return max(sum(1 for other in times if at <= other < at + window - 1e-9) for at in times)


def level(bound, name):
    return bound.gauges()[name]


@manual_time
async def test_limit_01_ten_per_second_in_every_sliding_second(clock):
    upstream = Recorder(clock)
    bound = limiter(clock, upstream, rpm=10, window=1)
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call(str(n))) for n in range(100)))
    assert len(upstream.times) == 100
    assert most_in_any_window(upstream.times, 1.0) <= 10
    assert upstream.prompts == [str(n) for n in range(100)]
    assert clock.monotonic() - began < 9.9 * 1.02


@pytest.mark.parametrize(("rpm", "burst"), [(60, 5), (6, 1), (600, 50), (12_000, 50)])
@manual_time
async def test_limit_02_idle_time_saves_up_one_burst(clock, rpm, burst):
    upstream = Recorder(clock)
    bound = limiter(clock, upstream, rpm=rpm)
    await bound(chat_call())
    await asyncio.sleep(600)
    upstream.times.clear()
    calls = [asyncio.ensure_future(bound(chat_call())) for _ in range(burst + 3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(upstream.times) == burst
    await asyncio.gather(*calls)


@manual_time
async def test_sustained_rate_is_at_least_nine_tenths_of_the_limit(clock):
    upstream = Recorder(clock)
    bound = limiter(clock, upstream, rpm=60)
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call()) for _ in range(300)))
    assert most_in_any_window(upstream.times, 60.0) <= 60
    assert (clock.monotonic() - began) < 300 / 0.92


@manual_time
async def test_concurrency_is_never_exceeded_and_always_used(clock):
    upstream = Recorder(clock, latency_s=1.0)
    bound = limiter(clock, upstream, concurrency=4)
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call()) for _ in range(20)))
    assert upstream.peak == 4
    assert clock.monotonic() - began == pytest.approx(5.0)
    assert level(bound, "in_use") == 0


@manual_time
async def test_free_permits_need_no_future_and_tell_no_wait(clock):
    events = []
    bound = limiter(clock, Recorder(clock), rpm=600, tpm=100_000, concurrency=4, events=events)
    await bound(chat_call())
    assert not [event for event in events if isinstance(event, LimiterWaited)]
    assert not asyncio.all_tasks() - {asyncio.current_task()}
    blocked = limiter(clock, Recorder(clock, 1.0), concurrency=1, events=events)
    await asyncio.gather(*(blocked(chat_call(context=Context(agent="a"))) for _ in range(2)))
    assert [(e.wait_s, e.agent) for e in events if isinstance(e, LimiterWaited)] == [(pytest.approx(1.0), "a")]


@manual_time
async def test_smaller_priority_goes_first(clock):
    upstream = Recorder(clock, latency_s=1.0)
    bound = limiter(clock, upstream, concurrency=1)
    order = [(5, "late"), (0, "a"), (0, "b"), (-1, "first")]
    running = asyncio.ensure_future(bound(chat_call("running")))
    await asyncio.sleep(0)
    calls = [bound(chat_call(text, context=Context(priority=p))) for p, text in order]
    await asyncio.gather(running, *calls)
    assert upstream.prompts == ["running", "first", "a", "b", "late"]


@manual_time
async def test_limit_10_a_tenant_does_not_wait_behind_anothers_backlog(clock):
    upstream = Recorder(clock, latency_s=1.0)
    bound = limiter(clock, upstream, concurrency=1)
    backlog = [asyncio.ensure_future(bound(chat_call("a", context=Context(tenant="A")))) for _ in range(1000)]
    await asyncio.sleep(5.5)
    before = len(upstream.prompts)
    await bound(chat_call("b", context=Context(tenant="B")))
    assert upstream.prompts[before:].index("b") < 2
    for task in backlog:
        task.cancel()
    await asyncio.gather(*backlog, return_exceptions=True)
    assert level(bound, "in_use") == 0
    assert level(bound, "waiting") == 0


@manual_time
async def test_limit_03_large_call_behind_endless_small_ones(clock):
    upstream = Recorder(clock, answer=lambda call: answered(call.payload["size"], 0))
    bound = limiter(clock, upstream, tpm=100_000, age_bound=5)

    def sized(tokens, name):
        return chat_call(name + "x" * (4 * tokens - 40), size=tokens, max_tokens=1)

    async def small():
        while True:
            await bound(sized(5_000, "s"))
            await asyncio.sleep(0.5)

    crowd = [asyncio.ensure_future(small()) for _ in range(20)]
    await asyncio.sleep(30)
    began = clock.monotonic()
    await bound(sized(60_000, "L"))
    assert clock.monotonic() - began <= 60 + 5 + 60  # who came before, age bound, one window
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)


@manual_time
async def test_limit_04_a_call_above_the_whole_limit_runs_alone_or_is_refused(clock):
    upstream = Recorder(clock, answer=lambda call: answered(900, 100))
    events = []
    strict = limiter(clock, upstream, tpm=500, oversize="refuse", events=events)
    with pytest.raises(RateLimited, match="more than the whole limit of 500"):
        await strict(chat_call("x" * 4000))
    assert RefusedEarly("limit", "oversize") in events
    bound = limiter(clock, upstream, tpm=500)
    await bound(chat_call("x" * 4000))
    began = clock.monotonic()
    await bound(chat_call("x" * 4000))
    assert clock.monotonic() - began == pytest.approx(60, abs=0.01)


@manual_time
async def test_limit_05_cancelled_while_waiting_costs_nothing(clock):
    upstream = Recorder(clock, latency_s=0.0)
    bound = limiter(clock, upstream, rpm=2, tpm=10_000)
    await bound(chat_call())
    spent = level(bound, "total_in_window")
    waiting = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert level(bound, "requests_in_window") == 1
    assert level(bound, "total_in_window") == spent
    assert level(bound, "waiting") == 0
    await asyncio.sleep(29.99)
    began = clock.monotonic()
    await bound(chat_call())
    assert clock.monotonic() - began < 0.1


@manual_time
async def test_limit_05_cancelled_after_sending_is_kept(clock):
    bound = limiter(clock, Recorder(clock, latency_s=5.0), rpm=60, tpm=10_000, concurrency=1)
    call = asyncio.ensure_future(bound(chat_call(max_tokens=100)))
    await asyncio.sleep(1)
    reserved = level(bound, "total_in_window")
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert reserved > 100
    assert level(bound, "total_in_window") == reserved
    assert level(bound, "requests_in_window") == 1
    assert level(bound, "in_use") == 0


@manual_time
async def test_limit_05_cancelled_before_a_byte_was_sent_is_refunded(clock):
    async def connecting(call):
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError as error:
            mark_unsent(error)
            raise

    bound = limiter(clock, Timeout(60).bind(connecting, Env(clock=clock)), rpm=60, tpm=10_000, concurrency=1)
    call = asyncio.ensure_future(bound(chat_call(max_tokens=100)))
    await asyncio.sleep(1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert (level(bound, "total_in_window"), level(bound, "requests_in_window"), level(bound, "in_use")) == (0, 0, 0)


@manual_time
async def test_limit_05_permit_that_arrives_with_the_cancellation_goes_to_the_next(clock):
    def answer(call):
        if call.payload["messages"][-1]["content"] == "a":
            asyncio.get_running_loop().call_soon(second.cancel)  # runs between the grant and second's waking up
        return answered(3, 2)

    upstream = Recorder(clock, latency_s=1.0, answer=answer)
    bound = limiter(clock, upstream, concurrency=1, tpm=10_000)
    first, second, third = (asyncio.ensure_future(bound(chat_call(name))) for name in "abc")
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert second.cancelled()
    assert upstream.prompts == ["a", "c"]
    assert level(bound, "in_use") == 0
    assert level(bound, "total_in_window") == 10


@pytest.mark.parametrize("error", [ConnectionFailed("pool"), RateLimited("inner")])
@manual_time
async def test_limit_05_not_sent_gives_everything_back(clock, error):
    upstream = FakeUpstream([error])
    bound = limiter(clock, upstream, rpm=1, tpm=1000, concurrency=1)
    with pytest.raises(type(error)):
        await bound(chat_call())
    assert level(bound, "requests_in_window") == 0
    assert level(bound, "total_in_window") == 0
    began = clock.monotonic()
    await bound(chat_call())
    assert clock.monotonic() == began


@manual_time
async def test_limit_05_sent_and_failed_is_kept_refused_returns_tokens_only(clock):
    events = []
    bound = limiter(clock, FakeUpstream([error_reply(500), error_reply(429)]), rpm=60, tpm=1000, events=events)
    await bound(chat_call(max_tokens=10))
    kept = level(bound, "total_in_window")
    assert kept >= 10
    reply = await bound(chat_call(max_tokens=10))
    assert reply.status == 429
    assert level(bound, "total_in_window") == kept
    assert level(bound, "requests_in_window") == 2
    assert [type(event) for event in events if isinstance(event, LimiterPaused)] == [LimiterPaused]


@manual_time
async def test_limit_06_usage_above_the_estimate_is_a_debt_that_passes(clock):
    upstream = Recorder(clock, answer=lambda call: answered(10, 5000))
    bound = limiter(clock, upstream, tpm=1000)
    await bound(chat_call(max_tokens=100))
    assert level(bound, "total_in_window") == 5010
    began = clock.monotonic()
    await bound(chat_call(max_tokens=100))
    assert clock.monotonic() - began == pytest.approx(60, abs=0.01)


@manual_time
async def test_limit_07_stream_without_usage_keeps_the_estimate(clock):
    def stream(call):
        chunks = [chunk for chunk in chat_chunks("a b c") if b"usage" not in chunk]
        return Reply(chunks=ScriptedChunks(chunks))

    bound = limiter(clock, FakeUpstream([stream, stream]), tpm=10_000, concurrency=1)
    reply = await bound(chat_call(stream=True, max_tokens=50))
    assert level(bound, "in_use") == 1
    reserved = level(bound, "total_in_window")
    assert [chunk async for chunk in reply.chunks]
    assert level(bound, "in_use") == 0
    assert level(bound, "total_in_window") == reserved >= 50
    assert level(bound, "usage_estimated") == 1


@manual_time
async def test_stream_settles_and_frees_its_slot_at_the_end_of_the_body(clock):
    bound = limiter(clock, FakeUpstream(), tpm=10_000, concurrency=1)
    reply = await bound(chat_call("a b", stream=True))
    assert level(bound, "in_use") == 1
    async for _ in reply.chunks:
        pass
    await reply.chunks.aclose()
    assert level(bound, "in_use") == 0
    assert level(bound, "total_in_window") == 3 + 3
    closed = await bound(chat_call("a b", stream=True))
    await closed.chunks.aclose()
    assert level(bound, "in_use") == 0


@manual_time
async def test_limit_09_limits_change_while_running(clock):
    upstream = Recorder(clock)
    bound = limiter(clock, upstream, rpm=6)
    calls = [asyncio.ensure_future(bound(chat_call())) for _ in range(70)]
    await asyncio.sleep(25)
    assert len(upstream.times) == 3
    bound.reconfigure(rpm=600)
    await asyncio.sleep(1)
    assert 40 < len(upstream.times) < 70
    bound.reconfigure(rpm=6)
    before = len(upstream.times)
    await asyncio.sleep(58)
    assert len(upstream.times) == before < 70
    await asyncio.gather(*calls)
    assert clock.monotonic() - upstream.times[before - 1] > 60
    with pytest.raises(ConfigError, match="not added or removed"):
        bound.reconfigure(tpm=5)
    with pytest.raises(ConfigError, match="rpm"):
        bound.reconfigure(rpm=-1)


@manual_time
async def test_limit_13_refusals_lower_the_concurrency_to_one_at_least_and_long_answers_do_not(clock):
    replies = [error_reply(503) for _ in range(10)]
    upstream = FakeUpstream(replies)
    bound = limiter(clock, upstream, concurrency=8)
    for _ in range(10):
        await bound(chat_call())
        await asyncio.sleep(1)
    assert level(bound, "concurrency") == 1
    slow = limiter(clock, Recorder(clock, latency_s=100), concurrency=8)
    await asyncio.gather(*(slow(chat_call()) for _ in range(16)))
    assert level(slow, "concurrency") == 8
    fixed = limiter(clock, FakeUpstream([error_reply(503)]), concurrency=8, adaptive=False)
    await fixed(chat_call())
    assert level(fixed, "concurrency") == 8


@manual_time
async def test_limit_14_one_key_two_models_and_two_keys_one_model(clock):
    for per, buckets in (("key+model", 4), ("key", 2), ("model", 2), ("endpoint", 1)):
        bound = limiter(clock, Recorder(clock), rpm=10, per=per)
        for namespace in ("k1", "k2"):
            for model in ("m1", "m2"):
                await asyncio.wait_for(bound(chat_call(model=model).replace(namespace=namespace)), 30)
        assert level(bound, "buckets") == buckets


@manual_time
async def test_limit_15_cached_prompt_tokens_are_free_where_configured(clock):
    def cached(call):
        return Reply(data=b"{}", usage=Usage(900, 10, cached_tokens=800, reported=True))

    for policy, expected in (("charged", 900), ("free", 100)):
        bound = limiter(clock, FakeUpstream([cached]), input_tpm=10_000, output_tpm=10_000, cached_input=policy)
        await bound(chat_call())
        assert level(bound, "input_in_window") == expected
        assert level(bound, "output_in_window") == 10


@manual_time
async def test_refusal_pauses_everybody_until_the_server_said(clock):
    events = []
    upstream = FakeUpstream([error_reply(429, retry_after="10")])
    bound = limiter(clock, upstream, rpm=600, events=events)
    began = clock.monotonic()
    await bound(chat_call())
    await asyncio.gather(*(bound(chat_call()) for _ in range(5)))
    assert 10 <= clock.monotonic() - began <= 12
    paused = [event for event in events if isinstance(event, LimiterPaused)]
    assert len(paused) == 1
    assert 10 <= paused[0].pause_s <= 11
    assert level(bound, "pauses") == 1


@manual_time
async def test_deadline_that_cannot_be_kept_is_refused_at_once(clock):
    events = []
    bound = limiter(clock, Recorder(clock), rpm=1, events=events)
    await bound(chat_call())
    began = clock.monotonic()
    hopeless = chat_call(context=Context(deadline=began + 30))
    with pytest.raises(RateLimited) as refused:
        await bound(hopeless)
    assert clock.monotonic() == began
    assert refused.value.retry_at == pytest.approx(began + 60, abs=0.5)
    assert events[-1] == RefusedEarly("limit", "deadline")
    await bound(chat_call(context=Context(deadline=began + 61)))
    with pytest.raises(RateLimited):
        await bound(chat_call().replace(rate_wait_s=5.0))


@manual_time
async def test_waiters_whose_deadline_lies_in_a_new_pause_are_refused(clock):
    upstream = FakeUpstream([error_reply(429, retry_after="30")], latency_s=0.5)
    bound = limiter(clock, upstream, concurrency=1)
    first = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0)
    waiter = asyncio.ensure_future(bound(chat_call(context=Context(deadline=clock.monotonic() + 10))))
    patient = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0.6)
    assert waiter.done()
    with pytest.raises(RateLimited) as refused:
        await waiter
    assert 29 < refused.value.retry_after_s < 34
    await asyncio.gather(first, patient)


@manual_time
async def test_coalesce_08_a_flight_moves_up_in_the_queue(clock):
    upstream = Recorder(clock, latency_s=1.0)
    bound = limiter(clock, upstream, concurrency=1)
    urgency = Urgency(priority=9)
    running = asyncio.ensure_future(bound(chat_call("running")))
    await asyncio.sleep(0)
    others = [asyncio.ensure_future(bound(chat_call(name, context=Context(priority=1)))) for name in "ab"]
    flight = asyncio.ensure_future(bound(chat_call("flight").replace(urgency=urgency)))
    await asyncio.sleep(0.1)
    urgency.join(Context(priority=0))
    await asyncio.gather(running, flight, *others)
    assert upstream.prompts == ["running", "flight", "a", "b"]
    assert urgency._listeners == []


@manual_time
async def test_shedding_fails_the_waiters_of_a_dead_model_only(clock):
    bound = limiter(clock, Recorder(clock, latency_s=1.0), concurrency=1, per="endpoint")
    running = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0)
    doomed = [asyncio.ensure_future(bound(chat_call(model="dead"))) for _ in range(3)]
    other = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0.1)
    assert bound.shed(chat_call(model="dead"), lambda: ConnectionFailed("dead")) == 3
    results = await asyncio.gather(*doomed, return_exceptions=True)
    assert all(isinstance(result, ConnectionFailed) for result in results)
    await asyncio.gather(running, other)
    assert level(bound, "in_use") == 0


@manual_time
async def test_closing_refuses_who_still_waits(clock):
    bound = limiter(clock, Recorder(clock), rpm=1)
    await bound(chat_call())
    waiting = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(1)
    await bound.aclose()
    await bound.aclose()
    with pytest.raises(Closed):
        await waiting
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@manual_time
async def test_timeouts_lower_the_concurrency(clock):
    bound = limiter(clock, FakeUpstream([UpstreamTimeout("slow")]), concurrency="2-10-20")
    with pytest.raises(UpstreamTimeout):
        await bound(chat_call())
    assert level(bound, "concurrency") == 7
    assert level(bound, "in_use") == 0


def test_bad_settings_name_the_option():
    for options in (
        {"rpm": 0}, {"tpm": -1}, {"rpm": 1.5}, {"concurrency": 0}, {"concurrency": "4-2-8"}, {"concurrency": "many"},
        {"window": 0}, {"burst": 5}, {"rpm": 5, "burst": 6}, {"per": "user"}, {"oversize": "hang"}, {"age_bound": "x"},
        {"weights": {"a": 0}}, {"reserve": "some"}, {"cached_input": "half"},
        {"concurrency": "1-2-3", "adaptive": False}, {"rps": 5},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(options))):
            RateLimiter(**options)


def test_settings_compare_print_and_hash():
    layer = RateLimiter(600, 200_000, 64, weights={"a": 2})
    assert layer == RateLimiter(rpm=600, tpm=200_000, concurrency=64, weights={"a": 2})
    assert hash(layer) == hash(RateLimiter(600, 200_000, 64))
    assert "rpm=600" in repr(layer)
    assert layer.role is Role.LIMIT


@manual_time
async def test_limit_05_returned_units_never_come_on_top_of_a_full_burst(clock):
    failing = [ConnectionFailed("pool") for _ in range(5)]
    upstream = FakeUpstream(failing)
    bound = limiter(clock, upstream, rpm=60)
    await asyncio.gather(*(bound(chat_call()) for _ in range(5)), return_exceptions=True)
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call()) for _ in range(5)))  # on credit
    assert clock.monotonic() == began
    await asyncio.gather(*(bound(chat_call()) for _ in range(2)), return_exceptions=True)
    upstream._script.extend([ConnectionFailed("pool")] * 2)
    await asyncio.gather(*(bound(chat_call()) for _ in range(2)), return_exceptions=True)
    await asyncio.sleep(300)
    began, asked = clock.monotonic(), len(upstream.calls)
    tasks = [asyncio.ensure_future(bound(chat_call())) for _ in range(8)]
    await asyncio.sleep(0.01)
    assert len(upstream.calls) - asked == 5
    await asyncio.gather(*tasks)


@manual_time
async def test_limit_05_credits_do_not_break_the_window(clock):
    sent = []

    async def flaky(call):
        if len(sent) % 3 == 1 and not call.native:
            raise ConnectionFailed("pool")
        sent.append(clock.monotonic())
        return answered(1, 1)

    bound = limiter(clock, flaky, rpm=12, window=10)

    async def caller(n):
        await asyncio.sleep(n * 0.37)
        try:
            await bound(chat_call())
        except ConnectionFailed:
            await bound(chat_call().replace(native=True))

    await asyncio.gather(*(caller(n) for n in range(120)))
    assert len(sent) == 120
    assert most_in_any_window(sent, 10) <= 12


@manual_time
async def test_a_waiter_that_gives_up_lets_the_next_one_pass(clock):
    upstream = Recorder(clock, answer=lambda call: answered(10, 0))
    bound = limiter(clock, upstream, tpm=1000, age_bound=0.001)
    await bound(chat_call("x" * 3600, max_tokens=1))
    bound.reconfigure(tpm=400)
    large = asyncio.ensure_future(bound(chat_call("x" * 1580, max_tokens=1)))
    await asyncio.sleep(0.01)
    small = asyncio.ensure_future(bound(chat_call("x" * 360, max_tokens=1)))
    await asyncio.sleep(0.01)
    assert not small.done()
    large.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert small.done()


@manual_time
async def test_headers_lower_the_limit_at_once_and_raise_it_slowly(clock):
    def told(limit, remaining):
        headers = (
            ("x-ratelimit-limit-requests", str(limit)),
            ("x-ratelimit-remaining-requests", str(remaining)),
            ("x-ratelimit-reset-requests", "60s"),
            ("x-ratelimit-limit-tokens", "-1"),
        )
        return lambda call: answered(1, 1, headers=headers)

    upstream = FakeUpstream([told(12, 11)])
    bound = limiter(clock, upstream, rpm=600)
    await bound(chat_call())
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call()) for _ in range(12)))
    assert clock.monotonic() - began > 50
    assert level(bound, "headers_ignored") == 1
    upstream._script.extend(told(600, 500) for _ in range(400))
    began, asked = clock.monotonic(), len(upstream.calls)
    tasks = [asyncio.ensure_future(bound(chat_call())) for _ in range(300)]
    await asyncio.sleep(60)
    assert len(upstream.calls) - asked < 60
    await asyncio.gather(*tasks)
    assert clock.monotonic() - began < 600


@manual_time
async def test_what_is_left_counts_also_where_the_limit_is_not_told(clock):
    headers = (("x-ratelimit-remaining-requests", "2"), ("x-ratelimit-remaining-tokens", "-1"))
    upstream = FakeUpstream([lambda call: answered(10, 0, headers=headers)])
    bound = limiter(clock, upstream, rpm=600, tpm=1_000_000)
    await bound(chat_call())
    began = clock.monotonic()
    calls = [asyncio.ensure_future(bound(chat_call())) for _ in range(5)]
    await asyncio.sleep(50)
    assert len(upstream.calls) == 3
    await asyncio.gather(*calls)
    assert clock.monotonic() - began == pytest.approx(60, abs=0.1)
    assert level(bound, "headers_ignored") == 1


@manual_time
async def test_limit_03_output_that_is_drafted_several_times_is_reserved_as_often(clock):
    bound = limiter(clock, FakeUpstream(latency_s=1.0), tpm=100_000, reserve="max")
    pending = asyncio.ensure_future(bound(chat_call(max_tokens=1000, n=2, best_of=5)))
    await asyncio.sleep(0)
    assert 5000 < level(bound, "total_in_window") < 5100
    await pending


@manual_time
async def test_limit_10_agents_of_one_tenant_take_turns_too(clock):
    upstream = Recorder(clock, latency_s=1.0)
    bound = limiter(clock, upstream, concurrency=1, weights={"vip": 3})

    def queue(prompt, count, **who):
        calls = [bound(chat_call(prompt, context=Context(**who))) for _ in range(count)]
        return [asyncio.ensure_future(call) for call in calls]

    tasks = queue("greedy", 200, tenant="T", agent="greedy")
    await asyncio.sleep(3.5)
    before = len(upstream.prompts)
    tasks += queue("modest", 1, tenant="T", agent="modest") + queue("other", 40, tenant="U", agent="x")
    tasks += queue("vip", 40, agent="vip")
    await asyncio.sleep(40)
    order = upstream.prompts[before:]
    assert order.index("modest") <= 6  # one of two agents of one of three tenants, one of which counts three times
    assert 20 <= order.count("vip") <= 26
    assert abs(order.count("other") - order.count("greedy")) <= 3
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert level(bound, "waiting") == 0


@manual_time
async def test_what_others_spend_under_the_same_limit_counts(clock):
    headers = (
        ("x-ratelimit-limit-tokens", "1000"),
        ("x-ratelimit-remaining-tokens", "50"),
        ("x-ratelimit-reset-tokens", "20s"),
    )
    bound = limiter(clock, FakeUpstream([lambda call: answered(10, 0, headers=headers)]), tpm=1000)
    await bound(chat_call(max_tokens=1))
    began = clock.monotonic()
    await bound(chat_call("x" * 400, max_tokens=1))
    assert clock.monotonic() - began == pytest.approx(20, abs=0.01)
    deaf = limiter(clock, FakeUpstream([lambda call: answered(10, 0, headers=headers)]), tpm=1000, headers=False)
    await deaf(chat_call(max_tokens=1))
    began = clock.monotonic()
    await deaf(chat_call("x" * 400, max_tokens=1))
    assert clock.monotonic() == began


def test_limit_12_one_loop_after_another_keeps_the_levels():
    from llmmw.testing.clock import ManualClock

    clock = ManualClock()
    times = []

    async def inner(call):
        times.append(clock.monotonic())
        return answered(3, 2)

    bound = limiter(clock, inner, rpm=4, tpm=1000, window=10, concurrency=2)

    async def burst(count, patience):
        tasks = [asyncio.ensure_future(bound(chat_call())) for _ in range(count)]
        await asyncio.wait(tasks, timeout=patience)

    clock.run(burst(4, 2.6))  # ends with waiters
    assert len(times) == 2
    for _ in range(3):
        bound.rehome()
        clock.run(burst(3, 6.0))
    bound.rehome()
    assert most_in_any_window(times, 10) <= 4
    assert level(bound, "in_use") == 0
    assert level(bound, "waiting") == 0
    assert level(bound, "requests_in_window") > 0


@manual_time
async def test_permit_of_a_dead_loop_is_not_given_back_twice(clock):
    release = asyncio.Event()

    async def inner(call):
        await release.wait()
        return answered(3, 2)

    bound = limiter(clock, inner, concurrency=1)
    old = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0)
    bound.rehome()
    new = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0)
    assert level(bound, "in_use") == 1
    release.set()
    await asyncio.gather(old, new)
    assert level(bound, "in_use") == 0


@manual_time
async def test_idle_buckets_are_forgotten_when_there_are_too_many(clock):
    bound = limiter(clock, Recorder(clock), rpm=10, window=1)
    for n in range(1500):
        await bound(chat_call().replace(namespace=f"tenant {n}"))
        if n == 700:
            await asyncio.sleep(2)
    assert level(bound, "buckets") <= 1000


@manual_time
async def test_route_13_refusals_teach_a_pace(clock):
    upstream = FakeUpstream([error_reply(429), error_reply(429)])
    bound = limiter(clock, upstream, concurrency=2)
    assert "learnt_per_s" not in bound.gauges()
    for _ in range(4):
        await bound(chat_call())
    assert level(bound, "pauses") >= 1
    assert 1 <= level(bound, "concurrency") <= 2


@manual_time
async def test_stream_that_breaks_is_judged_like_a_call(clock):
    broken = Reply(chunks=ScriptedChunks([b"x", UpstreamTimeout("between chunks")]))
    bound = limiter(clock, FakeUpstream([broken]), tpm=1000, concurrency=4)
    reply = await bound(chat_call(stream=True, max_tokens=10))
    with pytest.raises(UpstreamTimeout):
        async for _ in reply.chunks:
            pass
    assert level(bound, "in_use") == 0
    assert level(bound, "concurrency") == 2
    assert level(bound, "total_in_window") >= 10


@manual_time
async def test_deadline_that_passes_in_the_queue_is_told(clock):
    bound = limiter(clock, Recorder(clock, latency_s=5.0), concurrency=1)
    running = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0)
    began = clock.monotonic()
    with pytest.raises(RateLimited, match="deadline passed"):
        await bound(chat_call(context=Context(deadline=began + 1)))
    assert clock.monotonic() - began == pytest.approx(1, abs=0.01)
    assert level(bound, "waiting") == 0
    await running


@manual_time
async def test_limit_05_a_deadline_that_passes_at_the_endpoint_gives_nothing_back(clock):
    upstream = Recorder(clock, latency_s=5.0)
    bound = limiter(clock, Timeout(10).bind(upstream, Env(clock=clock)), rpm=2)
    with pytest.raises(DeadlineExceeded, match="while the endpoint was working") as caught:
        await bound(chat_call(context=Context(deadline=clock.monotonic() + 1)))
    assert caught.value.sent
    assert level(bound, "requests_in_window") == 1
    with pytest.raises(RateLimited):
        await bound(chat_call(context=Context(deadline=clock.monotonic() + 1)))
    assert len(upstream.times) == 1


@manual_time
async def test_deadline_that_moves_while_waiting_is_the_one_that_counts(clock):
    bound = limiter(clock, Recorder(clock, latency_s=5.0), concurrency=1)
    running = asyncio.ensure_future(bound(chat_call()))
    await asyncio.sleep(0)
    began = clock.monotonic()
    urgency = Urgency(0, began + 1)
    waiter = asyncio.ensure_future(bound(chat_call().replace(urgency=urgency)))
    await asyncio.sleep(0.5)
    urgency.join(Context(deadline=began + 3))
    with pytest.raises(RateLimited, match="deadline passed"):
        await waiter
    assert clock.monotonic() - began == pytest.approx(3, abs=0.01)
    await running


@manual_time
async def test_reserving_the_maximum_and_learning_the_usual_length(clock):
    upstream = FakeUpstream([lambda call: answered(10, 20) for _ in range(30)])
    learned = limiter(clock, upstream, tpm=100_000)
    for _ in range(10):
        await learned(chat_call())
    before = level(learned, "total_in_window")
    slow = FakeUpstream([], latency_s=5.0)
    learned.inner = slow
    pending = asyncio.ensure_future(learned(chat_call(max_tokens=5000, n=2)))
    await asyncio.sleep(0)
    assert level(learned, "total_in_window") - before < 60
    await pending
    full = limiter(clock, slow, tpm=100_000, reserve="max")
    pending = asyncio.ensure_future(full(chat_call(max_tokens=5000, n=2)))
    await asyncio.sleep(0)
    assert level(full, "total_in_window") > 10_000
    await pending


@pytest.mark.parametrize(("capabilities", "most"), [((), 1.5), (("idempotent",), 1.2)])
@manual_time
async def test_unknown_servers_are_approached_gently(clock, capabilities, most):
    upstream = Recorder(clock, latency_s=1.0)
    bound = RateLimiter(concurrency=64).bind(upstream, Env(clock=clock).endowed(frozenset(capabilities)))
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call()) for _ in range(50)))
    assert upstream.times.count(began) == 8
    assert clock.monotonic() - began < most
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call()) for _ in range(30)))
    assert clock.monotonic() - began == pytest.approx(1.0)


@manual_time
async def test_calls_one_after_the_other_never_wait_for_the_gentle_start(clock):
    bound = RateLimiter().bind(Recorder(clock, latency_s=0.0), Env(clock=clock))
    began = clock.monotonic()
    for _ in range(1000):
        await bound(chat_call())
    assert clock.monotonic() == began


@manual_time
async def test_each_good_answer_of_an_unknown_server_admits_two_more(clock):
    upstream = Recorder(clock, latency_s=0.05)
    bound = RateLimiter().bind(upstream, Env(clock=clock))
    began = clock.monotonic()
    await asyncio.gather(*(bound(chat_call()) for _ in range(64)))
    assert upstream.times[-1] - began <= 0.15 + 1e-6
    assert [upstream.times.count(at) for at in sorted(set(upstream.times))] == [8, 16, 32, 8]


@manual_time
async def test_few_good_answers_at_a_time_do_not_admit_a_crowd(clock):
    upstream = Recorder(clock, latency_s=0.0)
    bound = RateLimiter().bind(upstream, Env(clock=clock))
    for _ in range(200):
        await bound(chat_call())
    upstream.latency_s = 1.0
    crowd = [asyncio.ensure_future(bound(chat_call())) for _ in range(50)]
    await asyncio.sleep(0.01)
    assert len(upstream.times) - 200 == 8
    await asyncio.gather(*crowd)


@manual_time
async def test_refused_call_that_is_repeated_keeps_its_place(clock):
    upstream = Recorder(clock, latency_s=0.5)
    upstream.answer = lambda call: error_reply(429, retry_after="5") if len(upstream.times) == 1 else answered(1, 1)
    bound = limiter(clock, upstream, concurrency=1)

    async def stubborn(name):
        call = chat_call(name)
        while not (await bound(call)).ok:
            pass

    await asyncio.gather(*(stubborn(name) for name in "abc"))
    assert upstream.prompts == ["a", "a", "b", "c"]


@manual_time
async def test_figures_nobody_asked_for_are_ignored(clock):
    def answer(call):
        headers = (("x-ratelimit-limit-requests", "5"), ("x-ratelimit-remaining-requests", "0"))
        return answered(1, 1, headers=headers)

    upstream = FakeUpstream([answer, answer], latency_s=1.0)
    bound = limiter(clock, upstream, tpm=1000)
    await bound(chat_call())
    assert level(bound, "total_in_window") == 2
    late_view = limiter(clock, FakeUpstream([answer, answer]), rpm=5, burst=5)
    gate = late_view._gate(chat_call())
    await late_view(chat_call())
    before = gate.allowance.requests.used(clock.monotonic())
    gate.hear((), -5.0)
    assert gate.allowance.requests.used(clock.monotonic()) == before == 5


@manual_time
async def test_permits_are_given_back_once(clock):
    bound = limiter(clock, Recorder(clock), rpm=10, concurrency=2)
    gate = bound._gate(chat_call())
    permit = gate.admit(())
    for _ in range(2):
        gate.give_back(permit)
        gate.finish(permit, Usage(), well=True)
        assert gate.refused(chat_call(), permit, 1.0) == 0.0
    assert gate.allowance.in_use == 0
    assert gate.allowance.pace.until < clock.monotonic()


@manual_time
async def test_only_refusals_known_recently_are_remembered(clock):
    bound = limiter(clock, FakeUpstream([error_reply(429, retry_after_ms="1")] * 300), adaptive=False)
    for _ in range(300):
        await bound(chat_call())
    (gate,) = bound._gates.values()
    assert len(gate._refused) == 256


@manual_time
async def test_limit_12_a_new_loop_gets_no_second_burst(clock):
    upstream = Recorder(clock)
    bound = limiter(clock, upstream, rpm=60)
    await asyncio.gather(*(bound(chat_call()) for _ in range(5)))
    bound.rehome()
    tasks = [asyncio.ensure_future(bound(chat_call())) for _ in range(5)]
    await asyncio.sleep(0.5)
    assert len(upstream.times) == 5
    await asyncio.gather(*tasks)


class Paced(ScriptedChunks):
    """A first chunk at once, then one per gap."""

    def __init__(self, chunks, gap_s):
        super().__init__(chunks)
        self.later = gap_s

    async def __anext__(self):
        chunk = await super().__anext__()
        self._gap_s = self.later
        return chunk


@manual_time
async def test_limit_13_gradient2_follows_the_first_token_and_never_the_total_latency(clock):
    state = {"first": 0.1, "gap": 0.01}

    async def upstream(call):
        await asyncio.sleep(state["first"])
        return Reply(chunks=Paced(chat_chunks("a b c"), state["gap"]))

    bound = limiter(clock, upstream, concurrency="2-16-64", adaptive="gradient2")

    async def use():
        reply = await bound(chat_call(stream=True))
        async for _ in reply.chunks:
            pass

    async def rounds(count):
        await asyncio.gather(*(use() for _ in range(count)))
        return level(bound, "concurrency")

    grown = await rounds(1500)
    assert grown > 32
    state["gap"] = 5.0  # outputs take fifty times as long
    assert await rounds(300) >= grown
    state.update(first=5.0, gap=0.01)
    assert await rounds(300) < grown / 2
    assert level(bound, "in_use") == 0


@pytest.mark.parametrize("op", ["chat", "messages", "function"])
@manual_time
async def test_limit_13_what_comes_before_the_first_token_is_none(clock, op):
    chunks = [b"event: ping\ndata: {}\n\n"] * 3 + chat_chunks("a")
    seen = []

    class Slow(ScriptedChunks):
        async def __anext__(self):
            await asyncio.sleep(1.0)
            return await super().__anext__()

    bound = limiter(clock, FakeUpstream([Reply(chunks=Slow(chunks))]), concurrency="2-16-64", adaptive="gradient2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gradient2, "first_token", lambda self, took, in_use: seen.append((took, in_use)))
        reply = await bound(chat_call(stream=True).replace(op=op))
        async for _ in reply.chunks:
            pass
    assert seen == {"chat": [(pytest.approx(4.0), 1)], "function": [(pytest.approx(1.0), 1)], "messages": []}[op]


def test_gradient2_needs_a_concurrency():
    with pytest.raises(ConfigError, match="concurrency"):
        RateLimiter(rpm=5, adaptive="gradient2")
    with pytest.raises(ConfigError, match="adaptive"):
        RateLimiter(concurrency=5, adaptive="vegas")
    assert RateLimiter(concurrency="1-4-8", adaptive="gradient2").limits().slots == (1, 4, 8)


@manual_time
async def test_a_new_bucket_costs_the_same_however_many_are_busy(clock):
    looked_at = 0

    class Looking(Allowance):
        def idle(self, now):
            nonlocal looked_at
            looked_at += 1
            return super().idle(now)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gates, "Allowance", Looking)
        bound = limiter(clock, Recorder(clock), rpm=10, window=60)
        for n in range(2000):
            await bound(chat_call().replace(model=f"model {n}"))
        assert level(bound, "buckets") == 2000  # each holds something back
        assert looked_at <= 4 * 1000
        await asyncio.sleep(61)
        for n in range(1000):
            await bound(chat_call().replace(model=f"later {n}"))
        assert level(bound, "buckets") == 1000


@manual_time
async def test_limit_14_a_lowered_limit_outlives_its_bucket_s_rest(clock):
    told = (("x-ratelimit-limit-requests", "2"), ("x-ratelimit-limit-tokens", "10"))
    upstream = Recorder(clock, answer=lambda call: answered(3, 2, headers=told))
    bound = limiter(clock, upstream, rpm=10, tpm=10_000, window=1)
    await bound(chat_call("lowered"))
    upstream.answer = None
    for n in range(1500):
        await bound(chat_call().replace(namespace=f"tenant {n}"))
        await asyncio.sleep(0.01)
    held = level(bound, "buckets")
    assert held <= 1000
    upstream.times.clear()
    await asyncio.gather(*(bound(chat_call(str(n))) for n in range(8)))
    assert level(bound, "buckets") == held
    assert most_in_any_window(upstream.times, 1.0) <= 2
    await asyncio.sleep(3601)
    for n in range(1500):
        await bound(chat_call().replace(namespace=f"later {n}"))
    await asyncio.sleep(2)
    for n in range(500):
        await bound(chat_call().replace(namespace=f"last {n}"))
    upstream.times.clear()
    await asyncio.gather(*(bound(chat_call(str(n))) for n in range(8)))
    assert most_in_any_window(upstream.times, 1.0) > 2


@manual_time
async def test_a_refused_call_that_does_not_come_back_is_not_kept(clock):
    upstream = FakeUpstream([error_reply(429)] * 20)
    bound = limiter(clock, upstream, concurrency=20)
    calls = [chat_call(f"a long prompt {n}") for n in range(20)]
    held = [weakref.ref(call) for call in calls]
    await asyncio.gather(*(bound(call) for call in calls), return_exceptions=True)
    calls.clear()
    upstream.calls.clear()
    gc.collect()
    assert not any(one() for one in held)


@manual_time
async def test_a_server_that_refused_for_a_day_is_asked_again_within_minutes(clock):
    bound = limiter(clock, FakeUpstream([error_reply(429)] * 300), concurrency=20)
    for _ in range(300):
        assert (await bound(chat_call())).status == 429
    began = clock.monotonic()
    assert began > 12 * 3600
    assert (await bound(chat_call())).ok
    assert clock.monotonic() - began <= 300
