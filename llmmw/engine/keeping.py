"""Answers that come and go past the stack: what the cache has already, and what was obtained another way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmmw.engine.onhome import OnHome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.call import Call, Reply

_AT_ONCE = 200
"""So many entries before others on the home loop get their turn."""


class Keeping(OnHome):
    """An engine's methods for answers of offline batches; from any loop."""

    async def recall(self, calls: Sequence[Call]) -> list[Reply | None]:
        """What is stored for each call, without asking anybody for more."""

        async def there() -> list[Reply | None]:
            found: list[Reply | None] = []
            for number, call in enumerate(calls, 1):
                hits = [await bound.recall(call) for _, bound in self._bounds]
                found.append(next((hit for hit in hits if hit is not None), None))
                if number % _AT_ONCE == 0:
                    await self.env.clock.sleep(0)
            return found

        return await self._home.run(there)

    async def keep(self, answers: Sequence[tuple[Call, Reply]]) -> None:
        """Store answers that were obtained elsewhere, under the rules for all others."""

        async def there() -> None:
            for number, (call, reply) in enumerate(answers, 1):
                for _, bound in self._bounds:
                    bound.keep(call, reply)
                if number % _AT_ONCE == 0:
                    await self.env.clock.sleep(0)

        if answers:
            await self._home.run(there)
