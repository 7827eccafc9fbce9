"""A family is named by what its matrices satisfy: not by an attribute, and not at an initialisation where all are alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.probes.connections.proof import measured_constraint, measured_family
from tests.models.verdict_models import (
    IDENTITY,
    UNIFORM,
    Connection,
    Constrained,
    streams,
    tokens,
)

FREE = [IDENTITY + 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(12)]


class Misnamed(Connection):
    """A free connection with the attributes of a constrained one, which say nothing of what it applies."""

    def __init__(self, *weights: torch.Tensor):
        super().__init__(*weights)
        self.sinkhorn_iters, self.sinkhorn = 20, nn.functional.softmax


CASES = {
    "free, with the attributes of another": (lambda: streams(FREE, make=Misnamed), "hc", "unconstrained"),
    "at the identity": (lambda: streams(IDENTITY), "streams", "identity (as at initialisation), so nothing more"),
    "uniform": (lambda: streams(UNIFORM), "streams", "uniform, every weight 1/n"),
    "a bias on the diagonal": (
        lambda: streams(4 * IDENTITY, make=Constrained), "mhc", "all weights off the diagonal are equal",
    ),
    "all ones": (lambda: streams(torch.ones(4, 4)), "streams", "all ones: every stream becomes the sum"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_measured_family_and_its_constraint(name):
    build, family, words = CASES[name]
    run = probes.capture(build(), tokens(2, 8))
    assert run.attrs["family"] == family
    assert words in run.attrs["constraint"]
    assert run.attrs["proof"] == "proven"


def test_padding_and_what_is_not_finite_do_not_count():
    matrices = torch.eye(3).expand(5, 3, 3).clone()
    matrices[2] = float("nan")
    found = measured_constraint([matrices, torch.eye(3)])
    assert found is not None
    assert found.name == "identity"
    assert measured_constraint([torch.full((1, 3, 3), float("nan"))]) is None
    assert measured_constraint([]) is None
    assert measured_constraint([torch.ones(4, 1, 1)]) is None


def test_other_names_are_told_by_structure_and_stay():
    found = measured_constraint([torch.eye(3)])
    for name in ("residual", "independent_hc", "gated", "depth_history", "unproven", "unknown"):
        assert measured_family(name, found) == name
    assert measured_family("hc", None) == "hc"
