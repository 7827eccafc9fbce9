"""What is drawn for the answer? One figure a question, with the range over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from depthscope.app.figures import Line, Lines
from depthscope.app.study.reproductions.answer import FAMILIES
from depthscope.app.study.reproductions.answer_table import Measurements
from depthscope.app.study.reproductions.figures import band
from depthscope.diagnostics.verdicts.same_representation import ALIKE

# A design has one colour in all figures, whichever of them it is drawn in.
COLOURS = {title: number for number, title in enumerate(FAMILIES.values())}
SEEDS = "mean and range over seeds"


def answer_figures(found: Measurements) -> list[Lines]:
    """Every figure that has something to show, in the order of the page."""
    makers = (_along_depth, _left_out, _over_scale, _loss_over_scale, _over_memory)
    return [figure for make in makers if (figure := make(found)) is not None]


def _along_depth(found: Measurements) -> Lines | None:
    lines = [
        band(np.arange(len(curves[0]), dtype=float), list(zip(*curves, strict=True)), title)
        for family, title in FAMILIES.items()
        if (curves := _curves(found, family, "to_last"))
    ]
    if not lines:
        return None
    ends = np.array([lines[0].x[0], lines[0].x[-1]])
    limit = _limit(ends)
    caption = (
        f"Debiased CKA of the state after each block with the last state, the least of four views; {SEEDS}, "
        f"{found.steps[0]} training steps. States above the dotted line are called the same."
    )
    return _lines("depth", "blocks passed", "CKA with the last state", [*lines, limit], caption)


def _limit(x: np.ndarray) -> Line:
    return Line(x, np.full(len(x), ALIKE), f"the same: {ALIKE:g}", role="threshold")


def _left_out(found: Measurements) -> Lines | None:
    lines = [
        band(np.arange(1.0, len(curves[0]) + 1), list(zip(*curves, strict=True)), title)
        for family, title in FAMILIES.items()
        if (curves := _curves(found, family, "skip_last"))
    ]
    caption = f"What the held-out loss gains when the last blocks are left out; {SEEDS}, {found.steps[0]} training steps."
    return _lines("skipped", "last blocks left out", "loss gained, nats per byte", lines, caption)


def _over_scale(found: Measurements) -> Lines | None:
    caption = (
        "Debiased CKA of the first and the last state against the constant that every branch is multiplied with; "
        f"{SEEDS}, {found.steps[0]} training steps."
    )
    return _doses(found, "scale", "alike", "CKA, first and last state", caption)


def _loss_over_scale(found: Measurements) -> Lines | None:
    caption = f"Held-out loss against the same constant; {SEEDS}, {found.steps[0]} training steps."
    return _doses(found, "scale_loss", "loss", "held-out loss, nats per byte", caption)


def _doses(found: Measurements, name: str, number: str, label: str, caption: str) -> Lines | None:
    lines = []
    for family, title in FAMILIES.items():
        values = {scale: found.values(number, family, scale=scale) for scale in found.scales}
        known = {scale: each for scale, each in values.items() if each}
        if len(known) > 1:
            lines.append(band(np.array(list(known)), list(known.values()), title))
    if len(lines) == 1:  # no legend names it
        caption += f" So far of {lines[0].label} networks alone."
    limit = [_limit(np.array([found.scales[0], found.scales[-1]]))] if lines and number == "alike" else []
    return _lines(name, "scale of the branches", label, [*lines, *limit], caption, log_x=True)


def _over_memory(found: Measurements) -> Lines | None:
    lines = []
    for family, title in FAMILIES.items():
        memory, loss = found.mean("kept_bytes", family), found.mean("loss", family)
        if memory is not None and loss is not None:
            reach = np.array([loss.high - loss.mean])
            x, y = np.array([memory.mean / 1024]), np.array([loss.mean])
            lines.append(Line(x, y, title, error=reach, group=title))
    caption = (
        "Held-out loss against what a forward keeps for the backward of a token; mean and 95 % interval over seeds, "
        f"{found.steps[0]} training steps."
    )
    return _lines(
        "memory", "saved for the backward, KiB per token", "held-out loss, nats per byte", lines, caption
    )


def _curves(found: Measurements, family: str, name: str) -> list[Sequence[float]]:
    return [row.curves[name] for row in found.of(family) if name in row.curves]


def _lines(
    name: str, x_label: str, y_label: str, lines: Sequence[Line], caption: str, *, log_x: bool = False
) -> Lines | None:
    if not lines:
        return None
    return Lines(
        f"answer_{name}",
        caption,
        x_label,
        y_label,
        tuple(lines),
        log_x=log_x,
        caption=caption,
        alt=caption,
        runs=COLOURS,
    )
