"""The answer: trainings that are not repeated, blocks that are left out, and a page whose numbers are those of its table."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hyper_connections")

from scipy import stats

from depthscope.app.cli.main import main
from depthscope.app.study.reproductions import answer, measuring, weights
from depthscope.app.study.reproductions.answer_figures import answer_figures
from depthscope.app.study.reproductions.answer_page import page_text, write_page
from depthscope.app.study.reproductions.answer_table import read_table, table_text
from depthscope.app.study.reproductions.cells import row_path, run_cells, weights_path
from depthscope.app.study.reproductions.claims import Row
from depthscope.app.study.reproductions.networks import ScaledBranch, make, scale_branches
from depthscope.app.study.small_lm import Size
from depthscope.probes.interventions import ablate, plan

DOCS = Path(__file__).parents[3] / "docs"
SIZE = Size(layers=3, width=16, heads=2)
TINY = replace(answer.STUDY, families={"residual": "residual", "attnres": "AttnRes"})
SETTINGS = {"depth": 4, "width": 32, "heads": 2, "streams": 4, "batch": 2, "length": 64}


def rows_of(alike=lambda family, seed: 0.5 + 0.01 * seed, seeds=5):
    """Rows as a study has them, with numbers that a test can recompute."""
    rng = np.random.default_rng(0)
    found = []
    for steps, scale in ((1000, 1.0), (1000, 0.01), (4000, 1.0)):
        for number, family in enumerate(answer.FAMILIES):
            for seed in range(seeds):
                settings = {"family": family, "seed": seed, "steps": steps, "branch_scale": scale, **SETTINGS}
                same = 0.999 if scale < 1 else alike(family, seed)
                numbers = {each.name: float(rng.normal(1.0, 0.1)) for each in answer.NUMBERS}
                numbers |= {
                    "alike": same, "loss": 2 - 0.1 * number + 0.01 * seed, "same_from": 4, "severity": 3.0 * (scale < 1),
                    "kept_bytes": 1024.0 * (1 + number), "skip_same": float("nan"), "seconds": 2.0,
                }  # fmt: skip
                curves = {
                    "to_last": [same, 0.7, 0.8, 0.9, 1.0],
                    "start_to_last": [0.9] * 5,
                    "skip_last": [0.1 * (k + 1) + 0.01 * seed for k in range(4)],
                    "skip_each": [0.4, 0.3, 0.2, 0.1],
                    "table": [1.0] * 25,
                }
                found.append(Row(settings, numbers, curves))
    return found


# --- networks


@pytest.mark.parametrize("family", ["residual", "mhc"])
def test_without_blocks_is_what_ablation_bypasses(family):
    model = make(family, SIZE, 0)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    ids = torch.arange(48).reshape(2, 24) % 50
    per_block = 1 if family == "residual" else 2  # states after every sublayer, where there are streams
    bypass = plan("bypass", depths=range(per_block + 1, 3 * per_block + 1))
    found = ablate(model, {"input_ids": ids, "labels": ids}, bypass)
    whole = model(ids, labels=ids).loss.item()
    with answer.without_blocks(model, [1, 2]):
        assert len(model.blocks) == 1
        part = model(ids, labels=ids).loss.item()
    assert len(model.blocks) == 3
    assert part - whole == pytest.approx(float(found["loss_change"][0]), abs=1e-5)
    assert abs(part - whole) > 1e-4


def test_attention_residuals_without_blocks_read_and_run_the_others_alone():
    model, shorter = make("attnres", SIZE, 0), make("attnres", replace(SIZE, layers=2), 0)
    for query in model.queries:
        torch.nn.init.normal_(query.query)
    shorter.embedding, shorter.norm, shorter.head = model.embedding, model.norm, model.head
    for number, of in enumerate((0, 1, 4, 5)):
        shorter.branches[number], shorter.queries[number] = model.branches[of], model.queries[of]
    shorter.queries[4] = model.queries[6]
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad(), answer.without_blocks(model, [1]):
        torch.testing.assert_close(model(ids).logits, shorter(ids).logits)
    assert (len(model.branches), len(model.queries)) == (6, 7)


@pytest.mark.parametrize("family", list(answer.FAMILIES))
def test_every_branch_is_scaled(family):
    model = scale_branches(make(family, SIZE, 0), 0.25)
    scaled = [module for module in model.modules() if isinstance(module, ScaledBranch)]
    assert len(scaled) == 2 * SIZE.layers
    x = torch.randn(1, 4, SIZE.width)
    torch.testing.assert_close(scaled[0](x), 0.25 * scaled[0].inner(x))


def test_states_between_blocks_are_every_second_one_of_sublayers():
    same = np.array([[1, 0.5, 0.4], [0.5, 1, 0.97], [0.4, 0.97, 1]])
    assert answer.same_from(same) == 1
    assert answer.same_from(np.where(np.eye(3) > 0, 1.0, 0.2)) == 2
    assert answer.same_from(np.ones((3, 3))) == 0


# --- trainings


def test_a_training_that_was_kept_is_not_repeated(tmp_path, monkeypatch):
    trained = []

    def stop_at_third(learner, settings):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(settings["family"])
        measuring.run_steps(learner, settings)

    monkeypatch.setattr(weights, "run_steps", stop_at_third)
    scale = replace(TINY.quick, seeds=1)
    with pytest.raises(KeyboardInterrupt):
        run_cells(TINY, scale, tmp_path)
    cells = list(TINY.cells(scale))
    assert len(cells) == 6
    first = row_path(tmp_path, cells[0])
    before = first.read_text()
    first.unlink()  # as if it was killed between the training and its measurement
    monkeypatch.setattr(
        weights,
        "run_steps",
        lambda learner, settings: (trained.append(0), measuring.run_steps(learner, settings)),
    )
    rows, planned = run_cells(TINY, scale, tmp_path)
    assert (len(rows), planned, len(trained)) == (6, 6, 6)
    numbers = re.compile(r'"(loss|alike|skip_later)": [^,]+')
    assert numbers.search(before)
    assert [m[0] for m in numbers.finditer(before)] == [m[0] for m in numbers.finditer(first.read_text())]


def test_weights_of_another_network_are_refused(tmp_path):
    cells = list(TINY.cells(TINY.quick))
    path = weights_path(tmp_path, cells[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not the weights that the study keeps"):
        answer.measure(cells[0].settings, path)
    assert path.read_bytes() == b"mine"
    path.unlink()
    weights.trained_once(cells[0].settings, make, path)
    with pytest.raises(FileExistsError, match="not the weights that the study keeps"):
        weights.trained_once({**cells[0].settings, "seed": 7}, make, path)


@pytest.mark.slow(one_in=5)
@pytest.mark.usefixtures("few_figures")
def test_a_killed_study_goes_on_and_writes_its_page(tmp_path):
    out, page = tmp_path / "out", tmp_path / "page"
    words = ["study", "answer", "--quick", "--seeds", "1", "--out", str(out), "--page", str(page)]
    process = subprocess.Popen([sys.executable, "-m", "depthscope", *words], stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list(out.glob("cells/*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    kept = {
        path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.suffix in (".json", ".safetensors")
    }
    assert kept
    assert main(words) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    found = read_table(page / "answer.csv")
    assert len(found.rows) == found.planned == 15
    first = (page / "answer.md").read_bytes()
    assert main(["study", "answer", "--page", str(page)]) == 0
    assert (page / "answer.md").read_bytes() == first


# --- the page


def test_the_page_has_the_numbers_of_the_table(tmp_path):
    (tmp_path / "answer.csv").write_text(table_text(rows_of(), 80), encoding="utf-8")
    found = read_table(tmp_path / "answer.csv")
    text = page_text(found, answer_figures(found))
    values = np.array([2.0 + 0.01 * seed for seed in range(5)])
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert f"| residual | 5 | {values.mean():#.3g} ({low:#.3g} to {high:#.3g}) | 0.520 (" in text
    # HC's five losses all lie below the residual network's: 2 of C(10, 5) exchanges are as extreme, times four designs.
    assert f"| 1000 | HC | held-out loss | -0.10 (-0.12 to -0.077; p {4 * 2 / 252:.2g}) |" in text
    assert "No design holds one representation in all layers" in text
    assert "with all branches scaled down to 0.01: residual 0.999" in text
    assert "2.0 times (HC), 3.0 times (mHC)" in text
    assert "75 of 80 trainings are done" in text
    assert "75 of 80 networks, 150 processor seconds" in text
    assert "5 failed" in text


@pytest.mark.parametrize(
    ("alike", "told"),
    [
        (lambda family, seed: 0.99 if family == "hc" else 0.5, "HC holds one representation in all layers; residual, mHC"),
        (lambda family, seed: 0.99, "residual, HC, mHC, mHC-lite and AttnRes hold one representation in all layers"),
        (lambda family, seed: 0.99 if seed else 0.5, "are not decided"),
    ],
)  # fmt: skip
def test_the_answer_follows_the_numbers(alike, told, tmp_path):
    (tmp_path / "answer.csv").write_text(table_text(rows_of(alike), 75), encoding="utf-8")
    found = read_table(tmp_path / "answer.csv")
    text = page_text(found, [])
    assert told in text
    assert "trainings are done" not in text


def test_one_seed_decides_nothing(tmp_path):
    (tmp_path / "answer.csv").write_text(table_text(rows_of(seeds=1), 15), encoding="utf-8")
    text = page_text(read_table(tmp_path / "answer.csv"), [])
    assert "are not decided" in text
    assert "(one network)" in text
    assert "; p " not in text


def test_two_seeds_are_too_few_for_a_test(tmp_path):
    (tmp_path / "answer.csv").write_text(table_text(rows_of(seeds=2), 30), encoding="utf-8")
    assert "too few seeds to decide" in page_text(read_table(tmp_path / "answer.csv"), [])


def test_the_committed_page_is_made_from_the_committed_table():
    found = read_table(DOCS / "answer.csv")
    figures = answer_figures(found)
    assert (DOCS / "answer.md").read_text(encoding="utf-8") == page_text(found, figures)
    assert all((DOCS / "images" / f"{figure.name}.png").exists() for figure in figures)


def test_a_page_and_a_table_of_somebody_else_stay(tmp_path):
    for name in ("answer.md", "answer.csv"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match="move it away"):
            write_page(tmp_path, rows_of(), 75)
        assert (tmp_path / name).read_text() == "mine"
        os.remove(tmp_path / name)
        for written in tmp_path.glob("answer.*"):
            os.remove(written)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["study", "rescue", "--page", "docs", "--out", "x"], "--page belongs to answer"),
        (["study", "answer", "--page", "y", "--quick"], "without --out nothing is trained"),
        (["study", "answer", "--page", "nothing"], "is not the table of measurements"),
        (["study", "answer"], "name one with --out"),
    ],
)
def test_what_does_not_fit_is_refused(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
