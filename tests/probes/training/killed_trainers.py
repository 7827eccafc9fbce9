"""What is left of a training that is killed at a random moment? ``python tests/probes/training/killed_trainers.py 200``.

One process imports everything; every trainer is a fork of it. It trains a small stack, measures every step into a live store
and says after each `step` which one it was. Killed, its store must have at least these steps, and no number that is not
theirs; a reader beside it opens the store again and again meanwhile. Half of the attempts resume the store of the one before.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from depthscope import probes
from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import live_store

warnings.simplefilter("error")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def train(store: Path, resume: bool, first_step: int | None, told: int, *, steps: float = np.inf) -> None:
    """Train until it is killed; the loss of a step is its number, so that a row tells whether it is whole."""
    torch.manual_seed(0)
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ids = torch.arange(12).reshape(2, 6)
    with probes.record(model, store=store, gradients=True, resume=resume, first_step=first_step) as recorder:
        while recorder.position < steps:
            loss = model(ids).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step = recorder.position
            recorder.step(float(step))
            os.write(told, step.to_bytes(8, "little"))


def killed_after(
    seconds: float, store: Path, resume: bool, first_step: int | None, *, started: bool
) -> tuple[int | None, int, int]:
    """Kill one trainer, so long after its start or its first step.

    Returns the last step that it told of, and how often the store was read beside it, and in vain.
    """
    reading, telling = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            train(store, resume, first_step, telling)
        finally:
            os._exit(9)
    os.close(telling)
    told = os.read(reading, 8) if started else b""
    end = time.monotonic() + seconds
    reads = vain = 0
    while time.monotonic() < end:
        try:
            check(store, None)
            reads += 1
        except schema.SchemaError as error:
            if "no step was finished" not in str(error):
                raise
            vain += 1
        except FileNotFoundError:
            vain += 1  # it has not begun, or begins anew
        time.sleep(min(0.01, max(0.0, end - time.monotonic())))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the trainer ended by itself with {status}"
    with os.fdopen(reading, "rb") as pipe:
        told += pipe.read()
    steps = [int.from_bytes(told[at : at + 8], "little") for at in range(0, len(told) // 8 * 8, 8)]
    return (steps[-1] if steps else None), reads, vain


def check(store: Path, last: int | None) -> int:
    """Every row is whole and there once; returns the last step."""
    if not schema.is_live_store(store):
        raise FileNotFoundError(store)
    with schema.open_run(store) as run:
        statistics = run["statistics"].to_dataset().load()
        assert np.isfinite(run["trace"]["residual"].values).all()
    steps = statistics["step"].values
    assert np.array_equal(steps, np.arange(len(steps))), f"steps {steps[:3]} to {steps[-3:]}"
    assert np.array_equal(statistics["loss"].values, steps.astype(float))
    assert (statistics["token_count"].values == 12).all()
    assert np.isfinite(statistics["norm_sum"].values).all()
    assert last is None or steps[-1] >= last, f"{steps[-1]} is stored, {last} was finished"
    return int(steps[-1])


def campaign(kills: int, folder: Path, *, seed: int, longest: float) -> Counter[str]:
    """Kill so many trainers, half of which resumed the store of the one before."""
    # Once before the forks: what is imported at first use, such as torch's compiler, is imported here.
    with open(os.devnull, "wb") as nobody:
        train(folder / "first", False, None, nobody.fileno(), steps=2)
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    store = folder / "0"
    live_store.MAX_LOG_ROWS = 16  # so that logs become columns all the time
    stored = None
    for number in range(kills):
        resume = stored is not None and chance.random() < 0.5
        first_step = (
            chance.randint(0, stored + 1) if resume and stored is not None and chance.random() < 0.5 else None
        )
        if not resume:
            shutil.rmtree(store, ignore_errors=True)
            store = folder / str(number)
        # One in eight at any moment of its start, when nothing may be stored yet.
        started = chance.random() < 7 / 8
        seconds = chance.uniform(0.0, longest)
        last, reads, vain = killed_after(seconds, store, resume, first_step, started=started)
        counts.update(kills=1, reads=reads, too_early=vain, resumed=resume)
        try:
            stored = check(store, last)
            counts.update(readable=1, rows=stored + 1)
        except (schema.SchemaError, FileNotFoundError) as error:
            if last is not None or (schema.is_live_store(store) and "no step was finished" not in str(error)):
                raise
            counts.update(before_the_first_step=1)
            stored = None
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds until the kill")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        counts = campaign(args.kills, folder, seed=args.seed, longest=args.longest)
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(" · ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
