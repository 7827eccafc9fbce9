"""A masked row is ignored, whatever it contains; NaN and infinities in other rows are refused by number and index."""

import numpy as np
import pytest
import torch

from tests.diagnostics.kernels.formula_data import noise
from tests.diagnostics.kernels.measures import LAYERS, MEASURES, PAIRS, measured

TOKENS, FEATURES = 14, 5
X, Y = noise(3, TOKENS, FEATURES, seed=1), noise(3, TOKENS, FEATURES, seed=2)
BATCHED = [name for name in MEASURES if name not in LAYERS]
OF_ROWS = {"row_cosine": np.nan, "massive_tokens": False, "massive_activations": False}
# No row is left: nothing has size or rank 0; all else is undefined, or refused.
OF_NOTHING = {
    **dict.fromkeys(
        ("singular_values", "centred singular_values", "numerical_rank", "centred numerical_rank"), 0.0
    ),
    **{"gradient_norm": 0.0, "massive_activations": 0.0, "massive_tokens": 0.0},
}
NOT_FINITE = r" contains 2 NaN or infinite values of \d+, the first at index \(.*3, 2\)"


def spoiled(x, mask):
    """The same rows where they count, and what must not be looked at where they do not."""
    bad = np.where(np.arange(x.shape[-1]) % 2, np.nan, np.inf)
    return np.where(mask[..., None], x, bad)


def without(name, x, y, mask):
    """The measure of the rows that count, put where the masked one has them."""
    try:
        value = measured(name, x[mask], y[mask])
    except ValueError as error:
        return str(error)
    if name in OF_ROWS:
        full = np.full((TOKENS, *value.shape[1:]), OF_ROWS[name])
        full[mask] = value
        return full
    if "singular_values" in name:
        return np.concatenate([value, np.zeros(FEATURES - len(value))])
    return value


def kinds(*arrays):
    """The arrays as they are, and as tensors."""
    return arrays, tuple(map(torch.asarray, arrays))


@pytest.mark.parametrize("name", MEASURES)
def test_masked_rows_are_as_if_absent(name):
    for count in (1, 3, 11):
        mask = np.zeros(TOKENS, dtype=bool)
        mask[np.arange(count) * 5 % TOKENS] = True
        due = without(name, X[0], Y[0], mask)
        for x, y, keep in kinds(spoiled(X[0], mask), spoiled(Y[0], mask), mask):
            if isinstance(due, str):
                with pytest.raises(ValueError, match=r"rows|HSIC"):
                    measured(name, x, y, mask=keep)
            else:
                got = measured(name, x, y, mask=keep)
                np.testing.assert_allclose(got, due, rtol=1e-9, atol=1e-12, err_msg=f"{count} rows")


@pytest.mark.parametrize("name", BATCHED)
def test_every_matrix_of_a_batch_has_its_own_mask(name):
    rng = np.random.default_rng(0)
    mask = rng.random((3, TOKENS)) < 0.8
    mask[:, :12] |= rng.random((3, 1)) < 0.2  # some keep nearly all
    mask[:, 1:11] = True  # enough for every measure
    for x, y, keep in kinds(spoiled(X, mask), spoiled(Y, mask), mask):
        got = measured(name, x, y, mask=keep)
        got = np.moveaxis(got, 0, 1) if isinstance(MEASURES[name][0](x, y, mask=keep), tuple) else got
        for b in range(3):
            np.testing.assert_allclose(got[b], without(name, X[b], Y[b], mask[b]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_no_row_left_is_undefined(name):
    mask = np.zeros(TOKENS, dtype=bool)
    for x, y, keep in kinds(spoiled(X[0], mask), spoiled(Y[0], mask), mask):
        got = measured(name, x, y, mask=keep).astype(float)
        np.testing.assert_array_equal(got, np.full_like(got, OF_NOTHING.get(name, np.nan)))


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_not_finite_is_refused_by_number_and_place(name):
    # Of a pair the second side is looked at too.
    sides = [0, 1] if name in {**PAIRS, **LAYERS} else [0]
    for bad in (np.nan, np.inf, -np.inf):
        for side in sides:
            arrays = [X[0].copy(), Y[0].copy()]
            arrays[side][[3, 7], [2, 0]] = bad
            for x, y in kinds(*arrays):
                with pytest.raises(ValueError, match=NOT_FINITE) as refusal:
                    measured(name, x, y)
                assert "mask=" in str(refusal.value)


@pytest.mark.parametrize("name", MEASURES)
def test_masks_that_do_not_fit_are_refused(name):
    for x, y in kinds(X[0], Y[0]):
        with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
            measured(name, x, y, mask=np.ones(3, dtype=bool))
        with pytest.raises(ValueError, match=r"mask has dtype .*int64; expected booleans"):
            measured(name, x, y, mask=np.ones(TOKENS, dtype=np.int64))
