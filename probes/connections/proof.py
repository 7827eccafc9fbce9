"""Do the stored parts of a connection give the next state? It is recomputed from them, on the sampled tokens alone.

H_res is the matrix that a replay of the recorded operations gave: destination by source, as it is applied.
Shapes: K sequence, T token, N stream, V view, D feature; flattened tokens are ``n`` in the sums' letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
    """The weights of one connection over depth: h_v = Σ_j read_vj v_j, X_{k+1} = Σ_j carry_j v_j + scale · F_k."""

    # (B, T, V, K + 1): of the embedding and of every branch's output in each input of the branch.
    read: torch.Tensor
    # (B, T, K + 1): of the embedding and of every branch's output in the next state, its own output left out.
    carry: torch.Tensor
    scale: torch.Tensor  # (B, T): of its own output in the next state
    branch_out: torch.Tensor  # F_k, (B, T, D)


@dataclass
class Parts(Weights):
    """The weights of one connection call, and what its branch took and returned."""

    mix: torch.Tensor | None  # (B, T, N, N), destination by source; None where nothing mixes
    read: torch.Tensor | None  # H_pre, (B, T, V, N); None where no scalar read weights exist, or are known
    write: torch.Tensor  # H_post, (B, T, N, V)
    branch_in: torch.Tensor  # (B, T, V, D)
    branch_out: torch.Tensor  # (B, T, V, D)
    constant: torch.Tensor | None = None  # (B, T, N, D): what else is added, not computed from the streams

    @property
    def matrix(self) -> torch.Tensor:
        """H_res, destination by source; the identity where nothing mixes."""
        if self.mix is not None:
            return self.mix.float()
        n = self.write.shape[-2]
        return torch.eye(n).expand(*self.write.shape[:-1], n)

    @property
    def coefficients(self) -> dict[str, torch.Tensor]:
        """H_res (…, n, n), and H_pre and H_post (…, n) where the branch has one view of scalar weights."""
        one_view = {"H_pre": self.read, "H_post": self.write}
        vectors = {name: w.flatten(-2) for name, w in one_view.items() if w is not None and 1 in w.shape[-2:]}
        return {"H_res": self.matrix, **vectors}


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
class Origin:
    """From what the coefficients of one connection were computed; all empty where that is not known."""

    # The largest gradients of the matrix's logits and of the write weights, where every entry of the matrix is 1/n.
    gradients: tuple[float, float] | None = None
    # Whether autograd knows the write weights, and not the matrix, though parameters lie behind it.
    is_cut: bool = False
    # By weights (H_res, H_pre, H_post): other connections from whose states they were computed; −1 for the model's input.
    other_states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # The share of the gradient of one token's coefficients that falls on other tokens' states.
    other_tokens: float = 0.0
    later: bool = False  # whether some of these tokens come later in the sequence
    # A matrix (K, T, n, n) that was computed from parameters for this connection, and that no output depends on.
    unused: torch.Tensor | None = None
    # By weights: the factor c where they are c · σ(·).
    sigmoids: Mapping[str, float] = field(default_factory=dict)
    # Whether the matrix is applied as the transpose of what was computed first; None where that is symmetric.
    turned: bool | None = None
    # Whether reads and mixing of one matrix are applied along the same axis; None where no matrix has both.
    reads_along: bool | None = None

    def at(self, positions: Sequence[int]) -> Origin:
        """That of some of the sequences."""
        tensors = {
            of.name: t[positions]
            for of in fields(self)
            if isinstance(t := getattr(self, of.name), torch.Tensor)
        }
        return replace(self, **tensors)


@dataclass
class Joint:
    """The sampled states and parts around one connection, (K, T, …); its mask (K, T) is true on tokens that are no padding."""

    path: str  # of the module that it belongs to
    x_in: torch.Tensor
    x_out: torch.Tensor
    parts: Parts
    mask: torch.Tensor
    dtype: torch.dtype
    # In which else the memory is carried, or what branches give is scaled
    casts: tuple[torch.dtype, ...] = ()
    # Relative Frobenius error ‖X' − (H X + post ⊗ F)‖ / ‖X'‖ over real tokens; NaN where no state around it is finite
    error: float = math.nan
    other_error: float = math.nan  # the same with the transposed matrix
    origin: Origin = Origin()  # from what the weights were computed, where a forward was followed

    @cached_property
    def sample(self) -> Joint:
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
    def mixes(self) -> bool:
        """Whether the model computes a matrix."""
        return self.parts.mix is not None

    @cached_property
    def matrix(self) -> torch.Tensor:
        """H_res, destination by source; the identity where nothing mixes."""
        return self.parts.matrix

    @property
    def num_streams(self) -> int:
        """Number of streams n."""
        return self.matrix.shape[-1]

    def tokens(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of the tokens that are no padding, (tokens, …), in float64."""
        return weights.flatten(0, 1).double()[self.mask.flatten()]

    def sum_errors(self) -> tuple[float, float]:
        """The largest error of a row's sum (over sources) and of a column's (over destinations), against 1."""
        values = self.tokens(self.matrix)
        return float((values.sum(-1) - 1).abs().max()), float((values.sum(-2) - 1).abs().max())


