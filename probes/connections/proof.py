"""The proof of the connections: recompute the next state from the captured parts, in every way they can be read.

Shapes: K sequence, T token, N stream, V view, D feature; flattened tokens are ``n`` in the sums' letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from depthscope.probes.connections.coefficients import Parts, as_views, relative_error, spread, tolerance
from depthscope.probes.connections.detection import ReconstructionError
from depthscope.probes.session.reservoir import Sequence, padded, token_masks
from depthscope.probes.session.session import Session

PROOF_TOKENS = 512  # tokens that a proof looks at; more make it slower, not surer
CLEAR = 10.0  # an orientation is told apart when the other one reconstructs this many times worse


@dataclass(frozen=True)
class Reading:
    """One way to read the parts: which side of the matrix is the destination, at which precision, with which branch."""

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
        Whether any token could be looked at: false where no state beside the connection is finite; the errors are NaN.
    """

    error: float
    other: float
    reading: Reading
    known: bool = True

    def ambiguous(self, limit: float) -> bool:
        """Whether both orientations fit equally well, so that this site cannot tell them apart."""
        return self.other <= max(limit / 100, CLEAR * self.error)


@dataclass
class Joint:
    """The sampled states and parts around one connection; tensors (K, T, …), mask (K, T)."""

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
    """Recompute the next state in every reading and keep the best.

    Parameters
    ----------
    joint : Joint
        States and parts around the connection.

    Returns
    -------
    Proof
    """
    tokens = joint.tokens()
    if not len(tokens.mask):
        return Proof(math.nan, math.nan, next(readings(joint)), known=False)
    errors = {reading: reconstruction_error(tokens, reading) for reading in readings(tokens)}
    limit = tolerance(joint.dtype)
    seen = [r for r in errors if r.observed and errors[r] <= limit]
    best = min(seen or errors, key=errors.__getitem__)
    twin = replace(best, transposed=not best.transposed)
    return Proof(errors[best], errors.get(twin, float("inf")), best)


def reconstruction_error(joint: Joint, reading: Reading) -> float:
    """Relative error of the recomputed next state in one reading.

    Parameters
    ----------
    joint : Joint
        Flattened tokens.
    reading : Reading
        How to read the parts.

    Returns
    -------
    float
    """
    if reading.observed and joint.parts.branch_out is not None:
        again = _rounded_state(joint, joint.parts.branch_out, reading)
        return relative_error(joint.x_out.double() - again.double(), joint.x_out)
    mixed = torch.einsum("noi,nid->nod", applied_matrix(joint, reading).double(), joint.x_in.double())
    rest = joint.x_out.double() - mixed
    write = _as_applied(joint.parts.write, joint.dtype, reading.cast).double()
    return relative_error(rest - write @ solved_branch(rest, write), joint.x_out)


def _rounded_state(joint: Joint, branch: torch.Tensor, reading: Reading) -> torch.Tensor:
    """The next state, rounded where the model rounds, so that a low precision still tells the readings apart."""
    exact = torch.float64 if joint.dtype in (torch.float32, torch.float64) else torch.float32
    inner = joint.dtype if reading.cast else exact
    write = _as_applied(joint.parts.write, joint.dtype, reading.cast).to(inner)
    mixed = applied_matrix(joint, reading).to(inner) @ joint.x_in.to(inner)
    written = write @ branch.to(inner)
    return written + mixed if exact is torch.float64 else written.to(joint.dtype) + mixed.to(joint.dtype)


def applied_matrix(joint: Joint, reading: Reading) -> torch.Tensor:
    """H_res in the canonical orientation, rounded as the model rounds it; the identity where nothing mixes."""
    if joint.parts.mix is None:
        n = joint.parts.write.shape[-2]
        return torch.eye(n).expand(*joint.parts.write.shape[:-1], n)
    mix = _as_applied(joint.parts.mix, joint.dtype, reading.cast)
    return mix.mT if reading.transposed else mix


