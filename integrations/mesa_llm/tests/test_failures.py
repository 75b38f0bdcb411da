"""What goes wrong upstream: how often it is tried, how long it is waited, and as what it reaches the caller."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter

import httpx
import litellm
import mesa_llm.module_llm as upstream
import openai
import pytest
from llmmw_mesa import ModuleLLM, one_shot
from llmmw_mesa.failures import failed, refused
from llmmw_mesa.upstream import OnlyTry, told
from worlds import MODEL

from llmmw import (
    AllEndpointsFailed,
    AmbiguousOutcome,
    CircuitOpen,
    ConfigError,
    ConnectionFailed,
    DeadlineExceeded,
    QueueFull,
    RateLimited,
    StatusError,
    UpstreamTimeout,
)
from llmmw.call import Attempt, Reply
from llmmw.testing.server import FaultRule, Match

SPEAKS_OF_RATE = '{"error": {"message": "your key has no rate_limit tier", "type": "invalid", "code": "no"}}'


@pytest.fixture
def llm(server):
    return lambda **options: ModuleLLM(MODEL, api_base=server.base_url, **options)


def ask(one, how):
    return one.generate("hello") if how == "sync" else asyncio.run(one.agenerate("hello"))


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("status", [429, 408, 500, 502, 503])
def test_mesa_m05_what_passes_is_asked_again(llm, server, status, how):
    server.add_fault(FaultRule(kind="status", status=status, match=Match(first=2)))
    assert ask(llm(), how).choices
    assert server.stats(0)["received"] == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_mesa_m05_what_does_not_pass_is_asked_once_whatever_it_says(llm, server, status):
    """LiteLLM takes each error that speaks of "rate_limit" for a RateLimitError, which Mesa-LLM repeats for ever."""
    server.add_fault(FaultRule(kind="status", status=status, body=SPEAKS_OF_RATE))
    with pytest.raises((litellm.exceptions.APIError, litellm.RateLimitError, litellm.BadRequestError, ValueError)):
        llm().generate("hello")
    assert server.stats(0)["received"] == 1


@pytest.mark.parametrize("others", ["agenerate", "generate"])
def test_mesa_04_no_call_goes_out_before_the_server_said(llm, server, others):
    """The first is told to come back in a second. Eleven that ask after that wait as long."""
    server.add_fault(FaultRule(kind="status", status=429, retry_after="1", match=Match(first=1)))
    one = llm()

    async def all_of_them():
        first = asyncio.create_task(one.agenerate("hello"))
        while not one.get_performance_stats()["layers"]["limit"]["pauses"]:
            await asyncio.sleep(0)
        if others == "agenerate":
            return await asyncio.gather(first, *(one.agenerate(f"q{n}") for n in range(11)))
        return await asyncio.gather(first, *(asyncio.to_thread(one.generate, f"q{n}") for n in range(11)))

    assert len(asyncio.run(all_of_them())) == 12
    refused_at, *answered_at = sorted(request["at_s"] for request in server.stats()["requests"])
    assert len(answered_at) == 12
    assert answered_at[0] - refused_at >= 0.99  # a machine that pauses makes it more


def test_mesa_04_the_first_three_of_twelve_are_refused_and_come_again_once(llm, server):
    server.add_fault(FaultRule(kind="status", status=429, retry_after="0.2", match=Match(first=3)))
    one = llm()

    async def all_of_them():
        return await asyncio.gather(*(one.agenerate(f"q{n}") for n in range(12)))

    assert len(asyncio.run(all_of_them())) == 12
    assert Counter(request["status"] for request in server.stats()["requests"]) == {429: 3, 200: 12}


def test_a_broken_connection_is_asked_again(llm, server):
    server.add_fault(FaultRule(kind="reset", match=Match(first=1)))
    assert llm().generate("hello").choices
    assert server.stats(0)["received"] == 2


def test_a_refused_connection_is_tried_so_often_and_is_a_connection_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        one = ModuleLLM(MODEL, api_base=f"http://127.0.0.1:{taken.getsockname()[1]}/v1", max_attempts=3)
        with pytest.raises((litellm.APIConnectionError, litellm.InternalServerError), match="onnection") as caught:
            one.generate("hello")
    assert any("3 times" in note for note in caught.value.__notes__)


def test_mesa_m09_a_server_that_hangs_is_a_timeout(llm, server):
    server.add_fault(FaultRule(kind="hang"))
    with pytest.raises(litellm.Timeout):
        llm(timeout=0.3, max_attempts=1).generate("hello")
    with pytest.raises(litellm.Timeout):
        llm(timeout=60, deadline=0.5).generate("hello")


def test_mesa_m09_a_completion_of_ones_own_that_hangs_holds_nobody(llm, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(upstream, "completion", lambda **_: go_on.wait(60))
    with pytest.raises(litellm.Timeout):
        llm(timeout=0.3, max_attempts=1).generate("hello")
    go_on.set()


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_rate_limit_that_no_server_spoke_of_is_tried_so_often(llm, monkeypatch, how):
    """A stand-in in somebody's tests, or a proxy's own words: a minute of patience would be for nothing."""
    asked = []

    def refuse(**_):
        asked.append(1)
        raise litellm.RateLimitError("busy", "openai", MODEL)

    async def arefuse(**_):
        refuse()

    monkeypatch.setattr(upstream, "completion", refuse)
    monkeypatch.setattr(upstream, "acompletion", arefuse)
    with pytest.raises(litellm.RateLimitError, match="busy"):
        ask(llm(max_attempts=2), how)
    assert len(asked) == 2


def test_a_429_counts_as_an_attempt_where_only_one_is_allowed(llm, server):
    server.add_fault(FaultRule(kind="status", status=429))
    with pytest.raises(litellm.RateLimitError):
        llm(max_attempts=1).generate("hello")
    assert server.stats(0)["received"] == 1


def test_a_wait_beyond_the_deadline_is_told_at_once(llm, server):
    server.add_fault(FaultRule(kind="status", status=429, retry_after="3600"))
    with pytest.raises(litellm.RateLimitError):
        llm(deadline=30).generate("hello")
    assert server.stats(0)["received"] == 1


def test_more_attempts_than_the_routers_own_bound(llm, server):
    server.add_fault(FaultRule(kind="status", status=429))
    assert llm(max_attempts=9)._llmmw_options.layers().layers[1].max_total_attempts == 9


@pytest.mark.parametrize("how", ["sync", "async"])
def test_mesa_m06_one_shot_is_one_attempt_on_its_own(llm, server, how):
    """Nor does somebody patient who asks the same at that moment share its outcome."""
    server.add_fault(FaultRule(kind="status", status=500, match=Match(first=1)))
    one = llm(enable_caching=True, cache_scope="model")
    with one_shot(), pytest.raises(litellm.InternalServerError):
        ask(one, how)
    assert server.stats(0)["received"] == 1
    assert ask(one, how).choices
    with one_shot():
        assert ask(one, how).choices
    assert server.stats(0)["received"] == 3


def test_mesa_m06_who_is_patient_does_not_share_a_one_shots_refusal(llm, server):
    server.configure(latency_s=0.05)
    server.add_fault(FaultRule(kind="status", status=503, match=Match(first=1)))
    one = llm(enable_caching=True, cache_scope="model")

    async def both():
        with one_shot():
            hasty = asyncio.create_task(one.agenerate("hello"))
        patient = [asyncio.create_task(one.agenerate("hello")) for _ in range(3)]
        return await asyncio.gather(hasty, *patient, return_exceptions=True)

    _, *patient = asyncio.run(both())
    assert all(type(answer) is litellm.ModelResponse for answer in patient)


def test_mesa_m05_litellms_own_retries_are_off_whatever_is_set(llm, server, monkeypatch):
    monkeypatch.setattr(litellm, "num_retries", 3)
    server.add_fault(FaultRule(kind="status", status=500))
    with pytest.raises(litellm.InternalServerError):
        llm(max_attempts=2).generate("hello")
    assert server.stats(0)["received"] == 2


def test_mesa_06_an_import_error_is_told_at_once_but_not_a_servers_words(llm, server):
    server.add_fault(FaultRule(kind="status", status=500, body='{"error": "No module named x"}', match=Match(first=1)))
    assert llm().generate("hello").choices
    assert server.stats(0)["received"] == 2


# ── one by one ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RateLimited("no permit"), litellm.RateLimitError),
        (DeadlineExceeded("late"), litellm.Timeout),
        (UpstreamTimeout("late"), litellm.Timeout),
        (CircuitOpen("open"), litellm.ServiceUnavailableError),
        (ConnectionFailed("none"), litellm.APIConnectionError),
        (AmbiguousOutcome("lost"), litellm.APIConnectionError),
        (QueueFull("full"), litellm.APIConnectionError),
        (StatusError("no", status=404), litellm.NotFoundError),
        (StatusError("no", status=403), litellm.PermissionDeniedError),
        (StatusError("no", status=422), litellm.UnprocessableEntityError),
        (StatusError("no", status=418), litellm.APIError),
        (AllEndpointsFailed("all", [RateLimited("no permit"), CircuitOpen("open")]), litellm.ServiceUnavailableError),
    ],
)
def test_mesa_m05_llmmws_own_errors_are_litellms(error, kind):
    found = failed(error, MODEL)
    assert type(found) is kind
    assert found.__cause__ is not None


def test_what_is_nobodys_business_stays_what_it_is():
    for error in (KeyError("x"), ConfigError("no")):
        assert failed(error, MODEL) is error
    own = ValueError("mine")
    assert failed(OnlyTry(own), MODEL) is own
    cause = litellm.Timeout("late", MODEL, "openai")
    lost = UpstreamTimeout("late")
    lost.__cause__ = cause
    assert failed(lost, MODEL) is cause


def test_the_attempts_are_noted_once():
    attempts = (Attempt("here", "server", 500), Attempt("here", "server", error="Broken"))
    error = litellm.InternalServerError("no", "openai", MODEL)
    for _ in range(2):
        found = refused(Reply(status=500, native=error, attempts=attempts), MODEL)
    assert found is error
    assert len(found.__notes__) == 1
    assert "2 times" in found.__notes__[0]
    copied = refused(Reply(status=401, data=b'{"error": {"message": "no key"}}'), MODEL)
    assert type(copied) is litellm.AuthenticationError


def test_told_goes_by_what_a_server_said():
    response = httpx.Response(401, content=b"{}", request=httpx.Request("POST", "http://127.0.0.1/"))
    said = openai.AuthenticationError("your rate_limit", response=response, body=None)
    loud = litellm.RateLimitError("rate_limit", "openai", MODEL, response=response)
    assert told(_caused(loud, said)).status == 401
    waiting = httpx.Response(429, headers={"Retry-After": "7"}, request=response.request)
    kept = told(litellm.RateLimitError("busy", "openai", MODEL, response=waiting))
    assert (kept.status, kept.header("retry-after")) == (429, "7")
    assert told(litellm.RateLimitError("rate_limit", "openai", MODEL)).status == 503
    with pytest.raises(KeyError):
        told(KeyError("x"))
    with pytest.raises(ConnectionFailed):
        told(_caused(litellm.InternalServerError("no", "openai", MODEL), httpx.ConnectError("refused")))
    with pytest.raises(AmbiguousOutcome):
        told(_caused(litellm.InternalServerError("no", "openai", MODEL), httpx.ReadError("reset")))


def _caused(error, cause):
    error.__cause__ = cause
    return error
