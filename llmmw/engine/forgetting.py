"""Forgetting stored answers: one request's, a tag's, a tenant's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmmw.engine.onhome import OnHome
from llmmw.keys.identity import namespace_of
from llmmw.settings import text
from llmmw.stores.base import Match

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.call import Call
    from llmmw.layers.base import Bound


class Forgetting(OnHome):
    """An engine's methods that make answers be asked for anew; from any thread.

    An answer in flight, also a stream, reaches those who wait for it, but is not stored, and who asks later does not
    join it. On disk rows go in the background, for all processes; the memory of other processes keeps what it has.
    All return how many entries left memory.
    """

    def invalidate(self, call: Call) -> int:
        """Forget the stored answer to a call, in all its lanes."""
        return self._forget(lambda bound: bound.invalidate(call))

    def invalidate_tag(self, tag: str) -> int:
        """Forget every answer stored under `using(tags=tag)`.

        Raises:
            ConfigError: not a text.
        """
        return self.discard(Match("tag", text("invalidate_tag(tag=)", tag)))

    def invalidate_tenant(self, tenant: str) -> int:
        """Forget every answer stored for a tenant: `using(tenant=)`, or the client's own.

        Raises:
            ConfigError: not a text.
        """
        return self.discard(Match("namespace", namespace_of(text("invalidate_tenant(tenant=)", tenant))))

    def discard(self, match: Match) -> int:
        """Forget every stored answer that matches."""
        return self._forget(lambda bound: bound.discard(match))

    def begin_run(self) -> None:
        """Begin a new run: with `TTLCache(sampling="lanes")` every agent draws from its first sample again.

        So what was asked before in this process is replayed, as it would be in a new one.
        """

        def begin() -> None:
            for _, bound in self._bounds:
                bound.begin_run()

        self._on_home(begin)

    def _forget(self, forget: Callable[[Bound], int]) -> int:
        return self._on_home(lambda: sum(forget(bound) for _, bound in self._bounds))
