"""How large does each judged number get in healthy networks? ``python -m tests.verdicts.calibrate`` measures it.

Limits are argued from these numbers: one that healthy networks cross is too strict, one far beyond their worst is open to be
tightened. The draw is not one of those that are scored, so that no limit is tested on what it was made of.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthscope import diagnostics
from depthscope.diagnostics import Severity
from depthscope.diagnostics.verdicts import VERDICTS, calibration
from tests.verdicts import measuring, page
from tests.verdicts.drawing import healthy_network
from tests.verdicts.healthy import KINDS

FILE = Path(calibration.__file__).with_name("calibration.json")
DRAW, EACH = 20261125, 4
# Shares of the networks that are no worse than the number.
SHARES = (0.5, 0.9, 0.95, 0.99, 1.0)


def judged_values(kind: Any, seed: int) -> dict[str, tuple[float, bool]]:
    """By verdict the worst value of one healthy network, and whether it warns."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    plan, model = healthy_network(kind, rng)
    analysis = measuring.analysed(measuring.captured(model, plan))
    found: dict[str, tuple[float, bool]] = {}
    for finding in diagnostics.judge(analysis, passed=True):
        if not math.isfinite(finding.value):
            continue
        value, loud = finding.value, finding.severity > Severity.INFO
        if finding.verdict in found:  # of several chains or streams the worst
            other = found[finding.verdict]
            worst = max if VERDICTS[finding.verdict].limits.above else min
            value, loud = worst(value, other[0]), loud or other[1]
        found[finding.verdict] = value, loud
    return found


def quantiles(values: Iterable[float], *, above: bool) -> dict[str, float]:
    """The value that a share of the networks does not exceed, towards the side of the limits."""
    ordered = np.sort(np.array(list(values)))
    ordered = ordered if above else ordered[::-1]
    # An actual network's number and no interpolation: the worst few are what matters.
    places = {share: max(0, math.ceil(share * len(ordered)) - 1) for share in SHARES}
    return {f"{share:g}": float(f"{ordered[place]:.4g}") for share, place in places.items()}


def measured(draw: int, each: int) -> dict[str, Any]:
    """The calibration set's numbers."""
    rng = random.Random(draw)
    values: dict[str, list[tuple[float, bool, str]]] = defaultdict(list)
    for kind in KINDS:
        for _ in range(each):
            for name, (value, loud) in judged_values(kind, rng.randrange(2**31)).items():
                values[name].append((value, loud, kind.title))
    return {
        "command": f"python -m tests.verdicts.calibrate --draw {draw} --each {each}",
        "networks": each * len(KINDS),
        "kinds": [kind.title for kind in KINDS],
        "each": each,
        "verdicts": {name: _row(name, values[name]) for name in VERDICTS if name in values},
    }


def _row(name: str, found: list[tuple[float, bool, str]]) -> dict[str, Any]:
    limits = VERDICTS[name].limits
    worst = (max if limits.above else min)(found)
    return {
        "metric": VERDICTS[name].metric,
        "bad": "above" if limits.above else "below",
        "networks": len(found),
        "of_kinds": len({kind for _, _, kind in found}),
        "loud": sum(loud for _, loud, _ in found),
        "worst": worst[2],
        "shares": quantiles([value for value, _, _ in found], above=limits.above),
    }


def table(numbers: Mapping[str, Any]) -> str:
    """For the page: quantiles next to the limits of today."""
    head = ("verdict", "bad is", "WARN", "FAIL", "networks", "half", "90 %", "99 %", "worst", "the worst is")
    rows = [head, tuple("---" for _ in head)]
    for name, row in numbers["verdicts"].items():
        limits = VERDICTS[name].limits
        shares = [f"{row['shares'][share]:.3g}" for share in ("0.5", "0.9", "0.99", "1")]
        warn, fail = ("" if limit is None else f"{limit:g}" for limit in (limits.warn, limits.fail))
        rows.append((f"`{name}`", row["bad"], warn, fail, str(row["networks"]), *shares, row["worst"]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """Measure the calibration set."""
    parser = argparse.ArgumentParser(prog="python -m tests.verdicts.calibrate", description=__doc__)
    parser.add_argument("--draw", type=int, default=DRAW, metavar="SEED")
    parser.add_argument(
        "--each", type=int, default=EACH, metavar="N", help=f"networks of each kind (default {EACH})"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    numbers = measured(args.draw, args.each)
    FILE.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    page.write_calibration(numbers, table(numbers))
    sys.stdout.write(f"{table(numbers)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
