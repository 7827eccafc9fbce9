"""What does the page of the answer say? Three figures and one table; every digit is computed from the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from benchmarks.answer.measure import QUARTERS, VIEWS
from benchmarks.answer.networks import DESIGNS
from depthscope.app.drawing.matplotlib import write_figure
from depthscope.app.figures import Line, Lines
from depthscope.diagnostics.analysis.differences import Difference, holm, of_seeds
from depthscope.diagnostics.experiments.intervals import estimate
from depthscope.diagnostics.verdicts.same_representation import ALIKE

QUESTION = "Does the signal degenerate into one representation that is the same in all layers?"
BASE = next(iter(DESIGNS))
KEYS = ["family", "depth", "seed", "steps", "branch_scale"]
FEWEST_SEEDS = 3  # of which an interval is given: with two it is wider than what is measured
EQUIVALENT = 0.05  # nats per byte: a smaller difference of losses is called none


def write_page(table: Path, folder: Path) -> None:
    """Write answer.md and images/answer_*.png from the table of measurements."""
    measured = pd.read_csv(table)
    rows = complete(measured.drop_duplicates(KEYS, keep="last"))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = figures(rows)
    for figure in drawn:
        write_figure(figure, folder / "images" / f"{figure.name}.png")
    (folder / "answer.md").write_text(
        page_text(rows, drawn, table.name, _again(measured)), encoding="utf-8", newline="\n"
    )


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The networks of the seeds that every design was trained with, and those of others."""
    ours = rows[rows.family.isin(list(DESIGNS))]
    designs = ours.groupby(["depth", "branch_scale", "seed"]).family.transform("nunique")
    return pd.concat([ours[designs == len(DESIGNS)], rows.drop(ours.index)])


def trained(rows: pd.DataFrame, depth: int, scale: float = 1.0) -> dict[str, pd.DataFrame]:
    """The networks of a depth and a scale of the branches, by design."""
    chosen = rows[(rows.depth == depth) & (rows.branch_scale == scale)]
    return {family: chosen[chosen.family == family] for family in DESIGNS}


def full_scale(rows: pd.DataFrame, counts: Sequence[int]) -> list[pd.DataFrame]:
    """The networks of each design at each depth."""
    return [each for depth in counts for each in trained(rows, depth).values()]


def depths(rows: pd.DataFrame) -> list[int]:
    """The numbers of blocks that the designs were trained with."""
    ours = rows.family.isin(list(DESIGNS)) & (rows.branch_scale == 1.0)
    return sorted(int(depth) for depth in rows.depth[ours].unique())


def figures(rows: pd.DataFrame) -> list[Lines]:
    """CKA with the last state along depth, CKA of the ends over the number of blocks, loss without each quarter."""
    counts = depths(rows)
    deepest = trained(rows, counts[-1])
    of = "mean and range over seeds"
    share = np.linspace(0.0, 1.0, counts[-1] + 1)
    along = [
        _band(share, np.array([cell.split() for cell in each.to_last], float), family)
        for family, each in deepest.items()
    ]
    over = [
        _over_depths(family, [trained(rows, depth)[family] for depth in counts], counts) for family in DESIGNS
    ]
    names = [f"skip_{quarter + 1}" for quarter in range(QUARTERS)]
    skipped = [
        _band(np.arange(1.0, QUARTERS + 1), each[names].to_numpy(), family)
        for family, each in deepest.items()
    ]
    return [
        _lines(
            "answer_depth", "relative depth", "CKA with the last state", [*along, _limit(share[[0, -1]])],
            f"Networks of {counts[-1]} blocks; {of}. States above the dotted line are called the same.",
        ),
        _lines(
            "answer_blocks", "blocks", "CKA, first and last state", [*over, _limit(np.array([counts[0], counts[-1]], float))],
            f"Trained networks; {of}.",
        ),
        _lines(
            "answer_skipped", "quarter of the blocks that is left out", "loss gained, nats", skipped,
            f"Networks of {counts[-1]} blocks, held-out loss; {of}.",
        ),
    ]  # fmt: skip


