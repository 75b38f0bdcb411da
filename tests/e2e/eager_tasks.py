"""A pytest plugin: every loop of a test runs its tasks eagerly (Python 3.12 and newer). `pytest -p eager_tasks`."""

from __future__ import annotations

import asyncio

from llmmw.testing import clock


class EagerManualLoop(clock.ManualLoop):
    """A loop on the test's clock."""

    def __init__(self, manual):
        super().__init__(manual)
        self.set_task_factory(asyncio.eager_task_factory)


class EagerPolicy(asyncio.DefaultEventLoopPolicy):
    """For tests in real time."""

    def new_event_loop(self):
        loop = super().new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop


clock.ManualLoop = EagerManualLoop
asyncio.set_event_loop_policy(EagerPolicy())
