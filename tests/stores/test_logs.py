"""A database that is exchanged under a log that this process has mapped must not kill it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmmw.stores.iothread import forked_badly
from llmmw.stores.logs import Mapping, opening
from llmmw.stores.place import prepare

EXCHANGE = """
import os, sys, time
from pathlib import Path
from llmmw.stores import logs
from llmmw.stores.entry import Entry, Header
from llmmw.stores.place import prepare
from llmmw.stores.rows import Rows
place, other = Path(sys.argv[1]), Path(sys.argv[2])
entry = Entry(Header(time.time(), 300.0), b"x" * 3000)

def opened(place):
    prepare(place)
    with logs.opening(place):
        rows = Rows(place, 2**26)
        return rows, logs.Mapping(place)

rows, mapping = opened(other)
rows.set(b"other", entry, 300)
rows.close(); mapping.close()
former, its_mapping = opened(place)
for number in range(100):
    former.set(b"%d" % number, entry, 300)
os.rename(other / "cache.db", place / "cache.db")  # and the log stays
rows, mapping = opened(place)
for number in range(100):
    assert former.find(b"%d" % number)[0] is not None
    former.set(b"%d" % number, entry, 300)
assert rows.find(b"other")[0] is not None
rows.set(b"new", entry, 300)
for one in (rows, former):
    one.close()
"""


def test_a_database_exchanged_under_a_mapped_log_does_not_kill_the_process(tmp_path):
    tmp_path.chmod(0o700)
    command = [sys.executable, "-c", EXCHANGE, str(tmp_path / "cache"), str(tmp_path / "other")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("exchange", [False, True])
def test_only_a_log_of_another_database_is_removed(tmp_path, exchange):
    tmp_path.chmod(0o700)
    place = tmp_path / "cache"
    prepare(place)
    for companion in ("-wal", "-shm"):
        (place / f"cache.db{companion}").write_bytes(b"log")
    mapping = Mapping(place)
    if exchange:
        (place / "new").write_bytes(b"")
        (place / "new").rename(place / "cache.db")
    with opening(place):
        assert (place / "cache.db-shm").exists() is not exchange
        assert (place / "cache.db-wal").exists() is not exchange
    mapping.close()
    mapping.close()
    (place / "cache.db-shm").write_bytes(b"log")
    with opening(place):
        assert (place / "cache.db-shm").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("is_open", [False, True])
def test_a_child_forked_while_a_database_is_open_in_another_thread_does_without_the_disk(tmp_path, is_open):
    tmp_path.chmod(0o700)
    place = tmp_path / "cache"
    prepare(place)
    (place / "cache.db-shm").write_bytes(b"log")
    mapping = Mapping(place)
    if not is_open:
        mapping.close()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = int(forked_badly())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == is_open
    mapping.close()
    assert not forked_badly()
