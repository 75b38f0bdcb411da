"""A vLLM scheduler that gives a tiny model on CPU the step times of a large one on a GPU (emulated).

`STEP_PAD=1` makes serve.sh load it (`--scheduler-cls step_pad.PaddedScheduler`). A step that computes tokens
then lasts at least

    STEP_PAD_MS + STEP_PAD_PREFILL_US * prompt tokens + STEP_PAD_SEQ_US * sequences

(defaults 8 ms, 25 us, 30 us: roughly an 8B model on one large GPU, an assumption). The rest of the step is slept,
between the model's run and the moment its tokens are handed out, so that
- the cores stay free for the client under test;
- a request that arrives during a step waits for the next one, and tokens appear when the step ends, as on a device.
Batching, queueing, prefix cache, priorities, aborts and metrics stay vLLM's own; only the clock is emulated, so
label every figure taken this way *emulated*. The class relies on the CPU platform running steps one by one
(vLLM switches asynchronous scheduling off there).
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

BASE_S = float(os.environ.get("STEP_PAD_MS", "8")) / 1e3
PER_PROMPT_TOKEN_S = float(os.environ.get("STEP_PAD_PREFILL_US", "25")) / 1e6
PER_SEQUENCE_S = float(os.environ.get("STEP_PAD_SEQ_US", "30")) / 1e6


def step_duration(tokens: int, sequences: int) -> float:
    """Seconds one step takes on the emulated device; every sequence computes one token that is not prefill."""
    return BASE_S + PER_PROMPT_TOKEN_S * max(0, tokens - sequences) + PER_SEQUENCE_S * sequences


class PaddedScheduler(Scheduler):
    """vLLM's own scheduler, whose steps take the emulated device's time."""

    _started = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Note when the device starts on the step."""
        step = super().schedule(*args, **kwargs)
        self._started = time.perf_counter()
        return step

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Hand out the step's tokens once the emulated device would have computed them."""
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens:
            due = self._started + step_duration(tokens, len(scheduler_output.num_scheduled_tokens))
            time.sleep(max(0.0, due - time.perf_counter()))
        return super().update_from_output(scheduler_output, model_runner_output)
