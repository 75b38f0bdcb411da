"""Namespaces tell nothing about the credential and agree where they should."""

from __future__ import annotations

import os
import stat

from llmmw.keys.identity import Namespaces, asker_of


def test_security_namespaces_differ_by_credential_and_hide_it(tmp_path):
    names = Namespaces(tmp_path)
    assert names.of("key-1") == names.of("key-1")
    assert names.of("key-1") != names.of("key-2")
    assert "key-1" not in names.of("key-1") + repr(names)
    assert names.of(None) == names.of("") == ""


def test_a_tenant_takes_the_credentials_place():
    names = Namespaces()
    assert names.of("key-1", "acme") == names.of("key-2", "acme")
    assert names.of("key-1", "acme") != names.of("key-1")


def test_processes_with_one_directory_agree_and_others_do_not(tmp_path):
    assert Namespaces(tmp_path / "a").of("k") == Namespaces(tmp_path / "a").of("k")
    assert Namespaces(tmp_path / "a").of("k") != Namespaces(tmp_path / "b").of("k")
    assert Namespaces(tmp_path / "a").of("k") != Namespaces().of("k")


def test_disk_09_the_secret_is_readable_by_its_owner_only(tmp_path):
    directory = tmp_path / "cache"
    Namespaces(directory).of("k")
    [secret] = list(directory.iterdir())
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_directory_that_does_not_work_falls_back_to_the_process(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert Namespaces(file).of("k") == Namespaces().of("k")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "namespace.secret").symlink_to(file)
    assert Namespaces(linked).of("k") == Namespaces().of("k")
    short = tmp_path / "short"
    short.mkdir()
    (short / "namespace.secret").write_bytes(b"x")
    assert Namespaces(short).of("k") == Namespaces().of("k")


def test_headers_that_look_like_credentials_are_taken_for_them():
    def asks(*names):
        return asker_of([(name, "v") for name in names]).credential

    for name in ("Authorization", "x-api-key", "Api-Key", "x-goog-api-key", "helicone-auth", "x-auth-token", "apikey"):
        assert asks(name) == f"\n{name.lower()}: v"
    assert asks("idempotency-key", "x-idempotency-key", "content-type", "cookie", "api-version") == ""
    assert asks("x-api-key", "authorization") == asks("authorization", "x-api-key")


def test_what_changes_the_answer_is_told_from_who_asks():
    asker = asker_of([("API-Version", "1"), ("x", "y")], [("api-version", "2"), ("key", "k")])
    assert asker.variant == (("?api-version", "2"), ("api-version", "1"))
    assert asker.credential == "\n?key=k"


def test_security_a_secret_that_is_a_pipe_or_too_open_is_neither_waited_for_nor_left_open(tmp_path):
    pipe = tmp_path / "pipe"
    pipe.mkdir()
    os.mkfifo(pipe / "namespace.secret")
    assert Namespaces(pipe).of("k") == Namespaces().of("k")
    open_ = tmp_path / "open"
    name = Namespaces(open_).of("k")
    (open_ / "namespace.secret").chmod(0o644)
    assert Namespaces(open_).of("k") == name
    assert stat.S_IMODE((open_ / "namespace.secret").stat().st_mode) == 0o600


def test_a_gateway_with_countless_credentials_remembers_some(monkeypatch):
    monkeypatch.setattr("llmmw.keys.identity._MAX_KNOWN", 3)
    names = Namespaces()
    found = [names.of(str(number)) for number in range(10)]
    assert len(names._known) <= 3
    assert [names.of(str(number)) for number in range(10)] == found
