"""Where the time of a hit in memory goes: `python benchmarks/overhead.py --profile`.

Each step is made by itself, again and again, on the objects that a real hit meets, in short turns that alternate with
those of all other steps; its least turn counts. A step's own time is what is left without the steps within it, so the
own times add up to the whole hit. Wall time: in a turn that nothing disturbs it is CPU time.
"""
# ruff: noqa: SLF001 — the steps are private

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from client_cpu import body
from fast_server import BODY
from hit_cost import ANSWER, memory_floor, openai_client, prompt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from measure import Progress

TURNS = 200
_CALLS = 256
"""In one turn, in which hits are counted once; short enough to be left alone by other processes now and then."""


@dataclass
class Step:
    """Something that a hit does."""

    name: str
    depth: int
    """Within how many others; within the last one before it that is less deep."""
    run: Callable[[], Any]
    is_async: bool = False
    total_ns: float = float("inf")
    own_ns: float = 0.0


async def _turn(step: Step) -> float:
    run = step.run
    if step.is_async:
        began = time.perf_counter_ns()
        for _ in range(_CALLS):
            await run()
    else:
        began = time.perf_counter_ns()
        for _ in range(_CALLS):
            run()
    return (time.perf_counter_ns() - began) / _CALLS


async def measured(steps: Sequence[Step], turns: int) -> Sequence[Step]:
    """The steps with their times."""

    async def nothing() -> None: ...

    idle = Step("", 0, lambda: None), Step("", 0, nothing, is_async=True)
    for _ in range(turns):
        for step in (*idle, *steps):
            step.total_ns = min(step.total_ns, await _turn(step))
    for step in steps:  # what calling a step takes here is not the step's; a hit's own coroutine is
        step.total_ns -= idle[0].total_ns
    for at, step in enumerate(steps):
        step.own_ns = step.total_ns - sum(one.total_ns for one in _within(step, steps[at + 1 :]))
    return steps


def _within(step: Step, later: Sequence[Step]) -> Iterator[Step]:
    for one in later:
        if one.depth <= step.depth:
            return
        if one.depth == step.depth + 1:
            yield one


@asynccontextmanager
async def floor() -> AsyncGenerator[Sequence[Step]]:
    """The least that a hit needs, by hand."""
    async with memory_floor(0) as ask:
        yield [Step("dict + json + sha256, by hand", 0, lambda: ask(0), is_async=True)]


@asynccontextmanager
async def function_hit() -> AsyncGenerator[Sequence[Step]]:
    """A hit of an async function."""
    import llmmw

    async def ask(prompt: str) -> str:
        await asyncio.sleep(0)
        return ANSWER if prompt else ""

    cached: Any = llmmw.middleware(cache_ttl=300)(ask)
    given = (prompt(0),)
    await cached(*given)
    edge = _held(cached, "FunctionEdge")
    call = edge.call(given, {})
    reply = edge.engine.at_once(call)
    yield [
        Step("memory hit, async function: coroutine, frames", 0, lambda: cached(*given), is_async=True),
        Step("the call made", 1, lambda: edge.call(given, {})),
        Step("arguments by name", 2, lambda: edge._binder.bind(given, {})),
        Step("is the function's code, and what it reads, what it was?", 2, edge._code.variant),
        *_engine_steps(edge.engine, call),
        Step("answer decoded", 1, lambda: edge.value(reply)),
    ]
    await cached.aclose()


@asynccontextmanager
async def wrapped_client_hit() -> AsyncGenerator[Sequence[Step]]:
    """A hit above the openai SDK, with an answer of its own type."""
    import httpx2

    import llmmw

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: httpx2.Response(200, content=BODY)))
    async with openai_client(http_client=http) as inner:
        client: Any = llmmw.wrap_client(inner, llmmw.Stack.recommended(cache_ttl=300))
        create, given = client.chat.completions.create, body(prompt(0))
        await create(**given)
        method = _held(create, "Method")
        call = method._call(given)
        reply = client.engine.at_once(call)
        check = method._type.__pydantic_validator__.validate_json
        yield [
            Step("wrap_client hit: coroutines, frames", 0, lambda: create(**given), is_async=True),
            Step("the call made", 1, lambda: method._call(given)),
            Step("are the client's settings what they were?", 2, lambda: method._wrapping.standing({}, None)),
            *_engine_steps(client.engine, call),
            Step("answer: request id", 1, lambda: method._value(reply)),
            Step("the SDK's object built by pydantic", 2, lambda: check(reply.data)),
        ]


def _held(function: Any, kind: str) -> Any:
    """What a wrapper works with."""
    return next(cell.cell_contents for cell in function.__closure__ if type(cell.cell_contents).__name__ == kind)


def _engine_steps(engine: Any, call: Any) -> list[Step]:
    """What the hits of all edges have in common."""
    from llmmw.keys.canonical import arguments_form, json_form
    from llmmw.keys.sharing import head_of

    cache = engine._hit_source
    form_of = arguments_form if call.op == "function" else json_form
    head = head_of(call, None)
    form, reply = form_of(head, call.payload), engine.at_once(call)
    return [
        Step("engine: running loop, clock twice", 1, lambda: engine.at_once(call)),
        Step("cache: entry, its age, its reply", 2, lambda: cache.look(call)),
        Step("key: policy, context, memory", 3, lambda: cache._draw(call)),
        Step("types checked, msgpack", 4, lambda: form_of(head, call.payload)),
        Step(f"sha256 of {len(form)} bytes", 4, lambda: sha256(form).digest()),
        Step("statistics", 2, lambda: engine._stats.hit(reply, 1e-5, None)),
    ]


HITS: tuple[Callable[[], AbstractAsyncContextManager[Sequence[Step]]], ...] = (floor, function_hit, wrapped_client_hit)


def show(steps: Sequence[Step]) -> str:
    """The steps as a table, µs."""
    lines = [f"{'':62}  {'own':>6}  {'with all within':>15}"]
    for step in steps:
        name = f"{'  ' * step.depth}{step.name}"
        lines.append(f"{name:62}  {step.own_ns / 1000:6.2f}  {step.total_ns / 1000:15.2f}")
    return "\n".join(lines)


async def profiles(turns: int, progress: Progress) -> list[Sequence[Step]]:
    """Every kind of hit, step by step."""
    found: list[Sequence[Step]] = []
    for opened in HITS:
        progress(f"profile: {opened.__doc__}")
        async with opened() as steps:
            found.append(await measured(steps, turns))
    return found


def as_rows(steps: Sequence[Step]) -> list[dict[str, object]]:
    """The same as plain values, in µs."""
    return [
        {"step": one.name, "depth": one.depth, "own": one.own_ns / 1000, "total": one.total_ns / 1000} for one in steps
    ]
