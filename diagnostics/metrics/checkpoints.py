"""How far has training moved the network from its first checkpoint, and from its last? States and weights by step.

They are measured where a history of checkpoints is made, since no single one has the states of the others.
"""

from __future__ import annotations

import xarray as xr

from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.registry import ratio

SAMPLED = "the same 128 real tokens in every checkpoint, the mean over streams"


@metric(
    symbol=r"\mathrm{CKA}(X^{(t)}, X^{(0)})",
    dims="depth",
    label="CKA to the first checkpoint",
    cite="kornblith2019similarity",
    basis="stream",
    null=0.0,
    estimator=f"unbiased HSIC1, {SAMPLED}",
)
def first_checkpoint_cka(first_state_cka: xr.DataArray) -> xr.DataArray:
    r"""Linear CKA of a depth with itself in the first checkpoint: 1 where training has not changed the geometry of its tokens.

    .. math:: \mathrm{CKA}\big(X_l^{(t)}, X_l^{(0)}\big)

    0 for unrelated states; may be negative. NaN with fewer than four tokens, and where a state is not finite.
    """
    return first_state_cka


@metric(
    symbol=r"\mathrm{CKA}(X^{(t)}, X^{(T)})",
    dims="depth",
    label="CKA to the last checkpoint",
    cite="raghu2017svcca",
    basis="stream",
    null=0.0,
    estimator=f"unbiased HSIC1, {SAMPLED}",
)
def last_checkpoint_cka(last_state_cka: xr.DataArray) -> xr.DataArray:
    r"""Linear CKA of a depth with itself in the last checkpoint: near 1 from the step on at which it has converged.

    .. math:: \mathrm{CKA}\big(X_l^{(t)}, X_l^{(T)}\big)

    Of the checkpoints that the history has: a later one that is added changes every value. Where the first depths converge
    first, training goes from the bottom up (Raghu et al. 2017, who compare by SVCCA).
    """
    return last_state_cka


@metric(
    symbol=r"\|X^{(t)} - X^{(0)}\|_F / \|X^{(0)}\|_F",
    dims="depth",
    label="distance from the first states",
    scale="log",
    cite=OURS,
    basis="stream",
    null=2**0.5,
    estimator=SAMPLED,
)
def first_checkpoint_distance(first_state_distance: xr.DataArray) -> xr.DataArray:
    r"""Distance of the states from those of the first checkpoint, relative to these.

    .. math:: \|X_l^{(t)} - X_l^{(0)}\|_F / \|X_l^{(0)}\|_F

    √2 for independent states of the same norm. It grows with the norm of the states too, which CKA does not see.
    """
    return first_state_distance


@metric(
    symbol=r"\|W_m^{(t)} - W_m^{(0)}\|_F / \|W_m^{(0)}\|_F",
    dims="weight",
    label="distance from the first weights",
    scale="log",
    cite=OURS,
    basis="invariant",
    null="none: the learning rate and the number of steps decide; compare modules",
    estimator="exact, over all parameters that the module owns",
)
def first_weight_distance(
    weight_first_square_distance: xr.DataArray, weight_first_square_norm: xr.DataArray
) -> xr.DataArray:
    r"""Distance of a module's weights from those of the first checkpoint, relative to these.

    .. math:: \|W_m^{(t)} - W_m^{(0)}\|_F / \|W_m^{(0)}\|_F

    NaN where the first weights are zero, or have another shape.
    """
    return ratio(weight_first_square_distance, weight_first_square_norm) ** 0.5
