"""Spectral ranks against closed forms, dense formulas, the authors' package and Marchenko-Pastur numerics."""

import dimensionality
import numpy as np
import pytest
from scipy import stats

from depthscope.diagnostics.kernels import rank


def with_spectrum(s, n, d, rng):
    u = np.linalg.qr(rng.normal(size=(n, len(s))))[0]
    v = np.linalg.qr(rng.normal(size=(d, len(s))))[0]
    return (u * s) @ v.T


SPECTRA = {
    "power": 1 / np.arange(1.0, 129),
    "condition 1e4": np.geomspace(1, 1e-4, 128),
    "condition 1e8": np.geomspace(1, 1e-8, 128),
    "spike": np.r_[1e5, 1 / np.arange(2.0, 129)],
    "collapse": np.r_[1.0, np.full(127, 1e-5)],
    "deep collapse": np.r_[1.0, np.full(127, 1e-9)],
    "rank one": np.r_[1.0, np.zeros(127)],
}


@pytest.mark.parametrize(
    ("case", "shape"), [*((case, (128, 200)) for case in SPECTRA), ("deep collapse", (400, 128))]
)
def test_effective_rank_survives_bad_conditions(rng, case, shape):
    s = SPECTRA[case]
    x = with_spectrum(s, *shape, rng)
    expected = np.exp(stats.entropy(s))
    assert float(rank.effective_rank(x)) == pytest.approx(expected, rel=1e-9)
    assert float(rank.effective_rank(x.astype(np.float32).astype(float))) >= 1


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="negative"):
        rank.effective_rank_of([1.0, -1.0])
    with pytest.raises(ValueError, match="expected None, 'rows' or 'both'"):
        rank.participation_ratio(np.ones((3, 2)), correct="row")


@pytest.mark.parametrize("shape", [(12, 9), (9, 30), (4, 2)])
def test_corrections_equal_the_authors_package(array, rng, shape):
    x = rng.normal(size=shape) @ np.diag(np.linspace(0.2, 2, shape[1])) + rng.normal(size=shape[1])
    expected = dimensionality.participation_ratio(x, return_all=True)
    for correct, key in [(None, "naive"), ("rows", "row"), ("both", "both")]:
        got = float(rank.participation_ratio(array(x), center=True, correct=correct))
        assert got == pytest.approx(expected[key], rel=1e-8), correct


def test_row_correction_is_unbiased_where_the_plain_value_is_not(rng):
    truth = np.geomspace(1, 0.05, 20)
    expected = truth.sum() ** 2 / (truth**2).sum()
    x = rng.normal(size=(600, 15, 20)) * np.sqrt(truth)
    assert rank.participation_ratio(x, center=True, correct="rows").mean() == pytest.approx(
        expected, rel=0.08
    )
    assert rank.participation_ratio(x, center=True).mean() < 0.7 * expected


def test_three_centred_rows_have_no_correction(array, rng):
    x = rng.normal(size=(4, 3, 5))
    for correct in ("rows", "both"):
        assert np.isnan(rank.participation_ratio(array(x), center=True, correct=correct)).all()
        assert not np.isnan(rank.participation_ratio(array(x), correct=correct)).any()


def test_uncentred_correction_of_both_by_loops(rng):  # that of rows has 50 digits in test_any_array
    x = rng.normal(size=(6, 3)) + 0.5
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    columns = [(a, b) for a in range(3) for b in range(3) if a != b]
    over = sum(x[i, a] ** 2 * x[j, b] ** 2 for i, j in pairs for a, b in columns)
    under = sum(x[i, a] * x[j, a] * x[i, b] * x[j, b] for i, j in pairs for a, b in columns)
    assert float(rank.participation_ratio(x, correct="both")) == pytest.approx(over / under, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(300, 300), (60, 500)])
def test_null_equals_random_matrices(rng, n, d):
    s = np.linalg.svd(rng.normal(size=(3, n, d)), compute_uv=False)
    null = rank.marchenko_pastur(n, d)
    assert rank.effective_rank_of(s).mean() == pytest.approx(null.effective_rank, rel=3e-3)
    assert rank.entropy_rank_of(s).mean() == pytest.approx(null.entropy_rank, rel=5e-3)
    assert rank.participation_ratio_of(s).mean() == pytest.approx(null.participation_ratio, rel=5e-3)
    assert rank.stable_rank_of(s).mean() == pytest.approx(null.stable_rank, rel=5e-2)
    np.testing.assert_allclose(null.singular_values()[20:-20], s.mean(0)[20:-20], rtol=0.02, atol=0.1)
