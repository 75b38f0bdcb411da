# ruff: noqa: E501 — the tables of bodies read better one per line
"""The fault classes against the error bodies of the providers, as their documentation and issue trackers show them."""

from __future__ import annotations

import msgspec
import pytest

from llmmw.call import Reply
from llmmw.endpoints.openai import AnswerStream
from llmmw.errors import StatusError
from llmmw.fault import FaultKind, classify, error_of
from llmmw.fault.bodies import context_limit
from llmmw.wire.secrets import NO_SECRETS
from llmmw.wire.sse import StreamWatch

K = FaultKind
WALL = 1_800_000_000.0


def openai(
    message: str, kind: str | None = "invalid_request_error", code: object = None, param: str | None = None
) -> object:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic(kind: str, message: str) -> object:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


def gemini(code: int, status: str, message: str, *details: object) -> object:
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def failure(*quotas: str) -> object:
    violations = [{"quotaMetric": "generativelanguage.googleapis.com/x", "quotaId": quota} for quota in quotas]
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations}


def retry_info(delay: str) -> object:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


QUOTA_TEXT = "You exceeded your current quota, please check your plan and billing details."
TPM = "Rate limit reached for gpt-x in organization org-1 on tokens per min (TPM): Limit 30000, Used 29000, Requested 2000. Please try again in 2s."
RPD = "Rate limit reached for gpt-x in organization org-1 on requests per day (RPD): Limit 200, Used 200, Requested 1. Please try again in 7m12s."
GROQ_TPD = "Rate limit reached for model `llama` in organization `org_1` service tier `on_demand` on tokens per day (TPD): Limit 100000, Used 99936, Requested 1245."
VLLM_OLD = "This model's maximum context length is 1024 tokens. However, you requested 1037 tokens (1027 in the messages, 10 in the completion). Please reduce the length of the messages or completion."
VLLM_NEW = "You passed 1015 input tokens and requested 10 output tokens. However, the model's context length is only 1024 tokens, resulting in a maximum input length of 1014 tokens."
MINUTE, DAY = (
    "GenerateRequestsPerMinutePerProjectPerModel-FreeTier",
    "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
)
RATE_FIRST = {
    "error": {
        "code": 429,
        "message": "Provider returned error",
        "metadata": {"raw": "x is temporarily rate-limited upstream", "provider_name": "X"},
    }
}
MODERATED = {
    "error": {
        "code": 403,
        "message": "Input was refused",
        "metadata": {"reasons": ["sexual"], "flagged_input": "...", "provider_name": "X"},
    }
}

