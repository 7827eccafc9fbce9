"""What mixing matrices do to the streams, one by one and multiplied over depth.

Shapes: ``L`` depth, ``...`` batch (tokens), ``n`` streams; matrices ``H[..., out, in]``, a row is a
destination. Composites put the later layer on the LEFT: P_{a→b} = H_b … H_{a+1} H_a. Always float64;
products keep a running log scale, so that no depth overflows.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import device

from diagnostics.kernels._arrays import Array, as_float64, peak, ratio
from diagnostics.kernels.rank import condition_of, effective_rank_of

# A running product is rescaled when its largest entry leaves this range; inside, it is the plain product.
SMALL, LARGE = 1e-100, 1e100
LOG_MAX = 709.78
# Numbers of one block of all-pairs products: 1 MB, to stay in a core's cache.
BLOCK = 131_072
# Up to this size products run entry by entry over the batch, which beats a call per matrix.
ENTRYWISE = 8


def _square(p: Array, *, name: str = "p", ndim: int = 2) -> tuple[Any, Array]:
    """The namespace and the float64 value of square matrices (..., n, n)."""
    xp, p = as_float64(p, name=name, ndim=ndim)
    if p.shape[-1] != p.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(p.shape)}; expected square mixing matrices (..., n, n)")
    return xp, p


def _identity(xp: Any, p: Array) -> Array:
    """The identity (n, n) beside ``p``."""
    return xp.eye(p.shape[-1], dtype=xp.float64, device=device(p))


def _log(xp: Any, x: Array) -> Array:
    """Ln x of values ≥ 0, −inf at zero without a warning."""
    return xp.where(x > 0, xp.log(xp.where(x > 0, x, xp.ones_like(x))), xp.full_like(x, -xp.inf))


def sinkhorn(logits: Array, steps: int = 20, last: str = "row") -> Array:
    """Sinkhorn-Knopp of exp(logits): columns and rows normalised in turn, ``steps`` times, in logarithms.

    Parameters
    ----------
    logits
        (..., n, n).
    steps
        Number of (column, row) rounds; mHC uses 20.
    last
        ``"row"`` (mHC: row sums exact, truncation error in the columns) or ``"column"``.

    Returns
    -------
    Array
        Nearly doubly stochastic matrices (..., n, n). Source: mHC 2512.24880, Eq. 9.

    Raises
    ------
    ValueError
        If ``last`` or ``steps`` is not one of those, or logits are not finite.

    Examples
    --------
    >>> sinkhorn([[0.0, 0.0], [0.0, 0.0]]).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if last not in ("row", "column") or steps < 1:
        raise ValueError(
            f"last is {last!r} and steps {steps}; expected 'row' or 'column', and at least 1 step"
        )
    xp, logs = _square(logits, name="logits")
    order = (-2, -1) if last == "row" else (-1, -2)
    for _ in range(steps):
        for axis in order:
            top = xp.max(logs, axis=axis, keepdims=True)
            logs = logs - top
            logs = logs - xp.log(xp.sum(xp.exp(logs), axis=axis, keepdims=True))
    return xp.exp(logs)


def forward_gain(p: Array) -> Array:
    """Amax gain forward: max_i |Σ_j P_ij|, the largest signed row sum.

    Parameters
    ----------
    p
        Mixing matrices or composites (..., n, n), rows are destinations.

    Returns
    -------
    Array
        (...); 1 for a row-stochastic matrix. Source: mHC 2512.24880, Fig. 3.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(forward_gain([[1.0, 2.0], [3.0, -3.0]]))
    3.0
    """
    xp, p = _square(p)
    return xp.max(xp.abs(xp.sum(p, axis=-1)), axis=-1)


def backward_gain(p: Array) -> Array:
    """Amax gain backward: max_j |Σ_i P_ij|, the largest signed column sum.

    Parameters
    ----------
    p
        Mixing matrices or composites (..., n, n), rows are destinations.

    Returns
    -------
    Array
        (...); 1 for a column-stochastic matrix. Source: mHC 2512.24880, Fig. 3.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(backward_gain([[1.0, 2.0], [3.0, -3.0]]))
    4.0
    """
    xp, p = _square(p)
    return xp.max(xp.abs(xp.sum(p, axis=-2)), axis=-1)


def log_forward_gain(p: Array, log_scale: Array | float = 0.0) -> Array:
    """Logarithm of the forward Amax gain of p · e^log_scale, finite where the gain itself would overflow.

    Parameters
    ----------
    p
        Matrices (..., n, n).
    log_scale
        (...), as the composites return it.

    Returns
    -------
    Array
        (...), natural logarithm; −inf for zero sums.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(log_forward_gain([[1.0, 0.0], [0.0, 1.0]], 5000.0))
    5000.0
    """
    xp, p = _square(p)
    return _log(xp, forward_gain(p)) + log_scale


