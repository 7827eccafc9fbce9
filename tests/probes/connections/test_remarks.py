"""Bugs in the wiring of connections are told, each in one sentence with its numbers, and right twins bring no remark."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch

from depthscope import diagnostics, probes
from depthscope.probes.connections.computation import _distinguishable
from tests.models import stream_bugs
from tests.models.stream_bugs import BUGS, STYLES, Wiring, network, tokens

torch.set_num_threads(1)

# What each bug is called: the verdict that reports it.
KINDS = {
    "discarded": "discarded_mixing",
    "transposed": "transposed_mixing",
    "transposed_once": "transposed_mixing",
    "ones": "constant_mixing",
    "passing": "passing_streams",
    "uniform": "unlearnable_mixing",
    "detached": "unlearnable_mixing",
    "swapped": "swapped_weights",
    "first_state": "foreign_coefficients",
    "stale": "foreign_coefficients",
    "other_token": "foreign_coefficients",
}
SAYS = {
    "discarded": "H_res is computed and discarded at all 6 connections",
    "transposed": "transposed at",
    "transposed_once": "H_res is transposed at connection 3",
    "ones": "H_res is 1 in every entry at all 6 connections, whatever its parameters",
    "passing": "Streams are expanded and merged inside each block and do not persist",
    "uniform": "H_res is uniform and its logits get no gradient",
    "detached": "the graph is cut before it is applied",
    "swapped": "the branch reads with 2 σ(·)",
    "first_state": "from the streams at connection 0, not from those at connection 1",
    "stale": "from the streams at connection 0, not from those at connection 1",
    "other_token": "100% of their gradient is there",
}


def wiring(style: str, bug: str, **more) -> Wiring:
    """Where a Sinkhorn converges, its transpose is as right: logits that 20 rounds do not converge on show it."""
    spread, logits = (2.5 if bug == "transposed" else 1.0), ("zero" if bug == "uniform" else "random")
    return Wiring(style=style, bug=bug, spread=spread, logits=logits, **more)


def name(wired: Wiring) -> str:
    return f"{wired.style}-{wired.bug or 'right'}-{'dynamic' if wired.dynamic else 'static'}"


def told(wired: Wiring) -> list:
    return remarks_of(network(wired))


def remarks_of(net) -> list:
    """What `settle` finds besides its experiments, of which none is made."""
    run = probes.settle(probes.capture(net, tokens()), net, tokens(), forwards=0)
    return run.attrs.get("remarks", [])


# Every bug in one style, and every style with some bugs.
EVERY = [wiring(STYLES[2 * number % len(STYLES)], bug) for number, bug in enumerate(BUGS)]


@pytest.mark.parametrize("wired", EVERY, ids=name)
def test_a_bug_is_told_in_one_sentence(wired):
    found = told(wired)
    assert [remark["kind"] for remark in found] == [KINDS[wired.bug]]
    (remark,) = found
    assert SAYS[wired.bug] in remark["sentence"]
    assert any(letter.isdigit() for letter in remark["sentence"])


RIGHT = [Wiring(style="local", dynamic=False), Wiring(style="paired")]


@pytest.mark.parametrize(("style", "copies"), [("returned", True), ("local", False)])
def test_a_gradient_that_algebra_takes_is_no_cut_graph(style, copies):
    """Megatron-Core's Sinkhorn has no graph inside, and copies are left as they are by rows that sum to 1."""
    wired = Wiring(style=style, custom=True, copies=copies, spread=0.3)
    assert told(wired) == []
    (remark,) = told(replace(wired, bug="detached"))
    assert remark["kind"] == "unlearnable_mixing"
    assert "at all 6 connections" in remark["sentence"]
    assert "the graph is cut" in remark["sentence"]


def test_after_an_explosion_coefficients_are_those_of_their_own_streams():
    """Later states differ by less than a rounding of their largest number, and fresh connections have equal weights."""
    net = network(Wiring(style="returned"))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, stream_bugs.Coefficients):
                module.scale.zero_()
                module.base.zero_()
        for parameter in net.blocks[1].attention.branch.net[2].parameters():
            parameter.mul_(1e6)
    remarks = remarks_of(net)
    assert "foreign_coefficients" not in {remark["kind"] for remark in remarks}


