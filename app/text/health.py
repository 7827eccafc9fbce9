"""What does a network have that passes a verdict? The name of the healthy state, which heads a column of ✓."""

from __future__ import annotations

# Verdicts are named after faults, and «no FAULT» names the rest well: these are said better another way.
_NAMES = {
    "same_representation": "distinct layers",
    "nothing_measured": "something measured",
    "loss_not_finite": "finite loss",
    "diverged_loss": "stable loss",
    "residual_not_finite": "finite states",
    "mixing_not_finite": "finite mixing",
    "dead_state": "live states",
    "exploding_state": "bounded states",
    "vanishing_state": "lasting states",
    "gradient_not_finite": "finite gradient",
    "cut_gradient": "connected gradient",
    "gain_explosion": "bounded gain",
    "attenuation": "no fading stream",
    "discarded_mixing": "mixing applied",
    "transposed_mixing": "mixing not transposed",
    "unlearnable_mixing": "mixing can learn",
    "swapped_weights": "weights in order",
    "foreign_coefficients": "own coefficients",
    "sinkhorn_not_converged": "Sinkhorn converged",
    "negative_mixing": "mixing not negative",
    "expansive_mixing": "contractive mixing",
    "stream_collapse": "distinct streams",
    "stuck_at_identity": "streams mix",
    "saturated_logits": "logits can learn",
    "unread_stream": "all streams read",
    "unwritten_stream": "all streams written",
    "loud_stream": "even streams",
    "passing_streams": "streams persist",
    "wasted_layer": "all layers read",
    "idle_layer": "all layers work",
    "few_tokens_for_cka": "enough tokens for CKA",
    "small_sample": "enough samples",
    "lost_update": "updates arrive",
    "unproven_reading": "reading proven",
}


def healthy_name(verdict: str) -> str:
    """The name of the state that passes a verdict.

    Examples
    --------
    >>> healthy_name("same_representation"), healthy_name("rank_collapse")
    ('distinct layers', 'no rank collapse')
    """
    return _NAMES.get(verdict, f"no {verdict.replace('_', ' ')}")
