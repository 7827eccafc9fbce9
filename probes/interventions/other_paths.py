"""Is a state that is changed all that the later ones get? If not, a sentence about what leads around it."""

from __future__ import annotations

from depthscope.probes.connections.coefficients import relative_error
from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.model_under_test import ModelUnderTest

# By how much the last state may differ where only rounding does: batches in another order; a heuristic of ours.
AROUND = 1e-2


def other_paths(model: ModelUnderTest) -> str:
    """What leads around the state in the middle of a model; empty where nothing does.

    The states in the middle are exchanged between the sequences. If nothing else leads from before them to the last
    state, that one is then the other sequence's, whatever comes between.
    """
    last, middle = len(model.chain.points) - 1, len(model.chain.points) // 2
    # Random masks belong to a row, not to a sequence.
    mixes = any(module.training for module in model.model.modules())
    if mixes or len(model.base.states[0]) < 2 or middle == last:
        return ""
    try:
        passed = model.forward({middle: lambda state, seen: state.roll(1, 0)})
    except InterventionError:
        return ""
    expected = model.base.states[last].roll(1, 0).double()
    apart = relative_error(passed.states[last].double() - expected, expected)
    if apart <= AROUND:
        return ""
    return (
        f"more than the state at depth {middle} leads to the last one (with the states of other sequences there, it "
        f"differs from theirs by {apart:.1%}): embeddings of the ids, masks or skips over depth go around a changed state"
    )
