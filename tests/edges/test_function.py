"""The function edge keeps the user's world: signature, exceptions, types, context."""

from __future__ import annotations

import asyncio
import functools
import threading
from contextvars import ContextVar
from dataclasses import dataclass

import msgspec
import pytest

import llmmw
from llmmw.errors import ConfigError
from llmmw.stack import Stack

variable: ContextVar[str] = ContextVar("variable", default="unset")


@dataclass
class Answer:
    text: str
    score: float


class Passthrough(llmmw.Bound):
    """A layer that answers like a cache would: with the endpoint's encoded form only."""

    async def __call__(self, call):
        reply = await self.inner(call)
        return reply.replace(native=None, source="cache")


@dataclass(frozen=True)
class AsIfCached:
    role = llmmw.Role.CUSTOM

    def bind(self, inner, env):
        return Passthrough(inner, env)


async def test_an_async_function_is_called_as_before():
    @Stack().wrap
    async def ask(prompt: str, *, loud: bool = False) -> str:
        """Ask something."""
        return prompt.upper() if loud else prompt

    assert await ask("hi") == "hi"
    assert await ask(prompt="hi", loud=True) == "HI"
    assert (ask.__name__, ask.__doc__) == ("ask", "Ask something.")
    assert ask.get_performance_stats()["request_count"] == 2
    await ask.aclose()


def test_a_sync_function_runs_on_another_thread_with_the_callers_context():
    seen = []

    @Stack().wrap
    def ask(prompt):
        seen.append((variable.get(), threading.current_thread() is threading.main_thread()))
        return prompt

    variable.set("mine")
    assert ask("x") == "x"
    assert seen == [("mine", False)]
    ask.close()


async def test_an_async_generator_stays_one():
    closed = []

    @Stack().wrap
    async def words(text):
        try:
            for word in text.split():
                yield word
        finally:
            closed.append(True)

    assert [word async for word in words("a b c")] == ["a", "b", "c"]
    stream = words("a b c")
    assert await anext(stream) == "a"
    await stream.aclose()
    assert closed == [True, True]
    await words.aclose()


async def test_the_users_own_exception_comes_through_unchanged():
    class Mine(Exception):
        pass

    error = Mine("original")

    @Stack().wrap
    async def ask():
        raise error

    with pytest.raises(Mine) as caught:
        await ask()
    assert caught.value is error
    await ask.aclose()


async def test_wrong_arguments_raise_pythons_own_type_error():
    @Stack().wrap
    async def ask(prompt): ...

    with pytest.raises(TypeError, match=r"ask\(\) missing 1 required positional argument: 'prompt'"):
        await ask()
    with pytest.raises(TypeError, match=r"ask\(\) takes 1 positional argument but 2 were given"):
        await ask(1, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        await ask(1, other=2)
    assert ask.get_performance_stats()["request_count"] == 0
    await ask.aclose()


@pytest.mark.parametrize(
    "value", ["text", 1, 1.5, True, None, [1, {"a": None}], {"k": [1.0]}, Answer("x", 0.5)], ids=repr
)
async def test_a_stored_answer_keeps_value_and_type(value):
    @Stack(AsIfCached()).wrap
    async def ask() -> Answer:
        return value

    found = await ask()
    assert found == value
    assert type(found) is type(value)
    await ask.aclose()


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: "a"}, {1, 2}, b"bytes", object(), float("nan"), "\ud800"],
    ids=["tuple", "int key", "set", "bytes", "object", "nan", "surrogate"],
)
def test_a_value_that_would_come_back_different_is_not_encoded(value):
    from llmmw.codec import Codec

    assert Codec().encode(value) is None


def test_bytes_from_elsewhere_never_choose_a_class():
    from llmmw.codec import Codec, Undecodable

    writer, reader = Codec(Answer), Codec()
    data = writer.encode(Answer("x", 1.0))
    assert writer.decode(data) == Answer("x", 1.0)
    with pytest.raises(Undecodable):
        reader.decode(data)
    for broken in (b"", b"j", b"jnot json", b"zwhat", b"tno newline", b"t" + b"os:system\n{}"):
        with pytest.raises(Undecodable):
            writer.decode(broken)


def test_pydantic_models_and_structs_keep_their_type():
    from openai.types.chat import ChatCompletion

    from llmmw.codec import Codec

    class Point(msgspec.Struct):
        x: int

    body = {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m", "extra_field": {"a": 1},
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
    }  # fmt: skip
    completion = ChatCompletion.model_validate(body)
    codec = Codec()
    assert codec.decode(codec.encode(completion)) == completion
    assert codec.decode(codec.encode(Point(3))) == Point(3)


async def test_usage_is_read_from_what_the_function_returns():
    @Stack().wrap
    async def ask():
        return {"usage": {"prompt_tokens": 7, "completion_tokens": 5}}

    await ask()
    stats = ask.get_performance_stats()
    assert (stats["tokens_in"], stats["tokens_out"]) == (7, 5)
    await ask.aclose()


def test_what_cannot_be_wrapped_is_refused_with_a_reason():
    def generator():
        yield 1

    with pytest.raises(ConfigError, match="async generator"):
        Stack().wrap(generator)
    with pytest.raises(ConfigError, match="expected a function"):
        Stack().wrap(3)
    with pytest.raises(ConfigError, match="expected a function; write one"):
        Stack().wrap(functools.partial(generator))
    with pytest.raises(ConfigError, match="no such parameter"):
        Stack().wrap(lambda a: a, ignore=("b",))


async def test_variable_arguments_are_part_of_the_call():
    seen = []

    class Spy(llmmw.Bound):
        async def __call__(self, call):
            seen.append(dict(call.payload))
            return await self.inner(call)

    @dataclass(frozen=True)
    class Spying:
        role = llmmw.Role.CUSTOM

        def bind(self, inner, env):
            return Spy(inner, env)

    @Stack(Spying()).wrap
    async def ask(prompt, *rest, temperature=0, **more): ...

    await ask("p", 1, 2, top_p=0.5)
    assert seen == [{"prompt": "p", "rest": [1, 2], "temperature": 0, "more": {"top_p": 0.5}}]
    await ask.aclose()


def test_one_wrapped_function_from_many_asyncio_runs():
    @Stack().wrap
    async def ask(n):
        await asyncio.sleep(0)
        return n

    assert [asyncio.run(ask(n)) for n in range(5)] == [0, 1, 2, 3, 4]
    ask.close()


async def test_an_ignored_parameter_is_no_part_of_the_payload():
    class Bot:
        @Stack().wrap
        async def plain(self, prompt): ...

    from llmmw.edges.function import Binder

    binder = Binder(Bot.plain.__wrapped__, ("self",))
    assert binder.bind((Bot(), "p"), {}) == {"prompt": "p"}
    await Bot.plain.aclose()


async def test_a_function_may_close_its_own_engine():
    from llmmw import Coalescer, TTLCache

    @Stack(TTLCache(60), Coalescer()).wrap
    async def ask():
        await ask.aclose()
        return "last"

    async with asyncio.timeout(120):
        assert await ask() == "last"
        await ask.aclose()
    assert ask.engine.closed
