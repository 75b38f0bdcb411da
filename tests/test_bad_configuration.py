"""What cannot work fails when it is built, with a ConfigError that names the option, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc

import httpx
import openai
import pytest

import llmmw
from llmmw import (
    Balancer,
    Batcher,
    CircuitBreaker,
    Client,
    Coalescer,
    ConfigError,
    ConnectionPool,
    Deadline,
    ErrorRouter,
    Fallback,
    OrderError,
    RateLimiter,
    Replica,
    Retry,
    SharedCounter,
    Stack,
    SyncClient,
    Timeout,
    TTLCache,
)
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.stores.counter import FileCounter
from llmmw.testing.server import ServerConfig

URL = "http://127.0.0.1:9/v1"
NAN, INF = float("nan"), float("inf")
NOTHING = object()
WHOLE = (0, -1, 1.5, NAN, INF, True, "", "many", NOTHING)
DURATION = (-1, "-1s", NAN, INF, True, "", "soon", "9" * 400 + "s", NOTHING)
POSITIVE = (0, "0s", *DURATION)
SWITCH = (0, 1, None, "", "no", NOTHING)
TEXT = ("", 0, True, b"x", NOTHING)
WORD = ("", "unknown", None, 1, NOTHING)
NO_NONE = (None,)
URLS = ("", "127.0.0.1:8000", "ftp://host/v1", "http://", "http://user:pw@host/v1", 7, None, NOTHING)
HOSTS = ("one-name", 7, [""], [7], NOTHING)
BAD_STACK = ([], "stack", TTLCache(1), Stack, NOTHING)

WRONG = {
    TTLCache: {
        "ttl": POSITIVE + NO_NONE,
        "directory": TEXT,
        "sampling": WORD,
        "mode": WORD,
        "max_bytes": WHOLE + NO_NONE,
        "max_entries": WHOLE + NO_NONE,
        "disk_bytes": (*WHOLE, 1000),
        "jitter": (-0.1, 0.6, NAN, INF, True, "0.1", NOTHING),
        "negative_ttl": (*DURATION, 31),
        "stale_while_revalidate": DURATION,
        "stale_if_error": DURATION,
        "early_refresh": SWITCH,
        "auth_check": SWITCH,
        "store_fallbacks": SWITCH,
        "remote_content": SWITCH,
        "network_directory": SWITCH,
        "codec": ("zip", 1, NOTHING),
    },
    Coalescer: {"finish_orphans": SWITCH, "buffer_bytes": WHOLE + NO_NONE, "lease": POSITIVE, "merge_samples": SWITCH},
    Balancer: {
        "affinity": ("", "tenant", None, 1, NOTHING),
        "spill": (0.9, -1, NAN, INF, True, "2", NOTHING),
        "room": (-1, 1.5, NAN, True, "8", NOTHING),
        "slow_start": DURATION + NO_NONE,
        "attempts": WHOLE + NO_NONE,
        "duplicate_ok": SWITCH,
    },
    Replica: {"endpoint": (None, *URLS[:6], NOTHING), "weight": (0, -1, NAN, INF, True, "2", None, NOTHING)},
    ErrorRouter: {
        "fallbacks": (None, URL, 7, [""], ["host:8000"], [None], [7], [HTTPEndpoint], NOTHING),
        "max_total_attempts": WHOLE + NO_NONE,
        "rate_wait": DURATION + NO_NONE,
        "duplicate_ok": SWITCH,
        "on_content_filter": SWITCH,
        "max_context": WHOLE,
    },
    Fallback: {"endpoint": (None, *URLS[:6], NOTHING), "model": TEXT, "max_context": WHOLE},
    Retry: {
        "attempts": (*WHOLE, None, 101),
        "backoff": POSITIVE + NO_NONE,
        "max_backoff": POSITIVE + NO_NONE,
        "rate_patience": DURATION + NO_NONE,
        "budget": (*WHOLE[1:], None),
        "duplicate_ok": SWITCH,
        "hedge": SWITCH,
    },
    CircuitBreaker: {
        "window": POSITIVE,
        "min_calls": WHOLE + NO_NONE,
        "failure_share": (0, -0.1, 1.1, NAN, INF, True, "half", NOTHING),
        "consecutive": WHOLE + NO_NONE,
        "open_for": POSITIVE,
        "max_open": (*POSITIVE, 4),
        "probe_timeout": POSITIVE,
    },
    Batcher: {
        "max_size": WHOLE + NO_NONE,
        "min_size": WHOLE + NO_NONE,
        "flush_interval": POSITIVE + NO_NONE,
        "max_bytes": WHOLE,
        "max_tokens": WHOLE,
        "max_queue": WHOLE + NO_NONE,
        "when_full": WORD,
        "joint": WORD,
        "barrier": WHOLE,
        "drain": SWITCH,
    },
    RateLimiter: {
        "rpm": WHOLE,
        "tpm": WHOLE,
        "concurrency": (*WHOLE, "5-4-3", "0-1-2", "4-8", -4),
        "window": POSITIVE,
        "input_tpm": WHOLE,
        "output_tpm": WHOLE,
        "burst": (*WHOLE, 5),
        "per": WORD,
        "oversize": WORD,
        "reserve": WORD,
        "cached_input": WORD,
        "adaptive": (*SWITCH, "vegas", "gradient2"),
        "headers": SWITCH,
        "age_bound": POSITIVE,
        "shared": ("directory", True, 7, NOTHING),
        "weights": ({"a": 0}, {"a": -1}, {"a": NAN}, {"a": "1"}, {"a": True}, {"": 1}, {7: 1}, ["a"], None, NOTHING),
    },
    SharedCounter: {
        "directory": TEXT,
        "store": ("redis://", 7, NOTHING),
        "processes": WHOLE + NO_NONE,
        "patience": POSITIVE + NO_NONE,
    },
    Timeout: {
        "total": POSITIVE + NO_NONE,
        "connect": POSITIVE,
        "first_byte": POSITIVE,
        "between_chunks": POSITIVE,
    },
    Deadline: {"seconds": POSITIVE + NO_NONE},
    ConnectionPool: {
        "engine": WORD,
        "max_connections": WHOLE + NO_NONE,
        "keepalive_expiry": POSITIVE + NO_NONE,
        "max_connection_age": POSITIVE,
        "prewarm": (*WHOLE[1:], None, 513),
        "pool_timeout": POSITIVE,
        "connect_timeout": POSITIVE,
        "write_timeout": POSITIVE,
        "first_byte_timeout": POSITIVE,
        "chunk_timeout": POSITIVE,
        "total_timeout": POSITIVE,
        "drain_timeout": DURATION + NO_NONE,
        "retry_on_stale": SWITCH,
        "max_response_bytes": WHOLE + NO_NONE,
        "max_line_bytes": WHOLE + NO_NONE,
        "verify": (0, None, "", "ca.pem", NOTHING),
        "trust_env": SWITCH,
        "http2": SWITCH,
    },
}
REQUIRED = {
    TTLCache: {"ttl": 60},
    Timeout: {"total": 30},
    Deadline: {"seconds": 30},
    Fallback: {"endpoint": URL},
    Replica: {"endpoint": URL},
    SharedCounter: {"directory": "limits"},
}


def stack():
    return Stack(TTLCache(60), Coalescer())


def make_client(**options):
    return Client(**{"base_url": URL, **options})


def make_sync_client(**options):
    return SyncClient(**{"base_url": URL, **options})


def make_endpoint(**options):
    return HTTPEndpoint(**{"base_url": URL, **options})


def make_vllm_endpoint(**options):
    return llmmw.VLLMEndpoint(**{"base_url": URL, **options})


def wrap_client(**options):
    return llmmw.wrap_client(openai.AsyncOpenAI(base_url=URL, api_key="k"), **{"stack": stack(), **options})


def wrap_function(**options):
    def ask(prompt): ...

    return stack().wrap(ask, **options)


def using(**options):
    with llmmw.using(**options):
        raise AssertionError("taken")


CLIENT = {
    "api_key": (0, True, b"sk-1", NOTHING),
    "stack": BAD_STACK,
    "model": TEXT,
    "tenant": TEXT,
    "headers": ("", ["a"], {"a": 1}, {1: "a"}, {"a\n": "b"}, {"a": "b\n"}, NOTHING),
    "pool": (0, "", True, {}, ConnectionPool, NOTHING),
    "allow_hosts": HOSTS,
    "env": (0, "", NOTHING),
}
TRANSPORT = {name: CLIENT[name] for name in ("stack", "pool", "allow_hosts", "env")} | {
    "endpoint": (7, NOTHING),
    "verify": (False, "ca.pem"),
    "proxy": ("http://p",),
    "http1": (False,),
    "http2": (True,),
    "follow_redirects": (True,),
}
RECOMMENDED = {
    "deadline": POSITIVE,
    "cache_ttl": POSITIVE,
    "fallbacks": (URL, 7, [""], [None], NOTHING),
    "attempts": (*WHOLE, None),
    "rpm": WHOLE,
    "tpm": WHOLE,
    "concurrency": WHOLE,
    "timeout": POSITIVE + NO_NONE,
    "cache_directory": ("", "x", 7),
    "sampling": ("", "lanes", "unknown", 7),
}
MAKERS = {
    make_client: CLIENT,
    make_sync_client: CLIENT,
    make_endpoint: {name: CLIENT[name] for name in ("api_key", "headers", "pool", "allow_hosts")}
    | {"key_header": TEXT, "duplicate_ok": (0, "no", NOTHING)},
    make_vllm_endpoint: {name: CLIENT[name] for name in ("api_key", "headers", "pool", "allow_hosts")}
    | {"cache_salt": (7, "", "short", b"x", NOTHING), "load_interval": DURATION, "duplicate_ok": (0, "no", NOTHING)},
    llmmw.httpx_client: TRANSPORT,
    llmmw.httpx2_client: TRANSPORT,
    llmmw.httpx_sync_client: TRANSPORT,
    wrap_client: {"stack": BAD_STACK, "tenant": TEXT, "env": (0, "", NOTHING)},
    wrap_function: {"ignore": (7, "other", ["other"], [7], NOTHING), "env": (0, NOTHING)},
    using: {
        "agent": TEXT,
        "step": WHOLE[1:],
        "sample": WHOLE[1:],
        "priority": (1.5, True, "high", NOTHING),
        "deadline": DURATION,
        "tenant": TEXT,
        "tags": ("", 7, [""], [7], NOTHING),
    },
    Stack.recommended: RECOMMENDED,
    llmmw.middleware: RECOMMENDED,
    Stack: {"allow": ("", "no-such-rule", 7, [7], [[]], NOTHING)},
    ServerConfig: {
        "host": ("", "0.0.0.0", 7, None),
        "port": (-1, 70_000, 1.5, True, "80", NOTHING),
        "models": ((), "m", (7,), NOTHING),
        "any_model": SWITCH,
        "max_model_len": WHOLE,
        "reply": WORD,
        "reply_spread": (-1, 2, NAN, "x"),
        "latency": WORD,
        "latency_s": (-1, NAN, INF, "1s", True),
        "latency_spread": (-1, 2, NAN, "x"),
        "token_s": (-1, NAN, INF),
        "rpm": WHOLE,
        "limit_window_s": (0, -1, NAN, INF),
        "limit_kind": WORD,
        "faults": ("html", ({"kind": "explode"},), (7,)),
        "error_style": WORD,
    },
}


def shown(value):
    return "object" if value is NOTHING else f"{type(value).__name__}-{value!s:.12}".partition(" at 0x")[0]


def settings_cases():
    for kind, table in WRONG.items():
        for option, values in table.items():
            for value in values:
                yield pytest.param(kind, option, value, id=f"{kind.__name__}-{option}-{shown(value)}")


def maker_cases():
    for make, table in MAKERS.items():
        name = getattr(make, "made_by", make.__qualname__)
        for option, values in table.items():
            for value in values:
                yield pytest.param(make, option, value, id=f"{name}-{option}-{shown(value)}")


def refusal(make, **options):
    with pytest.raises(ConfigError) as caught:
        make(**options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def has_value(message, value):
    """The value as it was given, or as the number that was read from it."""
    shown = {repr(value), str(value)}
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown.add(repr(float(value)))
    if isinstance(value, dict):
        shown |= {repr(part) for item in value.items() for part in item}
    if isinstance(value, list | tuple):
        shown |= {repr(item) for item in value} | {repr(list(value)), repr(tuple(value))}
    return any(text in message for text in shown)


@pytest.mark.parametrize(("kind", "option", "value"), list(settings_cases()))
def test_a_setting_that_cannot_work_is_refused(kind, option, value):
    message = refusal(kind, **{**REQUIRED.get(kind, {}), option: value})
    assert f"{kind.__name__}({option}=" in message
    if "endpoint" not in option and "fallbacks" not in option:  # a URL may hold a secret, so it is not shown whole
        assert has_value(message, value), message
    assert any(word in message for word in ("must", "expected", "needs", "within", "engine", "usable", "refused")), (
        message
    )


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_no_option_is_left_out_of_the_table_or_takes_any_object(kind):
    fields = [field.name for field in dataclasses.fields(kind)]
    assert sorted(WRONG[kind]) == sorted(fields)
    for name in fields:
        message = refusal(kind, **{**REQUIRED.get(kind, {}), name: NOTHING})
        assert f"({name}=" in message


@pytest.mark.parametrize(("make", "option", "value"), list(maker_cases()))
def test_an_argument_that_cannot_work_is_refused(make, option, value):
    options = {option: value}
    if getattr(make, "made_by", "") and option != "stack":
        options["stack"] = stack()
    message = refusal(make, **options)
    assert option in message or option.rstrip("s") in message, message
    assert "sk-1" not in message
    if option == "stack" or make is ServerConfig or make is using:
        assert has_value(message, value), message


@pytest.mark.parametrize(
    "make", [make_client, make_sync_client, make_endpoint, make_vllm_endpoint], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("value", URLS, ids=shown)
def test_a_base_url_that_cannot_work_is_refused_without_being_shown(make, value):
    message = refusal(make, base_url=value)
    assert "base_url" in message
    assert "pw" not in message


@pytest.mark.parametrize(
    "make",
    [*WRONG, *(make for make in MAKERS if make is not ServerConfig)],
    ids=lambda make: getattr(make, "made_by", make.__qualname__),
)
def test_an_unknown_option_is_named_with_the_known_ones(make):
    required = REQUIRED.get(make, {})
    if getattr(make, "made_by", ""):
        required = {"stack": stack()}
    message = refusal(make, **required, chache_ttl="secret-value")
    assert "chache_ttl" in message
    assert "secret-value" not in message, "under a misspelt api_key would stand a key"
    assert "options: " in message


def test_missing_and_surplus_arguments_are_named():
    assert "ttl" in refusal(TTLCache)
    assert "base_url" in refusal(Client)
    assert "base_url" in refusal(SyncClient)
    assert "stack" in refusal(llmmw.httpx_client)
    assert "stack" in refusal(lambda: llmmw.wrap_client(openai.OpenAI(api_key="k")))
    assert "positional" in refusal(lambda: TTLCache(*range(40)))


def test_both_of_two_exclusive_options_are_refused():
    assert "endpoint" in refusal(lambda: llmmw.httpx_client(stack(), endpoint=HTTPEndpoint(URL), pool=ConnectionPool()))
    assert "write_timeout" in refusal(lambda: ConnectionPool(engine="pyreqwest", write_timeout=5))
    assert "burst" in refusal(lambda: RateLimiter(burst=5))
    assert "either" in refusal(SharedCounter)
    assert "either" in refusal(lambda: SharedCounter("limits", store=FileCounter("limits", 1.0)))
    assert "to share" in refusal(lambda: RateLimiter(concurrency=5, shared=SharedCounter("limits")))
    assert "adaptive" in refusal(lambda: RateLimiter(concurrency="1-2-3", adaptive=False))
    assert "cache_ttl" in refusal(lambda: Stack.recommended(cache_directory="x"))
    assert "cache_ttl" in refusal(lambda: Stack.recommended(sampling="lanes"))
    assert "keep one" in refusal(lambda: Stack(TTLCache(1), TTLCache(2)))


def test_layers_in_a_wrong_order_or_that_are_none_are_refused():
    with pytest.raises(OrderError, match="cache must be outside limit"):
        Stack(RateLimiter(rpm=1), TTLCache(1))
    for wrong in (TTLCache, "cache", None, 7, [TTLCache(1)], NOTHING):
        assert "not a layer" in refusal(lambda wrong=wrong: Stack(wrong))

    class Odd:
        role = "cahce"

        def bind(self, inner, env): ...

    assert "cahce" in refusal(lambda: Stack(Odd()))
    assert "no 'limit' layer" in refusal(lambda: stack().without("limit"))
    assert "expected a base URL" in refusal(lambda: stack().bind(NOTHING))


def test_what_cannot_be_wrapped_is_refused():
    for wrong in ("10m", 7, None, NOTHING):
        assert "expected a function" in refusal(lambda wrong=wrong: stack().wrap(wrong))
        assert "expected one of" in refusal(lambda wrong=wrong: llmmw.wrap_client(wrong, stack()))
    assert "10m" in refusal(lambda: llmmw.middleware("10m"))
    assert "httpx" in refusal(lambda: llmmw.wrap_client(httpx.Client(), stack()))


def test_an_engine_whose_package_is_missing_fails_when_the_pool_is_configured(monkeypatch):
    monkeypatch.setattr("llmmw.pool.engines.find_spec", lambda name: None)
    with pytest.raises(llmmw.MissingExtra, match=r"pip install 'llmmw\[speed\]'"):
        ConnectionPool(engine="pyreqwest")


@pytest.mark.parametrize("name", [*llmmw.__all__, "httpx2_client", "httpx2_sync_client"])
def test_every_public_name_has_help(name):
    found = getattr(llmmw, name)
    if name != "__version__":
        assert found.__doc__
        inspect.signature(found)
        assert name.rpartition("_")[2] in pydoc.render_doc(found)


def test_every_name_can_be_listed_without_the_extras(monkeypatch):
    monkeypatch.setattr("llmmw.find_spec", lambda name: None)
    assert "httpx2_client" not in dir(llmmw)
    monkeypatch.undo()
    assert "httpx2_client" in dir(llmmw)
