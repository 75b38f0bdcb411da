"""A model of the limiter: whatever is asked, cancelled, refused, settled, told or changed, its promises hold.

The model knows no code of the limiter: it writes down what goes out and what that cost, and checks each admission.
"""

import asyncio

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmmw.answer import Usage
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.errors import ConnectionFailed, RateLimited, UpstreamTimeout
from llmmw.layers.limit import RateLimiter
from llmmw.testing.clock import ManualClock, ManualLoop
from llmmw.testing.fake import ScriptedChunks, chat_call, chat_chunks, error_reply

WINDOW = 10.0
GRAIN = 1e-6
SLACK_S = 0.01
"""Deadlines are told a millisecond late, and timers of the loop add theirs."""
REFUSALS = {"429", "429 soon"}


CALLS = st.fixed_dictionaries({
    "priority": st.sampled_from([0, 0, 0, -1, 1]),
    "tenant": st.sampled_from([None, None, "a", "b"]),
    "agent": st.sampled_from([None, None, "x", "y"]),
    "tokens": st.sampled_from([1, 5, 20, 39, 150]),
    "service": st.sampled_from([0.0, 0.0, 0.05, 1.0, 7.0]),
    "factor": st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]),
    "deadline": st.sampled_from([None, None, None, None, 0.5, 20.0]),
    "cancel": st.none() | st.none() | st.tuples(st.sampled_from([0.0, 0.05, 1.0, 7.0]), st.integers(0, 4)),
    "snipe": st.sampled_from([None, None, None, 0, 1]),
    "outcome": st.sampled_from([
        "ok", "ok", "ok", "ok", "429", "429 soon", "503", "not sent", "timeout", "stream", "no usage", "headers",
    ]),
})  # fmt: skip


class Cost:
    """Units of one limit that the model counts: exact sliding window, entries settled in place."""

    def __init__(self):
        self.entries = []

    def add(self, now, amount):
        entry = [now, amount]
        self.entries.append(entry)
        return entry

    def used(self, now):
        return sum(amount for at, amount in self.entries if at > now - WINDOW + GRAIN)


class Asked:
    """One call, from its submission to its end."""

    def __init__(self, number, fields, now):
        self.number = number
        self.priority, self.tenant, self.agent = fields["priority"], fields["tenant"], fields["agent"]
        self.tokens, self.service, self.outcome = fields["tokens"], fields["service"], fields["outcome"]
        self.factor, self.snipe = fields["factor"], fields["snipe"]
        self.deadline = None if fields["deadline"] is None else now + fields["deadline"]
        self.request = self.cost = self.task = None
        self.cancelled = False

    @property
    def line(self):
        return self.priority, self.tenant, self.agent

    @property
    def is_waiting(self):
        return self.request is None and not self.task.done() and not self.cancelled


