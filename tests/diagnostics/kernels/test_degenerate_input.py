"""Odd matrices give the value that 50 digits give, NaN where there is none, or an error with the words: never noise."""

from functools import cache

import numpy as np
import pytest
import torch

from tests.diagnostics.kernels import exact
from tests.diagnostics.kernels.formula_data import noise
from tests.diagnostics.kernels.measures import LAYERS, MEASURES, measured

TOKENS, FEATURES = 12, 5
X, Y = noise(TOKENS, FEATURES, seed=1), noise(TOKENS, FEATURES, seed=2)
ROW = np.array([0.1, 0.2, 0.7, 1e3, -3.0])
SYMMETRIC = np.round(16.0 * X[:5]) / 16.0


def changed(at, value):
    x = X.copy()
    x[at] = value * (x[at] if np.ndim(value) == 0 else 1.0)
    return x


STATES = {
    "plain": (X, Y),
    "duplicated layers": (X, X),
    "identical tokens": (np.tile(ROW, (TOKENS, 1)), Y),
    "identical tokens on both sides": (np.tile(ROW, (TOKENS, 1)), np.tile(ROW[::-1], (TOKENS, 1))),
    "duplicated tokens": (X[[0, 1, 2, 3, 4, 0, 1, 0, 4, 5, 6, 2]], Y),
    "zero rows": (changed([2, 5], 0.0), Y),
    "all zero": (0.0 * X, Y),
    "all zero on both sides": (0.0 * X, 0.0 * Y),
    "fewer tokens than features": (noise(5, 9, seed=3), noise(5, 9, seed=4)),
    "four tokens": (X[:4], Y[:4]),
    "three tokens": (X[:3], Y[:3]),
    "two tokens": (X[:2], Y[:2]),
    "one token": (X[:1], Y[:1]),
    "one feature": (X[:, :1], Y[:, :1]),
    "one token, one feature": (X[:1, :1], Y[:1, :1]),
    "offset of 1e4": (X + 1e4, Y - 1e4),
    "offset of 1e6": (X + 1e6, Y - 1e6),
    "massive token": (changed(4, 1e4), Y),
    "massive first token": (changed(0, 1e4), Y),
    "massive activation": (changed((4, 2), 3e4), Y),
    "rank one": (np.outer(2.0 ** np.arange(-6, 6), ROW), Y),
    "a token at the mean": (np.concatenate([SYMMETRIC, 0.5 - SYMMETRIC, np.full((2, 5), 0.25)]), Y),
    "back and forth": (np.outer((-1.0) ** np.arange(TOKENS), ROW), Y),
    "squares overflow float16": (1e4 * X, 1e4 * Y),
    "squares overflow float32": (1e20 * X, 1e20 * Y),
    "squares overflow float64": (1e200 * X, 1e200 * Y),
    "squares vanish in float32": (1e-25 * X, 1e-25 * Y),
    "squares vanish in float64": (1e-200 * X, 1e-200 * Y),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
# States that are tried in half precision too.
HALF = ("plain", "identical tokens", "offset of 1e4", "massive token", "squares overflow float16")
# What is measured or added up in squares of the input leaves float64 where those do.
SQUARES = (
    "hsic_matrix",
    "biased hsic_matrix",
    "minibatch_cka",
    "signal_propagation",
)
UNITS = (*(set(SQUARES) - {"minibatch_cka"}), "singular_values", "centred singular_values", "gradient_norm")
# Differences of nearly equal sums: six digits are the goal, for one token may hold nearly all of them.
DIFFERENCES = ("participation_ratio of pairs", "hsic_matrix", "minibatch_cka")


def tolerance(name, dtype, due):
    """Near the exact value, or near the largest one where the measure has units."""
    lean = name in LAYERS and dtype != "float64"  # float32 tiles, by design
    loose = lean or name in DIFFERENCES or name.startswith(("unbiased", "rsa"))
    near = 1e-6 if loose else 1e-8
    size = np.max(np.abs(due), initial=0.0, where=np.isfinite(due)) if name in UNITS else 1.0
    return {"rtol": near, "atol": near * size if near > 1e-7 else 1e-11 * size}


def of_dtype(x, dtype):
    """A numpy array and a tensor of a dtype, with the same numbers; numpy knows no bfloat16."""
    tensor = torch.asarray(x).to(getattr(torch, dtype))
    return [tensor] if dtype == "bfloat16" else [tensor.numpy(), tensor]


def numbers(x):
    return x.double().numpy() if isinstance(x, torch.Tensor) else x.astype(float)


@cache
def pairs(state):
    """The state's two matrices as every kind of array whose dtype can hold them."""
    found = []
    for dtype in DTYPES if state in HALF else DTYPES[:2]:
        sides = [of_dtype(x, dtype) for x in STATES[state]]
        if all(np.isfinite(numbers(side[0])).all() for side in sides):
            found += [(dtype, *pair) for pair in zip(*sides, strict=True)]
    return found


def refused(name, x, y):
    """The words of the error that is due, or none."""
    tokens = len(x)
    if name == "pwcca" and tokens <= x.shape[1]:
        return "canonical correlations are 1 by construction"
    if name == "svcca":
        directions = [exact.directions(exact.wide(side), exact.mpf("0.99")).shape[1] for side in (x, y)]
        if tokens <= 1 or tokens - 1 <= max(directions):
            return "canonical correlations are 1 by construction"
    if (name == "mutual_knn" and tokens <= 2) or (name == "cknna" and tokens <= 3):
        return f"rows; expected . ≤ k < {tokens}"
    if name == "minibatch_cka" and tokens < 4:
        return "HSIC₁ needs at least 4"
    return None


@cache
def expected(name, state, dtype):
    """What 50 digits say, or the words of the error."""
    x, y = next(map(numbers, pair) for found, *pair in pairs(state) if found == dtype)
    words = refused(name, x, y)
    if words:
        return words
    value = np.asarray(MEASURES[name][1](exact.wide(x), exact.wide(y)))
    with np.errstate(invalid="ignore"):  # numpy 2.1 warns of a NaN among objects
        return value if value.dtype == bool else value.astype(float)


def combinations():
    """Every measure in every state that float64 can hold it in."""
    for name in MEASURES:
        for state in STATES:
            if not (name in SQUARES and state.endswith("float64")):
                yield pytest.param(name, state, id=f"{name}, {state}")


@pytest.mark.parametrize(("name", "state"), combinations())
def test_degenerate_states_have_their_exact_value(name, state):
    for dtype, x, y in pairs(state):
        due = expected(name, state, dtype)
        if isinstance(due, str):
            with pytest.raises(ValueError, match=due):
                measured(name, x, y)
        else:
            got = measured(name, x, y)
            np.testing.assert_allclose(got, due, **tolerance(name, dtype, due), err_msg=f"{type(x)} {dtype}")


@pytest.mark.parametrize("name", ["rsa correlation spearman", "rsa cosine pearson", "mutual_knn"])
def test_identical_tokens_are_ties(name):
    """A product of matrices rounds equal rows differently at its edges, which 37 rows have and 32 do not."""
    same = [np.tile(noise(64, seed=seed), (37, 1)) for seed in (1, 2)]
    for x, y in (same, map(torch.asarray, same)):
        np.testing.assert_array_equal(measured(name, x, y), 1.0 if name == "mutual_knn" else np.nan)
