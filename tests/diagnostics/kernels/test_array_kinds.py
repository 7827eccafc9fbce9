"""However the same numbers come, the value is the same, no input changes, and no graph grows."""

import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import similarity
from tests.diagnostics.kernels.formula_data import noise
from tests.diagnostics.kernels.measures import MEASURES, measured

X, Y = noise(12, 5, seed=1), noise(12, 5, seed=2)


def strided(x):
    """Every second column of a wider array."""
    wider = np.repeat(x, 2, axis=1)
    wider[:, 1::2] = 7.0
    return wider[:, ::2]


def backwards(x):
    """A view with negative strides of a reversed copy."""
    return x[::-1, ::-1].copy()[::-1, ::-1]


def locked(x):
    x = x.copy()
    x.setflags(write=False)
    return x


KINDS = {
    "list": lambda x: x.tolist(),
    "column order": np.asfortranarray,
    "strided view": strided,
    "negative strides": backwards,
    "read-only": locked,
    "big-endian": lambda x: x.astype(">f8"),
    "tensor": torch.tensor,
    "transposed tensor": lambda x: torch.tensor(x.T.copy()).T,
    "strided tensor": lambda x: torch.tensor(np.repeat(x, 2, axis=1))[:, ::2],
    "tensor that requires grad": lambda x: torch.tensor(x, requires_grad=True),
    "tensor of a graph": lambda x: torch.tensor(x, requires_grad=True) * 1.0,
}
WHOLE = {
    "int64": lambda x: np.round(10 * x).astype(np.int64),
    "int8": lambda x: np.round(10 * x).astype(np.int8),
    "uint8": lambda x: np.round(10 * (x + 5)).astype(np.uint8),
    "bool": lambda x: x > 0,
    "int tensor": lambda x: torch.tensor(np.round(10 * x)).to(torch.int32),
    "bool tensor": lambda x: torch.tensor(x > 0),
}


def content(x):
    return np.array(x.detach()) if isinstance(x, torch.Tensor) else np.array(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEASURES)
def test_the_kind_of_array_does_not_matter(name, kind):
    x, y = KINDS[kind](X), KINDS[kind](Y)
    got = MEASURES[name][0](x, y)
    for part in got if isinstance(got, tuple) else (got,):
        assert isinstance(part, torch.Tensor) == isinstance(x, torch.Tensor)
        assert not getattr(part, "requires_grad", False)
    np.testing.assert_allclose(measured(name, x, y), measured(name, X, Y), rtol=1e-11, atol=1e-12)
    assert np.array_equal(content(x), X)
    assert np.array_equal(content(y), Y)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in MEASURES
        if name not in ("mutual_knn", "cknna")  # equally near neighbours that are not equal: either may win
        for kind in WHOLE
    ],
)
def test_whole_numbers_and_booleans_are_numbers(name, kind):
    x, y = WHOLE[kind](X), WHOLE[kind](Y)
    same = content(x).astype(float), content(y).astype(float)
    np.testing.assert_allclose(measured(name, x, y), measured(name, *same), rtol=1e-11, atol=1e-12)
    assert np.array_equal(content(x), same[0])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", MEASURES)
def test_no_input_changes(name, dtype):
    mask = np.arange(12) != 4
    for x, y in (
        (X.astype(dtype), Y.astype(dtype)),
        (torch.tensor(X.astype(dtype)), torch.tensor(Y.astype(dtype))),
    ):
        before = content(x), content(y), mask.copy()
        measured(name, x, y, **({} if name == "minibatch_cka" else {"mask": mask}))
        for now, then in zip((content(x), content(y), mask), before, strict=True):
            assert now.tobytes() == then.tobytes()


@pytest.mark.parametrize("name", MEASURES)
def test_numpy_and_torch_agree_to_twelve_digits(name):
    x, y = noise(80, 24, seed=3) + 5.0, noise(80, 24, seed=4) * np.geomspace(1.0, 0.1, 24)
    got = measured(name, torch.tensor(x), torch.tensor(y))
    np.testing.assert_allclose(got, measured(name, x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda x: x + 1j, "complex128; expected real numbers: take the real part"),
        (lambda x: torch.tensor(x + 1j), "complex128; expected real numbers: take the real part"),
        (lambda x: x.astype(str), "expected real numbers: give numbers only"),
        (lambda x: x.astype(object), "object; expected real numbers: give numbers only"),
        (lambda x: np.full(x.shape, np.datetime64("2026-01-01")), "datetime64.*: give numbers only"),
    ],
    ids=["complex", "complex tensor", "text", "objects", "dates"],
)
@pytest.mark.parametrize("name", MEASURES)
def test_what_is_not_real_numbers_is_refused(name, convert, words):
    with pytest.raises(ValueError, match=f"has dtype .*{words}"):
        measured(name, convert(X), convert(Y))


@pytest.mark.parametrize("shape", [(0, 5), (12, 0), (0, 0)])
@pytest.mark.parametrize("name", MEASURES)
def test_empty_arrays_are_refused(name, shape):
    for x in (np.ones(shape), torch.ones(shape)):
        with pytest.raises(ValueError, match=r"shape|at least 4"):
            measured(name, x, x)


# A vector is a spectrum to alpha_req.
@pytest.mark.parametrize("name", [name for name in MEASURES if name != "alpha_req"])
def test_vectors_are_refused(name):
    for x in (np.ones(5), torch.ones(5)):
        with pytest.raises(ValueError, match=r"shape|rows"):
            measured(name, x, x)


def test_one_layer_is_a_table_of_one():
    for unbiased in (False, True):
        for x in (X[None], torch.tensor(X[None])):
            assert similarity.cka_matrix(x, unbiased=unbiased).tolist() == [[pytest.approx(1.0, abs=1e-12)]]
