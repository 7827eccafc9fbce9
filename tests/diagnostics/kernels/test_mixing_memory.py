"""In whatever order and batch the matrices lie in memory, the values are the same, and nothing that was given changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from itertools import permutations

import numpy as np
import pytest

from depthscope.diagnostics.kernels import mixing

ORDERS = list(permutations(range(4)))


def of_matrices(function) -> bool:
    """Whether a kernel takes matrices alone."""
    needed = [
        each
        for each in inspect.signature(function).parameters.values()
        if each.default is inspect.Parameter.empty
    ]
    return len(needed) == 1


KERNELS = {
    name: function
    for name in mixing.__all__
    if inspect.isfunction(function := getattr(mixing, name)) and of_matrices(function)
}


def in_order(values: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """The same array with its axes in another order in memory, the last named one innermost."""
    return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))


def arrays(result) -> list[np.ndarray]:
    """The numbers of a result: an array, several of them, or by name."""
    if isinstance(result, np.ndarray | float | int):
        return [np.asarray(result)]
    if isinstance(result, dict):
        return arrays(result.values())
    if not isinstance(result, Iterable) or isinstance(result, str):  # such as the name of a constraint
        return []
    return [array for part in result for array in arrays(part)]


@pytest.mark.parametrize("name", KERNELS)
def test_matrices_in_any_order_in_memory_are_read_and_left_alone(name):
    for n in (2, 4):
        # One connection too, of which a part is the whole memory.
        for count in (1, 2):
            given = mixing.sinkhorn(np.random.default_rng(n).standard_normal((count, 30, n, n)), steps=20)
            expected = arrays(KERNELS[name](given.copy()))
            for order in ORDERS:
                values = in_order(given, order)
                found = KERNELS[name](values)
                np.testing.assert_array_equal(values, given)
                for one, other in zip(arrays(found), expected, strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-7)
