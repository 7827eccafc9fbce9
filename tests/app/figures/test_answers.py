"""Do the sentences about blocks and streams say what the numbers are?"""

import numpy as np
import pytest
import xarray as xr

from depthscope.app.figures.build.answers import least_needed, streams_answer
from depthscope.diagnostics import analyze


@pytest.fixture(scope="module")
def mhc(mhc_run):
    return analyze(mhc_run)


def test_the_blocks_least_needed_are_those_that_turn_least(mhc):
    said = least_needed(mhc, {})
    influence = mhc["block_influence"].isel(step=-1).sel(tokens="all")
    least = int(np.nanargmin(influence.values))
    half = {"mid": "first", "post": "second"}[str(mhc["site"].values[least])]
    assert said.partition(": ")[2].startswith(f"{half} half of block {mhc['layer'].values[least]} (")
    assert "was not measured" in said


def test_streams_that_are_not_read_and_what_survives_are_named():
    shares = np.array([[[0.97, 0.03, np.nan]]])
    analysis = xr.Dataset(
        {"signal_share": (("step", "connection", "stream"), shares)},
        {"stream": np.array(["0", "1", "mean"], dtype=object), "step": [0]},
    )
    assert streams_answer(analysis) == (
        "Stream 0 carries most of what is read (97 %); hardly read: stream 1."
    )


def test_steps_that_are_all_undefined_have_no_answer():
    analysis = xr.Dataset({"block_influence": (("step", "depth"), np.full((1, 3), np.nan))}, {"step": [0]})
    assert least_needed(analysis, {}) == ""


def test_a_run_that_lacks_the_numbers_has_no_answer():
    assert least_needed(xr.Dataset(), {}) == streams_answer(xr.Dataset()) == ""
