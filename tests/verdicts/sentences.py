"""What does every verdict say at each severity? ``python -m tests.verdicts.sentences`` prints it."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import Severity
from depthscope.diagnostics.verdicts import VERDICTS, last_step
from tests.verdicts import measuring
from tests.verdicts.drawing import cases, faulty_run
from tests.verdicts.faults import FAULTS
from tests.verdicts.scoring import by_chain

Said = tuple[str, Severity, str]
Place = tuple[str, Severity]


def found(analysis: xr.Dataset | xr.DataTree) -> Iterator[Said]:
    """The findings of one network."""
    for finding in diagnostics.judge(analysis, passed=True):
        yield finding.verdict, finding.severity, finding.sentence


def at_each_limit(analysis: xr.Dataset) -> Iterator[Said]:
    """What each verdict would say of this network if its worst number were beyond each of its limits."""
    for name, verdict in VERDICTS.items():
        for profile in verdict.profiles(analysis):
            limits, values = profile.limits or verdict.limits, profile.values.astype(float)
            if profile.sentence or not values.notnull().any():
                continue
            worst = (np.nanargmax if limits.above else np.nanargmin)(np.atleast_1d(values.values))
            for severity, limit in limits.levels:
                step = 0.5 * (1.0 - limit) if limits.scale == "cosine" else 0.05 * abs(limit) or 1.0
                moved = np.atleast_1d(values.values).copy()
                moved[worst] = limit + step if limits.above else limit - step
                other = replace(
                    profile,
                    values=values.copy(data=moved.reshape(values.shape)),
                    ceiling=Severity.FAIL,
                    start="",
                )
                alone = replace(verdict, function=lambda each=other, **_: [each])
                yield from ((name, severity, each.sentence) for each in alone.findings(analysis))


def collected(draw: int, words: list[str]) -> tuple[dict[Place, str], dict[Place, str]]:
    """The first sentence of each verdict at each severity: found in a faulty network, and moved there."""
    said: dict[Place, str] = {}
    moved: dict[Place, str] = {}
    for case in cases(draw, 2 * len(FAULTS)):
        if not case.faulty or (words and not any(word in case.what.title for word in words)):
            continue
        torch.manual_seed(case.seed)
        analysis = measuring.analysed(faulty_run(case.what, random.Random(case.seed))[2]())
        for name, severity, sentence in found(analysis):
            said.setdefault((name, severity), sentence)
        for part in by_chain(analysis).values():
            for name, severity, sentence in at_each_limit(last_step(part)):
                moved.setdefault((name, severity), sentence)
    return said, moved


def main() -> int:
    """Plant every fault once, and print what is said of it, and what would be said at the other limits."""
    parser = argparse.ArgumentParser(prog="python -m tests.verdicts.sentences", description=__doc__)
    parser.add_argument("--draw", type=int, default=9, metavar="SEED", help="of the networks (default 9)")
    parser.add_argument("words", nargs="*", help="only faults with one of these words in their title")
    args = parser.parse_args()
    torch.set_num_threads(1)
    said, moved = collected(args.draw, args.words)
    for name, verdict in VERDICTS.items():
        sys.stdout.write(f"\n{name}: {verdict.title}\n")
        for place in ((name, severity) for severity in Severity):
            mark = "" if place in said else " (moved there)"
            if place in said or place in moved:
                sys.stdout.write(f"  {place[1].name}{mark}: {said.get(place) or moved[place]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
