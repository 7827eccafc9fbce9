"""How much can early powers of a matrix amplify? The numerical radius, by lines that enclose the numerical range."""

import math
from typing import Any

from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import as_given, square_in_memory

TOLERANCE = 1e-13  # relative; eigenvalues have errors of some 1e-15
# First angles between 0 and π/2 (those up to π follow by symmetry), then cuts at corners, then steps to the top itself.
# Cuts converge fast unless the range is nearly a disk, whose polygon has many equal corners: there parabolas do. Enough
# for 1e-13 in the tests; heuristics of ours.
ANGLES, CUTS, STEPS = 5, 10, 8
# Matrices whose supporting lines are in memory at once.
BLOCK = 16_384


def numerical_radius(p: Array) -> Array:
    """Numerical radius max_θ λ_max(Re e^{iθ}A): the largest |x*Ax| over unit vectors.

    For a matrix without negative entries it is λ_max of the symmetric part. For others supporting lines enclose the
    numerical range, each new one at the farthest corner of the enclosing polygon (Johnson 1978; Uhlig 2009), until
    no corner is farther than the largest height; for a range that is nearly a disk, parabolas through the highest
    lines give the next angle.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...), between ‖A‖₂/2 and ‖A‖₂.

    Examples
    --------
    >>> float(numerical_radius([[0.0, 1.0], [0.0, 0.0]]).round(9))
    0.5
    """
    xp, matrices = square_in_memory(p)
    flat = xp.reshape(matrices, (-1, *matrices.shape[-2:]))
    # θ = 0 and π give the spectral radius of the symmetric part, a lower bound. That of |A| is an upper bound: where
    # both agree, as they do without signs, nothing is left to find.
    found = _symmetric_radius(xp, flat)
    signed = xp.any(xp.reshape(flat, (flat.shape[0], -1)) < 0, axis=-1)
    left = xp.nonzero(signed)[0]
    left = left[found[left] < (1.0 - TOLERANCE) * _symmetric_radius(xp, xp.abs(flat[left]))]
    for start in range(0, left.shape[0], BLOCK):
        part = left[start : start + BLOCK]
        found[part] = _enclosed(xp, flat[part])
    return as_given(p, xp.reshape(found, matrices.shape[:-2]))


def _symmetric_radius(xp: Any, p: Array) -> Array:
    """Spectral radius of the symmetric part: at most the numerical radius, equal to it without negative entries."""
    if p.shape[0] == 0:  # LAPACK refuses an empty batch
        return p[:, 0, 0]
    values = xp.linalg.eigvalsh((p + xp.matrix_transpose(p)) / 2.0)
    return xp.max(xp.abs(values), axis=-1)


def _enclosed(xp: Any, p: Array) -> Array:
    """Numerical radii of matrices (B, n, n); those that have converged take no part in later cuts."""
    found = xp.zeros_like(p[:, 0, 0])
    left = xp.arange(p.shape[0])
    angle, height = _first_lines(xp, p)
    for cut in range(CUTS + STEPS):
        corner, distance = _farthest_corner(xp, angle, height)
        reached = xp.max(height, axis=-1)
        found[left] = reached
        # The largest height is a lower bound, the farthest corner an upper bound.
        far = distance > (1.0 + TOLERANCE) * reached
        if not bool(xp.any(far)):
            break
        new = corner if cut < CUTS else _top(xp, angle, height)
        left, corner = left[far], new[far]
        across = _heights(xp, p[left], corner)
        angle = xp.concat([angle[far], corner[:, None], math.pi - corner[:, None]], axis=-1)
        height = xp.concat([height[far], *(each[:, None] for each in across)], axis=-1)
        order = xp.argsort(angle, axis=-1)
        angle, height = (xp.take_along_axis(each, order, axis=-1) for each in (angle, height))
    return found


def _first_lines(xp: Any, p: Array) -> tuple[Array, Array]:
    """Angles from 0 to π and the heights of the supporting lines there, (B, lines)."""
    steps = [k * math.pi / 2.0 / (ANGLES - 1) for k in range(ANGLES)]
    zero = xp.zeros_like(p[:, 0, 0])
    lines = [_heights(xp, p, zero + step) for step in steps]
    height = [line[0] for line in lines] + [line[1] for line in reversed(lines[:-1])]
    angle = [zero + step for step in steps] + [zero + math.pi - step for step in reversed(steps[:-1])]
    return xp.stack(angle, axis=-1), xp.stack(height, axis=-1)


def _heights(xp: Any, p: Array, angle: Array) -> tuple[Array, Array]:
    """λ_max(Re e^{iθ}A) at θ and, by −λ_min and the symmetry of real matrices, at π − θ."""
    cosine, sine = xp.cos(angle)[:, None, None], xp.sin(angle)[:, None, None]
    turned = xp.matrix_transpose(p)
    values = xp.linalg.eigvalsh(cosine * (p + turned) / 2.0 + 1j * (sine * (p - turned) / 2.0))
    return values[:, -1], -values[:, 0]


def _farthest_corner(xp: Any, angle: Array, height: Array) -> tuple[Array, Array]:
    """The angle and the distance of the farthest corner between neighbouring supporting lines, (B,) each."""
    low, high, sector_angle = height[:, :-1], height[:, 1:], angle[:, 1:] - angle[:, :-1]
    cosine = xp.cos(sector_angle)
    along = (high - low * cosine) / xp.clip(xp.sin(sector_angle), min=1e-300)  # two lines may be parallel
    # A corner outside its sector is no vertex of the polygon: there the higher line alone is the bound.
    between = (along > 0) & (low > high * cosine)
    distance = xp.where(between, xp.hypot(low, along), xp.maximum(low, high))
    sector = xp.argmax(distance, axis=-1)[:, None]
    corner = angle[:, :-1] + xp.atan2(along, low)
    return tuple(xp.take_along_axis(each, sector, axis=-1)[:, 0] for each in (corner, distance))


def _top(xp: Any, angle: Array, height: Array) -> Array:
    """The angle (B,) at the top of the parabola through the highest line and its two neighbours."""
    best = xp.clip(xp.argmax(height, axis=-1), min=1, max=angle.shape[1] - 2)[:, None]
    (x, a, b), (y, c, d) = (
        [xp.take_along_axis(each, best + step, axis=-1)[:, 0] for step in (0, -1, 1)]
        for each in (angle, height)
    )
    before, after = (x - a) * (y - d), (x - b) * (y - c)
    bend = before - after
    shift = ((x - a) * before - (x - b) * after) / xp.where(bend == 0, xp.ones_like(bend), 2.0 * bend)
    # Where the parabola is flat or its top is outside, the angle of the highest line itself.
    return xp.where((x - shift > a) & (x - shift < b), x - shift, x)
