"""Streamed bodies.

`tap.py` sees their end exactly once and replays recorded ones, `tee.py` shares a live one between readers,
`copies.py` gives every reader its own.
"""

from __future__ import annotations

from llmmw.stream.tap import (
    End,
    Ending,
    Replay,
    Tap,
    at_end,
)

__all__ = [
    "End",
    "Ending",
    "Replay",
    "Tap",
    "at_end",
]
