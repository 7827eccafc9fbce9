"""The command ``python -m tests.models.matrix``: minutes of models, then a table; exit code 1 where anything is wrong."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.matrix.cases import SEQUENCES, TOKENS, Case, NotBuildable, cases
from tests.models.matrix.verdict import CRASHED, FAILURES, NOT_BUILDABLE, Verdict, judge


@dataclass(frozen=True)
class Result:
    """What came of one model with one batch."""

    package: str
    name: str
    outcome: str
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Try the models that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.models.matrix", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="models with this in their package or name")
    parser.add_argument("--tenth", action="store_true", help="the fixed tenth that CI tries")
    parser.add_argument("--seed", type=int, default=0, help="of weights and captures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    start, results = time.monotonic(), list[Result]()
    for case in cases():
        if args.name in f"{case.package}/{case.name}" and (case.in_tenth or not args.tenth):
            for result in tried(case, args.seed):
                results.append(result)
                if result.outcome in FAILURES:  # at once: a run of minutes may be stopped before its table
                    reason = " ".join(result.reason.split())[:300]
                    sys.stderr.write(f"{result.outcome}: {result.package} {result.name}: {reason}\n")
    counts = dict(Counter(result.outcome for result in results))
    sys.stdout.write(f"{counts}\n\n{len(results)} in {time.monotonic() - start:.0f} s\n")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=0, default=str))
    return int(any(result.outcome in FAILURES for result in results))


def tried(case: Case, seed: int) -> Iterator[Result]:
    """Build and judge one model with all of its batches."""
    try:
        for subject in case.subjects(seed):
            verdict: Verdict = judge(subject.model, subject.make, case.expected, (SEQUENCES, TOKENS))
            known = {"class": type(subject.model).__name__, "batch": subject.recipe, "states": verdict.states}
            name = f"{case.name} {subject.note}".strip()
            yield Result(case.package, name, verdict.outcome, verdict.reason, known | verdict.facts)
    except NotBuildable as error:
        yield Result(case.package, case.name, NOT_BUILDABLE, " ".join(str(error).split()))
    except Exception as error:  # of the model's own code, or of ours: the table names it
        yield Result(case.package, case.name, CRASHED, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
