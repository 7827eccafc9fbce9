"""Are the connections wired as they claim? Verdicts on what the capture noticed in the code and weights of the connections.

Each reports one kind of the run's attribute ``remarks``, which the capture writes with its sentence and number. Limits without
a source are heuristics of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import xarray as xr

from depthscope.diagnostics.verdicts.declaration import DEFAULT, Limits, Profile, Verdict
from depthscope.diagnostics.verdicts.rule import Kind

# --- what the matrices claim to be: the constraints that they satisfy, or are meant to ---

DOUBLY = ("doubly stochastic",)
# What a constraint begins with where the matrices are doubly stochastic, or meant to be by what they satisfy: non-negative
# with one exact sum, as a Sinkhorn that was stopped early or that normalises one axis only leaves them.
ONE_EXACT_SUM = (*DOUBLY, "row-stochastic only", "column-stochastic only")
BOTH_SUMS = (*DOUBLY, "rows and columns sum to 1")
ONE_SUM = ("rows sum to 1", "columns sum to 1")


def satisfies(attrs: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether the matrices were measured to satisfy one of some constraints, or are of the family that does."""
    return attrs.get("family") == "mhc" or str(attrs.get("constraint", "")).startswith(names)


LONGEST = 1000  # characters of a sentence; those of the capture have about 300

# An entry of a matrix, of size about 1, that differs by more than the rounding of float32.
ROUNDING = 1e-6


def is_text(found: Any) -> TypeGuard[str]:
    """Whether what a file has in the place of a sentence can be one."""
    return isinstance(found, str) and found.isprintable() and len(found) <= LONGEST


def told(attrs: Mapping[str, Any], kind: str, source: str = DEFAULT) -> Iterator[Profile]:
    """The remarks of one kind, as profiles of a verdict; a file may have anything in their place."""
    remarks = attrs.get("remarks")
    for remark in remarks if isinstance(remarks, (list, tuple)) else ():
        if not isinstance(remark, Mapping) or remark.get("kind") != kind:
            continue
        sentence, value = remark.get("sentence"), remark.get("value")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if is_text(sentence) and number:
            yield Profile(
                xr.DataArray(float(value)),  # type: ignore[arg-type]
                "",
                sentence=f"{sentence} ({source}).",
                note_only=remark.get("sure") is not True,
            )


def remark(
    name: str, title: str, advice: str, *, metric: str, judges: str, limits: Limits, **more: Any
) -> Verdict:
    """The verdict on one kind of remark."""
    return Verdict(
        name,
        title,
        advice,
        Kind.FACT,
        metric,
        judges,
        limits,
        ("attrs",),
        lambda attrs: told(attrs, name),
        **more,
    )


discarded_mixing = remark(
    "discarded_mixing",
    "A mixing matrix is computed and discarded.",
    "Nothing that the network returns depends on it, and its parameters get no gradient: multiply the "
    "streams by it, or take it out.",
    metric="identity_distance",
    judges="distance of the computed matrix from the one that is applied",
    formula="‖H − H applied‖",
    limits=Limits(warn=ROUNDING),
)
transposed_mixing = remark(
    "transposed_mixing",
    "A mixing matrix is applied transposed.",
    "Forward and backward are exchanged: the sums that are exact should be those over the sources. "
    "Between two doubly stochastic designs that are trained from scratch it makes little difference; with "
    "weights of the other one it does.",
    metric="doubly_stochastic_violation",
    judges="error of the sums over the sources, which should be exact",
    formula="max_i |Σ_j H_ij − 1|",
    limits=Limits(warn=ROUNDING),
)
# Every connection multiplies the sum of the streams by n, which is at least 2: no other value comes here.
constant_mixing = remark(
    "constant_mixing",
    "Every entry of the mixing matrices is 1, whatever their parameters.",
    "Look at the axes of Sinkhorn's sums: along an axis of size one every number is divided by itself. "
    "The streams are equal from the first connection on, and grow by their number at each.",
    metric="mixing_gain",
    judges="factor by which each connection multiplies the sum of the streams",
    formula="n",
    range="1 or more",
    limits=Limits(fail=1.0),
)
# The largest gradient of a logit against that of a write weight, for a random combination of the outputs: a few
# roundings.
unlearnable_mixing = remark(
    "unlearnable_mixing",
    "The mixing matrices get no gradient.",
    "Where the graph is cut, take the detach away. Where all streams are alike, break the symmetry: a "
    "bias on the diagonal of the logits, and reads or writes that differ from stream to stream.",
    metric="mixing_gain",
    judges="largest gradient of a logit of the mixing over that of a write weight",
    formula="‖∂L/∂H̃‖ / ‖∂L/∂H_post‖",
    limits=Limits(warn=1e-6, above=False),
)
swapped_weights = remark(
    "swapped_weights",
    "Read and write weights look swapped.",
    "The branch reads with what the documented design writes with: check their order where they are "
    "split, returned and applied.",
    metric="read_share",
    judges="weight with which the branch reads where the design writes with it",
    limits=Limits(info=1.0),
)
foreign_coefficients = remark(
    "foreign_coefficients",
    "Coefficients are computed from something other than the streams they are applied to.",
    "In hyper-connections they are a function of the token's own streams at this connection: look for a "
    "stale variable, a shift or a norm over other tokens.",
    metric="mixing_gain",
    judges="change of the coefficients with what they should not depend on, relative to themselves",
    limits=Limits(warn=1e-3),
)
stale_statistics = remark(
    "stale_statistics",
    "The running statistics of BatchNorm are not those of its data, or were never updated.",
    "In evaluation it normalises with the mean and variance of something else. See whether it was ever in "
    "training mode, whether its buffers are saved and loaded, whether momentum is 0, and whether inputs "
    "are scaled as in training.",
    metric="channel_variance",
    judges="number of batch norms whose running statistics are not those of the data",
    limits=Limits(fail=0.0),
)
looks_ahead = remark(
    "looks_ahead",
    "The network sees the tokens that it has to predict.",
    "Check the causal mask on the path that runs: a fast path may mask where a slow one (dropout, a bias, "
    "a cache) does not.",
    metric="gradient_norm",
    judges="share of an output's gradient, or of its change, that comes from later tokens",
    range="0 to 1",
    limits=Limits(fail=1e-3),
)
