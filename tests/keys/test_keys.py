"""Which calls are the same question."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import subprocess
import sys
import uuid
import zoneinfo
from collections import OrderedDict
from typing import NamedTuple

import msgspec
import pydantic
import pytest

from llmmw.call import Call, Context
from llmmw.keys import NOT_SHARED, Sharing, Uncacheable, explain_difference, is_deterministic, key_of
from llmmw.testing.fake import chat_call


def function_call(**arguments):
    return Call("function", "", arguments, target="mod.ask")


def differ(*calls):
    return len({key_of(call) for call in calls}) == len(calls)


def test_cache_01_order_of_keywords_and_message_keys_is_ignored():
    one = Call("chat", "m", {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "x"}]})
    two = Call("chat", "m", {"messages": [{"content": "x", "role": "user"}], "temperature": 0, "model": "m"})
    assert key_of(one) == key_of(two)


def test_cache_02_extra_body_counts_and_is_merged_first():
    yes, no = chat_call(extra_body={"guided_choice": ["yes"]}), chat_call(extra_body={"guided_choice": ["no"]})
    assert differ(yes, no, chat_call())
    assert key_of(yes) == key_of(chat_call(guided_choice=["yes"]))
    assert key_of(chat_call(temperature=1, extra_body={"temperature": 0})) == key_of(chat_call(temperature=0))


def test_cache_03_unknown_field_separates():
    assert differ(chat_call(foo=1), chat_call(foo=2), chat_call())


def test_cache_04_text_cannot_imitate_structure():
    assert differ(chat_call(user="a", stop="b"), chat_call(user="astop: b"), chat_call(user='a","stop":"b'))


def test_cache_05_true_one_and_one_point_zero_are_distinct():
    assert differ(*(chat_call(extra_body={"x": value}) for value in (True, 1, 1.0, "1", None, [1])))
    assert differ(*(chat_call(x=value) for value in (True, 1, 1.0, 0, 0.0, -0.0, False)))
    assert differ(*(function_call(x=value) for value in (True, 1, 1.0, "1", [1], (1,), {"a": 1})))


def test_ints_of_any_size_are_told_apart():
    sizes = [2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63), -(2**63) - 1, float(2**64), str(2**64)]
    assert differ(*(chat_call(seed=value) for value in sizes))
    assert differ(*(function_call(seed=value) for value in sizes))


def test_flat_arguments_are_told_from_all_others():
    message = {"role": "user", "content": "x"}
    assert differ(
        function_call(messages=[message]),
        function_call(messages=(message,)),
        function_call(messages=message),
        function_call(messages=[message, message]),
        function_call(messages=[list(message.items())]),
        function_call(messages=[]),
        function_call(prompt="x"),
        function_call(prompt=["x"]),
        function_call(dict=None),
        function_call(),
    )
    reordered = {"content": "x", "role": "user"}
    assert key_of(function_call(messages=[message], n=1)) == key_of(function_call(n=1, messages=[reordered]))
    for odd in ({1: "x"}, {None: "x"}, {b"x": "x"}):
        with pytest.raises(Uncacheable, match="mapping key"):
            key_of(function_call(messages=[odd]))


def test_cache_06_a_number_as_mapping_key_is_not_its_text():
    with pytest.raises(Uncacheable, match="mapping key"):
        key_of(chat_call(logit_bias={1: "a"}))
    with pytest.raises(Uncacheable, match="mapping key"):
        key_of(function_call(x={1: "a"}))
    assert key_of(chat_call(logit_bias={"1": "a"}))


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


BAD = [
    float("nan"), float("inf"), -float("inf"), {1, 2}, frozenset({1}), b"x", bytearray(b"x"), "\ud800", {"\ud800": 1},
    deep(10_000), deep(200), print, object(), object, 1j, range(3), 10**5000,
]  # fmt: skip


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_cache_07_what_has_no_injective_form_has_no_key(value):
    for call in (function_call(x=value), function_call(x=[{"y": value}])):
        with pytest.raises(Uncacheable):
            key_of(call)
    if value != deep(200):
        for call in (chat_call(x=value), chat_call(x={"y": [value]})):
            with pytest.raises(Uncacheable):
                key_of(call)


def test_cache_07_reasons_can_be_counted():
    with pytest.raises(Uncacheable) as caught:
        key_of(chat_call(x=float("nan")))
    assert caught.value.reason == "not a finite number"


def test_cache_08_key_tenant_endpoint_and_version_header_separate():
    call = chat_call()
    assert differ(
        call,
        call.replace(namespace="other"),
        call.within(tenant="t"),
        call.replace(target="http://other/v1"),
        call.replace(variant=(("api-version", "2"),)),
        call.replace(model="n"),
        call.replace(op="complete"),
    )


def test_cache_08_version_headers_among_extra_headers_count_and_others_do_not():
    assert key_of(chat_call(extra_headers={"X-Trace": "1"})) == key_of(chat_call())
    named = chat_call(extra_headers={"Anthropic-Beta": "b", "x": "1"})
    assert key_of(named) == key_of(chat_call().replace(variant=(("anthropic-beta", "b"),)))
    assert differ(named, chat_call())


def test_cache_10_number_of_samples_separates():
    assert differ(chat_call(n=3), chat_call(n=2), chat_call())


def test_cache_25_salt_and_cache_control_separate():
    blocks = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    plain = [{"type": "text", "text": "x"}]
    calls = [chat_call().replace(payload={"messages": [{"role": "user", "content": c}]}) for c in (blocks, plain)]
    assert differ(*calls, chat_call(cache_salt="a"), chat_call(cache_salt="b"))


def with_content(*parts):
    return Call("chat", "m", {"messages": [{"role": "user", "content": list(parts)}]})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "image_url", "image_url": {"url": "HTTPS://x/y.png", "detail": "low"}},
        {"type": "input_image", "image_url": "http://x/y.png"},
        {"type": "input_file", "file_url": "https://x"},
        {"type": "image", "source": {"type": "url", "url": "https://x"}},
        {"type": "video_url", "video_url": {"url": "file:///tmp/x"}},
    ],
)
def test_cache_26_links_to_remote_content_are_not_cached_by_default(part):
    call = with_content({"type": "text", "text": "what is it?"}, part)
    with pytest.raises(Uncacheable, match="remote content"):
        key_of(call)
    assert key_of(call, remote_content=True)


def test_cache_26_data_urls_and_links_in_text_are_cached():
    data = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    link = {"type": "text", "text": 'see "image_url":"http://x"'}
    assert differ(with_content(data), with_content(link))
    assert key_of(chat_call("http://x"))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search_preview"}]},
        {"tools": [{"type": "function", "name": "f"}, {"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]},
        {"tools": ({"type": "mcp", "server_url": "x"},)},
        {"web_search_options": {}},
        {"mcp_servers": [{"name": "x"}]},
        {"plugins": [{"id": "web"}]},
        {"prompt": {"id": "p"}},
        {"input": [{"image": "https://x/y.png"}]},
    ],
    ids=str,
)
def test_cache_26_what_the_server_looks_up_elsewhere_is_not_cached_by_default(fields):
    call = Call("responses", "m", {"input": "news?", **fields})
    with pytest.raises(Uncacheable, match="remote content"):
        key_of(call)
    assert key_of(call, remote_content=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "name": "web_search"}]},
        {"tools": [{"type": ["odd"]}, "odd"]},
        {"tools": "odd"},
        {"web_search_options": None},
        {"prompt": {"id": "p", "version": "2"}},
        {"input": [{"image": "AAAA//BBBB"}]},
        {"input": "see https://x/y.png", "temperature": {}},
    ],
    ids=str,
)
def test_cache_26_what_only_looks_like_it_is_cached(fields):
    assert key_of(Call("responses", "m", {"input": "news?", **fields}))


def test_cache_26_links_are_found_in_objects_that_are_no_json():
    with pytest.raises(Uncacheable, match="remote content"):
        key_of(with_content({"type": "image_url", "image_url": {"url": "http://x"}, "size": (1, 2)}))


def test_fields_of_the_transport_do_not_count():
    extra = {
        "stream": True, "stream_options": {"include_usage": True}, "timeout": object(), "max_retries": 3,
        "metadata": {"a": "b"}, "idempotency_key": "k", "request_id": "r", "priority": 4,
    }  # fmt: skip
    assert key_of(chat_call(**extra)) == key_of(chat_call()) == key_of(chat_call(stream=True))
    assert key_of(chat_call(extra_body={"metadata": {"a": 1}})) == key_of(chat_call())


def test_every_argument_of_a_function_counts():
    assert differ(function_call(timeout=1), function_call(timeout=2), function_call(metadata={}), function_call())


def test_order_inside_schemas_counts_and_around_them_does_not():
    def tool(parameters, **function):
        return {"type": "function", "function": {"name": "f", **function, "parameters": parameters}}

    ab, ba = {"a": {"x": 1, "y": 2}, "b": {}}, {"b": {}, "a": {"x": 1, "y": 2}}
    inner = {"a": {"y": 2, "x": 1}, "b": {}}
    assert differ(chat_call(tools=[tool(ab)]), chat_call(tools=[tool(ba)]), chat_call(tools=[tool(inner)]))
    turned = [dict(reversed(tool(ab).items()))]
    assert key_of(chat_call(tools=turned)) == key_of(chat_call(tools=[tool(ab)]))
    assert differ(chat_call(guided_json=ab), chat_call(guided_json=ba))
    assert differ(chat_call(documents=[ab]), chat_call(documents=[ba]))
    assert differ(chat_call(chat_template_kwargs=ab), chat_call(chat_template_kwargs=ba))
    formats = [{"type": "json_schema", "json_schema": {"name": "n", "schema": schema}} for schema in (ab, ba)]
    assert differ(*(chat_call(response_format=form) for form in formats))
    assert differ(chat_call(extra_body={"guided_json": ab}), chat_call(extra_body={"guided_json": ba}))
    assert differ(function_call(parameters=ab), function_call(parameters=ba))
    assert key_of(function_call(x=ab)) == key_of(function_call(x=ba))


def test_schema_moved_to_another_place_separates():
    one = chat_call(tools=[{"parameters": {"a": 1}}, {"parameters": {"b": 1}}])
    two = chat_call(tools=[{"parameters": {"b": 1}}, {"parameters": {"a": 1}}])
    assert differ(one, two)


class Colour(enum.Enum):
    RED = 1


class Shade(enum.StrEnum):
    DARK = "dark"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Place(msgspec.Struct):
    x: int
    y: int = 0


class Spot(pydantic.BaseModel):
    x: int
    y: int = 0


class Hidden(pydantic.BaseModel):
    x: int
    _y: int = pydantic.PrivateAttr(default=3)


class Pair(NamedTuple):
    x: int
    y: int


def test_objects_with_a_declared_form_carry_the_name_of_their_type():
    values = [
        Point(1), Point(2), Place(1), Spot(x=1), Spot(x=2), Pair(1, 0), {"x": 1, "y": 0}, (1, 0), [1, 0],
        Colour.RED, Shade.DARK, "dark", Spot, Point,
    ]  # fmt: skip
    assert differ(*(function_call(v=value) for value in values[:-1]))
    with pytest.raises(Uncacheable, match="a class"):
        key_of(function_call(v=Point))


def test_objects_with_hidden_state_have_no_key():
    point = Point(1)
    point.secret = 2
    for value in (point, Hidden(x=1)):
        with pytest.raises(Uncacheable, match="no codec for"):
            key_of(function_call(v=value))


def test_pydantic_objects_in_a_request_have_a_key():
    call = Call("chat", "m", {"messages": [{"role": "user", "content": "x"}, Spot(x=1)]})
    other = Call("chat", "m", {"messages": [{"role": "user", "content": "x"}, Spot(x=2)]})
    assert differ(call, other)


def test_a_mapping_that_is_no_dict_is_the_same_request():
    body = chat_call().payload
    assert key_of(chat_call().replace(payload=OrderedDict(body))) == key_of(chat_call())


def test_conversations_kept_by_the_server_and_odd_extra_bodies_have_no_key():
    for op, field in (("responses", "conversation"), ("responses", "container"), ("messages", "container")):
        with pytest.raises(Uncacheable, match="kept by the server"):
            key_of(Call(op, "m", {"input": "x", field: "c1"}))
    assert key_of(Call("responses", "m", {"input": "x", "conversation": None}))
    with pytest.raises(Uncacheable, match="extra_body"):
        key_of(chat_call(extra_body=[1]))


def test_lanes_and_their_absence_are_distinct():
    keys = {key_of(chat_call(), lane=lane) for lane in ("", "a", "b")}
    assert len(keys) == 3
    with pytest.raises(Uncacheable, match="surrogate"):
        key_of(chat_call(), lane="\ud800")


def test_processes_agree_on_keys():
    source = (
        "from llmmw.keys import key_of; from llmmw.call import Call;"
        "print(key_of(Call('chat','m',{'messages':[{'role':'user','content':'ü'}],'a':0.1,"
        "'tools':[{'parameters':{'b':1,'a':[1,2.5e300]}}]})).hex(),"
        "key_of(Call('function','',{'x':(1,'a',{'k':None})})).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", source], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False), ({"temperature": 0}, True), ({"temperature": 0.0}, True), ({"temperature": False}, False),
        ({"temperature": 0.1}, False), ({"temperature": None}, False), ({"seed": 1}, True), ({"seed": 0}, True),
        ({"seed": None}, False), ({"seed": True}, False), ({"temperature": 0, "n": 2}, False),
        ({"temperature": 0, "n": 1}, True), ({"temperature": 0, "best_of": 2}, False),
        ({"extra_body": {"seed": 3}}, True), ({"temperature": 0, "extra_body": {"temperature": 1}}, False),
    ],
)  # fmt: skip
def test_deterministic_means_temperature_zero_or_a_seed_and_one_sample(fields, expected):
    assert is_deterministic(chat_call(**fields)) is expected
    assert is_deterministic(function_call(**fields)) is expected


def test_embeddings_are_deterministic():
    assert is_deterministic(Call("embed", "m", {"input": "x"}))


def test_share_gives_every_caller_one_key():
    sharing = Sharing("share")
    assert sharing.draw(chat_call()).key == sharing.draw(chat_call(context=Context(agent="a"))).key
    sharing.give_back(sharing.draw(chat_call()))


def test_deterministic_sharing_keeps_everything_else_apart():
    sharing = Sharing()
    assert sharing.draw(chat_call()) is NOT_SHARED
    assert sharing.draw(chat_call(temperature=0)).key == key_of(chat_call(temperature=0))


def lanes(*agents, sharing=None, **fields):
    sharing = sharing or Sharing("lanes")
    return [sharing.draw(chat_call(context=Context(agent=agent), **fields)).key for agent in agents]


def test_lanes_give_each_agent_its_own_sequence_whatever_the_order():
    first = lanes("a", "b", "a", "b")
    assert len(set(first)) == 4
    again = lanes("b", "b", "a", "a")
    assert first == [again[2], again[0], again[3], again[1]]


def test_lanes_put_deterministic_requests_in_one_lane():
    assert len(set(lanes("a", "b", "a", temperature=0))) == 1


def test_lanes_follow_the_sample_that_is_asked_for():
    sharing = Sharing("lanes")
    counted = lanes("a", "a", sharing=sharing)
    named = [sharing.draw(chat_call(context=Context(agent="a", sample=sample))).key for sample in (1, 0, 1)]
    assert named == [counted[1], counted[0], counted[1]]


def test_a_draw_without_answer_is_drawn_again():
    sharing = Sharing("lanes")
    draws = [sharing.draw(chat_call(context=Context(agent="a"))) for _ in range(3)]
    sharing.give_back(draws[1])
    sharing.give_back(draws[0])
    assert lanes("a", "a", "a", sharing=sharing)[:2] == [draws[0].key, draws[1].key]


def test_lanes_forget_the_oldest_pair_beyond_their_bound(monkeypatch):
    monkeypatch.setattr("llmmw.keys.sharing._MAX_LANES", 2)
    sharing = Sharing("lanes")
    first = lanes("a", sharing=sharing)
    lanes("b", "c", sharing=sharing)
    assert lanes("a", sharing=sharing) == first


def test_a_new_run_starts_from_the_first_sample():
    sharing = Sharing("lanes")
    first = lanes("a", "a", sharing=sharing)
    sharing.begin_run()
    assert lanes("a", "a", sharing=sharing) == first


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (chat_call(), chat_call(), None),
        (chat_call("a"), chat_call("b"), "messages[0].content"),
        (chat_call(temperature=0), chat_call(), "temperature"),
        (chat_call(stop=["a"]), chat_call(stop=["a", "b"]), "stop[1]"),
        (chat_call(stop=["a"]), chat_call(stop=["b"]), "stop[0]"),
        (chat_call(), chat_call().replace(namespace="n"), "namespace"),
        (chat_call(), chat_call().within(tenant="n"), "tenant"),
        (
            chat_call(guided_json={"a": 1, "b": 2}),
            chat_call(guided_json={"b": 2, "a": 1}),
            "guided_json.(key order)",
        ),
        (chat_call(x={"a": [{"b": 1}]}), chat_call(x={"a": [{"b": 2}]}), "x.a[0].b"),
        (function_call(x=1), function_call(x=2), "x"),
    ],
)
def test_a_difference_is_named_by_its_first_field(one, two, expected):
    assert explain_difference(one, two) == expected


def test_times_and_exact_numbers_as_arguments_have_a_form():
    hour = dt.timedelta(hours=1)
    apart = [
        dt.date(2026, 1, 1), dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 1, fold=1),  # noqa: DTZ001 — such as users pass
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1, tzinfo=dt.timezone(hour)), dt.time(1), hour,
        dt.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), decimal.Decimal("1.0"), decimal.Decimal("1.00"),
        uuid.UUID(int=1), "2026-01-01",
    ]  # fmt: skip
    assert len({key_of(function_call(v=value)) for value in apart}) == len(apart)

    class Zone(dt.tzinfo):
        pass

    with pytest.raises(Uncacheable, match="no codec for datetime"):
        key_of(function_call(v=dt.datetime(2026, 1, 1, tzinfo=Zone())))


def test_an_enums_value_counts():
    def style(text):
        return enum.Enum("Style", {"NICE": text}).NICE

    assert differ(function_call(v=style("be nice")), function_call(v=style("be kind")))