def stream_spread(state: torch.Tensor) -> float:
    """‖X − mean over streams‖ / ‖X‖ of some tokens (T, N, D); 0 of states that are 0."""
    return relative_error(state - state.mean(-2, keepdim=True), state)


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
    """All stream connections of a run, proven."""

    joints: tuple[Joint, ...] = ()

    @property
    def orientation(self) -> str:
        """Of the stored matrices."""
        return "destination_source" if any(joint.mixes for joint in self.joints) else "not_applicable"

    @property
    def tolerance(self) -> float:
        """The error up to which the reconstruction counts as proof, by the coarsest type that the states and branches pass."""
        return max(tolerance(dtype) for joint in self.joints for dtype in (joint.dtype, *joint.casts))

    @property
    def errors(self) -> list[float]:
        """Relative reconstruction error of each connection."""
        return [joint.error for joint in self.joints]


def gather_evidence(joints: Sequence[Joint]) -> Evidence:
    """Prove every stream connection on the sampled sequences, at least one; ReconstructionError says which fails most."""
    evidence, errors = Evidence(tuple(joints)), [0.0] * len(joints)
    for number, joint in enumerate(joints):
        tokens = joint.sample
        if len(tokens.mask):
            errors[number] = joint.error = reconstruction_error(tokens, tokens.matrix)
            joint.other_error = reconstruction_error(tokens, tokens.matrix.mT) if joint.mixes else math.nan
    worst, limit = int(np.argmax(errors)), evidence.tolerance
    if not errors[worst] <= limit:  # NaN is refused too
        joint = joints[worst]
        dtype = str(max((joint.dtype, *joint.casts), key=tolerance)).removeprefix("torch.")
        raise ReconstructionError(
            f"connection {worst} ({joint.path!r}): H_res X + H_post ⊗ F(H_pre X) misses the next state by a relative error of "
            f"{errors[worst]:.1e} (tolerance {limit:.0e} for {dtype}): the stored states are not those that the operations "
            "of the forward took and gave, or something else is added to the streams between two connections; the capture "
            "is refused"
        )
    return evidence


# Up to which error a sum counts as 1, by the precision in which the model computes: some roundings of its last digit.
# Connections compute their weights in float32 where the states are float64.
SUM_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

NOTHING_MIXES = "identity: nothing mixes"
"""The constraint of connections that have no matrix."""


def measured_constraint(
    matrices: Sequence[torch.Tensor], precision: torch.dtype = torch.float32
) -> Constraint | None:
    """The most specific constraint that all matrices (…, n, n) satisfy, rows being destinations; None for no finite one."""
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
    """The constraint of the proven connections of a run, see `measured_constraint`; None where none has a matrix."""
    joints = evidence.joints
    if not any(joint.mixes for joint in joints):
        return None
    return measured_constraint([joint.matrix[joint.mask] for joint in joints], joints[0].dtype)


def constraint_words(evidence: Evidence, constraint: Constraint | None) -> str:
    """What a run's attribute says about its matrices; empty without stream connections."""
    if constraint is None:
        unmixed = evidence.joints and not any(joint.mixes for joint in evidence.joints)
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
    """How often some operations, in order, sum over rows and columns of n × n matrices in turn, on the longest way."""
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
