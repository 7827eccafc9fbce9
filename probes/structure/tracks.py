"""Tracks: further states that blocks pass on in addition to the first one, such as the pair state of a protein model.

The name is that of RoseTTAFold's three-track network. Each is captured as a chain of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.tape import Call, SeveralStatesError, same_tensor


def split_tracks(chain: Chain, blocks: Sequence[Call], *, named: bool) -> list[Chain]:
    """The chain and one more for every further state that its blocks pass on and change.

    ``named``: whether the user named the blocks: states of one shape, which look like streams, are then taken one by
    one.
    Returns: Named after the parameters of the block's forward where there is more than one.
    Raises SeveralStatesError: For states of one shape that the user did not name.
    """
    pairs = _passed_on(blocks)
    if not pairs:
        return [chain]
    shapes = {blocks[0].inputs[taken].shape for _, taken in pairs}
    if not named and blocks[0].x_shape in shapes:
        pattern = re.sub(r"\d+", "{i}", blocks[0].path, count=1)
        raise SeveralStatesError(
            f"{blocks[0].path!r} and the blocks after it hand on {1 + len(pairs)} tensors of shape {blocks[0].x_shape}: these "
            "may be streams, and no stream connection was found. Each is captured as a chain of its own with "
            f"layers={pattern!r}"
        )
    first = replace(chain, name=blocks[0].inputs[0].name)
    return [first, *(_track(chain, blocks, given, taken) for given, taken in pairs)]


def _passed_on(blocks: Sequence[Call]) -> list[tuple[int, int]]:
    """Positions, in a block's outputs and in the next one's inputs, of tensors that all blocks pass on and change.

    A tensor that no block changes, such as a mask or rotary embeddings, is no state.
    """
    found = []
    # From 1: the tensors at 0 are the states of the chain itself. A run of linked calls has two blocks at least.
    # Blocks may take or give fewer tensors than others, as where the first one has nothing to add yet.
    for given in range(1, min(len(block.outputs) for block in blocks)):
        for taken in range(1, min(len(block.inputs) for block in blocks)):
            linked = all(
                same_tensor(a.passed("output", given)[0], b.passed("input", taken)[0])
                for a, b in pairwise(blocks)
            )
            changed = all(
                not same_tensor(c.passed("output", given)[0], c.passed("input", taken)[0]) for c in blocks
            )
            if linked and changed:
                found.append((given, taken))
    return found


def _track(chain: Chain, blocks: Sequence[Call], given: int, taken: int) -> Chain:
    first, *rest = [replace(point, item=taken) for point in chain.points[:-1]]
    last = replace(chain.points[-1], item=given)
    shapes = [call.inputs[taken].shape for call in blocks]
    return replace(
        chain,
        name=blocks[0].inputs[taken].name,
        # The tape knows the producer of a call's first tensor only.
        points=(replace(first, module="(input)"), *rest, last),
        shapes=(*shapes, blocks[-1].outputs[given].shape),
        final=None,  # the last norm takes the first state
    )
