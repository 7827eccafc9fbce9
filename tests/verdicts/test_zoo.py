"""Is the zoo what it says, and are the verdicts right about a part of it that nobody has seen?"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from depthscope.diagnostics import Finding, Severity
from tests.verdicts import measuring, scoring
from tests.verdicts.drawing import Case, cases, faulty_run, run_case
from tests.verdicts.faults import FAULTS, Fault
from tests.verdicts.healthy import KINDS
from tests.verdicts.places import Place

torch.set_num_threads(1)


def test_a_draw_is_the_same_for_the_same_seed():
    one, other = cases(7, 40), cases(7, 40)
    assert one == other
    assert one != cases(8, 40)
    assert sum(case.faulty for case in one) == 20
    assert run_case(one[2]) == run_case(one[2])


def test_a_large_draw_has_every_mechanism_and_every_kind():
    titles = {case.what.title for case in cases(0, 2 * max(len(FAULTS), len(KINDS)))}
    assert titles == {each.title for each in (*FAULTS, *KINDS)}


# --- scores ---


def finding(**more) -> Finding:
    given = {"axis": "depth", "first": 4, "last": 6} | more
    return Finding("name", Severity.WARN, "", "", 1.0, 0.5, "", advice="", **given)


@pytest.mark.parametrize(
    ("place", "told", "right"),
    [
        (Place(4, 6, begins=True), {}, True),
        (Place(5, 8, begins=True), {}, True),  # one depth off
        (Place(6, 8, begins=True), {}, False),
        (Place(0, 4, ends=True), {}, False),
        (Place(4, 6), {"first": 4, "last": 9}, False),  # beyond what the fault reaches
        (Place(4, 6, begins=True), {"axis": "connection", "first": 3, "last": 5}, True),
        (Place(), {"first": 0, "last": 9}, True),
        (Place(stream="2"), {"stream": "2"}, True),
        (Place(stream="2"), {"stream": "1"}, False),
        (Place(module="blocks.1"), {"axis": "weight", "first": 0, "last": 0}, False),
        (Place(module="blocks.1"), {"axis": "weight", "first": 1, "last": 1}, True),
        (Place(module="blocks.1"), {}, False),
    ],
)
def test_a_place_is_right_within_one_depth(place, told, right):
    analysis = xr.Dataset(
        coords={"weight": ["blocks.10.mlp", "blocks.1.mlp"], "depth_out": ("connection", np.arange(1, 10))}
    )
    assert place.holds(finding(**told), analysis) == right


def test_a_fault_is_found_loud_at_its_place_or_not_found():
    fault = next(each for each in FAULTS if each.title == "a block multiplies the state by zero")
    planted = faulty_run(fault, random.Random(3))
    assert planted.group == scoring.HARMFUL
    analysis, place = measuring.analysed(planted.measure()), planted.place
    assert scoring.score_fault(fault, place, analysis, trained=False)[:2] == (scoring.LOUD, True)
    other: Fault = replace(fault, says=("small_sample",))
    assert scoring.score_fault(other, place, analysis, trained=False)[:2] == (scoring.QUIET, False)
    elsewhere = replace(place, first=place.first + 2, last=place.last + 2)
    assert scoring.score_fault(fault, elsewhere, analysis, trained=False)[1] is False


def test_an_error_of_a_network_is_no_finding():
    def refuse(net):
        raise RuntimeError("not one of the product's own errors")

    assert run_case(Case(replace(FAULTS[0], plant=refuse), 0)).outcome == scoring.CRASHED
