"""What a request says about a call, and what replies and errors look like to an HTTP client."""

from __future__ import annotations

import msgspec
import pytest

import llmmw
from llmmw import Attempt, Reply, Retry, Stack, TTLCache, using
from llmmw.edges.http import HTTPEdge, Repeated
from llmmw.edges.outcome import Answer, answer_of, failure_of
from llmmw.endpoints.anywhere import TimedRequest
from llmmw.errors import (
    AllEndpointsFailed,
    AmbiguousOutcome,
    AmbiguousTimeout,
    CircuitOpen,
    Closed,
    ConnectionFailed,
    DeadlineExceeded,
    LLMMWError,
    ProtocolError,
    QueueFull,
    RateLimited,
    ResponseTooLarge,
    StaleConnection,
    StatusError,
    UpstreamTimeout,
)
from llmmw.testing.fake import FakeUpstream, chat_chunks, error_reply
from llmmw.testing.fake import ScriptedChunks as Chunks

CHAT = "https://api.test/v1/chat/completions"
BODY = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0})


@pytest.fixture
def edge():
    return HTTPEdge(Stack(), FakeUpstream())


def call_of(edge, url=CHAT, *, method="POST", body=BODY, timeout=None, **headers):
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return edge.call(method, url, raw, body, timeout or {})


@pytest.mark.parametrize(
    ("url", "op", "target"),
    [
        (CHAT, "chat", "https://api.test:443/v1"),
        ("http://[::1]:8000/v1/completions", "complete", "http://[::1]:8000/v1"),
        ("https://api.test/v1/embeddings/", "embed", "https://api.test:443/v1"),
        ("https://api.test/v1/messages", "messages", "https://api.test:443"),
        ("https://api.test/proxy/v1/messages", "messages", "https://api.test:443/proxy"),
        ("https://api.test/v1/responses", "responses", "https://api.test:443/v1"),
        (
            "https://a.test/openai/deployments/gpt/chat/completions?api-version=1",
            "chat",
            "https://a.test:443/openai/deployments/gpt",
        ),
    ],
)
def test_a_url_becomes_operation_and_target(edge, url, op, target):
    call = call_of(edge, url)
    assert (call.op, call.target, call.direct) == (op, target, False)
    assert (call.model, call.payload["temperature"], call.stream) == ("m", 0, False)


def test_the_native_request_is_the_sdks_without_what_the_pool_sets(edge):
    call = call_of(
        edge, timeout={"connect": 5.0, "read": 600.0}, Host="x", Content_Length="3", Accept_Encoding="br",
        Connection="keep-alive", Authorization="Bearer k", X_Own="1",
    )  # fmt: skip
    assert call.native == TimedRequest(
        "POST", CHAT, (("authorization", "Bearer k"), ("x-own", "1")), BODY, read_s=600.0
    )
    assert call.connect_s == 5.0
    assert "Bearer" not in repr(call.native)


@pytest.mark.parametrize(
    ("method", "url", "body"),
    [
        ("GET", "https://api.test/v1/models", b""),
        ("POST", "https://api.test/v1/files", BODY),
        ("GET", CHAT, b""),
        ("POST", CHAT, b"--boundary\r\n"),
        ("POST", CHAT, b"[1]"),
        ("POST", CHAT, b'{"temperature": NaN}'),
        ("POST", CHAT, b"[" * 100_000),
    ],
)
def test_whatever_is_no_completion_goes_past_the_layers(edge, method, url, body):
    call = call_of(edge, url, method=method, body=body)
    assert call.direct
    assert (call.payload, call.model, call.stream) == ({}, "", False)
    assert call.native.body == body


def test_cache_08_who_asks_and_what_changes_the_answer_separate(edge):
    plain = call_of(edge)
    assert (plain.namespace, plain.variant) == ("", ())
    keys = {
        call_of(edge, authorization="Bearer a").namespace,
        call_of(edge, authorization="Bearer b").namespace,
        call_of(edge, authorization="Bearer a", openai_organization="o").namespace,
        call_of(edge, x_api_key="a").namespace,
        call_of(edge, api_key="a").namespace,
        call_of(edge, x_goog_api_key="a").namespace,
        call_of(edge, CHAT + "?key=a").namespace,
        "",
    }
    assert len(keys) == 8
    assert call_of(edge, CHAT + "?key=a").variant == ()
    found = call_of(edge, CHAT + "?api-version=2", anthropic_version="1", OpenAI_Beta="x", user_agent="u")
    assert found.variant == (("?api-version", "2"), ("anthropic-version", "1"), ("openai-beta", "x"))


