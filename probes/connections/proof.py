"""Do the captured parts of a connection give the next state? It is recomputed from them, in every way they can be read.

Shapes: K sequence, T token, N stream, V view, D feature; flattened tokens are ``n`` in the sums' letters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from depthscope.probes.connections.coefficients import Parts, relative_error, spread, tolerance
from depthscope.probes.connections.family import ReconstructionError

# Heuristic: a wrong reading is wrong at nearly every token; more tokens make the proof slower, not surer.
PROOF_TOKENS = 512
# Heuristic: an orientation is decided where the other one reconstructs this many times worse. Where a matrix is symmetric both
# are right and their errors are rounding, which differs by less.
CLEAR = 10.0


@dataclass(frozen=True)
class Reading:
    """One way to read the parts.

    Parameters
    ----------
    transposed : bool
        Whether the matrix is source by destination.
    cast : bool
        Whether the model rounds the weights to the precision of the states before it applies them.
    observed : bool
        Whether the branch's output is the one that was captured; otherwise it is solved for by least squares.
    """

    transposed: bool
    cast: bool
    observed: bool


@dataclass(frozen=True)
class Proof:
    """How well one connection's parts give its next state.

    Parameters
    ----------
    error : float
        Relative Frobenius error ‖X' − (H X + post ⊗ F)‖ / ‖X'‖ over real tokens.
    other : float
        The same with the other orientation.
    reading : Reading
        The reading that gave ``error``.
    known : bool
        False where no state around the connection is finite; the errors are NaN then.
    """

    error: float
    other: float
    reading: Reading
    known: bool = True

    def ambiguous(self, limit: float) -> bool:
        """Whether both orientations fit equally well, so that this connection does not decide which one it is."""
        return self.other <= max(limit / 100, CLEAR * self.error)


@dataclass
class Joint:
    """The sampled states and parts around one connection; tensors (K, T, …), mask (K, T)."""

    path: str
    x_in: torch.Tensor
    x_out: torch.Tensor
    parts: Parts
    mask: torch.Tensor
    dtype: torch.dtype

    def tokens(self) -> Joint:
        """At most `PROOF_TOKENS` real tokens with finite states, flattened to (n, …), spread over the sample."""
        finite = self.x_in.isfinite().all(-1).all(-1) & self.x_out.isfinite().all(-1).all(-1)
        index = (self.mask & finite).flatten().nonzero().squeeze(-1)
        index = index[spread(len(index), PROOF_TOKENS)]

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.flatten(0, 1)[index]

        return replace(
            self,
            x_in=pick(self.x_in),
            x_out=pick(self.x_out),
            parts=self.parts.each(pick),
            mask=torch.ones(len(index), dtype=torch.bool),
        )


def readings(joint: Joint) -> Iterator[Reading]:
    """All ways in which the parts can be read."""
    for observed in (True, False) if joint.parts.branch_out is not None else (False,):
        for cast in (False, True) if joint.dtype in (torch.bfloat16, torch.float16) else (False,):
            for transposed in (False, True) if joint.parts.mix is not None else (False,):
                yield Reading(transposed, cast, observed)


def prove(joint: Joint) -> Proof:
    """Recompute the next state in every reading and return the best."""
    tokens = joint.tokens()
    if not len(tokens.mask):
        return Proof(math.nan, math.nan, next(readings(joint)), known=False)
    errors = {reading: reconstruction_error(tokens, reading) for reading in readings(tokens)}
    # A captured branch output leaves no freedom, so a reading with it proves more than a smaller error with a solved one.
    observed = [r for r in errors if r.observed and errors[r] <= tolerance(joint.dtype)]
    best = min(observed or errors, key=errors.__getitem__)
    twin = replace(best, transposed=not best.transposed)
    return Proof(errors[best], errors.get(twin, math.inf), best)


def reconstruction_error(joint: Joint, reading: Reading) -> float:
    """Relative error of the recomputed next state in one reading."""
    if reading.observed and joint.parts.branch_out is not None:
        again = _rounded_state(joint, joint.parts.branch_out, reading)
        return relative_error(joint.x_out.double() - again.double(), joint.x_out)
    mixed = torch.einsum("noi,nid->nod", applied_matrix(joint, reading).double(), joint.x_in.double())
    rest = joint.x_out.double() - mixed
    write = _as_applied(joint.parts.write, joint.dtype, reading.cast).double()
    return relative_error(rest - write @ solved_branch(rest, write), joint.x_out)


def _rounded_state(joint: Joint, branch: torch.Tensor, reading: Reading) -> torch.Tensor:
    """The next state, rounded where the model rounds, so that even a low precision separates the readings."""
    exact = torch.float64 if joint.dtype in (torch.float32, torch.float64) else torch.float32
    inner = joint.dtype if reading.cast else exact
    write = _as_applied(joint.parts.write, joint.dtype, reading.cast).to(inner)
    mixed = applied_matrix(joint, reading).to(inner) @ joint.x_in.to(inner)
    written = write @ branch.to(inner)
    return written + mixed if exact is torch.float64 else written.to(joint.dtype) + mixed.to(joint.dtype)


def applied_matrix(joint: Joint, reading: Reading) -> torch.Tensor:
    """H_res, destination by source, rounded as the model rounds it; the identity where nothing mixes."""
    if joint.parts.mix is None:
        n = joint.parts.write.shape[-2]
        return torch.eye(n).expand(*joint.parts.write.shape[:-1], n)
    mix = _as_applied(joint.parts.mix, joint.dtype, reading.cast)
    return mix.mT if reading.transposed else mix


def solved_branch(rest: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """The branch outputs F (…, V, D) that best explain rest = H_post F, by least squares."""
    if write.shape[-1] == 1:  # one column: the projection on it, many times cheaper than a pseudo-inverse
        weight = write.square().sum(-2, keepdim=True)
        return (write.mT @ rest) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    return torch.linalg.pinv(write.double()).to(rest.dtype) @ rest


def _as_applied(tensor: torch.Tensor, dtype: torch.dtype, cast: bool) -> torch.Tensor:
    return tensor.to(dtype).float() if cast else tensor.float()


# --- all connections of a run


@dataclass(frozen=True)
class Evidence:
    """The proofs of all connections of a run, and the orientation that they agree on."""

    proofs: tuple[Proof, ...]
    joints: tuple[Joint, ...]
    orientation: str
    transposed: bool

    @property
    def errors(self) -> list[float]:
        """Relative reconstruction error of each connection in the agreed orientation."""
        return [
            p.error if p.reading.transposed == self.transposed or j.parts.mix is None else p.other
            for p, j in zip(self.proofs, self.joints, strict=True)
        ]

    def reading(self, number: int) -> Reading:
        """How the parts of one connection are read."""
        return replace(self.proofs[number].reading, transposed=self.transposed)


def gather_evidence(joints: Sequence[Joint]) -> Evidence:
    """Prove every stream connection on the sampled sequences, and decide the orientation of the matrices.

    Raises ReconstructionError: Above tolerance, with the worst connection and what it means.
    """
    if not joints:
        return Evidence((), (), "not_applicable", False)
    proofs = tuple(prove(joint) for joint in joints)
    mixing = [proof for proof, joint in zip(proofs, joints, strict=True) if joint.parts.mix is not None]
    limit = tolerance(joints[0].dtype)
    decided = [proof for proof in mixing if proof.error <= limit and not proof.ambiguous(limit)]
    votes = {proof.reading.transposed for proof in decided}
    if len(votes) > 1:
        raise ReconstructionError(
            "some connections apply their matrix and others its transpose; one run has one orientation only"
        )
    # where none decides, both orientations reconstruct, and the more frequent one is as good
    transposed = votes.pop() if votes else 2 * sum(p.reading.transposed for p in mixing) > len(mixing)
    orientation = "not_applicable" if not mixing else "destination_source" if decided else "ambiguous"
    evidence = Evidence(proofs, tuple(joints), orientation, transposed)
    _require_proof(evidence, limit)
    return evidence


def _require_proof(evidence: Evidence, limit: float) -> None:
    errors = [
        error if proof.known else 0.0 for error, proof in zip(evidence.errors, evidence.proofs, strict=True)
    ]
    worst = int(np.argmax(errors))
    if not errors[worst] <= limit:  # NaN is refused too
        joint = evidence.joints[worst]
        dtype = str(joint.dtype).removeprefix("torch.")
        raise ReconstructionError(
            f"connection {worst} ({joint.path!r}): H_res X + H_post ⊗ F(H_pre X) misses the next state by a relative error of "
            f"{errors[worst]:.1e} (tolerance {limit:.0e} for {dtype}), in either orientation. "
            "The matrix that the module returns is not the one that the model applies, or something else is added to "
            "the streams between two connections (dropout in training mode, for one); the capture is refused"
        )
