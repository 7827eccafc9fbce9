"""Are the connections wired as they claim? Verdicts on what the capture noticed in the code and weights of the connections.

They report the run's attribute ``remarks``, of which the capture writes the sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from depthscope.diagnostics.verdicts.declaration import DEFAULT, Limits, Profile, verdict
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


# --- what was noticed ---

LONGEST = 1000  # characters of a sentence; those of the capture have about 300


def is_text(found: Any) -> TypeGuard[str]:
    """Whether what a file has in the place of a sentence can be one."""
    return isinstance(found, str) and found.isprintable() and len(found) <= LONGEST


def noticed(attrs: Mapping[str, Any], *kinds: str) -> Iterator[Profile]:
    """The remarks of some kinds; a file may have anything in their place."""
    remarks = attrs.get("remarks")
    for remark in remarks if isinstance(remarks, (list, tuple)) else ():
        if not isinstance(remark, Mapping) or remark.get("kind") not in kinds:
            continue
        sentence, places = remark.get("sentence"), remark.get("connections")
        if is_text(sentence):
            count = len(places) if isinstance(places, (list, tuple)) and places else 1
            yield Profile(
                float(count),
                sentence=f"{sentence} ({DEFAULT}).",
                note_only=remark.get("sure") is not True,
            )


@verdict(
    Kind.FACT,
    metric="identity_distance",
    judges="number of connections at which H_res, H_pre or H_post is another than what is computed, or documented",
    limits=Limits(warn=0.0),
)
def miswired_connection(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """A connection is wired otherwise than it is computed.

    Follow it from where it is computed to where it is applied: look for a result that is not used, a transpose, reads and
    writes exchanged where they are split or returned, a stale variable, a shift, or a norm over other tokens.
    """
    kinds = ("discarded_mixing", "transposed_mixing", "swapped_weights", "foreign_coefficients")
    return noticed(attrs, *kinds)


@verdict(
    Kind.FACT,
    metric="mixing_gain",
    judges="number of connections whose matrix is 1 in every entry",
    limits=Limits(fail=0.0),
)
def constant_mixing(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """Every entry of the mixing matrices is 1, whatever their parameters.

    Look at the axes of Sinkhorn's sums: along an axis of size one every number is divided by itself. The streams are equal
    from the first connection on, and grow by their number at each.
    """
    return noticed(attrs, "constant_mixing")


@verdict(
    Kind.FACT,
    metric="mixing_gain",
    judges="number of connections whose H_res gets no gradient",
    limits=Limits(warn=0.0),
)
def unlearnable_mixing(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The mixing matrices get no gradient.

    Where the graph is cut, take the detach away. Where all streams are alike, break the symmetry: a bias on the diagonal of
    the logits, and reads or writes that differ from stream to stream.
    """
    return noticed(attrs, "unlearnable_mixing")


@verdict(
    Kind.FACT,
    metric="stream_cosine",
    judges="number of connections before which the streams are merged",
    limits=Limits(warn=0.0),
)
def passing_streams(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The streams do not persist: they differ inside a block and are merged at its end.

    What is passed from block to block is then one stream, as in a plain residual network. Expand once at the embedding and
    merge once before the head; look for a mean over streams at the end of the block.
    """
    return noticed(attrs, "passing_streams")


@verdict(
    Kind.FACT,
    metric="channel_variance",
    judges="whether running statistics of batch norms are not those of the data",
    limits=Limits(fail=0.0),
)
def stale_statistics(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The running statistics of BatchNorm are not those of its data, or were never updated.

    In evaluation it normalises with the mean and variance of something else. See whether it was ever in training mode,
    whether its buffers are saved and loaded, whether momentum is 0, and whether inputs are scaled as in training.
    """
    return noticed(attrs, "stale_statistics")


@verdict(
    Kind.FACT,
    metric="gradient_norm",
    judges="whether outputs depend on the tokens that they have to predict",
    limits=Limits(fail=0.0),
)
def looks_ahead(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The network sees the tokens that it has to predict.

    Check the causal mask on the path that runs: a fast path may mask where a slow one (dropout, a bias, a cache) does not.
    """
    return noticed(attrs, "looks_ahead")
