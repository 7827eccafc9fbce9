"""Every kernel gives the number that an independent reference gives, on both kinds of array, narrow and wide."""

import ast
import inspect
import itertools

import numpy as np
import pytest

from tests.diagnostics.kernels.catalogue import public_kernels
from tests.diagnostics.kernels.references import geometry, gradients, meanfield, rank, similarity

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (rank, geometry, similarity, gradients, meanfield)
}


def of_entries(wanted):
    """The comparisons that are wanted, with their sources."""
    return [
        pytest.param(reference, id=f"{name} by {reference.source}")
        for module in MODULES.values()
        for name, references in module.REFERENCES.items()
        for reference in references
        if wanted(reference)
    ]


def takes_arrays(reference):
    return all(isinstance(x, np.ndarray) for x in reference.inputs[0])


def parts(value):
    """A value, or the parts of a tuple of values, as arrays."""
    return [np.asarray(part) for part in (value if isinstance(value, tuple) else (value,))]


def assert_near(got, expected, **tolerance):
    for a, b in zip(parts(got), parts(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, **tolerance)


def rounded(inputs):
    """The numbers rounded to float32, in float64; integers as they are."""
    return [x.astype(np.float32).astype(float) if x.dtype == float else x for x in inputs]


def called(kernel, inputs, array, dtype):
    """A kernel on arrays of one kind; integers retain their dtype."""
    return kernel(*(array(x, dtype if x.dtype == float else "int64") for x in inputs))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_kernel_has_a_reference(module):
    assert set(MODULES[module].REFERENCES) == set(public_kernels(module))


@pytest.mark.parametrize("module", MODULES)
def test_every_entry_measures_the_kernel_that_it_is_filed_under(module):
    tree = ast.parse(inspect.getsource(MODULES[module]))
    table = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign))
    for key, references in zip(table.keys, table.values, strict=True):
        used = {node.attr for node in ast.walk(references) if isinstance(node, ast.Attribute)}
        assert key.value.partition(".")[2] in used


@pytest.mark.parametrize("reference", of_entries(lambda r: not takes_arrays(r)))
def test_kernels_of_numbers_equal_their_references(reference):
    for inputs in reference.inputs:
        assert_near(reference.ours(*inputs), reference.theirs(*inputs), rtol=reference.rtol)


@pytest.mark.parametrize("reference", of_entries(takes_arrays))
def test_kernels_equal_their_references(array, reference):
    for inputs in reference.inputs:
        got = called(reference.ours, inputs, array, "float64")
        assert_near(got, reference.theirs(*inputs), rtol=reference.rtol, atol=1e-13)


@pytest.mark.parametrize("reference", of_entries(lambda r: takes_arrays(r) and r.narrow))
def test_float32_gives_the_float64_value_of_the_same_numbers(array, reference):
    for inputs in reference.inputs:
        got = called(reference.ours, inputs, array, "float32")
        assert_near(got, reference.ours(*rounded(inputs)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reference", of_entries(lambda r: takes_arrays(r) and r.batched))
def test_a_batch_gives_the_values_of_its_members(array, reference):
    inputs = reference.inputs[0]
    turned = [x[..., ::-1, :].copy() if x.ndim > 1 else x[::-1].copy() for x in inputs]
    stacks = [np.stack([np.stack([a, b, a])] * 2) for a, b in zip(inputs, turned, strict=True)]
    got = called(reference.ours, stacks, array, "float64")
    for i, j in itertools.product(range(2), range(3)):
        alone = called(reference.ours, turned if j == 1 else inputs, array, "float64")
        for batch, part in zip(parts(got), parts(alone), strict=True):
            np.testing.assert_allclose(batch[i, j], part, rtol=1e-11, atol=1e-13)
