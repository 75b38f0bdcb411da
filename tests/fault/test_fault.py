# ruff: noqa: E501 — the tables of bodies read better one per line
from __future__ import annotations

import asyncio
import errno
import json
import pickle
import socket
import ssl
from pathlib import Path

import aiohttp
import anthropic
import httpx
import msgspec
import openai
import pytest

from llmmw import errors
from llmmw.call import Reply
from llmmw.fault import Fault, FaultKind, classify, error_of, fault_of_event
from llmmw.fault.bodies import ErrorBody, context_limit, decode_error, read_decoded, redact
from llmmw.testing.fake import chat_body, error_reply

K = FaultKind
WALL = 1_800_000_000.0
REQUEST = httpx.Request("POST", "https://api.test/v1/chat/completions")
ELSEWHERE = "Please try again later or on a different instance."
VLLM = json.loads((Path(__file__).parent.parent / "data" / "vllm_errors.json").read_text("utf-8"))


def kind(outcome: Reply | BaseException) -> FaultKind | None:
    fault = classify(outcome, wall=WALL)
    return None if fault is None else fault.kind


def refusal(status: int, body: object, **headers: str) -> Reply:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return Reply(data=data, status=status, headers=tuple((k.replace("_", "-"), v) for k, v in headers.items()))


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────────────

