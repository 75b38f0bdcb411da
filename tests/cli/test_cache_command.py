"""`llmmw cache` as a stranger uses it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading

import pytest

from llmmw import Stack, TTLCache, cli


def run(capsys, *arguments, stdin=None, monkeypatch=None):
    """Exit status, standard output and error (or the message that the program ends with)."""
    if monkeypatch is not None and stdin is not None:
        monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(SystemExit) as ended:
        cli.main(["cache", *map(str, arguments)])
    printed = capsys.readouterr()
    code = ended.value.code
    return (1, printed.out, code) if isinstance(code, str) else (code, printed.out, printed.err)


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


def asker(place, ttl=300):
    @Stack(TTLCache(ttl, directory=place)).wrap
    def ask(prompt):
        return f"the answer to {prompt}"

    return ask


def fill(place, *prompts, ttl=300):
    ask = asker(place, ttl)
    for prompt in prompts:
        ask(prompt)
    ask.close()


def expire(place, count):
    with sqlite3.connect(place / "cache.db") as database:
        database.execute("UPDATE Cache SET expire_time = 1 WHERE rowid IN (SELECT rowid FROM Cache LIMIT ?)", (count,))
    database.close()


def test_stats_tell_answers_age_and_size_and_no_prompt(place, capsys):
    fill(place, "my prompt", "b", "c", ttl="2d")
    expire(place, 1)
    code, out, _ = run(capsys, "stats", "--directory", place)
    assert code == 0
    assert "3 answers, 1 of them expired" in out
    assert "ago" in out
    assert "expires in" in out
    assert "of 1.1 GB on disk" in out
    assert "my prompt" not in out
    code, out, _ = run(capsys, "stats", "-d", place, "--json")
    found = json.loads(out)
    assert (found["entries"], found["expired"], found["quarantined"], found["directory"]) == (3, 1, 0, str(place))
    assert 86400 < found["expires_last_s"] < 3 * 86400
    assert 0 <= found["newest_s"] <= found["oldest_s"] < 600


def test_the_directory_may_come_from_the_environment_and_must_come_from_somewhere(place, capsys, monkeypatch):
    code, _, err = run(capsys, "stats")
    assert code == 2
    assert "--directory" in err
    monkeypatch.setenv("LLMMW_CACHE_DIR", str(place))
    assert "no cache there yet" in run(capsys, "stats")[1]
    assert not place.exists()
    fill(place, "a")
    assert "1 answer," in run(capsys, "stats")[1]


def test_prune_deletes_what_expired_and_nothing_else(place, capsys):
    fill(place, "a", "b", "c")
    expire(place, 2)
    assert "2 expired answers deleted" in run(capsys, "prune", "-d", place)[1]
    assert json.loads(run(capsys, "prune", "-d", place, "--json")[1]) == {"directory": str(place), "removed": 0}
    assert json.loads(run(capsys, "stats", "-d", place, "--json")[1])["entries"] == 1


def test_clear_asks_first(place, capsys, monkeypatch):
    import io

    fill(place, "a", "b")
    code, _, err = run(capsys, "clear", "-d", place, stdin=io.StringIO("n\n"), monkeypatch=monkeypatch)
    assert code == 1
    assert "Delete every cached answer" in err
    code, _, _ = run(capsys, "clear", "-d", place, stdin=io.StringIO(""), monkeypatch=monkeypatch)
    assert code == 1
    assert json.loads(run(capsys, "stats", "-d", place, "--json")[1])["entries"] == 2
    code, out, _ = run(capsys, "clear", "-d", place, "--json", stdin=io.StringIO("y\n"), monkeypatch=monkeypatch)
    assert code == 0
    assert json.loads(out)["removed"] == 2
    assert "0 answers deleted" in run(capsys, "clear", "-d", place, "--yes")[1]


def test_clear_also_removes_what_is_broken(place, capsys):
    fill(place, "a")
    (place / "cache.db").write_bytes(b"rubbish" * 1000)
    (place / "cache.db.corrupt-17").write_bytes(b"old rubbish")
    code, _, err = run(capsys, "stats", "-d", place)
    assert code == 1
    assert err.startswith("llmmw: ")
    assert "clear" in err
    assert run(capsys, "clear", "-d", place, "--yes")[0] == 0
    assert "no cache there yet" in run(capsys, "stats", "-d", place)[1]


def test_quarantined_files_are_told(place, capsys):
    fill(place, "a")
    (place / "cache.db.corrupt-17").write_bytes(b"old rubbish")
    assert "1 broken file (11 B) put aside" in run(capsys, "stats", "-d", place)[1]


def test_what_is_not_ours_is_refused_in_one_line(tmp_path, place, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for command in (["stats"], ["prune"], ["clear", "--yes"]):
        code, _, err = run(capsys, *command, "-d", file)
        assert code == 1
        assert err.startswith("llmmw: ")
        assert "\n" not in err.strip()


def test_a_program_that_uses_the_directory_goes_on(place, capsys):
    ask = asker(place)
    going, asked = threading.Event(), []

    def use():
        while not going.is_set() or len(asked) < 20:
            assert ask(str(len(asked))).startswith("the answer")
            asked.append(1)

    user = threading.Thread(target=use)
    user.start()
    for command in (["stats"], ["prune"], ["clear", "--yes"]) * 3:
        assert run(capsys, *command, "-d", place)[0] == 0
    going.set()
    user.join(120)
    assert not user.is_alive()
    assert ask.get_performance_stats()["errors"] == 0
    ask.close()
    assert run(capsys, "stats", "-d", place)[0] == 0


def test_it_works_as_a_program_and_helps(place):
    def program(*arguments):
        command = [sys.executable, "-m", "llmmw.cli", "cache", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, check=False, env=os.environ | {"COLUMNS": "160"}
        )

    helped = program("--help")
    assert helped.returncode == 0
    for word in ("stats", "prune", "clear", "explain", "llmmw cache clear --yes"):
        assert word in helped.stdout
    fill(place, "a")
    assert "1 answer," in program("stats", "-d", str(place)).stdout
    for command in ("stats", "prune", "clear", "explain"):
        assert program(command, "--help").returncode == 0


# ── explain ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def explained(capsys, tmp_path, one, two, *options):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, body in zip(paths, (one, two), strict=True):
        path.write_text(body if isinstance(body, str) else json.dumps(body))
    return run(capsys, "explain", *paths, *options)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("one", "two", "field"),
    [
        (CHAT, CHAT | {"messages": [{"role": "user", "content": "b"}]}, "messages[0].content"),
        (CHAT, CHAT | {"temperature": 0}, "temperature"),
        (CHAT, CHAT | {"model": "n"}, "model"),
        (CHAT | {"extra_body": {"guided_choice": ["x"]}}, CHAT | {"guided_choice": ["y"]}, "guided_choice[0]"),
        ({"prompt": "a"}, {"prompt": "b"}, "prompt"),
        ({"input": ["a", "b"]}, {"input": ["a", "c"]}, "input[1]"),
        (CHAT, {"prompt": "a"}, "op"),
        (CHAT, CHAT | {"metadata": {"a": 1}, "stream": True}, None),
        (CHAT, dict(reversed(CHAT.items())), None),
    ],
)
def test_explain_names_the_field_in_which_two_requests_differ(capsys, tmp_path, one, two, field):
    code, out, _ = explained(capsys, tmp_path, one, two)
    assert code == 0
    assert (f"differ in {field}\n" in out) if field else ("the same question" in out)
    assert "Never counted: extra_headers, " in out
    found = json.loads(explained(capsys, tmp_path, one, two, "--json")[1])
    assert (found["field"], found["same"], found["uncacheable"]) == (field, field is None, [None, None])


def test_explain_says_what_differs_but_does_not_count(capsys, tmp_path):
    out = explained(capsys, tmp_path, CHAT, CHAT | {"metadata": {"a": 1}, "stream": True})[1]
    assert "they also differ in metadata, stream, which never counts" in out


def test_explain_says_what_is_never_cached(capsys, tmp_path):
    image = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    one = CHAT | {"messages": [{"role": "user", "content": [image]}]}
    out = explained(capsys, tmp_path, one, CHAT)[1]
    assert "a.json is never cached: remote content that can change" in out
    assert "the same question" not in out
    found = json.loads(explained(capsys, tmp_path, one, CHAT, "--json")[1])
    assert (found["same"], found["field"]) == (False, None)


@pytest.mark.parametrize("wrong", ["{", "[1]", "7", '{"model": "m"}', "\\xff"])
def test_explain_refuses_what_is_no_request(capsys, tmp_path, wrong):
    code, _, err = explained(capsys, tmp_path, wrong, CHAT)
    assert code == 1
    assert err.startswith("llmmw: ")
    assert "a.json" in err


def test_explain_takes_the_operation_where_a_body_does_not_tell_it(capsys, tmp_path):
    assert explained(capsys, tmp_path, {"instructions": "a"}, {"instructions": "b"}, "--op", "responses")[0] == 0
    assert explained(capsys, tmp_path, CHAT, CHAT, "--op", "guess")[0] == 2
    assert run(capsys, "explain", tmp_path / "absent.json", tmp_path / "absent.json")[0] == 1
