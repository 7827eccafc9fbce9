"""The chain of a model whose connections read earlier depths (a depth history) instead of streams."""

from __future__ import annotations

from itertools import pairwise

import torch

from depthscope.probes.structure.chain import Chain, HookPoint, layer_numbers
from depthscope.probes.structure.tape import Call, Tape, same_tensor


def history_chain(tape: Tape) -> Chain | None:
    """The states of a model whose modules are given a growing list of earlier states, newest last.

    X_l = F_l(X_{l−1}) + Σ_k α_k X_k over a window of earlier depths k, as the package ``mhc`` computes it.

    Returns: None where no two such modules follow one another.
    """
    calls = [call for call in tape.calls if call.past is not None and call.x_shape == call.y_shape]
    # Each must be given what the one before returned: a growing list of states, and not any list of tensors of one shape.
    if len(calls) < 2 or not all(same_tensor(a.y, _newest(b)) for a, b in pairwise(calls)):
        return None
    assert calls[0].past is not None
    start, at = calls[0].past
    producer = start.path if at == "output" else start.producer or "(input)"
    # The newest state that the first module is given is the embedding: a call outside of the chain took or returned it.
    points = [HookPoint(start.path, start.index, at, -1, "embed", producer)]
    for call, layer in zip(calls, layer_numbers(calls), strict=True):
        points.append(HookPoint(call.path, call.index, "output", layer, "post", call.path))
    return Chain(
        name="",
        points=tuple(points),
        connections=(),
        blocks=tuple(dict.fromkeys(call.path for call in calls)),
        block_class=type(calls[0].module).__name__,
        shapes=(calls[0].x_shape,) * len(points),
        history=True,
    )


def _newest(call: Call) -> torch.Tensor | None:
    """The newest of the past states that a call was given."""
    assert call.past is not None
    source, at = call.past
    return source.y if at == "output" else source.x
