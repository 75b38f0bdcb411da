from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.batchmates import (
    bisect_budget,
    divide,
    grouping,
    joint_call,
    pieces_of,
    sampled_call,
    sampling,
    split_answer,
    urgency_of,
    weight,
)
from llmmw.answer import Usage
from llmmw.call import Call, Context, Urgency
from llmmw.testing.fake import chat_call
from llmmw.wire import HTTPRequest

QUICK = settings(max_examples=150, derandomize=True, deadline=None)


# ── who belongs together ────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_that_differ_only_in_their_prompt_belong_together() -> None:
    one, two = grouping(chat_call("a", temperature=1)), grouping(chat_call("b", temperature=1))
    assert one is not None
    assert two is not None
    assert one.kind == two.kind
    assert one.joint
    assert one.twin is None


@pytest.mark.parametrize(
    "other",
    [
        chat_call("a", model="other"),
        chat_call("a", temperature=0.5),
        chat_call("a", max_tokens=5),
        chat_call("a", seed=1),
        chat_call("a").replace(target="elsewhere"),
        chat_call("a").replace(namespace="key-2"),
        chat_call("a").replace(variant=(("anthropic-beta", "x"),)),
        chat_call("a", context=Context(tenant="t")),
        chat_call("a", context=Context(priority=1)),
        chat_call("a").replace(urgency=Urgency(priority=-1)),
        Call("complete", "m", {"model": "m", "prompt": "a"}, target="http://fake.test/v1"),
        chat_call("a").replace(native=(("x-trace", "1"),)),
    ],
    ids=range(12),
)
def test_batch_07_what_differs_never_travels_together(other: Call) -> None:
    mine, theirs = grouping(chat_call("a")), grouping(other)
    assert mine is not None
    assert theirs is not None
    assert mine.kind != theirs.kind


@pytest.mark.parametrize(
    "call",
    [
        chat_call("a", stream=True),
        chat_call("a", n=2),
        chat_call("a", tools=[]),
        chat_call("a", ignore_eos=True),
        chat_call("a", seed=object()),
        chat_call("a").replace(direct=True),
        chat_call("a").replace(op="embed"),
        chat_call("a").replace(payload={"messages": []}),
        chat_call("a").replace(payload={}),
        Call("complete", "m", {"prompt": ["a", "b"]}),
    ],
    ids=range(10),
)
def test_what_always_goes_alone(call: Call) -> None:
    assert grouping(call) is None


def test_texts_and_token_ids_are_not_mixed() -> None:
    text, ids = (grouping(Call("complete", "m", {"prompt": prompt})) for prompt in ("a", [1, 2]))
    assert text is not None
    assert ids is not None
    assert text.kind != ids.kind


def test_who_may_share_a_request() -> None:
    def joint(call: Call) -> bool:
        found = grouping(call)
        assert found is not None
        return found.joint

    assert joint(chat_call("a"))
    assert joint(Call("complete", "m", {"prompt": [1, 2, 3]}))
    assert joint(chat_call("a").replace(native=(("x-trace", "1"),)))
    assert not joint(Call("function", "f", {"x": object()}))
    assert not joint(chat_call("a").replace(native=HTTPRequest("POST", "http://x")))


def test_greedy_calls_with_one_prompt_are_twins() -> None:
    def twin(call: Call) -> bytes | None:
        found = grouping(call)
        assert found is not None
        return found.twin

    assert twin(chat_call("a", temperature=0)) == twin(chat_call("a", temperature=0))
    assert twin(chat_call("a", temperature=0)) != twin(chat_call("b", temperature=0))
    assert twin(chat_call("a", temperature=1)) is None


def test_schemas_with_their_fields_in_another_order_are_another_question() -> None:
    def asks(*names: str) -> Call:
        schema = {"type": "object", "properties": {name: {} for name in names}}
        return chat_call("a", response_format={"type": "json_schema", "json_schema": {"schema": schema}})

    mine, theirs, same = grouping(asks("x", "y")), grouping(asks("y", "x")), grouping(asks("x", "y"))
    assert mine is not None
    assert theirs is not None
    assert mine.kind != theirs.kind
    assert mine == same


