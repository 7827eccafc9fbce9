"""Do the stored parts of a connection give the next state? It is recomputed from them, on the sampled tokens alone.

H_res is the matrix that a replay of the recorded operations gave: destination by source, as it is applied.
Shapes: K sequence, T token, N stream, V view, D feature; flattened tokens are ``n`` in the sums' letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels.mixing import Constraint, named_constraint
from depthscope.probes.reading.graph import TracedValue, names

# By the type of the states; heuristics. float32: about a thousand roundings, for the sums of a connection. Half types:
# three, since the proof rounds where the model rounds. float64: connections compute their weights in float32 there too.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Coefficients of float32 that are the same numbers: they were copied, or extracted by a product with zeros and ones.
SAME = 3e-6


class StreamConnectionError(InputError):
    """A stream connection that cannot be read."""


class ReconstructionError(StreamConnectionError):
    """The captured parts of a connection do not give the next state."""


class Weights:
    """Tensors of one connection call, all of them (B, T, …)."""

    def at(self, index: torch.Tensor | int) -> Self:
        """Those of some sequences."""
        return self.each(lambda tensor: tensor[index])

    def sampled(self, rows: torch.Tensor) -> Self:
        """Copies of some sequences, in float32 on the CPU."""
        return self.each(lambda tensor: tensor.detach()[rows].to("cpu", torch.float32))

    def detached(self) -> Self:
        """Copies in float32 that share no memory with the model's own tensors."""
        return self.each(lambda tensor: tensor.detach().to("cpu", torch.float32, copy=True))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with one change made to every tensor."""
        tensors = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(*(None if tensor is None else change(tensor) for tensor in tensors))


@dataclass
class DepthWeights(Weights):
    """The weights of one connection over depth: h_v = Σ_j read_vj v_j, X_{k+1} = Σ_j carry_j v_j + scale · F_k.

    ``read``: (B, T, V, K + 1): of the embedding and of every branch's output in each input of the branch.
    """

    read: torch.Tensor
    # (B, T, K + 1): of the embedding and of every branch's output in the next state, its own output left out.
    carry: torch.Tensor
    scale: torch.Tensor  # (B, T): of its own output in the next state


@dataclass
class Parts(Weights):
    """The weights of one connection call, and what its branch took and returned.

    ``read``: H_pre, (B, T, V, N); None where no scalar read weights exist, or where they are unknown.
    ``constant``: (B, T, N, D): what else is added to the next state, which was not computed from the streams.
    """

    mix: torch.Tensor | None  # (B, T, N, N), destination by source; None where nothing mixes
    read: torch.Tensor | None
    write: torch.Tensor  # H_post, (B, T, N, V)
    branch_in: torch.Tensor  # (B, T, V, D)
    branch_out: torch.Tensor  # (B, T, V, D)
    constant: torch.Tensor | None = None


def per_token(tensor: torch.Tensor, tail: tuple[int, ...], batch: int, tokens: int) -> Iterator[torch.Tensor]:
    """A tensor as (B, T, *tail) in the ways that its shape allows; a constant one is expanded."""
    lead, size, shape = (batch, tokens), math.prod(tail), tuple(tensor.shape)
    if tensor.numel() == size:
        yield tensor.reshape(tail).expand(*lead, *tail)
    elif tensor.numel() == math.prod(lead) * size:
        if shape[0] in (lead[0], math.prod(lead)):
            yield tensor.reshape(*lead, *tail)
        if shape[:2] == lead[::-1]:
            yield tensor.reshape(*lead[::-1], *tail).transpose(0, 1)
        if shape == (*tail, *lead):
            yield tensor.movedim((-2, -1), (0, 1))


def spread(count: int, most: int) -> torch.Tensor:
    """At most ``most`` indices below ``count``, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).long()


