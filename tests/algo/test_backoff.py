from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.backoff import MAX_FREE_TRIES, Progress, Room, Rules, Verdict, cost_of, decide
from llmmw.algo.budget import RetryBudget
from llmmw.fault import Fault, FaultKind

K = FaultKind
QUICK = settings(max_examples=150, derandomize=True, deadline=None)
RULES = Rules()


def judge(
    fault: Fault, *, rules: Rules = RULES, progress: Progress | None = None, draw: float = 0.5, **room: object
) -> Verdict:
    return decide(rules, progress or Progress(), fault, draw=draw, room=Room(**room))  # type: ignore[arg-type]


faults = st.builds(
    Fault,
    st.sampled_from(list(FaultKind)),
    st.none() | st.floats(0.001, 3600),
    st.none() | st.booleans(),
)


@QUICK
@given(faults, st.floats(0, 1, exclude_max=True), st.integers(0, 2000), st.integers(0, 50), st.booleans())
def test_delay_is_finite_and_never_below_what_the_server_asked(
    fault: Fault, draw: float, tries: int, counted: int, paced: bool
) -> None:
    verdict = judge(fault, draw=draw, progress=Progress(tries=tries, counted=counted), paced=paced)
    assert 0 <= verdict.wait_s <= 3605
    asked = fault.retry_after_s
    if asked is None:
        assert verdict.wait_s <= 20
    elif not (paced and fault.kind is K.RATE):
        assert asked <= verdict.wait_s <= asked + 5
    assert verdict.again is (verdict.reason == "")


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(faults, min_size=60, max_size=60), st.integers(1, 5), st.booleans(), st.booleans())
def test_every_call_ends(found: list[Fault], attempts: int, paced: bool, duplicate_ok: bool) -> None:
    rules = Rules(attempts=attempts, duplicate_ok=duplicate_ok)
    progress, tries = Progress(), 0
    for fault in found:
        tries += 1
        verdict = judge(fault, rules=rules, progress=progress, paced=paced)
        if not verdict.again:
            break
        progress = verdict.progress
    assert tries <= attempts + MAX_FREE_TRIES


@QUICK
@given(faults, st.floats(0, 1, exclude_max=True), st.floats(0, 100))
def test_nothing_is_repeated_beyond_the_deadline(fault: Fault, draw: float, left: float) -> None:
    verdict = judge(fault, draw=draw, left_s=left)
    if verdict.again:
        assert verdict.wait_s <= left


@pytest.mark.parametrize("kind", [K.INVALID, K.QUOTA, K.CANCELLED, K.REFUSED])
@pytest.mark.parametrize("wish", [None, True, False])
def test_route_10_servers_wish_revives_neither_invalid_nor_quota(kind: FaultKind, wish: bool | None) -> None:
    assert judge(Fault(kind, should_retry=wish)).reason == "cannot help"


@pytest.mark.parametrize("kind", [K.AUTH, K.CONTEXT_LENGTH, K.CONTENT_FILTER])
def test_servers_wish_decides_where_we_would_not(kind: FaultKind) -> None:
    assert not judge(Fault(kind)).again
    assert judge(Fault(kind, should_retry=True)).again


@pytest.mark.parametrize("kind", [K.SERVER, K.RATE, K.NOT_SENT, K.MALFORMED])
def test_servers_no_is_obeyed(kind: FaultKind) -> None:
    assert judge(Fault(kind)).again
    assert judge(Fault(kind, should_retry=False)).reason == "the server says not to"


def test_jitter_doubles_up_to_the_cap() -> None:
    waits = [judge(Fault(K.SERVER), draw=1.0, rules=Rules(attempts=99), progress=Progress(i)).wait_s for i in range(8)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]


def test_attempts_are_counted() -> None:
    first = judge(Fault(K.SERVER))
    second = judge(Fault(K.SERVER), progress=first.progress)
    third = judge(Fault(K.SERVER), progress=second.progress)
    assert [first.again, second.again, third.again] == [True, True, False]
    assert third.reason == "attempts used up"
    assert not judge(Fault(K.SERVER), rules=Rules(attempts=1)).again


