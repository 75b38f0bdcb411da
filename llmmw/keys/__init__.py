"""Which calls are the same question.

`sharing.py` decides, `canonical.py` spells a request out as bytes, `identity.py` turns a credential into a namespace.
"""

from __future__ import annotations

from llmmw.keys.sharing import (
    NOT_SHARED,
    Draw,
    Sampling,
    Sharing,
    Uncacheable,
    explain_difference,
    is_deterministic,
    key_of,
)

__all__ = [
    "NOT_SHARED",
    "Draw",
    "Sampling",
    "Sharing",
    "Uncacheable",
    "explain_difference",
    "is_deterministic",
    "key_of",
]
