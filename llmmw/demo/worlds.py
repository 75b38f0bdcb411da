"""Where the demo's questions go: two embedded servers that make trouble on schedule, or somebody's real server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from llmmw.testing.server import FaultRule, Match, ServerConfig, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.demo.workload import Trouble

EMBEDDED_MODEL = "llmmw-embedded"


class EmbeddedWorld:
    """A primary and a backup server process on loopback, timed like continuous batching on a GPU (not a model)."""

    def __init__(self, trouble: Trouble) -> None:
        self._trouble = trouble
        timing = ServerConfig(latency="engine", step_s=0.004, max_num_seqs=64, reply_tokens=10)
        self._primary = ServerProcess(timing)
        self._backup = ServerProcess(timing)

    @property
    def base_url(self) -> str:
        """The primary."""
        return self._primary.base_url

    @property
    def fallbacks(self) -> Sequence[str]:
        """The backup."""
        return (self._backup.base_url,)

    def start_way(self) -> None:
        """Fresh counters, limits and prefix cache."""
        for server in (self._primary, self._backup):
            server.clear_faults()
            server.configure(rpm=None)
            server.reset()

    def start_tick(self, tick: int) -> None:
        """Rate limit in one tick, a broken upstream for one district in another."""
        trouble = self._trouble
        if tick == trouble.limited_tick:
            self._primary.configure(
                rpm=trouble.limit_requests, limit_window_s=trouble.limit_window_s, limit_style="plain"
            )
        if tick == trouble.limited_tick + 1:
            self._primary.configure(rpm=None)
        if tick == trouble.broken_tick:
            match = Match(contains=trouble.broken_district)
            self._primary.add_fault(FaultRule(kind="status", status=503, match=match))
        if tick == trouble.broken_tick + 1:
            self._primary.clear_faults()

    def __enter__(self) -> Self:
        self._primary.start()
        self._backup.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._primary.stop()
        self._backup.stop()


class RealWorld:
    """A server that is not ours: asked, never disturbed."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.fallbacks: Sequence[str] = ()

    def start_way(self) -> None:
        """Nothing to reset."""

    def start_tick(self, tick: int) -> None:
        """No trouble is made."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to stop."""
