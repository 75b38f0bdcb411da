from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.hedge import EXTRA_SHARE, REST_S, HedgePlan
from llmmw.algo.service import MIN_SAMPLES

QUICK = settings(max_examples=150, derandomize=True, deadline=None)
KIND = ("chat", "m")


@QUICK
@given(st.lists(st.sampled_from(["began", "take", "unsent", "refused", "later"]), max_size=400))
def test_never_more_than_the_budget_and_none_while_refused(actions: list[str]) -> None:
    plan, began, now, rests_until, held = HedgePlan(), 0, 0.0, 0.0, 0
    for action in actions:
        if action == "began":
            plan.began()
            began += 1
        elif action == "take" and plan.take(now):
            assert now >= rests_until
            held += 1
        elif action == "unsent" and held:
            plan.unsent()
            held -= 1
        elif action == "refused":
            plan.refused(now, None)
            rests_until = now + REST_S
        elif action == "later":
            now += 4.0
        assert plan.sent == held <= EXTRA_SHARE * began + 1e-9


def test_delay_is_what_95_of_100_took_and_unknown_at_first() -> None:
    plan = HedgePlan()
    for number in range(1, 41):
        assert (plan.delay(KIND, 0.0) is None) is (number <= MIN_SAMPLES)
        plan.learn(KIND, 0.0, float(number))
    assert plan.delay(KIND, 0.0) == 38.0
    assert plan.delay(("embed", "m"), 0.0) is None
    assert plan.delay(KIND, 100.0) is None  # too long ago


def test_saved_up_requests_are_few() -> None:
    plan = HedgePlan()
    for _ in range(10_000):
        plan.began()
    assert sum(plan.take(0.0) for _ in range(100)) == 5


def test_servers_wait_is_kept() -> None:
    plan = HedgePlan()
    for _ in range(100):
        plan.began()
    plan.refused(0.0, 30.0)
    plan.refused(1.0, None)
    assert [plan.take(now) for now in (1.0, 29.9, 30.0)] == [False, False, True]
