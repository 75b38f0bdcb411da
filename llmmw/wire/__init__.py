"""What LLM servers speak.

`http.py` has requests, paths and strict JSON, `sse.py` streams, `assemble.py` turns one into the other.
Shared by the endpoints (which send) and the edges (which are asked), so it knows neither.
"""

from __future__ import annotations

from llmmw.wire.http import (
    HOP_BY_HOP,
    PATHS,
    Headers,
    HTTPRequest,
    decode_json,
    op_of,
    read_answer,
    url_of,
    without_query,
)

__all__ = [
    "HOP_BY_HOP",
    "PATHS",
    "HTTPRequest",
    "Headers",
    "decode_json",
    "op_of",
    "read_answer",
    "url_of",
    "without_query",
]
