"""Which calls are the same question.

`sharing.py` decides, `canonical.py` spells a request out as bytes, `identity.py` turns a credential into a namespace,
`explain.py` says why two requests share nothing.
"""

from __future__ import annotations

from llmmw.keys.explain import explain_difference, uncounted_differences
from llmmw.keys.sharing import (
    NOT_SHARED,
    TRANSPORT_FIELDS,
    Draw,
    Sampling,
    Sharing,
    Uncacheable,
    is_deterministic,
    key_of,
)

__all__ = [
    "NOT_SHARED",
    "TRANSPORT_FIELDS",
    "Draw",
    "Sampling",
    "Sharing",
    "Uncacheable",
    "explain_difference",
    "is_deterministic",
    "key_of",
    "uncounted_differences",
]
