"""Mean-field maps by scipy's adaptive quadrature and by the arc-sine and arc-cosine kernels."""

import numpy as np
from scipy import integrate, special, stats

from depthscope.diagnostics.kernels import meanfield
from tests.diagnostics.kernels.references.reference import Reference

FUNCTIONS = {
    "linear": lambda h: h,
    "relu": lambda h: max(h, 0.0),
    "tanh": np.tanh,
    "erf": special.erf,
}
SLOPES = {
    "linear": lambda h: 1.0,
    "relu": lambda h: float(h > 0),
    "tanh": lambda h: 1 - np.tanh(h) ** 2,
    "erf": lambda h: 2 / np.sqrt(np.pi) * np.exp(-h * h),
}
LENGTHS = (0.05, 1.0, 2.0)
SETTINGS = [(q, 1.4, 0.3, name) for q in LENGTHS for name in FUNCTIONS]
FAR = [(q, 1.4, 0.3, name) for q in (20.0, 100.0) for name in ("tanh", "erf")]


def expectation(f, q):
    """E f(√q z), from each side of the kink."""
    sides = [(-12.0, 0.0), (0.0, 12.0)]
    return sum(
        integrate.quad(lambda z: f(q**0.5 * z) * stats.norm.pdf(z), *side, epsabs=1e-13, limit=200)[0]
        for side in sides
    )


def length(q, sigma_w, sigma_b, name):
    return sigma_w**2 * expectation(lambda h: FUNCTIONS[name](h) ** 2, q) + sigma_b**2


def correlation(c, q, sigma_w, sigma_b, name):
    phi = FUNCTIONS[name]
    if name == "erf":
        product = 2 / np.pi * np.arcsin(2 * q * c / (1 + 2 * q))  # Williams 1997
    elif name == "relu":
        angle = np.arccos(c)  # Cho & Saul 2009
        product = q / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * np.cos(angle))
    else:
        z = np.linspace(-10.0, 10.0, 1001)  # the trapezoidal rule is exact to rounding where φ is analytic
        u, v = q**0.5 * z[:, None], q**0.5 * (c * z[:, None] + (1 - c * c) ** 0.5 * z)
        weight = stats.norm.pdf(z) * (z[1] - z[0])
        product = weight @ (phi(u) * phi(v)) @ weight
    return (sigma_w**2 * product + sigma_b**2) / length(q, sigma_w, sigma_b, name)


def slope(sigma_w, sigma_b, name, q):
    del sigma_b
    return sigma_w**2 * expectation(lambda h: SLOPES[name](h) ** 2, q)


REFERENCES: dict[str, tuple[Reference, ...]] = {
    "meanfield.q_map": (
        Reference("scipy.integrate.quad", meanfield.q_map, length, SETTINGS, rtol=1e-8),
        Reference("scipy.integrate.quad, far out", meanfield.q_map, length, FAR, rtol=1e-8),
    ),
    "meanfield.c_map": (
        Reference(
            "arc-sine and arc-cosine kernels, and the trapezoidal rule",
            meanfield.c_map,
            correlation,
            [(c, *setting) for c in (-0.4, 0.7) for setting in SETTINGS if setting[0] == 1.0],
            rtol=1e-7,
        ),
    ),
    "meanfield.chi_1": (
        Reference(
            "scipy.integrate.quad",
            meanfield.chi_1,
            slope,
            [(sigma_w, sigma_b, name, q) for q, sigma_w, sigma_b, name in SETTINGS],
            rtol=1e-8,
        ),
        Reference(
            "scipy.integrate.quad, far out",
            meanfield.chi_1,
            slope,
            [(sigma_w, sigma_b, name, q) for q, sigma_w, sigma_b, name in FAR],
            rtol=1e-8,
        ),
    ),
}
