"""Work on its way to the home loop and its outcome on the way back; and the thread that runs a home of our own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

_JOIN_S = 5.0
_FAR_S = 365 * 86400.0


class HomeLost(Exception):
    """The home loop ended before the bridged work did."""


class StandsStill(Exception):
    """The home loop did not go on in time."""


class Bridged(Generic[T]):
    """Work that runs as a task of the home loop for a caller elsewhere, who waits for `result`.

    Args:
        loop: the home.
        make: builds the coroutine.
        may_start: asked on the loop; False lets the work only wait there for the loop's end.
        on_dying: told when the loop cancels its tasks because it ends; True leaves the result to whoever knows its end.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make: Callable[[], Coroutine[Any, Any, T]],
        *,
        may_start: Callable[[], bool],
        on_dying: Callable[[], bool],
    ) -> None:
        self.result: concurrent.futures.Future[T] = concurrent.futures.Future()
        self.task: asyncio.Task[tuple[T, None] | tuple[None, BaseException]] | None = None
        self._loop = loop
        self._make = make
        self._may_start = may_start
        self._on_dying = on_dying
        self._run: object = None
        self._timer: weakref.ref[asyncio.TimerHandle] | None = None

    def send(self) -> None:
        """Hand it to the loop, from any thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._loop.call_soon_threadsafe(self._start, _Unanswered(self.result))

    def lose(self) -> None:
        """The loop is gone: the caller must go elsewhere."""
        _fail(self.result, HomeLost())

    def _stay(self, token: _Unanswered) -> None:
        # A loop that is closed drops its timers, and with this one the token, which tells the caller.
        self._timer = weakref.ref(self._loop.call_later(_FAR_S, _nothing, token))
        # Weakly, for the result outlives us, and a circle would keep the work's arguments for the garbage collector.
        self.result.add_done_callback(functools.partial(_withdrawn, weakref.ref(self)))

    def _start(self, token: _Unanswered) -> None:
        if self.result.done():
            return
        self._stay(token)
        if not self._may_start():
            return
        self._run = _current_run()
        self.task = self._loop.create_task(_outcome(self._make))
        self.task.add_done_callback(self._deliver)

    def _deliver(self, task: asyncio.Task[tuple[T, None] | tuple[None, BaseException]]) -> None:
        if task.cancelled():
            if self._run is not _current_run() and not self.result.done() and self._on_dying():
                return
            self.lose()  # cancelled by somebody who had no business with it
        elif (escaped := task.exception()) is not None:
            _fail(self.result, escaped)
        else:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                value, error = task.result()
                if error is None:
                    self.result.set_result(value)  # type: ignore[arg-type]  # T itself, for there is no error
                else:
                    self.result.set_exception(error)
        self._forget()

    def withdraw(self) -> None:
        """The caller has gone; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
        self._forget()

    def _forget(self) -> None:
        timer = None if self._timer is None else self._timer()
        if timer is not None:
            timer.cancel()


def _withdrawn(bridged: weakref.ref[Bridged[Any]], result: concurrent.futures.Future[Any]) -> None:
    found = bridged()
    if found is not None and result.cancelled():
        found.withdraw()


async def _outcome(make: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, None] | tuple[None, BaseException]:
    """Value or error. It knows nothing of the result: the error's traceback leads here, and would to itself."""
    try:
        return await make(), None
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return None, error  # raised by the work itself
    except BaseException as error:
        # As the outcome of a task SystemExit and KeyboardInterrupt would end the loop, and everybody's calls with it.
        # (In the main thread an interrupt is the user's, and the loop is his own.)
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return None, error


async def outcome_of(result: concurrent.futures.Future[T], patience_s: float | None) -> T:
    """Wait on another loop than the home.

    Raises:
        StandsStill: for `patience_s`, where that is given.
    """
    try:
        if patience_s is None:
            return await asyncio.wrap_future(result)
        async with asyncio.timeout(patience_s):
            return await asyncio.wrap_future(result)
    except TimeoutError:
        if patience_s is None:
            raise
        raise StandsStill from None  # nothing was begun that could have raised this
    finally:
        del result  # it holds the exception, whose traceback leads here


def outcome_of_sync(result: concurrent.futures.Future[T], patience_s: float | None) -> T:
    """Wait in plain code.

    Raises:
        StandsStill: for `patience_s`, where that is given.
    """
    try:
        return result.result(patience_s)
    except BaseException as error:
        result.cancel()
        if patience_s is not None and isinstance(error, TimeoutError):
            raise StandsStill from None  # as above
        raise
    finally:
        del result  # as above


class _Unanswered:
    """Held by nothing but the loop: when it goes unanswered, so did the loop."""

    __slots__ = ("_result",)

    def __init__(self, result: concurrent.futures.Future[Any]) -> None:
        self._result = result

    def __del__(self) -> None:
        if not self._result.done():
            _fail(self._result, HomeLost())


def _nothing(token: object) -> None:
    del token


def _fail(result: concurrent.futures.Future[Any], error: BaseException) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        result.set_exception(error)


def _current_run() -> object:
    """Something that is the same object during one `run_forever` of a loop, and another in the next.

    `asyncio.run` cancels what is left in a run of its own, after that of the main coroutine; this tells them apart.
    """
    return sys.get_asyncgen_hooks().firstiter


class LoopThread:
    """A daemon thread that runs an event loop until told to stop.

    Raises:
        Exception: whatever kept the loop from being made, or `on_start` from finishing.
    """

    def __init__(self, on_start: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        self._on_start = on_start
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, name="llmmw-home", daemon=True)
        self._thread.start()
        self.loop = self._started.result()

    def _main(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            elif "interpreter shutdown" not in str(error):  # closed at exit: asyncio wants a thread to end its own ones
                raise

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._on_start(loop)
        del self._on_start  # the thread must not keep its owner alive
        self._started.set_result(loop)
        await self._stop.wait()

    def stop(self) -> None:
        """Let the loop end; from any thread."""
        with contextlib.suppress(RuntimeError):  # it is closed already
            self.loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        """Wait for the thread's end, unless called on it."""
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def finish(self) -> None:
        """Stop and join, for whoever drops it."""
        self.stop()
        self.join()