GEMINI_MINUTE = {
    "error": {
        "code": 429,
        "message": "You exceeded your current quota, please check your plan and billing details.",
        "status": "RESOURCE_EXHAUSTED",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}],
            },
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "38.5s"},
        ],
    }
}
GEMINI_DAY = {
    "error": {
        "code": 429,
        "message": "You exceeded your current quota, please check your plan and billing details.",
        "status": "RESOURCE_EXHAUSTED",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
            },
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "38.5s"},
        ],
    }
}
AZURE_FILTER = {
    "error": {
        "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}},
    }
}
LENGTH = "This model's maximum context length is 1024 tokens."


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        # OpenAI and Azure
        (429, {"error": {"message": "x", "type": "insufficient_quota", "code": "insufficient_quota"}}, K.QUOTA),
        (429, {"error": {"message": "Rate limit reached", "type": "tokens", "code": "rate_limit_exceeded"}}, K.RATE),
        (429, {"error": {"message": "Request too large for gpt on tokens per min", "code": "rate_limit_exceeded"}}, K.CONTEXT_LENGTH),
        (400, {"error": {"message": "x", "type": "invalid_request_error", "code": "billing_hard_limit_reached"}}, K.QUOTA),
        (401, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}, K.AUTH),
        (403, {"error": {"message": "Country not supported", "code": "unsupported_country_region_territory"}}, K.AUTH),
        (400, {"error": {"message": "too long", "code": "context_length_exceeded", "param": "messages"}}, K.CONTEXT_LENGTH),
        (400, AZURE_FILTER, K.CONTENT_FILTER),
        (400, {"error": {"message": "x", "code": "content_policy_violation"}}, K.CONTENT_FILTER),
        (404, {"error": {"message": "The model does not exist", "code": "model_not_found"}}, K.INVALID),
        (404, {"error": {"message": "Resource not found", "code": "404"}}, K.INVALID),
        (500, {"error": {"message": "The server had an error", "type": "server_error"}}, K.SERVER),
        (503, {"error": {"message": "overloaded", "type": "server_error"}}, K.SERVER),
        (408, {}, K.SERVER),
        (409, {}, K.SERVER),
        (402, {}, K.QUOTA),
        (413, b"<html>Request Entity Too Large</html>", K.CONTEXT_LENGTH),
        (501, {}, K.INVALID),
        (502, b"<html>Bad Gateway</html>", K.SERVER),
        (504, b"", K.SERVER),
        # Anthropic
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, K.SERVER),
        (429, {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}, K.RATE),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 208310 tokens > 200000 maximum"}}, K.CONTEXT_LENGTH),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "input length and `max_tokens` exceed context limit: 1 + 2 > 3"}}, K.CONTEXT_LENGTH),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low to access the Anthropic API."}}, K.QUOTA),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "You have reached your specified API usage limits."}}, K.QUOTA),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"}}, K.CONTENT_FILTER),
        (401, {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}, K.AUTH),
        (413, {"type": "error", "error": {"type": "request_too_large", "message": "x"}}, K.CONTEXT_LENGTH),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: required"}}, K.INVALID),
        # Gemini
        (429, GEMINI_MINUTE, K.RATE),
        (429, [GEMINI_MINUTE], K.RATE),
        (429, GEMINI_DAY, K.QUOTA),
        (429, {"error": {"status": "RESOURCE_EXHAUSTED", "message": "Quota exceeded for metric: free_tier, limit: 0, model: x"}}, K.QUOTA),
        (429, {"error": {"status": "RESOURCE_EXHAUSTED", "message": "Quota exceeded for metric: x, limit: 0.5"}}, K.RATE),
        (400, {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "API key not valid.", "details": [{"reason": "API_KEY_INVALID"}]}}, K.AUTH),
        (400, {"error": {"status": "INVALID_ARGUMENT", "message": "The input token count (1100000) exceeds the maximum number of tokens allowed (1048576)."}}, K.CONTEXT_LENGTH),
        (503, {"error": {"code": 503, "status": "UNAVAILABLE", "message": "The model is overloaded."}}, K.SERVER),
        # vLLM: the old shape, the new one and the proposed code; text errors; FastAPI details
        (400, {"object": "error", "message": LENGTH, "type": "BadRequestError", "param": None, "code": 400}, K.CONTEXT_LENGTH),
        (400, {"error": {"message": "You passed 1015 input tokens and requested 10 output tokens.", "type": "BadRequestError", "param": "input_tokens", "code": 400}}, K.CONTEXT_LENGTH),
        (400, {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": "context_length_exceeded"}}, K.CONTEXT_LENGTH),
        (500, {"error": {"message": LENGTH}}, K.CONTEXT_LENGTH),
        (401, {"error": "Unauthorized"}, K.AUTH),
        (503, {"error": {"message": "busy", "type": "Service Unavailable", "code": 503}}, K.SERVER),
        (404, {"detail": "Not Found"}, K.INVALID),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "Field required"}]}, K.INVALID),
        # Mistral, Cloudflare, text, garbage
        (422, {"object": "error", "message": {"detail": [{"loc": ["x"], "msg": "bad"}]}, "type": "invalid_request_error"}, K.INVALID),
        (400, {"errors": [{"message": LENGTH, "code": 3030}]}, K.CONTEXT_LENGTH),
        (400, b"prompt is too long", K.CONTEXT_LENGTH),
        (400, [], K.INVALID),
        (400, None, K.INVALID),
        (400, b"\xff\xfe", K.INVALID),
        (400, {"error": []}, K.INVALID),
        (503, {"error": {"message": f"Prefill backlog. {ELSEWHERE}", "type": "Service Unavailable"}}, K.RATE),
        (500, {"error": {"message": ELSEWHERE, "type": "Service Unavailable"}}, K.SERVER),
    ],
)  # fmt: skip
def test_refusal_is_classified_by_status_and_body(status: int, body: object, expected: FaultKind) -> None:
    assert kind(refusal(status, body)) is expected


VLLM_KINDS = {
    "prompt_too_long": K.CONTEXT_LENGTH,
    "prompt_too_long_stream": K.CONTEXT_LENGTH,
    "prompt_too_long_in_batch": K.CONTEXT_LENGTH,
    "prompt_too_long_in_list": K.CONTEXT_LENGTH,
    "max_tokens_too_large": K.CONTEXT_LENGTH,
    "no_key": K.AUTH,
    "wrong_key": K.AUTH,
}


