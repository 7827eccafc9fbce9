"""What do fresh residual networks do, and attention without skips? Growth block by block, and the cubic collapse."""

from __future__ import annotations

import numpy as np

from depthscope.diagnostics.quantities.registry import Unavailable
from depthscope.diagnostics.quantities.token_steps import NO_BRANCH
from depthscope.diagnostics.theory.laws import Measured, law

ALIGNED = 0.2
"""Cosine of branch and stream above which they are not independent: fresh networks are below 0.1. Heuristic."""


@law(
    label="fresh Pre-LN growth law",
    equation=r"\|x_l\|^2 = \|x_0\|^2 + l\,a, \quad \cos(x_{l-1}, x_l) = \|x_{l-1}\| / \|x_l\|",
    cite="xiong2020layer",
    assumption="branches that are independent of the stream and all as large as those of the first block",
    metrics=("residual_norm", "block_influence", "angular_distance"),
)
def pre_ln_growth(measured: Measured) -> np.ndarray:
    """Growth of a fresh Pre-LN network: every block adds to the squared norm what the first one added.

    The constant a is measured at the first block (state by state, where a block has several). Not drawn after
    training steps, for several streams, or where a branch has a cosine above 0.2 with the stream that it is added
    to, as in trained networks: the law assumes independence.
    """
    squares = _squared_norms(measured)
    # x_l = x_{l−1} + b with b ⊥ x_{l−1}: cos(x_{l−1}, x_l) = ‖x_{l−1}‖/‖x_l‖.
    cosine = np.concatenate([[np.nan], np.sqrt(np.minimum(squares[:-1] / squares[1:], 1.0))])
    values = {
        "residual_norm": np.sqrt(squares),
        "block_influence": 1.0 - cosine,
        "angular_distance": np.arccos(cosine) / np.pi,
    }
    return values[str(measured.curve.name)]


def _squared_norms(measured: Measured) -> np.ndarray:
    """Squared norms by depth, from the first block's growth."""
    if measured.analysis.sizes.get("stream", 1) > 1:
        raise Unavailable("the law is of one residual stream, the run has several")
    step = int(measured.curve.coords["step"]) if "step" in measured.curve.coords else 0
    if step > 0:
        raise Unavailable(f"the law is of a fresh network, the run is at training step {step}")
    norm = measured.other("residual_norm", stream="mean")
    if not (norm > 0).all():
        raise Unavailable("a state is zero or undefined")
    _require_independent(norm, measured.other("adjacent_cosine", stream="mean"))
    squares = norm**2
    added = np.diff(squares)[: _states_per_block(measured)]
    # A threshold of ours: above the float32 rounding of squared norms, below any branch that adds something.
    if not added.sum() > 1e-4 * squares[0]:
        raise Unavailable(
            "the first block adds nothing to the norm, as where a norm follows the sum (Post-LN)"
        )
    # The growth of the first block, state by state, repeated for every later one.
    return squares[0] + np.concatenate([[0.0], np.cumsum(np.resize(added, len(squares) - 1))])


@law(
    label="independent branches",
    equation=r"\|x_l\|^2 = \|x_0\|^2 + \textstyle\sum_{k \le l} \|b_k\|^2, \quad "
    r"\angle(x_{l-1}, x_l) = \arctan \sqrt{a / (\|x_0\|^2 + (k - 1)\,a)}",
    cite="sun2025curse",
    assumption="branches of one size that are independent of the state, whatever the training",
    metrics=("variance_growth", "relative_turn", "effective_depth"),
)
def independent_branches(measured: Measured) -> np.ndarray:
    """Independent branches: they add up in their squares, each counts in full, and none is the identity.

    Where the branches of a Pre-LN network are aligned its state grows faster, and the later ones turn it less than this:
    the curse of depth.
    """
    values = np.ones(measured.curve.size)
    if measured.curve.name != "effective_depth":
        return values
    if "site" in measured.curve.coords:
        values[np.isin(measured.curve["site"].values.astype(object).astype(str), NO_BRANCH)] = 0.0
    values[0] = 0.0
    return np.cumsum(values)


def _require_independent(norm: np.ndarray, cosine: np.ndarray) -> None:
    """Refuse branches b with a component along the stream x, from ‖x‖, ‖x + b‖ and cos(x, x + b)."""
    # With ‖x‖ = 1 and r = ‖x + b‖: ⟨b, x⟩ = r cos − 1 and ‖b‖² = r² − 2 r cos + 1.
    ratio = norm[1:] / norm[:-1]
    along = cosine[1:] * ratio - 1.0
    aligned = along / np.sqrt(np.maximum(ratio**2 - 2.0 * cosine[1:] * ratio + 1.0, np.finfo(float).tiny))
    # "not ≤" refuses NaN too.
    worst = int(np.argmax(np.abs(aligned)))
    if not abs(aligned[worst]) <= ALIGNED:
        raise Unavailable(
            f"what is added before depth {worst + 1} is not independent of the stream: its cosine with it is "
            f"{aligned[worst]:.2f}"
        )


def _states_per_block(measured: Measured) -> int:
    """Number of depths of a block; refused where blocks differ."""
    if "layer" not in measured.curve.coords:
        raise Unavailable("the depths carry no block numbers")
    counts = np.unique(measured.curve["layer"].values[1:], return_counts=True)[1]
    if np.ptp(counts):
        raise Unavailable("the law repeats the first block, the blocks here differ in their number of states")
    return int(counts[0])


@law(
    label="Dong's cubic law",
    equation=r"r_{l+1} = C\, r_l^3, \quad C = r_1 / r_0^3",
    cite="dong2021attention",
    assumption="attention without skips and MLPs; C is that of the first step and not Dong's constant, "
    "which needs the weights",
    metrics=("dong_residual",),
)
def dong_cubic(measured: Measured) -> np.ndarray:
    r"""Dong's bound, doubly exponential in depth, with the constant of the first step.

    The bound itself is r_{l+1} ≤ 4βH r_l³/√d_qk for the norm √(‖·‖₁ ‖·‖_∞) of the residual; β and H are in the
    weights, which a run does not contain. Here r is relative to ‖X‖, which the law takes as constant. Drawn for
    runs with ``attrs={"pure_attention": True}``.
    """
    if not measured.attrs.get("pure_attention"):
        raise Unavailable(
            "skips and MLPs prevent this collapse; a run without them has the attribute pure_attention=True"
        )
    return cubic_collapse(*measured.curve.values[:2], num_depths=measured.curve.size)


def cubic_collapse(first: float, second: float, *, num_depths: int) -> np.ndarray:
    """Residuals of which each is a constant times the cube of the one before.

    ``first, second``: the first two, which set the constant.
    Returns: log r_l = ½ 3^l log(r_1/r_0) + ½ log(r_0³/r_1); 0 where it underflows.
    Raises Unavailable: Where the second is not smaller: there is no collapse.

    Examples
    --------
    >>> cubic_collapse(0.5, 0.25, num_depths=3).round(9).tolist()  # 2 r³: 2/64
    [0.5, 0.25, 0.03125]
    """
    if not 0 < second < first:
        raise Unavailable(f"the residual does not shrink at the first step: {first:.3g}, then {second:.3g}")
    # In closed form and logarithms: r underflows after a few steps, and 3^l overflows after 646.
    logarithm = 0.5 * np.log(second / first)
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(3.0 ** np.arange(num_depths) * logarithm + 0.5 * np.log(first**3 / second))
