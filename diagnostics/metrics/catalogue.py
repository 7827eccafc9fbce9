"""Which metrics are there? All of them, by name, in the order in which they are shown: file by file."""

from __future__ import annotations

from depthscope.diagnostics.metrics import (
    attention,
    checkpoints,
    collapse,
    contraction,
    gradients,
    mixing,
    operators,
    paths,
    propagation,
    representation,
    similarity,
    spectrum,
    weight_updates,
)
from depthscope.diagnostics.metrics.declaration import Metric

# One explicit list: no metric registers itself by being imported, so that no import can change the order.
DECLARED: tuple[Metric, ...] = (
    collapse.effective_rank,
    collapse.participation_ratio,
    collapse.corrected_participation_ratio,
    collapse.numerical_rank,
    collapse.dong_residual,
    collapse.token_cosine,
    collapse.sequence_share,
    collapse.massive_token_fraction,
    collapse.massive_activation,
    collapse.num_tokens,
    spectrum.singular_value,
    attention.attention_entropy,
    attention.sink_mass,
    similarity.cka,
    similarity.adjacent_cka,
    similarity.angular_distance,
    similarity.block_influence,
    similarity.stream_cosine,
    similarity.closest_stream_cosine,
    representation.joined_cka,
    representation.least_stream_cka,
    representation.trimmed_cka,
    mixing.mixing_gain,
    mixing.composite_gain,
    mixing.composite_attenuation,
    mixing.doubly_stochastic_violation,
    mixing.identity_distance,
    operators.mixing_singular_value,
    operators.composite_singular_value,
    operators.mixing_eigenvalue_modulus,
    operators.composite_operator_gain,
    contraction.deflated_gain,
    contraction.relative_deflated_gain,
    paths.depth_kernel,
    paths.read_share,
    paths.signal_share,
    paths.write_share,
    paths.effective_streams,
    gradients.residual_norm,
    gradients.gradient_norm,
    gradients.backward_gain,
    gradients.relative_gradient,
    gradients.gradient_rank,
    propagation.channel_variance,
    propagation.branch_share,
    propagation.adjacent_cosine,
    propagation.adjacent_cosine_band,
    # From the statistics of `record(model, weights=True)`, not from a trace.
    weight_updates.weight_norm,
    weight_updates.weight_gradient_norm,
    weight_updates.update_ratio,
    # From a history of checkpoints.
    checkpoints.first_weight_distance,
)

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in DECLARED}
