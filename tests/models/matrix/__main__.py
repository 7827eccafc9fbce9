"""The command ``python -m tests.models.matrix``: minutes of models, then a table; exit code 1 where anything is wrong."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tests.models.matrix.campaign import Result, run_cases
from tests.models.matrix.cases import cases
from tests.models.matrix.verdict import FAILURES

# Imported before the processes are forked, so that not each of them spends a second on it.
SHARED = (
    "transformers.modeling_utils", "transformers.generation", "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip", "transformers.models.whisper.modeling_whisper",
    "transformers.models.swin.modeling_swin", "depthscope.probes.description",
)  # fmt: skip


def main() -> int:
    """Try the models that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.models.matrix", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="models with this in their package or name")
    parser.add_argument("--tenth", action="store_true", help="the fixed tenth that CI tries")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of weights and captures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    args = parser.parse_args()
    prepare()
    start = time.monotonic()
    chosen = [c for c in cases() if args.name in f"{c.package}/{c.name}" and (c.in_tenth or not args.tenth)]
    results = run_cases(chosen, seed=args.seed, jobs=args.jobs, on_result=_tell)
    summary(results, time.monotonic() - start)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=0, default=str))
    return int(any(result.outcome in FAILURES for result in results))


def prepare() -> None:
    """Settings and imports that every process shares."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name in SHARED:
        importlib.import_module(name)


def _tell(result: Result) -> None:
    # At once: a run of minutes may be stopped before its table.
    if result.outcome in FAILURES:
        sys.stderr.write(
            f"{result.outcome}: {result.package} {result.name}: {' '.join(result.reason.split())[:300]}\n"
        )


def summary(results: list[Result], seconds: float) -> None:
    """Counts, and the models that took longest."""
    slowest = sorted(results, key=lambda result: -result.seconds)[:5]
    sys.stdout.write(
        f"{dict(Counter(result.outcome for result in results))}\n\n{len(results)} in {seconds:.0f} s; longest: "
        f"{', '.join(f'{result.name} {result.seconds:.1f} s' for result in slowest)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
