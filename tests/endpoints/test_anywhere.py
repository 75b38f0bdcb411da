"""Requests that bring their own URL and time-out."""

from __future__ import annotations

import asyncio

import pytest

from llmmw.call import Call, Reply
from llmmw.endpoints.anywhere import Anywhere, Patient, TimedRequest
from llmmw.env import Env
from llmmw.errors import ConfigError, UpstreamTimeout
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks
from llmmw.testing.server import ServerConfig, running_server


def request_to(base, path="/v1/models", **options):
    native = TimedRequest("GET", base + path, (), b"", **options)
    return Call("/v1/models", "", {}, native=native, target=base, direct=True)


async def test_every_origin_has_its_own_endpoint():
    events = []
    anywhere = Anywhere()
    anywhere.start(Env(sinks=(events.append,)))
    assert anywhere.name == "any URL"
    async with running_server(ServerConfig()) as one, running_server(ServerConfig()) as two:
        for server in (one, two, one):
            reply = await anywhere(request_to(server.url))
            assert (reply.status, reply.endpoint) == (200, server.url)
        reply = await anywhere(request_to(one.url).replace(target=one.base_url))
        assert reply.ok
        assert anywhere.name == f"{one.url}, {two.url}"
        assert repr(anywhere) == f"Anywhere({one.url}, {two.url})"
        anywhere.rehome()
        assert (await anywhere(request_to(one.url))).ok
        await anywhere.aclose()
    assert {type(event).__name__ for event in events} >= {"UpstreamStarted", "UpstreamEnded", "ConnectionOpened"}


async def test_security_05_metadata_addresses_are_refused():
    anywhere = Anywhere()
    anywhere.start(Env())
    with pytest.raises(ConfigError, match="metadata"):
        await anywhere(request_to("http://169.254.169.254:80"))
    await Anywhere().aclose()


@manual_time
async def test_the_requests_own_time_out_bounds_each_attempt(clock):
    upstream = FakeUpstream(latency_s=5.0)
    patient = Patient(upstream)
    patient.start(Env())
    native = TimedRequest("POST", "http://fake.test", read_s=2.0)
    began = clock.monotonic()
    with pytest.raises(UpstreamTimeout, match="2 s") as caught:
        await patient(chat_call().replace(native=native))
    assert clock.monotonic() - began == pytest.approx(2.0)
    assert caught.value.sent
    assert upstream.cancelled == 1
    long = TimedRequest("POST", "http://fake.test", read_s=10.0)
    for kept in (long, TimedRequest("POST", "http://fake.test"), None):
        assert (await patient(chat_call().replace(native=kept))).ok


@manual_time
async def test_each_piece_of_a_stream_must_come_in_time(clock):
    fast, slow = ScriptedChunks(chat_chunks("one two"), gap_s=1.5), ScriptedChunks(chat_chunks("one two"), gap_s=3.0)
    patient = Patient(FakeUpstream([Reply(chunks=fast), Reply(chunks=slow)]))
    patient.start(Env())
    native = TimedRequest("POST", "http://fake.test", read_s=2.0)
    reply = await patient(chat_call(stream=True).replace(native=native))
    assert len([chunk async for chunk in reply.chunks]) == 5
    assert reply.chunks.usage.output_tokens == 2
    began = clock.monotonic()
    reply = await patient(chat_call(stream=True).replace(native=native))
    with pytest.raises(UpstreamTimeout, match="2 s"):
        await anext(aiter(reply.chunks))
    assert clock.monotonic() - began == pytest.approx(2.0)
    assert slow.closed
    await reply.chunks.aclose()


@manual_time
async def test_a_time_out_from_inside_is_not_taken_for_the_requests_own(clock):
    del clock
    patient = Patient(FakeUpstream([TimeoutError("its own")]))
    with pytest.raises(TimeoutError, match="its own"):
        await patient(chat_call().replace(native=TimedRequest("POST", "http://x", read_s=10.0)))


async def test_the_wrapper_is_invisible():
    upstream = FakeUpstream(name="http://a.test/v1")
    upstream.capabilities = frozenset({"idempotent"})
    patient = Patient(upstream)
    assert (patient.name, patient.capabilities) == ("http://a.test/v1", {"idempotent"})
    assert repr(patient) == repr(upstream)
    patient.rehome()
    await patient.aclose()
    assert upstream.closed
    await asyncio.sleep(0)
