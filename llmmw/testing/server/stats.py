"""What the server saw: counters, connections, and summaries of the newest requests."""

import time
from bisect import bisect_left
from collections import Counter, deque
from typing import Any, Final

from msgspec import Struct, to_builtins

# Seconds; the middle of vLLM's own buckets.
BUCKETS: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)


class Histogram:
    """Counts per bucket, for the metrics page."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """One observation."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


class Record(Struct, omit_defaults=True):
    """One received request.

    Attributes:
        number: order of arrival, from 1.
        at_s, took_s: arrival since start or reset, and duration, seconds.
        route: path.
        connection: number of its TCP connection, from 1.
        outcome: ``ok``, ``http_<status>``, ``aborted`` (the client left), ``broken`` (a fault damaged the
            answer), ``open`` (still under way), ``crashed`` (a bug of this server).
        text: start of the last user text, at most 80 characters.
        key: the last four characters of the API key.
        sequences: texts asked for (prompts * n).
    """

    number: int
    at_s: float
    route: str
    connection: int = 0
    model: str = ""
    stream: bool = False
    priority: int = 0
    sequences: int = 0
    text: str = ""
    key: str = ""
    request_id: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    status: int = 0
    outcome: str = "open"
    fault: str = ""
    took_s: float = 0.0
    body: str = ""
    headers: dict[str, str] = {}


class Stats:
    """Counters since start or the last reset."""

    def __init__(self, log_requests: int) -> None:
        self.open_connections: dict[int, int] = {}
        self._connections = 0
        self.clear(log_requests)

    def clear(self, log_requests: int) -> None:
        """Start counting afresh; connections that stay open stay known."""
        self.started = time.monotonic()
        self.received = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.by_route: Counter[str] = Counter()
        self.by_outcome: Counter[str] = Counter()
        self.by_finish: Counter[str] = Counter()
        self.refused_by_limit = 0
        self.peak_connections = len(self.open_connections)
        self.connections_seen = 0
        self.latency = Histogram()
        self.log: deque[Record] = deque(maxlen=log_requests)
        # Connections from before count as seen when they are used again.
        self._fresh = dict.fromkeys(self.open_connections, False)

    def now_s(self) -> float:
        """Seconds since start or reset."""
        return time.monotonic() - self.started

    def begin(self, route: str, connection: int) -> Record:
        """A request arrived on the connection object with this ``id()``."""
        self.received += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self.by_route[route] += 1
        number = self.open_connections.get(connection)
        if number is None:
            self._connections += 1
            number = self.open_connections[connection] = self._connections
            self.peak_connections = max(self.peak_connections, len(self.open_connections))
        if not self._fresh.get(connection):
            self._fresh[connection] = True
            self.connections_seen += 1
        record = Record(self.received, self.now_s(), route, number)
        self.log.append(record)
        return record

    def end(self, record: Record, outcome: str) -> None:
        """It is answered, refused, damaged or given up."""
        record.outcome = outcome
        record.took_s = self.now_s() - record.at_s
        self.in_flight -= 1
        self.by_outcome[outcome] += 1
        self.prompt_tokens += record.prompt_tokens
        self.output_tokens += record.output_tokens
        self.cached_tokens += record.cached_tokens
        self.latency.add(record.took_s)

    def disconnected(self, connection: int) -> None:
        """A TCP connection is gone."""
        self.open_connections.pop(connection, None)
        self._fresh.pop(connection, None)

    def report(self, newest: int) -> dict[str, Any]:
        """Plain data for the control plane, with at most ``newest`` request summaries."""
        log = list(self.log)[-newest:] if newest else []
        return {
            "uptime_s": self.now_s(),
            "received": self.received,
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "completed": self.by_outcome["ok"],
            "aborted": self.by_outcome["aborted"],
            "refused_by_limit": self.refused_by_limit,
            "by_route": dict(self.by_route),
            "by_outcome": dict(self.by_outcome),
            "tokens": {
                "prompt": self.prompt_tokens,
                "output": self.output_tokens,
                "cached": self.cached_tokens,
            },
            "connections": {
                "open": len(self.open_connections),
                "peak": self.peak_connections,
                "seen": self.connections_seen,
            },
            "requests": to_builtins(log),
            "requests_dropped": max(0, self.received - len(self.log)),
        }
