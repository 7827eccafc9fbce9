"""The benchmark of published numbers runs, finds them, and marks a miss."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.published import __main__ as published
from benchmarks.published import dense_connections, results
from depthscope.diagnostics import schema


@pytest.mark.slow
def test_every_published_number_is_found(capsys):
    assert published.main([]) == 0
    assert "MISSED" not in capsys.readouterr().out
    assert published.main(["--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert set(tables) == {result.__name__ for result in results.RESULTS}
    assert all(row["holds"] for rows in tables.values() for row in rows)


def test_a_miss_is_marked(capsys, monkeypatch):
    def wrong():
        """A number that is not."""
        yield published.Row("two and two", 5.0, 4.0, 0.5)

    monkeypatch.setattr(results, "RESULTS", (wrong,))
    assert published.main([]) == 1
    assert "MISSED (tolerance 0.5)" in capsys.readouterr().out


def test_a_number_of_another_model_is_in_brackets_and_not_a_miss(capsys, monkeypatch):
    def curve():
        """A curve."""
        yield published.Row("gain", None, 1.5, elsewhere=3000.0)

    monkeypatch.setattr(results, "RESULTS", (curve,))
    assert published.main([]) == 0
    assert "(3000)" in capsys.readouterr().out
    published.main(["--json"])
    (row,) = json.loads(capsys.readouterr().out)["curve"]
    assert (row["printed"], row["printed_of_another_model"]) == (None, 3000.0)


def attention_residuals(*, skip, layers):
    """Plain float64 attention from the same start, one full softmax at a time."""
    rng = np.random.default_rng(0)
    scoring = rng.standard_normal((32, 32)) / np.sqrt(32)
    x = rng.standard_normal((12, 32))
    x = 1e-2 * (x - x.mean(0)) / np.abs(x).sum(-1).max()
    found = []
    for _ in range(layers + 1):
        size = np.abs(x - x.mean(0))
        found.append(np.sqrt(size.sum(0).max() * size.sum(1).max()))
        x = x - x.mean(0)
        weights = np.exp(x @ scoring @ x.T)
        x = skip * x + weights / weights.sum(-1, keepdims=True) @ x
    return np.log(found)


@pytest.mark.parametrize(("skip", "layers"), [(False, 1), (True, 8)])
def test_residuals_as_logarithms_are_those_of_plain_attention(skip, layers):
    expected = attention_residuals(skip=skip, layers=layers)
    np.testing.assert_allclose(results.log_residuals(skip=skip)[: layers + 1], expected, atol=1e-8)


def test_the_residual_cubes_in_the_limit():
    steps = np.diff(results.log_residuals(skip=False))
    assert steps[-1] / steps[-2] == pytest.approx(3.0, abs=1e-3)


def test_a_triangle_and_a_lambda_are_drawn():
    lines = dense_connections.drawn().splitlines()
    columns = [[line[start : start + 25].rstrip() for line in lines[1:]] for start in (2, 32, 62)]
    assert columns[0] == columns[1] == ["@" * (k + 1) for k in range(24)]
    assert [row[0] + row[-1] for row in columns[2]] == ["@@"] * 24
    assert set(columns[2][-1][1:-4]) == {"."}


def with_training(run):
    statistics = run["statistics"].to_dataset()
    attrs = run.attrs | {"training": {"steps": 7}}
    return schema.create_run(run["trace"].to_dataset(), statistics=statistics, attrs=attrs)


def test_trained_models_are_shown_with_their_own_numbers(
    residual_run, hc_run, mhc_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(results, "RESULTS", ())
    runs = {"residual": residual_run, "hc": hc_run, "mhc": mhc_run}
    for family, run in runs.items():
        schema.save_run(with_training(run), tmp_path / f"{family}.zarr.zip")
    published.main(["--json", "--runs", str(tmp_path)])
    tables = json.loads(capsys.readouterr().out)
    found = {row["name"]: row["found"] for row in tables["trained_gains"]}
    h = hc_run["trace"].h_res.values[::2, hc_run["trace"].mask.values].astype(float)
    expected = np.abs(h.sum(-1)).max(-1).mean(-1).max()
    assert found["hc: one connection, attention, forward"] == pytest.approx(expected)
    assert found["hc: steps of training"] == 7
    low, middle, high = (row["found"] for row in tables["trained_cosines"][:3])
    assert low < middle < high


def test_runs_of_something_else_are_refused(hc_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        published.main(["--runs", str(tmp_path)])
    assert "no hc.zarr.zip" in capsys.readouterr().err
    schema.save_run(hc_run, tmp_path / "hc.zarr.zip")
    with pytest.raises(SystemExit):
        published.main(["--runs", str(tmp_path)])
    assert "expected a run that depthscope study wrote" in capsys.readouterr().err
