"""Who gets the next call of several like servers."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.balance import Balance, BalanceRules
from llmmw.algo.circuit import Circuit, CircuitRules

QUICK = settings(max_examples=80, derandomize=True, deadline=None)
AT_ONCE = BalanceRules(slow_start_s=0.0)
STRICT = BalanceRules(room=0, slow_start_s=0.0)
NAMES = st.lists(st.integers(0, 65535), min_size=1, max_size=12, unique=True).map(
    lambda ports: [f"http://10.0.0.1:{port}/v1" for port in ports]
)
KEYS = [f"agent {number}" for number in range(60)]


def made(count: int, rules: BalanceRules = AT_ONCE, weights: list[float] | None = None) -> Balance:
    return Balance([f"http://r{number}.test/v1" for number in range(count)], weights or [1.0] * count, rules)


def anyone(_: int) -> bool:
    return True


def home(balance: Balance, names: list[str], key: str) -> str:
    return names[balance.homes(key)[0]]


# ── homes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@QUICK
@given(NAMES, st.randoms(use_true_random=False))
def test_homes_do_not_depend_on_the_order_of_the_list(names: list[str], rng: random.Random) -> None:
    mixed = rng.sample(names, len(names))
    one, other = (Balance(each, [1.0] * len(names), AT_ONCE) for each in (names, mixed))
    for key in KEYS:
        assert [names[index] for index in one.homes(key)] == [mixed[index] for index in other.homes(key)]


@QUICK
@given(NAMES, st.data())
def test_a_replica_that_goes_moves_nobody_else_and_one_that_comes_takes_only_its_own(
    names: list[str], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(names))
    left = [name for name in names if name != gone]
    if not left:
        return
    more, less = (Balance(each, [1.0] * len(each), AT_ONCE) for each in (names, left))
    for key in KEYS:
        before = [names[index] for index in more.homes(key)]
        after = home(less, left, key)
        assert after == (before[0] if before[0] != gone else before[1])


@QUICK
@given(st.lists(st.floats(0.25, 4), min_size=2, max_size=8), st.data())
def test_more_weight_only_attracts(weights: list[float], data: st.DataObject) -> None:
    balance = made(len(weights), weights=weights)
    grown = data.draw(st.integers(0, len(weights) - 1))
    before = {key: balance.homes(key)[0] for key in KEYS}
    balance.weigh([weight * (2 if index == grown else 1) for index, weight in enumerate(weights)])
    for key, index in before.items():
        assert balance.homes(key)[0] in {index, grown}


def test_homes_are_spread_by_weight() -> None:
    balance = made(3, weights=[1.0, 1.0, 2.0])
    found = Counter(balance.homes(f"agent-{number}")[0] for number in range(4000))
    assert [round(found[index] / 1000, 1) for index in range(3)] == [1.0, 1.0, 2.0]


def test_names_and_keys_do_not_run_into_each_other() -> None:
    one, other = Balance(["a", "ab"], [1, 1], AT_ONCE), Balance(["a", "ab"], [1, 1], AT_ONCE)
    assert len({one.homes(key) for key in ("b" * length for length in range(1, 20))}) == 2
    assert one.homes("\ud800 lone") == other.homes("\ud800 lone")


def test_agents_without_end_need_no_memory_without_end() -> None:
    balance = made(2)
    first = balance.homes("first")
    for number in range(20_000):
        balance.homes(str(number))
    assert len(balance._homes) <= 16_384
    assert balance.homes("first") == first


# ── bounded load ────────────────────────────────────────────────────────────────────────────────────────────────────


@QUICK
@given(
    st.integers(2, 8),
    st.floats(1, 3),
    st.integers(0, 10),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=120),
)
def test_nobodys_home_gets_more_than_its_bound(
    count: int, spill: float, room: int, steps: list[tuple[bool, int]]
) -> None:
    balance = made(count, BalanceRules(spill=spill, room=room, slow_start_s=0.0))
    draw, under_way = random.Random(1).random, list[int]()
    for begins, number in steps:
        if begins:
            index = balance.choose(0.0, draw, anyone, f"agent {number}")
            assert index is not None
            balance.begin(index)
            under_way.append(index)
            bound = max(1, room, -(-spill * len(under_way) // count))
            assert balance.outstanding[index] <= bound
        elif under_way:
            balance.end(under_way.pop(number % len(under_way)), balance.generation)
        assert balance.outstanding == [under_way.count(index) for index in range(count)]


def test_an_agent_stays_at_home_while_there_is_room_and_then_goes_to_the_next_of_its_order() -> None:
    balance = made(3, BalanceRules(spill=1.25, room=4, slow_start_s=0.0))
    homes = balance.homes("alice")
    taken = []
    for _ in range(7):
        index = balance.choose(0.0, random.Random(1).random, anyone, "alice")
        assert index is not None
        balance.begin(index)
        taken.append(index)
    assert taken == [homes[0]] * 4 + [homes[1]] * 3


def test_a_home_that_is_not_fit_is_passed_over_and_nobody_else_moves() -> None:
    balance = made(4, STRICT)
    for key in KEYS:
        order = balance.homes(key)
        assert balance.choose(0.0, random.Random(1).random, lambda index, gone=order[0]: index != gone, key) == order[1]  # type: ignore[misc]


# ── two choices ─────────────────────────────────────────────────────────────────────────────────────────────────────


@QUICK
@given(st.lists(st.integers(0, 50), min_size=2, max_size=2), st.floats(0.1, 10), st.integers(0, 99))
def test_of_two_the_less_busy_is_taken(work: list[int], weight: float, seed: int) -> None:
    balance = made(2, weights=[weight, 1.0])
    for index, calls in enumerate(work):
        for _ in range(calls):
            balance.begin(index)
    found = balance.choose(0.0, random.Random(seed).random, anyone)
    loads = [work[0] / weight, float(work[1])]
    assert found is not None
    assert loads[found] == min(loads)


def test_idle_replicas_share_by_weight() -> None:
    balance = made(2, weights=[3.0, 1.0])
    draw = random.Random(7).random
    found = Counter(balance.choose(0.0, draw, anyone) for _ in range(4000))
    assert 0.72 < found[0] / 4000 < 0.78


@QUICK
@given(st.integers(1, 20), st.sets(st.integers(0, 19)), st.integers(0, 99), st.booleans())
def test_only_the_fit_are_chosen(count: int, fit: set[int], seed: int, keyed: bool) -> None:
    found = made(count).choose(0.0, random.Random(seed).random, fit.__contains__, "alice" if keyed else None)
    able = fit & set(range(count))
    assert (found in able) if able else found is None


def test_two_choices_keep_64_replicas_nearly_even_and_ask_about_few_of_them() -> None:
    balance, draw, asked = made(64), random.Random(3).random, Counter[int]()

    def fit(index: int) -> bool:
        asked[index] += 1
        return True

    for _ in range(6400):
        index = balance.choose(0.0, draw, fit)
        assert index is not None
        balance.begin(index)
    assert max(balance.outstanding) - min(balance.outstanding) <= 8  # at random alone it is about 50
    assert sum(asked.values()) <= 3 * 6400


def test_a_slow_replica_gets_less() -> None:
    balance, draw = made(2), random.Random(5).random
    ends: list[tuple[float, int]] = []
    given_to = Counter[int]()
    for turn in range(2000):
        for at, index in [end for end in ends if end[0] <= turn]:
            ends.remove((at, index))
            balance.end(index, balance.generation)
        index = balance.choose(0.0, draw, anyone)
        assert index is not None
        balance.begin(index)
        given_to[index] += 1
        ends.append((turn + (10 if index else 40), index))
    assert 3 < given_to[1] / given_to[0] < 5


# ── what the server says ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_queue_at_the_server_counts_and_is_forgotten() -> None:
    balance, draw = made(2), random.Random(1).random
    balance.heard(0, 40, 100.0)
    for _ in range(9):
        balance.begin(1)
    assert balance.choose(100.0, draw, anyone) == 1
    assert balance.load(0, 101.0) == 20.0  # half of it is believed after a second,
    assert balance.choose(103.0, draw, anyone) == 0  # so that it is asked again
    balance.heard(0, 0, 104.0)
    assert balance.load(0, 104.0) == 0.0


def test_a_queue_everywhere_moves_nobody() -> None:
    balance = made(2, BalanceRules(room=1, slow_start_s=0.0))
    own = balance.homes("alice")[0]
    for index in (0, 1):
        balance.heard(index, 30, 50.0)
    assert balance.choose(50.0, random.Random(1).random, anyone, "alice") == own
    balance.heard(1 - own, 0, 51.0)
    assert balance.choose(51.0, random.Random(1).random, anyone, "alice") == 1 - own


def test_old_readings_go() -> None:
    balance = made(2, BalanceRules(room=1, slow_start_s=0.0))
    balance.heard(0, 5, 0.0)
    balance.heard(1, 0, 0.0)  # nothing known and nothing waiting are the same
    assert list(balance._heard) == [0]
    for index in (0, 1):
        balance.begin(index)
    assert balance.is_full(0, 0.0)
    assert not balance.is_full(0, 60.0)
    assert balance._heard == {}


# ── ease ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@QUICK
@given(st.floats(0.5, 100), st.lists(st.floats(0, 50), min_size=1, max_size=20))
def test_one_that_comes_back_counts_a_tenth_and_grows_to_the_whole(slow_start_s: float, gaps: list[float]) -> None:
    balance = made(2, BalanceRules(slow_start_s=slow_start_s))
    balance.rests(0)
    assert balance.is_resting(0)
    balance.succeeded(0, 10.0)
    assert not balance.is_resting(0)
    now, last = 10.0, 0.1
    assert balance.ease(0, now) == 0.1
    for gap in gaps:
        now += gap
        ease = balance.ease(0, now)
        assert last <= ease <= 1.0
        last = ease
    assert balance.ease(0, 10.0 + slow_start_s * 1.0001) == 1.0
    assert balance.ease(1, now) == 1.0


def test_each_failure_halves_down_to_a_tenth_and_time_heals() -> None:
    balance = made(2, BalanceRules(slow_start_s=30.0))
    found = []
    for _ in range(5):
        balance.failed(0, 0.0)
        found.append(round(balance.ease(0, 0.0), 3))
    assert found == [0.5, 0.25, 0.125, 0.1, 0.1]
    balance.succeeded(0, 1.0)  # it did not rest
    assert balance.ease(0, 30.0) == 1.0
    balance.choose(30.0, random.Random(1).random, anyone)
    assert balance._easing == {}


def test_without_slow_start_nothing_is_eased() -> None:
    balance = made(2)
    balance.failed(0, 0.0)
    balance.rests(0)
    balance.succeeded(0, 0.0)
    assert balance.ease(0, 0.0) == 1.0


def test_one_that_fails_fast_does_not_swallow_the_calls() -> None:
    """Least work alone would send nearly everything there: whoever fails at once is always idle."""
    shares = []
    for slow_start_s in (0.0, 30.0):
        balance, draw, chance = (
            made(3, BalanceRules(slow_start_s=slow_start_s)),
            random.Random(5).random,
            random.Random(6),
        )
        ends: list[tuple[float, int]] = []
        given_to = Counter[int]()
        for turn in range(3000):
            now = turn / 100
            for end in [end for end in ends if end[0] <= now]:
                ends.remove(end)
                balance.end(end[1], balance.generation)
            index = balance.choose(now, draw, anyone)
            assert index is not None
            given_to[index] += 1
            if index == 0 and chance.random() < 0.4:  # too seldom for a circuit to open
                balance.failed(0, now)
                continue
            balance.begin(index)
            ends.append((now + 0.3, index))
        shares.append(given_to[0] / 3000)
    assert shares[1] < 0.2 < shares[0]


def test_an_agent_comes_back_to_its_replica_little_by_little() -> None:
    balance = made(2, BalanceRules(spill=1.25, room=10, slow_start_s=10.0))
    own = balance.homes("alice")[0]
    balance.rests(own)
    balance.succeeded(own, 0.0)
    at_home = []
    for now in (0.0, 5.0, 20.0):
        begun = []
        for _ in range(10):
            index = balance.choose(now, random.Random(1).random, anyone, "alice")
            assert index is not None
            begun.append((index, balance.begin(index)))
        at_home.append(sum(index == own for index, _ in begun))
        for index, generation in begun:
            balance.end(index, generation)
    assert at_home == [2, 5, 10]


def test_what_rests_has_no_share_of_the_work() -> None:
    balance = made(2, BalanceRules(spill=1.0, room=0, slow_start_s=30.0))
    for _ in range(4):
        balance.begin(0)
    assert balance.is_full(0, 0.0)
    balance.rests(1)
    assert not balance.is_full(0, 0.0)
    balance.recovered(1)
    assert balance.is_full(0, 0.0)
    assert balance.ease(1, 0.0) == 1.0


def test_what_was_under_way_on_a_dead_loop_is_not_counted_twice() -> None:
    balance = made(2)
    old = balance.begin(0)
    balance.release()
    assert balance.outstanding == [0, 0]
    new = balance.begin(0)
    balance.end(0, old)
    assert balance.outstanding == [1, 0]
    balance.end(0, new)
    assert balance.outstanding == [0, 0]


# ── ejection: the circuit behind it ─────────────────────────────────────────────────────────────────────────────────


@QUICK
@given(st.lists(st.sampled_from(["ok", "failed", "neutral", "later", "ask"]), max_size=60))
def test_standing_says_what_admit_will_do(steps: list[str]) -> None:
    circuit, now, tickets = Circuit(CircuitRules(consecutive=2)), 0.0, list[object]()
    for step in steps:
        if step == "later":
            now += 4.0
        elif step == "ask":
            standing = circuit.standing(now)
            assert standing == circuit.standing(now)
            ticket = circuit.admit(now)
            assert (ticket is None) == (standing == "resting")
            if ticket is not None:
                assert (ticket.probe > 0) == (standing == "due")
                tickets.append(ticket)
        elif tickets:
            circuit.record(tickets.pop(), step, now)  # type: ignore[arg-type]


# ── who lets deadlines pass ─────────────────────────────────────────────────────────────────────────────────────────


def test_who_answers_nobody_in_time_gets_one_call_every_few_seconds() -> None:
    balance = made(2)
    key = next(key for key in KEYS if balance.homes(key)[0] == 0)

    def chosen(now: float, who: str | None) -> set[int | None]:
        return {balance.choose(now, random.Random(seed).random, anyone, who) for seed in range(20)}

    for now in (1.0, 2.0):
        balance.missed(0, now)
    assert chosen(2.0, key) == {0}  # two in a row are no sign yet
    balance.answered(0)
    for now in (3.0, 4.0, 5.0):
        balance.missed(0, now)
    assert chosen(9.9, key) == chosen(9.9, None) == {1}
    assert chosen(10.0, key) == {0}
    generation = balance.begin(0)
    assert chosen(10.0, key) == chosen(10.0, None) == {1}  # one at a time
    balance.end(0, generation)
    balance.missed(0, 12.0)
    assert chosen(16.9, key) == {1}
    balance.answered(0)
    assert chosen(16.9, key) == {0}


def test_where_all_are_silent_all_are_asked() -> None:
    balance = made(3)
    for index in range(3):
        for _ in range(3):
            balance.missed(index, 1.0)
    draw = random.Random(1).random
    assert {balance.choose(1.0, draw, anyone, key) for key in (*KEYS, None)} == {0, 1, 2}
    assert balance.choose(1.0, draw, lambda index: index == 2, "alice") == 2
