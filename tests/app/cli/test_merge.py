"""merge: the shards of a corpus become one run; what does not belong together is one line."""

from __future__ import annotations

import json

import numpy as np

from depthscope.app.cli.command import FINE, USAGE
from depthscope.app.cli.main import main
from depthscope.diagnostics import schema


def _probe(folder, out, *words):
    spec = "tests.app.cli.byte_model:build"
    sizes = ["--sequences", "7", "--length", "16", "--keep", "3", "--batch", "2", "--no-gradients"]
    return main(
        [
            "probe",
            spec,
            "--text",
            str(folder / "t.txt"),
            "--out",
            str(folder / out),
            *sizes,
            "--force",
            *words,
        ]
    )


def test_two_shards_are_the_run_of_one_process(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("pack my box with five dozen liquor jugs " * 9)
    assert _probe(tmp_path, "one.zarr.zip") == FINE
    for k in (1, 2):
        assert _probe(tmp_path, f"{k}.zarr.zip", "--shard", f"{k}/2") == FINE
    capsys.readouterr()
    parts = [str(tmp_path / "2.zarr.zip"), str(tmp_path / "1.zarr.zip")]
    assert main(["merge", *parts, "--out", str(tmp_path / "all.zarr.zip"), "--json"]) == FINE
    assert json.loads(capsys.readouterr().out)["merged_runs"] == 2
    with (
        schema.open_run(tmp_path / "one.zarr.zip") as one,
        schema.open_run(tmp_path / "all.zarr.zip") as joined,
    ):
        np.testing.assert_array_equal(joined.trace.residual.values, one.trace.residual.values)
        assert joined.trace.token_text.values.tolist() == one.trace.token_text.values.tolist()
        np.testing.assert_allclose(
            joined.statistics.square_norm_sum, one.statistics.square_norm_sum, rtol=1e-12
        )
    assert main(["merge", parts[0], parts[0], "--out", str(tmp_path / "x.zarr.zip")]) == USAGE
    assert "shard 2/2 is given more than once" in capsys.readouterr().err
    assert _probe(tmp_path, "x.zarr.zip", "--shard", "5/5") == USAGE
    assert "5 shards of 4 forwards" in capsys.readouterr().err
