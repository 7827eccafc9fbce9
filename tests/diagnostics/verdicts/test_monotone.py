"""A larger fault is never judged milder: three faults at four doses, planted in a network that has learned to count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import diagnostics
from depthscope.diagnostics import Severity
from tests.diagnostics.verdicts.test_on_models import counting, learned, next_token
from tests.models.verdict_models import captured

torch.set_num_threads(1)

WIDTH = 32


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def basis() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator()))[0]


def adapter(model: nn.Module, scale: float) -> None:
    """A low-rank update of every matrix of a tenth of its norm, times a scale: 1 is as it was learned."""
    rng = generator()
    for block in model.blocks:
        for weight in (each for each in block.parameters() if each.ndim == 2):
            update = torch.randn(len(weight), 4, generator=rng) @ torch.randn(
                4, weight.shape[1], generator=rng
            )
            weight.data += scale * 0.1 * weight.norm() / update.norm() * update


def head(model: nn.Module, factor: float) -> None:
    for parameter in model.head.parameters():
        parameter.data *= factor


class Common(nn.Module):
    """A block, and one vector of a size relative to its states that all tokens get."""

    def __init__(self, block: nn.Module, size: float):
        super().__init__()
        self.block, self.size = block, size

    def forward(self, x):
        x = self.block(x)
        return x + self.size * x.detach().norm(dim=-1).mean() * basis()[0]


def common_vector(model: nn.Module, size: float) -> None:
    model.blocks[2] = Common(model.blocks[2], size)


DOSES = (2.0, 8.0, 64.0, 512.0)
FAULTS = {
    "an adapter is scaled up": adapter,
    "the head is scaled up": head,
    "all tokens get one vector": common_vector,
}


def severity(fault: str | None, dose: float = 0.0) -> tuple[Severity, list[str]]:
    """The worst finding of the whole network, and who has it."""
    model = learned(1.0)
    if fault is not None:
        FAULTS[fault](model, dose)
    run = captured(model, counting(99), loss=next_token)
    found = diagnostics.judge(diagnostics.analyze(run))
    worst = max((each.severity for each in found), default=Severity.PASS)
    return worst, [each.verdict for each in found if each.severity == worst]


def test_the_network_without_a_fault_is_no_warning():
    assert severity(None)[0] <= Severity.INFO


@pytest.mark.parametrize("fault", FAULTS)
def test_a_larger_fault_is_never_milder(fault):
    told = [severity(fault, dose) for dose in DOSES]
    severities = [each for each, _ in told]
    assert severities == sorted(severities), dict(zip(DOSES, told, strict=True))
