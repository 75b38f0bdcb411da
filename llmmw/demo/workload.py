"""What the demo's agents ask: a small town, a few ticks, three questions per agent and tick."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

DISTRICTS = ("Harbour", "Mill", "Market", "Hill", "Garden")


class Question(msgspec.Struct, frozen=True):
    """One question of one agent."""

    agent: str
    tick: int
    kind: str
    """"shared": the same for everybody in the tick; "own": nobody else's; "memory": the agent's, every tick again."""
    messages: tuple[dict[str, str], ...]


class Workload(msgspec.Struct, frozen=True):
    """How much is asked."""

    agents: int = 20
    ticks: int = 6
    max_tokens: int | None = None
    """Bound on each answer. A cut answer is never cached, so a bound that cuts shows no hits."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; for a model that never ends by itself."""

    @property
    def total(self) -> int:
        """Questions in all."""
        return self.agents * self.ticks * 3

    def tick(self, number: int) -> Iterator[Question]:
        """Every question of one tick."""
        for index in range(self.agents):
            agent, district = f"agent-{index:02}", DISTRICTS[index % len(DISTRICTS)]
            yield _question(agent, number, "shared", f"Tick {number}. Describe the weather in the town in one line.")
            yield _question(agent, number, "own", f"Tick {number}. You are {agent} in {district}. What do you do next?")
            yield _question(agent, number, "memory", f"You are {agent} in {district}. Recall your goal for this week.")


def _question(agent: str, tick: int, kind: str, text: str) -> Question:
    system = {"role": "system", "content": "You live in a small simulated town. Answer briefly."}
    return Question(agent, tick, kind, (system, {"role": "user", "content": text}))


class Trouble(msgspec.Struct, frozen=True):
    """What goes wrong in the embedded world; a real server is left alone."""

    limited_tick: int = 2
    """In this tick the server admits `limit_requests` per `limit_window_s` and answers 429 beyond it."""
    limit_requests: int = 30
    limit_window_s: float = 2.0
    broken_tick: int = 4
    """In this tick the upstream answers 503 to whoever lives in `broken_district`."""
    broken_district: str = "Harbour"