def test_joint_call_is_as_urgent_and_patient_as_its_members() -> None:
    one = chat_call("a", context=Context(agent="x", step=2, deadline=5.0, priority=1, tags=("t",)))
    one = one.replace(key=b"k", rate_wait_s=1.0)
    two = chat_call("b", context=Context(agent="y", step=2, deadline=9.0)).replace(rate_wait_s=2.0)
    call = joint_call([one, two], urgency_of([one, two]))
    assert (call.op, call.native, call.key, call.rate_wait_s) == ("chat_batch", None, b"", 2.0)
    assert call.payload["messages"] == [one.payload["messages"], two.payload["messages"]]
    assert call.context == Context(step=2, priority=0, deadline=9.0)
    assert (call.priority, call.deadline) == (0, 9.0)
    endless = joint_call([one, chat_call("c")], urgency_of([one, chat_call("c")]))
    assert (endless.deadline, endless.rate_wait_s) == (None, None)
    texts = [Call("complete", "m", {"prompt": "a"}), Call("complete", "m", {"prompt": "b"})]
    listed = joint_call(texts, urgency_of(texts))
    assert (listed.op, listed.payload["prompt"]) == ("complete", ["a", "b"])


def test_weight_counts_the_prompt_as_it_is_sent() -> None:
    def weight_of(call: Call) -> tuple[int, int]:
        group = grouping(call)
        assert group is not None
        return weight(call, group)

    bytes_, tokens = weight_of(chat_call("ä" * 100, max_tokens=7, temperature=0))
    assert bytes_ == len(msgspec.json.encode(chat_call("ä" * 100).payload["messages"]))
    assert tokens == 50 + 4 + 7
    assert weight_of(Call("function", "f", {"text": "x" * 40}))[0] == len(b'{"text":""}') + 40
    assert weight_of(Call("function", "f", {"text": "x" * 40, "what": object()})) == (40, 10)


def search(bad: set[int], items: list[int], budget: list[int]) -> int:
    """Requests that finding the bad ones takes after the first, refused one."""
    spent = 0
    parts = pieces_of(len(items), budget[0])
    budget[0] = max(0, budget[0] - len(parts))
    for size in parts:
        part, items = items[:size], items[size:]
        spent += 1
        if len(part) > 1 and bad.intersection(part):
            spent += search(bad, part, budget)
    return spent


@pytest.mark.parametrize("size", [*range(2, 70), 100, 127, 128, 129, 1000, 1023, 1025])
def test_batch_03_one_bad_item_is_found_within_the_budget_wherever_it_is(size: int) -> None:
    for bad in {0, 1, size // 3, size // 2, size - 2, size - 1}:
        assert search({bad}, list(range(size)), [bisect_budget(size)]) <= 2 * math.log2(size) + 1


@QUICK
@given(st.integers(2, 200), st.sets(st.integers(0, 199), min_size=1))
def test_the_search_for_many_bad_items_ends_one_by_one(size: int, bad: set[int]) -> None:
    assert search({number % size for number in bad}, list(range(size)), [bisect_budget(size)]) <= (
        bisect_budget(size) + size
    )


def test_bisection_is_budgeted() -> None:
    assert [bisect_budget(size) for size in (1, 2, 3, 8, 9, 64)] == [1, 3, 4, 7, 7, 13]
    assert all(bisect_budget(size) == math.floor(2 * math.log2(size) + 1) for size in range(1, 5000))


# ── whose part is whose ─────────────────────────────────────────────────────────────────────────────────────────────


def choice(index: object, text: str) -> dict[str, object]:
    return {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}


CALLS = [chat_call("a"), chat_call("bb" * 50), chat_call("c")]


def test_parts_are_matched_by_index() -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 9}
    body = {"id": "x", "choices": [choice(2, "C"), choice(0, "A"), choice(1, "BBBB")], "usage": usage}
    parts = split_answer(body, CALLS)
    assert not any(isinstance(part, str) for part in parts)
    bodies = [part[0] for part in parts]
    assert [own["choices"][0]["message"]["content"] for own in bodies] == ["A", "BBBB", "C"]
    assert {own["choices"][0]["index"] for own in bodies} == {0}
    assert sum(own["usage"]["prompt_tokens"] for own in bodies) == 30
    assert sum(own["usage"]["completion_tokens"] for own in bodies) == 9
    assert bodies[1]["usage"]["prompt_tokens"] > bodies[0]["usage"]["prompt_tokens"]
    assert body["usage"] == usage


def test_wrong_indices_fail_their_items_only() -> None:
    body = {"choices": [choice(0, "A"), choice(1, "B"), choice(1, "B2"), choice(7, "?"), choice("2", "C"), 5]}
    first, second, third = split_answer(body, CALLS)
    assert isinstance(first, tuple)
    assert first[1] == Usage()
    assert "usage" not in first[0]
    assert second == "2 answers instead of one in the batch's answer"
    assert third == "0 answers instead of one in the batch's answer"