def relative_error(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """‖difference‖ / ‖reference‖ in float64; the plain norm where the reference is zero."""
    scale = torch.linalg.vector_norm(reference.detach().double())
    error = torch.linalg.vector_norm(difference.detach().double())
    return float(error / scale) if scale > 0 else float(error)


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a reconstruction counts as proof, by the precision of the states."""
    return TOLERANCE.get(dtype, 1e-4)


# Heuristic: wrong parts are wrong at nearly every token; more tokens make the proof slower, not surer.
PROOF_TOKENS = 128


@dataclass(frozen=True)
class Proof:
    """How well one connection's parts give its next state."""

    error: float  # relative Frobenius error ‖X' − (H X + post ⊗ F)‖ / ‖X'‖ over real tokens
    other: float  # the same with the transposed matrix
    known: bool = True  # false where no state around the connection is finite; the errors are NaN then


@dataclass
class Joint:
    """The sampled states and parts around one connection; tensors (K, T, …), mask (K, T)."""

    path: str
    x_in: torch.Tensor
    x_out: torch.Tensor
    parts: Parts
    mask: torch.Tensor
    dtype: torch.dtype
    # In which else the memory is carried, or what branches give is scaled
    casts: tuple[torch.dtype, ...] = ()

    @cached_property
    def tokens(self) -> Joint:
        """At most `PROOF_TOKENS` real tokens with finite states, flattened to (n, …), spread over the sample."""
        real = self.mask.flatten().nonzero().squeeze(-1)
        index = self._finite(real[spread(len(real), PROOF_TOKENS)])
        if not len(index):  # one of the others may be
            index = self._finite(real)[:PROOF_TOKENS]

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.flatten(0, 1)[index]

        return replace(
            self,
            x_in=pick(self.x_in),
            x_out=pick(self.x_out),
            parts=self.parts.each(pick),
            mask=torch.ones(len(index), dtype=torch.bool),
        )

    def _finite(self, index: torch.Tensor) -> torch.Tensor:
        """Those of some tokens, numbered through the sample, whose states around the connection are finite."""
        states = (state.flatten(0, 1)[index] for state in (self.x_in, self.x_out))
        return index[torch.stack([state.isfinite().flatten(1).all(1) for state in states]).all(0)]

    @property
    def matrix(self) -> torch.Tensor:
        """H_res, destination by source; the identity where nothing mixes."""
        if self.parts.mix is not None:
            return self.parts.mix.float()
        n = self.parts.write.shape[-2]
        return torch.eye(n).expand(*self.parts.write.shape[:-1], n)


def prove(joint: Joint) -> Proof:
    """Recompute the next state, with the matrix and with its transpose."""
    tokens = joint.tokens
    if not len(tokens.mask):
        return Proof(math.nan, math.nan, known=False)
    error = reconstruction_error(tokens, tokens.matrix)
    mixes = joint.parts.mix is not None
    return Proof(error, reconstruction_error(tokens, tokens.matrix.mT) if mixes else math.inf)


def reconstruction_error(joint: Joint, matrix: torch.Tensor) -> float:
    """Relative error of the next state that a matrix and the other parts give, rounded where the model may round."""
    exact = torch.float64 if joint.dtype in (torch.float32, torch.float64) else torch.float32
    errors = []
    for inner in {exact, joint.dtype}:  # models multiply in the precision of the states, or in float32
        written = joint.parts.write.to(inner) @ joint.parts.branch_out.to(inner)
        mixed = matrix.to(inner) @ joint.x_in.to(inner)
        if exact is torch.float32:
            written, mixed = written.to(joint.dtype), mixed.to(joint.dtype)
        errors.append(relative_error(joint.x_out.double() - (written + mixed).double(), joint.x_out))
    return min(errors)


@dataclass(frozen=True)
class Evidence:
    """The proofs of all connections of a run."""

    proofs: tuple[Proof, ...] = ()
    joints: tuple[Joint, ...] = ()

    @property
    def orientation(self) -> str:
        """Of the stored matrices."""
        mixes = any(joint.parts.mix is not None for joint in self.joints)
        return "destination_source" if mixes else "not_applicable"

    @property
    def tolerance(self) -> float:
        """The error up to which the reconstruction counts as proof, by the coarsest type that the states and branches pass."""
        return max(tolerance(dtype) for joint in self.joints for dtype in (joint.dtype, *joint.casts))

    @property
    def errors(self) -> list[float]:
        """Relative reconstruction error of each connection."""
        return [proof.error for proof in self.proofs]


def gather_evidence(joints: Sequence[Joint]) -> Evidence:
    """Prove every stream connection on the sampled sequences; there is one at least.

    Raises ReconstructionError: Above tolerance, with the worst connection and what it means.
    """
    evidence = Evidence(tuple(prove(joint) for joint in joints), tuple(joints))
    _require_proof(evidence, evidence.tolerance)
    return evidence


def _require_proof(evidence: Evidence, limit: float) -> None:
    errors = [proof.error if proof.known else 0.0 for proof in evidence.proofs]
    worst = int(np.argmax(errors))
    if not errors[worst] <= limit:  # NaN is refused too
        joint = evidence.joints[worst]
        coarsest = max((joint.dtype, *joint.casts), key=tolerance)
        dtype = str(coarsest).removeprefix("torch.")
        raise ReconstructionError(
            f"connection {worst} ({joint.path!r}): H_res X + H_post ⊗ F(H_pre X) misses the next state by a relative error of "
            f"{errors[worst]:.1e} (tolerance {limit:.0e} for {dtype}): the stored states are not those that the operations "
            "of the forward took and gave, or something else is added to the streams between two connections; the capture "
            "is refused"
        )


# Up to which error a sum counts as 1, by the precision in which the model computes: some roundings of its last digit.
# Connections compute their weights in float32 where the states are float64.
SUM_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

NOTHING_MIXES = "identity: nothing mixes"
"""The constraint of connections that have no matrix."""


def measured_constraint(
    matrices: Sequence[torch.Tensor], precision: torch.dtype = torch.float32
) -> Constraint | None:
    """The most specific constraint that all matrices of a model satisfy.

    ``matrices``: one item a connection: (…, n, n), rows are destinations, of real tokens only, as the module computed
    them.
    Returns: None where there are no matrices, none that is finite, or a single stream.
    """
    flat = [
        matrix.detach().flatten(0, -3) if matrix.ndim > 2 else matrix.detach()[None] for matrix in matrices
    ]
    if not flat or flat[0].shape[-1] < 2:
        return None
    together = torch.cat([matrix.to("cpu", torch.float64) for matrix in flat])
    finite = together[together.isfinite().all(-1).all(-1)]
    if not len(finite):
        return None
    return named_constraint(
        finite.numpy(), tolerance=SUM_TOLERANCE.get(precision, SUM_TOLERANCE[torch.float32])
    )


def constraint_of(evidence: Evidence) -> Constraint | None:
    """The constraint of the proven connections of a run; see `measured_constraint`.

    Returns: None where no connection has a matrix.
    """
    joints = evidence.joints
    if all(joint.parts.mix is None for joint in joints):
        return None
    return measured_constraint([joint.matrix[joint.mask] for joint in joints], joints[0].dtype)


def constraint_words(evidence: Evidence, constraint: Constraint | None) -> str:
    """What a run's attribute says about its matrices; empty without stream connections."""
    if constraint is None:
        unmixed = evidence.joints and all(joint.parts.mix is None for joint in evidence.joints)
        return NOTHING_MIXES if unmixed else ""
    return constraint.words


def measured_family(detected: str, constraint: Constraint | None) -> str:
    """The family's name by how its matrices are made or by what they satisfy, not by what its code is called.

    ``detected``: ``"hc"`` for connections whose operations do not show how their matrices are constrained; other names stay.
    Returns: ``"mhc"`` where all matrices are doubly stochastic at weights that are not trivial, ``"hc"`` where they are
    not, and ``"streams"`` where they are those of an initialisation, at which every family is the same.
    """
    if detected != "hc" or constraint is None:
        return detected
    if constraint.trivial:
        return "streams"
    return "mhc" if constraint.name == "doubly stochastic" else "hc"


NORMALISING = names("sum mean logsumexp _softmax _log_softmax")
LEAST_IN_TURN = 4  # two rounds: a softmax along each axis once is no iteration


def times_in_turn(values: Iterable[TracedValue], num_streams: int) -> int:
    """How often rows and columns of n × n matrices are summed over in turn, on the longest way through some operations.

    ``values``: in the order in which they were made.
    """
    found: dict[int, tuple[int, int]] = {}  # by value: how often, and along which axis last
    for value in values:
        times, last = max((found.get(parent.number, (0, 0)) for parent in value.parents), default=(0, 0))
        axis = _axis(value, num_streams)
        found[value.number] = (times, last) if axis in (0, last) else (times + 1, axis)
    return max((times for times, _ in found.values()), default=0)


def _axis(value: TracedValue, num_streams: int) -> int:
    """Along which of the two axes of a matrix a value is summed over: -1 or -2; 0 where it is not."""
    if value.name not in NORMALISING or len(value.args) < 2 or not value.parents:
        return 0
    shape, dims = value.parents[0].shape, value.args[1]
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if shape[-2:] != (num_streams, num_streams) or len(dims) != 1:
        return 0
    axis = dims[0] - len(shape) if dims[0] >= 0 else dims[0]
    return axis if axis in (-1, -2) else 0
