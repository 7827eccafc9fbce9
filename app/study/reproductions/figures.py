"""What is drawn of a study? Each number over depth, and each curve along the deepest networks, with bands over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from depthscope.app.figures import Figure, Line, Lines
from depthscope.app.study.reproductions.claims import by_variant, deepest
from depthscope.app.study.reproductions.plan import Along, Row, RunNumber, Study

LOSS = RunNumber("loss", "held-out loss, nats per byte")


def study_figures(study: Study, rows: Sequence[Row]) -> list[Figure]:
    """Every figure that has something to show.

    ``study``: with its numbers, curves and further figures.
    """
    found: list[Figure] = []
    if study.trained and rows:
        # The first variant is what the study is of; a study draws its others itself.
        first = by_variant(rows)[0][1]
        # Over one depth there is no curve; the table has the numbers.
        if len({row.settings["depth"] for row in first}) > 1:
            found += [
                each for number in (LOSS, *study.numbers) if (each := _over_depth(study, first, number))
            ]
        found += [each for curve in study.curves if (each := _along(study, first, curve))]
    return [*found, *study.figures(rows)]


def _over_depth(study: Study, rows: Sequence[Row], number: RunNumber) -> Lines | None:
    lines = []
    for family, title in study.families.items():
        depths = sorted({row.settings["depth"] for row in rows if row.settings["family"] == family})
        values = [
            [row.numbers.get(number.name, np.nan) for row in rows
             if row.settings["family"] == family and row.settings["depth"] == depth]
            for depth in depths
        ]  # fmt: skip
        if any(np.isfinite(each).any() for each in values):
            lines.append(band(np.array(depths, float), values, title))
    if not lines:
        return None
    return _figure(
        study, rows, number.name, f"{_capital(number.title)}", "layers", number.title, lines, log=number.log
    )


def _along(study: Study, rows: Sequence[Row], curve: Along) -> Lines | None:
    depth = deepest(rows)
    lines = []
    for family, title in study.families.items():
        drawn = [
            row.curves[curve.name]
            for row in rows
            if row.settings["family"] == family
            and row.settings["depth"] == depth
            and row.curves.get(curve.name)
        ]
        if not drawn or not any(np.isfinite(each).any() for each in drawn):
            continue
        count = len(drawn[0])
        # Along the share of the depth: some families show states between attention and MLP, others after blocks alone.
        x = np.linspace(0, 1, count) if count > 1 else np.zeros(1)
        # Places that no seed measured are left out: a point between two of them would have neither line nor band.
        values = {
            place: seeds
            for place, seeds in zip(x, zip(*drawn, strict=True), strict=True)
            if np.isfinite(seeds).any()
        }
        lines.append(band(np.array(list(values)), list(values.values()), title))
        lines += _laws(rows, curve, family, title, depth, x)
    if not lines:
        return None
    title = f"{_capital(curve.title)}, {depth} layers"
    return _figure(study, rows, curve.name, title, "share of the depth", curve.title, lines, log=curve.log)


def _laws(
    rows: Sequence[Row], curve: Along, family: str, title: str, depth: int, x: np.ndarray
) -> Iterator[Line]:
    """The law of the first seed that has one."""
    for row in rows:
        law = row.curves.get(f"{curve.name}_law", ())
        if row.settings["family"] == family and row.settings["depth"] == depth and len(law) == len(x):
            yield Line(
                x, np.array(law), f"{title}: law", role="theory", group=title, law=curve.law.replace("_", " ")
            )
            return


def band(x: np.ndarray, values: Sequence[Sequence[float]], title: str) -> Line:
    """The mean over seeds, and from the least to the largest."""
    kept = [np.array([value for value in each if np.isfinite(value)]) for each in values]
    mean, low, high = (
        np.array([reduce(each) if each.size else np.nan for each in kept])
        for reduce in (np.mean, np.min, np.max)
    )
    return Line(x, mean, title, lower=low, upper=high, group=title)


def _figure(
    study: Study,
    rows: Sequence[Row],
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    log: bool,
) -> Lines:
    seeds = len({row.settings["seed"] for row in rows})
    bands = f"; mean and range of {seeds} seeds" if seeds > 1 else "; one seed"
    steps = rows[0].settings["steps"]
    caption = f"{title}{bands}, {steps} steps of training."
    # A logarithmic axis has no place for 0.
    log = log and all((line.y[np.isfinite(line.y)] > 0).all() for line in lines)
    return Lines(
        f"{study.name.replace('-', '_')}_{name}",
        title,
        x_label,
        y_label,
        tuple(lines),
        log_y=log,
        caption=caption,
        alt=caption,
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
