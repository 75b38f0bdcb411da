"""A bound stack at work.

`engine.py` answers calls and owns lifetimes, `home.py` is the one event loop it lives on, `bridge.py` carries work
there and back, `inflight.py` knows what is not over yet, `readers.py` is what callers hold of a stream, `closing.py`
ends several things of which each may fail.
"""

from __future__ import annotations

from llmmw.engine.closing import DRAIN_S
from llmmw.engine.engine import Engine

__all__ = ["DRAIN_S", "Engine"]
