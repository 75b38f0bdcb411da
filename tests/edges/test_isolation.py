"""Whoever asks under another credential, tenant, account or API version never gets somebody else's answer."""

from __future__ import annotations

import openai
import pytest

from llmmw import Client, Stack, TTLCache, using, wrap_client
from llmmw.keys import key_of

HERE = "http://127.0.0.1:9/v1"
STACK = Stack(TTLCache(300))


def key(call):
    return key_of(call)


def of_client(base_url=HERE, api_key=None, *, fields=None, **options):
    client = Client(base_url, api_key, stack=STACK, model="m", **options)
    return key(client.requests.chat(None, "hi", fields or {}))


def test_cache_08_clients_that_differ_in_who_asks_or_what_is_asked_share_nothing():
    keys = [
        of_client(),
        of_client(api_key="a"),
        of_client(api_key="b"),
        of_client(headers={"x-api-key": "a"}),
        of_client(headers={"x-api-key": "b"}),
        of_client(headers={"Authorization": "Bearer c"}),
        of_client(headers={"ocp-apim-subscription-key": "a"}),
        of_client(headers={"openai-organization": "o"}),
        of_client(headers={"OpenAI-Beta": "v2"}),
        of_client(HERE + "?api-version=1"),
        of_client(HERE + "?api-version=2"),
        of_client(HERE + "?key=a"),
        of_client("http://127.0.0.1:9/v2"),
        of_client("http://127.0.0.1:10/v1"),
        of_client(tenant="t"),
        of_client(tenant="u"),
        of_client(fields={"extra_headers": {"api-version": "3"}}),
        of_client(fields={"extra_headers": {"authorization": "Bearer d"}}),
        of_client(fields={"extra_headers": {"anthropic-beta": "x"}}),
    ]
    assert len(set(keys)) == len(keys)


def test_cache_08_what_says_nothing_about_the_answer_does_not_count():
    assert of_client(headers={"x-trace": "1", "idempotency-key": "1"}) == of_client()
    assert of_client(fields={"extra_headers": {"x-trace": "1"}, "timeout": 3}) == of_client()
    assert of_client(api_key="a", tenant="t") == of_client(api_key="b", tenant="t")


def test_a_header_of_one_call_takes_the_place_of_the_clients():
    one = of_client(headers={"openai-beta": "v1"}, fields={"extra_headers": {"openai-beta": "v2"}})
    assert one == of_client(headers={"openai-beta": "v2"})


def test_cache_08_accounts_of_a_wrapped_sdk_are_told_apart_by_their_place():
    def credential(**options):
        client = openai.AsyncOpenAI(api_key="k", base_url=HERE, **options)
        return wrap_client(client, STACK)._llmmw_wrapping.standing({}, None).credential

    found = {credential(organization="o"), credential(project="o"), credential(), credential(webhook_secret="s")}
    assert len(found) == 3


@pytest.mark.parametrize("given", [True, False])
def test_the_secret_behind_namespaces_lives_where_the_cache_lives(tmp_path, monkeypatch, given):
    if given:
        stack = Stack(TTLCache(300, directory=tmp_path / "c"))
    else:
        monkeypatch.setenv("LLMMW_CACHE_DIR", str(tmp_path / "c"))
        stack = Stack(TTLCache(300))
    found = {key(Client(HERE, "k", stack=stack, model="m").requests.chat(None, "hi", {})) for _ in range(2)}
    assert len(found) == 1
    assert (tmp_path / "c" / "namespace.secret").exists()
    monkeypatch.delenv("LLMMW_CACHE_DIR", raising=False)
    assert found != {of_client(api_key="k")}


def test_a_cache_that_is_off_leaves_the_disk_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMW_CACHE", "off")
    stack = Stack(TTLCache(300, directory=tmp_path / "c"))
    Client(HERE, "k", stack=stack, model="m").requests.chat(None, "hi", {})
    assert stack.cache_directory is None
    assert not (tmp_path / "c").exists()
    assert Stack().cache_directory is None


async def test_cache_08_functions_of_two_tenants_share_nothing():
    asked = []

    @STACK.wrap
    async def ask(prompt):
        asked.append(prompt)
        return prompt

    for tenant in ("a", "b", "a"):
        with using(tenant=tenant):
            await ask("x")
    await ask("x")
    await ask.aclose()
    assert len(asked) == 3
