"""The chain of a model whose connections read the outputs of earlier depths: a depth history, which has no streams."""

from __future__ import annotations

from itertools import pairwise

import torch

from depthscope.probes.structure.chain import Chain, Place, layer_numbers
from depthscope.probes.structure.tape import Call, Tape, same_tensor


def history_chain(tape: Tape) -> Chain | None:
    """The states of a model whose modules are given a growing list of earlier states, newest last.

    X_l = F_l(X_{l−1}) + Σ_k α_k X_k over a window of earlier depths k, as the package ``mhc`` computes it.

    Parameters
    ----------
    tape : Tape
        The calls of one forward.

    Returns
    -------
    Chain or None
        None where no two such modules follow one another.
    """
    calls = [call for call in tape.calls if call.past is not None and call.x_shape == call.y_shape]
    if len(calls) < 2 or not all(same_tensor(a.y, _newest(b)) for a, b in pairwise(calls)):
        return None
    first = calls[0].past
    assert first is not None
    layers = layer_numbers(calls)
    start, at = first
    places = [
        Place(
            start.path,
            start.index,
            at,
            -1,
            "embed",
            start.path if at == "output" else start.producer or "(input)",
        )
    ]
    places += [_given(call, layer) for call, layer in zip(calls, layers, strict=True)]
    return Chain(
        name="",
        places=tuple(places),
        links=(),
        blocks=tuple(dict.fromkeys(call.path for call in calls)),
        block_class=type(calls[0].module).__name__,
        shapes=(calls[0].x_shape,) * len(places),
        history=True,
    )


def _newest(call: Call) -> torch.Tensor | None:
    """The newest of the past states that a call was given."""
    assert call.past is not None
    seen, at = call.past
    return seen.y if at == "output" else seen.x


def _given(call: Call, layer: int) -> Place:
    return Place(call.path, call.index, "output", layer, "post", call.path)