def solved_branch(rest: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """The branch outputs F (…, V, D) that best explain rest = H_post F, by least squares."""
    if write.shape[-1] == 1:
        weight = write.square().sum(-2, keepdim=True)
        return (write.mT @ rest) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    return torch.linalg.pinv(write.double()).to(rest.dtype) @ rest


def _as_applied(tensor: torch.Tensor, dtype: torch.dtype, cast: bool) -> torch.Tensor:
    return tensor.to(dtype).float() if cast else tensor.float()


# --- all connections of a run ---


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


def gather_evidence(session: Session, sequences: list[Sequence]) -> Evidence:
    """Prove every stream connection on the kept sequences and settle the orientation.

    Parameters
    ----------
    session : Session
        With its chains found.
    sequences : list of Sequence
        The kept sequences.

    Returns
    -------
    Evidence

    Raises
    ------
    ReconstructionError
        Above tolerance, with the worst connection and what it means.
    """
    joints = tuple(_joint(session, number, sequences) for number in range(len(session.structure.connections)))
    proofs = tuple(prove(joint) for joint in joints)
    if not proofs:
        return Evidence((), (), "not_applicable", False)
    limit = tolerance(session.observer.precision)
    mixing = [proof for proof, joint in zip(proofs, joints, strict=True) if joint.parts.mix is not None]
    votes = {
        proof.reading.transposed for proof in mixing if proof.error <= limit and not proof.ambiguous(limit)
    }
    if len(votes) > 1:
        raise ReconstructionError(
            "some connections apply their matrix and others its transpose; one run holds one orientation only"
        )
    transposed = votes.pop() if len(votes) == 1 else _majority(mixing)
    told = any(proof.error <= limit and not proof.ambiguous(limit) for proof in mixing)
    orientation = "not_applicable" if not mixing else "destination_source" if told else "ambiguous"
    evidence = Evidence(proofs, joints, orientation, transposed)
    _require_proof(session, evidence, limit)
    return evidence


def _majority(proofs: list[Proof]) -> bool:
    return sum(proof.reading.transposed for proof in proofs) * 2 > len(proofs)


def _require_proof(session: Session, evidence: Evidence, limit: float) -> None:
    errors = [
        error if proof.known else 0.0 for error, proof in zip(evidence.errors, evidence.proofs, strict=True)
    ]
    worst = int(np.argmax(errors))
    if not errors[worst] <= limit:
        link, dtype = (
            session.structure.connections[worst],
            str(session.observer.precision).removeprefix("torch."),
        )
        raise ReconstructionError(
            f"connection {worst} ({link.path!r}): H_res X + H_post ⊗ F(H_pre X) misses the next state by a relative error of "
            f"{errors[worst]:.1e} (tolerance {limit:.0e} for {dtype}), in either orientation. "
            "The matrix that the module returns is not the one that the model applies, or something else is added to "
            "the streams between two connections (dropout in training mode, for one); the capture is refused"
        )


def _joint(session: Session, number: int, sequences: list[Sequence]) -> Joint:
    held = [sequence.parts[0, number] for sequence in sequences]
    link, mask = session.structure.connections[number], np.stack(token_masks(sequences, 0))
    tokens = mask.shape[1]

    def stack(pick: Callable[[Parts], torch.Tensor | None]) -> torch.Tensor | None:
        known = [tensor for parts in held if (tensor := pick(parts)) is not None]
        whole = len(known) == len(held)
        return torch.stack([padded(tensor, tokens) for tensor in known]) if whole else None

    def states(depth: int) -> torch.Tensor:
        return torch.stack([padded(s.states[0, depth], tokens) for s in sequences])

    write, branch_in = stack(lambda parts: parts.write), stack(lambda parts: parts.branch_in)
    assert write is not None
    assert branch_in is not None
    branch_out = stack(lambda parts: parts.branch_out)
    if branch_out is None:
        branch_out = _seen_branches(number, sequences, tokens, write.shape[-1], branch_in.shape[-1])
    return Joint(
        x_in=states(link.depth_in),
        x_out=states(link.depth_out),
        parts=Parts(stack(lambda p: p.mix), stack(lambda p: p.read), write, branch_in, branch_out),
        mask=torch.from_numpy(mask),
        dtype=session.observer.precision,
    )


def _seen_branches(
    number: int, sequences: list[Sequence], tokens: int, views: int, width: int
) -> torch.Tensor | None:
    """What a hook on the branch saw, (K, T, V, D), where it has that many numbers."""
    held = [sequence.branches.get((0, number)) for sequence in sequences]
    shaped = [
        None if t is None else as_views(t.unsqueeze(0), 1, t.numel() // (views * width), views, width)
        for t in held
    ]
    known = [t[0] for t in shaped if t is not None]
    return torch.stack([padded(t, tokens) for t in known]) if len(known) == len(held) else None
