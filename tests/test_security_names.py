"""security-6: whatever a model, a namespace or an agent is called, it is hashed or counted, and never a path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmmw import Batcher, CircuitBreaker, Client, Coalescer, ErrorRouter, RateLimiter, Retry, Stack, TTLCache, using
from llmmw.call import Context
from llmmw.keys.identity import Namespaces
from llmmw.testing.fake import chat_body, chat_call
from llmmw.testing.rawserver import RawServer, answer_bytes, say

NAMES = {
    "a way up": "../../x",
    "an absolute path": "/etc/passwd",
    "a NUL": "m\x00odel",
    "one megabyte": "m" * 1_000_000,
    "a drive": "C:\\windows\\x",
    "a newline": "m\r\nx-injected: 1",
    "a format": "%s%n{0}{x.__class__}",
    "SQL": "m'; DROP TABLE Cache; --",
    "other letters": "mödel-模型-\U0001f600",
    "a dot": ".",
    "nothing but spaces": "  ",
}


def everything_below(root: Path) -> set[str]:
    return {str(Path(folder, name).relative_to(root)) for folder, _, names in os.walk(root) for name in names}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
async def test_security_06_a_hostile_name_is_hashed_and_no_path(name, tmp_path, monkeypatch):
    """Model, tenant, agent and namespace at once, through every layer that keeps something by name, onto disk."""
    outside = tmp_path / "outside"
    inside = outside / "deeper" / "cache"
    outside.mkdir()
    monkeypatch.chdir(outside)
    async with RawServer(say(answer_bytes(200, chat_body("fine")))) as server:

        def client():
            layers = Coalescer(), ErrorRouter(), Retry(), CircuitBreaker(), Batcher(), RateLimiter(rpm=6000)
            stack = Stack(TTLCache(60, directory=inside), *layers)
            return Client(server.origin + "/v1", api_key="k" * 20, stack=stack, tenant=name)

        plain = {"model": "m", "messages": "q"}
        asked = {"model": name, "messages": "q"}
        async with client() as first:
            with using(agent=name, tenant=name):
                assert (await first.chat(**asked)).text == "fine"
                assert (await first.chat(**asked)).source == "cache"
                assert (await first.chat(**plain)).source == "upstream"  # another model is another question
        async with client() as second:
            with using(tenant=name):
                assert (await second.chat(**asked)).source == "cache"  # from disk, in a new engine
            assert len(second.get_performance_stats()["layers"]) > 0
        assert len(server.requests) == 2
        assert [request.target for request in server.requests] == ["/v1/chat/completions"] * 2
        assert all("x-injected" not in request.headers for request in server.requests)
    found = everything_below(outside)
    assert found
    assert all(path.startswith("deeper/cache/") for path in found)
    names = {Path(path).name for path in found}
    assert all(len(one) < 100 and one.isascii() and one.isprintable() for one in names)
    assert sum(Path(outside, path).stat().st_size for path in found) < 3_000_000


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_security_06_namespaces_are_short_digests_that_do_not_collide(name):
    spaces = Namespaces(None)
    digest = spaces.of("credential", name)
    assert len(digest) <= 80
    assert digest.isprintable()
    assert digest.isascii()
    assert "/" not in digest
    assert "\\" not in digest
    assert digest != spaces.of("credential", name + "x")
    assert digest != spaces.of("credential", None)
    assert digest != spaces.of(name, None)


def test_security_06_a_call_with_hostile_names_prints_on_one_short_line():
    for name in NAMES.values():
        shown = repr(chat_call("q", context=Context(agent=name[:100])).replace(model=name))
        assert len(shown) < 1000
        assert "\n" not in shown
        assert "\x00" not in shown


def test_security_a_shared_namespace_documents_its_timing_side_channel():
    assert "by the time an answer takes" in " ".join((using.__doc__ or "").split())