@pytest.mark.parametrize("recorded", VLLM, ids=lambda entry: entry["case"])
def test_bodies_of_a_real_vllm_server(recorded: dict) -> None:
    expected = VLLM_KINDS.get(recorded["case"], K.RATE if recorded["status"] == 503 else K.INVALID)
    fault = classify(refusal(recorded["status"], recorded["body"]), wall=WALL)
    assert fault is not None
    assert fault.kind is expected
    assert fault.message


def test_success_is_no_fault() -> None:
    assert kind(Reply(data=chat_body("fine"))) is None
    assert kind(Reply(data=chat_body("the words content_filter and refusal"))) is None
    assert kind(Reply(native=object())) is None


@pytest.mark.parametrize("reason", ["content_filter", "refusal"])
def test_success_ended_by_a_content_filter_is_told(reason: str) -> None:
    assert kind(Reply(data=chat_body("I ca", finish=reason))) is K.CONTENT_FILTER


def test_quoted_finish_reason_in_the_text_is_not_a_finish_reason() -> None:
    assert kind(Reply(data=chat_body('{"finish_reason": "content_filter"}'))) is None


def test_wait_is_read_from_headers_and_body() -> None:
    def wait(reply: Reply) -> float | None:
        fault = classify(reply, wall=WALL)
        assert fault is not None
        return fault.retry_after_s

    assert wait(error_reply(429, retry_after="7")) == 7
    assert wait(error_reply(429, retry_after_ms="1500")) == 1.5
    assert wait(error_reply(429, retry_after="0")) is None
    assert wait(error_reply(429, retry_after="nan")) is None
    assert wait(refusal(429, GEMINI_MINUTE)) == 38.5


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("False", False), ("maybe", None), ("", None)])
def test_servers_wish_is_read(text: str, expected: bool | None) -> None:
    fault = classify(error_reply(503, x_should_retry=text), wall=WALL)
    assert fault is not None
    assert fault.should_retry is expected


def test_context_limit_is_read_from_the_servers_words() -> None:
    assert context_limit(LENGTH) == 1024
    assert context_limit("prompt is too long: 208310 tokens > 200000 maximum") == 200_000
    assert context_limit("exceeds the maximum number of tokens allowed (1,048,576).") == 1_048_576
    assert context_limit("max_tokens=100000 cannot be greater than max_model_len=4096.") == 4096
    assert context_limit("no") is None


def test_body_readers_take_anything() -> None:
    for value in (
        None,
        3,
        "text",
        [],
        {},
        [[[[]]]],
        {"error": None},
        {"errors": []},
        {"error": {"error": {}}},
        {"detail": {}},
    ):
        assert isinstance(read_decoded(value), ErrorBody)
    assert decode_error(b"x" * 300_000) == (ErrorBody(), None)
    assert decode_error(None) == (ErrorBody(), None)
    assert decode_error(b"[" * 100_000)[1] is None
    assert read_decoded({"detail": {"msg": "m"}}).message == "m"
    assert read_decoded({"error": "bad", "message": "worse", "code": "c"}) == ErrorBody("worse", "c")
    assert decode_error(b"<html>x</html>")[0].message == ""


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-SECRETSECRET. See",
        "bad header Bearer SECRETSECRET",
        "https://x.test/?key=SECRETSECRET&b=1",
        "key AIzaSECRETSECRET refused",
        "api_key='SECRETSECRET'",
        "token: SECRETSECRET",
        "jwt eyJSECRETSECRET.abc.def",
    ],
)
def test_security_messages_carry_no_credential(text: str) -> None:
    assert "SECRETSECRET" not in redact(text)
    assert "***" in redact(text)
    reply = refusal(401, {"error": {"message": text}})
    assert "SECRETSECRET" not in str(error_of(reply))
    assert "SECRETSECRET" not in repr(classify(reply, wall=WALL))


def test_messages_keep_their_words_on_one_bounded_line() -> None:
    assert redact("maximum context length is 1024 tokens.\n\tReduce") == "maximum context length is 1024 tokens. Reduce"
    assert redact("tokens per min (TPM): Limit 10000, Used 5000") == "tokens per min (TPM): Limit 10000, Used 5000"
    assert len(redact("x " * 5000)) <= 500


