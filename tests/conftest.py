"""What holds for every test: no verdict depends on how fast the machine is."""

from __future__ import annotations

import patience
from hypothesis import HealthCheck, settings

assert patience.PATIENCE_S

# How long an example may take to make says how busy the machine is, nothing about the code.
settings.register_profile("llmmw", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmmw")