BODIES: list[tuple[str, int, object, FaultKind]] = [
    # provider, status, body, class
    ("openai", 429, openai(QUOTA_TEXT, "insufficient_quota", "insufficient_quota"), K.QUOTA),
    ("openai", 429, openai(QUOTA_TEXT, "insufficient_quota"), K.QUOTA),
    ("openai", 429, openai("Your account is not active, please check your billing details", "billing_not_active", "billing_not_active"), K.QUOTA),
    ("openai", 429, openai(TPM, "tokens", "rate_limit_exceeded"), K.RATE),
    ("openai", 429, openai(RPD, "requests", "rate_limit_exceeded"), K.QUOTA),
    ("openai", 429, openai("Request too large for gpt-x on tokens per min (TPM): Limit 30000, Requested 40000.", "tokens", "rate_limit_exceeded"), K.CONTEXT_LENGTH),
    ("openai", 400, openai("Billing hard limit has been reached", code="billing_hard_limit_reached"), K.QUOTA),
    ("openai", 400, openai("This model's maximum context length is 8192 tokens.", code="context_length_exceeded", param="messages"), K.CONTEXT_LENGTH),
    ("openai", 400, openai("Your input exceeds the context window of this model.", code="context_length_exceeded", param="input"), K.CONTEXT_LENGTH),
    ("openai", 400, openai("Invalid prompt: your prompt was flagged as potentially violating our usage policy.", code="invalid_prompt"), K.CONTENT_FILTER),
    ("openai", 400, openai("Invalid value for 'temperature'", param="temperature"), K.INVALID),
    ("openai", 401, openai("Incorrect API key provided: sk-***.", code="invalid_api_key"), K.AUTH),
    ("openai", 403, openai("Country, region, or territory not supported", "request_forbidden", "unsupported_country_region_territory"), K.AUTH),
    ("openai", 404, openai("The model `gpt-9` does not exist", code="model_not_found"), K.INVALID),
    ("openai", 408, b"", K.SERVER),
    ("openai", 409, openai("The resource is locked"), K.SERVER),
    ("openai", 422, openai("unprocessable"), K.INVALID),
    ("openai", 500, openai("The server had an error while processing your request.", "server_error"), K.SERVER),
    ("openai", 503, openai("The engine is currently overloaded, please try again later", "server_error"), K.SERVER),
    ("openai", 503, openai("Slow down", "slow_down"), K.SERVER),
    # Azure
    ("azure", 429, openai("Requests to the ChatCompletions_Create Operation have exceeded token rate limit of your current OpenAI S0 pricing tier. Please retry after 6 seconds.", None, "429"), K.RATE),
    ("azure", 429, openai("The system is currently experiencing high demand and cannot process your request.", None, "NoCapacity"), K.RATE),
    ("azure", 401, {"statusCode": 401, "message": "Unauthorized. Access token is missing, invalid, audience is incorrect, or have expired."}, K.AUTH),
    ("azure", 401, openai("Access denied due to invalid subscription key or wrong API endpoint.", None, "401"), K.AUTH),
    ("azure", 403, openai("Out of call volume quota. Quota will be replenished in 12 days.", None, "403"), K.QUOTA),
    ("azure", 404, openai("The API deployment for this resource does not exist.", None, "DeploymentNotFound"), K.INVALID),
    ("azure", 408, openai("The operation was timeout.", None, "Timeout"), K.SERVER),
    ("azure", 400, {"error": {"message": "The response was filtered", "code": "content_filter", "status": 400, "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, K.CONTENT_FILTER),
    ("azure", 400, {"error": {"message": "filtered", "code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, K.CONTENT_FILTER),
    ("azure", 424, openai("failed", None, "FailedDependency"), K.SERVER),
    ("azure", 500, openai("internal", None, "InternalServerError"), K.SERVER),
    # Anthropic
    ("anthropic", 400, anthropic("invalid_request_error", "prompt is too long: 208310 tokens > 200000 maximum"), K.CONTEXT_LENGTH),
    ("anthropic", 400, anthropic("invalid_request_error", "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000"), K.CONTEXT_LENGTH),
    ("anthropic", 400, anthropic("invalid_request_error", "max_tokens: 100000 > 8192, which is the maximum allowed number of output tokens for x"), K.INVALID),
    ("anthropic", 400, anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API."), K.QUOTA),
    ("anthropic", 400, anthropic("invalid_request_error", "You have reached your specified API usage limits. You will regain access on 2027-01-01."), K.QUOTA),
    ("anthropic", 400, anthropic("invalid_request_error", "Output blocked by content filtering policy"), K.CONTENT_FILTER),
    ("anthropic", 401, anthropic("authentication_error", "invalid x-api-key"), K.AUTH),
    ("anthropic", 402, anthropic("billing_error", "x"), K.QUOTA),
    ("anthropic", 403, anthropic("permission_error", "x"), K.AUTH),
    ("anthropic", 404, anthropic("not_found_error", "model: x"), K.INVALID),
    ("anthropic", 413, anthropic("request_too_large", "Request exceeds the maximum size"), K.CONTEXT_LENGTH),
    ("anthropic", 429, anthropic("rate_limit_error", "This request would exceed your organization's rate limit of 40,000 input tokens per minute."), K.RATE),
    ("anthropic", 500, anthropic("api_error", "Internal server error"), K.SERVER),
    ("anthropic", 504, anthropic("timeout_error", "x"), K.SERVER),
    ("anthropic", 529, anthropic("overloaded_error", "Overloaded"), K.SERVER),
    # Gemini, alone and in a list of one
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", QUOTA_TEXT, failure(MINUTE), retry_info("38s")), K.RATE),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", QUOTA_TEXT, failure(DAY), retry_info("38s")), K.QUOTA),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", QUOTA_TEXT, failure(MINUTE, "GenerateContentInputTokensPerModelPerDay-FreeTier")), K.QUOTA),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", "x", {"@type": "x/google.rpc.ErrorInfo", "reason": "RATE_LIMIT_EXCEEDED", "metadata": {"quota_limit": "GenerateRequestsPerDayPerProject"}}), K.QUOTA),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", "x", {"@type": "x/google.rpc.ErrorInfo", "reason": "RATE_LIMIT_EXCEEDED", "metadata": {"quota_limit": "GenerateRequestsPerMinutePerProject"}}), K.RATE),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", "Resource exhausted. Please try again later."), K.RATE),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", "Quota exceeded for metric: free_tier_requests, limit: 0, model: x"), K.QUOTA),
    ("gemini", 400, gemini(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", {"reason": "API_KEY_INVALID"}), K.AUTH),
    ("gemini", 400, gemini(400, "INVALID_ARGUMENT", "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."), K.CONTEXT_LENGTH),
    ("gemini", 400, gemini(400, "INVALID_ARGUMENT", "Unable to submit request because the input token count is 40000 but exceeds 32768"), K.CONTEXT_LENGTH),
    ("gemini", 400, gemini(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), K.INVALID),
    ("gemini", 403, gemini(403, "PERMISSION_DENIED", "x"), K.AUTH),
    ("gemini", 404, gemini(404, "NOT_FOUND", "models/x is not found"), K.INVALID),
    ("gemini", 500, gemini(500, "INTERNAL", "x"), K.SERVER),
    ("gemini", 503, gemini(503, "UNAVAILABLE", "The model is overloaded. Please try again later."), K.SERVER),
    ("gemini", 504, gemini(504, "DEADLINE_EXCEEDED", "x"), K.SERVER),
    # vLLM: old, new, proposed
    ("vllm", 400, {"object": "error", "message": VLLM_OLD, "type": "BadRequestError", "param": None, "code": 400}, K.CONTEXT_LENGTH),
    ("vllm", 400, openai(VLLM_NEW, "BadRequestError", 400, "input_tokens"), K.CONTEXT_LENGTH),
    ("vllm", 400, openai(VLLM_NEW, "BadRequestError", 400), K.CONTEXT_LENGTH),
    ("vllm", 400, openai("no words known", "BadRequestError", 400, "input_tokens"), K.CONTEXT_LENGTH),
    ("vllm", 400, openai("no words known", "BadRequestError", "context_length_exceeded"), K.CONTEXT_LENGTH),
    ("vllm", 400, openai("The decoder prompt (length 5000) is longer than the maximum model length of 4096.", "BadRequestError", 400), K.CONTEXT_LENGTH),
    ("vllm", 400, openai("max_tokens must be at least 1, got -5.", "BadRequestError", 400), K.INVALID),
    ("vllm", 401, {"error": "Unauthorized"}, K.AUTH),
    ("vllm", 404, {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "param": None, "code": 404}, K.INVALID),
    ("vllm", 500, openai("EngineCore encountered an issue.", "InternalServerError", 500), K.SERVER),
    ("vllm", 503, openai("The server is overloaded", "Service Unavailable", 503), K.SERVER),
    ("vllm", 503, b"", K.SERVER),
    # a litellm proxy
    ("litellm", 400, openai(f"litellm.ContextWindowExceededError: OpenAIException - {VLLM_OLD}", None, "400"), K.CONTEXT_LENGTH),
    ("litellm", 400, openai("litellm.ContextWindowExceededError: x", None, "400"), K.CONTEXT_LENGTH),
    ("litellm", 429, openai("litellm.RateLimitError: OpenAIException - Error code: 429 - {'error': {'type': 'insufficient_quota'}}", "throttling_error", "429"), K.QUOTA),
    ("litellm", 429, openai("No deployments available for selected model, Try again in 60 seconds. Passed model=x", "None", "429"), K.RATE),
    ("litellm", 400, openai("Budget has been exceeded! Current cost: 0.02, Max budget: 0.01", "budget_exceeded", "400"), K.QUOTA),
    ("litellm", 401, openai("Authentication Error, Invalid proxy server token passed.", "token_not_found_in_db", "401", "key"), K.AUTH),
    ("litellm", 400, openai("litellm.BadRequestError: litellm.ContentPolicyViolationError: AzureException - x", None, "400"), K.CONTENT_FILTER),
    ("litellm", 500, openai("litellm.InternalServerError: AnthropicException - Overloaded", None, "500"), K.SERVER),
    ("litellm", 503, openai("litellm.ServiceUnavailableError: x", None, "503"), K.SERVER),
    # OpenRouter
    ("openrouter", 402, {"error": {"code": 402, "message": "Insufficient credits. Add more using https://openrouter.ai/credits"}}, K.QUOTA),
    ("openrouter", 429, RATE_FIRST, K.RATE),
    ("openrouter", 429, {"error": {"code": 429, "message": "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day"}}, K.QUOTA),
    ("openrouter", 429, {"error": {"code": 429, "message": "Rate limit exceeded: free-models-per-min."}}, K.RATE),
    ("openrouter", 403, MODERATED, K.CONTENT_FILTER),
    ("openrouter", 403, {"error": {"code": 403, "message": "x requires moderation and your input was flagged"}}, K.CONTENT_FILTER),
    ("openrouter", 400, {"error": {"code": 400, "message": "This endpoint's maximum context length is 8192 tokens. However, you requested about 9000 tokens"}}, K.CONTEXT_LENGTH),
    ("openrouter", 408, {"error": {"code": 408, "message": "timed out"}}, K.SERVER),
    ("openrouter", 502, {"error": {"code": 502, "message": "The model is down"}}, K.SERVER),
    # Groq, Mistral, xAI, DeepSeek, Cohere, Fireworks
    ("groq", 429, openai("Rate limit reached for model `x` on tokens per minute (TPM): Limit 6000, Used 5000, Requested 2000.", "tokens", "rate_limit_exceeded"), K.RATE),
    ("groq", 429, openai(GROQ_TPD, "tokens", "rate_limit_exceeded"), K.QUOTA),
    ("groq", 413, openai("Request too large for model `x` on tokens per minute (TPM): Limit 6000, Requested 9000", "tokens", "rate_limit_exceeded"), K.CONTEXT_LENGTH),
    ("groq", 498, openai("Flex tier capacity exceeded", "capacity_exceeded", "capacity_exceeded"), K.SERVER),
    ("groq", 400, {"error": {"message": "Failed to generate JSON", "type": "invalid_request_error", "code": "json_validate_failed", "failed_generation": "{"}}, K.INVALID),
    ("mistral", 429, {"object": "error", "message": "Requests rate limit exceeded", "type": "rate_limited", "param": None, "code": "1300"}, K.RATE),
    ("mistral", 429, {"object": "error", "message": "Service tier capacity exceeded for this model.", "type": "service_tier_capacity_exceeded", "code": "3505"}, K.RATE),
    ("mistral", 400, {"object": "error", "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length", "type": "invalid_request_prompt", "code": "3051"}, K.CONTEXT_LENGTH),
    ("mistral", 401, {"message": "Unauthorized", "request_id": "1"}, K.AUTH),
    ("mistral", 401, {"detail": "Unauthorized"}, K.AUTH),
    ("mistral", 422, {"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required"}]}, K.INVALID),
    ("xai", 400, {"code": "Client specified an invalid argument", "error": "This model's maximum prompt length is 131072 but the request contains 537812 tokens."}, K.CONTEXT_LENGTH),
    ("xai", 403, {"code": "The caller does not have permission", "error": "Your team has either used all available credits or reached its monthly spending limit."}, K.QUOTA),
    ("deepseek", 402, openai("Insufficient Balance", "unknown_error", "invalid_request_error"), K.QUOTA),
    ("cohere", 400, {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 5000"}, K.CONTEXT_LENGTH),
    ("fireworks", 400, {"error": {"object": "error", "type": "invalid_request_error", "message": "The prompt is too long: 140000, model maximum context length: 131071"}}, K.CONTEXT_LENGTH),
    # other servers of one's own
    ("tgi", 422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2000 and 500", "error_type": "validation"}, K.CONTEXT_LENGTH),
    ("tgi", 422, {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000", "error_type": "validation"}, K.CONTEXT_LENGTH),
    ("tgi", 424, {"error": "Request failed during generation: CUDA out of memory", "error_type": "generation"}, K.SERVER),
    ("tgi", 429, {"error": "Model is overloaded", "error_type": "overloaded"}, K.RATE),
    ("sglang", 400, {"object": "error", "message": "The input (5000 tokens) is longer than the model's context length (4096 tokens).", "type": "BadRequestError", "param": None, "code": 400}, K.CONTEXT_LENGTH),
    ("llama.cpp", 400, {"error": {"code": 400, "message": "the request exceeds the available context size, try increasing it", "type": "exceed_context_size_error", "n_ctx": 4096}}, K.CONTEXT_LENGTH),
    ("llama.cpp", 503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, K.SERVER),
    ("ollama", 404, {"error": "model 'x' not found, try pulling it first"}, K.INVALID),
    ("ollama", 503, {"error": "server busy, please try again. maximum pending requests exceeded"}, K.SERVER),
    ("huggingface", 503, {"error": "Model x is currently loading", "estimated_time": 20.0}, K.SERVER),
    # gateways: text, HTML, nothing, garbage
    ("gateway", 400, b"prompt is too long", K.CONTEXT_LENGTH),
    ("gateway", 401, b"<html><h1>401 Authorization Required</h1></html>", K.AUTH),
    ("gateway", 403, b"<!DOCTYPE html><title>Attention Required! | Cloudflare</title>", K.AUTH),
    ("gateway", 404, b"404 page not found", K.INVALID),
    ("gateway", 413, b"<html><h1>413 Request Entity Too Large</h1></html>", K.CONTEXT_LENGTH),
    ("gateway", 425, b"", K.SERVER),
    ("gateway", 429, b"", K.RATE),
    ("gateway", 429, b"error code: 1015", K.RATE),
    ("gateway", 429, {"message": "Too Many Requests"}, K.RATE),
    ("gateway", 500, b"Internal Server Error", K.SERVER),
    ("gateway", 502, b"<html><h1>502 Bad Gateway</h1></html>", K.SERVER),
    ("gateway", 503, b"upstream connect error or disconnect/reset before headers", K.SERVER),
    ("gateway", 504, {"message": "Endpoint request timed out"}, K.SERVER),
    ("gateway", 520, b"error code: 520", K.SERVER),
    ("gateway", 599, b"\xff\x00\xfe", K.SERVER),
    ("gateway", 400, b"\xff\x00\xfe", K.INVALID),
    ("gateway", 400, b"null", K.INVALID),
    ("gateway", 400, b'{"error":', K.INVALID),
    ("gateway", 501, b"", K.INVALID),
]  # fmt: skip


def refusal(status: int, body: object, **headers: str) -> Reply:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Reply(data=data, status=status, headers=pairs, endpoint="http://e.test/v1")


def label(value: object) -> str | None:
    return None if isinstance(value, dict | bytes) else str(value)


@pytest.mark.parametrize(("provider", "status", "body", "expected"), BODIES, ids=label)
def test_route_01_02_06_refusals_of_providers(provider: str, status: int, body: object, expected: FaultKind) -> None:
    reply = refusal(status, body)
    fault = classify(reply, wall=WALL)
    assert fault is not None
    assert fault.kind is expected, provider
    assert error_of(reply).fault == expected.value
    # A list of one is how Gemini wraps it for its OpenAI clients; a proxy may do that to anybody's.
    if not isinstance(body, bytes):
        wrapped = classify(refusal(status, [body]), wall=WALL)
        assert wrapped is not None
        assert wrapped.kind is expected


@pytest.mark.parametrize("wish", ["true", "false", "maybe"])
@pytest.mark.parametrize(
    ("status", "body", "expected"), [case[1:] for case in BODIES if case[0] in {"openai", "anthropic"}]
)
def test_route_10_wish_of_the_server_changes_no_class(
    status: int, body: object, expected: FaultKind, wish: str
) -> None:
    fault = classify(refusal(status, body, x_should_retry=wish), wall=WALL)
    assert fault is not None
    assert (fault.kind, fault.should_retry) == (expected, {"true": True, "false": False}.get(wish))


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        (VLLM_OLD, 1024),
        (VLLM_NEW, 1024),
        ("The decoder prompt (length 5000) is longer than the maximum model length of 4096.", 4096),
        ("prompt is too long: 208310 tokens > 200000 maximum", 200_000),
        ("exceeds the maximum number of tokens allowed (1048576).", 1_048_576),
        ("too large for model with 32768 maximum context length", 32_768),
        ("This model's maximum prompt length is 131072 but the request contains 537812 tokens.", 131_072),
        ("The prompt is too long: 140000, model maximum context length: 131071", 131_071),
        ("is longer than the model's context length (4096 tokens).", 4096),
        ("`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2000", 2048),
        ("`inputs` must have less than 1024 tokens. Given: 2000", 1024),
        ("the request exceeds the available context size", None),
        ("context length is 999999999999999999999999", 999_999_999_999),
    ],
)
def test_route_07_limit_named_in_the_words(message: str, limit: int | None) -> None:
    assert context_limit(message) == limit


# ── error events of streams ─────────────────────────────────────────────────────────────────────────────────────────

EVENTS: list[tuple[str, str, object, FaultKind]] = [
    ("chat", "openai", openai("The server had an error", "server_error"), K.SERVER),
    ("chat", "openai", openai(TPM, "tokens", "rate_limit_exceeded"), K.RATE),
    ("chat", "openai", openai(QUOTA_TEXT, "insufficient_quota", "insufficient_quota"), K.QUOTA),
    ("chat", "azure", openai("filtered", None, "content_filter"), K.CONTENT_FILTER),
    ("chat", "vllm", openai("EngineCore died", "InternalServerError", 500), K.SERVER),
    ("chat", "vllm", openai(VLLM_NEW, "BadRequestError", 400, "input_tokens"), K.CONTEXT_LENGTH),
    ("complete", "vllm old", {"object": "error", "message": VLLM_OLD, "type": "BadRequestError", "param": None, "code": 400}, K.CONTEXT_LENGTH),
    ("chat", "gemini", [gemini(429, "RESOURCE_EXHAUSTED", QUOTA_TEXT, failure(MINUTE))], K.RATE),
    ("chat", "gemini", [gemini(429, "RESOURCE_EXHAUSTED", QUOTA_TEXT, failure(DAY))], K.QUOTA),
    ("chat", "openrouter", {"id": "1", "error": {"code": "server_error", "message": "Provider disconnected"}, "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]}, K.SERVER),
    ("chat", "openrouter", {"error": {"code": 429, "message": "rate-limited upstream"}}, K.RATE),
    ("chat", "tgi", {"error": "Request failed during generation", "error_type": "generation"}, K.SERVER),
    ("messages", "anthropic", anthropic("overloaded_error", "Overloaded"), K.SERVER),
    ("messages", "anthropic", anthropic("rate_limit_error", "x"), K.RATE),
    ("messages", "anthropic", anthropic("invalid_request_error", "prompt is too long: 2 tokens > 1 maximum"), K.CONTEXT_LENGTH),
    ("messages", "anthropic", anthropic("authentication_error", "x"), K.AUTH),
    ("messages", "anthropic", anthropic("timeout_error", "x"), K.SERVER),
    ("responses", "openai", {"type": "error", "code": "rate_limit_exceeded", "message": "x", "param": None}, K.RATE),
    ("responses", "openai", {"type": "response.failed", "response": {"status": "failed", "error": {"code": "server_error", "message": "x"}}}, K.SERVER),
    ("responses", "openai", {"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "x"}}}, K.RATE),
    ("responses", "openai", {"type": "response.failed", "response": {"error": None}}, K.SERVER),
]  # fmt: skip


class OneChunk:
    """A body of one piece."""

    was_cut = False

    def __init__(self, data: bytes) -> None:
        self._data = [data]

    async def __anext__(self) -> bytes:
        if not self._data:
            raise StopAsyncIteration
        return self._data.pop()

    async def aclose(self) -> None:
        self._data.clear()


@pytest.mark.parametrize(("op", "provider", "event", "expected"), EVENTS, ids=label)
async def test_route_09_error_events_of_providers(op: str, provider: str, event: object, expected: FaultKind) -> None:
    data = b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    stream = AnswerStream(OneChunk(data), StreamWatch(op), "http://e.test/v1", lambda: NO_SECRETS)  # type: ignore[arg-type]
    with pytest.raises(StatusError) as caught:
        await anext(stream)
    fault = classify(caught.value, wall=WALL)
    assert fault is not None
    assert fault.kind is expected, provider
