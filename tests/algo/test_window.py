from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.circuit import Circuit, CircuitRules, Streak, Ticket
from llmmw.algo.window import OutcomeWindow

QUICK = settings(max_examples=150, derandomize=True, deadline=None)
RULES = CircuitRules()


@QUICK
@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=80), st.sampled_from([1.0, 30.0]))
def test_window_counts_what_is_younger_than_itself(steps: list[tuple[float, bool]], window_s: float) -> None:
    window, now, seen = OutcomeWindow(window_s), 1000.0, []
    for gap, failed in steps:
        now += gap
        window.add(now, failed=failed)
        seen.append((now, failed))
        young = [entry for entry in seen if now - entry[0] < window_s]
        maybe = [entry for entry in seen if now - entry[0] <= window_s * (1 + 1.001 / 30)]
        assert len(young) <= window.total <= len(maybe)
        assert sum(f for _, f in young) <= window.failed <= sum(f for _, f in maybe)


def test_window_keeps_constant_memory() -> None:
    window = OutcomeWindow(30.0)
    for number in range(10_000):
        window.add(number * 0.01, failed=False)
    assert len(window._cells) <= 31
    window.clear()
    assert (window.total, window.failed) == (0, 0)


def admitted(circuit: Circuit, now: float) -> Ticket:
    ticket = circuit.admit(now)
    assert ticket is not None
    return ticket


def tripped(now: float = 0.0, rules: CircuitRules = RULES) -> Circuit:
    circuit = Circuit(rules)
    for _ in range(rules.consecutive):
        circuit.record(admitted(circuit, now), "failed", now)
    assert circuit.state == "open"
    return circuit


def test_five_failures_in_a_row_open() -> None:
    circuit = Circuit(RULES)
    for _ in range(4):
        circuit.record(admitted(circuit, 0), "failed", 0)
    circuit.record(admitted(circuit, 0), "ok", 0)
    for _ in range(4):
        circuit.record(admitted(circuit, 0), "failed", 0)
    assert circuit.state == "closed"
    circuit.record(admitted(circuit, 0), "failed", 0)
    assert circuit.state == "open"
    assert circuit.admit(4.9) is None
    assert circuit.retry_at(1.0) == 5.0


def test_half_of_ten_calls_failing_opens() -> None:
    circuit = Circuit(RULES)
    for number in range(9):
        circuit.record(admitted(circuit, 0), "failed" if number % 2 else "ok", 0)
    assert circuit.state == "closed"
    circuit.record(admitted(circuit, 0), "failed", 0)
    assert circuit.state == "open"


def test_route_05_fast_failures_among_slow_answers_open_nothing() -> None:
    circuit = Circuit(RULES)
    for wave in range(20):
        calls = [admitted(circuit, wave) for _ in range(64)]
        failing = calls[wave % 5 :: 5]
        for ticket in failing:
            circuit.record(ticket, "failed", wave)
        for ticket in calls:
            if ticket not in failing:
                circuit.record(ticket, "ok", wave + 0.5)
        assert circuit.state == "closed"


def test_calls_that_all_fail_open_whatever_their_order() -> None:
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 1, 2], [2, 4, 1, 0, 3]):
        circuit = Circuit(RULES)
        calls = [admitted(circuit, 0) for _ in range(64)]
        for place in order:
            assert circuit.state == "closed"
            circuit.record(calls[place + 7], "failed", 1)
        assert circuit.state == "open"


def test_what_says_nothing_interrupts_no_run() -> None:
    circuit = Circuit(RULES)
    for result in ("failed", "neutral", "failed", "failed", "neutral", "neutral", "failed", "failed"):
        assert circuit.state == "closed"
        circuit.record(admitted(circuit, 0), result, 0)
    assert circuit.state == "open"


def test_endless_outcomes_are_not_all_remembered() -> None:
    streak = Streak()
    for number in range(10_000):
        streak.said_nothing(number)
    assert len(streak._marks) == 256
    assert streak.failed(10_000, 5) == 1


def test_failures_older_than_the_window_are_forgotten() -> None:
    circuit = Circuit(CircuitRules(consecutive=100))
    for _ in range(9):
        circuit.record(admitted(circuit, 0), "failed", 0)
    circuit.record(admitted(circuit, 40), "failed", 40)
    assert circuit.state == "closed"


def test_one_failure_is_enough_where_it_is_decisive() -> None:
    circuit = Circuit(RULES)
    circuit.record(admitted(circuit, 0), "failed", 0, decisive=True)
    assert circuit.state == "open"


def test_rest_doubles_up_to_its_limit_and_starts_over_after_success() -> None:
    circuit, now, rests = tripped(), 0.0, []
    for _ in range(6):
        until = circuit.retry_at(now)
        rests.append(until - now)
        now = until
        circuit.record(admitted(circuit, now), "failed", now)
    assert rests == [5, 10, 20, 40, 60, 60]
    now = circuit.retry_at(now)
    circuit.record(admitted(circuit, now), "ok", now)
    assert circuit.state == "closed"
    for _ in range(5):
        circuit.record(admitted(circuit, now), "failed", now)
    assert circuit.retry_at(now) == now + 5


