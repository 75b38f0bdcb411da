"""Namespaces tell nothing about the credential and agree where they should."""

from __future__ import annotations

import stat

from llmmw.keys.identity import Namespaces


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
