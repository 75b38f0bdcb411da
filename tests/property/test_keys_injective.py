"""Keys never collide, whatever the request holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.call import Call
from llmmw.keys import Uncacheable, explain_difference, key_of

scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text('ab":,{}[]\\\ud800', max_size=4)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text("abc", max_size=2) | st.sampled_from(["parameters", "json_schema"]), inner, max_size=3
        )
        | st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=8,
)
bodies = st.dictionaries(st.sampled_from(["messages", "user", "stop", "tools", "x", "extra"]), values, max_size=3)


def exact(value):
    """The value with its types, as a comparable tree; order of keys as given."""
    if isinstance(value, dict):
        return ("dict", [(name, exact(child)) for name, child in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [exact(child) for child in value])
    return (type(value).__name__, repr(value))


def unordered(value):
    if isinstance(value, dict):
        return ("dict", sorted((name, unordered(child)) for name, child in value.items()))
    if isinstance(value, list | tuple):
        return (type(value).__name__, [unordered(child) for child in value])
    return (type(value).__name__, repr(value))


def key_or_none(op, body):
    try:
        return key_of(Call(op, "m", body))
    except Uncacheable:
        return None


@settings(max_examples=200, derandomize=True, deadline=None)
@given(bodies, bodies, st.sampled_from(["chat", "function"]))
def test_cache_04_different_bodies_never_collide(one, two, op):
    keys = key_or_none(op, one), key_or_none(op, two)
    if None not in keys and unordered(one) != unordered(two):
        assert keys[0] != keys[1]
    if None not in keys and exact(one) == exact(two):
        assert keys[0] == keys[1]


def shuffled(value, order):
    if isinstance(value, dict):
        names = list(value)
        order.shuffle(names)
        return {
            name: value[name] if name in {"parameters", "json_schema"} else shuffled(value[name], order)
            for name in names
        }
    if isinstance(value, list | tuple):
        return type(value)(shuffled(child, order) for child in value)
    return value


@settings(max_examples=200, derandomize=True, deadline=None)
@given(bodies, st.randoms(use_true_random=False), st.sampled_from(["chat", "function"]))
def test_cache_01_order_of_keys_outside_schemas_never_matters(body, order, op):
    assert key_or_none(op, body) == key_or_none(op, shuffled(body, order))


def test_cache_04_a_hundred_thousand_pairs_of_texts_do_not_collide():
    parts = ["a", "b", ":", " ", "stop", '"', ",", "user"]
    texts = ["".join(c) for c in [(x, y, z) for x in parts for y in parts for z in parts]][:320]
    keys = {key_of(Call("chat", "m", {"user": one, "stop": two})) for one in texts for two in texts}
    assert len(keys) == len(set(texts)) ** 2


names = st.sampled_from(["", "a", "b", "a,b", '","', "None", "tenant:a"])
heads = st.tuples(
    st.sampled_from(["chat", "complete", "embed", "messages", "responses", "function"]), names, names, names,
    st.none() | names, st.lists(st.tuples(names, names), max_size=2).map(lambda pairs: tuple(sorted(pairs))), names,
)  # fmt: skip


def key_of_head(head):
    op, model, target, namespace, tenant, variant, lane = head
    call = Call(op, model, {"prompt": "x"}, target=target, namespace=namespace, variant=variant)
    return key_of(call.within(tenant=tenant), lane=lane)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(heads, heads)
def test_cache_08_whatever_identifies_a_call_besides_its_body_never_collides(one, two):
    assert (key_of_head(one) == key_of_head(two)) == (one == two)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(bodies, bodies)
def test_cache_02_extra_body_is_the_body(body, extra):
    merged = key_or_none("chat", {**body, **extra})
    assert key_or_none("chat", {**body, "extra_body": extra}) == merged


@settings(max_examples=150, derandomize=True, deadline=None)
@given(bodies, bodies, st.sampled_from(["chat", "function"]))
def test_a_difference_is_explained_where_there_is_one_and_only_there(one, two, op):
    calls = Call(op, "m", one), Call(op, "m", two)
    try:
        same = key_of(calls[0]) == key_of(calls[1])
    except Uncacheable:
        return
    field = explain_difference(*calls)
    assert (field is None) == same
    if field is not None and "(key order)" not in field:
        top = field.partition(".")[0].partition("[")[0]
        assert top in {*one, *two}
