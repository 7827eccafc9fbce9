"""In whatever order and batch the matrices lie in memory, the values are the same, and nothing that was given changes."""

from itertools import permutations

import numpy as np
import pytest

from depthscope.diagnostics.kernels import mixing

# Kernels of matrices alone.
KERNELS = [
    *(
        mixing.forward_gain,
        mixing.backward_gain,
        mixing.operator_gain,
        mixing.attenuation,
        mixing.eigenvalues,
    ),
    *(
        mixing.composite,
        mixing.prefix_composites,
        mixing.deflated_gain,
        mixing.singular_values,
        mixing.sinkhorn,
    ),
    *(mixing.log_forward_gain, mixing.log_backward_gain, mixing.doubly_stochastic_violation),
    *(mixing.identity_distance, mixing.constraint_errors, mixing.effective_streams),
]


def numbers(found):
    """All that a kernel gives, as one array."""
    return np.stack([np.asarray(each) for each in (found.values() if isinstance(found, dict) else found)])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_matrices_in_any_order_in_memory_are_read_and_left_alone(kernel):
    for n in (2, 4):
        # One connection too, of which a part is the whole memory.
        for count in (1, 2):
            given = mixing.sinkhorn(np.random.default_rng(n).standard_normal((count, 30, n, n)), steps=20)
            expected = numbers(kernel(given.copy()))
            for order in permutations(range(4)):
                values = np.ascontiguousarray(given.transpose(order)).transpose(np.argsort(order))
                found = numbers(kernel(values))
                np.testing.assert_array_equal(values, given)
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-7)
