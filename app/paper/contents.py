"""What do a paper bundle and a report show of some runs? The same figures, tables and sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import xarray as xr

from depthscope.app.figures import Figure, FigureKind, Lines, Selection, available
from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.build.values import fed
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.comparison import summary_table
from depthscope.app.tables.findings import findings_table
from depthscope.app.tables.tables import Table, depth_table, mixing_table, slug
from depthscope.app.text.bibliography import keys_of
from depthscope.diagnostics import CATALOGUE

CITES = {name: metric.cite for name, metric in CATALOGUE.items()}
"""Bibliography keys by metric."""


@dataclass(frozen=True)
class Contents:
    """Everything that is shown of some runs.

    ``readings``: runs, analysed and judged.
    ``view``: which slice of the numbers figures and tables show.
    ``drawn``: each figure with the question that it answers, in display order.
    ``summary, findings``: one row per run; one row per finding.
    ``tables``: each run by depth and by connection.
    """

    readings: tuple[Reading, ...]
    view: Selection
    drawn: tuple[tuple[str, Figure], ...]
    summary: Table
    findings: Table
    tables: tuple[Table, ...]

    @classmethod
    def of(cls, readings: Sequence[Reading], view: Selection | None = None) -> Contents:
        """Figures and tables of runs; runs of different depth share the relative axis."""
        view = view or Selection()
        # At the same index a run of 12 layers is at its end and one of 24 in its middle; at the same share of the depth both
        # compare.
        depths = {reading.analysis.sizes.get("depth") for reading in readings} - {None}
        view = replace(view, axis="relative") if len(depths) > 1 else view
        by_connection = [mixing_table(reading, view) for reading in readings]
        return cls(
            readings=tuple(readings),
            view=view,
            drawn=tuple(draw_all(readings, view)),
            summary=summary_table(readings, view),
            findings=findings_table(readings),
            tables=(
                *(depth_table(reading, view) for reading in readings),
                *(table for table in by_connection if table is not None),
            ),
        )

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every figure, in display order."""
        return tuple(figure for _, figure in self.drawn)

    @property
    def by_question(self) -> dict[str, list[Figure]]:
        """The figures of each question, which the report's template goes through."""
        found: dict[str, list[Figure]] = {}
        for question, figure in self.drawn:
            found.setdefault(question, []).append(figure)
        return found

    @property
    def sources(self) -> list[str]:
        """Bibliography keys of the metrics, the laws and the thresholds that are shown, sorted."""
        tables = (self.summary, self.findings, *self.tables)
        metrics = {figure.metric for figure in self.figures}
        metrics |= {metric for table in tables for metric in table.metrics}
        # A metric without a citation has an empty one, which `keys_of` leaves out.
        cited = [CITES.get(metric, "") for metric in metrics]
        cited += [key for figure in self.figures for key in figure.sources]
        cited += [finding.source for reading in self.readings for finding in reading.findings]
        return keys_of(cited)


def draw_all(readings: Sequence[Reading], view: Selection) -> list[tuple[str, Figure]]:
    """Every figure that the runs can feed, with its question; curves overlaid, one matrix a run."""
    analyses = {reading.name: reading.analysis for reading in readings}
    return [
        (kind.question, figure)
        for kind in available(analyses).values()
        for figure in _drawn(kind, analyses, view)
    ]


def _drawn(kind: FigureKind, analyses: Mapping[str, xr.Dataset], view: Selection) -> Iterator[Figure]:
    if not isinstance(kind, MatrixFigure):
        # Of all runs, those that cannot feed it included: the others keep the colours that they have everywhere.
        figure = kind.build(analyses, **asdict(view))
        # A run may feed a figure in another slice than the one asked for; an empty frame is of no use on paper.
        if isinstance(figure, Lines) and any(line.role == "measured" for line in figure.lines):
            yield figure
        return
    for run, _, _ in fed(analyses, kind.metric, view):
        # Cells have the index of their own run: matrices are not overlaid, so they need no shared axis.
        single = kind.build(analyses, **asdict(replace(view, run=run, axis="depth")))
        yield single if len(analyses) == 1 else replace(single, name=f"{single.name}_{slug(run)}")
