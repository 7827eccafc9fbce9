"""Which laws are there? All of them, by name, in the order in which they are shown."""

from __future__ import annotations

from depthscope.diagnostics.theory import mean_field, noise, products, residual
from depthscope.diagnostics.theory.laws import Law

# One explicit list, like the catalogue of metrics: the order does not depend on imports.
LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        noise.MARCHENKO_PASTUR,
        products.random_product,
        products.random_connection,
        residual.pre_ln_growth,
        residual.independent_branches,
        residual.dong_cubic,
        mean_field.mean_field_length,
        mean_field.mean_field_correlation,
        mean_field.mean_field_gradient,
    )
}
