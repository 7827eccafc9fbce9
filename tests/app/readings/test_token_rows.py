"""Are the numbers of single tokens those of their states, and are padding and NaN what they are?"""

import numpy as np
import pytest
import xarray as xr

from depthscope.app.readings.close_up import CloseUp
from depthscope.app.readings.token_rows import found_tokens, token_rows


@pytest.fixture
def close_up() -> CloseUp:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 2, 4, 2, 8))  # (depth, sequence, token, stream, feature)
    states[1, 0, 2, :, 5] = 5000.0
    states[2, 1, 1] = np.nan
    mask = np.ones((2, 4), dtype=bool)
    mask[1, 3] = False
    texts = np.array([["a", "the", " THE", "\u202eevil"], ["x", "y", "the", "pad"]], dtype=object)
    return CloseUp(
        xr.Dataset(
            {
                "residual": (("depth", "sample", "token", "stream", "feature"), states),
                "mask": (("sample", "token"), mask),
                "token_text": (("sample", "token"), texts),
            }
        ),
        2,
    )


def test_each_number_is_that_of_the_state(close_up):
    rows = token_rows(close_up, 1)
    x, last = close_up.states_at(1), close_up.states_at(-1)
    assert len(rows) == 7  # padding is no token
    norms = np.linalg.norm(x, axis=-1)[close_up.mask]
    np.testing.assert_allclose(rows["norm"], norms)
    np.testing.assert_allclose(rows["times median"], norms / np.median(norms))
    row = rows.iloc[1]
    token = x[0, 1]
    np.testing.assert_allclose(
        row["distance to mean"], np.linalg.norm(token - x[0].mean(axis=0)) / np.linalg.norm(token)
    )
    np.testing.assert_allclose(
        row["cosine with last state"],
        token @ last[0, 1] / np.linalg.norm(token) / np.linalg.norm(last[0, 1]),
    )
    massive = rows[rows["massive"]]
    assert massive[["sequence", "position", "largest feature"]].to_numpy().tolist() == [[0, 2, 5]]
    assert massive["its value"].item() == pytest.approx(5000.0)
    one = token_rows(close_up, 1, stream="1")
    np.testing.assert_allclose(
        one["norm"], np.linalg.norm(close_up.states_at(1, "1"), axis=-1)[close_up.mask]
    )


def test_tokens_are_found_in_any_case_the_largest_first(close_up):
    rows = token_rows(close_up, 1)
    found = found_tokens(rows, "the")
    assert found.iloc[0][["sequence", "position"]].tolist() == [0, 2]
    assert len(found) == 3
    assert len(found_tokens(rows, "THE", sequence=0)) == 2
    assert found_tokens(rows, "(").empty
    (evil,) = found_tokens(rows, "evil")["text"]
    assert "\u202e" not in evil


def test_a_state_that_is_not_finite_comes_first_and_is_no_error(close_up):
    rows = found_tokens(token_rows(close_up, 2), "")
    assert rows.iloc[0][["sequence", "position"]].tolist() == [1, 1]
    assert np.isnan(rows.iloc[0]["norm"])


def test_a_run_of_padding_has_no_rows(close_up):
    trace = close_up._trace.assign(mask=close_up._trace["mask"] & False)
    assert token_rows(CloseUp(trace, 2), 0).empty
