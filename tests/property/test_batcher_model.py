"""A model of the batcher under random schedules: every call has one outcome, its own, and nothing stays behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmmw import errors
from llmmw.call import Call, Context, Party, Place, Reply
from llmmw.env import Env
from llmmw.layers.batch import Batcher
from llmmw.layers.deadline import Deadline
from llmmw.testing.clock import ManualClock, ManualLoop
from llmmw.testing.fake import chat_body, chat_call, error_reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.layers.batch import BoundBatcher

MODES = ("ok", "ok", "ok", "bad item", "overloaded", "lost", "no batches", "wrong answer", "unreadable", "cancelled",
         "too large")  # fmt: skip
KINDS = ("red", "green")


class Upstream:
    """Answers as its mode of the moment says, and checks what it is asked."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.mode = "ok"
        self.latency_s = 0.05
        self.in_flight = 0
        self.asked: list[str] = []
        self.joint = 0

    async def __call__(self, call: Call, /) -> Reply:
        conversations = call.payload["messages"]
        prompts = [one[-1]["content"] for one in (conversations if call.op == "chat_batch" else [conversations])]
        assert 1 <= len(prompts) <= self.max_size
        assert {prompt.partition(" ")[0] for prompt in prompts} == {call.model}
        assert {prompt.split(" ")[1] for prompt in prompts} == {str(call.payload["temperature"])}
        self.asked += prompts
        self.joint += call.op == "chat_batch"
        self.in_flight += 1
        mode = self.mode
        try:
            await asyncio.sleep(self.latency_s)
        finally:
            self.in_flight -= 1
        if mode == "overloaded":
            return error_reply(503)
        if mode == "lost":
            raise errors.ConnectionFailed("lost")
        if mode == "cancelled":
            raise asyncio.CancelledError
        if mode == "too large" and call.op == "chat_batch":
            raise errors.ResponseTooLarge("all of them together")
        if mode == "no batches" and call.op == "chat_batch":
            return Reply(data=b'{"detail":"Not Found"}', status=404)
        if any("bad" in prompt for prompt in prompts):
            return error_reply(400)
        if call.op == "chat":
            return Reply(data=chat_body(prompts[0]))
        return Reply(data=self._joint(prompts, mode))

    def _joint(self, prompts: list[str], mode: str) -> bytes:
        if mode == "unreadable":
            return b"<html>"
        choices: list[dict[str, Any]] = [
            {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": prompt}}
            for index, prompt in enumerate(prompts)
        ]
        if mode == "wrong answer":
            choices = [*choices[1:], {**choices[-1]}, {**choices[-1], "index": 99}]
        usage = {"prompt_tokens": 7 * len(prompts), "completion_tokens": 3 * len(prompts)}
        return msgspec.json.encode({"choices": choices[::-1], "usage": usage})


class BatcherModel(RuleBasedStateMachine):
    """Submits, cancellations, deadlines, ticks, dead endpoints, moods of the server and closing, in any order."""

    @initialize(
        max_size=st.sampled_from([9, 6, 3, 1]),
        max_queue=st.sampled_from([100, 100, 12, 2]),
        refuses=st.sampled_from([False, False, False, True]),
        max_bytes=st.sampled_from([None, None, 220]),
        barrier=st.sampled_from([None, None, 2, 3]),
        drain=st.booleans(),
        joint=st.sampled_from(["auto", "auto", "auto", "off"]),
        min_size=st.sampled_from([1, 1, 3]),
    )
    def begin(
        self,
        max_size: int,
        max_queue: int,
        *,
        refuses: bool,
        max_bytes: int | None,
        barrier: int | None,
        drain: bool,
        joint: str,
        min_size: int,
    ) -> None:
        clock = self.clock = ManualClock()
        self.runner = asyncio.Runner(loop_factory=lambda: ManualLoop(clock))
        self.upstream = Upstream(max_size)
        options = Batcher(
            max_size=max_size,
            max_queue=max_queue,
            when_full="refuse" if refuses else "wait",
            max_bytes=max_bytes,
            barrier=barrier,
            drain=drain,
            joint=joint,
            min_size=min_size,
            flush_interval=0.2,
        )
        env = Env(clock=self.clock, seed=1).endowed(frozenset({"batch:chat", "batch:complete"}))
        self.batcher: BoundBatcher = options.bind(self.upstream, env)
        self.timely = Deadline(10_000).bind(self.batcher, env)
        self.calls: list[tuple[str, Call, asyncio.Task[Reply]]] = []
        self.left: set[asyncio.Task[Reply]] = set()
        self.closing = self.shed = self.ever_bad = False
        self.modes = {"ok"}
        self.places: list[Place] = []

    def turn(self, seconds: float = 0.0) -> None:
        """Let the loop run so long."""
        self.runner.run(asyncio.sleep(seconds))

    def here(self, act: Callable[[], object]) -> None:
        """Do something on the loop."""

        async def run() -> None:
            act()

        self.runner.run(run())

    @rule(
        kind=st.sampled_from(KINDS),
        temperature=st.sampled_from([0, 1]),
        shared=st.booleans(),
        bad=st.sampled_from([False] * 5 + [True]),
        long=st.sampled_from([False, False, True]),
        deadline=st.sampled_from([None, None, None, None, 0.03, 0.3, 0.0]),
        step=st.sampled_from([None, None, 1, 2]),
        agent=st.sampled_from([None, "a", "b", "c"]),
        count=st.integers(1, 9),
    )
    def submit(
        self,
        kind: str,
        temperature: int,
        *,
        shared: bool,
        bad: bool,
        long: bool,
        deadline: float | None,
        step: int | None,
        agent: str | None,
        count: int,
    ) -> None:
        until = None if deadline is None else self.clock.monotonic() + deadline
        for _ in range(count):
            name = f"{'same' if shared else f'n{len(self.calls)}'}{' bad' if bad else ''}{' long' * 30 * long}"
            self.ask(f"{kind} {temperature} {name}", Context(agent=agent, step=step, deadline=until))

    def ask(self, prompt: str, context: Context, place: Place | None = None) -> None:
        """Make a call; kind and temperature are the first words of its prompt."""
        kind, temperature, *_ = prompt.split()
        call = chat_call(prompt, context=context, model=kind, temperature=int(temperature)).replace(place=place)

        async def ask() -> Reply:
            return await self.timely(call)

        self.calls.append((prompt, call, self.runner.get_loop().create_task(ask())))

    @rule(kind=st.sampled_from(KINDS), count=st.integers(2, 9), bad=st.sampled_from([None, None, 0, 1]))
    def burst(self, kind: str, count: int, bad: int | None) -> None:
        """Equal calls at one moment, as the agents of a simulation make them; perhaps one is bad."""
        for number in range(count):
            self.ask(f"{kind} 1 n{len(self.calls)}{' bad' if number == bad else ''}", Context())
        self.turn(0.02)

    @rule(
        kind=st.sampled_from(KINDS),
        count=st.integers(1, 9),
        absent=st.sampled_from([0, 0, 1, 3]),
        whole=st.booleans(),
        later=st.booleans(),
        bad=st.sampled_from([False, False, True]),
    )
    def party(self, kind: str, count: int, absent: int, *, whole: bool, later: bool, bad: bool) -> None:
        """Calls made together, some of which are held up elsewhere, perhaps for ever."""
        party = Party()
        self.places += [party.join() for _ in range(absent)]
        for number in range(count):
            self.ask(f"{kind} 1 n{len(self.calls)}{' bad' if bad and not number else ''}", Context(), party.join())
            if later:
                self.turn()
        if whole:
            self.here(party.close)
        self.turn()

    @rule(which=st.integers(0, 10_000))
    @precondition(lambda self: bool(self.places))
    def turn_up(self, which: int) -> None:
        """One who was on the way has had an answer elsewhere."""
        self.here(self.places.pop(which % len(self.places)).settle)

    @rule(which=st.integers(0, 10_000))
    @precondition(lambda self: any(not task.done() for _, _, task in self.calls))
    def cancel(self, which: int) -> None:
        waiting = [task for _, _, task in self.calls if not task.done()]
        task = waiting[which % len(waiting)]
        task.cancel()
        self.left.add(task)

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.001, 0.02, 0.06, 0.25]))
    def wait(self, seconds: float) -> None:
        self.turn(seconds)

    @rule(mode=st.sampled_from(MODES), latency_s=st.sampled_from([0.0, 0.05, 1.0]))
    def change_mood(self, mode: str, latency_s: float) -> None:
        self.upstream.mode = mode
        self.upstream.latency_s = latency_s
        self.modes.add(mode)

    @rule()
    @precondition(lambda self: len(self.calls) > 5)
    def tick(self) -> None:
        self.here(self.batcher.tick)

    @rule(kind=st.sampled_from(KINDS))
    @precondition(lambda self: len(self.calls) > 20 and not self.shed)
    def die(self, kind: str) -> None:
        self.here(lambda: self.batcher.shed(chat_call(model=kind), lambda: errors.CircuitOpen("dead")))
        self.shed = True

    @rule()
    @precondition(lambda self: len(self.calls) > 40 and not self.closing)
    def close(self) -> None:
        self.here(self.batcher.closing)
        self.closing = True

    @invariant()
    def the_books_agree(self) -> None:
        gathering = self.batcher._gathering
        assert gathering._active >= 0
        assert gathering.entrance.inside >= 0
        assert len(gathering._twins) <= len(gathering._plan)

    def teardown(self) -> None:
        if not hasattr(self, "calls"):
            return
        try:
            self.runner.run(self._end())
        finally:
            self.runner.close()

    async def _end(self) -> None:
        tasks = [task for _, _, task in self.calls]
        if tasks:
            done, pending = await asyncio.wait(tasks, timeout=3600)
            assert not pending
            assert len(done) == len(tasks)
        await asyncio.sleep(10)  # what nobody waited for
        gathering = self.batcher._gathering
        assert self.batcher.gauges() | {"joint": None} == {"waiting": 0, "active": 0, "joint": None}
        assert gathering.entrance.inside == 0
        parties = {party for party in gathering._parties if gathering._plan.has(party)}
        for kept in (gathering._twins, gathering._tasks, gathering._plan._entries, gathering._plan._lanes, parties):
            assert not kept
        assert self.upstream.in_flight == 0
        for prompt, call, task in self.calls:
            self._judge(prompt, call, task)
        self.batcher.closing()
        await self.batcher.aclose()
        try:
            await self.batcher(chat_call("late"))
        except errors.Closed:
            return
        raise AssertionError("a closed batcher took a call")

    def _judge(self, prompt: str, call: Call, task: asyncio.Task[Reply]) -> None:
        if task.cancelled():
            # A server's task that ends with a bare CancelledError reaches only who called it directly.
            assert task in self.left or "cancelled" in self.modes
            return
        error = task.exception()
        if error is None:
            reply = task.result()
            assert reply.text == prompt if reply.ok else reply.status in {400, 503}
            assert reply.status != 400 or "bad" in prompt
            assert reply.status != 503 or "overloaded" in self.modes
            assert reply.ok is False or "bad" not in prompt
            return
        if isinstance(error, errors.DeadlineExceeded):
            assert call.deadline is not None
        elif isinstance(error, errors.CircuitOpen):
            assert self.shed
        elif isinstance(error, errors.Closed):
            assert self.closing
        elif isinstance(error, errors.ConnectionFailed):
            assert "lost" in self.modes
        elif isinstance(error, errors.ProtocolError):
            assert self.modes & {"wrong answer", "unreadable"}
        elif isinstance(error, errors.AmbiguousOutcome):
            assert "cancelled" in self.modes
        else:
            assert isinstance(error, errors.QueueFull)


BatcherModel.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate)
)
TestBatcherModel = BatcherModel.TestCase
