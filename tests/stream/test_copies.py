"""Copies for followers: equal, of the same type, and private."""

from __future__ import annotations

import pickle
import threading

import pytest

from llmmw.call import Attempt, Item, Reply
from llmmw.errors import AllEndpointsFailed, CircuitOpen, StatusError
from llmmw.stream.copies import NotCopyable, own_chunk, own_error, own_reply


class Plain(Exception):
    pass


class Composes(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code


class Doubles(Exception):
    def __init__(self, text):
        super().__init__(f"bad {text}")


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")


class Stubborn(Exception):
    def __new__(cls, *args):
        if len(args) != 2:
            raise RuntimeError("no")
        return super().__new__(cls, *args)

    def __init__(self, one, two):
        super().__init__(one)


ERRORS = [
    Plain("x", 2),
    Composes(7, "d"),
    Doubles("x"),
    OSError(2, "gone", "/f"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"),
    KeyError("k"),
    SystemExit(3),
    KeyboardInterrupt(),
    StatusError("no", endpoint="e", status=429, code="c", retry_after_s=3.0, attempts=(Attempt("e", "rate", 429),)),
    CircuitOpen("open", retry_at=5.0),
    AllEndpointsFailed("all", [Plain("x"), Plain("y")], attempts=(Attempt("e"),)),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_s_copy_is_equal_and_private(error):
    try:
        raise error
    except BaseException as caught:
        caught.add_note("leader's")
        lines = caught.__traceback__
    found = own_error(error)
    assert found is not error
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.args == error.args
    assert found.__cause__ is error
    assert found.__traceback__ is None
    assert error.__traceback__ is lines
    found.add_note("mine")
    assert error.__notes__ == ["leader's"]
    state = {name: value for name, value in vars(error).items() if name != "__notes__"}
    assert {name: value for name, value in vars(found).items() if name != "__notes__"} == state


@pytest.mark.parametrize("error", [ERRORS[0], *ERRORS[3:]], ids=lambda error: type(error).__name__)
def test_a_copy_pickles(error):
    again = pickle.loads(pickle.dumps(own_error(error)))
    assert type(again) is type(error)
    assert str(again) == str(error)


@pytest.mark.parametrize("error", [Unprintable("x"), Stubborn(1, 2)], ids=lambda error: type(error).__name__)
def test_an_error_that_cannot_be_copied_is_itself(error):
    assert own_error(error) is error


def test_a_reply_with_bytes_shares_them_without_the_native_object():
    reply = Reply(data=b"{}", native=object(), headers=(("a", "b"),))
    own = own_reply(reply)
    assert (own.data, own.native, own.source, own.headers) == (b"{}", None, "coalesced", reply.headers)


def test_a_reply_without_bytes_is_copied_deeply_or_not_at_all():
    value = {"a": [1]}
    own = own_reply(Reply(native=value))
    assert own.native == value
    own.native["a"].append(2)
    assert value == {"a": [1]}
    with pytest.raises(NotCopyable):
        own_reply(Reply(native=(n for n in ())))


def test_chunks_are_private():
    lock = threading.Lock()
    value = [1]
    assert own_chunk(b"raw") == b"raw"
    assert own_chunk(Item(value, b"[1]")) == Item(None, b"[1]")
    own = own_chunk(Item(value))
    assert own == Item([1])
    assert own.value is not value
    assert own_chunk(Item(lock)).value is lock
