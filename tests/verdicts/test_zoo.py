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
from tests.verdicts.drawing import Case, Planted, cases, faulty_run, run_case
from tests.verdicts.faults import FAULTS, Fault, Network
from tests.verdicts.healthy import KINDS
from tests.verdicts.networks import MIXINGS, built
from tests.verdicts.places import Place
from tests.verdicts.plans import Plan

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


# --- what is planted is there, seen by plain hooks, and the mixings are what they are called ---

IDS = torch.randint(1, 48, (8, 32), generator=torch.Generator().manual_seed(0))


def planted(title: str) -> tuple[list[torch.Tensor], torch.Tensor, Place]:
    """The states behind the blocks of a fresh network with a fault, its embedding, and where the fault is."""
    fault = next(each for each in FAULTS if each.title == title)
    plan = Plan(family=fault.hosts[0], streams=3 if fault.hosts[0] in MIXINGS else 1, start="apart")
    net, seen = Network(built(plan), plan, random.Random(0)), []
    place = fault.plant(net)
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    net.model(IDS)
    return seen, net.model.embedded(IDS).detach(), place


def test_what_is_planted_is_there():
    seen, embedded, _ = planted("the state grows by a factor in every block")
    sizes = [float(state.detach().norm()) for state in seen]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1e5 * float(embedded.norm())
    seen, _, place = planted("tokens become equal at a block")
    spread = [float(state.detach().std(1).mean() / state.detach().norm(dim=-1).mean()) for state in seen]
    assert max(spread[place.first - 1 :]) < 0.01 < min(spread[: place.first - 1], default=1.0)
    seen, _, place = planted("a block detaches its input")
    reached = torch.autograd.grad(seen[-1].square().sum(), seen[:-1], allow_unused=True)
    assert [gradient is not None for gradient in reached] == [n >= place.last for n in range(len(seen) - 1)]
    last = planted("two of several streams are copies")[0][-1].detach()
    apart = [float((last[:, :, i] - last[:, :, j]).norm()) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert sorted(apart)[0] < 1e-3 < sorted(apart)[1]


@pytest.mark.parametrize("name", ["mHC", "mHC-lite", "KromHC", "circulant"])
def test_the_healthy_mixings_are_what_they_are_called(name):
    torch.manual_seed(0)
    for streams in (2, 4):
        mixing = MIXINGS[name]
        matrix = mixing.matrix(mixing.logits(streams, 1.0, 0.5), streams)
        assert matrix.shape == (streams, streams)
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones(streams), atol=1e-4, rtol=0)
        torch.testing.assert_close(matrix.sum(-2), torch.ones(streams), atol=1e-3, rtol=0)


def test_a_planted_fault_of_a_trained_network_that_costs_nothing_is_harmless():
    plan = Plan(steps=20)
    costs = {0.04: scoring.HARMLESS, 0.06: scoring.HARMFUL}
    for cost, group in costs.items():
        assert Planted(plan, Place(), cost, lambda: None, fact=False).group == group
        assert Planted(plan, Place(), cost, lambda: None, fact=True).group == scoring.HARMFUL
        assert (
            Planted(replace(plan, steps=0), Place(), cost, lambda: None, fact=False).group == scoring.HARMFUL
        )


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