@pytest.mark.parametrize("body", [None, [], {}, {"choices": "x"}, {"choices": [None]}])
def test_no_answer_at_all_fails_everybody(body: object) -> None:
    assert all(isinstance(part, str) for part in split_answer(body, CALLS))


@QUICK
@given(st.integers(0, 10_000), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_division_loses_nothing(total: int, weights: list[int]) -> None:
    shares = divide(total, weights)
    assert sum(shares) == total
    assert min(shares) >= 0
    weight = sum(weights)
    if weight:
        assert all(abs(share - total * part / weight) < 1 for share, part in zip(shares, weights, strict=True))


@QUICK
@given(st.lists(st.integers(-1, 4), max_size=8), st.integers(0, 500))
def test_every_item_gets_exactly_one_outcome(indices: list[int], tokens: int) -> None:
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens}
    body = msgspec.json.decode(msgspec.json.encode({"choices": [choice(i, str(i)) for i in indices], "usage": usage}))
    parts = split_answer(body, CALLS)
    assert len(parts) == 3
    for number, part in enumerate(parts):
        assert isinstance(part, str) is (indices.count(number) != 1)
        if not isinstance(part, str):
            assert part[0]["choices"][0]["message"]["content"] == str(number)


# ── several samples of one question ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "call",
    [
        chat_call("a", temperature=0),
        chat_call("a", seed=1),
        chat_call("a", n=2),
        chat_call("a", best_of=3),
        chat_call("a", use_beam_search=True),
        chat_call("a", stream=True),
        chat_call("a", odd={1, 2}.__iter__()),
        chat_call("a").replace(direct=True),
        chat_call("a").replace(native=HTTPRequest("POST", "http://fake.test/v1")),
        Call("embed", "m", {"input": "a"}),
        Call("messages", "m", {"messages": []}),
        Call("complete", "m", {"prompt": ["a", "b"]}),
    ],
    ids=range(12),
)
def test_what_n_does_not_fit_is_no_sample_of_many(call: Call) -> None:
    assert sampling(call) is None


def test_samples_of_one_question_have_everything_but_the_asker_in_common() -> None:
    one = chat_call("a", temperature=1, tools=[{}], context=Context(agent="x", sample=1, tags=("t",)))
    two = chat_call("a", temperature=1, tools=[{}], context=Context(agent="y", sample=2))
    assert sampling(one) == sampling(two) is not None
    call = sampled_call([one, two, two], Urgency(3, 5.0))
    assert call.payload == {**one.payload, "n": 3}
    assert (call.context, call.priority, call.key) == (Context(priority=3, deadline=5.0), 3, b"")
    for other in (chat_call("b", temperature=1, tools=[{}]), chat_call("a", temperature=1), two.replace(model="o")):
        assert sampling(other) not in {None, sampling(one)}


@QUICK
@given(
    st.lists(st.text(max_size=12), min_size=1, max_size=9),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.randoms(use_true_random=False),
)
def test_every_sample_is_somebodys_and_no_token_is_lost(texts: list[str], given_in: int, given_out: int, rng) -> None:  # type: ignore[no-untyped-def]
    calls = [chat_call("same", temperature=1)] * len(texts)
    choices = [
        {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for index, text in enumerate(texts)
    ]
    rng.shuffle(choices)
    usage = {"prompt_tokens": given_in, "completion_tokens": given_out}
    parts = split_answer({"choices": choices, "usage": usage}, calls)
    found = [part for part in parts if not isinstance(part, str)]
    assert [own["choices"][0]["message"]["content"] for own, _ in found] == texts
    assert [own["choices"][0]["index"] for own, _ in found] == [0] * len(texts)
    assert sum((usage for _, usage in found), Usage()) == Usage(given_in, given_out, reported=True)


@QUICK
@given(st.lists(st.text(alphabet="ab", max_size=6), min_size=2, max_size=20), st.text(alphabet="ab", max_size=3))
def test_prompts_that_begin_alike_stand_together(prompts: list[str], prefix: str) -> None:
    groups = [grouping(chat_call(prompt)) for prompt in prompts]
    order = [text for _, text in sorted(zip([group.prompt for group in groups if group], prompts, strict=True))]
    alike = [text.startswith(prefix) for text in order]
    first, count = alike.index(True) if True in alike else 0, sum(alike)
    assert all(alike[first : first + count])
