"""Simulations of LLM agents, small and plain."""

from __future__ import annotations

from mesa import Model
from mesa_llm.llm_agent import LLMAgent
from mesa_llm.memory.st_memory import ShortTermMemory
from mesa_llm.reasoning.react import ReActReasoning

MODEL = "openai/llmmw-embedded"


class Questioner(LLMAgent):
    """Knows what to ask; has no step of its own."""

    def __init__(self, model, api_base, **options):
        super().__init__(model, reasoning=ReActReasoning, llm_model=MODEL, system_prompt="You think.", **options)
        if hasattr(self.llm, "api_base"):
            self.llm.api_base = api_base
        self.memory = ShortTermMemory(agent=self, n=5, display=False)
        self.done = []

    def question(self):
        return f"I am {self.unique_id} at step {self.model.steps}"


class Thinker(Questioner):
    """Thinks once a step; async and sync alike."""

    def step(self):
        self.done.append(self.llm.generate(self.question()).choices[0].message.content)

    async def astep(self):
        answer = await self.llm.agenerate(self.question())
        self.done.append(answer.choices[0].message.content)


class StandingClock:
    """In the place of `time`: none passes but what a test lets pass, so that no pause of a machine is a time-out."""

    def __init__(self, monkeypatch):
        self._now = 1000.0
        monkeypatch.setattr("llmmw_mesa.running.time", self)

    def monotonic(self):
        return self._now

    def advance(self):
        """By more than any time-out."""
        self._now += 1000.0


class World(Model):
    def __init__(self, agents, api_base, kind=Thinker, **options):
        super().__init__()
        self.parallel_stepping = False
        for _ in range(agents):
            kind(self, api_base, **options)

    def step(self):
        self.agents.shuffle_do("step")
