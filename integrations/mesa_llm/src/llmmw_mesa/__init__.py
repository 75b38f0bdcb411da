"""Mesa-LLM on llmmw. Importing this changes nothing; `install()` does.

from llmmw_mesa import install, step_agents

with install(enable_caching=True, rpm=600):
model.run_model()
"""

from llmmw_mesa.asking import one_shot
from llmmw_mesa.checks import Finding, Findings, check
from llmmw_mesa.collect import agent_reporters, model_reporters
from llmmw_mesa.installing import install, is_installed, uninstall
from llmmw_mesa.module import ModuleLLM
from llmmw_mesa.options import Options
from llmmw_mesa.parallel import (
    disable_automatic_parallel_stepping,
    enable_automatic_parallel_stepping,
    last_report,
)
from llmmw_mesa.report import Result, StepError, StepReport
from llmmw_mesa.shared import close_all, global_stats
from llmmw_mesa.stepping import astep_agents, step_agents

__all__ = [
    "Finding", "Findings", "ModuleLLM", "Options", "Result", "StepError", "StepReport", "agent_reporters",
    "astep_agents", "check",
    "close_all", "disable_automatic_parallel_stepping", "enable_automatic_parallel_stepping", "global_stats", "install",
    "is_installed", "last_report", "model_reporters", "one_shot", "step_agents", "uninstall",
]  # fmt: skip
