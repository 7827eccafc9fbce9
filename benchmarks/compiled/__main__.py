"""What does recording compiled blocks cost? ``python -m benchmarks.compiled``: ratios to the plain compiled step, one thread.

Every way takes its turn in each round, so that what else the machine does falls on all of them; the ratios are of medians of
processor time over the rounds after the first steps, which are read uncompiled.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from contextlib import nullcontext, redirect_stderr
from io import StringIO

import torch

from benchmarks.capture.cases import Sizes
from benchmarks.gpu.__main__ import training
from depthscope import probes

SIZES = {"residual": Sizes(4, 256, 4, 128), "mhc": Sizes(1, 256, 4, 128)}
FIRST = 5  # rounds in which something is compiled, or read uncompiled


def main() -> None:
    """Print the ratios of each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for case in SIZES:
        seconds = steps(case, arguments.backend, FIRST + arguments.rounds)
        plain = statistics.median(seconds["a plain step"][FIRST:])
        for way, each in seconds.items():
            first, later = max(each[1:3]) / plain, statistics.median(each[FIRST:]) / plain
            print(f"{case}, {way}: {later:.2f}, in its first steps {first:.1f}")


def steps(case: str, backend: str, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every step, by what is recorded of it."""
    of = training(case, SIZES[case], "cpu")
    for block in of.model.transformer.h if case == "residual" else of.model.blocks:
        block.compile(backend=backend)
    of.step()
    with redirect_stderr(StringIO()):
        ways = {
            "a plain step": None,
            "between measured steps": probes.record(of.model, gradients=True, start_step=10**9),
            "sums and gradients": probes.record(of.model, gradients=True),
            "live": probes.record(of.model, gradients=True, metrics="live"),
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, recorder in ways.items():
                with recorder or nullcontext():
                    begin = time.process_time()
                    loss = of.step()
                    if recorder is not None:
                        recorder.step(loss)
                    found[way].append(time.process_time() - begin)
    return found


if __name__ == "__main__":
    main()
