"""Public designs: each capture is right, unproven, or refused with a reason, and what is not right is named."""

from __future__ import annotations

import pytest
import torch
import xarray as xr

from depthscope import probes
from depthscope.probes.reading import tensor_memory
from tests.models.designs.catalogue import DESIGNS
from tests.models.designs.design import Design
from tests.models.designs.outcome import Outcome, all_outcomes, judged, outcome
from tests.models.designs.parts import tilted

EACH = pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
NAMED = {design.name: design for design in DESIGNS}


# What is not «right» at once, and «right» again with its author's answers to all questions (`tests.models.designs.outcome`):
# a design's outcome, the one after the advice of a refusal, and the one with its author's answers; "-" where there is none.
OTHERWISE = {
    ("right", "-", "refused"): (
        "a dict is carried and written into", "blocks of another class appended", "two towers, one before the other",
        "blocks called by another method", "encoder and decoder, memory first",
    ),
    ("refused", "-", "refused"): (
        "LayerDrop in training",
    ),
    ("refused", "right", "right"): (
        "packed sequences",
    ),
    ("unproven", "-", "unproven"): (
        "feed-forward chain", "the state is rolled over tokens",
        "half of the features are carried", "tokens replaced between blocks",
    ),
    ("unproven, states off", "-", "unproven, states off"): (
        "tokens turned between blocks",
    ),
    ("states", "right", "states"): (
        "LayerScale", "one gate a token, by addcmul",
        "constant factors of state and branch",
    ),
    ("states", "states", "states"): (
        "highway", "state halved between blocks", "the state times a function of itself", "reads of normalised streams",
    ),
    ("states", "refused", "states"): (
        "a share of a block with a residual of its own",
    ),
    ("states", "states", "unproven"): (
        "a block halves the state",
    ),
    ("right", "-", "unproven"): (
        "tokens merged between blocks", "ResNet with stages",
    ),
}  # fmt: skip


def expected(design: Design) -> tuple[str, str, str]:
    """The three words for a design."""
    words = next((words for words, names in OTHERWISE.items() if design.name in names), None)
    return words or ("right", "-", "right" if design.answers() else "-")


@pytest.fixture(autouse=True)
def _small_tensors_are_let_go_too(monkeypatch):
    """Else nothing of such small models is let go before their forward ends."""
    monkeypatch.setattr(tensor_memory, "FEWEST_BYTES", 0)


@EACH
def test_a_design_is_right_or_what_is_said_of_it_and_of_the_advice_and_the_authors_answers(design):
    first, *others = expected(design)
    is_right = not any(design.name in names for names in OTHERWISE.values())
    found = (outcome(design),) if is_right else all_outcomes(design)
    said = tuple(of.word if of else "-" for of in found)
    assert said == ((first,) if is_right else (first, *others)), list(map(str, found))


@pytest.mark.parametrize(
    "name",
    [
        "pre-norm, tensor in and out",
        "mHC: streams first, offsets to first",
        "DenseFormer",
        "mixture of depths",
        "streams as list",
        "a block halves the state",
    ],
)
def test_later_forwards_are_read_like_the_first(name):
    assert outcome(NAMED[name], batches=2).word == expected(NAMED[name])[0]


@pytest.mark.parametrize(
    "name",
    [
        "pre-norm, on vectors",
        "post-norm",
        "dynamic HC: weights returned by a module",
        "streams in a dict, stacked last",
        "LIMe",
    ],
)
def test_gradients_of_the_states_are_those_of_the_designs_own_hooks(name):
    found = outcome(NAMED[name], gradients=True, loss=tilted)
    assert found.word == expected(NAMED[name])[0], found


@pytest.mark.parametrize(
    "name",
    [
        "pre-norm, tensor in and out",
        "adds in the loop",
        "mHC: streams first, offsets to first",
    ],
)
def test_each_sequence_and_token_counts_once(name):
    batch = NAMED[name].batch(0)
    run = probes.capture(NAMED[name].build(), batch)
    assert run["trace"]["sample"].values.tolist() == list(range(len(batch)))
    assert run.attrs["sampling"]["sequences_seen"] == len(batch)
    assert int(run["statistics"]["token_count"][0]) == batch.numel()


def test_every_design_has_a_name_of_its_own():
    names = [design.name for design in DESIGNS]
    assert len(set(names)) == len(names)
    assert {name for names in OTHERWISE.values() for name in names} <= set(names)


# --- the comparison itself: a run that is spoilt must be called wrong ---


def spoilt(design_name: str, change) -> Outcome:
    """The outcome of a design that is read right, after its run was changed."""
    design = NAMED[design_name]
    model, batch = design.build(), design.batch(0)
    truth = design.truth(model, batch)
    run = probes.capture(model, batch)
    assert judged(design, run, truth).word == "right"
    trace = run["trace"].to_dataset().load()
    run["trace"] = xr.DataTree(change(trace))
    return judged(design, run, truth)


HC = "dynamic HC: weights returned by a module"


@pytest.mark.parametrize("name", ["h_res", "h_pre", "h_post"])
def test_a_wrong_weight_is_told(name):
    found = spoilt(HC, lambda trace: trace.assign({name: trace[name] + 1e-3}))
    assert (found.word, name in found.why) == ("wrong", True)


