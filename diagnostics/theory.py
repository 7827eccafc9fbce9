"""Which law stands beside a measured curve? Its values on the same axis, or the reason why it says nothing here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.special import expit, logsumexp, ndtr, ndtri

from diagnostics.kernels import meanfield
from diagnostics.quantities import Unavailable

ALIGNED = 0.2
"""Cosine of branch and stream from which they are not independent: fresh networks stay below 0.1. Heuristic."""
STOCHASTIC = 0.05
"""Mean violation up to which connections count as doubly stochastic. Heuristic."""
DRAWS = 200
"""Products behind the Gaussian product law: enough for a line, and quick."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A curve of an analysis, and what the same analysis says beside it.

    Parameters
    ----------
    curve : DataArray
        One variable along ``depth`` or ``connection``; its scalar coordinates say which slice it is.
    analysis : Dataset
        The analysis that it was taken from.
    """

    curve: xr.DataArray
    analysis: xr.Dataset

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The attributes of the run."""
        return {str(name): value for name, value in self.analysis.attrs.items()}

    def label(self, dim: str) -> str:
        """Which label of a dimension the curve is a slice of, empty where it never had that dimension.

        Parameters
        ----------
        dim : str
            A dimension of the analysis.

        Returns
        -------
        str
        """
        return str(self.curve.coords[dim].item()) if dim in self.curve.coords else ""

    def other(self, name: str, *, over: str = "", **labels: str) -> np.ndarray:
        """The same slice of another variable, along the axis of the curve.

        Parameters
        ----------
        name : str
            A variable of the analysis.
        over : str
            A dimension to keep whole, behind the axis of the curve.
        **labels : str
            What the curve itself does not say.

        Returns
        -------
        ndarray

        Raises
        ------
        Unavailable
            Where the analysis does not hold it, or not defined everywhere behind the first place.
        """
        if name not in self.analysis:
            raise Unavailable(f"the analysis holds no {name}")
        array = self.analysis[name]
        known = {str(dim): c.item() for dim, c in self.curve.coords.items() if c.ndim == 0 and dim != over}
        chosen = {dim: label for dim, label in (known | labels).items() if dim in array.dims}
        array = array.sel(chosen)
        if unsaid := [str(dim) for dim in array.dims if dim not in (*self.curve.dims, over)]:
            raise Unavailable(f"the curve does not say which {' and '.join(unsaid)} it is of")
        values = array.transpose(*self.curve.dims, ...).values.astype(np.float64)
        if not np.isfinite(values[1:]).all():
            raise Unavailable(f"{name} is not defined everywhere")
        return values


@dataclass(frozen=True)
class Law:
    """What theory says about a metric.

    Parameters
    ----------
    name, label : str
        For programs, and for a legend.
    equation : str
        TeX, without dollar signs.
    cite : str
        Key of ``references.bib``.
    assumption : str
        Where it holds; ends the sentence "It holds for".
    metrics : tuple of str
        The metrics that it stands beside.
    description : str
        The first line of the docstring.
    function : function or None
        A `Measured` in, values on its axis out; None where the metric's own null is the law.
    """

    name: str
    label: str
    equation: str
    cite: str
    assumption: str
    metrics: tuple[str, ...]
    description: str
    function: Callable[[Measured], np.ndarray] | None


@dataclass(frozen=True, eq=False)
class Overlay:
    """A law beside a curve: its values, or the reason why there are none.

    Parameters
    ----------
    law : Law
        The law.
    values : DataArray or None
        On the axis of the measured curve; NaN where the law says nothing.
    reason : str
        Why there are no values; empty where there are.
    """

    law: Law
    values: xr.DataArray | None
    reason: str = ""


LAWS: dict[str, Law] = {}
"""Every law by name."""


def law(
    *, label: str, equation: str, cite: str, assumption: str, metrics: tuple[str, ...]
) -> Callable[[Callable[[Measured], np.ndarray]], Callable[[Measured], np.ndarray]]:
    """Declare the function below as a law.

    Parameters
    ----------
    label, equation, cite, assumption, metrics
        See `Law`.

    Returns
    -------
    function
        A decorator that leaves the function as it is.
    """

    def declare(function: Callable[[Measured], np.ndarray]) -> Callable[[Measured], np.ndarray]:
        name = function.__name__
        first = (inspect.getdoc(function) or "").partition("\n")[0]
        LAWS[name] = Law(name, label, equation, cite, assumption, metrics, first, function)
        return function

    return declare


