"""What Sinkhorn and softmax let through, against autograd through a projection that is written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import mixing


def projected(logits, rounds):
    p = logits.exp()
    for _ in range(rounds):
        p = p / p.sum(-2, keepdim=True)
        p = p / p.sum(-1, keepdim=True)
    return p


def trace(function, logits):
    n = logits.shape[-1]
    return float(torch.autograd.functional.jacobian(function, logits).reshape(n * n, n * n).trace())


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_sinkhorn_in_its_limit(n, spread):
    logits = spread * torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    rounds = 200 if spread <= 1 else 2000  # the derivative converges as slowly as the matrix
    found = mixing.sinkhorn_sensitivity(projected(logits, rounds).numpy())
    expected = trace(lambda z: projected(z, rounds), logits) * n / (n - 1) ** 2
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_near_the_identity_hardly_anything_passes():
    # Each entry off the diagonal is about e^−5. At −8 the derivative of Sinkhorn takes 20 000 rounds to its limit.
    logits = 5.0 * (torch.eye(4, dtype=torch.float64) - 1)
    found = float(mixing.sinkhorn_sensitivity(projected(logits, 2000).numpy()))
    assert found == pytest.approx(trace(lambda z: projected(z, 2000), logits) * 4 / 9, rel=1e-6)
    assert 0.03 < found < 0.05


def test_softmax_along_rows():
    logits = torch.randn(6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mixing.softmax_sensitivity(logits.softmax(-1))
    expected = [trace(lambda z: z.softmax(-1), one) / 3 for one in logits]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("kernel", [mixing.sinkhorn_sensitivity, mixing.softmax_sensitivity])
def test_ends_of_the_scale(kernel):
    assert float(kernel(np.full((4, 4), 0.25))) == pytest.approx(1.0)
    assert float(kernel(np.eye(4)[[2, 0, 3, 1]])) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="two streams"):
        kernel(np.ones((1, 1)))


def test_blocks_that_do_not_mix():
    """Two pairs of streams: within each a uniform matrix, and nothing between them."""
    apart = np.kron(np.eye(2), np.full((2, 2), 0.5))
    # Each block passes (2 − 1)² / 2, of (4 − 1)² / 4.
    assert float(mixing.sinkhorn_sensitivity(apart)) == pytest.approx(2 * 0.5 * 4 / 9)
