"""compare: runs at the same relative depth, with warnings where they differ."""

from __future__ import annotations

import json

import pytest

from depthscope.app.cli.main import FINE, USAGE, main
from depthscope.app.readings import readings
from depthscope.diagnostics import analyze, schema


def test_compare_aligns_by_relative_depth(saved, capsys):
    assert main(["compare", str(saved), "--metrics", "residual_norm", "--json"]) == FINE
    printed = json.loads(capsys.readouterr().out)
    assert [row["relative depth"] for row in printed["aligned"]] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert {row["run"] for row in printed["summary"]} == {"residual", "hc", "mhc"}
    with schema.open_run(saved / "hc.zarr.zip") as run:
        norm = analyze(run, metrics=["residual_norm"])["residual_norm"].sel(stream="mean")
        assert printed["aligned"][-1]["hc"] == pytest.approx(float(norm.isel(step=-1, depth=-1)))


def test_compare_warns_of_what_else_differs(saved, tmp_path, make_run, capsys):
    run = make_run("residual", layers=2, tokens=24)
    run.attrs["dtype"] = "bfloat16"
    other = schema.save_run(run, tmp_path / "long.zarr.zip")
    assert main(["compare", str(saved / "residual.zarr.zip"), str(other)]) == FINE
    said = capsys.readouterr().err
    assert "different numbers of tokens" in said
    assert "the runs have different precision (residual: float32, long: bfloat16)" in said
    assert main(["compare", str(saved)]) == FINE
    assert capsys.readouterr().err == ""


def test_same_names_in_two_folders_stay_distinct(saved, tmp_path, make_run, capsys):
    (tmp_path / "b").mkdir()
    other = schema.save_run(make_run("residual", layers=2), tmp_path / "b" / "hc.zarr.zip")
    assert main(["compare", str(saved / "hc.zarr.zip"), str(other), "--json"]) == FINE
    names = {row["run"] for row in json.loads(capsys.readouterr().out)["summary"]}
    assert names == {f"{saved.name}/hc", "b/hc"}


def test_a_single_run_is_refused_before_it_is_analysed(saved, monkeypatch, capsys):
    monkeypatch.setattr(readings, "read_paths", lambda *_, **__: pytest.fail("analysed first"))
    assert main(["compare", str(saved / "hc.zarr.zip")]) == USAGE
    assert "got 1 run to compare; expected two or more" in capsys.readouterr().err
