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

from depthscope.probes.connections.computation import SAME, Origin

# Heuristics: a sum of float32 numbers of n streams that was made 1 by a division is so within a few roundings.
EXACT_SUM = 1e-5
# An error of a sum that no rounding explains, in float32.
CLEAR_ERROR = 1e-3


@dataclass(frozen=True)
class Remark:
    """One thing that is odd about the connections.

    ``sure``: whether it is an error in any design; otherwise it may be meant, and is only worth knowing.
    """

    kind: str  # what it is; `diagnostics.verdicts.wiring` says which verdict reports it
    sentence: str  # in plain words, with the numbers
    value: float  # the number that it rests on; that verdict states what it is compared with
    connections: tuple[int, ...]  # where
    sure: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"connections": list(self.connections)}


@dataclass(frozen=True)
class Facts:
    """What is known of one connection, of the sampled sequences.

    ``read, write``: H_pre and H_post (K, T, n); None where there are several views, or gates per feature.
    ``spread_in, spread_out``: ‖X − mean over streams‖ / ‖X‖ of the streams before and after the connection.
    """

    name: str  # the module that it belongs to
    mix: torch.Tensor  # H_res as applied (K, T, n, n), and the identity where nothing mixes
    mixes: bool  # whether the model computes a matrix
    read: torch.Tensor | None = None
    write: torch.Tensor | None = None
    mask: torch.Tensor | None = None  # (K, T), True on tokens that are no padding
    origin: Origin | None = None  # from what the weights were computed; None where no forward was followed
    spread_in: float = 1.0
    spread_out: float = 1.0

    def tokens(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of the tokens that are no padding, (tokens, …), in float64."""
        flat = weights.flatten(0, 1).double()
        return flat if self.mask is None else flat[self.mask.flatten()]

    @property
    def num_streams(self) -> int:
        """Number of streams n."""
        return self.mix.shape[-1]

    def sum_errors(self) -> tuple[float, float]:
        """The largest error of a row's sum (over sources) and of a column's (over destinations), against 1."""
        values = self.tokens(self.mix)
        return float((values.sum(-1) - 1).abs().max()), float((values.sum(-2) - 1).abs().max())


Rule = Callable[[Sequence[Facts]], Iterator[Remark]]


def places(facts: Sequence[Facts], at: Sequence[int]) -> str:
    """Some connections in words."""
    if len(at) == len(facts):
        return f"at all {len(facts)} connections" if len(at) > 1 else f"at {facts[0].name}"
    names = ", ".join(f"{number} ({facts[number].name})" for number in at[:3])
    more = f" and {len(at) - 3} more" if len(at) > 3 else ""
    return f"at connection{'s' if len(at) > 1 else ''} {names}{more} of {len(facts)}"


def short(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}"


# Rounds of Sinkhorn that a matrix shows. A heuristic: implementations make 10 to 50; one normalisation shows less than 1
# unless the matrix is nearly the identity.
FEW_ROUNDS = 1.2
MEASURED_ROUNDS = 3  # after which the error falls by the same factor in each round, nearly; a heuristic
FAR = 0.1  # an error of a sum that no implementation of Sinkhorn leaves on logits that it can converge on; a heuristic


def one_sided(facts: Facts) -> bool:
    """Whether the sums over the destinations alone are exact, by one normalisation and not by truncation."""
    row, column = facts.sum_errors()
    return column <= EXACT_SUM and row > FAR and _rounds(facts) < FEW_ROUNDS


def _rounds(facts: Facts) -> float:
    """How many rounds of Sinkhorn that end with exact sums over the destinations the other sums show, the median over tokens.

    Close to its limit Sinkhorn divides the error by the same factor ρ in each round, which a few more rounds on the matrix
    itself measure; an error e is then what ln e / ln ρ rounds leave of an error of 1.
    """
    matrix = facts.tokens(facts.mix)
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


def remarks(facts: Sequence[Facts]) -> tuple[Remark, ...]:
    """What every rule has to say.

    ``facts``: one for each connection with streams, in order.
    """
    finite = [each for each in facts if each.mix.isfinite().all() and len(each.tokens(each.mix))]
    if not facts or len(finite) < len(facts) or facts[0].num_streams < 2:
        return ()
    return tuple(remark for rule in RULES for remark in rule(facts))


# --- the matrix that is applied is not the one that is computed


def discarded(facts: Sequence[Facts]) -> Iterator[Remark]:
    """H_res is computed and nothing uses it."""
    unused = {
        i: each.origin.unused
        for i, each in enumerate(facts)
        if each.origin and each.origin.unused is not None
    }
    if not unused:
        return
    at, n = sorted(unused), facts[0].num_streams
    apart = max(_distance(facts[i].mix, unused[i].to(facts[i].mix)) for i in at)
    identity = all(float((facts[i].mix - torch.eye(n)).abs().max()) <= SAME for i in at)
    yield Remark(
        "discarded_mixing",
        f"H_res is computed and discarded {places(facts, at)}: a {n} × {n} matrix is computed there and no output "
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


def transposed(facts: Sequence[Facts]) -> Iterator[Remark]:
    """Some connections apply the transpose of what the others apply, or only the sums of the wrong side are exact."""
    fewer = _turned_minority(facts)
    crossed = [
        i for i, each in enumerate(facts) if each.origin is not None and each.origin.reads_along is False
    ]
    if fewer:
        why = f"there the transpose of the computed matrix is applied, unlike at the other {len(facts) - len(fewer)}"
    elif crossed:
        why = "of one matrix the first column reads along the rows, and the others mix along the columns"
    else:
        yield from _late_rows(facts)
        return
    at = fewer or crossed
    difference = max(float((facts[i].mix - facts[i].mix.mT).abs().max()) for i in at)
    yield Remark(
        "transposed_mixing",
        f"H_res is transposed {places(facts, at)}: {why}; entries of the two differ by up to {short(difference)}",
        difference,
        tuple(at),
    )


def _turned_minority(facts: Sequence[Facts]) -> list[int]:
    """The connections that apply the transpose of what they compute, where most do not; or the other way round."""
    known = {
        i: each.origin.turned
        for i, each in enumerate(facts)
        if each.origin and each.origin.turned is not None
    }
    sides = [[i for i, turned in known.items() if turned is side] for side in (True, False)]
    fewer, more = sorted(sides, key=len)
    return fewer if len(fewer) < len(more) else []


def _late_rows(facts: Sequence[Facts]) -> Iterator[Remark]:
    """The truncation error of Sinkhorn is in the sums that carry the signal forward, where mHC has none."""
    if any(each.origin is not None and each.origin.reads_along for each in facts):
        return  # the package hyper-connections: its matrix has its sources first, and ends on them
    mixing = [number for number, each in enumerate(facts) if each.mixes]
    errors = {number: facts[number].sum_errors() for number in mixing}
    late = [
        i
        for i, (row, column) in errors.items()
        if column <= EXACT_SUM and row > CLEAR_ERROR and not one_sided(facts[i])
    ]
    if late and all(column <= EXACT_SUM for _, column in errors.values()):
        row, column = max(errors[i][0] for i in late), max(errors[i][1] for i in late)
        yield Remark(
            "transposed_mixing",
            f"H_res may be transposed {places(facts, late)}: its sums over the destinations are 1 within "
            f"{short(column)} and those over the sources, which carry the signal, are off by up to {short(row)}; mHC "
            "normalises the latter last (arXiv 2512.24880, Eq. 9)",
            row,
            tuple(late),
            sure=False,
        )


# --- what the matrix is


def all_ones(facts: Sequence[Facts]) -> Iterator[Remark]:
    """Every entry is 1 whatever the parameters, as after a normalisation along an axis of size one."""
    far = {i: float((each.tokens(each.mix) - 1).abs().max()) for i, each in enumerate(facts) if each.mixes}
    at = [number for number, error in far.items() if error <= EXACT_SUM]
    if not at:
        return
    n = facts[0].num_streams
    yield Remark(
        "constant_mixing",
        f"H_res is 1 in every entry {places(facts, at)}, whatever its parameters (within {short(max(far[i] for i in at))}, "
        f"at every token): as after a normalisation along an axis of size one; all {n} "
        f"streams become their sum, {n} times as large at each connection",
        float(n),
        tuple(at),
    )


def passing(facts: Sequence[Facts]) -> Iterator[Remark]:
    """The streams differ after a connection and are one again before the next."""
    at = [
        number
        for number in range(1, len(facts))
        if facts[number].spread_in <= SAME and facts[number - 1].spread_out > CLEAR_ERROR
    ]
    if at:
        before = max(facts[number - 1].spread_out for number in at)
        after = max(facts[number].spread_in for number in at)
        yield Remark(
            "passing_streams",
            f"Streams are expanded and merged inside each block and do not persist: before {places(facts, at)[3:]} all "
            f"{facts[0].num_streams} are one again (their differences fall from {short(before)} of their norm to "
            f"{short(after)}), so that one stream is handed on, as in a plain residual network",
            after,
            tuple(at),
        )


def passing_inside(streams: int, steps: int) -> tuple[Remark, ...]:
    """The same where no state between the steps has streams at all.

    ``streams``: that every step makes of its state and merges again.
    """
    sentence = (
        f"Streams are expanded and merged inside each block and do not persist: each of the {steps} steps makes {streams} "
        "streams of its state and merges them into 1 again, which is handed on, as in a plain residual network"
    )
    return (Remark("passing_streams", sentence, 0.0, ()),)


# --- what the coefficients were computed from, and whether they learn


def unlearnable(facts: Sequence[Facts]) -> Iterator[Remark]:
    """No gradient reaches the logits: the graph is cut, or the streams are alike and H_res is uniform."""
    known = {i: each.origin for i, each in enumerate(facts) if each.origin is not None}
    if cut := [i for i, origin in known.items() if origin.is_cut]:
        yield Remark(
            "unlearnable_mixing",
            f"H_res is computed from parameters and its logits get no gradient {places(facts, cut)}: the graph is cut before "
            "it is applied (detach, no_grad or .data)",
            0.0,
            tuple(cut),
        )
    measured = {i: of for i, origin in known.items() if (of := origin.gradients) is not None}
    uniform = [i for i, (logits, write) in measured.items() if logits < NO_GRADIENT * write]
    # Copies, with which streams often begin, take the gradient away in every design: one connection is no finding.
    if 2 * len(uniform) > len(measured):
        apart = max(
            float((facts[i].tokens(facts[i].mix) - 1 / facts[i].num_streams).abs().max()) for i in uniform
        )
        logits, write = (max(measured[i][side] for i in uniform) for side in (0, 1))
        yield Remark(
            "unlearnable_mixing",
            f"H_res is uniform and its logits get no gradient {places(facts, uniform)}: for a random combination of the next "
            f"state the largest gradient of a logit is {short(logits)} where that of a write weight is {short(write)}; every "
            f"entry is 1/{facts[0].num_streams} within {short(apart)}, and streams that are read, mixed and written alike "
            "stay alike",
            logits / write,
            tuple(uniform),
        )


def other_input(facts: Sequence[Facts]) -> Iterator[Remark]:
    """The coefficients are a function of something else than the streams of this token at this connection."""
    known = {number: each.origin for number, each in enumerate(facts) if each.origin is not None}
    states = {number: origin.other_states for number, origin in known.items() if origin.other_states}
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
            f"{places(facts, [*states])}: {named} of connection {number} from {words}, not from those at connection {number}",
            float(len(states)),
            tuple(states),
        )
    tokens = [number for number, origin in known.items() if origin.other_tokens > FOREIGN]
    if tokens:
        share = max(known[i].other_tokens for i in tokens)
        later = any(known[i].later for i in tokens)
        yield Remark(
            "foreign_coefficients",
            f"Coefficients of one token are computed from the streams of other tokens {places(facts, tokens)}: "
            f"{share:.0%} of their gradient is there{', also at later tokens of the sequence' if later else ''}",
            share,
            tuple(tokens),
        )


def swapped(facts: Sequence[Facts]) -> Iterator[Remark]:
    """Reads are made with the write's weights, and the other way round."""
    factors = [each.origin.sigmoids if each.origin else {} for each in facts]
    at = [i for i, of in enumerate(factors) if of.get("H_pre", 0.0) > 1.5 and 0 < of.get("H_post", 0.0) < 1.5]
    if at and len(at) == len(facts):
        read, write = factors[0]["H_pre"], factors[0]["H_post"]
        reads = [facts[i].tokens(weights) for i in at if (weights := facts[i].read) is not None]
        writes = [facts[i].tokens(weights) for i in at if (weights := facts[i].write) is not None]
        yield Remark(
            "swapped_weights",
            f"Read and write weights look exchanged {places(facts, at)}: the branch reads with {read:.2g} σ(·), up to "
            f"{short(max(float(each.max()) for each in reads))}, and its output is written with {write:.2g} σ(·), up to "
            f"{short(max(float(each.max()) for each in writes))}; mHC reads with σ and writes with 2 σ (arXiv 2512.24880, "
            "Eq. 8)",
            read,
            tuple(at),
            sure=False,
        )
    elif len(facts) > 1 and _one_hot_writes(facts):
        every = tuple(range(len(facts)))
        yield Remark(
            "swapped_weights",
            f"Read and write weights look exchanged {places(facts, every)}: the branch reads all streams with weight 1 and "
            "its output is written to one of them, to the next one at each connection; hyper-connections begin the other "
            "way round (arXiv 2409.19606, Eq. 14)",
            float(facts[0].num_streams),
            every,
            sure=False,
        )


def _one_hot_writes(facts: Sequence[Facts]) -> bool:
    for number, each in enumerate(facts):
        if each.read is None or each.write is None:
            return False
        expected = torch.eye(each.num_streams, dtype=torch.float64)[number % each.num_streams]
        read, write = each.tokens(each.read), each.tokens(each.write)
        if (read - 1).abs().max() > EXACT_SUM or (write - expected).abs().max() > EXACT_SUM:
            return False
    return True


RULES: tuple[Rule, ...] = (discarded, transposed, all_ones, passing, unlearnable, swapped, other_input)
