"""The card of a finding names the experiment that settles it, and shows its result once it was run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.tables.findings import cards_of
from depthscope.diagnostics import Finding, Severity
from depthscope.diagnostics.experiments import result_for, result_path, results_beside, save_result

IDLE = Finding(
    verdict="idle_layer", severity=Severity.WARN, sentence="Nothing.", metric="angular_distance", value=0.0,
    threshold=0.1, source="this project", axis="depth", first=2, last=3, advice="",
)  # fmt: skip


def result(kinds=("skip", "skip", "identity"), depths=(2, 5, 2), changes=(0.01, 0.9, 0.8)) -> xr.Dataset:
    """What `ablate` writes, as far as sentences need it."""
    columns = {"kind": list(kinds), "depth": list(depths)}
    columns |= {name: [-1] * len(kinds) for name in ("block", "connection", "stream")}
    for column, values in (("loss_change", changes), ("kl", changes), ("output_change", changes)):
        for ending, shift in (("", 0.0), ("_error", 0.0), ("_low", -0.005), ("_high", 0.005)):
            columns[column + ending] = np.array(values) + shift
    data = {name: ("experiment", values) for name, values in columns.items()}
    names = [f"{kind} at depth {depth}" for kind, depth in zip(kinds, depths, strict=True)]
    return xr.Dataset(data, {"experiment": names})


def test_the_result_is_that_of_the_same_kind_at_the_place_of_the_finding():
    assert result_for(IDLE, result()) == "skip at depth 2: loss +0.01 nats (95 %: +0.005 to +0.015)"


def test_cards_show_the_command_and_then_its_result(tmp_path):
    path = tmp_path / "a run.zarr.zip"
    reading = Reading("a", {}, xr.Dataset(), (IDLE,), path=str(path))
    (card,) = cards_of(reading)
    assert card.experiment == f"depthscope ablate CHECKPOINT --run '{path}' --do bypass --depths 2-3"
    assert card.result == ""
    save_result(result().assign_attrs(kind_of_file="depthscope experiments"), result_path(path, "ablate"))
    (card,) = cards_of(replace(reading, results=results_beside(path, None)))
    assert "loss +0.01 nats" in card.result


def test_the_lens_says_from_which_depth_on_the_prediction_stands(tmp_path):
    path = tmp_path / "a.zarr.zip"
    depths = xr.DataArray(np.full((1, 2, 3), 4.0), dims=("stream", "sample", "token"))
    lens = xr.Dataset({"prediction_depth": depths}, {"depth": np.arange(7)})
    save_result(lens.assign_attrs(kind_of_file="depthscope experiments"), result_path(path, "lens"))
    same = replace(IDLE, verdict="same_representation")
    (card,) = cards_of(Reading("a", {}, xr.Dataset(), (same,), results=results_beside(path, None)))
    assert card.result == "by the logit lens the prediction no longer changes from depth 4.0 of 6 on"


def test_a_file_of_somebody_else_in_its_place_is_passed_over(tmp_path):
    path = tmp_path / "a.zarr.zip"
    result_path(path, "ablate").write_bytes(b"not a result")
    assert results_beside(path, None) == {}
    save_result(result().assign_attrs(weights_digest="sha256:1"), path=result_path(path, "lens"))
    assert set(results_beside(path, "sha256:1")) == {"lens"}
    assert results_beside(path, "sha256:2") == {}
