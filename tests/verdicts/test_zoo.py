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
from tests.verdicts import measuring, references, scoring
from tests.verdicts.drawing import Case, cases, faulty_run, run_case
from tests.verdicts.faults import FAULTS, Fault, Network
from tests.verdicts.healthy import KINDS
from tests.verdicts.networks import FAMILIES, MIXINGS, built
from tests.verdicts.places import Place
from tests.verdicts.plans import Plan

torch.set_num_threads(1)


def test_the_weights_of_a_block_that_has_no_state_are_recorded():
    plan = Plan(family="attention residuals", blocks=2, width=32)
    model = built(plan)
    run = measuring.recorded(model, plan, torch.optim.AdamW(model.parameters()))
    layers = run["statistics"]["weight_layer"].to_series()
    assert layers["blocks.0.norm"] == 0
    assert float(run["statistics"]["weight_update_square_norm"].sel(weight="blocks.0.norm").isel(step=-1)) > 0


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
    # All of them, or none: then it is a mechanism that no verdict names yet, and the page counts it as missed.
    assert set(fault.says) <= set(VERDICTS) or not set(fault.says) & set(VERDICTS)
    assert set(fault.hosts) <= set(FAMILIES)
    # A verdict that never reaches the severity could not find it.
    assert all(
        VERDICTS[name].limits.levels[-1][0] >= fault.severity for name in fault.says if name in VERDICTS
    )


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


def test_one_token_alone_is_amplified():
    net, place = planted("one connection amplifies 400 × for one token in 256")
    connection = net.connections[place.first - 1]
    mix = connection(torch.randn(8, 32, 3, 32))[1]
    sums = mix.sum(-1).abs().amax(-1)
    assert int((sums > 100).sum()) == 1


def test_differences_grow_and_sums_stay():
    net, _ = planted("differences between streams grow while sums stay 1")
    product = torch.eye(3)
    for connection in net.connections:
        product = connection(torch.zeros(1, 1, 3, 32))[1][0, 0].detach() @ product
    assert float(product.sum(-1).sub(1).abs().max()) < 0.05
    assert float(torch.linalg.matrix_norm(product, 2)) > 100


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


def test_a_milder_finding_is_not_found():
    fault = next(each for each in FAULTS if each.title == "a block multiplies the state by zero")
    _, place, measure = faulty_run(fault, random.Random(3))
    analysis = measuring.analysed(measure())
    assert scoring.score_fault(fault, place, analysis)[0] == scoring.FOUND
    stricter: Fault = replace(fault, says=("small_sample",))
    assert scoring.score_fault(stricter, place, analysis)[0] in (scoring.MILD, scoring.MISSED)
    elsewhere = replace(place, first=place.first + 2, last=place.last + 2)
    assert scoring.score_fault(fault, elsewhere, analysis)[0] == scoring.ELSEWHERE


def test_a_refusal_is_no_finding():
    def refuse(net):
        raise VERDICT_ERROR

    fault = replace(FAULTS[0], plant=refuse)
    assert run_case(Case(fault, 0)).outcome == scoring.CRASHED


VERDICT_ERROR = RuntimeError("not one of the product's own errors")


# --- the page and the calibration set ---


def test_the_reference_networks_are_of_today():
    rows = references.kept_rows()
    titles = [kind.title for kind in references.KINDS]
    assert len(set(titles)) == len(titles)
    assert sum(kind.steps > 0 for kind in references.KINDS) >= 60
    assert {row["kind"] for row in rows} <= set(titles)
    assert len({(row["kind"], row["number"]) for row in rows}) == len(rows)
    grown = [row for row in rows if int(row["steps"])]
    assert len(grown) >= 20
    for row in grown:  # it has learned what it was trained on
        assert float(row["loss"]) < 0.95 * float(row["guessing"]), row["kind"]
    # What more than one of twenty healthy networks is blamed for is no limit.
    for name in VERDICTS:
        assert sum(name in row["loud"].split() for row in rows) <= 0.05 * len(rows), name