def log_backward_gain(p: Array, log_scale: Array | float = 0.0) -> Array:
    """Logarithm of the backward Amax gain of p · e^log_scale, finite where the gain itself would overflow.

    Parameters
    ----------
    p
        Matrices (..., n, n).
    log_scale
        (...), as the composites return it.

    Returns
    -------
    Array
        (...), natural logarithm; −inf for zero sums.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(log_backward_gain([[1.0, 0.0], [0.0, 1.0]], -2000.0))
    -2000.0
    """
    xp, p = _square(p)
    return _log(xp, backward_gain(p)) + log_scale


def operator_gain(p: Array, ord: float = math.inf) -> Array:
    """Operator norm ‖P‖_∞ (rows), ‖P‖₁ (columns) or ‖P‖₂: what signed sums can hide by cancellation.

    Parameters
    ----------
    p
        Matrices (..., n, n).
    ord
        ``math.inf``, 1 or 2.

    Returns
    -------
    Array
        (...).

    Raises
    ------
    ValueError
        If ``ord`` is another, or ``p`` is not square or not finite.

    Examples
    --------
    >>> float(operator_gain([[1.0, 2.0], [3.0, -3.0]]))
    6.0
    """
    xp, p = _square(p)
    if ord == 2:
        return singular_values(p)[..., 0]
    if ord not in (1, math.inf):
        raise ValueError(f"ord is {ord!r}; expected 1, 2 or math.inf")
    return xp.max(xp.sum(xp.abs(p), axis=-2 if ord == 1 else -1), axis=-1)


class Attenuation(NamedTuple):
    """The weakest sums of a matrix, which the largest hide."""

    row: Array  # (...), min_i |Σ_j P_ij|: forward
    column: Array  # (...), min_j |Σ_i P_ij|: backward
    log_deviation: Array  # (...), max |ln |sum|| over rows and columns; infinite at a zero sum


def attenuation(p: Array) -> Attenuation:
    """Attenuation: the smallest signed sums, and the largest distance of any sum from 1 in logarithms.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Attenuation
        row, column and log_deviation, (...) each.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> found = attenuation([[0.5, 0.0], [0.0, 1.0]])
    >>> float(found.row), float(found.column), float(found.log_deviation) == math.log(2)
    (0.5, 0.5, True)
    """
    xp, p = _square(p)
    out, into = xp.abs(xp.sum(p, axis=-1)), xp.abs(xp.sum(p, axis=-2))
    logs = xp.abs(_log(xp, xp.concat([out, into], axis=-1)))
    return Attenuation(xp.min(out, axis=-1), xp.min(into, axis=-1), xp.max(logs, axis=-1))


def singular_values(p: Array) -> Array:
    """Singular values of small matrices, descending, by SVD (never by squaring).

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (..., n).

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> singular_values([[0.0, 2.0], [1.0, 0.0]]).tolist()
    [2.0, 1.0]
    """
    xp, p = _square(p)
    if p.shape[-1] == 1:
        return xp.abs(p[..., 0])
    return _two_singular_values(xp, p) if p.shape[-1] == 2 else xp.linalg.svdvals(p)


def _two_singular_values(xp: Any, p: Array) -> Array:
    """Singular values of 2×2 matrices: σ₁ from the two conformal parts, σ₂ = |det|/σ₁."""
    scale = peak(xp, p)
    a, b, c, d = (p[..., i, j] / scale[..., 0, 0] for i in (0, 1) for j in (0, 1))
    first = (xp.hypot(a + d, b - c) + xp.hypot(a - d, b + c)) / 2.0
    second = xp.abs(a * d - b * c) / xp.where(first > 0, first, xp.ones_like(first))
    return xp.stack([first, second], axis=-1) * scale[..., 0]


def eigenvalues(p: Array) -> Array:
    """Eigenvalues, complex, in descending order of magnitude.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (..., n), complex128.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> eigenvalues([[0.5, 0.5], [0.5, 0.5]]).real.round(12).tolist()
    [1.0, 0.0]
    """
    xp, p = _square(p)
    values = xp.astype(xp.linalg.eigvals(p), xp.complex128)
    return xp.take_along_axis(values, xp.argsort(-xp.abs(values), axis=-1, stable=True), axis=-1)


def spectral_gap(p: Array) -> Array:
    """Spectral gap 1 − |λ₂|: how fast streams become equal under repeated mixing.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...); NaN for a single stream.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(spectral_gap([[0.75, 0.25], [0.25, 0.75]]).round(12))
    0.5
    """
    xp, p = _square(p)
    if p.shape[-1] == 1:
        return xp.full_like(p[..., 0, 0], xp.nan)
    return 1.0 - xp.abs(eigenvalues(p)[..., 1])


