"""What the limiter grants: the right to make one call, with what was reserved for it (`allowance.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmmw.algo.bucket import Cell
    from llmmw.layers.leases import Lease


class Permit:
    """The right to make one call; given back exactly once."""

    __slots__ = ("amounts", "cells", "choices", "epoch", "lease", "request", "sampled", "started", "width")

    def __init__(self, amounts: tuple[int, ...], started: float, epoch: int, width: int = 1) -> None:
        self.amounts = amounts
        """Tokens reserved, one figure per token limit."""
        self.started = started
        self.epoch = epoch
        """The home loop under which it was granted; -1 once it was given back."""
        self.width = width
        """Slots that it takes."""
        self.request: Cell | None = None
        self.cells: list[Cell] | tuple[()] = ()
        self.choices = 1
        self.lease: Lease | None = None
        self.sampled = False
        """Whether the time to its first token was judged."""
