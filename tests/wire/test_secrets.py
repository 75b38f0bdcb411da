"""What a request holds that nobody may be told."""

import base64

import pytest

from llmmw.wire import HTTPRequest
from llmmw.wire.secrets import NO_SECRETS, Secrets, secrets_of


def request(*headers, url="http://h/v1"):
    return HTTPRequest("POST", url, headers)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (request(("Authorization", "Bearer tops3cret")), "bad token tops3cret here"),
        (request(("X-Api-Key", "tops3cret")), '{"key":"tops3cret"}'),
        (request(("api-key", "tops3cret")), "TOK=tops3cret;"),
        (request(("x-goog-api-key", "tops3cret")), "tops3cret"),
        (request(("cookie", "a=1; sid=tops3cret")), "session tops3cret ended"),
        (request(("proxy-authorization", "Basic " + base64.b64encode(b"me:tops3cret").decode())), "user me:tops3cret"),
        (request(("authorization", "Basic " + base64.b64encode(b"me:tops3cret").decode())), "password tops3cret"),
        (request(url="http://h/v1?key=tops%2Fs3cret"), "tops/s3cret"),
        (request(url="http://h/v1?key=tops%2Fs3cret"), "/v1?key=tops%2Fs3cret"),
        (request(url="http://h/v1?access_token=tops3cret"), "tops3cret"),
        (request(url="http://h/v1?sv=1&sig=tops3cret"), "tops3cret"),
        (request(("authorization", 'tops"3\\cret')), r'{"m":"tops\"3\\cret"}'),
        (request(("authorization", "Basic not-base64!")), "not-base64!"),
    ],
)
def test_security_02_every_spelling_of_a_secret_is_hidden(sent, said):
    secrets = secrets_of(sent)
    for shown in (
        secrets.hide(said),
        secrets.hide_bytes(said.encode()).decode(),
        secrets.hide_headers((("x", said),))[0][1],
    ):
        assert "***" in shown
        assert "cret" not in shown
        assert "base64" not in shown
    assert repr(secrets) == "Secrets(***)"


def test_what_is_no_secret_stays():
    sent = request(
        ("content-type", "application/json"), ("idempotency-key", "abcdefgh"), url="http://h/v1?api-version=2024"
    )
    said = "application/json abcdefgh 2024"
    assert secrets_of(sent).hide(said) == said
    assert NO_SECRETS.hide(said) == said
    assert NO_SECRETS.hide_bytes(said.encode()) == said.encode()
    assert NO_SECRETS.hide_headers((("a", said),)) == (("a", said),)


def test_a_short_secret_is_hidden_as_a_word_only():
    secrets = Secrets(frozenset({"test"}))
    assert secrets.hide("the latest test (test)") == "the latest *** (***)"


def test_a_secret_known_otherwise_is_hidden_too():
    assert secrets_of(request(), "in a header of its own").hide("x in a header of its own x") == "x *** x"
