"""A network whose weights are used otherwise than they were meant regains its loss by the repair that names the cause."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

# What is found of a model alone, without a run that has something to lose.
from depthscope.probes.repairs import Patient, repaired
from tests.models.verdict_models import NEAR, streams, tokens

torch.set_num_threads(1)


class Branch(nn.Module):
    """Attention after a norm, whose scores go through ``weights``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.qkv.weight, std=1.0)
        self.axis, self.scale = -1, 1.0

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        scores = self.scale * q @ k.mT / 2.0
        return x + self.out((scores.softmax(self.axis) @ v).transpose(1, 2).flatten(2))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Branch() for _ in range(4)), nn.Linear(8, 5))


def with_attributes(**changed: float) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        for branch in list(model)[:-1]:
            vars(branch).update(changed)

    return spoil


def with_gains(by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        for branch in list(model)[:-1]:
            branch.norm.weight.data = by(branch.norm.weight.data)

    return spoil


def scaled(*names: str, by: float) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        for name in names:
            for parameter in model.get_submodule(name).parameters():
                parameter.data *= by

    return spoil


def spoilt(spoil: Callable[[nn.Module], None]) -> Patient:
    """A network of which a loss knows the outputs as it was meant, in two parts of eight sequences."""
    right, x = network(), torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        meant = {float(row.sum()): right(row[None])[0] for row in x}
    wrong = copy.deepcopy(right)
    spoil(wrong)

    def loss(output, batch):
        return functional.mse_loss(output, torch.stack([meant[float(row.sum())] for row in batch]))

    return Patient(wrong, [x[:8], x[8:]], loss, 100)


AXIS = "running every softmax along the last axis", "a softmax along another axis"
LOGITS, PART = "another scale of attention", "another scale of these modules"


@pytest.mark.parametrize(
    ("spoil", "words", "cause"),
    [
        (with_attributes(axis=-2), *AXIS),
        (with_attributes(axis=1), *AXIS),
        (with_attributes(scale=4.0), "the softmax in * by 0.25", LOGITS),
        (with_attributes(scale=0.25), "the softmax in * by 4", LOGITS),
        (with_gains(lambda gain: gain - 1), "adding 1 to every gain of a norm", "distance from 1"),
        (with_gains(lambda gain: gain + 1), "taking 1 from every gain of a norm", "1 is added twice"),
        (scaled("4", by=8.0), "multiplying what * gives by 0.125", PART),
        (scaled("2.out", by=40.0), "multiplying what 2.out gives by 0.0", PART),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_repair_names_what_was_changed(spoil, words, cause):
    patient = spoilt(spoil)
    before = {name: value.clone() for name, value in patient.model.state_dict().items()}
    state = torch.get_rng_state()
    found = repaired(patient, 0.1, streams=False, is_suspected=True)
    assert words in found["repair"]
    assert cause in found["cause"]
    assert found["repaired"] < 0.1 * found["loss"]
    assert 0.0 < found["half_width"] < found["loss"] - found["repaired"]
    assert all(torch.equal(before[name], value) for name, value in patient.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in patient.model.modules())


@pytest.mark.parametrize("spoil", [with_attributes(axis=1), scaled("2.out", by=40.0)])
def test_what_a_forward_shows_to_be_odd_is_tried_without_a_suspicion(spoil):
    assert repaired(spoilt(spoil), 0.1, streams=False, is_suspected=False)


def test_a_network_that_is_used_as_it_was_meant_is_left():
    patient = spoilt(lambda model: None)
    assert repaired(patient, 0.1, streams=False, is_suspected=True) == {}
    with_few = spoilt(scaled("4", by=8.0))
    with_few.forwards = 0
    assert repaired(with_few, 0.1, streams=False, is_suspected=True) == {}


def test_mixing_matrices_that_are_applied_transposed_or_amplify():
    drawn = torch.Generator().manual_seed(3)
    mixes = [torch.linalg.qr(torch.randn(4, 4, generator=drawn))[0] for _ in range(4)]
    for meant, applied, words in (
        (mixes, [mix.mT for mix in mixes], "transposing every mixing matrix"),
        (
            [NEAR] * 4,
            [NEAR, 30.0 * NEAR] * 2,
            "dividing every mixing matrix by the sums of its rows",
        ),
    ):
        ids = tokens(6, 8)
        with torch.no_grad():
            outputs = dict(zip(map(str, ids.tolist()), streams(meant)(ids), strict=True))

        def loss(output, batch, outputs=outputs):
            return functional.mse_loss(output, torch.stack([outputs[str(row)] for row in batch.tolist()]))

        found = repaired(Patient(streams(applied), [ids], loss, 100), 0.1, streams=True, is_suspected=True)
        assert found["repair"] == words
        assert found["repaired"] < 0.01 * found["loss"]
