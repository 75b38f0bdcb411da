"""Functions that share a name share no answers, unless they are the same function and read the same."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import logging
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
import types

import anthropic
import openai
import pydantic
import pytest

from llmmw import ConfigError, Stack, TTLCache
from llmmw.keys.code import FunctionCode

# ruff: noqa: PLW0603 — globals that change are what this is about


def digest(function, **options):
    ((name, found),) = FunctionCode(function, **options).variant()
    assert name == "code"
    assert len(found) == 32
    return found


def asker(prefix, other=None):
    def ask(prompt):
        return f"{prefix} {prompt} {other}"

    return ask


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Settings:
    style: str


class Declared(pydantic.BaseModel):
    style: str


def client(url="http://a", key="k", **options):
    return openai.AsyncOpenAI(base_url=url, api_key=key, **options)


APART = [
    "a", "b", 1, "0x1", True, 1.0, None, b"a", ("a", "b"), ["a", "b"], {"a": "b"}, {"a": "c"}, {"a"}, frozenset({"a"}),
    [["a"]], [], 10**5000, Colour.RED, Colour.BLUE, Settings("x"), Settings("y"), Declared(style="x"),
    Declared(style="y"), Settings, Declared, json, re, re.compile("a"), re.compile("a", re.IGNORECASE),
    pathlib.PurePath("a"), pathlib.PurePath("b"), logging.getLogger("a"), threading.Lock(), "a{}".format, "b{}".format,
    asker("c"), asker("d"), functools.partial(asker, "a"), functools.partial(asker, "b"), functools.cache(asker("a")),
    functools.cache(asker("b")), len, sorted, client(), client("http://b"), client(key="l"),
    client(organization="o"), client(project="o"), client(default_headers={"openai-beta": "x"}),
    client(default_query={"api-version": "1"}), anthropic.Anthropic(api_key="k"), anthropic.Anthropic(api_key="l"),
]  # fmt: skip


def test_what_a_function_closes_over_tells_it_apart():
    assert len({digest(asker(value)) for value in APART}) == len(APART)
    for value in APART:
        assert digest(asker(value)) == digest(asker(value))
        assert FunctionCode(asker(value)).private_for == ""


def test_the_code_tells_functions_apart():
    def deep(limit):
        def ask(prompt):
            inner = asker("a")
            return [inner(part) for part in prompt if part in {"x", "y"}][:limit]

        return ask

    functions = [
        deep(1), deep(2), lambda prompt: "a", lambda prompt: "b", str.upper, functools.cache(asker("a")),
        Stack().wrap(asker("a")), Stack().wrap(asker("b")),
    ]  # fmt: skip
    assert len({digest(function) for function in functions}) == len(functions)


def with_provider():
    found = client()
    found._api_key_provider = lambda: "k"
    return found


UNKNOWN = [
    object(), [object()], {"a": object()}, (1, object()), object().__eq__, functools.partial(print, object()),
    list(range(2000)), with_provider(),
]  # fmt: skip


@pytest.mark.parametrize("value", UNKNOWN, ids=lambda value: type(value).__name__)
def test_cache_08_objects_of_unknown_content_are_shared_with_no_other_function(value):
    one, two = FunctionCode(asker("a", value)), FunctionCode(asker("a", value))
    assert one.private_for == two.private_for == "other"
    assert one.variant() == one.variant() != two.variant()
    assert digest(asker("a", value), ignore=("other",)) == digest(asker("a", value), ignore=("other",))


def test_a_decorators_own_objects_are_settings():
    def decorated(settings):
        def ask(prompt):
            return prompt

        @functools.wraps(ask)
        def wrapper(*args):
            return settings and ask(*args)

        return wrapper

    assert digest(decorated(object())) == digest(decorated(object()))
    assert FunctionCode(decorated(object())).private_for == ""


def test_a_function_that_names_itself_or_what_is_not_there_yet_has_a_digest():
    def count(down):
        return later() if down else count(down - 1)

    first = FunctionCode(count)
    before = first.variant()

    def later():
        return 0

    assert first.variant() != before
    looped = [1]
    looped.append(looped)
    assert digest(asker(looped)) == digest(asker(looped))


class Odd:
    def __getattr__(self, name):
        raise RuntimeError("do not touch")


def test_objects_that_resist_are_of_unknown_content():
    assert FunctionCode(asker(Odd())).private_for == "prefix"


# ── what changes while the program runs ─────────────────────────────────────────────────────────────────────────────

SYSTEM = "be nice"
CALLS = 0
LOG: list[str] = []
LIMIT = 3
CLIENT = object()
message = "a loop variable of the module"


def build(prompt):
    return f"{SYSTEM} {prompt}"


def ask_globally(prompt):
    global CALLS
    CALLS += 1
    LOG.append(prompt)
    return CLIENT, build(prompt).message


@pytest.fixture
def watched():
    code = FunctionCode(ask_globally)
    return code, code.variant()


def test_a_global_that_is_read_counts_also_through_a_helper(watched, monkeypatch):
    code, before = watched
    monkeypatch.setattr(sys.modules[__name__], "SYSTEM", "be rude")
    assert code.variant() != before
    monkeypatch.undo()
    assert code.variant() == before


def test_another_helper_counts(watched, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "build", lambda prompt: prompt)
    assert watched[0].variant() != watched[1]


def test_what_it_sets_itself_or_does_not_read_counts_not(watched, monkeypatch):
    for name in ("CALLS", "LIMIT", "message"):
        monkeypatch.setattr(sys.modules[__name__], name, "changed")
    assert watched[0].variant() == watched[1]


def test_what_it_collects_in_a_list_counts_as_it_was_at_first(watched, monkeypatch):
    code, before = watched
    LOG.append("x")
    assert code.variant() == before
    monkeypatch.setattr(sys.modules[__name__], "SYSTEM", "be rude")
    code.variant()
    monkeypatch.undo()
    assert code.variant() == before
    LOG.clear()


def test_another_client_in_a_global_is_the_same_to_it(watched, monkeypatch):
    code, before = watched
    monkeypatch.setattr(sys.modules[__name__], "CLIENT", object())
    assert code.variant() == before
    assert code.private_for == ""
    assert FunctionCode(ask_globally, ignore=("SYSTEM",)).variant() != before


def test_a_variable_it_closes_over_that_changes_counts_and_one_it_sets_does_not():
    def make():
        style, count = "nice", 0

        def ask(prompt):
            nonlocal count
            count += 1
            return style + prompt

        def change(to):
            nonlocal style
            style = to

        return ask, change

    ask, change = make()
    code = FunctionCode(ask)
    before = code.variant()
    ask("x")
    assert code.variant() == before
    change("rude")
    assert code.variant() != before


def test_nothing_is_kept_of_values_that_were_replaced():
    def make():
        found = []

        def ask(prompt):
            return found, prompt

        def change():
            nonlocal found
            found = [len(found)]

        return ask, change

    ask, change = make()
    code = FunctionCode(ask)
    for _ in range(100):
        change()
        code.variant()
    assert len(code._reading.seen) + len(code._reading._known) <= 2


def test_threads_that_ask_at_once_agree():
    code, found = FunctionCode(ask_globally), []
    threads = [threading.Thread(target=lambda: found.append(code.variant())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


# ── methods ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Agent:
    def __init__(self, name="a"):
        self.name = name

    def ask(self, prompt):
        return f"{self.name} {prompt}"

    @classmethod
    def of(cls, prompt):
        return f"{cls.__name__} {prompt}"


class OtherAgent(Agent):
    pass


@dataclasses.dataclass
class Plain:
    name: str

    def ask(self, prompt):
        return f"{self.name} {prompt}"


def sources(function, *prompts, **options):
    ask = Stack(TTLCache(300)).wrap(function, **options)
    found = [ask(prompt) for prompt in prompts]
    hits = ask.get_performance_stats()["cache_hits"]
    ask.close()
    return found, hits


def test_cache_08_a_bound_methods_object_is_an_argument():
    agent = Agent()
    ask = Stack(TTLCache(300)).wrap(agent.ask)
    assert ask("x") == "a x"
    agent.name = "b"
    assert ask("x") == "b x"
    assert ask.get_performance_stats()["layers"]["cache"] == pytest.approx(
        ask.get_performance_stats()["layers"]["cache"] | {"skipped: no codec for Agent": 2}
    )
    ask.close()
    assert sources(Agent().ask, "x", "x", ignore="self")[1] == 1


def test_a_bound_methods_object_with_a_declared_form_counts_by_its_content():
    plain = Plain("a")
    ask = Stack(TTLCache(300)).wrap(plain.ask)
    assert [ask("x"), ask("x")] == ["a x"] * 2
    plain.name = "b"
    assert ask("x") == "b x"
    assert ask.get_performance_stats()["cache_hits"] == 1
    ask.close()


def test_a_class_method_is_told_by_its_class():
    assert sources(Agent.of, "x", "x")[1] == 1
    assert digest(Agent.of) != digest(OtherAgent.of)


def test_ignore_names_parameters_variables_and_globals_and_nothing_else():
    stack = Stack(TTLCache(300))
    for name in ("CLIENT", "build", "prompt"):
        stack.wrap(ask_globally, ignore=name).close()
    stack.wrap(asker("a", object()), ignore=("other", "prefix")).close()
    with pytest.raises(ConfigError, match=r"'nonsense'.*it has: prompt.*other, prefix"):
        stack.wrap(asker("a"), ignore="nonsense")
    with pytest.raises(ConfigError, match="no such parameter"):
        stack.wrap(asker("a"), ignore="self")


def test_a_private_function_says_so_where_there_is_a_directory(tmp_path):
    def warned(stack, **options):
        ask = stack.wrap(asker("a", object()), **options)
        ask("x")
        found = ask.get_performance_stats()["warnings"]
        ask.close()
        return found

    told = warned(Stack(TTLCache(300, directory=tmp_path / "c")))
    assert "ignore='other'" in told["cache: private function"]
    assert warned(Stack(TTLCache(300))) == {}
    assert warned(Stack(TTLCache(300, directory=tmp_path / "c")), ignore="other") == {}


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import sys, llmmw
@llmmw.middleware(cache_ttl=300, cache_directory=sys.argv[1])
def ask(prompt):
    return SYSTEM + "{answer}" if prompt in {{"a", "b", "c"}} else None
SYSTEM = "{system}"
print(ask("a"), ask.get_performance_stats()["cache_hits"])
ask.close()
"""


