"""Tracks: further states that the blocks hand on beside the first one, such as the pair state of a protein model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.tape import Call, ChainError, same_tensor


def tracks_of(chain: Chain, run: Sequence[Call], *, named: bool) -> list[Chain]:
    """The chain and, where its blocks hand on further states and change them, one chain for each of these.

    Parameters
    ----------
    chain : Chain
        The chain of the first state.
    run : sequence of Call
        The calls of its blocks.
    named : bool
        Whether the user named the blocks, so that states of one shape, which look like streams, are taken one by one.

    Returns
    -------
    list of Chain
        Named after the parameters of the block's forward where there is more than one.

    Raises
    ------
    ChainError
        For states of one shape that the user did not name.
    """
    pairs = _handed_on(run)
    if not pairs:
        return [chain]
    shapes = {run[0].inputs[taken].tensor.shape for _, taken in pairs}
    if not named and run[0].x_shape in {tuple(shape) for shape in shapes}:
        raise ChainError(
            f"{run[0].path!r} and the blocks after it hand on {1 + len(pairs)} tensors of shape {run[0].x_shape}: these may "
            "be streams, and no stream connection was found. Each is captured as a chain of its own with "
            f"layers={_pattern(run)!r}"
        )
    first = replace(chain, name=run[0].inputs[0].name)
    return [first, *(_track(chain, run, given, taken) for given, taken in pairs)]


def _handed_on(run: Sequence[Call]) -> list[tuple[int, int]]:
    """Positions among a block's outputs and the next one's inputs of tensors that all blocks hand on and change."""
    found = []
    for given in range(1, len(run[0].outputs)):
        for taken in range(1, len(run[1].inputs)):
            links = all(
                same_tensor(a.seen("output", given)[0], b.seen("input", taken)[0]) for a, b in pairwise(run)
            )
            changed = all(not same_tensor(c.seen("output", given)[0], c.seen("input", taken)[0]) for c in run)
            if links and changed:
                found.append((given, taken))
    return found


def _track(chain: Chain, run: Sequence[Call], given: int, taken: int) -> Chain:
    places = [replace(place, item=taken) for place in chain.places[:-1]]
    last = replace(chain.places[-1], item=given)
    shapes = [tuple(call.inputs[taken].tensor.shape) for call in run]
    return replace(
        chain,
        name=run[0].inputs[taken].name,
        places=(replace(places[0], module="(input)"), *places[1:], last),
        shapes=(*shapes, tuple(run[-1].outputs[given].tensor.shape)),
        final=None,
    )


def _pattern(run: Sequence[Call]) -> str:
    return re.sub(r"\d+", "{i}", run[0].path, count=1)
