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
from tests.models.verdict_models import CONNECTIONS, NEAR, streams, tokens

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


def network(grouped: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Grouped() if grouped else nn.Sequential(*(Branch() for _ in range(4)), nn.Linear(8, 5))


class Grouped(nn.Module):
    """Attention of four queries to two keys, with rotary angles, after learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.qkv, self.out = nn.Embedding(16, 8), nn.Linear(8, 32), nn.Linear(16, 5)
        nn.init.normal_(self.qkv.weight, std=1.0)
        self.register_buffer("inv_freq", 1e4 ** -torch.linspace(0, 0.5, 2))
        self.shift, self.tiled = 3, False

    def forward(self, x):
        at = torch.arange(x.shape[1])
        q, k, v = (
            self.qkv(x + self.place(at + self.shift))
            .unflatten(-1, (8, 4))
            .transpose(1, 2)
            .split((4, 2, 2), 1)
        )
        turn = torch.polar(torch.ones(()), at[:, None] * self.inv_freq)
        q, k = (torch.view_as_real(torch.complex(*of.chunk(2, -1)) * turn).flatten(-2) for of in (q, k))
        k, v = (of.repeat(1, 2, 1, 1) if self.tiled else of.repeat_interleave(2, 1) for of in (k, v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_attributes(**changed: float) -> Callable[[nn.Module], object]:
    return lambda model: [vars(branch).update(changed) for branch in list(model)[:-1]]


def with_gains(by: float) -> Callable[[nn.Module], object]:
    return lambda model: [branch.norm.weight.data.add_(by) for branch in list(model)[:-1]]


def scaled(name: str, by: float) -> Callable[[nn.Module], object]:
    return lambda model: [each.data.mul_(by) for each in model.get_submodule(name).parameters()]


def spoilt(spoil: Callable[[nn.Module], object], *, grouped: bool = False) -> Patient:
    """A network of which a loss knows the outputs as it was meant, in two parts of eight sequences."""
    right, x = network(grouped), torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(1))
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
        (with_gains(-1.0), "adding 1 to every gain of a norm", "distance from 1"),
        (with_gains(1.0), "taking 1 from every gain of a norm", "1 is added twice"),
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


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shift": 4}, "shifting all positions by -1"),
        ({"tiled": True}, "by the keys of another group"),
        ({"inv_freq": 2e4 ** -torch.linspace(0, 0.5, 2) * 4}, "multiplying every rotary angle by 0.25"),
        ({"inv_freq": 5e5 ** -torch.linspace(0, 0.5, 2)}, "taking 10000 as the base of rotary angles"),
    ],
)
def test_positions_rotary_angles_and_groups(changed, words):
    patient = spoilt(lambda model: [setattr(model, *each) for each in changed.items()], grouped=True)
    found = repaired(patient, 0.01, streams=False, is_suspected=True)
    assert words in found["repair"]
    assert found["repaired"] < 0.1 * found["loss"]


@pytest.mark.parametrize("spoil", [with_attributes(axis=1), scaled("2.out", by=40.0)])
def test_what_a_forward_shows_to_be_odd_is_tried_without_a_suspicion(spoil):
    assert repaired(spoilt(spoil), 0.1, streams=False, is_suspected=False)


def test_a_network_that_is_used_as_it_was_meant_is_left():
    patient = spoilt(lambda model: None)
    assert repaired(patient, 0.1, streams=False, is_suspected=True) == {}
    with_few = spoilt(scaled("4", by=8.0))
    with_few.forwards = 0
    assert repaired(with_few, 0.1, streams=False, is_suspected=True) == {}


def test_mixing_matrices_that_are_applied_transposed_amplify_or_make_streams_the_same():
    drawn = torch.Generator().manual_seed(3)
    mixes = [torch.linalg.qr(torch.randn(4, 4, generator=drawn))[0] for _ in range(4)]
    identity, starved = torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    feeding = "feeding every stream as much as the one that is fed most"
    for meant, applied, words in (
        (mixes, [mix.mT for mix in mixes], "transposing every mixing matrix"),
        ([NEAR] * 4, [NEAR, 30.0 * NEAR] * 2, "dividing every mixing matrix by the sums of its rows"),
        ([identity] * 4, [starved] * 4, feeding),
        ([identity] * CONNECTIONS, [0 * NEAR + 0.25] * CONNECTIONS, "leaving every stream unmixed"),
    ):
        ids = tokens(6, 8)
        with torch.no_grad():
            outputs = dict(zip(map(str, ids.tolist()), streams(meant)(ids), strict=True))

        def loss(output, batch, outputs=outputs):
            return functional.mse_loss(output, torch.stack([outputs[str(row)] for row in batch.tolist()]))

        found = repaired(Patient(streams(applied), [ids], loss, 100), 0.1, streams=True, is_suspected=True)
        assert found["repair"] == words
        assert found["repaired"] < 0.01 * found["loss"]