def beside(curve: xr.DataArray, analysis: xr.Dataset) -> list[Overlay]:
    """What theory says beside a measured curve.

    Parameters
    ----------
    curve : DataArray
        A slice of the analysis along ``depth`` or ``connection``, under the metric's name.
    analysis : Dataset
        The analysis that it was taken from.

    Returns
    -------
    list of Overlay
        One for each law of the metric, in the order of `LAWS`; none for a curve of one point.

    Examples
    --------
    >>> norm = xr.DataArray([1.0, 2.0], dims="depth", name="residual_norm")
    >>> beside(norm, norm.to_dataset())[0].reason
    'the analysis holds no adjacent_cosine'
    """
    if curve.size < 2:
        return []
    measured = Measured(curve, analysis)
    return [
        _overlay(found, measured) for found in LAWS.values() if curve.name in found.metrics and found.function
    ]


def _overlay(found: Law, measured: Measured) -> Overlay:
    assert found.function is not None
    try:
        values = found.function(measured)
    except Unavailable as reason:
        return Overlay(found, None, str(reason))
    return Overlay(found, measured.curve.copy(data=values))


def null_law(metric: str) -> Law | None:
    """The law that gives a metric's null.

    Parameters
    ----------
    metric : str
        A name of the catalogue.

    Returns
    -------
    Law or None
    """
    return next(
        (found for found in LAWS.values() if found.function is None and metric in found.metrics), None
    )


LAWS["marchenko_pastur"] = Law(
    name="marchenko_pastur",
    label="Marchenko-Pastur law",
    equation=r"\rho(\lambda) = \frac{\sqrt{(\lambda_+ - \lambda)(\lambda - \lambda_-)}}{2\pi\gamma\lambda}, \quad "
    r"\lambda_\pm = (1 \pm \sqrt{\gamma})^2, \quad \gamma = d/N",
    cite="marchenko1967distribution",
    assumption="independent entries of equal variance, at the same number of tokens and features",
    metrics=("effective_rank", "entropy_rank", "participation_ratio", "stable_rank"),
    description="Ranks of noise: it is the null of these metrics, beside them in every analysis.",
    function=None,
)


# --- residual networks ---


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
    training steps, beside several streams, or where a branch has a cosine above 0.2 with the stream that it is
    added to, as in trained networks: the law is of other networks then.
    """
    squares = _grown(measured)
    cosine = np.concatenate([[np.nan], np.sqrt(np.minimum(squares[:-1] / squares[1:], 1.0))])
    values = {
        "residual_norm": np.sqrt(squares),
        "block_influence": 1.0 - cosine,
        "angular_distance": np.arccos(cosine) / np.pi,
    }
    return values[str(measured.curve.name)]


def _grown(measured: Measured) -> np.ndarray:
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
    if not added.sum() > 1e-4 * squares[0]:
        raise Unavailable(
            "the first block adds nothing to the norm, as where a norm follows the sum (Post-LN)"
        )
    return squares[0] + np.concatenate([[0.0], np.cumsum(np.resize(added, len(squares) - 1))])


def _require_independent(norm: np.ndarray, cosine: np.ndarray) -> None:
    """Refuse branches that point along the stream or against it, from ‖x‖, ‖x + b‖ and cos(x, x + b)."""
    ratio = norm[1:] / norm[:-1]
    along = cosine[1:] * ratio - 1.0
    aligned = along / np.sqrt(np.maximum(ratio**2 - 2.0 * cosine[1:] * ratio + 1.0, np.finfo(float).tiny))
    worst = int(np.argmax(np.abs(aligned)))
    if not abs(aligned[worst]) <= ALIGNED:
        raise Unavailable(
            f"what is added before depth {worst + 1} is not independent of the stream: its cosine with it is "
            f"{aligned[worst]:.2f}"
        )


def _states_per_block(measured: Measured) -> int:
    """How many depths a block has; refused where blocks differ."""
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
    weights, which a run does not hold. Here r is relative to ‖X‖, which the law takes as constant. Drawn where
    the run says ``attrs={"pure_attention": True}``.
    """
    if not measured.attrs.get("pure_attention"):
        raise Unavailable(
            "skips and MLPs prevent this collapse; a run without them says so: pure_attention=True"
        )
    return cubic_collapse(*measured.curve.values[:2], num_depths=measured.curve.size)


def cubic_collapse(first: float, second: float, *, num_depths: int) -> np.ndarray:
    """Residuals that each are a constant times the cube of the one before.

    Parameters
    ----------
    first, second : float
        The first two, which set the constant.
    num_depths : int
        How many.

    Returns
    -------
    ndarray
        log r_l = ½ 3^l log(r_1/r_0) + ½ log(r_0³/r_1); 0 where it is below float64.

    Raises
    ------
    Unavailable
        Where the second is not smaller: the cube says nothing then.

    Examples
    --------
    >>> cubic_collapse(0.5, 0.25, num_depths=3).round(9).tolist()  # 2 r³: 2/64
    [0.5, 0.25, 0.03125]
    """
    if not 0 < second < first:
        raise Unavailable(f"the residual does not shrink at the first step: {first:.3g}, then {second:.3g}")
    logarithm = 0.5 * np.log(second / first)
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(3.0 ** np.arange(num_depths) * logarithm + 0.5 * np.log(first**3 / second))


