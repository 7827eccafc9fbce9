"""What do wide random networks do? Lengths, cosines and gradients by mean-field theory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels import meanfield
from depthscope.diagnostics.quantities.registry import Unavailable
from depthscope.diagnostics.theory.laws import Measured, law


class MeanField(NamedTuple):
    """A wide random network by depth, the input first."""

    second_moment: np.ndarray  # mean square of a feature
    cosine: np.ndarray  # between two inputs
    backward_gain: np.ndarray  # gradient norm over that at the last depth


def mean_field_curve(
    second_moment: float,
    cosine: float,
    *,
    num_depths: int,
    activation: str,
    sigma_w: float,
    sigma_b: float = 0.0,
    state: str = "pre",
) -> MeanField:
    """Lengths, cosines and gradients of a wide random feed-forward network, layer after layer.

    ``second_moment, cosine``: mean square of a feature of the input, and the cosine between two inputs.
    ``num_depths``: the input and the layers after it.
    ``state``: whether a layer's state is before its activation, h = W φ(h′) + b, or after it, x = φ(W x′ + b).
    Raises InputError: For an unknown activation or state, or an impossible cosine.

    Examples
    --------
    Orthogonal inputs have the cosine 1/π after one ReLU layer:

    >>> found = mean_field_curve(1.0, 0.0, num_depths=2, activation="relu", sigma_w=2**0.5, state="post")
    >>> [round(float(x), 6) for x in (found.second_moment[1], found.cosine[1])]
    [1.0, 0.31831]
    """
    if state not in ("pre", "post"):
        raise InputError(f"state is {state!r}; expected 'pre' or 'post' (the activation)")
    lengths, cosines = _lengths_and_cosines(second_moment, cosine, num_depths, activation, sigma_w, sigma_b)
    slopes = np.array([meanfield.chi_1(sigma_w, sigma_b, activation, q) for q in lengths])
    if state == "pre":
        # The first layer reads the input itself, without an activation: its gain is σ_w² alone.
        gains = np.concatenate([[sigma_w**2], slopes[: num_depths - 2]])
        moments, between = lengths[: num_depths - 1], cosines[: num_depths - 1]
    else:
        gains = slopes[: num_depths - 1]
        # The next layer's pre-activation has variance σ_w² E φ² + σ_b² and covariance σ_w² E φφ′ + σ_b²: solve for φ.
        activated = lengths[1:] - sigma_b**2
        moments = activated / sigma_w**2
        between = (cosines[1:] * lengths[1:] - sigma_b**2) / activated
    # Products of the squared gains from the last depth down to each.
    backward = np.sqrt(np.cumprod(np.concatenate([[1.0], gains[: num_depths - 1][::-1]]))[::-1])
    return MeanField(
        np.concatenate([[second_moment], moments]), np.concatenate([[cosine], between]), backward
    )


def _lengths_and_cosines(
    second_moment: float, cosine: float, count: int, activation: str, sigma_w: float, sigma_b: float
) -> tuple[np.ndarray, np.ndarray]:
    """Variance and correlation of the pre-activations of ``count`` layers; the first layer reads the input itself."""
    q = sigma_w**2 * second_moment + sigma_b**2
    c = (sigma_w**2 * second_moment * cosine + sigma_b**2) / q if q > 0 else np.nan
    lengths, cosines = [q], [c]
    for _ in range(count - 1):
        # Rounding can lift a correlation above 1, which the map refuses.
        cosines.append(meanfield.c_map(min(c, 1.0), q, sigma_w, sigma_b, activation))
        lengths.append(meanfield.q_map(q, sigma_w, sigma_b, activation))
        q, c = lengths[-1], cosines[-1]
    return np.array(lengths), np.array(cosines)


_RANDOM = (
    "wide layers of independent weights; the run's attribute mean_field gives activation, sigma_w and sigma_b"
)


def _mean_field(measured: Measured) -> MeanField:
    """The mean-field curves of the network that the run's attributes describe, from its measured input."""
    network = measured.attrs.get("mean_field")
    if not network:
        raise Unavailable(
            "the run does not say that it is a random feed-forward network: no attribute mean_field"
        )
    if measured.label("centering") == "centred":
        raise Unavailable("the law is of cosines without centring")
    # E x² = (E x)² + Var x, each averaged over features.
    moments = [
        measured.other(name, stream="mean")[0] for name in ("channel_squared_mean", "channel_variance")
    ]
    # Lengths and gradients do not depend on the cosine.
    first = measured.curve.values[0] if measured.curve.name == "token_cosine" else 0.0
    try:
        return mean_field_curve(sum(moments), float(first), num_depths=measured.curve.size, **network)
    except (TypeError, ValueError) as error:
        raise Unavailable(f"the attribute mean_field does not describe a network: {error}") from error


@law(
    label="mean-field length map",
    equation=r"q_{l+1} = \sigma_w^2\, \mathbb{E}\,\varphi(\sqrt{q_l}\, z)^2 + \sigma_b^2, \quad z \sim N(0, 1)",
    cite="poole2016exponential",
    assumption=_RANDOM,
    metrics=("residual_norm",),
)
def mean_field_length(measured: Measured) -> np.ndarray:
    """Length of the states of a wide random feed-forward network, from that of its input.

    The run describes the network: ``attrs={"mean_field": {"activation": "relu", "sigma_w": 1.41, "sigma_b": 0.0,
    "state": "pre"}}``; the state is ``"pre"``, before the activation (the default), or ``"post"``, after it, and
    depth 0 is the input of the first layer.
    """
    moments = _mean_field(measured).second_moment
    return measured.curve.values[0] * np.sqrt(moments / moments[0])


@law(
    label="mean-field correlation map",
    equation=r"c_{l+1} = \big(\sigma_w^2\, \mathbb{E}\,\varphi(u)\varphi(v) + \sigma_b^2\big) / q_{l+1}, \quad "
    r"\mathrm{Var}\,u = \mathrm{Var}\,v = q_l, \; \mathrm{corr}(u, v) = c_l",
    cite="poole2016exponential",
    assumption=_RANDOM,
    metrics=("token_cosine",),
)
def mean_field_correlation(measured: Measured) -> np.ndarray:
    """Cosine between the states of two tokens of a wide random feed-forward network, from that of its inputs."""
    return _mean_field(measured).cosine


@law(
    label="mean-field gradient",
    equation=r"\|\delta_l\|^2 = \chi_1(q_l)\, \|\delta_{l+1}\|^2, \quad "
    r"\chi_1 = \sigma_w^2\, \mathbb{E}\,\varphi'(\sqrt{q}\, z)^2",
    cite="schoenholz2017deep",
    assumption=_RANDOM,
    metrics=("backward_gain",),
)
def mean_field_gradient(measured: Measured) -> np.ndarray:
    """Gradient of a wide random feed-forward network over that at its last depth."""
    return _mean_field(measured).backward_gain
