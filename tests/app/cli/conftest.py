"""Saved runs that the commands read."""

from __future__ import annotations

import pytest

from depthscope.diagnostics import schema


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_run):
    folder = tmp_path_factory.mktemp("runs")
    for family in ("residual", "hc", "mhc"):
        schema.save_run(make_run(family, layers=3), folder / f"{family}.nc")
    return folder
