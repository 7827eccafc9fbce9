"""How large are the states and the gradients at every depth, and do samples agree? Norms, rank, cosine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import gradients as kernel
from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.registry import quantity, ratio, with_attrs
from depthscope.diagnostics.quantities.states import States, row_blocks
from depthscope.diagnostics.quantities.token_spectra import noise_ranks
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema import CUT_GRADIENT, WITHOUT_GRADIENT

NUM_FEATURES = "num_features"
"""Attribute of the size of the states: their width, by which the sizes of stages of other widths can be compared."""


def _frobenius_norms(states: States) -> xr.Variable:
    """Frobenius norms over all real tokens, by depth and stream."""

    def measure(views: np.ndarray) -> np.ndarray:
        rows = states.rows(views)
        parts = [kernel.gradient_norm(rows[:, part]) for part in row_blocks(rows)]
        return kernel.gradient_norm(np.stack(parts, axis=-1)[..., None])  # the norm of the norms

    return states.over_depth(measure)


@quantity
def mean_square_norm(residual_states: States) -> xr.Variable:
    """Mean square of the norm of a token, by depth and stream."""
    norms = _frobenius_norms(residual_states) / np.sqrt(residual_states.mask.sum())
    # Known only now: `States` counts what is not finite while it reads the depths.
    return with_attrs(norms**2, {**residual_states.not_finite, NUM_FEATURES: residual_states.num_features})


@metric(
    symbol=r"\sqrt{\overline{\|x\|^2}}",
    dims="depth stream",
    scale="log",
    cite="brock2021characterizing",
    basis="stream",
    null="none: the scale is the model's; independent unit branches give the square root of the depth",
    estimator="root mean square over all real tokens",
    headline=True,
)
def residual_norm(mean_square_norm: xr.Variable) -> xr.Variable:
    r"""Size of the residual state of a token, root mean square over tokens.

    .. math:: \sqrt{\tfrac{1}{N} \textstyle\sum_i \|x_i\|^2}
    """
    return with_attrs(mean_square_norm**0.5, mean_square_norm.attrs)


@quantity
def gradient_norms(gradient_states: States) -> xr.Variable:
    """Norms of the gradient over all real tokens."""
    # The attribute is taken after the norms, which read every depth; see `residual_norm`.
    return with_attrs(_frobenius_norms(gradient_states), gradient_states.not_finite)


@quantity
def gradient_facts(gradient: xr.DataArray) -> dict[str, Any]:
    """Which depths no gradient reached, and which of these were cut off."""
    return {name: gradient.attrs[name] for name in (WITHOUT_GRADIENT, CUT_GRADIENT) if name in gradient.attrs}


@metric(
    symbol=r"\|\delta_l\|",
    dims="depth stream",
    scale="log",
    units="loss per activation",
    cite="pascanu2013difficulty",
    basis="stream",
    null="none: the scale is the loss's; compare depths",
    estimator="Frobenius norm over all real tokens",
    headline=True,
)
def gradient_norm(gradient_norms: xr.Variable, gradient_facts: Mapping[str, Any]) -> xr.Variable:
    r"""Norm of the gradient of the loss with respect to the residual state.

    .. math:: \|\delta_l\|_F, \quad \delta_l = \partial \mathcal{L} / \partial x_l

    Over all tokens together; a loss that is a mean over N tokens carries a factor 1/N (the run's
    ``loss_reduction``). The stream ``mean`` is the gradient averaged over streams: what a perturbation
    common to all of them would do, divided by n. NaN at depths that no gradient reached, as below frozen
    weights: the attribute ``without_gradient`` names them.
    """
    return with_attrs(gradient_norms, gradient_facts)


@metric(
    symbol=r"\|\delta_l\| / \|\delta_D\|",
    dims="depth stream",
    scale="log",
    cite="pascanu2013difficulty",
    basis="stream",
    null=1.0,
    estimator="ratio of Frobenius norms over all real tokens",
    better="nearer 1",
)
def backward_gain(gradient_norms: xr.Variable) -> xr.Variable:
    r"""Gradient at a depth over the gradient at the last depth: growth on the way back.

    .. math:: \|\delta_l\| / \|\delta_D\|
    """
    # A last gradient of zero leaves the gain undefined, not infinite.
    last = gradient_norms.isel(depth=-1)
    return ratio(gradient_norms, last)


@metric(
    symbol=r"\sqrt{\textstyle\sum_i \|\delta_i\|^2 \|x_i\|^2}",
    dims="depth stream",
    scale="log",
    units="loss",
    cite=OURS,
    basis="feature",
    null="none: the scale is the loss's; compare depths",
    estimator="norms of every ordinary token multiplied, then the root of the sum of squares over tokens",
)
def relative_gradient(
    token_norms: np.ndarray, gradient_token_norms: np.ndarray, ordinary_tokens: np.ndarray
) -> xr.Variable:
    r"""Sensitivity of the loss to a relative change of the state, token by token.

    .. math:: \sqrt{\textstyle\sum_i \|\delta_i\|^2 \, \|x_i\|^2}

    Branches that normalise their input make the gradient of a token inversely proportional to the token: this
    is what then stays constant across depth. Tokens with massive activations, whose size appears and goes at some depth
    and means nothing for the loss, are left out.
    """
    if not ordinary_tokens.any():
        return xr.Variable(("depth", "stream"), np.full(token_norms.shape[:2], np.nan))
    products = (token_norms * gradient_token_norms)[..., ordinary_tokens]
    return xr.Variable(("depth", "stream"), np.linalg.norm(products, axis=-1))


@quantity
def token_norms(residual_states: States) -> np.ndarray:
    """Norms of the real tokens of every view, (L, V, N)."""
    return _token_norms(residual_states)


@quantity
def gradient_token_norms(gradient_states: States) -> np.ndarray:
    """Norms of the gradient at the real tokens of every view, (L, V, N)."""
    return _token_norms(gradient_states)


def _token_norms(states: States) -> np.ndarray:
    found = []
    for depth in range(len(states)):
        views, finite = states.load(depth)
        # In float64: squares of float32 gradients below some 1e-23 would be zero.
        norms = np.linalg.norm(states.rows(views).astype(np.float64), axis=-1)
        found.append(np.where(finite[:, None], norms, np.nan))
    return np.stack(found)


@quantity
def ordinary_tokens(residual_states: States, massive: Massive) -> np.ndarray:
    """Which of the real tokens have no massive activation, (N,)."""
    return ~massive.token.values[residual_states.mask]


def _sample_gradients(views: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Gradients summed over the tokens of each sequence that has some, (V, S, D)."""
    # Padding needs no mask, `States` has set it to zero; a sequence of padding alone has no gradient.
    return views[:, mask.any(axis=1)].sum(axis=2, dtype=np.float64)


def _rank_of_noise(gradient_states: States) -> xr.Variable:
    """The effective rank of iid noise at the number of sequences and features."""
    # Rows are sequences here, not tokens.
    count = float(gradient_states.mask.any(axis=1).sum())
    return xr.Variable((), noise_ranks(count, gradient_states.num_features)["effective_rank"])


@metric(
    symbol=r"\mathrm{erank}(G)",
    dims="depth stream",
    cite="roy2007effective",
    basis="stream",
    null=_rank_of_noise,
    estimator="plug-in, over the sampled sequences",
    null_error=0.05,
    of_sequences=True,
)
def gradient_rank(gradient_states: States) -> xr.Variable:
    r"""Effective rank of the gradients of different sequences: in how many directions they pull.

    .. math:: \mathrm{erank}(G), \quad G_s = \textstyle\sum_t \delta_{s,t}

    At most the number of sequences; 1 where all pull one way.
    """
    return gradient_states.over_depth(
        lambda views: rank.effective_rank(_sample_gradients(views, gradient_states.mask))
    )