# ── error_of ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_status_error_tells_what_the_server_said() -> None:
    reply = error_reply(429, message="slow down", code="rate_limit_exceeded", retry_after="3", x_request_id="r-1")
    error = error_of(reply.replace(endpoint="http://e.test/v1"))
    assert (error.status, error.code, error.fault) == (429, "rate_limit_exceeded", "rate")
    assert (error.retry_after_s, error.request_id, error.endpoint) == (3.0, "r-1", "http://e.test/v1")
    assert str(error) == "http://e.test/v1 answered 429: slow down"
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, again.retry_after_s, str(again)) == (429, 3.0, str(error))
    assert kind(error) is K.RATE


def test_status_error_without_words_names_the_status() -> None:
    error = error_of(Reply(data=None, status=502))
    assert str(error) == "the server answered 502"
    assert error.request_id is None


# ── exceptions ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.UpstreamTimeout("x"), K.AMBIGUOUS),
        (errors.UpstreamTimeout("x", sent=False), K.NOT_SENT),
        (errors.ConnectionFailed("x"), K.NOT_SENT),
        (errors.StaleConnection("x"), K.AMBIGUOUS),
        (errors.AmbiguousOutcome("x"), K.AMBIGUOUS),
        (errors.ProtocolError("x"), K.MALFORMED),
        (errors.TruncatedStream("x"), K.MALFORMED),
        (errors.ResponseTooLarge("x"), K.MALFORMED),
        (errors.StreamInterrupted("x"), K.AMBIGUOUS),
        (errors.UpstreamError("x"), K.AMBIGUOUS),
        (errors.RateLimited("x"), K.REFUSED),
        (errors.CircuitOpen("x"), K.REFUSED),
        (errors.DeadlineExceeded("x"), K.REFUSED),
        (errors.ConfigError("x"), K.INVALID),
        (errors.StatusError("x", status=503), K.SERVER),
        (errors.StatusError("x", status=400, code="context_length_exceeded"), K.CONTEXT_LENGTH),
        (errors.AllEndpointsFailed("x", [errors.StatusError(status=400), errors.ConnectionFailed()]), K.NOT_SENT),
        # the operating system and the standard library
        (ConnectionRefusedError(), K.NOT_SENT),
        (socket.gaierror(), K.NOT_SENT),
        (ssl.SSLCertVerificationError(), K.NOT_SENT),
        (OSError(errno.ENETUNREACH, "x"), K.NOT_SENT),
        (ConnectionResetError(), K.AMBIGUOUS),
        (BrokenPipeError(), K.AMBIGUOUS),
        (TimeoutError(), K.AMBIGUOUS),
        (FileNotFoundError("x"), K.INVALID),
        (PermissionError("x"), K.INVALID),
        # httpx
        (httpx.ConnectError("x"), K.NOT_SENT),
        (httpx.ConnectTimeout("x"), K.NOT_SENT),
        (httpx.PoolTimeout("x"), K.NOT_SENT),
        (httpx.ReadTimeout("x"), K.AMBIGUOUS),
        (httpx.WriteTimeout("x"), K.AMBIGUOUS),
        (httpx.ReadError("x"), K.AMBIGUOUS),
        (httpx.RemoteProtocolError("x"), K.AMBIGUOUS),
        (httpx.UnsupportedProtocol("x"), K.INVALID),
        (httpx.DecodingError("x"), K.MALFORMED),
        (httpx.HTTPStatusError("x", request=REQUEST, response=httpx.Response(503)), K.SERVER),
        # aiohttp
        (aiohttp.ServerDisconnectedError(), K.AMBIGUOUS),
        (aiohttp.ClientOSError(104, "x"), K.AMBIGUOUS),
        (aiohttp.ClientPayloadError(), K.AMBIGUOUS),
        (aiohttp.ServerTimeoutError(), K.AMBIGUOUS),
        (aiohttp.ConnectionTimeoutError(), K.NOT_SENT),
        # a user's own
        (ValueError("x"), K.INVALID),
        (KeyError("x"), K.INVALID),
        (json.JSONDecodeError("x", "y", 0), K.INVALID),
        (RuntimeError("x"), K.INVALID),
        # the caller's own wish
        (asyncio.CancelledError(), K.CANCELLED),
        (KeyboardInterrupt(), K.CANCELLED),
        (SystemExit(1), K.CANCELLED),
        (GeneratorExit(), K.CANCELLED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)  # fmt: skip
