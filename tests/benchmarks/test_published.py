"""The benchmark of published numbers runs, finds them, and marks a miss."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.published import __main__ as published
from benchmarks.published import results


def test_every_published_number_is_found(capsys):
    assert published.main() == 0
    assert "MISSED" not in capsys.readouterr().out


def test_a_miss_is_marked_and_a_number_of_another_model_is_in_brackets(capsys, monkeypatch):
    def wrong():
        """A number that is not."""
        yield published.Row("two and two", 5.0, 4.0, 0.5)
        yield published.Row("gain", None, 1.5, elsewhere=3000.0)

    monkeypatch.setattr(results, "RESULTS", (wrong,))
    assert published.main() == 1
    printed = capsys.readouterr().out
    assert "MISSED (tolerance 0.5)" in printed
    assert "(3000)" in printed


def attention_residuals(*, skip, layers):
    """Plain float64 attention from the same start, one full softmax at a time."""
    rng = np.random.default_rng(0)
    scoring = rng.standard_normal((32, 32)) / np.sqrt(32)
    x = rng.standard_normal((12, 32))
    x = 1e-2 * (x - x.mean(0)) / np.abs(x).sum(-1).max()
    found = []
    for _ in range(layers + 1):
        size = np.abs(x - x.mean(0))
        found.append(np.sqrt(size.sum(0).max() * size.sum(1).max()))
        x = x - x.mean(0)
        weights = np.exp(x @ scoring @ x.T)
        x = skip * x + weights / weights.sum(-1, keepdims=True) @ x
    return np.log(found)


@pytest.mark.parametrize(("skip", "layers"), [(False, 1), (True, 8)])
def test_residuals_as_logarithms_are_those_of_plain_attention(skip, layers):
    expected = attention_residuals(skip=skip, layers=layers)
    np.testing.assert_allclose(results.log_residuals(skip=skip)[: layers + 1], expected, atol=1e-8)
