"""Manifests: whole or not there, private, and one run at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import msgspec
import pytest

from llmmw.errors import ConfigError
from llmmw.offline.shelf import Shelf, new_manifest


def manifest(**more):
    found = new_manifest("openai", "http://x/v1", "chat", ["a" * 64, "b" * 64], 5.0)
    return msgspec.structs.replace(found, **more)


def test_what_is_saved_is_loaded_oldest_first_and_private(tmp_path):
    old = os.umask(0)
    try:
        shelf = Shelf(tmp_path / "deep" / "shelf")
        first, second = manifest(created=2.0), manifest(created=1.0, sent=1.5, batch="batch_1", done=True)
        shelf.save(first)
        shelf.save(second)
        shelf.lock()
    finally:
        os.umask(old)
    assert shelf.load() == [second, first]
    assert stat.S_IMODE(shelf.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in shelf.directory.iterdir()} == {0o600}
    shelf.drop(first)
    shelf.drop(first)
    assert shelf.load() == [second]
    shelf.unlock()
    shelf.unlock()


def test_a_manifest_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    done = []
    real_fsync, real_rename = os.fsync, type(tmp_path).rename

    def fsync(descriptor):
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def rename(path, target):
        done.append("rename")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(type(tmp_path), "rename", rename)
    Shelf(tmp_path).save(manifest())
    assert done == ["file", "rename", "directory"]


def test_a_save_that_fails_leaves_the_old_manifest(tmp_path, monkeypatch):
    shelf, kept = Shelf(tmp_path), manifest()
    shelf.save(kept)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left"):
            shelf.save(msgspec.structs.replace(kept, batch="batch_1"))
    assert shelf.load() == [kept]
    assert not list(tmp_path.glob("*.draft"))


def test_a_second_run_is_kept_out_also_in_another_process_until_the_first_is_gone(tmp_path):
    code = "import sys; from llmmw.offline.shelf import Shelf; shelf = Shelf(sys.argv[1]); shelf.lock();"
    code += "print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "shelf")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        shelf = Shelf(tmp_path / "shelf")
        with pytest.raises(ConfigError, match="another run"):
            shelf.lock()
        holder.kill()
        holder.wait()
        shelf.lock()
        with pytest.raises(ConfigError, match="another run"):
            Shelf(tmp_path / "shelf").lock()
        shelf.unlock()


def test_drafts_of_a_killed_run_are_swept_away(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.save(manifest())
    (tmp_path / "batch-half.draft").write_bytes(b'{"id":')
    shelf.lock()
    assert len(shelf.load()) == 1
    assert not list(tmp_path.glob("*.draft"))
    shelf.unlock()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id":"x"}', b"\xff", b'{"id":"../x","api":"openai"}'])
def test_a_manifest_that_cannot_be_read_stops_the_run(tmp_path, content):
    (tmp_path / "batch-x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"batch-x\.json"):
        Shelf(tmp_path).load()


def test_a_manifest_under_another_name_stops_the_run(tmp_path):
    shelf = Shelf(tmp_path)
    found = manifest()
    shelf.save(found)
    shelf.path(found).rename(tmp_path / "batch-other.json")
    with pytest.raises(ConfigError, match="another batch's"):
        shelf.load()
    (tmp_path / "batch-other.json").unlink()
    (tmp_path / "batch-link.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="cannot be read"):
        shelf.load()


def test_directories_that_others_could_change_are_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").write_text("x")
    for name in ("link", "open", "file", "file/below"):
        with pytest.raises(ConfigError, match=name):
            Shelf(tmp_path / name)


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    code = """
import os, sys
from llmmw.offline.shelf import Shelf
shelf = Shelf(sys.argv[1])
shelf.lock()
if os.fork():
    os._exit(0)
print("forked", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "shelf")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "forked\n"
        assert parent.wait() == 0  # its child still runs: it reads what we have not written
        shelf = Shelf(tmp_path / "shelf")
        shelf.lock()
        shelf.unlock()
        parent.stdin.close()


def test_a_lock_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="lock"):
        Shelf(tmp_path).lock()


def test_a_manifest_that_cannot_be_removed_is_told(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.path(manifest(id="stuck")).mkdir()
    with pytest.raises(ConfigError, match="cannot be removed"):
        shelf.drop(manifest(id="stuck"))
