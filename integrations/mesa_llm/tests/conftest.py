"""A simulation of LLM agents and a server for it: the embedded one, in a process of its own."""

from __future__ import annotations

import gc
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM fetches it from the internet otherwise

import litellm
import llmmw_mesa
import pytest
from worlds import World

from llmmw.testing.server import ServerConfig, server_process

gc.collect()
gc.freeze()  # all that LiteLLM has imported: every later collection would look at it once more


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    for name in ("LLMMW_CACHE", "LLMMW_CACHE_DIR", "LLMMW_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    yield
    llmmw_mesa.disable_automatic_parallel_stepping()
    llmmw_mesa.uninstall()
    llmmw_mesa.close_all()
    litellm.in_memory_llm_clients_cache.flush_cache()


@pytest.fixture(scope="session")
def _server():
    with server_process(ServerConfig(any_model=True, latency="fixed", latency_s=0.005, keepalive_s=600)) as running:
        yield running


@pytest.fixture
def server(_server):
    _server.clear_faults()
    _server.configure(latency_s=0.005, rpm=None)
    _server.reset()
    return _server


@pytest.fixture
def world(server):
    return lambda agents, **options: World(agents, server.base_url, **options)
