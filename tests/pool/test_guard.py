"""Where requests may go and what headers may hold."""

import pytest

from llmmw.errors import ConfigError
from llmmw.pool.guard import Guard, check_headers, check_url, is_loopback, origin_of

OPEN = Guard()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://h/",
        "h/v1",
        "",
        "http://",
        "http://h:0/",
        "http://h:99999/",
        "http://[::1/",
        "http://user:pw@h/v1",
        "http://@h/",
        "http://h/\r\nHost: x",
        "http://h/a b",
        "http://169.254.169.254/latest",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "http://169.254.43518/",
        "http://[::ffff:169.254.169.254]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[2002:a9fe:a9fe::1]/",
        "http://[::169.254.169.254]/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[fd00:ec2::254]/",
        "http://metadata.google.internal/",
        "http://METADATA.google.internal./",
        "http://169.254.169.254./",
        "http://100.100.100.200/",
        "http://0.0.0.0/",
        "http://[::]/",
        "http://224.0.0.1/",
        "http://168.63.129.16/",
        "http://[64:ff9b:1::a9fe:a9fe]/",
        "http://\uff11\uff16\uff19.254.169.254/",  # fullwidth digits, which some libraries read as digits
        "http://%31%36%39.254.169.254/",
        "http://169.254.169.254%2eexample/",
        "http://safe.example\\@169.254.169.254/",
        "http://safe.example\\.169.254.169.254/",
        "http://169。254。169。254/",
        "http://ex\u00e4mple.com/v1",
        "http://h/v1/\u00e4",
        None,
    ],
)
def test_security_05_a_base_url_that_must_not_be_asked_is_refused(url):
    with pytest.raises(ConfigError) as caught:
        check_url("base_url", url, OPEN)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("https://API.openai.com/v1", "https://api.openai.com:443"),
        ("http://[::1]/v1", "http://[::1]:80"),
        ("http://10.0.0.1", "http://10.0.0.1:80"),
        ("http://host.docker.internal.:11434", "http://host.docker.internal:11434"),
        ("http://0xcafe.example", "http://0xcafe.example:80"),
        ("http://xn--exmple-cua.com", "http://xn--exmple-cua.com:80"),
        ("http://my_host-1.internal", "http://my_host-1.internal:80"),
        ("http://[2001:db8::1]", "http://[2001:db8::1]:80"),
    ],
)
def test_ordinary_urls_pass_and_have_one_spelling(url, origin):
    assert origin_of(check_url("base_url", url, OPEN)) == origin


def test_security_05_allow_hosts_exempts_names_and_addresses():
    allowed = Guard(frozenset({"169.254.169.254", "metadata.google.internal"}))
    check_url("base_url", "http://169.254.169.254/", allowed)
    check_url("base_url", "http://metadata.google.internal/", allowed)
    allowed.refuse_address("metadata.google.internal", "169.254.1.1")
    allowed.refuse_address("other", "169.254.169.254")
    with pytest.raises(ConfigError, match="allow_hosts"):
        allowed.refuse_address("other", "169.254.1.1")


def test_security_05_what_a_name_resolves_to_is_judged():
    OPEN.refuse_address("h", "127.0.0.1")
    OPEN.refuse_address("h", "::1")
    for address in ("169.254.169.254", "fe80::1%eth0", "::ffff:169.254.169.254"):
        with pytest.raises(ConfigError):
            OPEN.refuse_address("h", address)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("app.LOCALHOST", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_this_machine_is_recognised(host, local):
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer secret\n"),
        ("authorization", "Bearer secret\r\nx: y"),
        ("x", "secret\x00"),
        ("x", " secret"),
        ("x", "secret\x7f"),
        ("x", "secret✓"),
        ("x y", "secret"),
        ("x:", "secret"),
        ("", "secret"),
        ("x\n", "secret"),
    ],
)
def test_security_01_a_header_that_smuggles_is_refused_without_showing_it(name, value):
    with pytest.raises(ConfigError) as caught:
        check_headers((("ok", "fine"), (name, value)))
    assert "secret" not in str(caught.value)


def test_tabs_and_latin_1_are_fine_inside_a_value():
    check_headers((("x", "a\tb caf\xe9"), ("y", "")))