def condition_number(p: Array) -> Array:
    """Condition number σ_max/σ_min.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...), at least 1; infinite when singular, NaN for a zero matrix.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(condition_number([[4.0, 0.0], [0.0, 2.0]]))
    2.0
    """
    return condition_of(singular_values(p))


def henrici(p: Array) -> Array:
    """Henrici's departure from normality √(‖A‖_F² − Σ|λ|²).

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...); 0 for a normal matrix: a difference within rounding, 8 n ε ‖A‖_F², counts as zero.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(henrici([[1.0, 2.0], [0.0, 1.0]]).round(9))
    2.0
    """
    xp, p = _square(p)
    scale = peak(xp, p)
    size = xp.sum((p / scale) ** 2, axis=(-2, -1))
    excess = size - xp.sum(xp.abs(eigenvalues(p / scale)) ** 2, axis=-1)
    rounding = 8.0 * p.shape[-1] * xp.finfo(xp.float64).eps * size
    return scale[..., 0, 0] * xp.sqrt(xp.where(excess > rounding, excess, xp.zeros_like(excess)))


def numerical_radius(p: Array) -> Array:
    """Numerical radius max_θ λ_max(Re e^{iθ}A): the largest |x*Ax| over unit vectors.

    For real A angles from 0 to π suffice: 65 of them, then a golden-section search around the best.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...), between ‖A‖₂/2 and ‖A‖₂.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(numerical_radius([[0.0, 1.0], [0.0, 0.0]]).round(9))
    0.5
    """
    xp, p = _square(p)
    even, odd = (p + xp.matrix_transpose(p)) / 2.0, (p - xp.matrix_transpose(p)) / 2.0
    even, odd = xp.astype(even, xp.complex128), 1j * xp.astype(odd, xp.complex128)

    def support(angle: Array) -> Array:
        cosine, sine = (xp.astype(f(angle), xp.complex128)[..., None, None] for f in (xp.cos, xp.sin))
        return xp.max(xp.linalg.eigvalsh(cosine * even + sine * odd), axis=-1)

    step = math.pi / 64
    flat = xp.zeros_like(p[..., 0, 0])
    grid = xp.stack([support(flat + k * step) for k in range(65)], axis=-1)
    center = xp.astype(xp.argmax(grid, axis=-1), xp.float64) * step
    return xp.maximum(xp.max(grid, axis=-1), _golden_maximum(xp, support, center - step, center + step))


def _golden_maximum(xp: Any, of: Callable[[Array], Array], low: Array, high: Array, steps: int = 36) -> Array:
    """The maximum of a function on intervals, by golden section."""
    share = (math.sqrt(5.0) - 1.0) / 2.0
    best = xp.maximum(of(low), of(high))
    for _ in range(steps):
        left, right = high - share * (high - low), low + share * (high - low)
        at_left, at_right = of(left), of(right)
        rises = at_right > at_left
        low, high = xp.where(rises, left, low), xp.where(rises, high, right)
        best = xp.maximum(best, xp.maximum(at_left, at_right))
    return best


def dobrushin(p: Array) -> Array:
    """Dobrushin coefficient τ = ½ max_{i,k} ‖A_i − A_k‖₁ over rows; submultiplicative.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...); between 0 (equal rows) and 1 for row-stochastic matrices.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(dobrushin([[1.0, 0.0], [0.25, 0.75]]))
    0.75
    """
    xp, p = _square(p)
    apart = xp.abs(p[..., :, None, :] - p[..., None, :, :])
    return 0.5 * xp.max(xp.sum(apart, axis=-1), axis=(-2, -1))


class Violation(NamedTuple):
    """How far a matrix is from doubly stochastic, cause by cause."""

    row: Array  # (...), max_i |Σ_j P_ij − 1|
    column: Array  # (...), max_j |Σ_i P_ij − 1|
    negativity: Array  # (...), size of the most negative entry, 0 if none


def doubly_stochastic_violation(p: Array) -> Violation:
    """Doubly-stochastic violation: row error, column error and negativity, separately.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Violation
        row, column and negativity, (...) each; all zero for a doubly stochastic matrix.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> found = doubly_stochastic_violation([[1.0, 0.0], [0.5, 0.5]])
    >>> float(found.row), float(found.column), float(found.negativity)
    (0.0, 0.5, 0.0)
    """
    xp, p = _square(p)
    row = xp.max(xp.abs(xp.sum(p, axis=-1) - 1.0), axis=-1)
    column = xp.max(xp.abs(xp.sum(p, axis=-2) - 1.0), axis=-1)
    return Violation(row, column, xp.max(xp.where(p < 0, -p, xp.zeros_like(p)), axis=(-2, -1)))


