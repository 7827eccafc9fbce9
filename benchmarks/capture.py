"""What does capturing cost? Ratios to the same loop without probes, in one run: `python benchmarks/capture.py`."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import transformers
from torch import nn

import probes

LAYERS, WIDTH, BATCH, TOKENS, ROUNDS = 12, 512, 4, 128, 7


def residual_model() -> nn.Module:
    """A plain pre-norm decoder."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
    )
    return transformers.LlamaForCausalLM(config)


def mhc_model() -> nn.Module:
    """lucidrains' mHC around linear branches: four streams, one connection a layer."""
    from hyper_connections import mHC

    init, expand, reduce = mHC.get_init_and_expand_reduce_stream_functions(4, dim=WIDTH)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1024, WIDTH)
            branches = [
                nn.Sequential(
                    nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
                )
                for _ in range(LAYERS)
            ]
            self.blocks = nn.ModuleList(init(branch=branch) for branch in branches)
            self.expand, self.reduce = expand, reduce

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.expand(self.embed(input_ids))
            for block in self.blocks:
                x = block(x)
            return {"loss": self.reduce(x).square().mean()}

    return Model()


def loop(
    model: nn.Module, batch: dict[str, torch.Tensor], *, backward: bool, recorder
) -> Callable[[], float]:
    """One step as a user writes it; gives its seconds."""

    def step() -> float:
        started = time.perf_counter()
        with nullcontext() if backward else torch.no_grad():
            loss = model(**batch)["loss"]
        if backward:
            loss.backward()
        if recorder is not None:
            recorder.step()
        seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return seconds

    return step


def compare(build: Callable[[], nn.Module], *, backward: bool) -> dict[str, float]:
    """Medians of plain, measured and unmeasured steps, taken in turn; as ratios to plain."""
    torch.manual_seed(0)
    model = build()
    ids = torch.randint(0, 1024, (BATCH, TOKENS))
    batch = {"input_ids": ids, "labels": ids}
    times: dict[str, list[float]] = {"plain": [], "measured": [], "between": []}
    for number in range(ROUNDS + 1):
        for name in times:
            every = 1 if name == "measured" else 1000
            start = 0 if name == "measured" else 10**9
            recording = probes.record(model, every=every, start_step=start, gradients=backward)
            with nullcontext() if name == "plain" else recording as recorder:
                step = loop(model, batch, backward=backward, recorder=recorder)
                step()  # the first measured step also finds the chain
                seconds = step()
            if number:
                times[name].append(seconds)
    plain = statistics.median(times["plain"])
    return {"plain_ms": 1e3 * plain} | {
        name: statistics.median(values) / plain for name, values in times.items() if name != "plain"
    }


def main() -> None:
    """Print the table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        f"{name}, {'forward + backward' if backward else 'forward'}": compare(build, backward=backward)
        for name, build in (("residual", residual_model), ("mHC, n = 4", mhc_model))
        for backward in (False, True)
    }
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        f"{LAYERS} layers × {WIDTH}, {BATCH} × {TOKENS} tokens, one thread, medians of {ROUNDS}; ratio to plain"
    )
    for name, row in rows.items():
        print(
            f"{name:32s} measured step {row['measured']:.2f} ×   between {row['between']:.2f} ×   ({row['plain_ms']:.0f} ms)"
        )


if __name__ == "__main__":
    main()
