"""One thread per disk, and what becomes of it when the process forks."""

from __future__ import annotations

import os
import threading

import pytest

from llmmw.stores import iothread
from llmmw.stores.iothread import IOThread, forked_badly
from llmmw.stores.place import Refused, prepare

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def thread():
    log = []
    made = IOThread("llmmw-test", lambda: log.append("stop"), lambda: log.append(threading.current_thread().name))
    made.log = log
    yield made
    made.stop()
    made.join()
    assert log[-1] == "stop"


def in_child(check):
    """What `check` returns in a forked child, as an exit status."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = int(check())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def done(thread):
    ended = threading.Event()
    thread.read(ended.set)
    return ended.wait(120)


def test_the_thread_closes_and_stands_still_around_a_fork(thread):
    assert done(thread)
    assert in_child(forked_badly) == 0
    assert thread.log == ["llmmw-test"]
    assert done(thread)


def test_writes_that_wait_for_a_lock_do_not_keep_a_fork_waiting(thread):
    free = threading.Event()
    thread.write(free.is_set)
    assert in_child(forked_badly) == 0
    free.set()


def test_a_child_forked_in_the_middle_of_a_job_must_not_use_the_disk(thread, tmp_path, monkeypatch):
    monkeypatch.setattr(iothread, "_FORK_S", 0.01)
    free, begun = threading.Event(), threading.Event()
    thread.read(lambda: (begun.set(), free.wait()))
    assert begun.wait(120)

    def refused():
        with pytest.raises(Refused, match="forked while"):
            prepare(tmp_path / "cache")
        return forked_badly()

    assert in_child(refused) == 1
    free.set()
    assert done(thread)
    assert thread.log == []
    assert not forked_badly()
    assert in_child(forked_badly) == 0


def test_a_fork_on_the_thread_itself_is_no_deadlock_and_in_the_middle_of_a_job(thread):
    codes = []
    thread.read(lambda: codes.append(in_child(forked_badly)))
    assert done(thread)
    assert codes == [1]


def test_a_thread_that_has_ended_holds_nothing_up():
    ended = IOThread("llmmw-test", lambda: None)
    ended.stop()
    ended.join()
    assert ended.hold() is None


@pytest.mark.parametrize("busy", [0, 3])
def test_a_write_gets_its_turn_though_reads_never_stop(thread, busy):
    written, answers = threading.Event(), iter([False] * busy + [True])

    def read():
        if not written.is_set():
            thread.read(read)

    def write():
        if next(answers):
            written.set()
        return written.is_set()

    thread.read(read)
    thread.write(write)
    assert written.wait(120)


def test_a_stopping_thread_does_what_is_queued_and_gives_up_what_stays_busy(thread, monkeypatch):
    monkeypatch.setattr(iothread, "FLUSH_S", 0.05)
    did = []
    for number in range(100):
        thread.write(lambda number=number: did.append(number) or True)
    thread.write(lambda: did.append("busy"))
    thread.write(lambda: did.append("behind it") or True)
    thread.stop()
    thread.join()
    assert did[:100] == list(range(100))
    assert set(did[100:]) == {"busy"}
