"""Is the zoo what it says, and are the verdicts right about a part of it that nobody has seen?"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from depthscope.diagnostics import Finding, Severity
from depthscope.diagnostics.verdicts import VERDICTS
from tests.verdicts import measuring, scoring
from tests.verdicts.drawing import Case, Planted, cases, faulty_run, run_case
from tests.verdicts.faults import FAULTS, Fault, Network
from tests.verdicts.healthy import KINDS
from tests.verdicts.networks import FAMILIES, MIXINGS, built
from tests.verdicts.places import Place
from tests.verdicts.plans import Plan

torch.set_num_threads(1)


def test_a_draw_is_the_same_for_the_same_seed():
    one, other = cases(7, 40), cases(7, 40)
    assert one == other
    assert one != cases(8, 40)
    assert sum(case.faulty for case in one) == 20
    first = run_case(one[25])
    assert first == run_case(one[25])


def test_a_large_draw_has_every_mechanism_and_every_kind():
    titles = {case.what.title for case in cases(0, 2 * max(len(FAULTS), len(KINDS)))}
    assert titles == {each.title for each in (*FAULTS, *KINDS)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_mechanism_names_verdicts_and_hosts_that_exist(fault):
    assert set(fault.says) <= set(VERDICTS)
    assert set(fault.hosts) <= set(FAMILIES)


# --- what is planted is there: seen by plain hooks, without the product ---


def planted(title: str, seed: int = 0) -> tuple[Network, Place]:
    """A spoilt network that is fresh."""
    fault = next(each for each in FAULTS if each.title == title)
    plan = Plan(
        family=fault.hosts[0], streams=3 if fault.hosts[0] in MIXINGS else 1, seed=seed, start="apart"
    )
    net = Network(built(plan), plan, random.Random(seed))
    return net, fault.plant(net)


def states(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """What the blocks return."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: seen.append(out)) for block in model.blocks
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


IDS = torch.randint(1, 48, (8, 32), generator=torch.Generator().manual_seed(0))


def test_states_grow_as_planted():
    net, _ = planted("the state grows by a factor in every block")
    sizes = [float(state.detach().norm()) for state in states(net.model, IDS)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1e5 * float(net.model.embedded(IDS).detach().norm())


def test_tokens_are_equal_from_the_block_on():
    net, place = planted("tokens become equal at a block")
    seen = [state.detach() for state in states(net.model, IDS)]
    spread = [float(state.std(1).mean() / state.norm(dim=-1).mean()) for state in seen]
    assert max(spread[place.first - 1 :]) < 0.01 < min(spread[: place.first - 1], default=1.0)


def test_the_gradient_ends_where_the_input_is_detached():
    net, place = planted("a block detaches its input")
    seen = states(net.model, IDS)
    for state in seen:
        state.retain_grad() if state.requires_grad else None
    net.model(IDS)  # the hooks are gone; the states above are those of the first forward
    seen[-1].square().sum().backward()
    reached = [state.grad is not None for state in seen]
    assert reached == [number >= place.last for number in range(len(seen))]


def test_two_streams_stay_copies():
    net, _ = planted("two of several streams are copies")
    last = states(net.model, IDS)[-1].detach()
    apart = [float((last[:, :, i] - last[:, :, j]).norm()) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert sorted(apart)[0] < 1e-3 < sorted(apart)[1]


@pytest.mark.parametrize("name", ["mHC", "mHC-lite", "KromHC", "circulant"])
@pytest.mark.parametrize("streams", [2, 4])
def test_the_healthy_mixings_are_what_they_are_called(name, streams):
    torch.manual_seed(0)
    mixing = MIXINGS[name]
    matrix = mixing.matrix(mixing.logits(streams, 1.0, 0.5), streams)
    assert matrix.shape == (streams, streams)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(streams), atol=1e-4, rtol=0)
    torch.testing.assert_close(matrix.sum(-2), torch.ones(streams), atol=1e-3, rtol=0)


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
        (Place(1, 6, begins=True), {}, False),
        (Place(1, 6, ends=True), {}, True),
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


@pytest.mark.parametrize(
    ("cost", "steps", "fact", "group"),
    [
        (0.01, 100, False, scoring.HARMLESS),
        (0.2, 100, False, scoring.HARMFUL),
        (0.01, 100, True, scoring.HARMFUL),
        (0.01, 0, False, scoring.HARMFUL),  # the loss of a fresh network says nothing yet
    ],
)
def test_the_loss_of_a_trained_network_says_what_is_harmful(cost, steps, fact, group):
    assert Planted(Plan(steps=steps), Place(), cost, lambda: None, fact).group == group


def test_an_error_of_a_network_is_no_finding():
    def refuse(net):
        raise RuntimeError("not one of the product's own errors")

    assert run_case(Case(replace(FAULTS[0], plant=refuse), 0)).outcome == scoring.CRASHED