def test_cache_08_two_programs_with_a_function_of_one_name_share_a_directory(tmp_path):
    def run(answer, system=""):
        command = [sys.executable, "-c", PROGRAM.format(answer=answer, system=system), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()

    assert run("summary") == ["summary", "0"]
    assert run("translation") == ["translation", "0"]
    assert run("summary") == ["summary", "1"]
    assert run("summary", "rude-") == ["rude-summary", "0"]


def test_processes_agree_on_everything_that_has_a_form(tmp_path):
    source = textwrap.dedent("""
        import enum, json, re, pathlib, openai, sys
        from llmmw.keys.code import FunctionCode
        class Colour(enum.Enum): RED = 1
        TABLE = {"b": 1, "a": {"x", "y", "z"}}
        PATH, PATTERN, CLIENT = pathlib.PurePath("a"), re.compile("x"), openai.OpenAI(api_key="k")
        def helper(x): return json.dumps(x) + str(len(x))
        def make(client):
            def ask(prompt): return helper(prompt), TABLE, PATH, PATTERN, CLIENT, Colour.RED, Colour, client, sys
            return ask
        print(FunctionCode(make(CLIENT)).variant())
    """)
    found = {
        subprocess.run(
            [sys.executable, "-c", source], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_cache_08_functions_of_one_factory_share_a_directory(tmp_path):
    stack = Stack(TTLCache(300, directory=str(tmp_path)))
    for prefix in ("a", "b", ["c"], ["d"], types.SimpleNamespace(name="e"), types.SimpleNamespace(name="f")):
        ask = stack.wrap(asker(prefix))
        assert ask("q") == f"{prefix} q None"
        ask.close()
