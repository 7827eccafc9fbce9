"""A folder with a broken run: the others are judged, the broken one is named with its reason, and the exit code is not 0."""

from __future__ import annotations

import json
import shutil

import pytest

from depthscope.app.cli.main import BUG, FINE, FOUND, USAGE, main
from depthscope.app.readings import readings

COMMANDS = {"check": [], "export": ["--out", "paper"]}  # those that draw last


@pytest.fixture
def mixed(saved, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(saved / "residual.zarr.zip", folder / "good.zarr.zip")
    (folder / "torn.zarr.zip").write_bytes((saved / "hc.zarr.zip").read_bytes()[:3000])
    (folder / "foreign\x1b[2J.zarr.zip").write_text("no run at all")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize(("name", "options"), COMMANDS.items(), ids=COMMANDS)
def test_the_good_run_is_judged_and_the_broken_ones_are_named(name, options, mixed, capsys):
    assert main([name, "runs", "--json", *options]) == FOUND
    printed = capsys.readouterr()
    left_out = {run["run"]: run["why"] for run in json.loads(printed.out)["left_out"]}
    assert set(left_out) == {"torn", "foreign\x1b[2J"}
    assert "cannot be read" in left_out["torn"]
    for run in ("torn", r"foreign\x1b[2J"):
        assert f"depthscope: left out {run}: " in printed.err
    assert "\x1b" not in printed.err


def test_check_says_in_words_that_a_run_was_not_judged(mixed, capsys):
    assert main(["check", str(mixed)]) == FOUND
    out = capsys.readouterr().out
    assert "good (synthetic-residual, residual)" in out
    assert r"not passed; not judged: foreign\x1b[2J, torn" in out


def test_a_run_whose_analysis_fails_is_left_out(unmeasured, monkeypatch, capsys):
    analyze = readings.analyze

    def failing(run, **options):
        if run.attrs["family"] == "hc":
            raise TypeError("unexpected")
        return analyze(run, **options)

    monkeypatch.setattr(readings, "analyze", failing)
    assert main(["check", str(unmeasured), "--json"]) == FOUND
    printed = json.loads(capsys.readouterr().out)
    assert printed["left_out"] == [{"run": "hc", "why": "TypeError: unexpected"}]
    assert {run["run"] for run in printed["runs"]} == {"residual", "mhc"}
    # Of a single run it is what it is: a mistake of ours.
    assert main(["check", str(unmeasured / "hc.zarr.zip")]) == BUG
    assert "a bug in depthscope: TypeError: unexpected" in capsys.readouterr().err


def test_only_broken_runs_are_an_error(mixed, capsys):
    (mixed / "good.zarr.zip").unlink()
    assert main(["check", str(mixed)]) == USAGE
    assert "none of the 2 runs can be read" in capsys.readouterr().err.splitlines()[-1]
    assert main(["check", str(mixed / "torn.zarr.zip")]) == USAGE


def test_a_run_larger_than_asked_for_is_refused(saved, capsys):
    assert main(["check", str(saved / "residual.zarr.zip"), "--max-bytes", "1kB"]) == USAGE
    assert "1000" in capsys.readouterr().err
    assert main(["check", str(saved / "residual.zarr.zip"), "--max-bytes", "1GiB"]) == FINE
