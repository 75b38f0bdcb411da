"""The README's code runs as it stands, in one process after another; the worked example too."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from pathlib import Path

import pytest

from llmmw.testing.server import ServerConfig, server_process

HERE = Path(__file__).parents[1]
README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def calling():
    """A server that calls a tool whenever one may be called."""
    with server_process(ServerConfig(any_model=True, tool_marker=" ")) as running:
        yield running


@pytest.fixture
def examples(calling, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "examples"))
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.setenv(name, calling.base_url)
    yield
    for name in ("town", "before_and_after"):
        sys.modules.pop(name, None)


def test_every_block_runs_in_order(calling, examples):
    assert len(BLOCKS) >= 8
    names, told = {}, io.StringIO()
    with contextlib.redirect_stdout(told), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        for number, block in enumerate(BLOCKS):
            text = block.replace("http://127.0.0.1:8000/v1", calling.base_url)
            exec(compile(text, f"README block {number}", "exec"), names)
    for line in ("4 3 0.75 0", "[6, 6]", "[2, 2, 2, 2, 2, 2]", "True"):
        assert f"\n{line}\n" in f"\n{told.getvalue()}"
    assert calling.stats(0)["received"] > 20


def test_the_worked_example_runs_both_ways(examples, monkeypatch, capsys):
    import before_and_after

    monkeypatch.setattr(sys, "argv", ["before_and_after", "--residents", "2", "--steps", "1", "--latency", "0.01"])
    before_and_after.main()
    told = capsys.readouterr().out
    for line in ("before", "after"):
        assert re.search(rf"^{line} .* 4 requests", told, re.MULTILINE)
    assert "x faster" in told


def test_the_towns_own_program(examples, capsys):
    import town

    town.main(1)
    assert "has spoken" in capsys.readouterr().out


def test_every_option_is_in_the_table():
    from llmmw_mesa import Options

    table = README.partition("## Options")[2].partition("\n## ")[0]
    missing = [name for name in Options.__dataclass_fields__ if name != "_" and f"`{name}`" not in table]
    assert missing == []