def test_server_asks_for_a_longer_rest() -> None:
    circuit = Circuit(RULES)
    circuit.record(admitted(circuit, 0), "failed", 0, decisive=True, asked_s=30.0)
    assert circuit.retry_at(0) == 30.0
    circuit = Circuit(RULES)
    circuit.record(admitted(circuit, 0), "failed", 0, decisive=True, asked_s=3000.0, draw=0.5)
    assert circuit.retry_at(0) == 63.0


def test_outcomes_of_older_generations_are_ignored() -> None:
    circuit = Circuit(RULES)
    old = [admitted(circuit, 0) for _ in range(10)]
    for ticket in old[:5]:
        circuit.record(ticket, "failed", 0)
    until = circuit.retry_at(0)
    for ticket in old[5:]:
        circuit.record(ticket, "failed", 1)
    assert circuit.retry_at(1) == until
    probe = admitted(circuit, until)
    circuit.record(old[0], "ok", until)
    assert circuit.state == "half_open"
    circuit.record(probe, "ok", until)
    circuit.record(old[0], "failed", until, decisive=True)
    assert circuit.state == "closed"


def test_neutral_probe_lets_the_next_call_probe() -> None:
    circuit = tripped()
    first = admitted(circuit, 5)
    assert circuit.admit(5) is None
    assert circuit.retry_at(5) == 6
    circuit.record(first, "neutral", 5)
    assert circuit.state == "half_open"
    second = admitted(circuit, 5)
    circuit.record(first, "neutral", 5)
    assert circuit.admit(5) is None
    circuit.record(second, "ok", 5)
    assert circuit.state == "closed"


def test_hung_probe_is_replaced_and_its_late_success_still_counts() -> None:
    circuit = tripped()
    hung = admitted(circuit, 5)
    assert circuit.admit(34.9) is None
    assert circuit.retry_at(34.5) == 35
    admitted(circuit, 35)
    circuit.record(hung, "ok", 36)
    assert circuit.state == "closed"


def test_released_probe_is_free() -> None:
    circuit = tripped()
    admitted(circuit, 5)
    circuit.release()
    assert circuit.retry_at(5) == 5
    admitted(circuit, 5)


steps = st.lists(
    st.tuples(
        st.sampled_from(["admit", "ok", "failed", "neutral", "release"]),
        st.floats(0, 10),
        st.integers(0, 5),
        st.floats(0, 1, exclude_max=True),
    ),
    max_size=120,
)


@QUICK
@given(steps)
def test_circuit_never_gets_stuck_and_probes_one_at_a_time(script: list[tuple[str, float, int, float]]) -> None:
    circuit, now, tickets = Circuit(RULES), 0.0, list[Ticket]()
    leased: Ticket | None = None
    leased_at = 0.0
    for action, gap, which, draw in script:
        now += gap
        if action == "release":
            circuit.release()
            leased = None
        elif action == "admit":
            before = circuit.state
            ticket = circuit.admit(now)
            if ticket is None:
                assert before != "closed"
                assert now <= circuit.retry_at(now) <= now + 66
                continue
            tickets.append(ticket)
            if ticket.probe:
                assert leased is None or leased.generation != circuit.generation or now - leased_at >= RULES.lease_s
                leased, leased_at = ticket, now
        elif tickets:
            ticket = tickets.pop(which % len(tickets))
            circuit.record(ticket, action, now, draw=draw)  # type: ignore[arg-type]
            if ticket == leased:
                leased = None
    assert circuit.admit(now + 200) is not None


def test_tickets_are_values() -> None:
    assert Ticket(1) == Ticket(1, 0)
    with pytest.raises(AttributeError):
        Ticket(1).probe = 2  # type: ignore[misc]


def test_rest_is_never_cut_short_by_a_paced_probe_that_fails() -> None:
    circuit = Circuit(CircuitRules(consecutive=1, open_s=0.5, max_open_s=10))
    now = until = 0.0
    for draw in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0):
        probe = circuit.admit(now, alone=True)
        assert probe is not None
        circuit.record(probe, "failed", now, draw=draw)
        assert circuit.retry_at(now) >= until
        assert circuit.admit(now + 0.49, alone=True) is None
        now, until = circuit.retry_at(now, alone=True), circuit.retry_at(now)
    assert until == pytest.approx(
        6 * 0.55 - 0.55 + 11
    )  # that of the sixth opening, not the tenth second after the last


def test_paced_probe_does_not_come_before_the_server_wants_it() -> None:
    circuit = Circuit(CircuitRules(consecutive=1, open_s=5, max_open_s=60))
    ticket = circuit.admit(0.0)
    assert ticket is not None
    circuit.record(ticket, "failed", 0.0, asked_s=40.0)
    assert circuit.retry_at(0.0, alone=True) == circuit.retry_at(0.0) == 40.0