def _band(x: np.ndarray, curves: np.ndarray, family: str) -> Line:
    title = DESIGNS[family]
    return Line(x, curves.mean(0), title, lower=curves.min(0), upper=curves.max(0), group=title)


def _over_depths(family: str, networks: Sequence[pd.DataFrame], counts: Sequence[int]) -> Line:
    mean, low, high = (
        np.array([reduce(each.alike_joined) for each in networks]) for reduce in (np.mean, np.min, np.max)
    )
    title = DESIGNS[family]
    return Line(np.array(counts, float), mean, title, lower=low, upper=high, group=title)


def _limit(ends: np.ndarray) -> Line:
    return Line(ends, np.full(2, ALIKE), f"the same: {ALIKE:g}", role="threshold")


def _lines(name: str, x_label: str, y_label: str, lines: list[Line], caption: str) -> Lines:
    # One colour a design in all figures.
    colours = {title: number for number, title in enumerate(DESIGNS.values())}
    alt = f"{y_label} by {x_label}"
    return Lines(name, caption, x_label, y_label, tuple(lines), caption=caption, alt=alt, runs=colours)


def page_text(rows: pd.DataFrame, drawn: Sequence[Lines], table: str, again: str) -> str:
    """The page as Markdown. ``again``: what networks that were trained twice show."""
    first, counts = rows.iloc[0], depths(rows)
    ours = rows[rows.family.isin(list(DESIGNS))]
    seeds = ", ".join(f"{len(trained(rows, depth)[BASE])} of {depth}" for depth in counts)
    whitened = [each.alike_whitened.mean() for each in full_scale(rows, counts)]
    pictures = [f"![{figure.alt}](images/{figure.name}.png)\n\n*{figure.caption}*" for figure in drawn]
    parts = [
        "<!-- written by python -m benchmarks.answer --page docs --no-training -->",
        f"# {QUESTION}",
        _answer(rows, counts),
        _deepest(rows, counts),
        _scale_sentence(rows),
        *pictures,
        _table(rows, counts),
        "CKA: debiased, of the joined state (streams × features), between blocks; of AttnRes, which carries no state, of what "
        "the first sublayer of a block reads. Fresh: before training. Other seed: the last states of two networks of one "
        f"design. Intervals: 95 % over {FEWEST_SEEDS} or more seeds (Student's t). Δ loss: against {DESIGNS[BASE]} (Welch's "
        f"interval); = marks those within ±{EQUIVALENT:g} nats. Losses: nats per byte; of pretrained networks, per token.",
        "## The designs",
        f"Byte decoders; a block is an attention and an MLP of width {first.width} with {first.heads} heads and, where it has "
        f"streams, {first.streams}. {first.steps} steps of {first.batch} × {first.length} bytes of Python's documentation, at "
        "the best of four learning rates for each design and depth (chosen on another seed, 300 steps). Seeds: "
        f"{seeds} blocks. HC and mHC are the hyper-connections package's; the others follow their equations.",
        "Other views of the states (mean over streams, least similar stream, without large features) change a design's mean "
        f"CKA by at most {_largest_change(rows, counts):.2g}. Whitened, so that every principal direction counts the "
        f"same, the means of the designs are {min(whitened):.2f} to {max(whitened):.2f}.",
        "## What this does not show",
        f"Width, data and longer training may change it. The loss was still falling: by "
        f"{(ours.course_a - ours.course_b).mean():.2f} nats on average from the last but one to the last fifth of the steps, "
        f"while the rate fell to zero.{_not_learned(rows, counts)}{again}",
        "## How it was made",
        f"{len(ours)} networks took {ours.seconds.sum() / 3600:.1f} processor hours of one core, without those for the rates. "
        "`python -m benchmarks.answer --compile --table answer.csv --page .` trains what the table lacks and writes the page; "
        f"`--no-training` writes it from [the table]({table}) alone.",
    ]
    return "\n\n".join(parts) + "\n"


