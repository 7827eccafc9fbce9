"""Which metrics are there? All of them, by name, in the order in which they are shown."""

from __future__ import annotations

from diagnostics import collapse, gradients, mixing, similarity
from diagnostics.metric import Metric

CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        collapse.effective_rank,
        collapse.entropy_rank,
        collapse.participation_ratio,
        collapse.stable_rank,
        collapse.dong_residual,
        collapse.token_cosine,
        collapse.massive_token_fraction,
        collapse.massive_activation,
        collapse.num_tokens,
        similarity.cka,
        similarity.adjacent_cka,
        similarity.angular_distance,
        similarity.block_influence,
        similarity.stream_cosine,
        mixing.mixing_gain,
        mixing.composite_gain,
        mixing.pair_gain,
        mixing.composite_attenuation,
        mixing.deflated_gain,
        mixing.mixing_singular_value,
        mixing.composite_singular_value,
        mixing.mixing_eigenvalue_modulus,
        mixing.doubly_stochastic_violation,
        mixing.identity_distance,
        mixing.mixing_entropy,
        mixing.depth_kernel,
        mixing.read_share,
        mixing.write_share,
        gradients.residual_norm,
        gradients.gradient_norm,
        gradients.backward_gain,
    )
}
