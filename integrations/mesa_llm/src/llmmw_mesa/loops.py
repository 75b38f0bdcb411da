"""The loops on which plain code steps agents: one for each thread, and they stay, so what agents keep on them works."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Coroutine

_GRACE_S = 1.0
"""So long may take to end what steps have left on a loop that is closed."""


class _Kept:
    """A loop that stays until its thread ends, or the process."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        _all.add(self)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """To its end, in this context. Ctrl-C ends it."""
        return self._runner.run(work, context=contextvars.copy_context())

    def run_beside(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The same on another thread, for callers whose own runs a loop already."""
        told: list[Any] = []
        tasks: list[asyncio.Task[Any]] = []
        ended = threading.Event()
        context = contextvars.copy_context()

        async def noted() -> Any:
            # Not in a task within this one: a KeyboardInterrupt in it would leave this one behind, for the next call.
            tasks.extend(filter(None, (asyncio.current_task(),)))
            if ended.is_set():
                tasks[0].cancel()
            return await work

        def main() -> None:
            try:
                told.extend((self._runner.run(noted(), context=context), None))
            except BaseException as error:  # noqa: BLE001 — raised where it was asked for
                told.extend((None, error))

        thread = threading.Thread(target=main, name="mesa-steps", daemon=True)
        try:
            thread.start()
            thread.join()
        except BaseException:  # Ctrl-C
            ended.set()
            if tasks:
                self._runner.get_loop().call_soon_threadsafe(tasks[0].cancel)
            thread.join(2 * _GRACE_S)
            raise
        value, error = told
        if error is not None:
            try:
                raise error
            finally:
                del error, told  # its traceback holds this frame
        return value

    def close(self) -> None:
        """End what is left on it, as far as that ends."""
        loop = self._runner.get_loop()
        if loop.is_closed() or loop.is_running():
            return
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=_GRACE_S))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    def disown(self) -> None:
        """In a forked child, which shares the loop's descriptors with its parent: close them, change nothing."""
        selector = getattr(self._runner.get_loop(), "_selector", None)
        if selector is not None:
            with contextlib.suppress(OSError):
                selector.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the thread, or the interpreter, is ending
            self.close()


class _OfThread(threading.local):
    """Each thread's."""

    here: _Kept | None = None
    beside: _Kept | None = None


_all: WeakSet[_Kept] = WeakSet()
_inherited: list[_Kept] = []
_own = _OfThread()


def run_here(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it to its end, whether or not this thread runs a loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if _own.here is None:
            _own.here = _Kept()
        return _own.here.run(work)
    if _own.beside is None:
        _own.beside = _Kept()
    return _own.beside.run_beside(work)


def _forget() -> None:
    """The child of a fork begins with loops of its own."""
    global _own  # noqa: PLW0603 — that is what a fork changes
    for kept in list(_all):
        kept.disown()
        _inherited.append(kept)
    _all.clear()
    _own = _OfThread()


def _at_exit() -> None:
    for kept in list(_all):
        with contextlib.suppress(Exception):  # the interpreter is ending
            kept.close()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