class LimiterModel(RuleBasedStateMachine):
    @initialize(
        rpm=st.sampled_from([None, 1, 4, 15]),
        tpm=st.sampled_from([None, 40, 100]),
        concurrency=st.sampled_from([None, 1, 3, "1-2-4"]),
        age_bound=st.sampled_from([0.5, 10.0]),
    )
    def begin(self, rpm, tpm, concurrency, age_bound):
        self.clock = ManualClock()
        self.loop = ManualLoop(self.clock)
        self.rpm, self.tpm, self.concurrency = rpm, tpm, concurrency
        self.limiter = RateLimiter(
            rpm=rpm,
            tpm=tpm,
            concurrency=concurrency,
            window=WINDOW,
            age_bound=age_bound,
            weights={"b": 2},
            reserve="max",
        ).bind(self.upstream, Env(clock=self.clock, seed=1))
        self.requests, self.tokens = Cost(), Cost()
        self.calls = []
        self.inside = 0
        self.problems = []

    # -- the upstream -------------------------------------------------------------------------------------------

    async def upstream(self, call):
        asked = call.native
        self.admit(asked)
        self.inside += 1
        handed_over = False
        try:
            await asyncio.sleep(asked.service)
            if asked.snipe is not None:  # who waits is cancelled in the turn in which its permit is under way
                for other in [other for other in self.calls if other.is_waiting][:3]:
                    self.loop.call_soon(self.give_up, other, asked.snipe)
            if asked.outcome == "stream":
                handed_over = True
                return Reply(chunks=Stream(self, asked))
            return self.answer(asked)
        finally:
            if not handed_over:
                self.inside -= 1

    def admit(self, asked):
        now = self.clock.monotonic()
        if self.rpm is not None and self.requests.used(now) + 1 > self.rpm:
            self.problems.append(f"request {asked.number} is over the limit {self.rpm}")
        if self.tpm is not None and self.tokens.used(now) + min(asked.tokens, self.tpm) > self.tpm:
            self.problems.append(f"request {asked.number}: {asked.tokens} on {self.tokens.used(now)} of {self.tpm}")
        most = 4 if isinstance(self.concurrency, str) else self.concurrency
        if most is not None and self.inside >= most:
            self.problems.append(f"{self.inside + 1} calls at once")
        if asked.deadline is not None and now > asked.deadline + SLACK_S:
            self.problems.append(f"call {asked.number} was sent after its deadline")
        for other in self.calls[: asked.number]:
            if other.is_waiting and other.line == asked.line and other.tokens <= asked.tokens:
                self.problems.append(f"call {asked.number} has overtaken {other.number}")
        asked.request, asked.cost = self.requests.add(now, 1), self.tokens.add(now, asked.tokens)

    def settle(self, asked, actual):
        if actual > asked.tokens:
            self.tokens.add(self.clock.monotonic(), actual - asked.tokens)
        else:
            asked.cost[1] = actual

    def answer(self, asked):
        if asked.outcome == "not sent":
            asked.request[1] = 0
            self.settle(asked, 0)
            raise ConnectionFailed("no connection")
        if asked.outcome in REFUSALS:
            self.settle(asked, 0)
            return error_reply(429, **({"retry_after": "2"} if asked.outcome == "429" else {"retry_after_ms": "5"}))
        if asked.outcome == "503":
            return error_reply(503)
        if asked.outcome == "timeout":
            raise UpstreamTimeout("slow")
        if asked.outcome == "no usage":
            return Reply(data=b"{}")
        actual = int(asked.tokens * asked.factor)
        self.settle(asked, actual)
        headers = (("x-ratelimit-limit-requests", "junk"), ("x-ratelimit-remaining-tokens", "-1"))
        if asked.outcome == "headers":
            headers = (("x-ratelimit-limit-requests", "3"), ("x-ratelimit-remaining-requests", "1"),
                       ("x-ratelimit-reset-requests", "4s"))  # fmt: skip
        return Reply(data=b"{}", usage=Usage(actual, 0, reported=True), headers=headers)

    # -- what happens -------------------------------------------------------------------------------------------

    def run(self, work):
        self.loop.run_until_complete(work)

    def settled(self, turns=12):
        async def idle():
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(idle())

    @rule(several=st.lists(CALLS, min_size=1, max_size=12), turns=st.integers(0, 8))
    def submit(self, several, turns):
        for fields in several:
            asked = Asked(len(self.calls), fields, self.clock.monotonic())
            self.calls.append(asked)
            context = Context(priority=asked.priority, tenant=asked.tenant, agent=asked.agent, deadline=asked.deadline)
            # a prompt and one token of output, in all as many as the upstream will report
            payload = {"prompt": "x" * (4 * (asked.tokens - 1)), "max_tokens": 1}
            call = chat_call(context=context).replace(op="complete", payload=payload, native=asked)
            asked.task = self.loop.create_task(self.use(call))
            if fields["cancel"] is not None:
                after, turns_later = fields["cancel"]
                self.loop.call_later(after, self.give_up, asked, turns_later)
        self.settled(turns)

    def give_up(self, asked, turns=0):
        """Cancel a caller, so many turns of the loop from now: also in the one in which its permit is under way."""
        if turns:
            self.loop.call_soon(self.give_up, asked, turns - 1)
        elif not asked.task.done():
            asked.cancelled = True
            asked.task.cancel()

    async def use(self, call):
        reply = await self.limiter(call)
        if reply.chunks is not None:
            async for _ in reply.chunks:
                pass

    @precondition(lambda self: any(not asked.task.done() for asked in self.calls))
    @rule(data=st.data(), turns=st.integers(0, 4))
    def cancel(self, data, turns):
        under_way = [asked for asked in self.calls if not asked.task.done()]
        for asked in data.draw(st.lists(st.sampled_from(under_way), min_size=1, max_size=5), label="cancelled"):
            self.give_up(asked)
        self.settled(turns)

    @rule(seconds=st.sampled_from([0.001, 0.3, 1.0, 4.0, 12.0]))
    def advance(self, seconds):
        self.run(asyncio.sleep(seconds))

    @rule(rpm=st.sampled_from([1, 3, 15, 40]), tpm=st.sampled_from([30, 100, 400]), age=st.sampled_from([0.5, 10.0]))
    def reconfigure(self, rpm, tpm, age):
        self.settled()
        changes = {"age_bound": age}
        if self.rpm is not None:
            self.rpm = changes["rpm"] = rpm
        if self.tpm is not None:
            self.tpm = changes["tpm"] = tpm

        async def change():
            self.limiter.reconfigure(**changes)

        self.run(change())
        self.settled()

    @rule(first=st.sampled_from(["cancel", "rehome"]), dice=st.integers(0, 3))
    def change_loop(self, first, dice):
        """`asyncio.run` ends: what was under way is cancelled; the next one finds the levels as they were."""
        if dice:
            return
        self.settled()
        if first == "rehome":
            self.limiter.rehome()
        for asked in self.calls:
            self.give_up(asked)
        self.settled()
        if first == "cancel":
            self.limiter.rehome()
        assert all(asked.task.done() for asked in self.calls)
        self.loop.close()
        self.loop = ManualLoop(self.clock)

    # -- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def no_promise_is_broken(self):
        assert not getattr(self, "problems", None), self.problems

    @invariant()
    def nobody_waits_beyond_his_deadline(self):
        for asked in getattr(self, "calls", ()):
            if asked.deadline is not None and asked.request is None and not asked.task.done():
                assert self.clock.monotonic() <= asked.deadline + SLACK_S

    @invariant()
    def permits_are_exact(self):
        if not getattr(self, "calls", None):
            return
        self.settled()
        gauges = self.limiter.gauges()
        assert gauges["in_use"] == self.inside
        assert gauges["waiting"] == sum(asked.is_waiting for asked in self.calls)

    def teardown(self):
        if hasattr(self, "calls"):
            try:
                self.come_to_rest()
            finally:
                for asked in self.calls:
                    self.give_up(asked)
                self.settled()
                self.loop.close()

    def come_to_rest(self):
        for _ in range(12 * len(self.calls) + 20):
            if all(asked.task.done() for asked in self.calls):
                break
            self.run(asyncio.sleep(WINDOW))
        assert all(asked.task.done() for asked in self.calls), "somebody starved"
        for asked in self.calls:
            self.judge(asked)
        assert not self.problems, self.problems
        self.run(asyncio.sleep(2 * WINDOW))
        gauges = self.limiter.gauges()
        spent = [value for name, value in gauges.items() if name.endswith("_in_window")]
        assert (gauges["in_use"], gauges["waiting"], self.inside, sum(spent)) == (0, 0, 0, 0)
        self.run(self.limiter.aclose())

    def judge(self, asked):
        if asked.task.cancelled():
            assert asked.cancelled
            return
        error = asked.task.exception()
        if asked.outcome == "not sent" and asked.request is not None:
            assert isinstance(error, ConnectionFailed) or asked.cancelled
        elif asked.outcome == "timeout" and asked.request is not None:
            assert isinstance(error, UpstreamTimeout) or asked.cancelled
        elif error is not None:
            assert isinstance(error, RateLimited)
            assert asked.deadline is not None
            assert asked.request is None


class Stream(ScriptedChunks):
    """A stream that is inside the upstream until it ends, and reports what it cost."""

    def __init__(self, model, asked):
        super().__init__(chat_chunks("a b"), gap_s=asked.service / 10)
        self.model, self.asked, self.open = model, asked, True
        self.usage = Usage(asked.tokens, 0, reported=True)

    async def __anext__(self):
        try:
            chunk = await super().__anext__()
        except BaseException:
            self.end()
            raise
        self.usage = Usage(self.asked.tokens, 0, reported=True)
        return chunk

    async def aclose(self):
        self.end()
        await super().aclose()

    def end(self):
        self.model.inside -= self.open
        self.open = False


TestLimiterModel = LimiterModel.TestCase
TestLimiterModel.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
