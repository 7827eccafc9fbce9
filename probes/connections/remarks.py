"""What is odd about the connections of a model? One sentence each, with the numbers, from the weights that it applies.

Each rule says one thing that is decidable, and nothing where it is not. H_res is destination by source throughout.
Shapes: K sequence, T token, n stream, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from depthscope.probes.connections.proof import SAME, Joint, stream_spread

# Heuristics: a sum of float32 numbers of n streams that was made 1 by a division is so within a few roundings.
EXACT_SUM = 1e-5
# An error of a sum that no rounding explains, in float32.
CLEAR_ERROR = 1e-3


@dataclass(frozen=True)
class Remark:
    """One thing that is odd about the connections."""

    kind: str  # what it is; `diagnostics.verdicts.wiring` says which verdict reports it
    sentence: str  # in plain words, with the numbers
    value: float  # the number that it rests on; that verdict states what it is compared with
    connections: tuple[int, ...]  # where
    # Whether it is an error in any design; otherwise it may be meant, and is only worth knowing
    sure: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"connections": list(self.connections)}


Rule = Callable[[Sequence[Joint]], Iterator[Remark]]


def places(joints: Sequence[Joint], at: Sequence[int]) -> str:
    """Some connections in words."""
    if len(at) == len(joints):
        return f"at all {len(joints)} connections" if len(at) > 1 else f"at {joints[0].path}"
    names = ", ".join(f"{number} ({joints[number].path})" for number in at[:3])
    more = f" and {len(at) - 3} more" if len(at) > 3 else ""
    return f"at connection{'s' if len(at) > 1 else ''} {names}{more} of {len(joints)}"


def short(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}"


# Rounds of Sinkhorn that a matrix shows. A heuristic: implementations make 10 to 50; one normalisation shows less than 1
# unless the matrix is nearly the identity.
FEW_ROUNDS = 1.2
MEASURED_ROUNDS = 3  # after which the error falls by the same factor in each round, nearly; a heuristic
FAR = 0.1  # an error of a sum that no implementation of Sinkhorn leaves on logits that it can converge on; a heuristic


def _rounds(joint: Joint) -> float:
    """How many rounds of Sinkhorn that end with exact sums over the destinations the other sums show, the median over tokens.

    Close to its limit Sinkhorn divides the error by the same factor ρ in each round, which a few more rounds on the matrix
    itself measure; an error e is then what ln e / ln ρ rounds leave of an error of 1.
    """
    matrix = joint.tokens(joint.matrix)
    if not (matrix >= 0).all() or not (matrix.sum(-1) > 0).all() or not (matrix.sum(-2) > 0).all():
        return 0.0
    error = (matrix.sum(-1) - 1).abs().amax(-1)
    for _ in range(MEASURED_ROUNDS):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    left = (matrix.sum(-1) - 1).abs().amax(-1)
    factor = ((left / error.clamp_min(1e-300)) ** (1 / MEASURED_ROUNDS)).clamp(1e-12, 1 - 1e-9)
    known = error > EXACT_SUM
    if not known.any():
        return math.inf
    return float((error[known].clamp_max(1 - 1e-9).log() / factor[known].log()).median())


NO_GRADIENT = 1e-6  # relative to that of the write weights of the same connection: a few roundings of float32
FOREIGN = 1e-3  # of a gradient, at other tokens; a heuristic


def remarks(joints: Sequence[Joint]) -> tuple[Remark, ...]:
    """What every rule has to say of the connections with streams, in order."""
    finite = [each for each in joints if each.matrix.isfinite().all() and len(each.tokens(each.matrix))]
    if not joints or len(finite) < len(joints) or joints[0].num_streams < 2:
        return ()
    return tuple(remark for rule in RULES for remark in rule(joints))


# --- the matrix that is applied is not the one that is computed


def discarded(joints: Sequence[Joint]) -> Iterator[Remark]:
    """H_res is computed and nothing uses it."""
    unused = {i: of for i, each in enumerate(joints) if (of := each.origin.unused) is not None}
    if not unused:
        return
    at, n = sorted(unused), joints[0].num_streams
    apart = max(_distance(joints[i].matrix, unused[i].to(joints[i].matrix)) for i in at)
    identity = all(float((joints[i].matrix - torch.eye(n)).abs().max()) <= SAME for i in at)
    yield Remark(
        "discarded_mixing",
        f"H_res is computed and discarded {places(joints, at)}: a {n} × {n} matrix is computed there and no output "
        f"depends on it; what is applied is {'the identity' if identity else 'another matrix'}, from which its entries "
        f"differ by up to {short(apart)}",
        apart,
        tuple(at),
    )


def _distance(applied: torch.Tensor, computed: torch.Tensor) -> float:
    """How far matrices are apart, token by token; of their means where one was computed for a part of the batches."""
    if len(applied) != len(computed):
        applied, computed = (of.flatten(0, -3).mean(0) for of in (applied, computed))
    return float((applied - computed).abs().max())


def transposed(joints: Sequence[Joint]) -> Iterator[Remark]:
    """Some connections apply the transpose of what the others apply, or only the sums of the wrong side are exact."""
    known = {i: of for i, each in enumerate(joints) if (of := each.origin.turned) is not None}
    sides = [[i for i, turned in known.items() if turned is side] for side in (True, False)]
    fewer = min(sides, key=len) if len(sides[0]) != len(sides[1]) else []  # unlike most
    crossed = [i for i, each in enumerate(joints) if each.origin.reads_along is False]
    if fewer:
        why = f"there the transpose of the computed matrix is applied, unlike at the other {len(joints) - len(fewer)}"
    elif crossed:
        why = "of one matrix the first column reads along the rows, and the others mix along the columns"
    else:
        yield from _late_rows(joints)
        return
    at = fewer or crossed
    difference = max(float((joints[i].matrix - joints[i].matrix.mT).abs().max()) for i in at)
    yield Remark(
        "transposed_mixing",
        f"H_res is transposed {places(joints, at)}: {why}; entries of the two differ by up to {short(difference)}",
        difference,
        tuple(at),
    )


def _late_rows(joints: Sequence[Joint]) -> Iterator[Remark]:
    """The truncation error of Sinkhorn is in the sums that carry the signal forward, where mHC has none."""
    if any(each.origin.reads_along for each in joints):
        return  # the package hyper-connections: its matrix has its sources first, and ends on them
    mixing = [number for number, each in enumerate(joints) if each.mixes]
    errors = {number: joints[number].sum_errors() for number in mixing}
    late = [
        i
        for i, (row, column) in errors.items()
        if column <= EXACT_SUM
        and row > CLEAR_ERROR
        # By truncation, and not by one normalisation over the destinations
        and not (row > FAR and _rounds(joints[i]) < FEW_ROUNDS)
    ]
    if late and all(column <= EXACT_SUM for _, column in errors.values()):
        row, column = max(errors[i][0] for i in late), max(errors[i][1] for i in late)
        yield Remark(
            "transposed_mixing",
            f"H_res may be transposed {places(joints, late)}: its sums over the destinations are 1 within "
            f"{short(column)} and those over the sources, which carry the signal, are off by up to {short(row)}; mHC "
            "normalises the latter last (arXiv 2512.24880, Eq. 9)",
            row,
            tuple(late),
            sure=False,
        )


# --- what the matrix is


def all_ones(joints: Sequence[Joint]) -> Iterator[Remark]:
    """Every entry is 1 whatever the parameters, as after a normalisation along an axis of size one."""
    far = {
        i: float((each.tokens(each.matrix) - 1).abs().max()) for i, each in enumerate(joints) if each.mixes
    }
    at = [number for number, error in far.items() if error <= EXACT_SUM]
    if not at:
        return
    n = joints[0].num_streams
    yield Remark(
        "constant_mixing",
        f"H_res is 1 in every entry {places(joints, at)}, whatever its parameters (within {short(max(far[i] for i in at))}, "
        f"at every token): as after a normalisation along an axis of size one; all {n} "
        f"streams become their sum, {n} times as large at each connection",
        float(n),
        tuple(at),
    )


def passing(joints: Sequence[Joint]) -> Iterator[Remark]:
    """The streams differ after a connection and are one again before the next."""
    spreads = [(stream_spread(each.sample.x_in), stream_spread(each.sample.x_out)) for each in joints]
    at = [
        number
        for number in range(1, len(joints))
        if spreads[number][0] <= SAME and spreads[number - 1][1] > CLEAR_ERROR
    ]
    if at:
        before = max(spreads[number - 1][1] for number in at)
        after = max(spreads[number][0] for number in at)
        yield Remark(
            "passing_streams",
            f"Streams are expanded and merged inside each block and do not persist: before {places(joints, at)[3:]} all "
            f"{joints[0].num_streams} are one again (their differences fall from {short(before)} of their norm to "
            f"{short(after)}), so that one stream is handed on, as in a plain residual network",
            after,
            tuple(at),
        )


def passing_inside(streams: int, steps: int) -> tuple[Remark, ...]:
    """The same where every step makes streams of its state and merges them again, so that no state between has any."""
    sentence = (
        f"Streams are expanded and merged inside each block and do not persist: each of the {steps} steps makes {streams} "
        "streams of its state and merges them into 1 again, which is handed on, as in a plain residual network"
    )
    return (Remark("passing_streams", sentence, 0.0, ()),)


# --- what the coefficients were computed from, and whether they learn


def unlearnable(joints: Sequence[Joint]) -> Iterator[Remark]:
    """No gradient reaches the logits: the graph is cut, or the streams are alike and H_res is uniform."""
    if cut := [i for i, each in enumerate(joints) if each.origin.is_cut]:
        yield Remark(
            "unlearnable_mixing",
            f"H_res is computed from parameters and its logits get no gradient {places(joints, cut)}: the graph is cut before "
            "it is applied (detach, no_grad or .data)",
            0.0,
            tuple(cut),
        )
    measured = {i: of for i, each in enumerate(joints) if (of := each.origin.gradients) is not None}
    uniform = [i for i, (logits, write) in measured.items() if logits < NO_GRADIENT * write]
    # Copies, with which streams often begin, take the gradient away in every design: one connection is no finding.
    if 2 * len(uniform) > len(measured):
        apart = max(
            float((joints[i].tokens(joints[i].matrix) - 1 / joints[i].num_streams).abs().max())
            for i in uniform
        )
        logits, write = (max(measured[i][side] for i in uniform) for side in (0, 1))
        yield Remark(
            "unlearnable_mixing",
            f"H_res is uniform and its logits get no gradient {places(joints, uniform)}: for a random combination of the next "
            f"state the largest gradient of a logit is {short(logits)} where that of a write weight is {short(write)}; every "
            f"entry is 1/{joints[0].num_streams} within {short(apart)}, and streams that are read, mixed and written alike "
            "stay alike",
            logits / write,
            tuple(uniform),
        )


def other_input(joints: Sequence[Joint]) -> Iterator[Remark]:
    """The coefficients are a function of something else than the streams of this token at this connection."""
    states = {number: of for number, each in enumerate(joints) if (of := each.origin.other_states)}
    # DeepSeek-V4.1's reads are made by the sublayer before: a lag of one at every connection, of H_pre alone.
    if all(set(of) == {"H_pre"} and of["H_pre"] == (number - 1,) for number, of in states.items()):
        states = {}
    if states:
        number, weights = next(iter(states.items()))
        named = " and ".join(weights)
        sources = sorted({at for of in weights.values() for at in of})
        words = " and ".join(
            "the model's input" if at < 0 else f"the streams at connection {at}" for at in sources
        )
        yield Remark(
            "foreign_coefficients",
            "Coefficients are computed from another input than the streams that they are applied to "
            f"{places(joints, [*states])}: {named} of connection {number} from {words}, not from those at connection {number}",
            float(len(states)),
            tuple(states),
        )
    tokens = [number for number, each in enumerate(joints) if each.origin.other_tokens > FOREIGN]
    if tokens:
        share = max(joints[i].origin.other_tokens for i in tokens)
        later = any(joints[i].origin.later for i in tokens)
        yield Remark(
            "foreign_coefficients",
            f"Coefficients of one token are computed from the streams of other tokens {places(joints, tokens)}: "
            f"{share:.0%} of their gradient is there{', also at later tokens of the sequence' if later else ''}",
            share,
            tuple(tokens),
        )


def swapped(joints: Sequence[Joint]) -> Iterator[Remark]:
    """Reads are made with the write's weights, and the other way round."""
    factors = [each.origin.sigmoids for each in joints]
    at = [i for i, of in enumerate(factors) if of.get("H_pre", 0.0) > 1.5 and 0 < of.get("H_post", 0.0) < 1.5]
    if at and len(at) == len(joints):
        read, write = factors[0]["H_pre"], factors[0]["H_post"]
        largest = {
            name: max(float(joints[i].tokens(joints[i].parts.coefficients[name]).max()) for i in at)
            for name in ("H_pre", "H_post")
        }
        yield Remark(
            "swapped_weights",
            f"Read and write weights look exchanged {places(joints, at)}: the branch reads with {read:.2g} σ(·), up to "
            f"{short(largest['H_pre'])}, and its output is written with {write:.2g} σ(·), up to "
            f"{short(largest['H_post'])}; mHC reads with σ and writes with 2 σ (arXiv 2512.24880, "
            "Eq. 8)",
            read,
            tuple(at),
            sure=False,
        )
    elif len(joints) > 1 and _one_hot_writes(joints):
        every = tuple(range(len(joints)))
        yield Remark(
            "swapped_weights",
            f"Read and write weights look exchanged {places(joints, every)}: the branch reads all streams with weight 1 and "
            "its output is written to one of them, to the next one at each connection; hyper-connections begin the other "
            "way round (arXiv 2409.19606, Eq. 14)",
            float(joints[0].num_streams),
            every,
            sure=False,
        )


def _one_hot_writes(joints: Sequence[Joint]) -> bool:
    for number, each in enumerate(joints):
        weights = each.parts.coefficients
        if not {"H_pre", "H_post"} <= weights.keys():
            return False
        expected = torch.eye(each.num_streams, dtype=torch.float64)[number % each.num_streams]
        read, write = each.tokens(weights["H_pre"]), each.tokens(weights["H_post"])
        if (read - 1).abs().max() > EXACT_SUM or (write - expected).abs().max() > EXACT_SUM:
            return False
    return True


RULES: tuple[Rule, ...] = (discarded, transposed, all_ones, passing, unlearnable, swapped, other_input)