def _answer(rows: pd.DataFrame, counts: Sequence[int]) -> str:
    """In how many networks the ends are the same representation; the range of the means by depth; the verdict."""
    ours = full_scale(rows, counts)
    total = sum(len(each) for each in ours)
    whole = sum(int((each.alike_joined >= ALIKE).sum()) for each in ours)
    parts = []
    for depth in counts:
        means = [
            (each.alike_joined.mean(), each.start_alike.mean()) for each in trained(rows, depth).values()
        ]
        (low, fresh_low), (high, fresh_high) = np.min(means, 0), np.max(means, 0)
        parts.append(f"{depth} blocks {low:.2f} to {high:.2f} (fresh {fresh_low:.2f} to {fresh_high:.2f})")
    begin = f"Yes, in {whole}" if whole else "No, in none"
    severities = pd.concat([each.severity for each in ours]).dropna()
    return (
        f"**{begin} of {total} trained networks** are the first and the last state one representation (CKA ≥ {ALIKE:g}). "
        f"Means of the designs, by depth: {'; '.join(parts)}. The verdict `same_representation` judged "
        f"{len(severities)} of them, and warns in {int((severities >= 2).sum()) or 'none'}."
    )


def _deepest(rows: pd.DataFrame, counts: Sequence[int]) -> str:
    """At the largest depth: which quarters are worth nothing, from which state on all are the same, what the designs cost."""
    deepest = trained(rows, counts[-1])
    since = ", ".join(f"{DESIGNS[family]} {each.same_from.mean():.0f}" for family, each in deepest.items())
    needless = {
        family: [str(q + 1) for q in range(QUARTERS) if each[f"skip_{q + 1}"].max() <= EQUIVALENT]
        for family, each in deepest.items()
    }
    unused = "; ".join(f"{DESIGNS[family]} {', '.join(of)}" for family, of in needless.items() if of)
    kept = ", ".join(
        f"{DESIGNS[family]} {each.kept_bytes.mean() / deepest[BASE].kept_bytes.mean():.1f} ×"
        for family, each in deepest.items()
        if family != BASE
    )
    return (
        f"**At {counts[-1]} blocks, these quarters can be left out** for no more than {EQUIVALENT:g} nats per byte in any "
        f"seed: {unused or 'none'}. The state from which on every two are the same, mean over seeds: {since}. Against "
        f"{DESIGNS[BASE]}, a forward keeps for its backward {kept} the bytes (of these implementations)."
    )


def _scale_sentence(rows: pd.DataFrame) -> str:
    """How similar the first and the last state are where every branch is multiplied with a small constant."""
    small = rows[rows.branch_scale < 1.0]
    if not len(small):
        return "Small scales of the branches were not trained yet."
    depth, parts = int(small.depth.iloc[0]), []
    for scale in sorted(small.branch_scale.unique(), reverse=True):
        each = {DESIGNS[family]: of.alike_joined.mean() for family, of in trained(rows, depth, scale).items()}
        (least, low), *_, (most, high) = sorted(each.items(), key=lambda of: of[1])
        fresh = small[small.branch_scale == scale].start_alike
        parts.append(
            f"at {scale:g} {low:.2f} ({least}) to {high:.2f} ({most}), fresh {fresh.min():.2f} or more"
        )
    return (
        f"**A small scale of the branches makes fresh networks degenerate, and trained ones less so.** With every branch of "
        f"{depth} blocks multiplied with a constant, CKA of the first and the last state is, trained, {'; '.join(parts)}."
    )


