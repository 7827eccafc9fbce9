"""Saved runs that the commands read."""

from __future__ import annotations

import pytest

from depthscope.app.study.demo import with_metrics
from depthscope.diagnostics import schema


@pytest.fixture(scope="session")
def unmeasured(tmp_path_factory, make_run):
    """A folder with a run of each family as a capture leaves it."""
    folder = tmp_path_factory.mktemp("unmeasured") / "runs"
    for family in ("residual", "hc", "mhc"):
        schema.save_run(make_run(family, layers=3), folder / f"{family}.nc")
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory, unmeasured):
    """The same runs with their metrics, so that a command reads them in place of measuring for seconds."""
    folder = tmp_path_factory.mktemp("saved") / "runs"
    for path in unmeasured.iterdir():
        schema.save_run(with_metrics(schema.open_run(path).load()), folder / path.name)
    return folder
