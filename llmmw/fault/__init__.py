"""What went wrong: a reply or an exception becomes one of eleven fault classes (SPEC 7).

`classify.py` decides, `bodies.py` reads the error bodies of the providers, `names.py` knows foreign exceptions.
"""

from __future__ import annotations

from llmmw.fault.classify import (
    HURTS_CREDENTIAL,
    HURTS_ENDPOINT,
    Fault,
    FaultKind,
    classify,
    error_of,
    fault_of_event,
)

__all__ = [
    "HURTS_CREDENTIAL",
    "HURTS_ENDPOINT",
    "Fault",
    "FaultKind",
    "classify",
    "error_of",
    "fault_of_event",
]
