"""analyze: what is written into a run, what stays as it was, what is printed and what is only named."""

from __future__ import annotations

import json

import pytest
import xarray as xr

from depthscope.app.cli.main import FINE, USAGE, main
from depthscope.diagnostics import schema


def test_analyze_writes_metrics_into_the_run(unmeasured, tmp_path, capsys):
    path = schema.save_run(schema.open_run(unmeasured / "mhc.zarr.zip"), tmp_path / "m.zarr.zip")
    assert main(["analyze", str(path), "--json"]) == FINE
    printed = json.loads(capsys.readouterr().out)
    with schema.open_run(path) as run:
        assert set(run["metrics"].data_vars) == set(printed["metrics"])
        assert "residual" in run["trace"]
        assert run.attrs["family"] == "mhc"
        first = run["metrics"]["effective_rank"].sel(
            scope="sequence", tokens="all", centering="raw", stream="mean"
        )
        assert printed["depth"]["m"][0]["effective_rank"] == pytest.approx(float(first[0, 0]))
    assert printed["connection"]["m"][0]["composite_gain_forward"] == pytest.approx(1.0, abs=1e-3)
    assert printed["depth"]["m"][0]["adjacent_cka"] is None  # undefined, not zero


def test_analyze_out_leaves_the_run_alone(unmeasured, tmp_path, capsys):
    before = (unmeasured / "residual.zarr.zip").read_bytes()
    out = tmp_path / "metrics.zarr.zip"
    names = "effective_rank,token_cosine"
    words = ["analyze", str(unmeasured / "residual.zarr.zip"), "--metrics", names, "--out", str(out)]
    assert main(words) == FINE
    assert (unmeasured / "residual.zarr.zip").read_bytes() == before
    with schema.open_run(out) as run:
        assert "trace" not in run.children
        assert {"effective_rank", "token_cosine"} <= set(run["metrics"].data_vars)
        assert "participation_ratio" not in run["metrics"]
    assert "effective rank" in capsys.readouterr().out


WRONG_OPTIONS = {
    "scope": (["--select", "scope=nonsense"], "expected one of sequence, data"),
    "metric": (["--metrics", "effective_rank,nonsense"], "no metric 'nonsense'"),
    "out": (["--out", "metrics.npy"], "a name that ends in .zarr, .zarr.zip"),
    "empty out": (["--out", ""], "a name that ends in .zarr, .zarr.zip"),
    "out of the run": (["--out", "RUN"], "is the run itself"),
}


@pytest.mark.parametrize(("options", "said"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_a_wrong_option_of_analyze_writes_nothing(unmeasured, tmp_path, capsys, options, said):
    path = tmp_path / "r.zarr.zip"
    path.write_bytes((unmeasured / "residual.zarr.zip").read_bytes())
    before = path.read_bytes(), path.stat().st_ino
    words = ["analyze", str(path), *(option.replace("RUN", str(path)) for option in options)]
    assert main(words) == USAGE
    assert said in capsys.readouterr().err
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_parts_add_stays_in_every_chain_and_is_not_complete(make_run, tmp_path):
    part = make_run("residual", layers=2)["trace"].to_dataset()
    run = schema.create_run({"encoder": part, "decoder": part}, attrs={"family": "residual", "n_streams": 1})
    path = schema.save_run(run, tmp_path / "r.zarr.zip")
    for name in ("residual_norm", "token_cosine"):
        assert main(["analyze", str(path), "--metrics", name]) == FINE
    stored = schema.open_run(path)
    for chain in ("encoder", "decoder"):
        assert {"residual_norm", "token_cosine"} <= set(stored[f"metrics/{chain}"].data_vars)
        assert stored[f"metrics/{chain}"].attrs["complete"] is False
        assert "residual" in stored[f"trace/{chain}"]


def test_metrics_of_another_trace_are_not_mixed(unmeasured, tmp_path, capsys):
    run = schema.open_run(unmeasured / "residual.zarr.zip").load()
    run["metrics"] = xr.Dataset({"token_cosine": ("step", [0.0, 1.0])}, {"step": [5, 6]})
    path = schema.save_run(run, tmp_path / "r.zarr.zip")
    before = path.read_bytes()
    assert main(["analyze", str(path), "--metrics", "residual_norm"]) == USAGE
    assert "their step differs from that of the run's trace" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_analyze_says_where_the_tables_over_pairs_are(unmeasured, tmp_path, capsys):
    path = schema.save_run(schema.open_run(unmeasured / "mhc.zarr.zip"), tmp_path / "m.zarr.zip")
    asked = ["analyze", str(path), "--metrics", "cka,token_cosine"]
    assert main(asked) == FINE
    said = " ".join(capsys.readouterr().out.split())
    assert "not printed: cka" in said
    assert f"they are in /metrics of {path}, and in: depthscope dashboard {path}" in said


def test_errors_of_pooled_metrics_are_a_choice(unmeasured, tmp_path, capsys):
    out = tmp_path / "m.zarr.zip"
    asked = ["analyze", str(unmeasured / "residual.zarr.zip"), "--metrics", "cka", "--out", str(out)]
    assert main([*asked, "--jackknife"]) == FINE
    assert "cka_stderr" in schema.open_run(out)["metrics"]
    assert main([*asked, "--force"]) == FINE
    assert "cka_stderr" not in schema.open_run(out)["metrics"]
