"""Is the answer of a page what the numbers of its figures say?"""

import numpy as np
import pytest
import xarray as xr
from depthscope.app.text.health import healthy_name

from depthscope.app.figures.build.answers import answer_to
from depthscope.diagnostics import analyze
from depthscope.diagnostics.verdicts import VERDICTS


@pytest.fixture(scope="module")
def mhc(mhc_run):
    return analyze(mhc_run)


def test_the_blocks_least_needed_are_those_that_turn_least(mhc):
    said = answer_to("similarity", mhc, {})
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
    assert answer_to("mixing", analysis, {}) == (
        "Stream 0 carries most of what is read (97 %); hardly read: stream 1."
    )


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        ([0.2, 0.5, 0.3], "from depth 2 to depth 0, the gradient falls to 66.7 %; smallest 0.200 "),
        ([1.0, 0.5, 2.0], "the gradient falls to 50 %; smallest 0.500 "),
        ([0.01, 0.5, 1.0], "fades to 1 %"),
        ([1.49, 0.5, 0.01], "grows 149 ×; smallest 0.0100 "),
        ([np.nan, 0.5, 0.01], "from depth 2 to depth 1, the gradient grows 50.0 ×"),
        ([1.0, 0.5, 0.0], "grows from 0 to 1"),
        ([0.0, 0.5, 0.0], "is 0 at both"),
        ([0.0, 0.0, 0.0], "no gradient"),
        ([1.0, np.inf, 0.5], "infinite"),
        ([np.nan, np.nan, np.nan], ""),
    ],
)
def test_the_gradient_is_followed_from_the_last_state_to_the_first(norms, words):
    analysis = xr.Dataset({"gradient_norm": (("step", "depth"), [norms])}, {"step": [0]})
    said = answer_to("gradients", analysis, {})
    assert words in said
    assert bool(words) == bool(said)


def test_sequences_of_one_token_have_no_rank_that_could_fall():
    ranks, null = (xr.DataArray(np.full((1, 3), value), dims=("step", "depth")) for value in (1.0, 0.99))
    analysis = xr.Dataset({"effective_rank": ranks, "effective_rank_null": null}, {"step": [0]})
    assert "one token each" in answer_to("collapse", analysis, {})


def test_steps_that_are_all_undefined_have_no_answer():
    analysis = xr.Dataset({"block_influence": (("step", "depth"), np.full((1, 3), np.nan))}, {"step": [0]})
    assert answer_to("similarity", analysis, {}) == ""


def test_a_run_that_lacks_the_numbers_has_no_answer():
    for question in ("similarity", "mixing", "gradients", "collapse"):
        assert answer_to(question, xr.Dataset(), {}) == ""


def test_every_verdict_has_a_healthy_name_of_its_own():
    names = [healthy_name(verdict) for verdict in VERDICTS]
    assert len(set(names)) == len(names)