def test_a_transposed_matrix_is_told():
    found = spoilt(
        HC, lambda trace: trace.assign(h_res=(trace["h_res"].dims, trace["h_res"].values.swapaxes(-1, -2)))
    )
    assert found == Outcome("wrong", "h_res of connection 0 is the transpose")


def test_states_that_are_exchanged_lost_or_mislabelled_are_told():
    plain = "pre-norm, tensor in and out"
    exchanged = spoilt(
        plain,
        lambda trace: trace.assign(
            residual=trace["residual"].copy(data=trace["residual"].values[[0, 2, 1, 3]])
        ),
    )
    assert exchanged.word == "wrong"
    lost = spoilt(plain, lambda trace: trace.isel(depth=[0, 1, 3]))
    assert lost == Outcome("wrong", "chain '': no state of layer 1")
    mislabelled = spoilt(plain, lambda trace: trace.assign_coords(layer=("depth", [-1, 0, 1, 1])))
    assert mislabelled == Outcome("wrong", "state 3, «post of block 1», is post of block 2")
    noisy = spoilt(plain, lambda trace: trace.assign(residual=trace["residual"] * 1.001))
    assert noisy == Outcome("wrong", "state 0, «embed of block -1», is no residual state of the model")


def test_a_matrix_that_is_left_out_is_told():
    assert spoilt(HC, lambda trace: trace.drop_vars("h_res")) == Outcome("states", "without h_res")


# --- the truth itself: what a model writes down must hold on what it writes down ---


@EACH
def test_what_a_design_says_of_itself_is_consistent(design: Design):
    model, batch = design.build(), design.batch(0)
    truth = design.truth(model, batch)
    again = design.truth(model, batch)
    for name, chain in truth.items():
        for state, other in zip(chain.states, again[name].states, strict=True):
            torch.testing.assert_close(state.value, other.value, rtol=0, atol=0)
        # Over depth the first source is the embedding, as it enters the blocks.
        embedded = [state.value for state in chain.states if state.sites == ("embed",)]
        sources = [(embedded or [chain.states[0].value])[-1]]
        for of in chain.connections:
            next_state = recomputed(chain.states[of.state_in].value, of.parts, sources)
            if next_state is not None:
                true = chain.states[of.state_out].value
                error = float((next_state - true).abs().max() / true.abs().max())
                assert error < 2 * design.rounding, f"state {of.state_out}"
    matrices = [
        of.parts["h_res"] for chain in truth.values() for of in chain.connections if "h_res" in of.parts
    ]
    for claim in filter(None, design.constraint.split(", ")):
        assert all(CLAIMS[claim](h_res.double()) for h_res in matrices), claim


def recomputed(
    x: torch.Tensor, parts: dict[str, torch.Tensor], sources: list[torch.Tensor]
) -> torch.Tensor | None:
    """The next state by the equation of the parts' kind; None where not all of its parts are written down."""
    if "branch_out" not in parts:
        return None
    out = parts["branch_out"].unsqueeze(2)
    if "h_res" in parts:
        return parts["h_res"] @ x + parts["h_post"].unsqueeze(-1) * out
    if "depth_carry" in parts:
        if len(sources) > 1 and torch.equal(out, sources[-1]):
            sources.pop()  # the same branch's output stands in two states
        kept = sum(parts["depth_carry"][..., j, None, None] * source for j, source in enumerate(sources))
        sources.append(out)
        return kept + parts["branch_scale"][..., None, None] * out
    return factor(parts, "residual") * x + factor(parts, "branch") * out


def factor(parts: dict[str, torch.Tensor], of: str) -> torch.Tensor:
    if f"{of}_gate" in parts:
        return parts[f"{of}_gate"].unsqueeze(2)
    return parts[f"{of}_scale"][..., None, None]


def close(a, b) -> bool:
    # Twenty rounds of Sinkhorn leave up to a few thousandths in the sums that are not normalised last.
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=0, atol=1e-2)


def blocks(h: torch.Tensor) -> torch.Tensor:
    """The two kinds of blocks of a product of 2 × 2 matrices, each divided by its sum, last."""
    upper, lower = h[..., :2, :2], h[..., :2, 2:]
    return torch.stack([block / block.sum((-1, -2), keepdim=True) for block in (upper, lower)], -1)


CLAIMS = {
    "doubly stochastic": lambda h: (
        close(h.sum(-1), 1.0) and close(h.sum(-2), 1.0) and bool((h > -1e-6).all())
    ),
    "Kronecker product": lambda h: close(blocks(h)[..., 0], blocks(h)[..., 1]),
    "circulant": lambda h: close(h, h.roll((1, 1), (-1, -2))),
    "row-stochastic": lambda h: close(h.sum(-1), 1.0) and bool((h > 0).all()),
    "orthogonal": lambda h: close(h.mT @ h, torch.eye(h.shape[-1])),
    "diagonal": lambda h: close(h, h * torch.eye(h.shape[-1])),
    "identity": lambda h: close(h, torch.eye(h.shape[-1])),
}
