"""`llmmw bench` as a stranger uses it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from llmmw import cli
from llmmw.bench.run import Bench
from llmmw.bench.shapes import SHAPES
from llmmw.testing.server import ServerConfig, server_process


def run(capsys, *arguments):
    """Exit status, standard output and error (or the message that the program ends with)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *map(str, arguments)])
    printed = capsys.readouterr()
    code = ended.value.code
    return (1, printed.out, code) if isinstance(code, str) else (code, printed.out, printed.err)


@pytest.fixture(scope="module")
def server():
    with server_process(ServerConfig(models=("tiny",), api_keys=("right",))) as process:
        yield process


QUICK = ["--n", "1,4", "--repeats", "1", "--max-tokens", "2", "--shapes", "client,one-by-one"]


def test_without_a_url_the_embedded_server_is_measured_and_called_emulated(tmp_path, capsys):
    figures, chart = tmp_path / "new" / "f.json", tmp_path / "c.svg"
    code, out, err = run(capsys, *QUICK, "--shapes", "all", "--json", figures, "--chart", chart)
    assert code == 0
    assert "emulated" in out
    assert "client: 4 agents over one: x " in out
    assert "[1/14] 1 calls: one-by-one" in err
    found = json.loads(figures.read_text())
    assert [row["shape"] for row in found["rows"]] == list(SHAPES) * 2
    assert [row["said"] for row in found["rows"] if not row["figures"]["tokens_per_s"]] == []
    assert [claim["text"][:6] for claim in found["claims"]] == ["one-by", "client"]
    about = found["about"]
    assert (about["model"], about["max_tokens"], about["whole"]) == ("llmmw-embedded", 2, True)
    assert about["date"].startswith("20")
    assert chart.read_text().startswith("<?xml")


def test_the_credential_comes_from_a_variable_and_is_written_nowhere(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BENCH_KEY", "right")
    figures = tmp_path / "f.json"
    code, out, _ = run(capsys, "--base-url", server.base_url, "--api-key-env", "BENCH_KEY", "--json", figures, *QUICK)
    assert code == 0
    assert f"tiny at {server.base_url}" in out
    assert "right" not in figures.read_text() + out
    code, _, err = run(capsys, "--base-url", server.base_url, *QUICK)
    assert code == 1
    assert err.startswith("llmmw: ")
    assert "401" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", "http://127.0.0.1:1/v1"], "llmmw: no connection: .*127.0.0.1"),
        (["--base-url", "127.0.0.1:8000"], "llmmw: base_url: must start with http"),
        (["--concurrency", "many"], "llmmw: .*concurrency"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert re.match(said, err)
    assert "\n" not in err
    assert out == ""


def test_an_unknown_model_is_told_with_those_that_are_there(server, capsys, monkeypatch):
    monkeypatch.setenv("BENCH_KEY", "right")
    arguments = ["--base-url", server.base_url, "--api-key-env", "BENCH_KEY", "--model", "large"]
    assert "model='large'" in (said := run(capsys, *arguments)[2])
    assert said.endswith("it has tiny")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n", "1,x"], "1,x"),
        (["--n", "0"], "from 1 to 4096"),
        (["--n", "5000"], "from 1 to 4096"),
        (["--shapes", "client,walk"], "walk"),
        (["--api-key-env", "NOBODY_SET_THIS"], "NOBODY_SET_THIS"),
        (["--repeats", "0"], "repeats"),
    ],
)
def test_a_wrong_option_is_named(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert said in err


def test_a_chart_that_cannot_be_drawn_is_told_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(capsys, *QUICK, "--chart", tmp_path / "c.png")
    assert (code, out) == (1, "")
    assert "pip install 'llmmw[demo]'" in err


@pytest.mark.parametrize(
    ("option", "path", "said"),
    [("--json", "file/f.json", "file/f.json: "), ("--json", ".", "Is a directory"), ("--chart", "c.doc", ".png, ")],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(capsys, tmp_path, option, path, said):
    (tmp_path / "file").write_text("")
    for command in ("bench", "demo"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, option, str(tmp_path / path)])
        assert str(ended.value.code).startswith("llmmw: ")
        assert said in ended.value.code
        assert capsys.readouterr().out == ""


def test_check_fails_where_a_promise_is_broken(capsys, monkeypatch):
    monkeypatch.setattr("llmmw.bench.figures.MOST_AGENTS", 0.0)
    code, out, _ = run(capsys, *QUICK, "--check")
    assert code == 1
    assert "OVER" in out
    assert run(capsys, *QUICK)[0] == 0


def test_an_interrupted_run_shows_what_it_has(capsys, monkeypatch, tmp_path):
    wave = Bench._wave

    async def interrupted(self, shape, row):
        if shape.name == "one-by-one" and row.calls == 4:
            raise KeyboardInterrupt
        await wave(self, shape, row)

    monkeypatch.setattr(Bench, "_wave", interrupted)
    figures = tmp_path / "f.json"
    code, out, err = run(capsys, *QUICK, "--json", figures)
    assert code == 130
    assert "interrupted" in err
    assert "│    1│client" in out
    assert json.loads(figures.read_text())["about"]["whole"] is False


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = run(capsys, *QUICK)
    assert code == 0
    assert "4/4" in out
    assert err == ""


def test_help_names_every_shape_and_is_quick():
    code = "import sys; from llmmw import cli\ntry: cli.main(['bench', '--help'])\nfinally: print(set(sys.modules))"
    wide = os.environ | {"COLUMNS": "120"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False, env=wide
    )
    assert found.returncode == 0
    assert all(f"\n {name} " in found.stdout for name in SHAPES)
    assert not re.search("'(aiohttp|openai|matplotlib|diskcache)'", found.stdout)
