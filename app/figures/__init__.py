"""Which figures are there? One definition of each, drawn on the screen and on paper."""

from depthscope.app.figures.build.default_figure import default_figures
from depthscope.app.figures.build.values import feeds
from depthscope.app.figures.catalogue import collapse, gradients, mixing, similarity
from depthscope.app.figures.specification import (
    CHOICES,
    Analyses,
    Figure,
    FigureKind,
    Heatmap,
    Line,
    Lines,
    Selection,
)
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

__all__ = [
    "CHOICES",
    "DEFINED",
    "DRAWN",
    "FIGURES",
    "NOT_DRAWN",
    "Analyses",
    "Figure",
    "FigureKind",
    "Heatmap",
    "Line",
    "Lines",
    "Selection",
    "available",
]

DEFINED: dict[str, FigureKind] = {
    kind.name: kind
    for kind in (
        collapse.effective_rank,
        collapse.participation_ratio,
        collapse.corrected_participation_ratio,
        collapse.numerical_rank,
        collapse.dong_residual,
        collapse.token_cosine,
        collapse.sequence_share,
        collapse.massive_activation,
        collapse.massive_token_fraction,
        collapse.attention_entropy,
        collapse.sink_mass,
        collapse.spectrum,
        collapse.spectrum_map,
        collapse.spectral_density,
        similarity.cka,
        similarity.angular_distance,
        similarity.procrustes,
        similarity.mutual_knn,
        similarity.cknna,
        similarity.adjacent_cka,
        similarity.adjacent_cosine,
        similarity.block_influence,
        similarity.relative_turn,
        similarity.effective_depth,
        similarity.variance_growth,
        similarity.step_spread,
        similarity.stream_cosine,
        similarity.closest_stream_cosine,
        similarity.stream_cka,
        similarity.adjacent_angle,
        mixing.mixing_gain,
        mixing.composite_gain,
        mixing.composite_attenuation,
        mixing.doubly_stochastic_violation,
        mixing.operator_gain,
        mixing.composite_operator_gain,
        mixing.deflated_gain,
        mixing.relative_deflated_gain,
        mixing.effective_streams,
        mixing.identity_distance,
        mixing.composite_identity_distance,
        mixing.initial_distance,
        mixing.read_share,
        mixing.signal_share,
        mixing.write_share,
        mixing.mixing_singular_value,
        mixing.mixing_eigenvalue_modulus,
        mixing.composite_singular_value,
        mixing.logit_range,
        mixing.logit_saturation,
        mixing.mixing_gradient,
        mixing.logit_gradient,
        mixing.logit_gradient_share,
        mixing.depth_kernel,
        mixing.read_mass,
        gradients.gradient_norm,
        gradients.backward_gain,
        gradients.relative_gradient,
        gradients.residual_norm,
        gradients.gradient_rank,
        gradients.channel_variance,
        gradients.branch_share,
        gradients.update_ratio,
        gradients.weight_gradient_norm,
        gradients.weight_norm,
    )
}
"""Every figure of the catalogue by name, in display order."""

# `also` too: a band is in the figure of its metric and needs none of its own.
DRAWN = frozenset(name for kind in DEFINED.values() for name in (*kind.needs, *kind.also))
"""Metrics that a figure of the catalogue draws."""

NOT_DRAWN = {
    "num_tokens": "every caption counts the tokens",
    "fused_elements_moved": "it is the same at every connection: the facts of the run say it in a sentence",
    "kept_elements": "it grows by the same amount at every connection: the facts of the run say it in a sentence",
}
"""Metrics that have no figure of their own, with the reason."""

FIGURES: dict[str, FigureKind] = DEFINED | {
    kind.name: kind
    for kind in default_figures(
        [metric for name, metric in CATALOGUE.items() if name not in DRAWN and name not in NOT_DRAWN],
        tuple(DEFINED.values()),
    )
}
"""Every figure by name, in display order: the defined ones, then one for every metric that none of them draws but could."""


def available(analyses: Analyses) -> dict[str, FigureKind]:
    """Figures that at least one of the runs can feed.

    ``analyses``: run name → analysis.
    Returns: Name → kind, in display order.
    """
    return {
        name: kind
        for name, kind in FIGURES.items()
        if any(feeds(data, kind.needs) for data in analyses.values())
    }
