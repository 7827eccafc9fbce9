"""What do the matrices printed in Figure 8 of the mHC paper say? Products, sums and gains, recomputed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.app.figures import Figure, Heatmap, Line, Lines
from depthscope.app.study.reproductions.claims import Claim, Networks
from depthscope.app.study.reproductions.plan import MeasuredCell, Row, RunNumber, Scale, Study
from depthscope.diagnostics.kernels import mixing

# Typed from the figure, printed to two decimals; rows are destinations.
DATA = Path(__file__).parent / "mhc_fig8.json"
FAMILIES = {"HC": "HC", "mHC": "mHC"}
NAMES = ("H1", "H30", "H60", "P1-30", "P31-60", "P1-60")
LAYERS = 60
PAPER = "Xie et al., 2512.24880, Fig. 8"
# Printed to 0.01; a sum of four entries is known to 0.02, and a product of two matrices to a few hundredths of its largest.
SUM_ERROR, PRODUCT_ERROR = 0.02, 0.03


@cache
def _printed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def matrices(family: str) -> dict[str, np.ndarray]:
    """The printed matrices of a family, by name: three connections and three products."""
    return {name: np.asarray(values, float) for name, values in _printed()[family].items()}


def order_errors(family: str) -> tuple[float, float]:
    """How far P31-60 P1-30, and the product in the reversed order, are from the printed P1-60.

    Returns: Worst entry over the largest of P1-60, for each order.
    """
    printed = matrices(family)
    late, early, total = printed["P31-60"], printed["P1-30"], printed["P1-60"]
    right, reversed_order = (
        float(np.abs(product - total).max() / np.abs(total).max()) for product in (late @ early, early @ late)
    )
    return right, reversed_order


def measure(settings: Mapping[str, Any]) -> MeasuredCell:
    """Recompute what the printed matrices of a family give.

    Returns: Without a run: the matrices are not those of adjacent connections.
    """
    printed = matrices(settings["family"])
    right, reversed_order = order_errors(settings["family"])
    late, products = printed["P31-60"], [printed[name] for name in NAMES[3:]]
    numbers = {
        "order": right,
        "reversed": reversed_order,
        "least_sum": float(late.sum(0).min()),
        "largest_sum": float(mixing.backward_gain(late)),
        "spectral_norm": float(mixing.operator_gain(late, 2)),
        "gain_forward": max(float(mixing.forward_gain(product)) for product in products),
        "gain_backward": max(float(mixing.backward_gain(product)) for product in products),
        "row_error": max(float(np.abs(printed[name].sum(1) - 1).max()) for name in NAMES),
    }
    curves = {
        "row_sums": [float(total) for name in NAMES for total in printed[name].sum(1)],
        "column_sums": [float(total) for name in NAMES for total in printed[name].sum(0)],
    }
    return MeasuredCell(numbers, curves, None)


def _exact(statement: str, measured: str, name: str, family: str = "mHC", **limits: float) -> Claim:
    """A claim about a number of the printed matrices."""
    numbers = partial(Networks.numbers, name=name, family=family)
    return Claim(statement, PAPER, measured, numbers, exact=True, **limits)


CLAIMS = (
    *(
        claim
        for family in FAMILIES
        for claim in (
            _exact(
                f"{family}: the later half on the left gives the printed whole",
                "worst entry of P31-60 P1-30 against P1-60, share of the largest,",
                "order",
                family,
                below=PRODUCT_ERROR,
            ),
            Claim(
                f"{family}: the reversed order does not",
                PAPER,
                "its error over that of the right order",
                partial(
                    Networks.paired,
                    one=("order", family),
                    other=("reversed", family),
                    combine=lambda right, reversed_: reversed_ / right if right > 0 else math.inf,
                ),
                above=3.0,
                exact=True,
            ),
        )
    ),
    _exact("mHC: every row sums to 1, up to the printed digits", "largest error of a row sum", "row_error",
           below=SUM_ERROR + 0.005),
    _exact("mHC: the backward sums of P31-60 begin at the printed 0.41", "smallest column sum", "least_sum",
           above=0.41 - SUM_ERROR, below=0.41 + SUM_ERROR),
    _exact("mHC: the backward sums of P31-60 end at the printed 1.50", "largest column sum", "largest_sum",
           above=1.50 - SUM_ERROR, below=1.50 + SUM_ERROR),
    _exact("mHC: truncated Sinkhorn steps make P31-60 expansive", "its spectral norm", "spectral_norm",
           above=1.0 + SUM_ERROR),
    _exact("HC: gains of the printed products are above 10", "largest Amax gain of the three, forward,",
           "gain_forward", "HC", above=10.0),
    _exact("mHC: gains of the printed products stay within the 1.6 of the whole model",
           "largest Amax gain, backward,", "gain_backward", below=1.6 + SUM_ERROR),
)  # fmt: skip


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The matrices, and the sums of their rows and columns."""
    streams = np.arange(4)
    found: list[Figure] = []
    for row in rows:
        family = str(row.settings["family"])
        for name in NAMES:
            matrix = matrices(family)[name]
            caption = f"{name} of {family} as printed in Figure 8 of the mHC paper; a row is a destination."
            reach = float(np.abs(matrix).max())
            found.append(
                Heatmap(
                    f"fig8_{family.lower()}_{name.lower()}",
                    f"{family}, {name}",
                    streams,
                    streams,
                    matrix,
                    "from stream",
                    "to stream",
                    "weight",
                    limits=(-reach, reach),
                    diverging=True,
                    caption=caption,
                    alt=caption,
                    run=family,
                )
            )
        lines = tuple(
            Line(
                np.arange(len(row.curves[name]), dtype=float),
                np.asarray(row.curves[name]),
                label,
                group=label,
            )
            for name, label in (("row_sums", "row sums (forward)"), ("column_sums", "column sums (backward)"))
        )
        caption = (
            f"Sums of rows and columns of {', '.join(NAMES)} of {family}, four streams each, as printed."
        )
        found.append(
            Lines(
                f"fig8_{family.lower()}_sums",
                f"{family}: sums of the printed matrices",
                f"streams of {', '.join(NAMES)}",
                "sum",
                lines,
                caption=caption,
                alt=caption,
            )
        )
    return found


STUDY = Study(
    name="fig8",
    question="What do the matrices printed in Figure 8 of the mHC paper say?",
    sources=("Xie et al., mHC: Manifold-Constrained Hyper-Connections, 2512.24880, Figure 8",),
    families=FAMILIES,
    scale=Scale(depths=(LAYERS,), seeds=1, steps=0),
    quick=Scale(depths=(LAYERS,), seeds=1, steps=0),
    measure=measure,
    numbers=(
        RunNumber("order", "error of P31-60 P1-30"),
        RunNumber("reversed", "error of the reversed order"),
        RunNumber("gain_forward", "largest Amax gain, forward"),
        RunNumber("gain_backward", "largest Amax gain, backward"),
        RunNumber("least_sum", "smallest column sum of P31-60"),
        RunNumber("largest_sum", "largest column sum of P31-60"),
        RunNumber("spectral_norm", "spectral norm of P31-60"),
    ),
    curves=(),
    table=CLAIMS,
    limits=(
        "The matrices are means over tokens, printed to two decimals, of three of sixty connections: nothing is said "
        "here of single tokens, of the other connections, or of what they do to a loss. Nothing is trained."
    ),
    figures=figures,
    trained=False,
)