def mixing_entropy(p: Array) -> Array:
    """Mixing entropy: mean over rows of −Σ_j s_ij ln s_ij with the shares s = |P_ij| / Σ_j |P_ij|.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...), in nats: 0 for a permutation, ln n for J/n; NaN when a row is zero.

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(mixing_entropy([[1.0, 0.0], [0.5, 0.5]])) == math.log(2) / 2
    True
    """
    xp, p = _square(p)
    size = xp.abs(p)
    share = ratio(xp, size, xp.broadcast_to(xp.sum(size, axis=-1, keepdims=True), size.shape))
    logs = xp.log(xp.where(share > 0, share, xp.ones_like(share)))
    return xp.mean(-xp.sum(share * logs, axis=-1), axis=-1)


def identity_distance(p: Array) -> Array:
    """Distance from the identity ‖A − I‖_F / √n: below 0.05 the streams are stuck.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...).

    Raises
    ------
    ValueError
        If ``p`` is not square or not finite.

    Examples
    --------
    >>> float(identity_distance([[0.0, 1.0], [1.0, 0.0]]).round(12)) == round(2**0.5, 12)
    True
    """
    xp, p = _square(p)
    return xp.sqrt(xp.sum((p - _identity(xp, p)) ** 2, axis=(-2, -1)) / p.shape[-1])


