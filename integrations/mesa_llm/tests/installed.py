"""A pytest plugin that installs llmmw_mesa before anything is collected: `-p installed` over Mesa-LLM's own tests."""

from __future__ import annotations

import llmmw_mesa


def pytest_configure() -> None:
    """The process is a user's who has called `install()`."""
    llmmw_mesa.install()


def pytest_unconfigure() -> None:
    """And `uninstall()`."""
    llmmw_mesa.uninstall()
    llmmw_mesa.close_all()
