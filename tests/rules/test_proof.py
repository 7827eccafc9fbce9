"""An unproven reading is said so wherever it is read: in every verdict, figure, table, page and command."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.app.cli.main import main
from depthscope.app.figures import FIGURES, available
from depthscope.app.paper.export import write_bundle
from depthscope.app.readings.readings import read_runs
from depthscope.app.report.report import to_html
from depthscope.app.tables.comparison import COMPARED_METRICS, comparison_table, differences, summary_table
from depthscope.app.tables.tables import depth_table, mixing_table
from depthscope.app.text.cards import card_of, cards_text
from depthscope.diagnostics import CATALOGUE, Severity, schema, verdicts
from depthscope.diagnostics.verdicts import VERDICTS, Profile
from tests.models.linear_runs import MODELS
from tests.models.synthetic_run import synthetic_run

REASON = "the branch of 'blocks.2' was not seen"
UNPROVEN = f"unproven: {REASON}"
CONSTRAINT = "doubly stochastic within 1e-07"
SIZES = {"layers": 2, "samples": 2, "tokens": 14, "features": 8}


@pytest.fixture(scope="module")
def runs():
    """A run of streams and a plain one, both unproven."""
    return {
        "streams": synthetic_run("mhc", **SIZES, proof=UNPROVEN, constraint=CONSTRAINT),
        "plain": synthetic_run("residual", **SIZES, proof=UNPROVEN),
    }


@pytest.fixture(scope="module")
def analyses(runs):
    return {name: diagnostics.analyze(run, metrics=CATALOGUE) for name, run in runs.items()}


@pytest.fixture(scope="module")
def readings(runs):
    return read_runs(runs)


@pytest.mark.parametrize("name", VERDICTS)
def test_a_finding_of_every_verdict_says_that_the_reading_is_unproven(monkeypatch, name):
    # Whatever the verdict asks: here it always reports, beyond its limits.
    limit = VERDICTS[name].limits.levels[-1][1]
    value = limit + 1.0 if VERDICTS[name].limits.above else limit - 1.0
    always = replace(
        VERDICTS[name],
        needs=("attrs",),
        wants=(),
        function=lambda attrs: [Profile(value)],
    )
    monkeypatch.setattr(verdicts, "VERDICTS", {name: always})
    analysis = xr.Dataset(attrs={"proof": UNPROVEN, "not_computed": {}})
    (finding,) = diagnostics.judge(analysis)
    assert finding.severity > Severity.PASS
    assert REASON in finding.sentence
    assert finding.as_dict()["proof"] == UNPROVEN
    (proven,) = diagnostics.judge(analysis.assign_attrs(proof="proven"))
    assert "unproven" not in proven.sentence.lower()


@pytest.mark.parametrize("name", ["streams", "plain"])
def test_an_unproven_run_is_never_without_a_finding(analyses, name):
    found = diagnostics.judge(analyses[name])
    assert [each.verdict for each in found].count("unproven_reading") == 1
    assert all(REASON in each.sentence for each in found)
    # Passed verdicts are read as health: they say it too.
    assert all(REASON in each.sentence for each in diagnostics.judge(analyses[name], passed=True))
    proven = analyses[name].assign_attrs(proof="proven")
    assert not [each for each in diagnostics.judge(proven) if "unproven" in each.sentence.lower()]
    assert len(diagnostics.judge(proven)) == len(found) - 1


def test_a_run_of_an_earlier_version_says_neither(make_run):
    found = diagnostics.judge(diagnostics.analyze(make_run("residual", **SIZES)), passed=True)
    assert "unproven_reading" not in {each.verdict for each in found}
    assert {each.proof for each in found} == {""}


def test_the_caption_of_every_figure_says_that_a_reading_is_unproven(analyses):
    proven = {run: analysis.assign_attrs(proof="proven") for run, analysis in analyses.items()}
    fed = {run: available({run: analysis}) for run, analysis in analyses.items()}
    for name, kind in FIGURES.items():
        for run in [run for run in analyses if name in fed[run]]:
            assert f"Unproven: {REASON}." in kind.build({run: analyses[run]}).caption
            assert "nproven" not in kind.build({run: proven[run]}).caption
        if all(name in each for each in fed.values()):
            both = kind.build({"proven": proven["plain"], "other": analyses["plain"]}, run="other").caption
            assert REASON in both
            assert "proven is unproven" not in both
        if "run" in kind.uses and all(name in each for each in fed.values()):  # of a matrix of the proven one
            of_two = {"proven": proven["plain"], "other": analyses["plain"]}
            assert "nproven" not in kind.build(of_two, run="proven").caption


def test_figures_of_mixing_name_the_constraint(analyses):
    figure = FIGURES["mixing_gain"].build({"streams": analyses["streams"]})
    assert f"H_res: {CONSTRAINT}." in figure.caption
    assert CONSTRAINT not in FIGURES["effective_rank"].build({"streams": analyses["streams"]}).caption


@pytest.mark.usefixtures("few_figures")
def test_tables_pages_and_reports_say_it(runs, readings, tmp_path):
    for reading in readings:
        assert REASON in depth_table(reading).caption
        assert REASON in cards_text(map(card_of, reading.findings), width=1000)
    assert REASON in mixing_table(readings[0]).caption
    assert REASON in summary_table(readings).caption
    assert REASON in comparison_table(readings, COMPARED_METRICS).caption
    assert any(REASON in sentence for sentence in differences(readings))
    assert f"reading {UNPROVEN}" in unescape(to_html(readings))
    bundle = write_bundle(readings[1:], tmp_path / "paper", formats=())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["runs"]["plain"]["attributes"]["proof"] == UNPROVEN


@pytest.mark.parametrize("command", ["check", "compare", "analyze"])
def test_commands_say_it_in_text_and_json(runs, tmp_path, capsys, command):
    measured = diagnostics.analyze(runs["streams"], metrics=["residual_norm", "mixing_gain"])
    nodes = {"trace": runs["streams"]["trace"].to_dataset(), "metrics": measured.assign_attrs(complete=True)}
    run = schema.create_run(**nodes, attrs=runs["streams"].attrs)
    paths = [str(schema.save_run(run, tmp_path / "run.zarr.zip"))]
    if command == "compare":
        paths.append(str(schema.save_run(run, tmp_path / "again.zarr.zip")))
    for options in ([], ["--json"]):
        options += ["--metrics", "residual_norm"] if command == "analyze" else []
        assert main([command, *paths, *options]) in (0, 1)
        out, err = capsys.readouterr()
        assert REASON in " ".join((out + err).split())


def test_each_chain_has_its_own_proof():
    known, other = (MODELS[name].run()["trace"].to_dataset() for name in ("plain", "scaled"))
    run = schema.create_run(
        {"encoder": known.assign_attrs(proof="proven"), "decoder": other.assign_attrs(proof=UNPROVEN)},
        attrs={"family": "residual", "proof": f"unproven: decoder: {REASON}"},
    )
    analysis = diagnostics.analyze(run)
    assert analysis["encoder"].attrs["proof"] == "proven"
    assert "depth_kernel" in analysis["encoder"]
    assert "depth_kernel" not in analysis["decoder"]
    found = diagnostics.judge(analysis)
    assert {each.chain for each in found if "unproven" in each.sentence} == {"decoder"}
    first, second = read_runs({"a": run})
    assert (first.attrs["proof"], second.attrs["proof"]) == ("proven", UNPROVEN)


def test_stored_metrics_without_a_proof_take_that_of_their_run(runs):
    run = runs["plain"]
    stored = diagnostics.analyze(run)
    stored = stored.assign_attrs(complete=True)
    del stored.attrs["proof"]
    kept = schema.create_run(run["trace"].to_dataset(), metrics=stored, attrs=run.attrs)
    (reading,) = read_runs({"a": kept})
    assert any(each.verdict == "unproven_reading" for each in reading.findings)
    np.testing.assert_array_equal(reading.analysis["effective_rank"], stored["effective_rank"])
