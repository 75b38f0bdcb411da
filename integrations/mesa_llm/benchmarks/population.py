"""The simulations that are measured: ReAct agents with a tool, agents that only sleep, and Mesa-LLM's own examples.

Runs in the environment of one Mesa-LLM, 0.2 or 0.3; nothing here knows who measures.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import random
import time
from typing import Any

from mesa import Agent, Model
from mesa_llm.llm_agent import LLMAgent
from mesa_llm.reasoning import react
from mesa_llm.reasoning.react import ReActReasoning
from mesa_llm.tools.tool_decorator import tool
from mesa_llm.tools.tool_manager import ToolManager
from pydantic import BaseModel, Field

FORAGING = ToolManager()
EXAMPLES = ("negotiation", "epstein", "sugarscrap")
_LEAST_S, _MOST_S = 0.2, 0.8


@tool(tool_manager=FORAGING)
def harvest(agent: Any, amount: int) -> str:
    """
    Harvest berries where the agent stands.

        Args:
            amount: How many berries to take.
            agent: Provided automatically

        Returns:
            What the agent has now.
    """
    agent.berries += int(amount)
    return f"agent {agent.unique_id} has {agent.berries} berries"


class Forager(LLMAgent):
    """Written as Mesa-LLM's examples are: observe, plan (one call), execute the plan by a tool (one more), apply it."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(
            model, reasoning=ReActReasoning, system_prompt="You gather berries with others.", vision=0, **options
        )
        self.tool_manager = FORAGING
        self.berries = 0
        self.took_s = 0.0
        self.acted = 0

    def step(self) -> None:
        began = time.perf_counter()
        plan = self.reasoning.plan(**self._asked())
        self.apply_plan(plan)
        self.acted += 1
        self.took_s = time.perf_counter() - began
        self.took_s = time.perf_counter() - began

    async def astep(self) -> None:
        plan = await self.reasoning.aplan(**self._asked())
        self.apply_plan(plan)
        self.acted += 1

    def _asked(self) -> dict[str, Any]:
        prompt = f"You have {self.berries} berries. Take as many as you need, but think of the others."
        asked = {"prompt": prompt, "obs": self.generate_obs(), "selected_tools": ["harvest"]}
        return asked | self.model.planning


class Sleeper(Agent):
    """What pull request #264 times in place of an LLM agent: a sleep of 200 to 800 ms."""

    def __init__(self, model: Any, **options: Any) -> None:
        del options
        super().__init__(model)

    def step(self) -> None:
        time.sleep(self.model.dice.uniform(_LEAST_S, _MOST_S))

    async def astep(self) -> None:
        await asyncio.sleep(self.model.dice.uniform(_LEAST_S, _MOST_S))


class Plain(Agent):
    """Steps in no time. That it has an `llm` makes llmmw step it side by side with others."""

    llm = None
    took_s = 0.0

    def __init__(self, model: Any, **_: Any) -> None:
        super().__init__(model)
        self.acted = 0

    def step(self) -> None:
        self.acted += 1


class Awaiting(Plain):
    """The same, awaited where steps are."""

    async def astep(self) -> None:
        self.acted += 1


class World(Model):
    """So many agents of a kind.

    Args:
        agents: how many.
        kind: of one of the classes above.
        parallel: whether it asks for parallel steps, the way Mesa-LLM's own models do.
        llm_model: what a Forager asks.
        planning: further arguments of each `plan()`.
    """

    def __init__(
        self, agents: int, kind: type[Agent], *, parallel: bool, llm_model: str, planning: dict[str, Any]
    ) -> None:
        super().__init__(seed=1)
        self.parallel_stepping = parallel
        self.planning = planning
        self.dice = random.Random(agents)
        for _ in range(agents):
            kind(self, llm_model=llm_model)

    def step(self) -> None:
        self.agents.shuffle_do("step")


def example(name: str, agents: int, *, parallel: bool, llm_model: str) -> Model:
    """One of Mesa-LLM's own models, with about that many agents; its `examples` folder must be importable."""
    folder = {"negotiation": "negotiation", "epstein": "epstein_civil_violence", "sugarscrap": "sugarscrap_g1mt"}[name]
    if name == "sugarscrap":
        random.seed(1)  # it does not draw from the model's numbers
    module = importlib.import_module(f"examples.{folder}.model")
    importlib.import_module(f"examples.{folder}.tools")
    made, sizes = {
        "negotiation": ("NegotiationModel", {"initial_buyers": agents - 2}),
        "epstein": ("EpsteinModel", {"initial_cops": agents // 4, "initial_citizens": agents - agents // 4}),
        "sugarscrap": ("SugarScapeModel", {"initial_traders": agents, "initial_resources": 2 * agents}),
    }[name]
    side = max(5, agents // 2)
    options: dict[str, Any] = {"width": side, "height": side, "reasoning": ReActReasoning, "vision": 2, "seed": 1}
    options |= {"llm_model": llm_model, "parallel_stepping": parallel}
    model_class = getattr(module, made)
    if "parallel_stepping" not in inspect.signature(inspect.unwrap(model_class.__init__)).parameters:
        del options["parallel_stepping"]
    model: Any = model_class(**sizes, **options)
    model.parallel_stepping = parallel
    return model


def shorter_answers() -> None:
    """For a model whose text is noise and never ends: ReAct's two answers are 8 to 24 small letters and spaces each.

    The server holds the model to the schema that it is sent.
    """

    class ReActOutput(BaseModel):
        reasoning: str = Field(pattern="^[a-z ]{8,24}$")
        action: str = Field(pattern="^[a-z ]{8,24}$")

    react.ReActOutput = ReActOutput
