"""What was asked for each agent and each model: counted as it happens, kept as long as they live, nothing per step."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from llmmw import Reply, Usage
    from llmmw_mesa.acting import Part

NAMES = ("calls", "hits", "joined", "failures", "upstream", "tokens_in", "tokens_out", "tokens_saved")
"""calls: questions asked, by code. hits: answered from the cache. joined: answered with another's answer. failures:
ended in an exception. upstream: requests sent, repetitions included. tokens_in, tokens_out: of those requests, as the
server counted them. tokens_saved: of answers that were not asked for again."""


class Figures:
    """Sums of one agent, one model, or one ModuleLLM."""

    __slots__ = NAMES

    def __init__(self) -> None:
        self.calls = self.hits = self.joined = self.failures = 0
        self.upstream = self.tokens_in = self.tokens_out = self.tokens_saved = 0

    def snapshot(self) -> dict[str, int]:
        """All of one moment."""
        with _ledger.lock:
            return {name: getattr(self, name) for name in NAMES}


class _Ledger:
    """All figures of the process, and the lock under which they change."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.agents: WeakKeyDictionary[Any, Figures] = WeakKeyDictionary()
        self.models: WeakKeyDictionary[Any, Figures] = WeakKeyDictionary()
        self.nobodys = Figures()

    def renew_lock(self) -> None:
        """In a forked child: whoever held the lock does not exist there."""
        self.lock = threading.Lock()


_ledger = _Ledger()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ledger.renew_lock)


class Account:
    """On whom one call is counted: its ModuleLLM, the agent whose step it belongs to, and that agent's model.

    Args:
        part: the step that the call was made in.
        figures: those of the ModuleLLM.
        alone: likewise, for calls outside of any step.
    """

    __slots__ = ("_counted", "requests")

    def __init__(self, part: Part | None, figures: Figures, alone: Figures) -> None:
        self.requests = 0
        """How many this call has sent itself."""
        with _ledger.lock:
            if part is None:
                self._counted = (figures, alone, _ledger.nobodys)
            else:
                model = _ledger.nobodys if part.model is None else _of(_ledger.models, part.model)
                self._counted = (figures, _of(_ledger.agents, part.agent), model)
            for one in self._counted:
                one.calls += 1

    def ended(self, reply: Reply | None) -> None:
        """A call has ended; None: with an exception."""
        failed = reply is None or not reply.ok
        source = "" if reply is None or failed else reply.source
        with _ledger.lock:
            for one in self._counted:
                one.failures += failed
                one.hits += source == "cache"
                one.joined += source == "coalesced"
                if reply is not None and source in {"cache", "coalesced"}:
                    one.tokens_saved += reply.usage.total_tokens

    def sent(self) -> None:
        """A request goes out."""
        self.requests += 1
        with _ledger.lock:
            for one in self._counted:
                one.upstream += 1

    def used(self, usage: Usage) -> None:
        """It was answered, and cost so much."""
        with _ledger.lock:
            for one in self._counted:
                one.tokens_in += usage.input_tokens
                one.tokens_out += usage.output_tokens


def of_agent(agent: Any) -> Figures:
    """What was asked in the steps of this agent."""
    with _ledger.lock:
        return _of(_ledger.agents, agent)


def of_model(model: Any) -> Figures:
    """What was asked in the steps of this model's agents, those that are gone included."""
    with _ledger.lock:
        return _of(_ledger.models, model)


def of_nobody() -> Figures:
    """What was asked outside of any step, in the whole process."""
    return _ledger.nobodys


def _of(place: WeakKeyDictionary[Any, Figures], who: Any) -> Figures:
    found = place.get(who)
    if found is None:
        found = place[who] = Figures()
    return found
