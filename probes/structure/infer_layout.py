"""The layout of a plain residual state: told from its shape and from the signs that the calls give, or refused."""

from __future__ import annotations

from collections.abc import Sequence

from depthscope.probes.model.layout import LayoutError
from depthscope.probes.structure.layout_evidence import Copies, Signs


def infer_layout(shape: Sequence[int], *, batch_size: int, signs: Signs | None = None) -> str:
    """Tell the layout of a plain residual state, or refuse.

    Parameters
    ----------
    shape : sequence of int
        Shape of the state.
    batch_size : int
        Size of the batch that the model was called with.
    signs : Signs, optional
        What the calls say about the state's axes.

    Returns
    -------
    str

    Raises
    ------
    LayoutError
        Where the shape fits no plain layout, or where streams hide in it; the message names the override.
    """
    size, signs = tuple(shape), signs or Signs()
    plain = _plain_layout(size, batch_size, signs)
    hidden = _merged_layout(size, plain, signs) if plain else _stream_layout(size, batch_size, signs)
    if plain and not hidden:
        return plain
    raise LayoutError(_refusal(size, batch_size, plain, hidden))


def _plain_layout(size: tuple[int, ...], batch_size: int, signs: Signs) -> str:
    if signs.tokens_first and len(size) == 3 and size[1] == batch_size:
        return "T B D"
    if size[0] != batch_size:
        return ""
    if len(size) == 4:
        return {"first": "B D H W", "last": "B H W D"}.get(signs.image, "")
    return {2: "B D", 3: "B T D"}.get(len(size), "")


def _merged_layout(size: tuple[int, ...], plain: str, signs: Signs) -> tuple[str, int] | None:
    """A layout with streams for a state of plain shape, in whose token or feature axis they hide."""
    letters = plain.split()
    for sign in signs.copies:
        if letters[sign.axis] == "D" or letters[sign.axis] + str(sign.axis) == "T1":
            return _split_axis(letters, size, sign), sign.count
    if signs.narrow > 1:
        axis = letters.index("D")
        return _split_axis(letters, size, Copies(axis, signs.narrow, outer=True)), signs.narrow
    return None


def _split_axis(letters: list[str], size: tuple[int, ...], sign: Copies) -> str:
    letter = letters[sign.axis]
    whole = f"(N {letter})" if sign.outer else f"({letter} N)"
    named = "N" if size[sign.axis] == sign.count else whole
    return " ".join([*letters[: sign.axis], named, *letters[sign.axis + 1 :]])


def _stream_layout(size: tuple[int, ...], batch_size: int, signs: Signs) -> tuple[str, int] | None:
    """A layout with streams for a state of a shape that is not plain, where its copies show the streams."""
    for sign in signs.copies:
        if len(size) == 4 and sign.count == size[sign.axis]:
            rest = [axis for axis in range(4) if axis != sign.axis]
            batch = next((axis for axis in rest if size[axis] == batch_size), rest[0])
            tokens, features = (axis for axis in rest if axis != batch)
            named = {sign.axis: "N", batch: "B", tokens: "T", features: "D"}
            return " ".join(named[axis] for axis in range(4)), sign.count
        if sign.axis == 0 and sign.count * batch_size == size[0]:
            return _split_axis(["B", "T", "D"][3 - len(size) :], size, sign), sign.count
    return None


def _refusal(size: tuple[int, ...], batch_size: int, plain: str, hidden: tuple[str, int] | None) -> str:
    state = f"the residual state has shape {size} for a batch of {batch_size}"
    if hidden is not None:
        layout, count = hidden
        return (
            f"{state}, and {count} streams seem to hide in it: it begins as equal copies, or its blocks write 1/{count} of it "
            f"at a time, but no stream connection was found. Its states alone are captured with layout={layout!r} and "
            f"streams={count}; where it holds no streams, pass layout={plain or 'B T D'!r}"
        )
    return (
        f"{state}: no plain layout fits and no stream connection was found. If it holds streams, this connection is not known "
        "yet; say how to read it with layout=, for example layout='B T N D', layout='(B N) T D', or layout='B H W D' for an "
        "image with channels last"
    )


def takes_tokens_first(shape: Sequence[int], lead: Sequence[int], signs: Signs) -> bool:
    """Tell whether a model is called with the tokens before the sequences, so that its batch is the second axis.

    Parameters
    ----------
    shape : sequence of int
        Shape of the first state.
    lead : sequence of int
        Shape of the first tensor that the model was called with.
    signs : Signs
        What the calls say about the state's axes.

    Returns
    -------
    bool
    """
    return signs.tokens_first and len(shape) == 3 and len(lead) >= 2 and tuple(lead[:2]) == tuple(shape[:2])
