"""Functions that share a name share no answers, unless they are the same function and read the same."""

from __future__ import annotations

import contextvars
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
import patience
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


# ── programs as strings: what is between the two must tell, or not ───────────────────────────────────────────────────

EDITS = {
    "default of a helper": ("def h(x, y='a'): return y\ndef f(p): return h(p)", "'a'", "'b'"),
    "keyword default of a helper": ("def h(x, *, y='a'): return y\ndef f(p): return h(p)", "'a'", "'b'"),
    "star": ("def h(*x): return str(x)\ndef f(p): return h(p)", "*x", "x"),
    "method of a class it uses": ("class A:\n def m(self): return 1\ndef f(p): return A().m()", "1", "2"),
    "method of an object it uses": ("class A:\n def m(self): return 1\na = A()\ndef f(p): return a.m()", "1", "2"),
    "property": ("class A:\n @property\n def m(self): return 1\ndef f(p): return A().m", "1", "2"),
    "base class": ("class B:\n x = 1\nclass A(B): pass\ndef f(p): return A().x", "1", "2"),
    "method beside it": ("class A:\n def h(self): return 1\n def f(self, p): return self.h()\nf = A.f", "1", "2"),
    "description of a field": (
        "import pydantic as p\nclass A(p.BaseModel):\n x: int = p.Field(description='a')\ndef f(p): return A",
        "'a'",
        "'b'",
    ),
    "value of an enum": ("import enum\nclass E(enum.Enum):\n A = 1\ndef f(p): return E.A.value", "1", "2"),
    "configuration beside an object": ("C = {'x': object(), 't': 1}\ndef f(p): return C", "1", "2"),
}  # fmt: skip
CHANGES = {
    "item": ("C = {'t': {'u': 0}}\ndef f(p): return C['t']['u']", "C['t']['u'] = 1"),
    "list": ("C = [1]\ndef f(p): return C", "C.append(2)"),
    "what a decorated function reads": (
        "import contextlib\nC = [1]\n@contextlib.contextmanager\ndef f(p): return C", "C.append(2)"
    ),
    "history": ("H = []\ndef f(p):\n H.append(p)\n return str(H)", "f('x')"),
    "object": ("class A: t = 0\na = A(); a.t = 1\ndef f(p): return a.t", "a.t = 2"),
    "class behind an object": ("class A: t = 0\na = A()\ndef f(p): return a.t", "A.t = 2"),
    "class": ("class A: t = 0\ndef f(p): return A.t", "A.t = 2"),
    "namespace": ("import types\na = types.SimpleNamespace(t=1)\ndef f(p): return a.t", "a.t = 2"),
    "declared": (
        "import dataclasses as d\n@d.dataclass\nclass A:\n t: list\na = A([1])\ndef f(p): return a", "a.t.append(2)"
    ),
    "slots": (
        "import dataclasses as d\n@d.dataclass(slots=True)\nclass A:\n t: int\na = A(1)\ndef f(p): return a.t",
        "a.t = 2",
    ),
    "context variable": ("import contextvars\nv = contextvars.ContextVar('v')\ndef f(p): return v.get()", "v.set(1)"),
    "context variable of unknown": (
        "import contextvars\nv = contextvars.ContextVar('v')\ndef f(p): return v.get()", "v.set(object())"
    ),
    "environment": ("import os\ndef f(p): return os.environ.get('LLMMW_X')", "os.environ['LLMMW_X'] = '1'"),
    "code": ("def h(x): return 1\ndef g(x): return 2\ndef f(p): return h(p)", "h.__code__ = g.__code__"),
    "default": ("def h(x, y=1): return y\ndef f(p): return h(p)", "h.__defaults__ = (2,)"),
    "compared badly": ("C = [{1: X(1)}]\ndef f(p): return C", "C[0][1] = X(2)"),
}  # fmt: skip
NO_CHANGES = {
    "log": ("H = []\ndef f(p):\n H.append(p)\n return p", "f('x')"),
    "calls counted in a list": ("H = []\ndef f(p):\n H.append(p)\n return len(H)", "f('x')"),
    "statistics": ("S = {'n': 0}\ndef f(p):\n S['n'] += 1\n return p", "f('x')"),
    "other statistics": ("S = {}\ndef f(p):\n S['n'] = S.get('n', 0) + 1\n return p", "f('x')"),
    "memory": ("M = {}\ndef f(p):\n if p not in M: M[p] = 1\n return M[p]", "f('x')"),
    "tracker": ("class T:\n n = 0\n def add(self): self.n += 1\nt = T()\ndef f(p):\n t.add()\n return p", "f('x')"),
    "attribute": ("class T: pass\nt = T(); t.n = 0\ndef f(p):\n t.n += 1\n return p", "f('x')"),
    "standard library": ("import sys\ndef f(p): return sys.argv", "sys.argv = [*sys.argv, 'x']"),
}


