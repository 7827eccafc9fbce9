"""What matrices satisfy is told from their numbers: built to satisfy one constraint, they are named by it and by no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import mixing
from depthscope.diagnostics.kernels.mixing import constraint_errors, named_constraint

TOKENS, N = 40, 4
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((TOKENS, N, N))
EYE, ONES = np.eye(N), np.ones((N, N))
ORTHOGONAL = np.linalg.qr(NOISE)[0]
SMALL = mixing.sinkhorn(RNG.standard_normal((2, TOKENS, 2, 2)), steps=300)


def softmax(logits, axis):
    x = np.exp(logits)
    return x / x.sum(axis, keepdims=True)


def circulant(rows):
    return np.stack([np.roll(rows, i, axis=-1) for i in range(rows.shape[-1])], axis=-2)


def kronecker(a, b):
    return np.stack([np.kron(*pair) for pair in zip(a, b, strict=True)])


CASES = {
    "Sinkhorn": (mixing.sinkhorn(NOISE, steps=100), "doubly stochastic", ()),
    "a doubly stochastic circulant": (circulant(softmax(NOISE[:, 0], -1)), "doubly stochastic", ("circulant",)),
    "a Kronecker product": (kronecker(*SMALL), "doubly stochastic", ("a Kronecker product",)),
    "a symmetric one": (
        mixing.sinkhorn(NOISE + NOISE.swapaxes(-1, -2), steps=300), "doubly stochastic", ("symmetric",),
    ),
    "two streams": (SMALL[0], "doubly stochastic", ()),
    "softmax over the sources": (softmax(NOISE, -1), "row-stochastic only", ()),
    "softmax over the destinations": (softmax(NOISE, -2), "column-stochastic only", ()),
    "orthogonal": (ORTHOGONAL, "orthogonal", ()),
    "diagonal": (np.exp(NOISE) * EYE, "diagonal", ()),
    "weights below one": (0.5 * mixing.sinkhorn(NOISE), "substochastic", ()),
    "signed, with both sums": (
        2 * mixing.sinkhorn(NOISE, steps=100) - ONES / N, "rows and columns sum to 1, with negative entries,", (),
    ),
    "rotations that shrink": (
        ORTHOGONAL * RNG.uniform(0.3, 1.0, (TOKENS, 1, N)), "of spectral norm at most 1", (),
    ),
    "signed, with sums of rows alone": (
        EYE + NOISE - NOISE.mean(-1, keepdims=True), "rows sum to 1, with negative entries,", (),
    ),
    "signed, with sums of columns alone": (
        EYE + NOISE - NOISE.mean(-2, keepdims=True), "columns sum to 1, with negative entries,", (),
    ),
    "a choice of one source, the same for two streams": (
        softmax(NOISE, -1) >= softmax(NOISE, -1).max(-1, keepdims=True), "row-stochastic only", (),
    ),
    "a choice of one destination, the same for two streams": (
        softmax(NOISE, -2) >= softmax(NOISE, -2).max(-2, keepdims=True), "column-stochastic only", (),
    ),
    "gates": (1 / (1 + np.exp(-NOISE)), "non-negative", ()),
    "outer products": (NOISE[:, :, :1] * NOISE[:, :1], "unconstrained", ("rank 1",)),
    "free": (EYE + 0.1 * NOISE, "unconstrained", ()),
    "free and hardly trained": (EYE + 1e-4 * NOISE, "unconstrained", ()),
}  # fmt: skip

TRIVIAL = {
    "identity": (EYE, "identity"),
    "uniform": (ONES / N, "uniform"),
    "all ones": (ONES, "all ones"),
    "zero": (0 * ONES, "zero"),
    "permutation": (EYE[[1, 0, 3, 2]], "permutation"),
    "a bias on the diagonal": (softmax(4 * EYE, -1), "doubly stochastic"),
}


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_named_by_what_they_satisfy(name):
    matrices, expected, also = CASES[name]
    found = named_constraint(matrices)
    assert (found.name, found.also, found.trivial) == (expected, also, False)
    assert found.error <= 1e-5


def test_tensors_and_tokens_in_any_shape_give_the_same():
    for name in ("a Kronecker product", "gates", "free"):
        matrices = CASES[name][0]
        shaped = torch.tensor(matrices.reshape(5, -1, *matrices.shape[1:]))
        assert named_constraint(shaped).words == named_constraint(matrices).words


@pytest.mark.parametrize("name", TRIVIAL)
def test_what_every_family_starts_with_tells_none_of_them(name):
    matrix, expected = TRIVIAL[name]
    found = named_constraint(np.stack([matrix] * TOKENS))
    assert (found.name, found.trivial, found.also) == (expected, True, ())
    if expected in ("identity", "uniform", "doubly stochastic"):
        assert "nothing more can be inferred" in found.words


def test_one_matrix_of_another_kind_is_enough():
    matrices = CASES["Sinkhorn"][0].copy()
    matrices[17] = 2 * ORTHOGONAL[17]
    assert named_constraint(matrices).name == "unconstrained"


@pytest.mark.parametrize(("steps", "expected"), [(20, "doubly stochastic"), (1, "row-stochastic only")])
def test_a_truncated_sinkhorn_is_told_with_both_errors(steps, expected):
    found = named_constraint(mixing.sinkhorn(2 * NOISE, steps=steps))
    assert found.name == expected
    assert found.errors["row sums"] < 1e-12 < 1e-4 < found.errors["column sums"]
    assert "rows within" in found.words
    assert "column" in found.words


def test_rounding_of_low_precision_is_no_constraint_of_its_own():
    rounded = torch.tensor(CASES["Sinkhorn"][0]).bfloat16().double()
    assert named_constraint(rounded, tolerance=2e-2).name == "doubly stochastic"
    assert named_constraint(rounded).name != "doubly stochastic"
    # Sums near 1 because the matrices are near the identity: no tolerance makes that a constraint.
    near = torch.tensor(EYE + 1e-3 * NOISE).double()
    assert named_constraint(near, tolerance=2e-2).name == "unconstrained"


def test_errors_are_distances_of_entries_and_sums():
    matrix = np.array([[0.5, 0.25, 0.0], [0.25, 0.5, 0.25], [0.0, 0.25, 0.9]])
    found = {name: float(error) for name, error in constraint_errors(matrix).items()}
    assert found["row sums"] == pytest.approx(0.25)
    assert found["column sums"] == pytest.approx(0.25)
    assert found["excess"] == pytest.approx(0.15)
    assert found["diagonal"] == 0.25
    assert found["identity"] == 0.5
    assert found["symmetric"] == 0.0
    assert found["negativity"] == 0.0
    assert found["circulant"] == pytest.approx(0.9 - 1.9 / 3)
    assert found["orthogonal"] == pytest.approx(abs(matrix.T @ matrix - np.eye(3)).max())
    assert found["a Kronecker product"] == np.inf


def test_a_single_stream_is_refused():
    with pytest.raises(ValueError, match="expected matrices of two or more streams"):
        named_constraint(np.ones((3, 1, 1)))
