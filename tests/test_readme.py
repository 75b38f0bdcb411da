"""The README's Python runs as it stands, piece after piece, against the embedded server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path

import openai
import pytest

import llmmw
from llmmw.testing.server import ServerConfig, server_process

README = (Path(__file__).parent.parent / "README.md").read_text()
PIECES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def compiled(piece, number):
    return compile(piece, f"README piece {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs pieces in one namespace, as somebody does who pastes them; plain ones outside any event loop."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with server_process(ServerConfig(any_model=True)) as server, asyncio.Runner() as runner:
        names = {}

        def run(piece, number):
            code = compiled(piece.replace("http://127.0.0.1:8000/v1", server.base_url), number)
            result = eval(code, names)
            if inspect.iscoroutine(result):
                runner.run(result)

        run.names, run.server = names, server
        yield run


def test_the_readme_runs_from_top_to_bottom(run, capsys):
    assert len(PIECES) >= 7
    for number, piece in enumerate(PIECES, 1):
        run(piece, number)
    names = run.names
    assert names["ask"].get_performance_stats()["cache_hits"] == 1
    assert [outcome.ok for outcome in names["outcomes"]] == [True] * 64
    assert isinstance(names["completion"], openai.types.chat.ChatCompletion)
    said = capsys.readouterr().out
    assert "why this order" in said
    assert "'alice'" in said
    assert {request["status"] for request in run.server.stats()["requests"]} == {200}


def test_the_statistics_that_the_readme_promises_exist():
    (paragraph,) = re.findall(r"These keys always exist: (.*?)\. Every call", README, re.DOTALL)
    stats = llmmw.Stack().wrap(lambda: None).get_performance_stats()
    promised = re.findall(r"`(\w+)`", paragraph)
    assert len(promised) > 20
    assert set(promised) <= stats.keys()


def test_every_name_that_the_readme_shows_exists():
    for name in re.findall(r"llmmw\.(\w+)\(", README):
        assert hasattr(llmmw, name), name
    layers = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert len(layers) == 11
    for name in layers:
        assert name in llmmw.__all__
    for name in re.findall(r"`([A-Z]\w+(?:Error|Failed|Limited|Open|Full|Exceeded|Timeout))`", README):
        assert issubclass(getattr(llmmw, name), llmmw.LLMMWError) or name == "Timeout"


def test_the_targets_that_the_readme_names_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^ *)make ([a-z-]+)(?:`|$)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
