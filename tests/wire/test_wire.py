"""HTTP and JSON as servers speak them: paths, strict bodies, what may be shown of a URL."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.errors import ProtocolError
from llmmw.testing.fake import chat_body
from llmmw.wire import PATHS, HTTPRequest, decode_json, op_of, read_answer, url_of, without_query


@pytest.mark.parametrize(
    ("path", "op"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/chat/completions/", "chat"),
        ("/v1/completions", "complete"),
        ("/v1/embeddings", "embed"),
        ("/v1/messages", "messages"),
        ("/v1/responses", "responses"),
        ("/v1/chat/completions/batch", "chat_batch"),
        ("/openai/deployments/d/chat/completions?api-version=1", "chat"),
        ("/v1/threads/t/messages", "/v1/threads/t/messages"),
        ("/v1/models", "/v1/models"),
    ],
)
def test_a_path_names_its_operation(path, op):
    assert op_of(path) == op


@pytest.mark.parametrize(
    ("base", "op", "url"),
    [
        ("http://h/v1", "chat", "http://h/v1/chat/completions"),
        ("http://h/v1/", "complete", "http://h/v1/completions"),
        ("http://h", "messages", "http://h/v1/messages"),
        ("http://h/v1", "messages", "http://h/v1/messages"),
        ("http://h/v1?api-version=2", "embed", "http://h/v1/embeddings?api-version=2"),
        ("http://h/v1", "/models", "http://h/v1/models"),
        ("http://h/v1", "/v1/models", "http://h/v1/models"),
        ("http://h/v1", "models", "http://h/v1/models"),
    ],
)
def test_an_operation_has_its_place_below_the_base_url(base, op, url):
    assert url_of(base, op) == url


def test_every_known_operation_is_found_again_at_its_url():
    for op in PATHS:
        assert op_of(url_of("https://host/v1", op)) == op


def test_security_02_a_request_shows_neither_headers_nor_query_nor_body():
    request = HTTPRequest("POST", "https://u:p@host:1/x?key=secret#f", (("authorization", "Bearer secret"),), b"secret")
    assert repr(request) == "HTTPRequest(POST https://host:1/x, 6 bytes)"
    assert without_query("https://host") == "https://host"
    assert without_query("") == ""


# JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(JSON, st.sampled_from([None, 2]))
def test_json_without_twins_is_read_as_it_is(value, indent):
    data = msgspec.json.encode(value)
    if indent:
        data = msgspec.json.format(data, indent=indent)
    assert decode_json(data) == value


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(), JSON, JSON, st.sampled_from(["", " ", "\n"]), st.booleans())
def test_security_04_a_key_given_twice_is_refused_at_any_depth(key, first, second, gap, nested):
    name, one, two = (msgspec.json.encode(item).decode() for item in (key, first, second))
    twins = f'{{{name}{gap}:{one},{name}:{two},"z":[]}}'
    with pytest.raises(ValueError, match="twice"):
        decode_json((f'{{"choices":[{twins}]}}' if nested else twins).encode())


def test_a_twin_hidden_behind_an_escaped_colon_is_found():
    with pytest.raises(ValueError, match="twice"):
        decode_json(rb'{"a":1,"a":2,"b":"\u003a"}')
    assert decode_json(rb'{"b":"\u003a\u003A"}') == {"b": "::"}


def test_a_key_that_ends_in_a_backslash_is_no_twin():
    assert decode_json(rb'{"a\\":1,"b":"\":"}') == {"a\\": 1, "b": '":'}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[" * 201 + b"]" * 201, "deeper"),
        (b'{"a":' * 201 + b"1" + b"}" * 201, "deeper"),
        (b'{"a":' + b"1" * 5000 + b"}", "digits"),
        (b'{"a":0.' + b"1" * 5000 + b"}", "digits"),
        (b'{"a":', "JSON"),
        (b"\xff", "JSON"),
        (b'{"a":NaN}', "JSON"),
        (b'"\\ud800"', "JSON"),
    ],
)
def test_security_04_json_that_attacks_its_reader_is_refused(data, why):
    with pytest.raises(ValueError, match=why):
        decode_json(data)


def test_brackets_and_digits_inside_text_are_harmless():
    text = "[{" * 500 + "7" * 5000
    assert decode_json(msgspec.json.encode({"text": text})) == {"text": text}
    assert decode_json(b"[" * 200 + b"]" * 200)
    assert decode_json(b"[" + b"[]," * 300 + b"1]")


def test_an_answer_is_read_and_judged():
    assert read_answer("chat", chat_body("hi"))["choices"][0]["message"]["content"] == "hi"
    assert read_answer("chat_batch", b"{}") == {}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"<html>Bad gateway</html>", "HTML.*text/html"),
        (b"  <?xml?>", "HTML or XML"),
        (b"", "an empty body"),
        (chat_body("hi")[:-10], "not JSON"),
        (b'{"error":{"message":"overloaded"}}', "is an error"),
        (b'{"choices":[]}', "empty"),
        (b"[]", "JSON object"),
    ],
)
def test_route_08_a_success_without_an_answer_is_a_protocol_error(data, why):
    with pytest.raises(ProtocolError, match=why) as caught:
        read_answer("chat", data, endpoint="http://e/v1", content_type="text/html")
    assert caught.value.endpoint == "http://e/v1"