def test_exception_is_classified(error: BaseException, expected: FaultKind) -> None:
    assert kind(error) is expected


def test_full_pool_is_not_the_endpoints_fault() -> None:
    def local(error: BaseException) -> bool:
        fault = classify(error, wall=WALL)
        assert fault is not None
        return fault.local

    assert local(errors.PoolTimeout("x"))
    assert local(httpx.PoolTimeout("x"))
    assert local(raised(errors.ConnectionFailed("x"), httpx.PoolTimeout("x")))
    assert not local(errors.ConnectionFailed("x"))
    assert not local(httpx.ConnectError("x"))


def test_too_large_answer_is_not_asked_for_again() -> None:
    fault = classify(errors.ResponseTooLarge("x"), wall=WALL)
    assert fault == Fault(K.MALFORMED, should_retry=False)


def openai_error(cls: type, status: int, body: object, **headers: str) -> Exception:
    response = httpx.Response(status, headers=headers, request=REQUEST)
    return cls("m", response=response, body=body)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (openai_error(openai.RateLimitError, 429, {"message": "x", "code": "insufficient_quota"}), K.QUOTA),
        (openai_error(openai.RateLimitError, 429, {"message": "x", "code": "rate_limit_exceeded"}), K.RATE),
        (openai_error(openai.BadRequestError, 400, {"message": LENGTH, "code": None}), K.CONTEXT_LENGTH),
        (openai_error(openai.BadRequestError, 400, {"message": "no"}), K.INVALID),
        (openai_error(openai.AuthenticationError, 401, None), K.AUTH),
        (openai_error(openai.InternalServerError, 500, "oops"), K.SERVER),
        (openai.APIResponseValidationError(httpx.Response(200, request=REQUEST), None), K.MALFORMED),
        (openai.APIConnectionError(request=REQUEST), K.AMBIGUOUS),
        (raised(openai.APIConnectionError(request=REQUEST), httpx.ConnectError("x")), K.NOT_SENT),
        (raised(openai.APIConnectionError(request=REQUEST), httpx.ReadError("x")), K.AMBIGUOUS),
        (openai.APITimeoutError(REQUEST), K.AMBIGUOUS),
        (raised(openai.APITimeoutError(REQUEST), httpx.PoolTimeout("x")), K.NOT_SENT),
        (openai.APIError("x", REQUEST, body={"message": "x", "type": "rate_limit_error"}), K.RATE),
        (openai.APIError("x", REQUEST, body={"message": "x", "type": "server_error"}), K.SERVER),
        (openai.APIError("x", REQUEST, body=None), K.INVALID),
        (
            openai_error(
                anthropic.BadRequestError,
                400,
                {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 2 > 1"}},
            ),
            K.CONTEXT_LENGTH,
        ),
        (
            openai_error(
                anthropic.APIStatusError, 529, {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}
            ),
            K.SERVER,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_sdk_exception_is_classified_without_importing_the_sdk(error: BaseException, expected: FaultKind) -> None:
    assert kind(error) is expected


def test_sdk_exception_brings_its_wait_and_wish() -> None:
    error = openai_error(openai.RateLimitError, 429, None, **{"retry-after": "4", "x-should-retry": "false"})
    assert classify(error, wall=WALL) == Fault(K.RATE, 4.0, should_retry=False, status=429)


def test_litellm_classes_are_known_by_name() -> None:
    class ContextWindowExceededError(Exception):
        status_code = 400

    class APIConnectionError(Exception):
        status_code = 500

    class Timeout(Exception):
        status_code = 408

    assert kind(ContextWindowExceededError()) is K.CONTEXT_LENGTH
    assert kind(APIConnectionError()) is K.AMBIGUOUS
    assert kind(Timeout()) is K.AMBIGUOUS


def test_google_and_urllib_put_the_status_in_code() -> None:
    class ClientError(Exception):
        code = 429
        status = "RESOURCE_EXHAUSTED"
        details = GEMINI_DAY

    class HTTPError(Exception):
        def __init__(self) -> None:
            self.code = 503
            self.headers = {"Retry-After": "2"}

    assert kind(ClientError()) is K.QUOTA
    assert classify(HTTPError(), wall=WALL) == Fault(K.SERVER, 2.0, status=503)


# ── cancellation ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_route_15_wrapped_cancellation_is_cancellation() -> None:
    class Wrapped(Exception):
        def __init__(self, inner: BaseException) -> None:
            self.original_exception = inner

    cancelled = asyncio.CancelledError()
    assert kind(raised(RuntimeError("x"), cancelled)) is K.CANCELLED
    assert kind(raised(ValueError("y"), raised(RuntimeError("x"), cancelled))) is K.CANCELLED
    assert kind(raised(openai.APIConnectionError(request=REQUEST), cancelled)) is K.CANCELLED
    assert kind(Wrapped(cancelled)) is K.CANCELLED
    assert kind(BaseExceptionGroup("g", [cancelled])) is K.CANCELLED
    assert kind(ExceptionGroup("g", [raised(RuntimeError("x"), cancelled), ValueError()])) is K.CANCELLED
    assert kind(ExceptionGroup("g", [ValueError()])) is K.INVALID

    def handling() -> BaseException:
        try:
            try:
                raise asyncio.CancelledError
            except asyncio.CancelledError:
                raise RuntimeError("while handling it")  # noqa: B904 — the context is the point
        except RuntimeError as error:
            return error

    assert kind(handling()) is K.CANCELLED


async def test_a_timeout_is_not_a_cancellation() -> None:
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert kind(caught.value) is K.AMBIGUOUS
    assert kind(raised(openai.APITimeoutError(REQUEST), raised(httpx.ReadTimeout("x"), caught.value))) is K.AMBIGUOUS


def test_suppressed_context_and_cycles_are_respected() -> None:
    def suppressed() -> BaseException:
        try:
            try:
                raise asyncio.CancelledError
            except asyncio.CancelledError:
                raise RuntimeError("on purpose") from None
        except RuntimeError as error:
            return error

    assert kind(suppressed()) is K.INVALID
    one, two = ValueError("1"), ValueError("2")
    one.__cause__, two.__cause__ = two, one
    assert kind(one) is K.INVALID


# ── stream events ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_error_event_of_a_stream() -> None:
    def judged(event: object) -> FaultKind | None:
        fault = fault_of_event(event, wall=WALL)
        return None if fault is None else fault.kind

    assert judged({"choices": []}) is None
    assert judged({"error": None}) is None
    assert judged([]) is None
    assert judged({"error": {"message": "boom", "type": "InternalServerError", "code": 500}}) is K.SERVER
    assert judged({"error": {"message": LENGTH, "type": "BadRequestError", "code": 400}}) is K.CONTEXT_LENGTH
    assert judged({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}) is K.SERVER
    assert judged({"error": {"message": "x", "type": "invalid_request_error"}}) is K.INVALID


def test_security_04_words_are_looked_for_at_the_beginning_of_a_message_only() -> None:
    assert kind(refusal(400, {"error": {"message": "x " * 1000 + LENGTH}})) is K.CONTEXT_LENGTH
    assert kind(refusal(400, {"error": {"message": "x " * 2000 + LENGTH}})) is K.INVALID
    assert kind(refusal(400, {"error": {"message": "flagged by " * 20_000}})) is K.INVALID