def test_states_that_share_a_value_are_not_told_apart():
    states = [frozenset({1, 2}), frozenset({2, 3}), frozenset({7}), frozenset()]
    assert _distinguishable(states) == [
        frozenset({1, 2, 3}),
        frozenset({1, 2, 3}),
        frozenset({7}),
        frozenset(),
    ]


@pytest.mark.parametrize("wired", RIGHT, ids=name)
def test_a_right_twin_brings_no_remark(wired):
    assert told(wired) == []
    found = probes.describe(network(wired), tokens())
    assert found.remarks == ()
    assert "remark" not in str(found)
    assert found.reconstruction_error < 1e-6


SINKHORNS = {
    "in logarithms": lambda logits: reduce(
        lambda m, _: m.log_softmax(-2).log_softmax(-1), range(20), logits
    ).exp(),
    "by transposes": lambda logits: reduce(
        lambda m, _: (m / m.sum(-1, keepdim=True)).mT, range(40), logits.exp()
    ),
}


@pytest.mark.parametrize("constraint", SINKHORNS)
def test_another_right_way_to_write_it_brings_no_remark(constraint, monkeypatch):
    monkeypatch.setitem(stream_bugs.CONSTRAINTS, constraint, SINKHORNS[constraint])
    wired = Wiring(style="local", bug=constraint, spread=0.3)
    assert told(wired) == []


def circulant(logits):
    """A mixture of the cyclic permutations, whose weights are a softmax of other logits than one for each entry."""
    shifts = torch.stack([torch.eye(logits.shape[-1]).roll(k, -1) for k in range(logits.shape[-1])])
    return torch.einsum("...k,kij->...ij", logits[..., 0, :].softmax(-1), shifts)


@pytest.mark.parametrize("cut", [False, True])
def test_a_cut_graph_is_told_whatever_made_the_matrix(cut, monkeypatch):
    """The parameters that the logits come from give the other weights too, and so they have gradients."""
    made = (lambda logits: circulant(logits.detach())) if cut else circulant
    monkeypatch.setitem(stream_bugs.CONSTRAINTS, "circulant", made)
    found = [remark["kind"] for remark in told(Wiring(style="local", bug="circulant"))]
    assert found == ["unlearnable_mixing"] * cut


def test_a_capture_runs_one_forward_and_a_description_too():
    model, calls = network(Wiring()), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    probes.capture(model, tokens(), gradients=True, loss=lambda output, _: output.float().square().mean())
    probes.describe(model, tokens())
    assert len(calls) == 2


def test_remarks_are_in_the_run_its_page_and_its_findings():
    wired = wiring("returned", "ones")
    run = probes.capture(network(wired), tokens())
    (remark,) = run.attrs["remarks"]
    assert remark["sentence"] in str(probes.describe(network(wired), tokens()))
    (finding,) = [
        each for each in diagnostics.judge(diagnostics.analyze(run)) if each.verdict == "constant_mixing"
    ]
    assert finding.severity == diagnostics.Severity.FAIL
    assert remark["sentence"] in finding.sentence


def test_following_a_forward_changes_nothing_of_the_model():
    model, batch = network(Wiring()).train(), tokens()
    model.blocks[0].requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    probes.settle(probes.capture(model, batch), model, batch, forwards=0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == wanted[name]
        assert parameter.grad is None


NO_REMARKS = [
    None, 3, "text", [None], [{}], [{"kind": "constant_mixing"}], [{"kind": "constant_mixing", "sentence": 1, "value": 1.0}],
    [{"kind": "constant_mixing", "sentence": "a\x1b[31m", "value": 9.0}],
]  # fmt: skip


def test_a_file_with_something_else_in_place_of_remarks_is_judged_without_them():
    run = diagnostics.analyze(probes.capture(network(Wiring()), tokens()))
    for value in NO_REMARKS:
        run.attrs["remarks"] = value
        assert "constant_mixing" not in {finding.verdict for finding in diagnostics.judge(run, passed=True)}
