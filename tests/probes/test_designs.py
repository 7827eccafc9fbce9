"""Public designs: each capture is right, unproven, or refused with a reason, and what it is stands in a table."""

from __future__ import annotations

import pytest
import torch

from tests.models.designs import today
from tests.models.designs.catalogue import DESIGNS
from tests.models.designs.design import Design
from tests.models.designs.outcome import outcome

EACH = pytest.mark.parametrize("design", DESIGNS, ids=[design.name for design in DESIGNS])


@EACH
def test_a_design_is_what_the_table_says(design):
    assert today.line(design, *today.found(design)) == today.table()[design.name], (
        "better or worse than it was: look at `python -m tests.models.designs`, then write the table anew with --write"
    )


FIXED = [design for design in DESIGNS if not design.training]


@pytest.mark.parametrize("design", FIXED, ids=[design.name for design in FIXED])
def test_later_forwards_are_read_like_the_first(design):
    word = words_of(today.table()[design.name])[0]
    if word in ("right", "states", "unproven"):
        assert outcome(design, batches=2).word == word


def test_the_table_has_every_design_once():
    names = [design.name for design in DESIGNS]
    assert len(set(names)) == len(names)
    assert list(today.table()) == names


@pytest.mark.xfail(strict=True, reason="some designs are still read wrong: see the table")
def test_no_design_is_read_wrong():
    wrong = [row for row in today.table().values() if any(word in today.NEVER for word in words_of(row))]
    assert not wrong


def words_of(row: str) -> list[str]:
    return [word.strip() for word in row.split("|")[:3]]


# --- the truth itself: what a model writes down must hold on what it writes down ---


@EACH
def test_what_a_design_says_of_itself_is_consistent(design: Design):
    model, batch = design.build(), design.batch(0)
    truth = design.truth(model, batch)
    again = design.truth(model, batch)
    for name, chain in truth.items():
        for state, other in zip(chain.states, again[name].states, strict=True):
            torch.testing.assert_close(state.value, other.value, rtol=0, atol=0)
        sources = [chain.states[0].value]
        for of in chain.connections:
            next_state = recomputed(chain.states[of.state_in].value, of.parts, sources)
            if next_state is not None:
                true = chain.states[of.state_out].value
                error = float((next_state - true).abs().max() / true.abs().max())
                assert error < 2 * design.rounding, f"state {of.state_out}"


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
        kept = sum(parts["depth_carry"][..., j, None, None] * source for j, source in enumerate(sources))
        sources.append(out)
        return kept + parts["branch_scale"][..., None, None] * out
    return factor(parts, "residual") * x + factor(parts, "branch") * out


def factor(parts: dict[str, torch.Tensor], of: str) -> torch.Tensor:
    if f"{of}_gate" in parts:
        return parts[f"{of}_gate"].unsqueeze(2)
    return parts[f"{of}_scale"][..., None, None]


@EACH
def test_matrices_satisfy_what_the_design_claims(design: Design):
    chains = design.truth(design.build(), design.batch(0)).values()
    matrices = [of.parts["h_res"] for chain in chains for of in chain.connections if "h_res" in of.parts]
    for h_res in matrices if design.constraint else []:
        assert CLAIMS[design.constraint](h_res.double())


def close(a, b) -> bool:
    # Twenty rounds of Sinkhorn leave up to a few thousandths in the sums that are not normalised last.
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=0, atol=1e-2)


CLAIMS = {
    "doubly stochastic": lambda h: (
        close(h.sum(-1), 1.0) and close(h.sum(-2), 1.0) and bool((h > -1e-6).all())
    ),
    "row stochastic": lambda h: close(h.sum(-1), 1.0) and bool((h > 0).all()),
    "orthogonal": lambda h: close(h.mT @ h, torch.eye(h.shape[-1])),
    "diagonal": lambda h: close(h, h * torch.eye(h.shape[-1])),
    "identity": lambda h: close(h, torch.eye(h.shape[-1])),
    "spectral norm": lambda h: close(torch.linalg.matrix_norm(h, 2), 1.0),
}