def depth_to_collapse(lambda2: Array, fraction: float = 0.01) -> Array:
    """Depth to collapse ln(fraction) / ln|λ₂|: layers until the differences of streams are down to it.

    Parameters
    ----------
    lambda2
        Second eigenvalue, or its magnitude, any shape.
    fraction
        What is left of the differences, between 0 and 1.

    Returns
    -------
    Array
        Number of layers; infinite where |λ₂| ≥ 1, 0 where λ₂ = 0.

    Raises
    ------
    ValueError
        If ``fraction`` is not between 0 and 1.

    Examples
    --------
    >>> float(depth_to_collapse(0.1).round(12))
    2.0
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; expected a share between 0 and 1")
    xp, size = as_float64(abs(lambda2) if isinstance(lambda2, complex) else lambda2, name="lambda2", ndim=0)
    size = xp.abs(xp.asarray(size))
    decay = -_log(xp, xp.where(size < 1, size, xp.full_like(size, 0.5)))
    return xp.where(size < 1, -math.log(fraction) / decay, xp.full_like(size, xp.inf))


# Products over depth


def _stack(h: Array) -> tuple[Any, Array, tuple[int, ...]]:
    """Namespace, matrices (L, ..., n, n) as contiguous (L, n, n, B), and the shape of the batch."""
    xp, h = _square(h, name="h", ndim=3)
    flat = xp.reshape(h, (h.shape[0], -1, *h.shape[-2:]))
    return xp, _contiguous(xp, xp.permute_dims(flat, (0, 2, 3, 1))), tuple(h.shape[1:-2])


def _contiguous(xp: Any, x: Array) -> Array:
    """A view laid out in its own order."""
    return x.contiguous() if hasattr(x, "contiguous") else np.ascontiguousarray(x)


def _unstack(xp: Any, p: Array, shape: tuple[int, ...]) -> Array:
    """Batch-last matrices (..., n, n, B) in the batch shape and order of the caller."""
    lead = tuple(range(p.ndim - 3))
    last = p.ndim - 1
    moved = xp.permute_dims(p, (*lead, last, last - 2, last - 1))
    return xp.reshape(moved, (*p.shape[:-3], *shape, *p.shape[-3:-1]))


def _multiply(xp: Any, a: Array, b: Array) -> Array:
    """Product of batch-last matrices (n, n, ...) and (n, m, ...)."""
    if a.shape[0] > ENTRYWISE:
        order, back = (*range(2, a.ndim), 0, 1), (a.ndim - 2, a.ndim - 1, *range(a.ndim - 2))
        return xp.permute_dims(xp.permute_dims(a, order) @ xp.permute_dims(b, order), back)
    total = a[:, 0, None] * b[None, 0]
    for j in range(1, a.shape[0]):
        total += a[:, j, None] * b[None, j]
    return total


def _rescaled(xp: Any, p: Array, log_scale: Array) -> tuple[Array, Array]:
    """Batch-last products brought back to size 1 where their largest entry is out of range."""
    top = xp.max(xp.abs(p), axis=(0, 1))
    out = ((top > LARGE) | (top < SMALL)) & (top > 0)
    if not bool(xp.any(out)):
        return p, log_scale
    top = xp.where(out, top, xp.ones_like(top))
    return p / top, log_scale + xp.log(top)


def _plain(xp: Any, p: Array, log_scale: Array) -> Array:
    """P · e^log_scale; what is zero stays zero where the scale overflows."""
    if not bool(xp.any(log_scale != 0)):
        return p
    scale = log_scale[..., None, None]
    beyond = _log(xp, xp.abs(p)) + scale > LOG_MAX
    half = xp.exp(xp.clip(scale / 2.0, max=400.0))
    within = xp.where(beyond, xp.zeros_like(p), p) * half * half  # in halves, for e^scale alone may overflow
    return (
        xp.where(beyond, xp.copysign(xp.full_like(p, xp.inf), p), within) if bool(xp.any(beyond)) else within
    )


def _running(h: Array, *, reverse: bool = False) -> tuple[Any, list[Array], list[Array], tuple[int, ...]]:
    """Running products H_l … H_1 (reversed: H_L … H_l), batch last, their log scales, the batch shape."""
    xp, stack, batch = _stack(h)
    count = stack.shape[0]
    log_scale = xp.zeros_like(stack[0, 0, 0])
    products: list[Array] = []
    scales: list[Array] = []
    for layer in range(count):
        new = stack[count - 1 - layer if reverse else layer]
        if products:
            new = _multiply(xp, products[-1], new) if reverse else _multiply(xp, new, products[-1])
        new, log_scale = _rescaled(xp, new, log_scale)
        products.append(new)
        scales.append(log_scale)
    order = slice(None, None, -1) if reverse else slice(None)
    return xp, products[order], scales[order], batch


def _composites(h: Array, reverse: bool, return_log_scale: bool) -> Any:
    """All prefix or suffix products (L, ..., n, n), with their log scales (L, ...) if asked."""
    xp, products, scales, batch = _running(h, reverse=reverse)
    p = _unstack(xp, xp.stack(products), batch)
    log_scale = xp.reshape(xp.stack(scales), (len(scales), *batch))
    return (p, log_scale) if return_log_scale else _plain(xp, p, log_scale)


def composite(h: Array, *, return_log_scale: bool = False) -> Any:
    """Composite mapping H_L … H_2 H_1 of a stack of mixing matrices.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    return_log_scale
        Give (P, s) with the composite P · e^s, finite at any depth.

    Returns
    -------
    Array or tuple
        (..., n, n), infinite where a product exceeds float64; or with its log scale (...).

    Raises
    ------
    ValueError
        If ``h`` is not a stack of square matrices or not finite.

    Examples
    --------
    >>> composite([[[1.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]).tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    xp, products, scales, batch = _running(h)
    p, log_scale = _unstack(xp, products[-1], batch), xp.reshape(scales[-1], batch)
    return (p, log_scale) if return_log_scale else _plain(xp, p, log_scale)


def prefix_composites(h: Array, *, return_log_scale: bool = False) -> Any:
    """Composites from the input: entry l is H_l … H_1, what the streams have gone through by depth l.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    return_log_scale
        Give (P, s) with the composites P · e^s.

    Returns
    -------
    Array or tuple
        (L, ..., n, n), or with its log scales (L, ...).

    Raises
    ------
    ValueError
        If ``h`` is not a stack of square matrices or not finite.

    Examples
    --------
    >>> prefix_composites([[[2.0]], [[3.0]]])[:, 0, 0].tolist()
    [2.0, 6.0]
    """
    return _composites(h, False, return_log_scale)


def suffix_composites(h: Array, *, return_log_scale: bool = False) -> Any:
    """Composites to the output: entry l is H_L … H_l, what the gradient has gone through down to depth l.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    return_log_scale
        Give (P, s) with the composites P · e^s.

    Returns
    -------
    Array or tuple
        (L, ..., n, n), or with its log scales (L, ...).

    Raises
    ------
    ValueError
        If ``h`` is not a stack of square matrices or not finite.

    Examples
    --------
    >>> suffix_composites([[[2.0]], [[3.0]]])[:, 0, 0].tolist()
    [6.0, 3.0]
    """
    return _composites(h, True, return_log_scale)


def pair_columns(h: Array) -> Iterator[tuple[int, Array, Array]]:
    """The all-pairs composites one end at a time: for each b, the products P_{a→b} of every a ≤ b.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.

    Yields
    ------
    tuple
        b, matrices (b + 1, ..., n, n) and log scales (b + 1, ...): P_{a→b} is matrix a · e^scale.

    Raises
    ------
    ValueError
        If ``h`` is not a stack of square matrices or not finite.

    Examples
    --------
    >>> [p[:, 0, 0].tolist() for b, p, s in pair_columns([[[2.0]], [[3.0]]])]
    [[2.0], [6.0, 3.0]]
    """
    xp, stack, batch = _stack(h)
    for end, p, log_scale in _columns(xp, stack):
        moved = xp.permute_dims(p, (2, 0, 1, 3))
        yield end, _unstack(xp, moved, batch), xp.reshape(log_scale, (end + 1, *batch))


def _columns(xp: Any, stack: Array) -> Iterator[tuple[int, Array, Array]]:
    """For each end b: products (n, n, b + 1, B) of every start, and log scales (b + 1, B)."""
    p, log_scale = stack[0][:, :, None], xp.zeros_like(stack[0, 0, :1])
    yield 0, p, log_scale
    for end in range(1, stack.shape[0]):
        p, log_scale = _rescaled(xp, _multiply(xp, stack[end][:, :, None], p), log_scale)
        p = xp.concat([p, stack[end][:, :, None]], axis=2)
        log_scale = xp.concat([log_scale, xp.zeros_like(log_scale[:1])], axis=0)
        yield end, p, log_scale


def all_pairs(h: Array, *, reduce: Callable[[Array], Array] | None = None) -> Array:
    """All-pairs composites: entry [a, b] is P_{a→b} = H_b … H_a, both ends included, for a ≤ b.

    [a, a] is H_a itself. Entries a > b are no products of the stack and hold NaN; the empty product (the
    identity) is not in the table. With ``reduce`` the products are never held at once.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    reduce
        A number per matrix: a function (..., n, n) → (...) such as ``forward_gain``.

    Returns
    -------
    Array
        (L, L, ..., n, n), or (L, L, ...) of what ``reduce`` gives; a product beyond float64 is infinite
        (``pair_columns`` keeps the log scales).

    Raises
    ------
    ValueError
        If ``h`` is not a stack of square matrices or not finite.

    Examples
    --------
    >>> all_pairs([[[2.0]], [[3.0]], [[5.0]]], reduce=forward_gain)[0].tolist()
    [2.0, 6.0, 30.0]
    """
    xp, stack, batch = _stack(h)
    depth, n, _, total = stack.shape
    block = max(1, BLOCK // (depth * n * n))
    table = None
    for start in range(0, total, block):
        part = _contiguous(xp, stack[..., start : start + block])
        for end, p, log_scale in _columns(xp, part):
            values = _plain(xp, xp.permute_dims(p, (2, 3, 0, 1)), log_scale)
            values = values if reduce is None else reduce(values)
            if table is None:
                shape = (depth, depth, total, *values.shape[2:])
                table = xp.full(shape, xp.nan, dtype=values.dtype, device=device(values))
            table[: end + 1, end, start : start + block] = values
    assert table is not None
    return xp.reshape(table, (depth, depth, *batch, *table.shape[3:]))


def _difference_basis(xp: Any, p: Array) -> Array:
    """Orthonormal columns (n, n − 1) that span the complement of the ones vector (Helmert)."""
    n = p.shape[-1]
    basis = xp.zeros((n, n - 1), dtype=xp.float64, device=device(p))
    for k in range(1, n):
        basis[:k, k - 1] = 1.0 / math.sqrt(k * (k + 1))
        basis[k, k - 1] = -k / math.sqrt(k * (k + 1))
    return basis


def deflated_gain(h: Array) -> Array:
    """Stream-product collapse: ln σ₁ of each prefix product on the complement of ones.

    The (n−1)×(n−1) blocks UᵀHU are multiplied, not H itself, and a log scale is kept: the value goes on
    falling where ‖P − J/n‖ stops at 1e-16. For row- or column-stochastic matrices the product of blocks is
    the block of the product; for free matrices it leaves out what passes through the mean.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.

    Returns
    -------
    Array
        (L, ...), natural logarithm of the gain: below ln 0.01 all streams carry the same signal. −inf for
        an exactly zero block, NaN for a single stream.

    Raises
    ------
    ValueError
        If ``h`` is not a stack of square matrices or not finite.

    Examples
    --------
    Averaging two streams half-way, twice: differences halve each time.

    >>> h = [[[0.75, 0.25], [0.25, 0.75]]] * 2
    >>> [round(math.exp(v), 12) for v in deflated_gain(h)]
    [0.5, 0.25]
    """
    xp, h = _square(h, name="h", ndim=3)
    if h.shape[-1] == 1:
        return xp.full_like(h[..., 0, 0], xp.nan)
    basis = _difference_basis(xp, h)
    p, log_scale = prefix_composites(xp.matrix_transpose(basis) @ h @ basis, return_log_scale=True)
    return _log(xp, singular_values(p)[..., 0]) + log_scale


def lyapunov_spectrum(h: Array) -> Array:
    """Lyapunov spectrum of the depth product: (1/L) Σ_l ln|R_ii| with H_l Q_{l−1} = Q_l R_l.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.

    Returns
    -------
    Array
        (..., n), per layer, descending; the top one is 0 for stochastic matrices, −inf where singular.

    Raises
    ------
    ValueError
        If ``h`` is not a stack of square matrices or not finite.

    Examples
    --------
    >>> lyapunov_spectrum([[[2.0, 0.0], [0.0, 0.5]]] * 3).round(9).tolist()
    [0.693147181, -0.693147181]
    """
    xp, h = _square(h, name="h", ndim=3)
    q, total = _identity(xp, h), 0.0
    for layer in range(h.shape[0]):
        q, r = xp.linalg.qr(h[layer] @ q, mode="reduced")
        total = total + _log(xp, xp.abs(xp.linalg.diagonal(r)))
    return xp.flip(xp.sort(total, axis=-1), axis=-1) / h.shape[0]


# The depth kernel


def depth_kernel(
    h_res: Array, h_pre: Array, h_post: Array, *, embedding: Array | None = None, head: Array | None = None
) -> Array:
    """Depth kernel M_kj = H_pre,k (∏_{t=j+1}^{k−1} H_res,t) H_postᵀ_j: how much of output j sublayer k reads.

    Unchanged by a change of the stream basis, unlike the spectra of H_res. Strictly lower triangular.

    Parameters
    ----------
    h_res
        (L, ..., n, n).
    h_pre, h_post
        (L, ..., n), read and write weights.
    embedding
        (..., n), weights by which the embedding enters the streams (ones where it is copied): adds a first
        column, the embedding read through ∏_{t<k} H_res,t.
    head
        (..., n), weights by which the head reads the streams: adds a last row.

    Returns
    -------
    Array
        (..., K, S): readers by sources, K = L or L + 1 with a head, S = L or L + 1 with an embedding.
        Source: Zhu et al. 2409.19606, Fig. 7 (dense connection matrix).

    Raises
    ------
    ValueError
        If shapes disagree or values are not finite.

    Examples
    --------
    A plain residual network: every sublayer reads all earlier outputs in full.

    >>> one = [[1.0]] * 3
    >>> depth_kernel([[[1.0]]] * 3, one, one).tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """
    xp, h = _square(h_res, name="h_res", ndim=3)
    reads, writes = _weights(xp, h, h_pre, "h_pre"), _weights(xp, h, h_post, "h_post")
    sources = [] if embedding is None else [_edge(xp, h, embedding, "embedding")]
    readers = [reads[k] for k in range(h.shape[0])]
    if head is not None:
        readers.append(_edge(xp, h, head, "head"))
    width = h.shape[0] + len(sources)
    kernel = xp.zeros((*h.shape[1:-2], len(readers), width), dtype=xp.float64, device=device(h))
    carried = (
        xp.stack(sources) if sources else xp.zeros((0, *h.shape[1:-1]), dtype=xp.float64, device=device(h))
    )
    log_scale = xp.zeros(carried.shape[:-1], dtype=xp.float64, device=device(h))
    for k, read in enumerate(readers):
        if carried.shape[0]:
            seen = xp.sum(read * carried, axis=-1)
            seen = _plain(xp, seen[..., None, None], log_scale)[..., 0, 0]
            kernel[..., k, : carried.shape[0]] = xp.moveaxis(seen, 0, -1)
        if k < h.shape[0]:
            carried, log_scale = _carried_on(xp, h[k], carried, log_scale, writes[k])
    return kernel


def _weights(xp: Any, h: Array, weights: Array, name: str) -> Array:
    """Read or write weights, checked against (L, ..., n)."""
    _, weights = as_float64(weights, name=name)
    if weights.shape != h.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; expected {tuple(h.shape[:-1])}, as h_res has"
        )
    return weights


def _edge(xp: Any, h: Array, weights: Array, name: str) -> Array:
    """Weights of the embedding or the head, broadcast to (..., n)."""
    _, weights = as_float64(weights, name=name)
    try:
        return xp.broadcast_to(xp.asarray(weights, device=device(h)), h.shape[1:-1])
    except (ValueError, RuntimeError):
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; expected (..., n) = {tuple(h.shape[1:-1])}"
        ) from None


def _carried_on(xp: Any, h: Array, carried: Array, log_scale: Array, write: Array) -> tuple[Array, Array]:
    """What every source looks like past one more layer, and the layer's own output as a new source."""
    moved = xp.sum(h * carried[..., None, :], axis=-1)
    if moved.shape[0]:
        top = xp.max(xp.abs(moved), axis=-1)
        out = ((top > LARGE) | (top < SMALL)) & (top > 0)
        top = xp.where(out, top, xp.ones_like(top))
        moved, log_scale = moved / top[..., None], log_scale + xp.log(top)
    return xp.concat([moved, write[None]]), xp.concat([log_scale, xp.zeros_like(write[None, ..., 0])])


def effective_streams(m: Array, *, embedding: bool = False) -> Array:
    """Effective streams at each cut c: exp-entropy of the singular values of M[k ≥ c, j < c], a Hankel block.

    The block is all that later sublayers can read of earlier ones; its rank is at most n.

    Parameters
    ----------
    m
        Depth kernels (..., K, S).
    embedding
        Whether the first column is the embedding.

    Returns
    -------
    Array
        (..., cuts), for c = 1 … K − 1, from c = 0 with an embedding; NaN where nothing is read across.

    Raises
    ------
    ValueError
        If ``m`` is not finite.

    Examples
    --------
    >>> effective_streams([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]).round(9).tolist()
    [1.0, 1.0]
    """
    xp, m = as_float64(m, name="m", ndim=2)
    ahead = int(embedding)
    blocks = [m[..., c:, : c + ahead] for c in range(1 - ahead, m.shape[-2])]
    found = [effective_rank_of(xp.linalg.svdvals(block)) for block in blocks]
    return (
        xp.stack(found, axis=-1)
        if found
        else xp.zeros((*m.shape[:-2], 0), dtype=xp.float64, device=device(m))
    )


def stream_shares(weights: Array) -> Array:
    """Read or write shares of the streams: Σ_l |w_ls| / Σ_l Σ_s |w_ls|.

    Below 1/(10 n) a stream is dead; ``rank.effective_rank_of`` of the shares counts the streams in use.

    Parameters
    ----------
    weights
        H_pre or H_post (L, ..., n).

    Returns
    -------
    Array
        (..., n), adding to 1; NaN when all weights are zero.

    Raises
    ------
    ValueError
        If the weights are not finite.

    Examples
    --------
    >>> stream_shares([[1.0, 0.0], [1.0, 2.0]]).tolist()
    [0.5, 0.5]
    """
    xp, weights = as_float64(weights, name="weights", ndim=2)
    total = xp.sum(xp.abs(weights), axis=0)
    return ratio(xp, total, xp.broadcast_to(xp.sum(total, axis=-1, keepdims=True), total.shape))


def _hops(xp: Any, m: Array, ahead: int) -> Array:
    """How many sublayers reader k lies above source j, (K, S); not positive where it cannot read it."""
    readers = xp.arange(m.shape[-2], dtype=xp.float64, device=device(m))
    sources = xp.arange(m.shape[-1], dtype=xp.float64, device=device(m)) - ahead
    return readers[:, None] - sources[None, :]


def effective_path_depth(m: Array, *, embedding: bool = False) -> Array:
    """Effective path depth: mean hops back Σ_j |M_kj| (k − j) / Σ_j |M_kj| for each reader k.

    Parameters
    ----------
    m
        Depth kernels (..., K, S).
    embedding
        Whether the first column is the embedding; it lies k + 1 hops back.

    Returns
    -------
    Array
        (..., K), in sublayers, at least 1; NaN for a reader that reads nothing.

    Raises
    ------
    ValueError
        If ``m`` is not finite.

    Examples
    --------
    >>> effective_path_depth([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]).tolist()[1:]
    [1.0, 1.5]
    """
    xp, m = as_float64(m, name="m", ndim=2)
    size = xp.abs(m)
    return ratio(xp, xp.sum(size * _hops(xp, m, int(embedding)), axis=-1), xp.sum(size, axis=-1))


def read_mass(m: Array, *, embedding: bool = False) -> Array:
    """Read mass Σ_k |M_kj|: how much of source j all later readers take in together.

    Parameters
    ----------
    m
        Depth kernels (..., K, S).
    embedding
        Whether the first column is the embedding.

    Returns
    -------
    Array
        (..., S); NaN for a source that no row lies above (the last sublayer without a head).

    Raises
    ------
    ValueError
        If ``m`` is not finite.

    Examples
    --------
    >>> read_mass([[0.0, 0.0], [1.0, 0.0]]).tolist()
    [1.0, nan]
    """
    xp, m = as_float64(m, name="m", ndim=2)
    readable = xp.any(_hops(xp, m, int(embedding)) > 0, axis=0)
    mass = xp.sum(xp.abs(m), axis=-2)
    return xp.where(readable, mass, xp.full_like(mass, xp.nan))


def wasted_layers(m: Array, *, tolerance: float = 0.01, embedding: bool = False) -> Array:
    """Wasted layers: sources whose read mass Σ_k |M_kj| is at most ``tolerance``.

    Parameters
    ----------
    m
        Depth kernels (..., K, S).
    tolerance
        Read mass that counts as nothing; a residual connection reads 1 per reader.
    embedding
        Whether the first column is the embedding.

    Returns
    -------
    Array
        Booleans (..., S); False for a source that no row lies above. Source: 2409.19606 (DHC×1, layer 17).

    Raises
    ------
    ValueError
        If ``m`` is not finite.

    Examples
    --------
    >>> wasted_layers([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).tolist()
    [True, False, False]
    """
    return read_mass(m, embedding=embedding) <= tolerance
