"""The demo as a user meets it: a line for each model, the dashboard's command, and earlier results replaced."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("hyper_connections")

import depthscope as ds
from depthscope.app.cli.main import main
from depthscope.app.demo import demo


def test_a_line_for_each_model_and_runs_that_can_be_browsed(tmp_path, make_run, monkeypatch, capsys):
    """On fewer tokens, in this process; the command as it is printed is run where the README's commands are."""
    folder = tmp_path / "demo"
    ds.save_run(
        make_run("hc", layers=1), folder / "runs" / "residual.zarr"
    )  # of an earlier one, which is replaced
    monkeypatch.setattr(demo, "SEQUENCES", 2)
    monkeypatch.setattr(demo, "LENGTH", 32)
    monkeypatch.setattr(
        demo.subprocess,
        "run",
        lambda words, **_: demo.measure(*map(Path, words[-2:])) or SimpleNamespace(returncode=0),
    )
    assert main(["demo", "--out", str(folder), "--no-browser"]) == 0
    *models, last = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in models] == ["residual", "HC", "mHC"]
    assert all(re.search(r"loss \d\.\d\d  (nothing found|(INFO|WARN|FAIL): )", line) for line in models)
    assert last == f"open the dashboard with: depthscope dashboard {folder}/runs"
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert runs == sorted(f"{kind}{end}.zarr" for kind in demo.TITLES for end in ("", "-training"))
    for kind in demo.TITLES:
        run = ds.open_run(folder / "runs" / f"{kind}.zarr")
        assert run.attrs["family"] == kind
        assert "effective_rank" in run["metrics"]
        history = ds.open_run(folder / "runs" / f"{kind}-training.zarr")
        assert history["metrics"].sizes["step"] > 5


def test_what_ships_is_small():
    total = sum(path.stat().st_size for path in demo.SHIPPED.rglob("*") if path.is_file())
    assert 0 < total < 3e6


def test_a_process_that_could_not_measure_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.subprocess, "run", lambda words, **_: SimpleNamespace(returncode=1))
    assert main(["demo", "--out", str(tmp_path), "--no-browser"]) == 2
    assert "could not measure its models" in capsys.readouterr().err
