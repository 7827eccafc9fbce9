"""Saved runs that the commands read."""

from __future__ import annotations

import pytest

from depthscope.diagnostics import analyze, schema
from depthscope.diagnostics.schema import COMPLETE

# Three hundred variables take a second to write, and to open: commands read what there is.
METRICS = (
    *("effective_rank", "residual_norm", "token_cosine", "cka", "adjacent_cka", "num_tokens"),
    *("dong_residual", "gradient_norm", "composite_gain", "mixing_gain", "stream_cosine"),
)


@pytest.fixture(scope="session")
def unmeasured(tmp_path_factory, make_run):
    """A folder with a run of each family as a capture leaves it."""
    folder = tmp_path_factory.mktemp("unmeasured") / "runs"
    for family in ("residual", "hc", "mhc"):
        schema.save_run(make_run(family, layers=3), folder / f"{family}.zarr.zip")
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory, unmeasured):
    """The same runs with some metrics, so that a command reads them in place of measuring for seconds."""
    folder = tmp_path_factory.mktemp("saved") / "runs"
    for path in unmeasured.iterdir():
        run = schema.open_run(path).load()
        run["metrics"] = analyze(run, metrics=METRICS).assign_attrs({COMPLETE: True})
        schema.save_run(run, folder / path.name)
    return folder
