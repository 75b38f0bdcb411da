"""What LLM servers speak.

`http.py` has requests and paths, `strict.py` JSON, `sse.py` streams, `assemble.py` turns one into the other;
`secrets.py` knows what must not be told.
Shared by the endpoints (which send) and the edges (which are asked), so it knows neither.
"""

from __future__ import annotations

from llmmw.wire.http import (
    HOP_BY_HOP,
    PATHS,
    Headers,
    HTTPRequest,
    op_of,
    read_answer,
    read_any_answer,
    url_of,
    without_query,
)
from llmmw.wire.strict import decode_json

__all__ = [
    "HOP_BY_HOP",
    "PATHS",
    "HTTPRequest",
    "Headers",
    "decode_json",
    "op_of",
    "read_answer",
    "read_any_answer",
    "url_of",
    "without_query",
]
