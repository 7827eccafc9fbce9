"""What does the page of the answer say? Three figures and one table; every digit is computed from the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from benchmarks.answer.networks import DESIGNS
from depthscope.app.drawing.matplotlib import write_figure
from depthscope.app.figures import Line, Lines
from depthscope.diagnostics.analysis.differences import holm, of_seeds
from depthscope.diagnostics.experiments.intervals import estimate
from depthscope.diagnostics.verdicts.same_representation import ALIKE

QUESTION = "Does the signal degenerate into one representation that is the same in all layers?"


def write_page(table: Path, folder: Path) -> None:
    """Write answer.md and images/answer_*.png from the table of measurements."""
    rows = pd.read_csv(table)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = figures(rows)
    for figure in drawn:
        write_figure(figure, folder / "images" / f"{figure.name}.png")
    (folder / "answer.md").write_text(page_text(rows, drawn, table.name), encoding="utf-8", newline="\n")


def trained(rows: pd.DataFrame, steps: int, scale: float = 1.0) -> dict[str, pd.DataFrame]:
    """The networks of a length of training and a scale of the branches, by the title of their design."""
    chosen = rows[(rows.steps == steps) & (rows.branch_scale == scale)]
    return {title: chosen[chosen.family == family] for family, title in DESIGNS.items()}


def figures(rows: pd.DataFrame) -> list[Lines]:
    """CKA with the last state along depth, loss without the last blocks, CKA of the ends over the scale of the branches."""
    short, long = sorted(rows.steps[rows.branch_scale == 1.0].unique())[:: max(1, rows.steps.nunique() - 1)][
        :2
    ]
    networks = trained(rows, long)
    along = [_band(title, _curves(each.to_last), first=0) for title, each in networks.items()]
    ends = along[0].x[[0, -1]]
    scales = np.array(sorted(rows.branch_scale.unique()))
    over_scale = [
        _band_at(scales, [trained(rows, short, scale)[title].alike.to_numpy() for scale in scales], title)
        for title in DESIGNS.values()
    ]
    skipped = [_band(title, _curves(each.skip_last), first=1) for title, each in networks.items()]
    of = f"mean and range over seeds, {long} training steps"
    return [
        _lines(
            "answer_depth", "blocks passed", "CKA with the last state", [*along, _limit(ends)],
            f"Debiased CKA of the state after each block with the last state, the least of four views; {of}. States above "
            "the dotted line are called the same.",
        ),
        _lines(
            "answer_skipped", "last blocks left out", "loss gained, nats per byte", skipped,
            f"What the held-out loss gains when the last blocks are left out; {of}.",
        ),
        _lines(
            "answer_scale", "scale of the branches", "CKA, first and last state", [*over_scale, _limit(scales[[0, -1]])],
            "Debiased CKA of the first and the last state against the constant that every branch is multiplied with; mean "
            f"and range over seeds, {short} training steps.", log_x=True,
        ),
    ]  # fmt: skip


def _curves(cells: pd.Series) -> np.ndarray:
    return np.array([[float(part) for part in cell.split()] for cell in cells])


def _band(title: str, curves: np.ndarray, *, first: int) -> Line:
    return _band_at(np.arange(curves.shape[1]) + float(first), list(curves.T), title)


def _band_at(x: np.ndarray, values: Sequence[np.ndarray], title: str) -> Line:
    mean, low, high = (np.array([reduce(each) for each in values]) for reduce in (np.mean, np.min, np.max))
    return Line(x, mean, title, lower=low, upper=high, group=title)


def _limit(ends: np.ndarray) -> Line:
    return Line(ends, np.full(2, ALIKE), f"the same: {ALIKE:g}", role="threshold")


def _lines(
    name: str, x_label: str, y_label: str, lines: list[Line], caption: str, *, log_x: bool = False
) -> Lines:
    # A design has one colour in all figures.
    colours = {title: number for number, title in enumerate(DESIGNS.values())}
    return Lines(
        name, caption, x_label, y_label, tuple(lines), log_x=log_x, caption=caption, alt=caption, runs=colours
    )


def page_text(rows: pd.DataFrame, drawn: Sequence[Lines], table: str) -> str:
    """The page as Markdown."""
    counts = sorted(int(steps) for steps in rows.steps[rows.branch_scale == 1.0].unique())
    first = rows.iloc[0]
    pictures = [f"![{figure.alt}](images/{figure.name}.png)\n\n*{figure.caption}*" for figure in drawn]
    parts = [
        "<!-- written by python -m benchmarks.answer --page docs --no-training -->",
        f"# {QUESTION}",
        *(f"**After {steps} steps.** {_sentences(rows, steps)}" for steps in counts),
        f"**What makes it degenerate** is a small scale of the branches. {_scale_sentence(rows, counts[0])}",
        "## The designs",
        f"Five byte decoders that differ in how their layers are joined: {', '.join(DESIGNS.values())}. Each has "
        f"{first.depth} blocks of an attention and an MLP, width {first.width}, {first.heads} heads and, where it has "
        f"streams, {first.streams} of them, and is trained on Python's own documentation, {first.batch} × {first.length} "
        "bytes a step. States are those between blocks; of AttnRes, what the first sublayer of a block reads. Two states are "
        f"called the same where their debiased CKA is at least {ALIKE:g} in each of four views: the mean over streams, "
        "all streams joined, the least similar stream, and without large features. Intervals are 95 % over seeds "
        "(Student's t); p is from exchanging the labels of seeds, corrected for the number of designs (Holm).",
        _table(rows, counts),
        *pictures,
        "## What this does not show",
        f"One size of {first.depth} blocks, one text, one learning rate that was not tuned for each design, and no null of "
        "two seeds of one design: what larger and deeper networks do is not known from it. The least of four views is "
        "an easier escape for four streams than for one. HC and mHC are the hyper-connections package's; mHC-lite and "
        "attention residuals are written after their equations.",
        "## How it was made",
        f"{len(rows)} networks, {rows.seconds.sum():.0f} processor seconds of one core for training and measuring. "
        "`python -m benchmarks.answer --table answer.csv --page .` trains what the table lacks and writes this page; with "
        f"`--no-training` it is written from [the table of measurements]({table}) alone.",
    ]
    return "\n\n".join(parts) + "\n"


def _sentences(rows: pd.DataFrame, steps: int) -> str:
    networks = trained(rows, steps)
    ends = ", ".join(f"{title} {_interval(each.alike)}" for title, each in networks.items())
    blocks = int(rows.depth.iloc[0])
    same = sum(int((each.same_from < blocks).sum()) for each in networks.values())
    count = sum(map(len, networks.values()))
    later = ", ".join(f"{_interval(each.skip_later, 2)} of {title}" for title, each in networks.items())
    losses = ", ".join(
        f"{title} {value:+.2g} (p {p:.2g})"
        for title, (value, p) in _against_residual(networks, "loss").items()
    )
    memory = ", ".join(
        f"{title} {each.kept_bytes.mean() / networks['residual'].kept_bytes.mean():.1f} ×"
        for title, each in networks.items()
        if title != "residual"
    )
    none = "no network has two states that are the same" if not same else (
        f"in {same} of {count} networks the last states are the same"
    )  # fmt: skip
    return (
        f"No design holds one representation in all layers: the CKA of the first and the last state is {ends}, where "
        f"{ALIKE:g} would be the same, and {none}. Leaving out the later half of the blocks raises the held-out loss, in nats "
        f"per byte, by {later}. Against the residual network the loss differs by {losses}, and a forward keeps {memory} "
        "the bytes for its backward (of these implementations)."
    )


def _scale_sentence(rows: pd.DataFrame, steps: int) -> str:
    parts = []
    for scale in sorted((each for each in rows.branch_scale.unique() if each < 1.0), reverse=True):
        networks = trained(rows, steps, scale)
        same = [title for title, each in networks.items() if len(each) and each.alike.mean() > ALIKE]
        parts.append(
            f"at {scale:g} {', '.join(same) + ' hold' if len(same) > 1 else (same[0] + ' holds') if same else 'none holds'}"
        )
    return f"With every branch multiplied with a constant, {'; '.join(parts)} one representation ({steps} steps)."


def _table(rows: pd.DataFrame, counts: Sequence[int]) -> str:
    head = ("steps", "design", "seeds", "held-out loss", "CKA, first and last state", "loss without the later half",
            "kept, KiB per token")  # fmt: skip
    lines = [
        (str(steps), title, str(len(each)), _interval(each.loss), _interval(each.alike), _interval(each.skip_later, 2),
         f"{each.kept_bytes.mean() / 1024:.1f}")
        for steps in counts
        for title, each in trained(rows, steps).items()
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _interval(values: pd.Series, digits: int = 3) -> str:
    found = estimate(values.to_numpy())
    mean, low, high = (f"{value:#.{digits}g}".rstrip(".") for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def _against_residual(networks: dict[str, pd.DataFrame], name: str) -> dict[str, tuple[float, float]]:
    """Each design less the residual one: the difference of the means, and its corrected probability."""
    found = {
        title: of_seeds(
            name, {"residual": _positions(networks["residual"][name]), title: _positions(each[name])}
        )
        for title, each in networks.items()
        if title != "residual"
    }
    corrected = holm(np.array([float(each.p.item()) for each in found.values()]))
    return {
        title: (float(each.value.item()), float(p))
        for (title, each), p in zip(found.items(), corrected, strict=True)
    }


def _positions(values: pd.Series) -> list[xr.DataArray]:
    return [xr.DataArray([value], dims="depth", coords={"depth": [0]}) for value in values]