def test_a_tenant_takes_the_credentials_place(edge):
    with using(tenant="t", agent="alice"):
        call = call_of(edge, authorization="Bearer a")
    assert call.namespace == "tenant:t"
    assert call.context.agent == "alice"


def test_a_stream_is_recognised(edge):
    assert call_of(edge, body=b'{"model": 3, "stream": true}').stream
    assert not call_of(edge, body=b'{"stream": false}').stream
    assert call_of(edge, body=b'{"model": 3}').model == ""


def test_urls_and_headers_are_remembered_within_bounds(edge):
    for number in range(3000):
        call_of(edge, f"{CHAT}?n={number}", x_number=str(number))
    assert len(edge._places) <= 1024
    assert len(edge._heads) <= 1024


def test_the_namespace_secret_lives_in_the_cache_directory(tmp_path):
    stack = Stack(TTLCache(60, directory=tmp_path))
    found = {call_of(HTTPEdge(stack, FakeUpstream()), authorization="Bearer a").namespace for _ in range(2)}
    assert len(found) == 1
    assert list(tmp_path.glob("*secret*"))


def headers_of(answer):
    return dict(answer.headers)


def test_a_reply_keeps_its_headers_but_not_those_of_the_wire():
    reply = Reply(
        data=b"{}",
        headers=(
            ("content-type", "application/json; charset=utf-8"),
            ("content-encoding", "gzip"),
            ("content-length", "999"),
            ("x-request-id", "r"),
            ("x-ratelimit-remaining-requests", "7"),
            ("set-cookie", "c=1"),
        ),
    )
    answer = answer_of(reply, final=True)
    assert (answer.status, answer.body) == (200, b"{}")
    assert answer.headers == [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"x-request-id", b"r"),
        (b"x-ratelimit-remaining-requests", b"7"),
        (b"set-cookie", b"c=1"),
        (b"x-llmmw-source", b"upstream"),
        (b"x-llmmw-attempts", b"1"),
        (b"content-length", b"2"),
    ]
    stored = headers_of(answer_of(reply.replace(source="cache"), final=True))
    assert b"set-cookie" not in stored
    assert stored[b"x-llmmw-attempts"] == b"0"


def test_an_answer_without_headers_gets_its_type():
    assert headers_of(answer_of(Reply(data=b"{}"), final=False))[b"content-type"] == b"application/json"
    stream = headers_of(answer_of(Reply(chunks=Chunks(chat_chunks("a"))), final=False))
    assert stream[b"content-type"] == b"text/event-stream"
    assert b"content-length" not in stream


def test_a_fallbacks_answer_names_its_endpoint():
    reply = Reply(data=b"{}", fallback=True, endpoint="http://b.test/v1", attempts=(Attempt("a"),))
    found = headers_of(answer_of(reply, final=True))
    assert (found[b"x-llmmw-endpoint"], found[b"x-llmmw-attempts"]) == (b"http://b.test/v1", b"2")


def test_a_refusal_is_final_only_after_our_own_retries():
    reply = error_reply(503, x_should_retry="true").replace(attempts=(Attempt("a"), Attempt("a"), Attempt("a")))
    final = answer_of(reply, final=True)
    assert [value for name, value in final.headers if name == b"x-should-retry"] == [b"false"]
    assert headers_of(final)[b"x-llmmw-attempts"] == b"3"
    assert headers_of(answer_of(reply, final=False))[b"x-should-retry"] == b"true"
    assert headers_of(answer_of(error_reply(503), final=False))[b"x-llmmw-attempts"] == b"1"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RateLimited("no permit", retry_after_s=2.1), 429, "rate_limited"),
        (CircuitOpen("open", retry_after_s=5), 503, "circuit_open"),
        (QueueFull("full"), 503, "queue_full"),
        (DeadlineExceeded("late"), 503, "deadline_exceeded"),
        (Closed("closed"), 503, "closed"),
        (StatusError("no", status=404, code="model_not_found"), 404, "model_not_found"),
        (ProtocolError("HTML"), 502, "protocol_error"),
        (ResponseTooLarge("64 MiB"), 502, "response_too_large"),
        (AllEndpointsFailed("all", [ConnectionFailed("a"), StatusError("b", status=400)]), 400, "all_endpoints_failed"),
    ],
)
def test_an_error_becomes_a_final_response(error, status, code):
    answer = failure_of(error)
    assert isinstance(answer, Answer)
    found = headers_of(answer)
    assert (answer.status, found[b"x-should-retry"]) == (status, b"false")
    body = msgspec.json.decode(answer.body)
    assert body["type"] == "error"
    assert body["error"]["code"] == code
    assert error.message in body["error"]["message"]
    retry_after = getattr(error, "retry_after_s", None)
    assert found.get(b"retry-after") == (None if retry_after is None else {2.1: b"3", 5: b"5"}[retry_after])


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (UpstreamTimeout("slow"), "ReadTimeout"),
        (UpstreamTimeout("slow", sent=False), "ConnectTimeout"),
        (AmbiguousTimeout("slow"), "ReadTimeout"),
        (AmbiguousOutcome("lost"), "ReadError"),
        (ConnectionFailed("refused"), "ConnectError"),
        (StaleConnection("dead"), "RemoteProtocolError"),
        (LLMMWError("other"), "ReadError"),
        (AllEndpointsFailed("all", [StatusError("b", status=400), ConnectionFailed("a")]), "ConnectError"),
    ],
)
def test_an_error_of_the_way_becomes_the_librarys_exception(error, name):
    assert failure_of(error) == name


