"""Which matrix does a connection apply, where it is not the one that it computes? The identity, a rounding, a transpose.

Where the computed matrices do not give the next states, other readings are tried, and one is taken only if it is proven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from depthscope.probes.connections.coefficients import tolerance
from depthscope.probes.connections.computation import CASTS
from depthscope.probes.connections.proof import Joint, Proof, prove


@dataclass(frozen=True)
class Replacement:
    """How a connection had to be read.

    Parameters
    ----------
    how : str
        "identity", "transposed", or the name of the type to which the matrix is cast.
    computed : Tensor
        The matrix that the module computes, in its own orientation (K, T, n, n).
    """

    how: str
    computed: torch.Tensor


def as_applied(joints: Sequence[Joint]) -> tuple[list[Joint], dict[int, Replacement]]:
    """The connections with the matrices that they apply, where those that they compute do not give the next state.

    Returns: Those that no reading proves as they came.
    """
    limit = tolerance(joints[0].dtype)
    found, replaced = list(joints), dict[int, Replacement]()
    proofs = [prove(joint) for joint in joints]
    for number, (joint, proof) in enumerate(zip(joints, proofs, strict=True)):
        if joint.parts.mix is None or not proof.known or proof.error <= limit:
            continue
        for how, change in _readings(joint):
            other = replace(joint, parts=replace(joint.parts, mix=change(joint.parts.mix)))
            again = prove(other)
            # Below a hundredth of the tolerance, or of the error: what is rounded elsewhere too is not proven to be this.
            if again.error <= min(limit, proof.error / 10):
                found[number], proofs[number] = other, again
                replaced[number] = Replacement(how, joint.parts.mix)
                break
    _turn_minority(found, proofs, replaced, limit)
    return found, replaced


Change = Callable[[torch.Tensor], torch.Tensor | None]


def _readings(joint: Joint) -> list[tuple[str, Change]]:
    def rounded(dtype: torch.dtype) -> Change:
        return lambda mix: mix.to(dtype).float()

    casts = [(str(dtype).removeprefix("torch."), rounded(dtype)) for dtype in CASTS if dtype != joint.dtype]
    return [("identity", lambda mix: None), *casts]


def _turn_minority(
    joints: list[Joint], proofs: Sequence[Proof], replaced: dict[int, Replacement], limit: float
) -> None:
    """Transpose the matrices of those connections that apply them the other way round than most do."""
    decided = [
        number
        for number, (proof, joint) in enumerate(zip(proofs, joints, strict=True))
        if joint.parts.mix is not None and proof.error <= limit and not proof.ambiguous(limit)
    ]
    turned = [number for number in decided if proofs[number].reading.transposed]
    fewer = min(turned, [number for number in decided if number not in turned], key=len)
    for number in fewer:
        joint = joints[number]
        assert joint.parts.mix is not None
        replaced[number] = Replacement("transposed", joint.parts.mix)
        joints[number] = replace(joint, parts=replace(joint.parts, mix=joint.parts.mix.mT))
