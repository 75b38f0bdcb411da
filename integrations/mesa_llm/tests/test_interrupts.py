"""Ctrl-C, the end of the interpreter and forks, while agents step: it comes out, and nothing stays under way."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest
from llmmw_mesa import StepError, astep_agents, step_agents
from mesa import Agent, Model
from programs import fresh

PATIENCE_S = 90


class Waiting(Agent):
    """Waits for ever, and tells when it is ended."""

    ended = False

    async def astep(self):
        self.model.here.release()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True


class Pressing(Agent):
    """Presses Ctrl-C when all others are waiting; this comes from the operating system, as a user's does."""

    def step(self):
        for _ in range(self.model.waiting):
            assert self.model.here.acquire(timeout=PATIENCE_S)
        os.kill(os.getpid(), signal.SIGINT)


class Raising(Pressing):
    """The same, from within its own code."""

    def step(self):
        for _ in range(self.model.waiting):
            assert self.model.here.acquire(timeout=PATIENCE_S)
        raise KeyboardInterrupt


class RaisingAsync(Agent):
    async def astep(self):
        for _ in range(self.model.waiting):
            assert await asyncio.to_thread(self.model.here.acquire, timeout=PATIENCE_S)
        raise KeyboardInterrupt


def population(kind):
    model = Model()
    model.here, model.waiting = threading.Semaphore(0), 3
    for _ in range(model.waiting):
        Waiting(model)
    kind(model)
    return model


def in_plain_code(model, mode):
    step_agents(model.agents, mode=mode)


def beside_a_running_loop(model, mode):
    """As in a notebook: the loop that runs does not look after Ctrl-C."""

    async def main():
        step_agents(model.agents, mode=mode)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def awaited(model, mode):
    asyncio.run(astep_agents(model.agents, mode=mode))


@pytest.mark.parametrize("mode", ["overlap", "snapshot"])
@pytest.mark.parametrize("kind", [Pressing, Raising, RaisingAsync])
@pytest.mark.parametrize("how", [in_plain_code, beside_a_running_loop, awaited])
def test_ctrl_c_comes_out_and_nothing_stays_under_way(how, kind, mode):
    before = set(threading.enumerate())
    model = population(kind)
    with pytest.raises(KeyboardInterrupt):
        how(model, mode)
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("mesa-step"):
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    waiting = [agent for agent in model.agents if isinstance(agent, Waiting)]
    assert all(agent.ended for agent in waiting)
    for agent in waiting:
        agent.remove()
    model.waiting = 0
    for agent in model.agents:
        agent.step = lambda: None
    assert step_agents(model.agents, mode=mode).ok


PROGRAM = """
import os, sys, threading, warnings, asyncio
from mesa import Agent, Model
from llmmw_mesa import step_agents
warnings.simplefilter("ignore")

class Hanging(Agent):
    def step(self):
        threading.Event().wait()

class Stubborn(Agent):
    async def astep(self):
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

class Good(Agent):
    steps = 0
    async def astep(self):
        await asyncio.sleep(0)
        self.steps += 1

class Plain(Good):
    async def astep(self):
        await asyncio.to_thread(lambda: None)
        self.steps += 1

good = Model()
for kind in (Good, Plain):
    for _ in range(3):
        kind(good)
assert step_agents(good.agents).ok
child = os.fork()
if not child:
    for mode in ("overlap", "snapshot"):
        assert step_agents(good.agents, mode=mode).ok
    os._exit(0 if {agent.steps for agent in good.agents} == {3} else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert step_agents(good.agents).ok
assert {agent.steps for agent in good.agents} == {2}
print("forked", flush=True)

bad = Model()
Hanging(bad), Stubborn(bad), Good(bad)
for mode in ("overlap", "snapshot"):
    report = step_agents(bad.agents, mode=mode, timeout=0.2, on_error="skip")
    assert {type(agent) for agent, done, _ in report if not done} >= {Hanging, Stubborn}, report
print("hanging", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_steps_and_steps_that_hang_do_not_keep_the_interpreter():
    assert fresh(PROGRAM).split() == ["forked", "hanging"]


def test_an_exit_in_a_step_comes_out():
    class Leaving(Agent):
        def step(self):
            raise SystemExit(3)

    model = Model()
    Leaving(model)
    with pytest.raises(SystemExit) as caught:
        step_agents(model.agents)
    assert caught.value.code == 3
    assert not isinstance(caught.value, StepError)
