"""How large are the states and the gradients at every depth, and do samples agree? Norms, rank, cosine."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import gradients as kernel
from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import States, row_blocks
from depthscope.diagnostics.quantities.token_spectra import noise_ranks
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema import CUT_GRADIENT, WITHOUT_GRADIENT

NUM_FEATURES = "num_features"
"""Attribute of the size of the states: their width, by which the sizes of stages of other widths can be compared."""


def _frobenius_norms(states: States) -> xr.DataArray:
    """Frobenius norms over all real tokens, by depth and stream."""

    def measure(views: np.ndarray) -> np.ndarray:
        rows = states.rows(views)
        parts = [kernel.gradient_norm(rows[:, part]) for part in row_blocks(rows)]
        return kernel.gradient_norm(np.stack(parts, axis=-1)[..., None])  # the norm of the norms

    return states.over_depth(measure)


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
def residual_norm(residual_states: States) -> xr.DataArray:
    r"""Size of the residual state of a token, root mean square over tokens.

    .. math:: \sqrt{\tfrac{1}{N} \textstyle\sum_i \|x_i\|^2}
    """
    norms = _frobenius_norms(residual_states) / np.sqrt(residual_states.mask.sum())
    # Known only now: `States` counts what is not finite while it reads the depths.
    return norms.assign_attrs({**residual_states.not_finite, NUM_FEATURES: residual_states.num_features})


@quantity
def gradient_norms(gradient_states: States) -> xr.DataArray:
    """Norms of the gradient over all real tokens."""
    # The attribute is taken after the norms, which read every depth; see `residual_norm`.
    return _frobenius_norms(gradient_states).assign_attrs(gradient_states.not_finite)


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
def gradient_norm(gradient_norms: xr.DataArray, gradient: xr.DataArray) -> xr.DataArray:
    r"""Norm of the gradient of the loss with respect to the residual state.

    .. math:: \|\delta_l\|_F, \quad \delta_l = \partial \mathcal{L} / \partial x_l

    Over all tokens together; a loss that is a mean over N tokens carries a factor 1/N (the run's
    ``loss_reduction``). The stream ``mean`` is the gradient averaged over streams: what a perturbation
    common to all of them would do, divided by n. NaN at depths that no gradient reached, as below frozen
    weights: the attribute ``without_gradient`` names them.
    """
    # Of the variable itself: quantities computed from it are new arrays without its attributes.
    named = {
        name: gradient.attrs[name] for name in (WITHOUT_GRADIENT, CUT_GRADIENT) if name in gradient.attrs
    }
    return gradient_norms.assign_attrs(named)


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
def backward_gain(gradient_norms: xr.DataArray) -> xr.DataArray:
    r"""Gradient at a depth over the gradient at the last depth: growth on the way back.

    .. math:: \|\delta_l\| / \|\delta_D\|
    """
    # A last gradient of zero leaves the gain undefined, not infinite.
    last = gradient_norms.isel(depth=-1, drop=True)
    return (gradient_norms / last.where(last > 0)).assign_coords(gradient_norms.coords)


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
def relative_gradient(residual_states: States, gradient_states: States, massive: Massive) -> xr.DataArray:
    r"""Sensitivity of the loss to a relative change of the state, token by token.

    .. math:: \sqrt{\textstyle\sum_i \|\delta_i\|^2 \, \|x_i\|^2}

    Branches that normalise their input make the gradient of a token inversely proportional to the token: this
    is what then stays constant across depth. Tokens with massive activations, whose size appears and goes at some depth
    and means nothing for the loss, are left out.
    """
    ordinary = ~massive.token.transpose("sample", "token").values[residual_states.mask]
    depths = [
        _product_of_norms(residual_states, gradient_states, depth, ordinary)
        for depth in range(len(gradient_states))
    ]
    # Not `over_depth`, which reads the states of one variable only.
    return gradient_states.labelled(np.stack(depths), ("depth", "stream"))


def _product_of_norms(states: States, gradients: States, depth: int, counted: np.ndarray) -> np.ndarray:
    """The relative gradient of every view at one depth, (V,); NaN where either is not finite."""
    state_views, finite_states = states.load(depth)
    gradient_views, finite_gradients = gradients.load(depth)
    # In float64: squares of float32 gradients below some 1e-23 would be zero.
    state_norms = np.linalg.norm(states.rows(state_views).astype(np.float64), axis=-1)
    gradient_norms = np.linalg.norm(gradients.rows(gradient_views).astype(np.float64), axis=-1)
    found = np.linalg.norm((state_norms * gradient_norms)[:, counted], axis=-1)
    if not counted.any():
        return np.full(len(found), np.nan)
    return np.where(finite_states & finite_gradients, found, np.nan)


def _sample_gradients(views: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Gradients summed over the tokens of each sequence that has some, (V, S, D)."""
    # Padding needs no mask, `States` has set it to zero; a sequence of padding alone has no gradient.
    return views[:, mask.any(axis=1)].sum(axis=2, dtype=np.float64)


def _rank_of_noise(gradient_states: States) -> xr.DataArray:
    """The effective rank of iid noise at the number of sequences and features."""
    # Rows are sequences here, not tokens.
    count = float(gradient_states.mask.any(axis=1).sum())
    return xr.DataArray(noise_ranks(count, gradient_states.num_features)["effective_rank"])


@metric(
    symbol=r"\mathrm{erank}(G)",
    dims="depth stream",
    cite="roy2007effective",
    basis="stream",
    null=_rank_of_noise,
    estimator="plug-in, over the sampled sequences",
    null_error=0.05,
)
def gradient_rank(gradient_states: States) -> xr.DataArray:
    r"""Effective rank of the gradients of different sequences: in how many directions they pull.

    .. math:: \mathrm{erank}(G), \quad G_s = \textstyle\sum_t \delta_{s,t}

    At most the number of sequences; 1 where all pull one way.
    """
    return gradient_states.over_depth(
        lambda views: rank.effective_rank(_sample_gradients(views, gradient_states.mask))
    )


@metric(
    symbol=r"\overline{\cos}(g_s, g_{s'})",
    dims="depth stream",
    cite="yu2020gradient",
    basis="stream",
    null=0.0,
    estimator="exact over all pairs of the sampled sequences",
)
def gradient_cosine(gradient_states: States) -> xr.DataArray:
    r"""Mean cosine between the gradients of different sequences: 1 when they agree, about 0 when none do.

    .. math:: \cos(g_s, g_{s'}), \quad g_s = \textstyle\sum_t \delta_{s,t}

    NaN for a single sequence.
    """
    return gradient_states.over_depth(
        lambda views: kernel.cosine_across_samples(_sample_gradients(views, gradient_states.mask))
    )