def test_lost_call_is_repeated_only_where_that_is_harmless() -> None:
    lost = Fault(K.AMBIGUOUS)
    assert judge(lost).reason == "may be done already"
    assert judge(lost, rules=Rules(duplicate_ok=True)).again
    once = judge(lost, rules=Rules(idempotent=True, attempts=9))
    assert once.again
    assert not judge(lost, rules=Rules(idempotent=True, attempts=9), progress=once.progress).again


def test_rate_limit_within_the_patience_uses_up_no_attempt() -> None:
    busy = Fault(K.RATE, retry_after_s=10.0)
    progress, waits = Progress(), 0
    while True:
        verdict = judge(busy, progress=progress, draw=0.0)
        if not verdict.again:
            break
        progress, waits = verdict.progress, waits + 1
    assert waits == 6 + 2
    assert judge(busy, rules=Rules(rate_patience_s=0, attempts=1)).reason == "attempts used up"


def test_limiter_inside_does_the_waiting_the_server_asked_for() -> None:
    assert judge(Fault(K.RATE, retry_after_s=10.0), paced=True).wait_s == 0
    assert judge(Fault(K.RATE), paced=True).wait_s > 0
    assert judge(Fault(K.SERVER, retry_after_s=10.0), paced=True).wait_s >= 10
    late = judge(Fault(K.RATE, retry_after_s=10.0), paced=True, left_s=5.0)
    assert late.reason == "beyond the deadline"


def test_router_limits_tries_and_waits() -> None:
    assert judge(Fault(K.SERVER), tries_left=1).reason == "attempts of all endpoints used up"
    assert judge(Fault(K.SERVER), tries_left=2).again
    assert judge(Fault(K.RATE, retry_after_s=9.0), rate_wait_s=2.0).reason == "another endpoint answers sooner"
    assert judge(Fault(K.RATE, retry_after_s=1.0), rate_wait_s=2.0).again
    assert judge(Fault(K.SERVER, retry_after_s=9.0), rate_wait_s=2.0).again


def test_costs_follow_the_table() -> None:
    def cost(kind: FaultKind, *, paced: bool = False) -> int:
        return cost_of(Fault(kind), paced=paced)

    assert [cost(kind) for kind in (K.NOT_SENT, K.RATE, K.SERVER, K.AMBIGUOUS, K.MALFORMED)] == [5, 5, 5, 10, 10]
    assert cost(K.RATE, paced=True) == 0
    assert cost(K.SERVER, paced=True) == 5


# ── budget ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_budget_gives_back_what_helped() -> None:
    budget = RetryBudget(500)
    assert budget.take(5, 0.0)
    assert budget.level == 495
    budget.call_succeeded(5)
    assert budget.level == 500
    budget.call_succeeded(0)
    assert budget.level == 500
    assert budget.take(10, 0.0)
    budget.call_succeeded(0)
    assert budget.level == 491


def test_empty_budget_lets_one_per_second_and_a_tenth_of_traffic_pass() -> None:
    budget = RetryBudget(0)
    for _ in range(20):
        budget.call_began()
    passed = [budget.take(5, 100.0) for _ in range(10)]
    assert passed == [True, True, True, *[False] * 7]
    assert not budget.take(5, 100.9)
    assert budget.take(5, 101.0)


def test_budget_charges_a_shared_request_once() -> None:
    budget = RetryBudget(100)
    assert all(budget.take(10, 0.0, exchange=7) for _ in range(8))
    assert budget.level == 90
    for number in range(1, 400):
        budget.take(0, 0.0, exchange=number)
    assert len(budget._exchanges) == 256


@QUICK
@given(st.lists(st.sampled_from(["call", "ok", "retried", 5, 10]), max_size=300), st.integers(0, 500))
def test_budget_stays_within_its_bounds(actions: list[str | int], capacity: int) -> None:
    budget = RetryBudget(capacity)
    for now, action in enumerate(actions):
        if action == "call":
            budget.call_began()
        elif action == "ok":
            budget.call_succeeded(0)
        elif action == "retried":
            budget.call_succeeded(5)
        else:
            budget.take(int(action), now / 10)
        assert 0 <= budget.level <= capacity


def test_budget_bounds_the_load_on_a_dead_endpoint() -> None:
    budget, sent = RetryBudget(500), 0
    for number in range(10_000):
        budget.call_began()
        sent += 1
        for _ in range(2):
            if not budget.take(5, number / 1000):
                break
            sent += 1
    assert sent <= 10_000 * 1.13