# --- plain feed-forward networks ---


_SMOOTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda h: h * ndtr(h),
    "silu": lambda h: h * expit(h),
}


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

    Parameters
    ----------
    second_moment, cosine : float
        Mean square of a feature of the input, and the cosine between two inputs.
    num_depths : int
        The input and the layers behind it.
    activation : str
        ``"linear"``, ``"relu"``, ``"tanh"``, ``"erf"``, ``"gelu"`` or ``"silu"``.
    sigma_w, sigma_b : float
        Weights have variance σ_w²/width, biases σ_b².
    state : {"pre", "post"}
        Whether a layer's state is before its activation, h = W φ(h′) + b, or behind it, x = φ(W x′ + b).

    Returns
    -------
    MeanField

    Raises
    ------
    ValueError
        For an unknown activation or state, or an impossible cosine.

    Examples
    --------
    Orthogonal inputs through one ReLU layer have the cosine 1/π behind it:

    >>> found = mean_field_curve(1.0, 0.0, num_depths=2, activation="relu", sigma_w=2**0.5, state="post")
    >>> [round(float(x), 6) for x in (found.second_moment[1], found.cosine[1])]
    [1.0, 0.31831]
    """
    if state not in ("pre", "post"):
        raise ValueError(f"state is {state!r}; expected 'pre' or 'post' (the activation)")
    phi: meanfield.Activation = _SMOOTH.get(activation, activation)
    lengths, cosines = _maps(second_moment, cosine, num_depths, phi, sigma_w, sigma_b)
    slopes = np.array([meanfield.chi_1(sigma_w, sigma_b, phi, q) for q in lengths])
    if state == "pre":
        gains = np.concatenate([[sigma_w**2], slopes[: num_depths - 2]])
        moments, between = lengths[: num_depths - 1], cosines[: num_depths - 1]
    else:
        gains = slopes[: num_depths - 1]
        moments, between = _behind(lengths, cosines, sigma_w, sigma_b)
    backward = np.sqrt(np.cumprod(np.concatenate([[1.0], gains[: num_depths - 1][::-1]]))[::-1])
    return MeanField(
        np.concatenate([[second_moment], moments]), np.concatenate([[cosine], between]), backward
    )


def _maps(
    second_moment: float, cosine: float, count: int, phi: meanfield.Activation, sigma_w: float, sigma_b: float
) -> tuple[np.ndarray, np.ndarray]:
    """Variance and correlation of the pre-activations of so many layers; the first one reads the input itself."""
    q = sigma_w**2 * second_moment + sigma_b**2
    c = (sigma_w**2 * second_moment * cosine + sigma_b**2) / q if q > 0 else np.nan
    lengths, cosines = [q], [c]
    for _ in range(count - 1):
        cosines.append(meanfield.c_map(min(c, 1.0), q, sigma_w, sigma_b, phi))
        lengths.append(meanfield.q_map(q, sigma_w, sigma_b, phi))
        q, c = lengths[-1], cosines[-1]
    return np.array(lengths), np.array(cosines)


def _behind(
    lengths: np.ndarray, cosines: np.ndarray, sigma_w: float, sigma_b: float
) -> tuple[np.ndarray, np.ndarray]:
    """Moments behind each activation, from what the next layer makes of them."""
    square = lengths[1:] - sigma_b**2
    return square / sigma_w**2, (cosines[1:] * lengths[1:] - sigma_b**2) / square


_RANDOM = "wide layers of independent weights; the run says activation, sigma_w and sigma_b in its attribute mean_field"


def _mean_field(measured: Measured) -> MeanField:
    """The mean-field curves of the network that the run says it is, from its measured input."""
    told = measured.attrs.get("mean_field")
    if not told:
        raise Unavailable(
            "the run does not say that it is a random feed-forward network: no attribute mean_field"
        )
    if measured.label("centering") == "centred":
        raise Unavailable("the law is of cosines without centring")
    moments = [
        measured.other(name, stream="mean")[0] for name in ("channel_squared_mean", "channel_variance")
    ]
    first = measured.curve.values[0] if measured.curve.name == "token_cosine" else 0.0
    try:
        return mean_field_curve(sum(moments), float(first), num_depths=measured.curve.size, **told)
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

    The run says what it is: ``attrs={"mean_field": {"activation": "relu", "sigma_w": 1.41, "sigma_b": 0.0,
    "state": "pre"}}``; the state is ``"pre"`` before the activation (the default) or ``"post"`` behind it, and
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


# --- connections ---


@law(
    label="Gaussian product",
    equation=r"P_c = \prod_{k \le c} (a_k I + s_k G_k), \quad a = \mathrm{tr}\,H / n, \; "
    r"n^2 s^2 = \|H\|_F^2 - n a^2; \quad a = 0: \; \tfrac{1}{c} \ln \sigma_i \to "
    r"\tfrac{1}{2}\big(\ln 2 s^2 + \psi\big(\tfrac{n - i + 1}{2}\big)\big)",
    cite="newman1986distribution",
    assumption="connections that are independent and random but for their measured trace and norm",
    metrics=("composite_singular_value",),
)
def random_product(measured: Measured) -> np.ndarray:
    """Singular values of a product of random connections with the trace and the norm of the measured ones.

    G has independent standard normal entries. Where the connections are doubly stochastic the law is that on
    the differences between streams, and the first value is 1. Values are the mean or the median of 200 products
    with a fixed seed, as the curve is over tokens; NaN below 1e-12 of the first value, where float64 ends.
    """
    reduction = measured.label("reduction")
    if reduction not in ("mean", "median"):
        raise Unavailable(f"the law is of the mean or the median over tokens, not of their {reduction}")
    energies = _second_moment(measured, "mixing_singular_value", over="component")
    num_streams = energies.shape[1]
    energy = energies.sum(axis=1)
    distance = _second_moment(measured, "identity_distance")
    trace = 0.5 * (energy + num_streams * (1.0 - distance))  # ‖H − I‖² = ‖H‖² − 2 tr H + n
    violation = measured.other("doubly_stochastic_violation", over="kind", reduction="mean")
    stochastic = bool(violation.max() < STOCHASTIC)
    values = _reduced_products(tuple(trace), tuple(energy), num_streams, stochastic, reduction)
    return values[:, int(measured.label("component"))]


def _second_moment(measured: Measured, name: str, over: str = "") -> np.ndarray:
    """Mean square over tokens from the mean and, as of a normal law, the 1st and 99th percentile."""
    mean, low, high = (measured.other(name, over=over, reduction=label) for label in ("mean", "p1", "p99"))
    return mean**2 + ((high - low) / (2.0 * ndtri(0.99))) ** 2


@lru_cache(maxsize=64)
def _reduced_products(
    traces: tuple[float, ...], energies: tuple[float, ...], num_streams: int, stochastic: bool, reduction: str
) -> np.ndarray:
    """Singular values (connections, streams) over products of random matrices, the largest first."""
    common = 1 if stochastic else 0  # the mean over streams goes through a doubly stochastic matrix as it is
    trace, energy, size = np.array(traces) - common, np.array(energies) - common, num_streams - common
    if not (np.isfinite(trace).all() and np.isfinite(energy).all()):
        raise Unavailable("a connection is not defined")
    middle = trace / size
    spread = np.sqrt(np.maximum(energy - size * middle**2, 0.0)) / size
    if spread.max() < 1e-6:
        raise Unavailable("every connection is a multiple of the identity: nothing random multiplies")
    logarithms = _log_products(middle, spread, size)
    reduced = np.median(logarithms, axis=1) if reduction == "median" else _log_mean(logarithms)
    values = np.concatenate([np.ones((len(trace), common)), np.exp(reduced)], axis=1)
    return np.where(values > 1e-12 * values[:, :1], values, np.nan)


def _log_mean(logarithms: np.ndarray) -> np.ndarray:
    """Logarithm of the mean over draws, without overflow."""
    return logsumexp(logarithms, axis=1) - np.log(logarithms.shape[1])


def _log_products(middle: np.ndarray, spread: np.ndarray, size: int) -> np.ndarray:
    """Log singular values (connections, draws, size) of the products from the first connection on."""
    rng = np.random.default_rng(0)
    product, scale, found = np.broadcast_to(np.eye(size), (DRAWS, size, size)), np.zeros((DRAWS, 1)), []
    for a, s in zip(middle, spread, strict=True):
        product = (a * np.eye(size) + s * rng.standard_normal((DRAWS, size, size))) @ product
        largest = np.abs(product).max(axis=(1, 2), keepdims=True)
        product, scale = product / largest, scale + np.log(largest[:, 0])
        singular = np.linalg.svd(product, compute_uv=False)
        found.append(np.log(np.maximum(singular, np.finfo(float).tiny)) + scale)
    return np.stack(found)
