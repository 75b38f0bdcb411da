"""`llmmw bench` against the real server."""

from __future__ import annotations

import json

import pytest

from llmmw import cli
from llmmw.bench.shapes import SHAPES

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def test_every_shape_is_answered_in_full(vllm, tmp_path, capsys):
    figures = tmp_path / "f.json"
    arguments = ["--base-url", vllm.url, "--model", vllm.model, "--n", "1,4,48", "--repeats", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments, "--max-tokens", "8", "--json", str(figures)])
    assert ended.value.code == 0
    found = json.loads(figures.read_text())
    assert [row["shape"] for row in found["rows"]] == list(SHAPES) * 3
    for row in found["rows"]:
        assert (row["skipped"], row["said"]) == ("", "")
        assert row["figures"]["failures"] == 0
        assert [sample["tokens"] for sample in row["samples"]] == [8 * row["calls"]]
    assert found["about"]["vllm"] is True
    assert "generate-batch: 48 at once over the best bare shape" in capsys.readouterr().out
