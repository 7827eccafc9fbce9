"""Tables: the numbers of the analysis, printed with their errors, nulls and counts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from depthscope.app.figures import FIGURES
from depthscope.app.figures.build.curve_figure import limit_labels
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.readings import read_runs
from depthscope.app.tables import tables
from depthscope.app.tables.comparison import comparison_table, summary_table
from depthscope.app.tables.findings import findings_table
from depthscope.app.tables.formats import to_latex
from depthscope.app.tables.tables import depth_table, mixing_table, slug
from depthscope.app.text.latex import VENUES
from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE, Finding, Severity
from depthscope.diagnostics.verdicts.declaration import Limits


@pytest.fixture(scope="module")
def readings(residual_run, mhc_run):
    return read_runs({"plain": residual_run, "m_1 & <2>": mhc_run})


FINDING = Finding(
    verdict="rank_collapse",
    severity=Severity.FAIL,
    sentence="The rank is 2.1 at depth 5, below 10 (dong2021attention).",
    metric="effective_rank",
    value=2.1,
    threshold=10.0,
    source="dong2021attention",
    axis="depth",
    first=5,
    last=7,
    advice="Check the skips.",
)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (1234.5, "1234"),
        (-12.345, "−12.3"),
        (0.0123456, "0.0123"),
        (3.0e-7, "3e-7"),
        (123456.0, "1.23e5"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_numbers_have_three_digits(value, said):
    assert number(value) == said


def test_depth_table_holds_the_analysis(readings):
    table = depth_table(readings[0])
    analysis = readings[0].analysis
    picked = analysis["effective_rank"].sel(scope="sequence", tokens="all", centering="raw", stream="mean")
    np.testing.assert_array_equal(table.data["effective_rank"], picked.isel(step=-1))
    assert {"effective_rank_null", "effective_rank_stderr", "num_tokens", "module"} <= set(table.data)
    row = table.printed.iloc[3]
    assert "±" in row["effective rank"]
    assert "baseline" in row["effective rank"]
    assert any("Effective rank" in note and "all tokens" in note for note in table.notes)


def test_selection_changes_numbers_and_caption(readings):
    pooled = depth_table(readings[0], Selection(scope="data", centering="centred"))
    plain = depth_table(readings[0])
    assert pooled.data["effective_rank"].iloc[-1] != plain.data["effective_rank"].iloc[-1]
    assert pooled.data["num_tokens"].iloc[0] > plain.data["tokens_per_sequence"].iloc[0]
    assert pooled.notes != plain.notes


def test_long_runs_print_fewer_rows_and_say_so(readings, monkeypatch):
    monkeypatch.setattr(tables, "MOST_ROWS", 5)
    table = depth_table(readings[1])
    assert len(table.printed) == 5
    assert len(table.data) == readings[1].analysis.sizes["depth"]
    assert f"5 of {len(table.data)} rows" in table.caption
    assert table.printed["depth"].iloc[-1] == str(len(table.data) - 1)


def test_mixing_only_where_streams_mix(readings):
    assert mixing_table(readings[0]) is None
    table = mixing_table(readings[1])
    assert table is not None
    assert table.data["doubly_stochastic_violation_column"].max() < 1e-5
    assert table.data["composite_gain_forward"].iloc[-1] == pytest.approx(1.0, abs=1e-3)


def test_the_columns_are_the_headline_metrics_of_the_axis():
    for axis in ("depth", "connection"):
        headline = {n for n, m in CATALOGUE.items() if m.headline and m.axis == axis and not m.pairwise}
        assert set(tables.table_metrics(axis)) == headline


def test_summary_has_one_row_a_run_with_the_true_extremes(readings):
    table = summary_table(readings)
    assert list(table.data["run"]) == [reading.name for reading in readings]
    cosine = readings[0].analysis["adjacent_cka"].sel(estimator="unbiased", tokens="all").isel(step=-1)
    row = table.data.iloc[0]
    assert row["adjacent_cka_lowest"] == pytest.approx(float(cosine.min()))
    assert row["adjacent_cka_lowest_at"] == int(np.nanargmin(cosine.values))
    assert math.isnan(row["composite_gain_forward_highest"])
    assert table.printed.iloc[0]["composite gain forward, max"] == "–"


def test_comparison_takes_the_nearest_measured_depth(readings):
    table = comparison_table(readings, ["residual_norm"])
    depths = readings[0].analysis.sizes["depth"]
    norm = readings[0].analysis["residual_norm"].sel(stream="mean").isel(step=-1).values
    nearest = [
        int(np.argmin(np.abs(np.arange(depths) / (depths - 1) - x))) for x in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    np.testing.assert_allclose(table.data["plain"], norm[nearest])
    with pytest.raises(ValueError, match="no run has mixing_gain"):
        comparison_table(readings[:1], ["mixing_gain"])


def test_latex_is_escaped_cited_and_ruled(readings):
    found = replace(readings[1], findings=(FINDING,))
    cites = {"effective_rank": "roy2007effective"}
    text = to_latex(depth_table(found), cites)
    assert r"m\_1 \& $<$2$>$" in text
    assert r"\toprule" in text
    assert r"\citep{roy2007effective}" in text
    assert r"$\pm$" in text
    assert to_latex(findings_table([found]), cites).count(r"\citep{dong2021attention}") == 1


def test_a_value_and_a_threshold_that_differ_are_printed_as_different(readings):
    near = replace(FINDING, value=1.0 - 4e-14, threshold=1.0 - 1e-9)
    table = findings_table([replace(readings[0], findings=(near,))])
    assert table.printed[["value", "threshold"]].to_numpy().tolist() == [["1.00000000", "0.999999999"]]
    assert limit_labels({"a": frozenset({Limits(info=1.0 - 1e-9)})}) == [(1.0 - 1e-9, "note: 1 − 1e-9")]


def test_slugs_are_safe_and_differ():
    assert slug("a-1.b") == "a-1.b"
    names = [slug(name) for name in ("a/b", "a b", "a_b", "模型", "../x", "")]
    assert len(set(names)) == len(names)
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") and name[0] != "." for name in names
    )


def test_few_runs_are_columns_and_of_many_a_page_has_the_first(readings):
    turned = [line for line in to_latex(summary_table(readings), {}).splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in turned} == {len(readings)}
    assert any(line.startswith("effective rank, last & ") and "baseline" in line for line in turned)
    many = [replace(readings[1], name=f"run {i}") for i in range(60)]
    text = to_latex(summary_table(many), {}, VENUES["icml"])
    assert text.count(r"\begin{table*}") == text.count(r"\label{tab:summary}") == 1
    assert "40 of 60 rows" in text
    assert "run 39 " in text
    assert "run 40 " not in text


def test_each_column_says_its_tokens_and_bold_is_only_what_was_tested(readings):
    table = summary_table(readings)
    assert "sequence" not in table.caption
    scopes = {"scope": ["sequence", "data"], "tokens": "all"}
    within, pooled = (
        float(count.max()) for count in readings[0].analysis["num_tokens"].sel(scopes).transpose("scope", ...)
    )
    assert within < pooled
    assert table.data[["tokens_per_sequence", "num_tokens"]].iloc[0].tolist() == [within, pooled]
    assert table.printed[["N per sequence", "N"]].iloc[0].tolist() == [f"{within:g}", f"{pooled:g}"]
    pair = comparison_table(readings, ["token_cosine", "effective_rank", "gradient_norm"])
    for each, metric in (
        (table, "adjacent CKA"),
        (depth_table(readings[0]), "adjacent CKA"),
        (pair, "gradient norm"),
    ):
        sentences = " ".join(each.notes).lower().split(". ")
        of_all, of_each = (
            next(words for words in sentences if name.lower() in words and "n = " in words)
            for name in (metric, "token cosine")
        )
        assert "pooled" in of_all
        assert f"n = {pooled:g} tokens" in of_all
        assert "within each sequence" in of_each
        assert f"n = {within:g} tokens per sequence" in of_each


def test_findings_are_listed_by_severity_over_all_runs(readings):
    note = replace(FINDING, severity=Severity.INFO, verdict="small_sample")
    warning = replace(FINDING, severity=Severity.WARN, verdict="idle_layer")
    table = findings_table(
        [replace(readings[0], findings=(warning, note)), replace(readings[1], findings=(FINDING, note))]
    )
    assert table.printed["severity"].tolist() == table.data["severity"].str.lower().tolist()
    assert table.printed["severity"].tolist() == ["fail", "warn", "info", "info"]
    assert table.printed["run"].tolist() == ["m_1 & <2>", "plain", "plain", "m_1 & <2>"]


def test_intervals_name_their_runs_where_they_differ(make_run):
    several = read_runs(
        {"many": make_run("residual", layers=2, samples=6), "few": make_run(layers=2, samples=3)}
    )
    of = "half of a 95 % interval (Student's t over {} sequences)"
    apart = (
        f"± is {of.format(6)} for many, {of.format(3)} for few; of a number without ± no error is estimated."
    )
    for table in (summary_table(several), comparison_table(several)):
        assert apart in table.notes
    assert f"± is {of.format(3)}; of a number" in " ".join(depth_table(several[1]).notes)
    caption = FIGURES["effective_rank"].build({each.name: each.analysis for each in several}).caption
    assert "Shaded of many: 95 % interval over sequences (n = 6)." in caption
    assert "Shaded of few: 95 % interval over sequences (n = 3)." in caption