@pytest.mark.parametrize("wait", [float("inf"), float("nan"), -1.0])
def test_a_wait_that_is_none_is_not_passed_on(wait):
    answer = failure_of(RateLimited("never", retry_after_s=wait))
    assert isinstance(answer, Answer)
    assert b"retry-after" not in headers_of(answer)


def test_the_last_endpoints_retry_after_is_passed_on():
    answer = failure_of(AllEndpointsFailed("all", [ConnectionFailed("a"), RateLimited("b", retry_after_s=7)]))
    assert isinstance(answer, Answer)
    assert (answer.status, headers_of(answer)[b"retry-after"]) == (429, b"7")


def test_the_first_endpoint_that_may_answer_again_says_when():
    errors = [CircuitOpen("a", retry_after_s=2.1), StatusError("b", status=429, retry_after_s=40.0), CircuitOpen("c")]
    answer = failure_of(AllEndpointsFailed("all", errors))
    assert isinstance(answer, Answer)
    assert dict(answer.headers)[b"retry-after"] == b"3"
    assert dict(answer.headers)[b"x-should-retry"] == b"false"


def test_any_other_exception_of_a_fallback_is_a_bad_gateway():
    answer = failure_of(AllEndpointsFailed("all", [RuntimeError("a user's own")]))
    assert isinstance(answer, Answer)
    assert answer.status == 502


async def test_a_repetition_of_what_was_given_up_is_refused_here_and_told_once():
    edge = HTTPEdge(Stack(Retry(attempts=2)), FakeUpstream())
    told = []
    edge.engine.env.add_sink(told.append)
    assert edge.failure(UpstreamTimeout("slow"), CHAT, BODY) == "ReadTimeout"
    for _ in range(2):
        with pytest.raises(Repeated, match="slow") as caught:
            call_of(edge, x_stainless_retry_count="1")
        assert caught.value.kind == "ReadTimeout"
    assert call_of(edge, x_stainless_retry_count="0")
    assert call_of(edge, x_stainless_retry_count="1", body=b"{}")
    assert call_of(edge, CHAT + "?other", x_stainless_retry_count="1")
    assert call_of(HTTPEdge(Stack(Retry()), FakeUpstream()), x_stainless_retry_count="1")
    assert [event.kind for event in told] == ["doubled-retries"]


def test_without_a_retry_layer_the_sdk_repeats_as_it_likes(edge):
    assert edge.failure(UpstreamTimeout("slow"), CHAT, BODY) == "ReadTimeout"
    assert call_of(edge, x_stainless_retry_count="1")
    assert edge.engine.get_performance_stats()["warnings"] == {}


def test_a_disabled_stack_leaves_retries_to_the_sdk(monkeypatch):
    monkeypatch.setenv("LLMMW_DISABLE", "1")
    edge = HTTPEdge(Stack(Retry()), FakeUpstream())
    assert b"x-should-retry" not in headers_of(edge.answer(error_reply(503)))


def test_public_names_are_the_classes():
    assert issubclass(llmmw.httpx2_client, __import__("httpx2").AsyncClient)
    assert issubclass(llmmw.httpx_sync_client, __import__("httpx").Client)
