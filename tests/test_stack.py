"""The stack as a value: checked order, changes into new stacks, explanation."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest

import llmmw
from llmmw import Bound, ConfigError, OrderError, Role, Stack
from llmmw.layers.deadline import Deadline
from llmmw.order import RULES, find_violations
from llmmw.testing import FakeUpstream


@dataclass(frozen=True)
class Standin:
    """A layer of any role."""

    role: Role

    def bind(self, inner, env):
        return Bound(inner, env)


PROPER = [role for role in Role if role is not Role.CUSTOM]


def test_the_recommended_order_breaks_no_rule():
    assert find_violations(PROPER) == []
    assert Stack(*(Standin(role) for role in PROPER)).check() == ()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_order_03_every_rule_is_enforced_and_says_why(rule):
    with pytest.raises(OrderError) as caught:
        Stack(Standin(rule.inner), Standin(rule.outer))
    assert caught.value.rule == rule.id
    assert rule.why in str(caught.value)
    allowed = Stack(Standin(rule.inner), Standin(rule.outer), allow=(rule.id,))
    assert [finding.rule for finding in allowed.check() if finding.severity == "error"] == [rule.id]


def test_two_layers_of_one_role_are_refused():
    with pytest.raises(OrderError, match="one-per-role"):
        Stack(Standin(Role.RETRY), Standin(Role.RETRY))
    assert len(Stack(Standin(Role.CUSTOM), Standin(Role.CUSTOM))) == 2


def test_a_coalescer_without_cache_is_a_warning():
    [finding] = Stack(Standin(Role.COALESCE)).check()
    assert finding.severity == "warning"
    assert finding.rule in Stack(Standin(Role.COALESCE)).explain()


def test_what_is_no_layer_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match=r"write Deadline\(\.\.\.\)"):
        Stack(Deadline)
    with pytest.raises(ConfigError, match="not a layer"):
        Stack("cache")
    with pytest.raises(ConfigError, match="no such rule"):
        Stack(allow=("nonsense",))


def test_changes_make_new_checked_stacks():
    base = Stack(Standin(Role.CACHE), Standin(Role.RETRY))
    assert [layer.role for layer in base.inside(Role.CACHE, Standin(Role.COALESCE))] == ["cache", "coalesce", "retry"]
    assert [layer.role for layer in base.outside("cache", Standin(Role.DEADLINE))] == ["deadline", "cache", "retry"]
    assert [layer.role for layer in base.without(Role.CACHE)] == ["retry"]
    assert base.replacing(Role.RETRY, Standin(Role.TIMEOUT))[Role.TIMEOUT] == Standin(Role.TIMEOUT)
    assert len(base) == 2
    with pytest.raises(OrderError):
        base.outside(Role.CACHE, Standin(Role.LIMIT))
    with pytest.raises(ConfigError, match="it has: cache, retry"):
        base.without(Role.LIMIT)


def test_stacks_compare_hash_and_print():
    one, two = Stack(Standin(Role.CACHE)), Stack(Standin(Role.CACHE))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Stack()
    assert repr(one) == "Stack(Standin(role=<Role.CACHE: 'cache'>))"
    assert Role.CACHE in one
    assert Role.RETRY not in one


def test_explain_lists_layers_rules_and_the_line_between_call_and_endpoint():
    text = Stack(Standin(Role.CACHE), Standin(Role.RETRY)).explain()
    assert text.index("Role.CACHE") < text.index("once per endpoint") < text.index("Role.RETRY")
    assert "cache > retry: a hit must spend no permit" in text


def test_one_layer_can_be_bound_many_times():
    stack = Stack(Deadline(5))
    assert stack.bind(FakeUpstream()) is not stack.bind(FakeUpstream())


def test_an_endpoint_must_be_one():
    with pytest.raises(ConfigError, match="expected a base URL"):
        Stack().bind(42)


async def test_disabling_by_environment_leaves_the_bare_endpoint(monkeypatch):
    monkeypatch.setenv("LLMMW_DISABLE", "1")
    assert "no layers" in repr(Stack(Deadline(5)).bind(FakeUpstream()))


def test_a_layer_of_ones_own_may_bring_rules():
    from llmmw import Rule

    @dataclass(frozen=True)
    class Audit:
        role = Role.CUSTOM
        rules = (Rule("audit-inside-cache", Role.CACHE, Role.CUSTOM, "hits are not audited"),)

        def bind(self, inner, env):
            return Bound(inner, env)

    sound = Stack(Standin(Role.CUSTOM), Standin(Role.CACHE), Audit())
    assert "hits are not audited" in sound.explain()
    with pytest.raises(OrderError, match="hits are not audited") as caught:
        Stack(Audit(), Standin(Role.CACHE))
    assert caught.value.rule == "audit-inside-cache"
    assert len(Stack(Audit(), Standin(Role.CACHE), allow=("audit-inside-cache",)).check()) == 1


def test_every_layer_knows_its_rules():
    from llmmw import Coalescer, TTLCache

    assert {rule.id for rule in TTLCache(60).rules} >= {"cache-outside-coalesce", "cache-outside-limit"}
    assert all(Role.COALESCE in {rule.outer, rule.inner} for rule in Coalescer().rules)


def everything():
    return Stack(
        llmmw.Deadline(3), llmmw.TTLCache("1h", directory="/nowhere"), llmmw.Coalescer(lease=3), llmmw.ErrorRouter(),
        llmmw.Retry(), llmmw.CircuitBreaker(), llmmw.Batcher(), llmmw.RateLimiter(rpm=3), llmmw.Timeout(3),
    )  # fmt: skip


@pytest.mark.parametrize("stack", [everything(), Stack.recommended(fallbacks=["http://127.0.0.1:1/v1"]), Stack()])
def test_stacks_pickle_and_copy(stack):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        found = pickle.loads(pickle.dumps(stack, protocol))
        assert (found, hash(found), repr(found)) == (stack, hash(stack), repr(stack))
    assert copy.deepcopy(stack) == copy.copy(stack) == stack


def test_what_is_at_work_says_that_it_cannot_be_pickled():
    engine = everything().bind(FakeUpstream())
    client = llmmw.SyncClient("http://127.0.0.1:1/v1")
    for one in (engine, client, llmmw.Client("http://127.0.0.1:1/v1")):
        for attempt in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="Pickle its Stack"):
                attempt(one)
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.copy(engine)
