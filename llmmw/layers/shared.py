"""One limit for several processes: the setting. How it works: `leases.py`, `algo/shared.py`, `stores/counter.py`."""

from __future__ import annotations

import dataclasses  # noqa: TC003 — KW_ONLY is looked up when the class is made
from pathlib import PurePath

from llmmw.errors import ConfigError
from llmmw.settings import positive_seconds, settings, text, whole
from llmmw.stores.counter import CounterStore, FileCounter


@settings
class SharedCounter:
    """One limit that several processes share: each call is counted where all of them can see it, on one clock.

    While the counter cannot be reached (and for one window after it is back), each process takes no more than its
    part: the limit divided by the processes that were last seen. First it lets what the counter may have granted
    leave the window, so no window sees more than the limit. Such a loss never fails a call; it is told once as a
    `Warned` event.

    Args:
        directory: for processes on one machine: a SQLite file is kept there; whoever names the same directory shares.
        store: or a counter elsewhere: an object with the methods of `llmmw.stores.counter.CounterStore`.
        processes: how many to assume while the counter has never answered.
        patience: seconds (or text) to wait for an answer, after which the counter is lost.

    Raises:
        ConfigError: a value that cannot work.
    """

    directory: str | PurePath | None = None
    _: dataclasses.KW_ONLY
    store: CounterStore | None = None
    processes: int = 4
    patience: float | str = 1.0

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.store is not None and not isinstance(self.store, CounterStore):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's value
            raise ConfigError(f"SharedCounter(store={self.store!r}): needs async methods update and aclose")
        if self.directory is not None:
            named = str(self.directory) if isinstance(self.directory, PurePath) else self.directory
            object.__setattr__(self, "directory", text("SharedCounter(directory=)", named))
        if (self.directory is None) is (self.store is None):
            raise ConfigError("SharedCounter: give either a directory or a store")
        whole("SharedCounter(processes=)", self.processes)
        positive_seconds("SharedCounter(patience=)", self.patience)

    def open(self) -> CounterStore:
        """The store, for one bound limiter."""
        if self.store is not None:
            return self.store
        return FileCounter(str(self.directory), positive_seconds("patience", self.patience))
