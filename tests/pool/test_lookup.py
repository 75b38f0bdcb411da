"""Addresses, proxies and certificates, as every engine of Python's own looks them up."""

import ssl
import sys

import msgspec
import pytest

from llmmw.errors import ConnectionFailed
from llmmw.pool.engine import EngineOptions
from llmmw.pool.engines import lookup
from llmmw.pool.engines.lookup import Proxy, addresses_of, proxy_for, tls_context
from llmmw.pool.guard import Guard

OPTIONS = EngineOptions(Guard(), keepalive_expiry=4.0, verify=True, trust_env=True, http2=False)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "scheme", "found"),
    [
        ("http_proxy", "http://p:3128", "http", Proxy("http://p:3128")),
        ("https_proxy", "http://p:3128", "https", Proxy("http://p:3128")),
        ("https_proxy", "http://p:3128", "http", None),
        ("all_proxy", "p:3128", "https", Proxy("http://p:3128")),
        ("all_proxy", "http://me:a%40b@p:3128/", "http", Proxy("http://p:3128", "me", "a@b")),
    ],
)
def test_pool_08_the_proxy_of_the_environment(monkeypatch, variable, value, scheme, found):
    monkeypatch.setenv(variable, value)
    assert proxy_for(OPTIONS, scheme, "api.example") == found
    assert proxy_for(msgspec.structs.replace(OPTIONS, trust_env=False), scheme, "api.example") is None
    monkeypatch.setenv("no_proxy", "api.example")
    assert proxy_for(OPTIONS, scheme, "api.example") is None


def test_a_proxy_shows_no_password():
    assert repr(Proxy("http://p:1", "me", "hunter2")) == "Proxy('http://p:1')"


async def test_a_name_that_no_resolver_takes_is_a_failed_connection():
    for name in ("a" * 300 + ".test", "a..b"):
        with pytest.raises(ConnectionFailed):
            await addresses_of(name, 80, Guard())


@pytest.mark.parametrize("trust_env", [False, True])
def test_a_machine_without_certificates_of_its_own_uses_certifis(monkeypatch, tmp_path, trust_env):
    pytest.importorskip("certifi")
    nothing = ssl.DefaultVerifyPaths(None, None, "A", str(tmp_path / "none.pem"), "B", str(tmp_path / "none"))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nothing)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    lookup._context.cache_clear()
    context = tls_context(msgspec.structs.replace(OPTIONS, trust_env=trust_env))
    lookup._context.cache_clear()
    assert context.cert_store_stats()["x509_ca"] > 50
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.keylog_filename is None


def test_windows_keeps_its_own_store(monkeypatch):
    class Context:
        asked = False

        def load_default_certs(self):
            self.asked = True

    monkeypatch.setattr(sys, "platform", "win32")
    context = Context()
    lookup._trust_compiled_paths(context)
    assert context.asked


def test_contexts_are_made_once_and_never_shared_between_protocols():
    plain, h2 = tls_context(OPTIONS), tls_context(msgspec.structs.replace(OPTIONS, http2=True))
    assert plain is tls_context(OPTIONS)
    assert plain is not h2
    mine = ssl.create_default_context()
    assert tls_context(msgspec.structs.replace(OPTIONS, verify=mine)) is mine
    assert tls_context(msgspec.structs.replace(OPTIONS, verify=False)).verify_mode == ssl.CERT_NONE
