"""What do the connections do to the streams of the sampled tokens? The metrics of single matrices and of their products.

The numbers are those of `metrics.mixing`, `metrics.contraction` and `metrics.operators`, which a test compares; labels of
their own would cost twice as much as the numbers.
"""

from __future__ import annotations

import numpy as np

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.contraction import gain_of, left_beside_common, left_of_differences
from depthscope.diagnostics.metrics.mixing import (
    scaled_identity_distance,
    violations,
    weakest_product_sums,
)
from depthscope.diagnostics.metrics.operators import product_singular_values
from depthscope.diagnostics.quantities.mixing_matrices import Mixing

Tables = dict[str, tuple[tuple[str, ...], np.ndarray]]


def mixing_metrics(mixing: Mixing) -> Tables:
    """Metrics of H_res and of the products of all connections from the embedding on, reduced over the tokens."""
    curve = ("connection", "reduction")
    left = left_of_differences(mixing)
    kinds = mixing.reduced_values(mixing.each(violations))  # (connection, kind, reduction)
    sums = mixing.reduced_values(mixing.each_product(weakest_product_sums), depends_on="earlier")
    values = product_singular_values(*mixing.prefix)
    found: Tables = {
        "identity_distance": (curve, mixing.reduced_values(mixing.each(kernel.identity_distance))),
        "doubly_stochastic_violation": (("connection", "kind", "reduction"), kinds),
        "composite_attenuation": (("connection", "direction", "reduction"), sums),
        "composite_singular_value": (
            ("connection", "component", "reduction"),
            mixing.reduced_values(values, depends_on="earlier"),
        ),
    }
    products = {
        "deflated_gain": gain_of(left),
        "relative_deflated_gain": left_beside_common(mixing, left),
        "composite_identity_distance": mixing.each_product(scaled_identity_distance),
    }
    for name, of_tokens in products.items():
        found[name] = (curve, mixing.reduced_values(of_tokens, depends_on="earlier"))
    return found
