"""The command line as a stranger uses it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmmw import __version__, cli
from llmmw.testing.server import ServerConfig, server_process


def run(*arguments, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "llmmw.cli", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def test_help_lists_the_commands():
    found = run("--help")
    assert found.returncode == 0
    for command in ("demo", "serve", "explain", "version"):
        assert command in found.stdout


def test_serve_has_the_servers_own_help():
    found = run("serve", "--help")
    assert found.returncode == 0
    assert "--max-num-seqs" in found.stdout


def test_explain_prints_the_stack_and_version_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", "--rpm", "60", "--deadline", "1m"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "RateLimiter(rpm=60" in text
    assert "cache > limit" in text
    with pytest.raises(SystemExit):
        cli.main(["version"])
    assert capsys.readouterr().out.strip() == __version__


def test_a_wrong_option_is_one_line_and_not_a_traceback():
    found = run("explain", "--cache-ttl", "soon")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert found.stderr.startswith("llmmw: ")
    assert "'soon'" in found.stderr
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--base-url", "http://127.0.0.1:1/v1"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("url", "said"), [("127.0.0.1:1", "base_url: must start"), ("http://127.0.0.1:1/v1", "127.0.0.1:1")]
)
def test_the_demo_asks_a_strange_server_once_before_it_asks_everything(url, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--base-url", url, "--model", "m"])
    assert str(ended.value.code).startswith("llmmw: ")
    assert said in ended.value.code


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"pip install 'llmmw\[cli\]'"):
        cli.main(["version"])


def test_the_demo_runs_against_any_server_and_writes_its_figures(tmp_path, capsys):
    with server_process(ServerConfig(reply_tokens=4)) as server:
        arguments = ["demo", "--base-url", server.base_url, "--model", "llmmw-embedded", "--agents", "3"]
        arguments += ["--ticks", "2", "--json", str(tmp_path / "f.json"), "--chart", str(tmp_path / "c.svg")]
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
    assert ended.value.code == 0
    assert "bare SDK, one by one" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())
    one, many, ours = figures["ways"]
    # 18 questions: 2 shared by three agents, 6 of their own, 3 asked again in the second tick.
    assert one["upstream_calls"] == many["upstream_calls"] == 18
    assert ours["upstream_calls"] == 2 + 6 + 3
    assert ours["failures"] == 0
    assert ours["hit_rate"] > 0
    assert ours["tokens"] < one["tokens"]
    assert ours["stats"]["request_count"] == 18
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
