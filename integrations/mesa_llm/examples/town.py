"""A town of people who walk about and talk: a model for Mesa-LLM as it is, nothing of llmmw in it.

    OPENAI_API_KEY=... python examples/town.py

`TOWN_MODEL` names another language model ("provider/name"), OPENAI_BASE_URL another server.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from mesa import Model
from mesa.datacollection import DataCollector
from mesa.space import MultiGrid
from mesa_llm.llm_agent import LLMAgent
from mesa_llm.reasoning.react import ReActReasoning
from mesa_llm.tools.tool_decorator import tool
from mesa_llm.tools.tool_manager import ToolManager

LLM_MODEL = os.environ.get("TOWN_MODEL", "openai/gpt-4o-mini")
TOOLS = ToolManager()
TRADES = ("baker", "smith", "teacher", "gardener", "tailor")
_EARSHOT = 3


@tool(tool_manager=TOOLS)
def walk(agent: Any, east: int, north: int) -> str:
    """
    Walk one place in a direction.

        Args:
            east: 1 to go east, -1 to go west, 0 for neither.
            north: 1 to go north, -1 to go south, 0 for neither.
            agent: Provided automatically

        Returns:
            Where the agent is now.
    """
    x, y = agent.pos
    agent.model.grid.move_agent(agent, (x + _sign(east), y + _sign(north)))
    return f"{agent.name} is at {agent.pos}"


@tool(tool_manager=TOOLS)
def tell(agent: Any, message: str) -> str:
    """
    Say something to everybody in earshot.

        Args:
            message: What to say.
            agent: Provided automatically

        Returns:
            Who heard it.
    """
    heard = agent.neighbours()
    agent.send_message(message, heard)
    agent.said += 1
    return f"heard by {', '.join(other.name for other in heard) or 'nobody'}"


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


class Resident(LLMAgent):
    """Looks around, thinks (one question to the language model), and acts by a tool (one more)."""

    def __init__(self, model: Any, number: int) -> None:
        trade = TRADES[number % len(TRADES)]
        super().__init__(
            model,
            reasoning=ReActReasoning,
            llm_model=LLM_MODEL,
            system_prompt=f"You are the {trade} of a small town and like company.",
            vision=_EARSHOT,
            internal_state=[f"trade: {trade}"],
        )
        self.name = f"the {trade} no. {number}"
        self.memory.display = False
        self.tool_manager = TOOLS
        self.said = 0

    def neighbours(self) -> list[Any]:
        """Who is in earshot."""
        found: list[Any] = self.model.grid.get_neighbors(self.pos, moore=True, include_center=False, radius=_EARSHOT)
        return found

    def step(self) -> None:
        tools = ["tell", "walk"] if self.neighbours() else ["walk"]
        plan = self.reasoning.plan(
            obs=self.generate_obs(),
            prompt="Find somebody to talk to, or go on talking. What do you do next?",
            selected_tools=tools,
        )
        self.apply_plan(plan)


class Town(Model):
    """So many residents on a square of 8 x 8."""

    def __init__(self, residents: int = 10, seed: int = 1) -> None:
        super().__init__(rng=seed)
        self.grid = MultiGrid(8, 8, torus=True)
        for number in range(residents):
            place = (self.random.randrange(8), self.random.randrange(8))
            self.grid.place_agent(Resident(self, number), place)
        self.datacollector = DataCollector(agent_reporters={"place": "pos", "said": "said"})

    def step(self) -> None:
        self.agents.shuffle_do("step")
        self.datacollector.collect(self)


def main(steps: int = 3) -> None:
    """Let some time pass in the town, and tell who said how much."""
    town = Town()
    for _ in range(steps):
        town.step()
    for agent in town.agents:
        print(f"{agent.name} at {agent.pos} has spoken {agent.said} times")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
