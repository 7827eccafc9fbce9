"""A larger fault is never judged milder: ten faults at six doses, planted in a network that has learned to count."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from depthscope import diagnostics, probes
from depthscope.diagnostics import Severity
from tests.diagnostics.verdicts.test_on_models import counting, learned, next_token

torch.set_num_threads(1)

WIDTH = 32


@cache
def healthy() -> nn.Module:
    return learned(1.0)


class After(nn.Module):
    """A block, and what is made of its state."""

    def __init__(self, block: nn.Module, change):
        super().__init__()
        self.block, self.change = block, change

    def forward(self, x):
        return self.change(self.block(x))


def after(change):
    """Block 2 with a change of its state by a dose."""

    def plant(model: nn.Module, dose: float) -> None:
        model.blocks[2] = After(model.blocks[2], lambda x: change(x, dose))

    return plant


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def basis() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator()))[0]


def projected(x: torch.Tensor, directions: float) -> torch.Tensor:
    kept = basis()[:, : int(directions)]
    return x @ kept @ kept.T


def adapter(model: nn.Module, scale: float) -> None:
    """A low-rank update of every matrix of a tenth of its norm, times a scale: 1 is as it was learned."""
    rng = generator()
    for block in model.blocks:
        for weight in (each for each in block.parameters() if each.ndim == 2):
            update = torch.randn(len(weight), 4, generator=rng) @ torch.randn(
                4, weight.shape[1], generator=rng
            )
            weight.data += scale * 0.1 * weight.norm() / update.norm() * update


def scaled(pick):
    """Some parameters times a dose."""

    def plant(model: nn.Module, factor: float) -> None:
        for parameter in pick(model):
            parameter.data *= factor

    return plant


def branches(model: nn.Module):
    """The last matrices and biases of every branch."""
    for block in model.blocks:
        yield from block.attention.branch.attend.out_proj.parameters()
        yield from block.mlp.branch[2].parameters()


UP, DOWN = (2.0, 4.0, 8.0, 16.0, 64.0, 512.0), (0.5, 0.2, 0.1, 0.03, 0.01, 1e-3)
FAULTS = {
    "an adapter is scaled up": (adapter, UP),
    "the head is scaled up": (scaled(lambda model: model.head.parameters()), UP),
    # With a thousandth of it the loss is that of guessing: nothing that is measured tells it from a fresh network.
    "the head is scaled down": (
        scaled(lambda model: model.head.parameters()),
        (0.5, 0.2, 0.1, 0.05, 0.03, 0.01),
    ),
    "all branches write less": (scaled(branches), DOWN),
    "the gains of all norms are larger": (
        scaled(lambda model: (block.mlp.norm.weight for block in model.blocks)),
        UP,
    ),
    "queries and keys are larger": (
        scaled(lambda model: (b.attention.branch.attend.in_proj_weight[: 2 * WIDTH] for b in model.blocks)),
        UP,
    ),
    "tokens become their mean": (
        after(lambda x, left: torch.lerp(x.mean(1, keepdim=True).expand_as(x), x, left)),
        DOWN,
    ),
    # With one direction the states are no longer all read, and the run says so.
    "a block keeps few directions": (after(projected), (24, 16, 12, 8, 4, 2)),
    "all tokens get one vector": (
        after(lambda x, size: x + size * x.detach().norm(dim=-1).mean() * basis()[0]),
        UP,
    ),
    "a block multiplies the state": (after(lambda x, factor: factor * x), UP),
}


def severity(fault: str | None, dose: float = 0.0) -> tuple[Severity, list[str]]:
    """The worst finding of the whole network, and who has it."""
    model = copy.deepcopy(healthy())
    if fault is not None:
        FAULTS[fault][0](model, dose)
    run = probes.capture(model, counting(99), gradients=True, loss=next_token)
    found = diagnostics.judge(diagnostics.analyze(run))
    worst = max((each.severity for each in found), default=Severity.PASS)
    return worst, [each.verdict for each in found if each.severity == worst]


def test_the_network_without_a_fault_is_no_warning():
    assert severity(None)[0] <= Severity.INFO


@pytest.mark.parametrize("fault", FAULTS)
def test_a_larger_fault_is_never_milder(fault):
    told = [severity(fault, dose) for dose in FAULTS[fault][1]]
    severities = [each for each, _ in told]
    assert severities == sorted(severities), dict(zip(FAULTS[fault][1], told, strict=True))
