"""The reproductions: cells that are kept and found again, sentences that follow from numbers, folders of others left alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("hyper_connections")

from depthscope import probes
from depthscope.app.cli.commands import study as command
from depthscope.app.cli.main import main
from depthscope.app.study.reproductions import connections, figure_8, initialisation, rescue, stream_collapse
from depthscope.app.study.reproductions.catalogue import STUDIES
from depthscope.app.study.reproductions.cells import keep, kept_row, row_path, run_cells
from depthscope.app.study.reproductions.claims import Claim, exponents
from depthscope.app.study.reproductions.networks import make
from depthscope.app.study.reproductions.plan import Cell, MeasuredCell, Row, Scale
from depthscope.app.study.reproductions.results import results_table, summary_text
from depthscope.app.study.reproductions.run import run_reproduction, scale_of
from depthscope.app.study.reproductions.streams import Kronecker, Permutations
from depthscope.app.study.small_lm import Size

SCALE = Scale(depths=(4, 16), seeds=3)


def rows_of(study, numbers, scale=SCALE, curve=lambda depth: [], gains=lambda family: [1.0]):
    """Rows with these numbers, by family and depth; each seed a little off."""
    return [
        Row(cell.settings, {
            name: value * (1 + 0.01 * cell.settings["seed"])
            for name, value in numbers(cell.settings["family"], cell.settings["depth"]).items()
        }, {"norm_start": curve(cell.settings["depth"]), "gain_along": gains(cell.settings["family"])})
        for cell in study.cells(scale)
    ]  # fmt: skip


def verdicts(study, numbers, scale=SCALE, **options):
    return {
        claim.statement: claim.verdict for claim in study.claims(rows_of(study, numbers, scale, **options))
    }


def test_the_command_line_names_every_study():
    assert tuple(STUDIES) == command.REPRODUCTIONS
    assert all(name == study.name for name, study in STUDIES.items())


# --- networks


@pytest.mark.parametrize("made", [Permutations, Kronecker])
@pytest.mark.parametrize("streams", [2, 4])
def test_mixing_is_doubly_stochastic_and_starts_where_it_should(made, streams):
    mixing = made(streams, 0.6)
    start = mixing(mixing.start)
    torch.testing.assert_close(start.diagonal(), torch.full((streams,), 0.6))
    any_logits = mixing(torch.randn(5, 3, len(mixing.start)) * 4)
    assert (any_logits >= 0).all()
    for dim in (-1, -2):
        torch.testing.assert_close(any_logits.sum(dim), torch.ones(5, 3, streams))


def test_kronecker_is_numpys():
    made = Kronecker(4, 0.5)
    p, q = torch.sigmoid(torch.tensor([0.3, -1.2])).tolist()
    expected = np.kron([[p, 1 - p], [1 - p, p]], [[q, 1 - q], [1 - q, q]])
    np.testing.assert_allclose(made(torch.tensor([0.3, -1.2])).numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="power of 2"):
        Kronecker(3, 0.5)


@pytest.mark.parametrize("family", ["mhc-lite", "kromhc", "attnres", *initialisation.FAMILIES])
def test_networks_are_causal_and_read(family):
    model = make(family, Size(layers=2, width=16, heads=2), 0)
    ids = torch.arange(24).reshape(2, 12)
    changed = ids.clone()
    changed[:, -1] = 99
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :-1], model(changed).logits[:, :-1])
    run = probes.capture(model, {"input_ids": ids, "labels": ids})
    streams = 4 if family in ("mhc-lite", "kromhc") else 1
    assert run.attrs["n_streams"] == streams
    if streams > 1:
        assert run.attrs["reconstruction_error"] < 1e-6


# --- claims


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([2.0, 2.1, 2.05], "reproduced"),
        ([0.5, 0.6, 0.55], "not reproduced"),
        ([0.5, 1.6, 1.2], "not decided"),
        ([2.0], "not decided"),
        ([math.nan, math.nan], "not decided"),
        ([], "not decided"),
        ([9.0, 9.1, 9.0], "not reproduced"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(values, verdict):
    claim = Claim("It grows", "nobody", "its size", values, above=1.0, below=5.0)
    assert claim.verdict == verdict
    assert f"It grows: {verdict} (its size" in claim.sentence
    json.dumps(claim.as_dict(), allow_nan=False)


def test_one_exact_number_decides():
    assert Claim("It is", "nobody", "it", [2.0], above=1.0, exact=True).verdict == "reproduced"
    assert Claim("It is", "nobody", "it", [0.5], above=1.0, exact=True).verdict == "not reproduced"


def test_exponents_are_those_of_powers_and_unknown_of_one_depth():
    grown = rows_of(initialisation.STUDY, lambda family, depth: {"start_norm": 3.0 * depth**0.5})
    assert exponents(grown, "start_norm", "pre-ln") == pytest.approx([0.5] * 3)
    flat = rows_of(
        initialisation.STUDY, lambda family, depth: {"start_norm": 1.0}, Scale(depths=(4,), seeds=2)
    )
    assert all(math.isnan(value) for value in exponents(flat, "start_norm", "pre-ln"))


def test_initialisation_follows_the_numbers():
    def curse(family, depth):
        dong = 1e-4 if family == "no-skip" else 0.5
        late = 0.01 if family == "pre-ln" else 0.1
        return {
            "start_dong": dong,
            "start_norm": depth**0.5,
            "skip_earlier": 0.2,
            "skip_later": late,
            "turn": 0.05,
        }

    def none(family, depth):
        return {"start_dong": 0.5, "start_norm": 3.0, "skip_earlier": 0.2, "skip_later": 0.2, "turn": 0.9}

    found = verdicts(initialisation.STUDY, curse, curve=lambda depth: [2.0, (4 + depth) ** 0.5])
    planted_out = verdicts(
        initialisation.STUDY, none, curve=lambda depth: [2.0, (4 + 0.01 * depth**3) ** 0.5]
    )
    for statement in (
        "Without skips the tokens of a fresh network become equal over 16 layers",
        "Skips prevent it",
        "The squared norm of the state of fresh Pre-LN networks grows linearly with the depth",
        "The later half of the blocks of trained Pre-LN matters less than the earlier one",
        "LayerNorm scaling makes the later half matter more",
        "The curse of depth: some block of trained Pre-LN hardly turns the state at 16 layers",
    ):
        assert (found[statement], planted_out[statement]) == ("reproduced", "not reproduced"), statement


def test_connections_follow_the_numbers():
    def grown(family, depth):
        gain = 40.0 if family == "hc" else 1.01
        loss = 3.0 if family == "residual" else 2.5
        return {"gain_forward": gain, "gain_backward": 1.0, "loss": loss, "stream_differences": 1e-3}

    def none(family, depth):
        return {"gain_forward": 1.0, "gain_backward": 1.0, "loss": 2.5, "stream_differences": 0.8}

    found, planted_out = verdicts(connections.STUDY, grown), verdicts(connections.STUDY, none)
    for statement in (
        "HC's composite gain leaves 1 at 16 layers, upwards or downwards",
        "HC's composite gain grows above 1 at 16 layers",
        "HC: the loss is below that of a plain residual network at 16 layers",
        "A gain of 1 hides that mHC's mixing makes all streams alike",
    ):
        assert (found[statement], planted_out[statement]) == ("reproduced", "not reproduced"), statement
    # A gain that falls leaves 1 as well, and the largest one does not show it.
    fallen = verdicts(connections.STUDY, none, gains=lambda family: [1.0, 0.6, 0.2])
    assert fallen["HC's composite gain leaves 1 at 16 layers, upwards or downwards"] == "reproduced"
    assert fallen["HC's composite gain grows above 1 at 16 layers"] == "not reproduced"
    assert fallen["mHC's composite gain stays near 1 at 16 layers"] == "not reproduced"


def test_stream_collapse_and_rescue_follow_the_numbers():
    dominant = verdicts(
        stream_collapse.STUDY, lambda family, depth: {"dominance": 0.9 if family == "alike" else 0.3}
    )
    equal = verdicts(stream_collapse.STUDY, lambda family, depth: {"dominance": 0.25})
    statement = "Breaking the symmetry at the start lowers the dominance of one stream"
    assert (dominant[statement], equal[statement]) == ("reproduced", "not reproduced")
    missed = verdicts(
        rescue.STUDY, lambda family, depth: {"removed": 0.3, "restored_next": 0.9, "restored_last": 0.2}
    )
    spare = verdicts(
        rescue.STUDY, lambda family, depth: {"removed": 1e-4, "restored_next": 0.9, "restored_last": 0.9}
    )
    for statement in (
        "HC: a network of 16 layers misses a stream that is removed at a quarter of the way",
        "HC: the later it comes back, the less is restored",
    ):
        assert (missed[statement], spare[statement]) == ("reproduced", "not reproduced")


def test_the_summary_and_the_table_say_what_is_missing():
    rows = rows_of(initialisation.STUDY, lambda family, depth: {"loss": 2.0 if depth == 4 else math.nan})
    text = summary_text(initialisation.STUDY, SCALE, rows[:5], 24)
    assert "5 of 24 networks are done" in text
    assert text.count("not decided (") == len(initialisation.CLAIMS)
    table = results_table(initialisation.STUDY, rows)
    assert np.isnan(table.data["loss"].values[1])
    assert table.printed["held-out loss, nats per byte"].tolist()[:2] == ["2.02 ± 0.05", "–"]


# --- the printed matrices


def test_figure_8_is_what_the_paper_prints(tmp_path):
    found = run_reproduction("fig8", tmp_path)
    assert {claim.verdict for claim in found.claims} == {"reproduced"}
    late = figure_8.matrices("mHC")["P31-60"]
    numbers = json.loads(next((tmp_path / "cells").glob("mHC*.json")).read_text())["numbers"]
    assert numbers["spectral_norm"] == pytest.approx(np.linalg.norm(late, 2))
    assert numbers["least_sum"] == pytest.approx(late.sum(0).min())


def test_figure_8_with_other_matrices_is_not_reproduced(monkeypatch, tmp_path):
    identity = dict.fromkeys(figure_8.NAMES, 2 * np.eye(4))
    monkeypatch.setattr(figure_8, "matrices", lambda family: identity)
    assert "not reproduced" in {claim.verdict for claim in run_reproduction("fig8", tmp_path).claims}


def test_nothing_is_trained_for_figure_8():
    for asked in ({"depths": [3]}, {"seeds": 2}):
        with pytest.raises(ValueError, match="trains nothing"):
            scale_of(figure_8.STUDY, quick=False, **{"depths": None, "seeds": None, **asked})


@pytest.mark.parametrize("depths", [[0], [1], [], [300]])
def test_depths_outside_are_refused(depths):
    with pytest.raises(ValueError, match="from 2 to 256 layers"):
        scale_of(initialisation.STUDY, quick=True, depths=depths, seeds=None)


# --- what is kept


def test_kept_cells_are_found_by_their_settings(tmp_path):
    (cell, *_) = initialisation.STUDY.cells(Scale(depths=(4,), seeds=2))
    cell = Cell(cell.study, {**cell.settings, "seed": 1}, keeps_run=False)
    assert kept_row(tmp_path, cell) is None
    keep(tmp_path, cell, Row(cell.settings, {"loss": 2.5, "norm": math.nan}, {"line": [1.0, math.nan]}))
    row = kept_row(tmp_path, cell)
    assert row.numbers["loss"] == 2.5
    assert math.isnan(row.numbers["norm"])
    assert math.isnan(row.curves["line"][1])
    other = Cell(cell.study, {**cell.settings, "steps": 7}, keeps_run=False)
    assert row_path(tmp_path, other) != row_path(tmp_path, cell)
    assert kept_row(tmp_path, other) is None
    # A run that should be there and is not: the cell is measured again.
    assert kept_row(tmp_path, Cell(cell.study, cell.settings, keeps_run=True)) is None


@pytest.mark.parametrize("content", ["mine", "{}", "[]", '{"format": "depthscope study cell"}', "\0"])
def test_a_foreign_file_at_a_cells_place_is_refused_before_anything_is_measured(content, tmp_path):
    cells = list(initialisation.STUDY.cells(initialisation.STUDY.quick))
    path = row_path(tmp_path, cells[-1])
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(FileExistsError, match="move it away"):
        run_reproduction("initialisation", tmp_path, quick=True)
    assert path.read_text() == content
    assert os.listdir(tmp_path) == ["cells"]


@pytest.mark.parametrize("name", ["summary.md", "results/notes.txt", "paper/draft.tex"])
def test_foreign_files_stay(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises((ValueError, FileExistsError)):
        run_reproduction("fig8", tmp_path)
    assert path.read_text() == "mine"


def test_files_beside_the_results_stay_and_another_study_is_refused(tmp_path):
    run_reproduction("fig8", tmp_path)
    for name in ("notes.txt", "cells/notes.txt", "results/notes.txt"):
        (tmp_path / name).write_text("mine")
    first = (tmp_path / "summary.md").read_bytes()
    run_reproduction("fig8", tmp_path)
    assert (tmp_path / "summary.md").read_bytes() == first
    for name in ("notes.txt", "cells/notes.txt", "results/notes.txt"):
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(FileExistsError, match="not the summary of the study rescue"):
        run_reproduction("rescue", tmp_path, quick=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["study", "rescue"], "name one with --out"),
        (["study", "--quick", "--out", "x"], "leave them out of families"),
        (["study", "width", "--depths", "3"], "leave them out of width"),
        (["study", "fig8", "--seeds", "2", "--out", "x"], "trains nothing"),
        (["study", "rescue", "--depths", "0", "--out", "x"], "from 2 to 256"),
    ],
)
def test_what_does_not_fit_is_refused(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_keeps_what_is_done_and_minutes_end_between_networks(tmp_path, capsys):
    measured = []

    def measure(settings):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(settings["family"])
        return MeasuredCell({"loss": 1.0}, {}, None)

    study, scale = replace(initialisation.STUDY, measure=measure, trained=False), Scale(depths=(1,), seeds=2)
    with pytest.raises(KeyboardInterrupt):
        run_cells(study, scale, tmp_path)
    assert "2 of 8 cells are kept" in capsys.readouterr().err
    measured.clear()
    rows, planned = run_cells(study, scale, tmp_path, minutes=0.0)
    assert (len(rows), planned, measured) == (3, 8, ["pre-ln"])


@pytest.mark.slow(more=1, one_in=5)
@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("name", ["connections", "stream-collapse", "rescue"])
def test_quick_studies_end_with_a_bundle(name, tmp_path, capsys):
    assert main(["study", name, "--quick", "--depths", "2", "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["done"] == told["planned"] > 0
    assert {claim["verdict"] for claim in told["claims"]} <= {"reproduced", "not reproduced", "not decided"}
    for expected in ("summary.md", "results/manifest.json", "paper/main.tex", "paper/metrics.bib"):
        assert (tmp_path / expected).exists(), expected
    assert list((tmp_path / "results" / "figures").glob("*.pdf"))
    rows = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert len(rows) == told["planned"]


@pytest.mark.slow(one_in=5)
@pytest.mark.usefixtures("few_figures")
def test_a_killed_study_goes_on(tmp_path):
    words = ["study", "initialisation", "--quick", "--depths", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "depthscope", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob("cells/*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*.json")}
    assert kept
    found = run_reproduction("initialisation", tmp_path, quick=True, depths=[2])
    assert found.done == found.planned == len(list(tmp_path.glob("cells/*.json")))
    assert (tmp_path / "paper" / "main.tex").exists()
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
