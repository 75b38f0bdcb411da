"""Jobs on their way to a thread: none is lost, none is late, in order."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest

from llmmw.stores import inbox as inbox_module
from llmmw.stores.inbox import QueueInbox, inbox

KINDS = [QueueInbox, *([inbox_module.EventInbox] if sys.platform == "linux" else [])]


@pytest.fixture(params=KINDS)
def box(request):
    return request.param()


def test_what_is_there_comes_at_once_and_in_order(box):
    assert box.empty()
    for number in range(3):
        box.put(number)
    assert not box.empty()
    assert [box.get(timeout_s) for timeout_s in (None, 0, 5.0)] == [0, 1, 2]
    assert box.empty()


def test_who_waits_in_vain_goes_on(box):
    assert box.get(0) is None
    assert box.get(0.001) is None
    box.put(1)
    assert box.get(0.001) == 1


def test_nothing_is_lost_between_many_who_put_and_one_who_sleeps_again_and_again(box):
    count, found = 2_000, []

    def put(who):
        for number in range(count):
            box.put((who, number))

    def take():
        while len(found) < 4 * count:
            item = box.get(None if len(found) % 2 else 10.0)
            assert item is not None
            found.append(item)

    threads = [threading.Thread(target=take, daemon=True)]
    threads += [threading.Thread(target=put, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 4 * count
    for who in range(4):
        assert [number for one, number in found if one == who] == list(range(count))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has eventfd")
def test_its_handle_goes_with_it_and_not_before():
    box = inbox()
    bell = box._bell
    os.fstat(bell)
    del box
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(bell)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has eventfd")
def test_without_handles_it_is_a_queue(monkeypatch):
    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "eventfd", refuse)
    assert isinstance(inbox(), QueueInbox)


def test_elsewhere_it_is_a_queue(monkeypatch):
    monkeypatch.setattr(inbox_module.sys, "platform", "darwin")
    assert isinstance(inbox(), QueueInbox)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has eventfd")
def test_a_signal_ends_nobodys_sleep(box, monkeypatch):
    known = signal.signal(signal.SIGUSR1, lambda *_: None)
    found = []
    thread = threading.Thread(target=lambda: found.append(box.get(None)), daemon=True)
    thread.start()
    try:
        for _ in range(20):  # some of them while it sleeps
            time.sleep(0.001)
            if thread.is_alive():
                signal.pthread_kill(thread.ident, signal.SIGUSR1)
        box.put(7)
        thread.join(120)
    finally:
        signal.signal(signal.SIGUSR1, known)
    assert found == [7]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has eventfd")
def test_a_forked_child_has_no_handle_of_it_from_the_first_moment_on():
    box = inbox_module.EventInbox()
    thread = threading.Thread(target=box.get, args=(None,), daemon=True)
    thread.start()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(box._bell)
            box.put(1)  # it rings no bell, which may be anybody's file by now
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.fstat(box._bell)
    box.put(1)
    thread.join(120)
    assert not thread.is_alive()
