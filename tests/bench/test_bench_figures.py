"""What a bench computes from its waves, by hand."""

from __future__ import annotations

import math

import pytest

from llmmw.bench.figures import Claim, Row, Sample, claims, extrapolated, paired_ratio, quantile
from llmmw.bench.report import as_values, notes, table


def row(shape, calls, *walls, failures=0, **more):
    samples = [Sample(wall, wall / 10, (wall,) * (calls - failures), calls * 8, failures) for wall in walls]
    return Row(shape, calls, samples, **more)


def test_figures_are_medians_of_the_repeats_and_quantiles_of_all_answers():
    one = Sample(1.0, 0.2, (0.1, 0.2, 0.3, 0.4), 40)
    two = Sample(3.0, 0.4, (0.5, 0.6, 0.7), 60, failures=1)
    six = Sample(2.0, 0.6, (0.8, 0.9, 1.0, 2.0), 20)
    assert Row("client", 4, [one, two, six]).figures() == {
        "wall_s": 2.0, "best_s": 1.0, "tokens_per_s": 20.0, "p50_s": 0.6, "p99_s": 2.0, "cpu_ms": 100.0, "failures": 1,
    }  # fmt: skip


def test_a_row_without_samples_has_no_figures():
    empty = Row("batch", 4, skipped="404")
    assert set(empty.figures().values()) == {None}
    assert math.isnan(empty.wall_s)
    assert math.isnan(paired_ratio(empty, row("client", 4, 1.0)))


@pytest.mark.parametrize(("share", "found"), [(0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.99, 4), (1, 4)])
def test_a_quantile_is_one_of_the_values(share, found):
    assert quantile([3, 1, 4, 2], share) == found
    assert quantile([], share) is None


def test_extrapolation_is_in_proportion_and_says_so():
    far = extrapolated(row("one-by-one", 16, 8.0, 4.0), 64)
    assert [sample.wall_s for sample in far.samples] == [32.0, 16.0]
    assert far.measured_at == 16
    assert far.figures()["cpu_ms"] == row("one-by-one", 16, 8.0, 4.0).figures()["cpu_ms"]
    assert far.figures()["tokens_per_s"] == row("one-by-one", 16, 8.0, 4.0).figures()["tokens_per_s"]


def test_a_ratio_compares_neighbours_in_time():
    """The second repeat fell into a slow minute: medians of their own would say 2."""
    assert paired_ratio(row("a", 1, 1.1, 2.2, 1.1), row("b", 1, 1.0, 2.0, 1.0)) == pytest.approx(1.1)
    assert paired_ratio(row("a", 1, 4.0), row("b", 1, 2.0, 9.0)) == 2.0


def test_the_agents_claim_is_judged_for_llmmw_alone():
    found = claims([row("client", 1, 1.0), row("client", 4, 1.2), row("one-by-one", 1, 1.0), row("one-by-one", 4, 4.0)])
    assert [(claim.ratio, claim.most, claim.ok) for claim in found] == [(4.0, None, True), (1.2, 1.15, False)]


def test_the_batch_claim_is_about_the_largest_wave_and_the_best_bare_shape_that_lost_nothing():
    rows = [row(shape, 256, wall) for shape, wall in (("aiohttp", 3.0), ("batch", 2.0), ("generate-batch", 2.2))]
    rows += [row("list", 256, 0.5, failures=200), row("generate-batch", 64, 9.0), row("batch", 64, 1.0)]
    (claim,) = claims(rows)
    assert (claim.ratio, claim.ok) == (pytest.approx(1.1), True)
    assert "256" in claim.text
    assert "(batch)" in claim.text


def test_nothing_is_claimed_of_a_wave_that_lost_answers_and_so_took_less_time():
    rows = [row("client", 1, 1.0), row("client", 4, 1.0, failures=2), row("batch", 64, 2.0)]
    assert claims([*rows, row("generate-batch", 64, 0.5, failures=60)]) == []


def test_the_least_of_each_shows_what_other_programs_cost():
    (claim,) = claims([row("client", 1, 1.0, 1.1, 3.0), row("client", 4, 2.0, 2.2, 1.05)])
    assert (claim.ratio, claim.least) == (2.0, 1.05)


def test_nothing_is_claimed_of_what_was_not_measured():
    assert claims([]) == []
    assert claims([row("client", 4, 1.0), row("generate-batch", 16, 2.0), row("batch", 16, 1.0)]) == []
    assert claims([row("generate-batch", 64, 2.0), Row("batch", 64, skipped="404")]) == []
    assert claims([row("client", 1, 1.0), Row("client", 4)]) == []
    assert Claim("x", 1.2, 1.0, 1.1).ok is False


def test_the_notes_say_what_is_not_in_the_table():
    rows = [
        row("client", 1, 1.0),
        row("client", 4, 1.0),
        extrapolated(row("one-by-one", 4, 1.0), 16),
        Row("batch", 4, skipped="StatusError: 404"),
        Row("batch", 16, skipped="StatusError: 404"),
        row("sdk", 16, 1.0, failures=3, said="ReadError: gone"),
    ]
    assert notes(rows) == [
        "client: 4 agents over one: x 1.00, least over least x 1.00 (at most 1.15: ok)",
        "one-by-one~: from 4 calls, in proportion",
        "batch skipped at 4, 16: StatusError: 404",
        "sdk failed at 16: ReadError: gone",
    ]


def test_the_table_and_the_values_have_every_row():
    rows = [
        row("client", 1, 0.5),
        Row("batch", 1, skipped="404"),
        Row("list", 1),
        row("client", 400, 250.0, 12.0, 12.0),
    ]
    shown = table(rows, title="t")
    assert shown.row_count == 4
    cells = [list(column.cells) for column in shown.columns]
    assert cells[2] == ["0.500", "skipped", "-", "12.0"]
    values = as_values(rows, {"label": "t"})
    assert [one["figures"]["wall_s"] for one in values["rows"]] == [0.5, None, None, 12.0]
    assert values["claims"] == []


def test_the_best_of_a_section_lost_no_answer():
    rows = [row("sdk", 4, 0.1, failures=4), row("client", 4, 2.0), row("list", 4, 3.0), row("sdk", 8, 1.0, failures=1)]
    assert list(table(rows, title="t").columns[3].cells) == ["0.05", "1.00", "1.50", ""]
