"""Functions that share a name share no answers, unless they are the same function."""

from __future__ import annotations

import functools
import subprocess
import sys

from llmmw import Stack, TTLCache
from llmmw.keys.code import code_digest


def asker(prefix, other=None):
    def ask(prompt):
        return f"{prefix} {prompt} {other}"

    return ask


def test_the_code_and_what_it_closes_over_tell_functions_apart():
    def deep(limit):
        def ask(prompt):
            inner = asker("a")
            return [inner(part) for part in prompt if part in {"x", "y"}][:limit]

        return ask

    functions = [
        asker("a"), asker("b"), asker(1), asker(True), asker(1.0), asker(("a", "b")), asker(frozenset({"a"})),
        asker("a", asker("c")), asker("a", asker("d")), deep(1), deep(2), lambda prompt: "a", lambda prompt: "b",
        str.upper, functools.cache(asker("a")), functools.cache(asker("b")), Stack().wrap(asker("a")),
        Stack().wrap(asker("b")),
    ]  # fmt: skip
    assert len({code_digest(function) for function in functions}) == len(functions)
    assert code_digest(asker("a")) == code_digest(asker("a"))
    assert code_digest(asker("a", object())) == code_digest(asker("a", object()))


def test_a_function_that_names_itself_or_what_is_not_there_yet_has_a_digest():
    def count(down):
        return later() if down else count(down - 1)

    first = code_digest(count)

    def later():
        return 0

    assert first != code_digest(count)


class Agent:
    def ask(self, prompt):
        return prompt


def test_a_bound_method_is_its_function():
    assert code_digest(Agent().ask) == code_digest(Agent.ask)


PROGRAM = """
import sys, llmmw
@llmmw.middleware(cache_ttl=300, cache_directory=sys.argv[1])
def ask(prompt):
    return "{answer}" if prompt in {{"a", "b", "c"}} else None
print(ask("a"), ask.get_performance_stats()["cache_hits"])
ask.close()
"""


def test_cache_08_two_programs_with_a_function_of_one_name_share_a_directory(tmp_path):
    def run(answer):
        command = [sys.executable, "-c", PROGRAM.format(answer=answer), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()

    assert run("summary") == ["summary", "0"]
    assert run("translation") == ["translation", "0"]
    assert run("summary") == ["summary", "1"]


def test_cache_08_functions_of_one_factory_share_a_directory(tmp_path):
    stack = Stack(TTLCache(300, directory=str(tmp_path)))
    for prefix in ("a", "b"):
        ask = stack.wrap(asker(prefix))
        assert ask("q") == f"{prefix} q None"
        ask.close()
