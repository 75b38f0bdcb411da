"""Who is next."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.queue import FairQueue


def serve(queue, now=0.0):
    order = []
    while (head := queue.head(now)) is not None:
        queue.take(head)
        order.append(head.item)
    return order


def test_priority_then_fair_between_flows_then_fifo():
    queue = FairQueue()
    for item, priority, flow in [
        ("a1", 1, "a"), ("a2", 1, "a"), ("a3", 1, "a"), ("b1", 1, "b"), ("b2", 1, "b"), ("u", 0, "c"),
    ]:  # fmt: skip
        queue.push(item, priority=priority, flow=flow, now=0.0)
    assert serve(queue) == ["u", "a1", "b1", "a2", "b2", "a3"]
    assert len(queue) == 0
    assert queue.head(0.0) is None


def test_weights_give_shares():
    queue = FairQueue(weights={"big": 3})
    for _ in range(40):
        queue.push("big", priority=0, flow="big", now=0.0)
        queue.push("small", priority=0, flow="small", now=0.0)
    first = serve(queue)[:40]
    assert 29 <= first.count("big") <= 31


def test_a_flow_that_comes_back_does_not_skip_the_share_it_used():
    queue = FairQueue()
    for n in range(4):
        queue.push(f"b{n}", priority=0, flow="b", now=0.0)
    order = []
    for n in range(4):
        queue.push(f"a{n}", priority=0, flow="a", now=0.0)
        for _ in range(2):
            head = queue.head(0.0)
            if head is not None:
                queue.take(head)
                order.append(head.item)
    assert [item[0] for item in order].count("a") == 4
    assert "bb" not in "".join(item[0] for item in order[:4])
    assert "aaa" not in "".join(item[0] for item in order)


def test_remove_and_move():
    queue = FairQueue()
    first = queue.push("first", priority=1, flow="", now=0.0)
    second = queue.push("second", priority=1, flow="", now=0.0)
    third = queue.push("third", priority=1, flow="x", now=0.0)
    assert queue.remove(first)
    assert not queue.remove(first)
    queue.move(third, 0)
    queue.move(first, 0)
    queue.move(second, 1)
    assert [entry.item for entry in queue] == ["second", "third"]
    assert serve(queue) == ["third", "second"]


def test_who_was_served_in_vain_goes_first_and_keeps_his_age():
    queue = FairQueue(age_bound=10.0)
    for item in ("c", "d"):
        queue.push(item, priority=0, flow="", now=5.0)
    first = queue.push("a", priority=0, flow="", now=6.0, since=1.0)
    queue.push("b", priority=0, flow="", now=6.0, since=1.5)
    assert first.arrived == 1.0
    assert next(iter(queue)).arrived <= 1.5
    assert queue.remove(first)
    queue.push("a", priority=0, flow="", now=6.0, since=1.0)
    assert serve(queue) == ["b", "a", "c", "d"]


def test_limit_03_only_young_heads_are_passed():
    queue = FairQueue(age_bound=5.0)
    head = queue.push("large", priority=0, flow="", now=0.0)
    others = [queue.push(n, priority=0, flow=flow, now=1.0) for n, flow in enumerate(["", "a", "a", "b"])]
    queue.push("lower", priority=1, flow="", now=1.0)
    assert [entry.item for entry in queue.passing(head, 5.0)] == [0, 1, 2, 3]
    assert list(queue.passing(head, 5.1)) == []
    queue.take(others[1])
    assert queue.head(2.0) is head


def test_nobody_starves_under_endless_urgent_calls():
    queue = FairQueue(age_bound=10.0)
    queue.push("patient", priority=9, flow="p", now=0.0)
    served, now = [], 0.0
    while "patient" not in served:
        now += 1.0
        queue.push("urgent", priority=0, flow="u", now=now)
        queue.push("urgent", priority=0, flow="v", now=now)
        entry = queue.head(now)
        queue.take(entry)
        served.append(entry.item)
    assert len(served) <= 10 + 8


def test_limit_10_a_newcomer_waits_for_less_than_two_grants():
    queue = FairQueue(age_bound=1.0)
    for _ in range(1000):
        queue.push("A", priority=0, flow="A", now=0.0)
    for _ in range(100):
        queue.take(queue.head(100.0))
    queue.push("B", priority=0, flow="B", now=100.0)
    grants = []
    while "B" not in grants:
        head = queue.head(100.0)
        queue.take(head)
        grants.append(head.item)
    assert len(grants) <= 2


def test_ahead_counts_what_surely_comes_first():
    queue = FairQueue()
    assert queue.ahead(0, "a") == 0
    queue.push("x", priority=0, flow="b", now=0.0)
    queue.push("x", priority=1, flow="a", now=0.0)
    queue.push("x", priority=1, flow="b", now=0.0)
    assert queue.ahead(0, "a") == 0
    assert queue.ahead(1, "a") == 2
    assert queue.ahead(1, "c") == 1
    assert queue.ahead(2, "a") == 3


def test_memory_of_flows_is_bounded():
    queue = FairQueue()
    blocker = queue.push("x", priority=0, flow="blocker", now=0.0)
    for n in range(3000):
        queue.take(queue.push("x", priority=0, flow=f"agent {n}", now=0.0))
    level = queue._classes[0]
    assert len(level._finished) <= 1024
    assert queue.remove(blocker)
    assert not queue._classes


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["push", "push", "take", "remove", "move"]),
            st.integers(0, 2),
            st.sampled_from("abc"),
            st.integers(0, 30),
        ),
        max_size=80,
    )
)
def test_everybody_is_served_or_removed_exactly_once(steps):
    queue, entries, left, now = FairQueue(age_bound=3.0), [], [], 0.0
    for kind, priority, flow, pick in steps:
        now += 0.5
        if kind == "push":
            entries.append(queue.push(len(entries), priority=priority, flow=flow, now=now))
        elif kind == "take" and (head := queue.head(now)) is not None:
            if now - head.arrived <= 3.0:
                assert head.priority == min(entry.priority for entry in queue)
                same = [e.seq for e in queue if (e.priority, e.flow) == (head.priority, head.flow)]
                assert head.seq == min(same) or any(kind == "move" for kind, *_ in steps)
            queue.take(head)
            left.append(head.item)
        elif entries and kind == "remove":
            entry = entries[pick % len(entries)]
            if queue.remove(entry):
                left.append(entry.item)
        elif entries and kind == "move":
            queue.move(entries[pick % len(entries)], priority)
        assert len(queue) == len(list(queue)) == len(entries) - len(left)
    left += serve(queue, now)
    assert sorted(left) == list(range(len(entries)))
