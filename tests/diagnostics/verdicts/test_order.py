"""Is the worst finding first, at its worst place, and what is only about the reading after all others?"""

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.app.readings.readings import read_runs
from depthscope.app.tables.findings import cards_of
from depthscope.app.text.cards import ABOUT_THE_READING, card_of, cards_text, place_of
from depthscope.diagnostics import Finding, Severity, schema
from depthscope.diagnostics.verdicts import Findings, Kind, Limits, Profile, verdict
from depthscope.diagnostics.verdicts.causes import worst_depth
from tests.diagnostics.state_runs import run_of, walk


def judged(values, *, begins=False, **limits) -> Finding:
    """The finding of a verdict about these numbers."""
    given = xr.DataArray(np.asarray(values, float), dims="depth")
    declared = verdict(Kind.FACT, metric="residual_norm", judges="number", limits=Limits(**limits))
    (found,) = declared(lambda: [Profile(given, begins=begins)]).findings(xr.Dataset())
    return found


@pytest.mark.parametrize("seed", range(2))
def test_a_finding_is_at_its_worst_place_and_begins_at_its_first(seed):
    rng = np.random.default_rng(seed)
    values, above = np.exp(4 * rng.standard_normal(30)), bool(seed % 2)
    values[rng.integers(0, 30, 4)] = np.nan
    found = judged(values, warn=1.0, above=above)
    beyond = [i for i, value in enumerate(values) if (value > 1.0 if above else value < 1.0)]
    worst = max(beyond, key=lambda i: values[i] if above else -values[i])
    assert (found.first, found.last, found.worst) == (beyond[0], beyond[-1], worst)
    assert found.value == values[worst]
    assert f"at depth {worst}" in found.sentence
    assert place_of(found) == f"depth {beyond[0]}–{beyond[-1]}, worst at {worst}"
    assert worst_depth(found, xr.Dataset()) == worst


def test_what_spreads_says_with_which_number_it_begins():
    found = judged([1.0, 0.5, 0.008, 0.004, 4e-9], begins=True, warn=0.01, above=False)
    assert found.excess == pytest.approx(0.01 / 4e-9)
    assert "is 4e-9 at depth 4, limit 0.01" in found.sentence
    assert "it begins with 0.008 at depth 2 and is below 0.01 from depth 2 to depth 4" in found.sentence
    # Of equal numbers no place is the worst.
    assert place_of(judged([0.0, 2.0, 2.0], warn=1.0)) == "depth 1–2"


def test_cosines_are_far_from_their_limit_by_their_angles():
    near, far = (judged([value], warn=0.99, scale="cosine") for value in (0.9901, 0.99999))
    assert near.excess == pytest.approx(np.arccos(0.99) / np.arccos(0.9901))
    assert far.excess == pytest.approx(np.arccos(0.99) / np.arccos(0.99999))
    assert near.excess < 1.01 < 30 < far.excess < judged([1.0], warn=0.99, scale="cosine").excess < np.inf


def test_the_worst_collapse_comes_before_what_could_not_be_proved(make_run):
    """Of the differences 4e-9 were left, and «whether rows or columns …» stood before it."""
    run = make_run("mhc", layers=8)
    trace = run["trace"].to_dataset().load()
    trace["h_res"].values[:] = 0.3 * np.eye(4) + 0.7 / 4
    trace["residual"].values[:] = trace["residual"].values[:, :, :, :1]
    attrs = dict(run.attrs) | {
        "orientation": "ambiguous",
        "untouched": True,
        "proof": "unproven: nobody looked",
    }
    found = diagnostics.judge(diagnostics.analyze(schema.create_run(trace, attrs=attrs)))
    names = [each.verdict for each in found]
    collapse = found[names.index("stream_collapse")]
    assert collapse.value == pytest.approx(0.3**16, rel=1e-4)
    assert (collapse.first, collapse.worst) == (3, 15)
    about = [each.about for each in found]
    assert about == sorted(about)  # all about the network, then all about the reading
    assert "unproven_reading" in {each.verdict for each in found if each.about == "reading"}
    same = [
        each
        for each in found
        if each.about == "network" and each.severity == collapse.severity and not each.because
    ]
    assert same[0] is collapse


def test_every_face_has_a_line_of_its_own_for_the_reading(make_run):
    run = make_run("mhc")
    run.attrs["orientation"] = "ambiguous"
    (reading,) = read_runs({"mhc": run})
    text = cards_text(cards_of(reading))
    first = min(text.find(card_of(each).title) for each in reading.findings if each.about == "reading")
    assert text.count(ABOUT_THE_READING) == 1
    assert 0 <= text.find(ABOUT_THE_READING) < first
    network = [each for each in reading.findings if each.about == "network"]
    assert all(text.find(card_of(each).title) < text.find(ABOUT_THE_READING) for each in network)
    assert ABOUT_THE_READING not in cards_text(map(card_of, Findings(network)))


def test_a_representation_is_placed_on_the_axis_of_all_depths():
    """States inside blocks are not compared: «depth 0 to depth 8» of 16 was half of the network."""
    states = walk(16, branch=1e-4)
    run = run_of(states, sites=["embed", *["mid", "post"] * 8])
    analysis = diagnostics.analyze(run).assign_coords(step=[1000])
    (same,) = [each for each in diagnostics.judge(analysis) if each.verdict == "same_representation"]
    assert same.severity is Severity.WARN  # it was not tried
    assert (same.first, same.last) == (0, 16)
    assert "All layers hold one representation: every two states from depth 0 to depth 16" in same.sentence
    assert len(same.profile) == 17