class BadlyCompared:
    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        raise ValueError("the truth value is ambiguous")

    __hash__ = None


def program(source):
    module = {"__name__": "__main__", "X": BadlyCompared}
    exec(source, module)  # programs as their users write them
    return module, FunctionCode(module["f"])


@pytest.mark.parametrize("edit", EDITS)
def test_cache_08_an_edited_program_starts_afresh(edit):
    source, old, new = EDITS[edit]
    before = program(source)[1].variant()
    assert program(source)[1].variant() == before
    assert program(source.replace(old, new))[1].variant() != before


def test_cache_08_what_a_try_covers_counts():
    one = "def f(p):\n try:\n  a(p)\n except E:\n  return 1\n else:\n  b(p)\n"
    other = "def f(p):\n try:\n  a(p)\n  b(p)\n except E:\n  return 1\n"
    assert program(one)[1].variant() != program(other)[1].variant()


@pytest.mark.parametrize("change", CHANGES)
def test_cache_08_what_it_answers_from_counts_as_it_is_now(change, monkeypatch):
    monkeypatch.delenv("LLMMW_X", raising=False)
    monkeypatch.setattr(sys, "argv", [])

    def run():
        module, code = program(CHANGES[change][0])
        before = code.variant()
        assert code.variant() == before
        exec(CHANGES[change][1], module)
        if change != "compared badly":  # is of unknown content, and read again
            assert code.variant() != before
        return code.variant()

    contextvars.copy_context().run(run)


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_it_keeps_for_itself_does_not_count(change, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    module, code = program(NO_CHANGES[change][0])
    before = code.variant()
    exec(NO_CHANGES[change][1], module)
    assert code.variant() == before


def test_what_modules_of_the_users_hold_counts(tmp_path, monkeypatch):
    (tmp_path / "own_prompts.py").write_text("SYSTEM = 'nice'\ndef build(p): return SYSTEM + p\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "import own_prompts\ndef f(p): return own_prompts.SYSTEM, own_prompts.build(p)"
    module, code = program(source)
    found = [code.variant()]
    module["own_prompts"].SYSTEM = "rude"
    found.append(code.variant())
    module["own_prompts"].build = lambda p: p
    found.append(code.variant())
    assert len(set(found)) == 3
    monkeypatch.delitem(sys.modules, "own_prompts")


def test_many_functions_that_call_each_other_are_read_once_each():
    """Nine that all call each other took a minute and a half, path by path."""
    calls = "+".join(f"g{number}(x)" for number in range(60))
    source = "\n".join(f"def g{number}(x): return {calls}" for number in range(60))
    deep = "\n".join(f"def a{number}(x): return a{number + 1}(x)" for number in range(2000))
    before = program(f"{source}\n{deep}\ndef f(p): return g0(p) + a0(p)")[1].variant()
    assert program(f"{source}\n{deep}\ndef a2000(x): return 1\ndef f(p): return g0(p) + a0(p)")[1].variant() != before
    shared = "X = [1]\n" + "X = [X, X]\n" * 60 + "def f(p): return X"
    assert program(shared)[1].variant() == program(shared)[1].variant()


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
    assert len(code._reading.watched) + len(code._reading.contents) <= 4


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


def test_a_function_that_is_never_cached_says_so():
    ask = Stack(TTLCache(300)).wrap(Agent.ask)
    assert [ask(Agent(), "x"), ask(Agent(), "x")] == ["a x"] * 2
    told = ask.get_performance_stats()["warnings"]["cache: not cacheable"]
    assert "Agent.ask: a call is not cached (no codec for Agent)" in told
    assert "ignore=" in told
    ask.close()


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
        command = [
            sys.executable,
            "-c",
            patience.FOR_A_CHILD + PROGRAM.format(answer=answer, system=system),
            str(tmp_path),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.split()

    assert run("summary") == ["summary", "0"]
    assert run("translation") == ["translation", "0"]
    assert run("summary") == ["summary", "1"]
    assert run("summary", "rude-") == ["rude-summary", "0"]


def test_processes_agree_on_everything_that_has_a_form(tmp_path):
    source = textwrap.dedent("""
        import anthropic, enum, json, re, pathlib, openai, sys
        from llmmw.keys.code import FunctionCode
        class Colour(enum.Enum): RED = 1
        TABLE = {"b": 1, "a": {"x", "y", "z"}}
        PATH, PATTERN, CLIENT = pathlib.PurePath("a"), re.compile("x"), openai.OpenAI(api_key="k")
        CLAUDE = anthropic.Anthropic(api_key="k")
        def helper(x): return json.dumps(x) + str(len(x))
        def make(client):
            def ask(prompt): return helper(prompt), TABLE, PATH, PATTERN, CLIENT, CLAUDE, Colour.RED, client, sys
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


RETURNING = """
import dataclasses, sys, llmmw
@dataclasses.dataclass
class Answer:
    text: str
@llmmw.middleware(cache_ttl=300, cache_directory=sys.argv[1])
def ask(prompt){annotation}:
    return Answer(prompt)
assert ask("x") == Answer("x")
print(ask.get_performance_stats()["cache_hits"], *ask.get_performance_stats()["warnings"].values())
ask.close()
"""


@pytest.mark.parametrize(("annotation", "told"), [("", "1 __main__.ask returns objects"), (" -> Answer", "1\n")])
def test_a_class_that_is_not_annotated_is_no_use_to_other_processes_and_says_so(tmp_path, annotation, told):
    command = [sys.executable, "-c", patience.FOR_A_CHILD + RETURNING.format(annotation=annotation), str(tmp_path)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout for _ in range(2)]
    assert runs[0] == "0\n"
    assert told in runs[1]


SPAWNING = """
import dataclasses, datetime, decimal, multiprocessing, sys, uuid, llmmw
@dataclasses.dataclass
class Question:
    text: str
    on: datetime.date
@llmmw.middleware(cache_ttl=300, cache_directory=sys.argv[1])
def ask(question, number, price):
    return question
def main():
    ask(Question("a", datetime.date(2026, 1, 1)), uuid.UUID(int=1), decimal.Decimal("1.5"))
    print(ask.get_performance_stats()["cache_hits"], flush=True)
    ask.close()
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=main)
    child.start()
    child.join()
    main()
"""


def test_a_program_shares_with_the_processes_that_it_spawns(tmp_path):
    (tmp_path / "program.py").write_text(patience.FOR_A_CHILD + SPAWNING)
    command = [sys.executable, "program.py", "cache"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240)
    assert found.stdout.split() == ["0", "1"]


def test_cache_08_functions_of_one_factory_share_a_directory(tmp_path):
    stack = Stack(TTLCache(300, directory=str(tmp_path)))
    for prefix in ("a", "b", ["c"], ["d"], types.SimpleNamespace(name="e"), types.SimpleNamespace(name="f")):
        ask = stack.wrap(asker(prefix))
        assert ask("q") == f"{prefix} q None"
        ask.close()
