"""The layout of a plain residual state, inferred from its shape and from what the calls show of its axes."""

from __future__ import annotations

from collections.abc import Sequence

from depthscope.probes.model.layout import LayoutError
from depthscope.probes.structure.layout_evidence import Copies, LayoutEvidence


def infer_layout(shape: Sequence[int], *, batch_size: int, evidence: LayoutEvidence | None = None) -> str:
    """Infer the layout of a plain residual state, or refuse.

    ``batch_size``: size of the batch that the model was called with.
    ``evidence``: what the calls show of the state's axes.
    Raises LayoutError: Where the shape fits no plain layout, or where streams may be merged into it; the message names
    the override.
    """
    size, evidence = tuple(shape), evidence or LayoutEvidence()
    plain = _plain_layout(size, batch_size, evidence)
    streams = _merged_layout(size, plain, evidence) if plain else _stream_layout(size, batch_size, evidence)
    if plain and not streams:
        return plain
    # Refused even where a layout with streams fits: without a known connection nothing proves that these are streams.
    raise LayoutError(_refusal(size, batch_size, plain, streams))


def _plain_layout(size: tuple[int, ...], batch_size: int, evidence: LayoutEvidence) -> str:
    # A square batch, of as many tokens as sequences, fits both ways: what the modules declare decides.
    if evidence.tokens_first and len(size) == 3 and size[1] == batch_size:
        return "T B D"
    if size[0] != batch_size:
        return ""
    if len(size) == 4:
        return {"first": "B D H W", "last": "B H W D"}.get(evidence.image, "")
    return {2: "B D", 3: "B T D"}.get(len(size), "")


def _merged_layout(size: tuple[int, ...], plain: str, evidence: LayoutEvidence) -> tuple[str, int] | None:
    """A layout with streams merged into the token or feature axis of a state of plain shape, and their number."""
    letters = plain.split()
    for copies in evidence.copies:
        # Copies along the batch are equal sequences, copies along a side of an image are stripes.
        tokens_second = letters[copies.axis] == "T" and copies.axis == 1
        if letters[copies.axis] == "D" or tokens_second:
            return _split_axis(letters, size, copies), copies.count
    if evidence.parts > 1:
        axis = letters.index("D")
        return _split_axis(letters, size, Copies(axis, evidence.parts, outer=True)), evidence.parts
    return None


def _split_axis(letters: list[str], size: tuple[int, ...], copies: Copies) -> str:
    letter = letters[copies.axis]
    merged = f"(N {letter})" if copies.outer else f"({letter} N)"
    named = "N" if size[copies.axis] == copies.count else merged
    return " ".join([*letters[: copies.axis], named, *letters[copies.axis + 1 :]])


def _stream_layout(
    size: tuple[int, ...], batch_size: int, evidence: LayoutEvidence
) -> tuple[str, int] | None:
    """A layout with streams for a state of a shape that is not plain, where its copies show the streams."""
    for copies in evidence.copies:
        if len(size) == 4 and copies.count == size[copies.axis]:
            # An axis of its own: of the other three the batch is known by its size, and the feature axis is the last.
            rest = [axis for axis in range(4) if axis != copies.axis]
            batch = next((axis for axis in rest if size[axis] == batch_size), rest[0])
            tokens, features = (axis for axis in rest if axis != batch)
            named = {copies.axis: "N", batch: "B", tokens: "T", features: "D"}
            return " ".join(named[axis] for axis in range(4)), copies.count
        if copies.axis == 0 and copies.count * batch_size == size[0]:
            return _split_axis(["B", "T", "D"][3 - len(size) :], size, copies), copies.count
    return None


def _refusal(size: tuple[int, ...], batch_size: int, plain: str, streams: tuple[str, int] | None) -> str:
    state = f"the residual state has shape {size} for a batch of {batch_size}"
    if streams is not None:
        layout, count = streams
        return (
            f"{state}, and {count} streams seem to hide in it: it begins as equal copies, or its blocks write 1/{count} of it "
            f"at a time, but no stream connection was found. Its states alone are captured with layout={layout!r} and "
            f"streams={count}; where it has no streams, pass layout={plain or 'B T D'!r}"
        )
    return (
        f"{state}: no plain layout fits and no stream connection was found. If it has streams, this connection is not known "
        "yet; say how to read it with layout=, for example layout='B T N D', layout='(B N) T D', or layout='B H W D' for an "
        "image with channels last"
    )


def takes_tokens_first(shape: Sequence[int], lead: Sequence[int], evidence: LayoutEvidence) -> bool:
    """Whether a model is called with the tokens before the sequences, so that its batch is the second axis.

    ``lead``: shape of the first tensor that the model was called with.
    ``evidence``: what the calls show of the state's axes.
    """
    return (
        evidence.tokens_first and len(shape) == 3 and len(lead) >= 2 and tuple(lead[:2]) == tuple(shape[:2])
    )
