"""A larger fault is never less loud: ten faults at six doses, planted in a network that has learned to count."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from depthscope import diagnostics
from depthscope.diagnostics import Finding, Severity
from tests.diagnostics.verdicts.test_on_models import counting, learned, next_token
from tests.models.verdict_models import WIDTH, Layer, captured

torch.set_num_threads(1)

INFO = Severity.INFO


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def adapter(model: nn.Module, scale: float) -> None:
    """A low-rank update of every matrix of a tenth of its norm, times a scale: 1 is as it was learned."""
    rng = generator()
    for weight in (each for each in model.blocks.parameters() if each.ndim == 2):
        left, right = (
            torch.randn(size, rank, generator=rng) for size, rank in ((len(weight), 4), (4, weight.shape[1]))
        )
        update = left @ right
        weight.data += scale * 0.1 * weight.norm() / update.norm() * update


def scaled(*names: str) -> Callable[[nn.Module, float], None]:
    """A factor on some weights."""

    def plant(model: nn.Module, factor: float) -> None:
        for name in names:
            model.get_parameter(name).data *= factor

    return plant


def behind(
    step: Callable[[torch.Tensor, float], torch.Tensor], block: int = 2
) -> Callable[[nn.Module, float], None]:
    """What is done to the state behind a block."""

    def plant(model: nn.Module, dose: float) -> None:
        model.blocks[block] = Layer(lambda x, inner: step(inner(x), dose), model.blocks[block])

    return plant


def common(x: torch.Tensor, size: float) -> torch.Tensor:
    """One vector of a size relative to the states."""
    vector = nn.functional.normalize(torch.randn(WIDTH, generator=generator()), dim=0)
    return x + size * x.detach().norm(dim=-1, keepdim=True) * vector


def so_far(x: torch.Tensor) -> torch.Tensor:
    """The mean of all tokens until each."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def noisy(model: nn.Module, share: float) -> None:
    rng = generator()
    for weight in (each for each in model.blocks.parameters() if each.ndim == 2):
        weight.data += share * weight.std() * torch.randn(weight.shape, generator=rng)


def exchanged(model: nn.Module, count: float) -> None:
    """Tokens that read the embedding of another one."""
    rows = model.embed.weight.data[1 : 1 + int(count)]
    rows.copy_(rows.roll(1, 0))


LARGER, SMALLER, SHARES = (
    (2, 4, 8, 32, 128, 512),
    (1 / 2, 1 / 4, 1 / 8, 1 / 32, 1 / 128, 1 / 512),
    (0.2, 0.4, 0.6, 0.8, 0.9, 1.0),
)
ATTENTION = [f"blocks.{block}.attention.branch.attend.in_proj_weight" for block in range(6)]
FAULTS: dict[str, tuple[Callable[[nn.Module, float], None], tuple[float, ...]]] = {
    "an adapter is scaled up": (adapter, LARGER),
    "the head is scaled up": (scaled("head.weight", "head.bias"), LARGER),
    "the head is scaled down": (scaled("head.weight", "head.bias"), SMALLER),
    "the embedding is scaled up": (scaled("embed.weight"), LARGER),
    "queries, keys and values are scaled up": (scaled(*ATTENTION), LARGER),
    "all tokens get one vector": (behind(common), LARGER),
    "tokens become the mean of those before": (behind(lambda x, share: torch.lerp(x, so_far(x), share)), SHARES),
    "features are set to zero": (behind(lambda x, share: x * (torch.arange(WIDTH) >= share * (WIDTH - 1))), SHARES),
    "weights get noise": (noisy, (0.25, 0.5, 1, 2, 4, 16)),
    "tokens read the embeddings of others": (exchanged, (2, 4, 6, 9, 12, 15)),
}  # fmt: skip


def worst(fault: str | None, dose: float = 0.0) -> Finding | None:
    """The worst finding of the whole network."""
    model = learned(1.0)
    if fault is not None:
        FAULTS[fault][0](model, dose)
    run = captured(model, counting(99), loss=next_token)
    return next(iter(diagnostics.judge(diagnostics.analyze(run))), None)


def test_the_network_without_a_fault_is_no_warning():
    found = worst(None)
    assert found is None or found.severity <= INFO


def severities(found: list[Finding | None]) -> list[Severity]:
    """How loud each is; a note asks for nothing, as silence does."""
    return [max(INFO, INFO if each is None else each.severity) for each in found]


# One of the weights, of the output, of the states and of the input.
TRIED = (
    *("an adapter is scaled up", "the head is scaled up"),
    *("all tokens get one vector", "tokens read the embeddings of others"),
)


@pytest.mark.parametrize("fault", TRIED)
def test_a_larger_fault_is_never_less_loud(fault):
    """At every second dose; ``python -m tests.diagnostics.verdicts.test_monotone`` prints all, and judges them."""
    found = [worst(fault, dose) for dose in FAULTS[fault][1][1::2]]
    assert severities(found) == sorted(severities(found)), found


if __name__ == "__main__":
    milder = False
    for fault, (_, doses) in FAULTS.items():
        found = [worst(fault, dose) for dose in doses]
        milder |= severities(found) != sorted(severities(found))
        told = [
            f"{dose:g}: {'silent' if each is None else f'{each.severity.name} {each.verdict}'}"
            for dose, each in zip(doses, found, strict=True)
        ]
        sys.stdout.write(f"{fault}: {'; '.join(told)}\n")
        sys.stdout.flush()
    sys.exit(milder)
