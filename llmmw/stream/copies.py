"""Private copies of one answer for each of several callers, so that none sees what another does to its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

from llmmw.call import Item

if TYPE_CHECKING:
    from llmmw.call import Chunk, Reply

E = TypeVar("E", bound=BaseException)


class NotCopyable(Exception):
    """An object that exists once (an open file, a generator): it can be given to one caller only."""


def own_reply(reply: Reply) -> Reply:
    """A follower's reply: the same bytes, or where there are none a deep copy of the native object.

    Raises:
        NotCopyable: there are no bytes and the object cannot be copied.
    """
    if reply.data is not None:
        return reply.replace(source="coalesced", native=None)
    try:
        native = copy.deepcopy(reply.native)
    except Exception as error:
        raise NotCopyable(type(reply.native).__name__) from error
    return reply.replace(source="coalesced", native=native)


def own_chunk(chunk: Chunk) -> Chunk:
    """A follower's piece of a stream: bytes as they are, an Item's encoded form, else a deep copy of its value.

    A value with neither a form nor a copy is handed on itself: a stream under way cannot be asked for again.
    """
    if isinstance(chunk, bytes):
        return chunk
    if chunk.data is not None:
        return Item(None, chunk.data)
    try:
        return Item(copy.deepcopy(chunk.value))
    except Exception:  # noqa: BLE001 — a user's class may raise anything when it is copied
        return chunk


def own_error(error: E) -> E:
    """An exception of the same type, text and attributes, caused by `error`; its notes and traceback are its own.

    The same object only where neither copying nor rebuilding gives an equal one.
    """
    for make in (copy.copy, _rebuilt):
        try:
            found = make(error)
            equal = found is not error and type(found) is type(error) and str(found) == str(error)
        except Exception:  # noqa: BLE001, S112 — a user's class may raise anything when it is copied or printed
            continue
        if equal:
            notes = getattr(error, "__notes__", None)
            if notes is not None:
                found.__notes__ = list(notes)
            found.__cause__ = error
            return found
    return error


def _rebuilt(error: E) -> E:
    """A copy made without running the type's `__init__`, which may want other arguments than it passed on."""
    found = type(error).__new__(type(error), *error.args)
    found.args = error.args
    found.__dict__.update(error.__dict__)
    return found
