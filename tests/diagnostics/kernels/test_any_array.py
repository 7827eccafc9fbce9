"""Any matrix, however it comes: the value that 50 digits give, NaN where there is none, or an error with the words.

The rows of a table of numbers may be odd (`STATES`), and so may the array that holds them (`KINDS`). Every measure sees
every state in every dtype; the kinds of array take turns, so that each is seen several times by every measure.
"""

from functools import cache
from itertools import cycle

import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import geometry, gradients
from tests.diagnostics.kernels import exact
from tests.diagnostics.kernels.formula_data import noise
from tests.diagnostics.kernels.measures import LAYERS, MEASURES, UNIT_FREE, measured

TOKENS, FEATURES = 12, 5
X, Y = noise(TOKENS, FEATURES, seed=1), noise(TOKENS, FEATURES, seed=2)
ROW = np.array([0.1, 0.2, 0.7, 1e3, -3.0])


def changed(at, value):
    x = X.copy()
    x[at] = value * (x[at] if np.ndim(value) == 0 else 1.0)
    return x


STATES = {
    "plain": (X, Y),
    "identical tokens": (np.tile(ROW, (TOKENS, 1)), Y),
    "all zero": (0.0 * X, Y),
    "fewer tokens than features": (noise(5, 9, seed=3), noise(5, 9, seed=4)),
    "two tokens": (X[:2], Y[:2]),
    "one token": (X[:1], Y[:1]),
    "offset of 1e6": (X + 1e6, Y - 1e6),
    "massive token": (changed(4, 1e4), Y),
    "rank one": (np.outer(2.0 ** np.arange(-6, 6), ROW), Y),
    "squares overflow float32": (1e20 * X, 1e20 * Y),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
# States that are tried in half precision too.
HALF = ("plain", "massive token")
UNITS = ("channel_variance", "singular_values", "centred singular_values", "gradient_norm")
# Differences of nearly equal sums: six digits are the goal, for one token may hold nearly all of them.
DIFFERENCES = ("participation_ratio of pairs",)


def tolerance(name, dtype, due):
    """Near the exact value, or near the largest one where the measure has units."""
    lean = name in LAYERS and dtype != "float64"  # float32 tiles, by design
    loose = lean or name in DIFFERENCES or name.startswith("unbiased")
    near = 1e-6 if loose else 1e-8
    size = np.max(np.abs(due), initial=0.0, where=np.isfinite(due)) if name in UNITS else 1.0
    return {"rtol": near, "atol": near * size if near > 1e-7 else 1e-11 * size}


def strided(x):
    """Every second column of a wider array."""
    wider = np.repeat(x, 2, axis=1)
    wider[:, 1::2] = 7.0
    return wider[:, ::2]


def locked(x):
    x = x.copy()
    x.setflags(write=False)
    return x


# Of a numpy array in the dtype; of a tensor in the dtype.
KINDS = {
    "array": np.copy,
    "column order": np.asfortranarray,
    "strided view": strided,
    "negative strides": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": locked,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}
TENSORS = {
    "tensor": torch.clone,
    "transposed tensor": lambda x: x.T.clone().T,
    "strided tensor": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "tensor that requires grad": lambda x: x.clone().requires_grad_(),
    "tensor of a graph": lambda x: x.clone().requires_grad_() * 1.0,
}
WHOLE = {
    "int64": lambda x: np.round(10 * x).astype(np.int64),
    "int8": lambda x: np.round(10 * x).astype(np.int8),
    "uint8": lambda x: np.round(10 * (x + 5)).astype(np.uint8),
    "bool": lambda x: x > 0,
    "int tensor": lambda x: torch.tensor(np.round(10 * x)).to(torch.int32),
    "bool tensor": lambda x: torch.tensor(x > 0),
}
NO_NUMBERS = {
    "complex128; expected real numbers: take the real part": (
        lambda x: x + 1j,
        lambda x: torch.tensor(x + 1j),
    ),
    "expected real numbers: give numbers only": (lambda x: x.astype(str), lambda x: x.astype(object)),
    "datetime64.*: give numbers only": (lambda x: np.full(x.shape, np.datetime64("2026-01-01")),),
}


def numbers(x):
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.array(x, dtype=float)


@cache
def tensors(state):
    """The state's two matrices by dtype, where it can hold them."""
    sides = {
        dtype: tuple(torch.asarray(x).to(getattr(torch, dtype)) for x in STATES[state])
        for dtype in (DTYPES if state in HALF else DTYPES[:2])
    }
    return {dtype: pair for dtype, pair in sides.items() if all(x.isfinite().all() for x in pair)}


def arrays(name):
    """Every state and dtype for a measure, as an array and as a tensor, of kinds that take turns."""
    kinds, of_torch = cycle(KINDS.items()), cycle(TENSORS.items())
    for state in STATES:
        for dtype, pair in tensors(state).items():
            kind, make = next(of_torch)
            yield state, dtype, kind, *map(make, pair)
            if dtype != "bfloat16":  # which numpy does not have
                kind, make = next(kinds)
                yield state, dtype, kind, *(make(x.numpy()) for x in pair)
        if state == "plain":
            yield state, "float64", "list", X.tolist(), Y.tolist()


@cache
def expected(name, state, dtype):
    """What 50 digits say."""
    x, y = map(numbers, tensors(state)[dtype])
    value = np.asarray(MEASURES[name][1](exact.wide(x), exact.wide(y)))
    with np.errstate(invalid="ignore"):  # numpy 2.1 warns of a NaN among objects
        return value if value.dtype == bool else value.astype(float)


def asserted(name, due, tolerance, *sides):
    """Measure, and compare the value."""
    got = MEASURES[name][0](*sides)
    for part in got if isinstance(got, tuple) else (got,):
        assert isinstance(part, torch.Tensor) == isinstance(sides[0], torch.Tensor)
        assert not getattr(part, "requires_grad", False)
    np.testing.assert_allclose(
        np.stack([*map(np.asarray, got)]) if isinstance(got, tuple) else np.asarray(got), due, **tolerance
    )


@pytest.mark.parametrize("name", MEASURES)
def test_every_state_has_its_exact_value(name):
    for state, dtype, kind, *sides in arrays(name):
        before = [numbers(x).tobytes() for x in sides]
        due = expected(name, state, dtype)
        try:
            asserted(name, due, tolerance(name, dtype, due), *sides)
        except BaseException as error:
            error.add_note(f"{name} of {state} in {dtype} as {kind}")
            raise
        assert [numbers(x).tobytes() for x in sides] == before, f"{state} as {kind} is changed"


@pytest.mark.parametrize("name", MEASURES)
def test_whole_numbers_and_booleans_are_numbers(name):
    for kind, convert in WHOLE.items():
        x, y = convert(X), convert(Y)
        due = measured(name, numbers(x), numbers(y))
        before = numbers(x)
        np.testing.assert_allclose(measured(name, x, y), due, rtol=1e-11, atol=1e-12, err_msg=kind)
        assert np.array_equal(numbers(x), before), kind


@pytest.mark.parametrize("name", MEASURES)
def test_numpy_and_torch_agree_to_twelve_digits(name):
    x, y = noise(80, 24, seed=3) + 5.0, noise(80, 24, seed=4) * np.geomspace(1.0, 0.1, 24)
    got = measured(name, torch.tensor(x), torch.tensor(y))
    np.testing.assert_allclose(got, measured(name, x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_no_matrix_of_real_numbers_is_refused(name):
    for words, conversions in NO_NUMBERS.items():
        for convert in conversions:
            with pytest.raises(ValueError, match=f"has dtype .*{words}"):
                measured(name, convert(X), convert(Y))
    for shape in ((0, 5), (12, 0), (0, 0), (5,)):
        for x in (np.ones(shape), torch.ones(shape)):
            with pytest.raises(ValueError, match=r"shape|at least 4|rows"):
                measured(name, x, x)


@pytest.mark.parametrize("name", UNIT_FREE)
def test_units_do_not_matter(name):
    """Powers of two change no digit of the input."""
    for power in (-100, 3, 100):
        np.testing.assert_allclose(
            measured(name, X * 2.0**power, Y), measured(name, X, Y), rtol=1e-9, atol=1e-11
        )


# What the exact values leave out: tiny angles, medians of masked rows, sizes beyond float64


@pytest.mark.parametrize("small", [1e-3, 1e-8, 1e-12, 1e-15])
def test_angles_keep_their_digits_near_zero(array, small):
    x, y = array([[1.0, 0.0]]), array([[np.cos(small), np.sin(small)]])
    assert float(geometry.angular_distance(x, y)) == pytest.approx(small / np.pi, rel=1e-9)
    assert float(geometry.angular_distance(x, -y)) == pytest.approx(1 - small / np.pi, rel=1e-15)
    assert float(geometry.block_influence(x, y)) == pytest.approx(small**2 / 2, rel=1e-4)


def test_massive_median_is_that_of_the_kept_rows(rng):
    x = np.abs(rng.normal(size=(7, 3)))
    mask = np.array([1, 1, 0, 1, 1, 1, 0], bool)
    x[0, 0] = 1000.0
    middle = np.median(np.abs(x[mask]))
    just_above, just_below = 1000 / middle * (1 + 1e-9), 1000 / middle * (1 - 1e-9)
    assert not geometry.massive_activations(x, relative=just_above, mask=mask).any()
    assert geometry.massive_activations(x, relative=just_below, mask=mask).sum() == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected equal shapes"):
        geometry.angular_distance(np.ones((2, 3)), np.ones((2, 4)))


def test_a_gradient_by_entry_neither_over_nor_underflows(array):
    for size in (1e-200, 1.0, 1e200):
        g = array([[3 * size, 4 * size], [np.inf, 0.0]])
        mask = array([True, False], "bool")
        assert float(gradients.gradient_norm(g, mask=mask)) == pytest.approx(5 * size)
        assert float(gradients.gradient_norm(g, rms=True, mask=mask)) == pytest.approx(5 * size / 2**0.5)
    assert float(gradients.gradient_norm(array([[0.0, 0.0]]))) == 0.0


def test_the_variance_of_a_channel_keeps_its_digits_at_any_offset(array):
    far = gradients.channel_variance(array(np.float64(1e8) + np.tile([[0.0], [1.0]], (5, 2))))
    assert float(far) == 0.25
