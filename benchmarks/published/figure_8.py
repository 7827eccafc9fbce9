"""The matrices that Figure 8 of the mHC paper prints (Xie et al., 2512.24880): connections 1, 30, 60 and three products."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

# Typed from the figure, printed to two decimals; rows are destinations.
DATA = Path(__file__).parent / "mhc_fig8.json"


def matrices(family: str) -> dict[str, np.ndarray]:
    """The printed matrices of ``"HC"`` or ``"mHC"`` by name: H1, H30, H60, P1-30, P31-60, P1-60."""
    printed = json.loads(DATA.read_text(encoding="utf-8"))[family]
    return {name: np.asarray(values, float) for name, values in printed.items()}


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