def _table(rows: pd.DataFrame, counts: Sequence[int]) -> str:
    lines = [
        "| blocks | design | rate | loss | Δ loss | CKA, first and last | fresh | other seed | KiB kept per token |",
        "| --- " * 9 + "|",
    ]
    for depth in counts:
        networks = trained(rows, depth)
        differences = _losses_against_base(networks)
        for family, each in networks.items():
            lines.append(
                f"| {depth} | {DESIGNS[family]} | {each.rate.iloc[0]:g} | {each.loss.mean():.3f} "
                f"| {differences.get(family, '')} | {_interval(each.alike_joined)} | {each.start_alike.mean():.2f} "
                f"| {each.other_seed.mean():z.2f} | {each.kept_bytes.mean() / 1024:.0f} |"
            )
    for row in rows[~rows.family.isin(list(DESIGNS))].itertuples():
        lines.append(f"| {row.depth} | {row.family} | | {row.loss:.2f} | | {row.alike_joined:.2f} | | | |")
    return "\n".join(lines).replace("nan", "–")


def _interval(values: pd.Series) -> str:
    found = estimate(values.to_numpy())
    if np.isnan(found.low) or len(values) < FEWEST_SEEDS:
        return f"{found.mean:z.2f}"
    return f"{found.mean:z.2f} ({found.low:z.2f} to {found.high:z.2f})"


def _losses_against_base(networks: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Each design's loss less that of the first one, with its corrected probability and whether it is none."""
    if len(networks[BASE]) < FEWEST_SEEDS:
        return {}
    found: dict[str, Difference] = {
        family: of_seeds("loss", {BASE: _positions(networks[BASE].loss), family: _positions(each.loss)})
        for family, each in networks.items()
        if family != BASE
    }
    corrected = holm(np.array([float(each.p.item()) for each in found.values()]))
    texts = {}
    for (family, each), p in zip(found.items(), corrected, strict=True):
        value, reach = float(each.value.item()), float(each.half_width.item())
        none = " =" if abs(value) + reach <= EQUIVALENT else ""
        tested = "" if each.undecided else f", p {p:.2g}"  # with too few seeds no difference is significant
        texts[family] = f"{value:+.3f} ± {reach:.3f}{tested}{none}"
    return texts


def _positions(values: pd.Series) -> list[xr.DataArray]:
    return [xr.DataArray([value], dims="depth", coords={"depth": [0]}) for value in values]


def _not_learned(rows: pd.DataFrame, counts: Sequence[int]) -> str:
    """Designs at a depth that lose far more than the best one there: their similarity is that of a failed training."""
    losses = {depth: {f: of.loss.mean() for f, of in trained(rows, depth).items()} for depth in counts}
    failed = [
        f"{DESIGNS[family]} at {depth} blocks (loss {loss:.2f})"
        for depth, of in losses.items()
        for family, loss in of.items()
        if loss > 2 * min(of.values())
    ]
    return f" Not learned at the rate that was chosen: {', '.join(failed)}." if failed else ""


def _again(measured: pd.DataFrame) -> str:
    """How many networks that were trained again, with the same seed, ended at the same loss, and how far the others."""
    ours = measured[measured.family.isin(list(DESIGNS))]
    apart = ours.groupby(KEYS).loss.agg(["count", np.ptp]).query("count > 1")["ptp"]
    if not len(apart):
        return ""
    family, depth, *_ = apart.index[int(apart.argmax())]
    return (
        f" Of {len(apart)} networks that were trained again with the same seed, {int((apart == 0).sum())} ended at the same "
        f"loss and {int((apart > EQUIVALENT).sum())} more than {EQUIVALENT:g} nats from it (at most {apart.max():.2f}: "
        f"{DESIGNS[family]} of {depth} blocks): on one machine a training repeats, another one rounds in another order."
    )


def _largest_change(rows: pd.DataFrame, counts: Sequence[int]) -> float:
    """Of any design at any depth, by how much another view of the same states changes the mean CKA of the ends."""
    ours = full_scale(rows, counts)
    return max(
        abs(float(each[f"alike_{view}"].mean() - each.alike_joined.mean())) for each in ours for view in VIEWS
    )
