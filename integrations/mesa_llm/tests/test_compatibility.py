"""Mesa-LLM's own example models ask the same questions with and without `install()`."""

from __future__ import annotations

import http.client
import importlib
import json
import random
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import litellm
import pytest
from llmmw_mesa import global_stats, install
from mesa_llm.reasoning.cot import CoTReasoning
from mesa_llm.reasoning.react import ReActReasoning
from mesa_llm.reasoning.rewoo import ReWOOReasoning

from llmmw.testing.server import ServerConfig, server_process

SOURCES = Path(__file__).parents[3] / ".mesa" / "sources" / f"mesa_llm-{version('mesa-llm')}"
STEPS = 2
EXAMPLES = {
    "negotiation": ("NegotiationModel", {"initial_buyers": 2}),
    "epstein_civil_violence": ("EpsteinModel", {"initial_cops": 1, "initial_citizens": 2}),
    "sugarscrap_g1mt": ("SugarScapeModel", {"initial_traders": 2, "initial_resources": 3}),
}
pytestmark = [
    pytest.mark.skipif(not (SOURCES / "examples").is_dir(), reason=f"no sources of Mesa-LLM here ({SOURCES.name})"),
    pytest.mark.filterwarnings("ignore"),  # of the examples
]


@pytest.fixture(scope="module")
def _answering():
    """Every question with tools to choose from is answered with a call of one, so that the world changes."""
    with server_process(ServerConfig(any_model=True, reply_tokens=4, tool_marker="e")) as running:
        yield urlsplit(running.base_url)


def answer_of(server, path, body):
    asking = http.client.HTTPConnection(server.hostname, server.port)
    try:
        asking.request("POST", path, body, {"content-type": "application/json"})
        answer = asking.getresponse()
        return answer.status, answer.read()
    finally:
        asking.close()


@pytest.fixture
def recorder(_answering, monkeypatch):
    """The bodies of all requests, as they came over the wire; the same question always has the same answer."""
    bodies, answers = [], {}

    class Passing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append((self.path, json.loads(body)))
            if body not in answers:
                answers[body] = answer_of(_answering, self.path, body)
            status, content = answers[body]
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Passing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # 0.2 takes no api_base for agents, and its agenerate ignores it.
        for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}/v1")
        yield bodies
        server.shutdown()


def nobodys(bodies):
    """Each body without what names one object or one exchange."""
    plain = (json.dumps(body, sort_keys=True) for body in bodies)
    return Counter(re.sub(r"0x[0-9a-f]+|(call|chatcmpl)[-_]\w+", "X", text) for text in plain)


def run(name, reasoning):
    """A few steps of an example, always the same way."""
    kind, sizes = EXAMPLES[name]
    random.seed(7)
    model = getattr(importlib.import_module(f"examples.{name}.model"), kind)(
        width=3, height=3, reasoning=reasoning, llm_model="openai/llmmw-embedded", vision=2, seed=7,
        parallel_stepping=False, **sizes,
    )  # fmt: skip
    for _ in range(STEPS):
        model.step()


@pytest.mark.parametrize(
    ("name", "reasoning"),
    [("negotiation", ReActReasoning), ("epstein_civil_violence", CoTReasoning), ("sugarscrap_g1mt", ReWOOReasoning)],
)
def test_an_example_model_asks_the_same_with_and_without(recorder, monkeypatch, tmp_path, name, reasoning):
    monkeypatch.syspath_prepend(str(SOURCES))
    monkeypatch.chdir(tmp_path)  # some write recordings
    run(name, reasoning)
    bare = nobodys(recorder)
    recorder.clear()
    litellm.in_memory_llm_clients_cache.flush_cache()
    with install():
        run(name, reasoning)
        assert sum(stats["upstream_requests"] for stats in global_stats().values()) == len(recorder)
    assert sum(bare.values()) >= 2 * STEPS
    assert nobodys(recorder) == bare
