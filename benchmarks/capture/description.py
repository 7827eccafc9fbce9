"""What does a description cost? `describe` on a deep and narrow model, in forwards of the same model.

    python -m benchmarks.capture.description

Such a model is the worst case: its forward is short, and hooks, records and proofs cost the same for every module. The ratio
is the median over rounds in which the steps are taken in turn, of CPU time, so that other programs count little; the first
description of the process is apart from them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.capture.cases import Attention, Sizes, feedforward
from depthscope import probes

SIZES = Sizes(layers=200, width=64, batch=2, tokens=32, heads=4)


class Block(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attention, self.feedforward = Attention(sizes), feedforward(sizes.width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(x_BTD)
        return x_BTD + self.feedforward(x_BTD)


def model(sizes: Sizes) -> nn.Module:
    """An embedding, the blocks, and a norm."""
    blocks = (Block(sizes) for _ in range(sizes.layers))
    return nn.Sequential(nn.Embedding(100, sizes.width), *blocks, nn.LayerNorm(sizes.width))


def seconds(step: Callable[[], Any]) -> float:
    """Of the processor, for one step."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def main() -> None:
    """Print the first description's time, and the ratios."""
    rounds = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rounds.add_argument("--rounds", type=int, default=9)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    deep = model(SIZES)
    ids = torch.randint(0, 100, (SIZES.batch, SIZES.tokens))
    steps: dict[str, Callable[[], Any]] = {
        "forward": torch.no_grad()(lambda: deep(ids)),
        "describe": lambda: probes.describe(deep, ids),
        "capture": lambda: probes.capture(deep, ids),
    }
    print(f"first describe: {seconds(steps['describe']):.2f} s")
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds.parse_args().rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    for name in ("describe", "capture"):
        ratios = [step / forward for step, forward in zip(taken[name], taken["forward"], strict=True)]
        print(f"{name}: {statistics.median(ratios):.1f} forwards")


if __name__ == "__main__":
    main()
