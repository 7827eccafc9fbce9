"""The figures of a paper, each in one call: on axes of your own, or as a figure that you adapt.

    import depthscope as ds

    figure = ds.figures.collapse(run)  # or a path, a list of paths, {"name": run, …}, an analysis
    figure.savefig("collapse.pdf")

    canvas, axes = plt.subplots(1, 2)
    ds.figures.gains(run, axes={"composite_forward": axes[0], "composite_backward": axes[1]})

Each panel's axes have its key as their label (`Axes.get_label`); `ds.figures.panels("gains", run)` lists the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Protocol, cast, overload

import numpy as np
import xarray as xr

from depthscope.app.drawing.matplotlib import FIGURE_POINTS, Width, draw_into, to_matplotlib
from depthscope.app.figures import FIGURES, Heatmap, Lines, Selection
from depthscope.app.figures.composed import QUESTIONS, Composed, compose, in_one_line
from depthscope.app.figures.specification import figure_table
from depthscope.app.readings.readings import Reading, judged, read_paths, read_runs, shown_attributes
from depthscope.app.tables.comparison import summary_table
from depthscope.app.tables.findings import findings_table
from depthscope.app.tables.tables import depth_table, mixing_table
from depthscope.app.text.latex import venue_of
from depthscope.diagnostics.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "collapse",
    "gains",
    "gradients",
    "kernel",
    "measure",
    "mixing",
    "numbers",
    "panels",
    "similarity",
    "spectra",
    "table",
    "training",
]


def __dir__() -> list[str]:
    """What is completed in a notebook: the figures, and not what they are made of."""
    return __all__


Runs = (
    xr.DataTree
    | xr.Dataset
    | str
    | PathLike[str]
    | Sequence[str | PathLike[str] | Reading]
    | Mapping[str, "xr.DataTree | xr.Dataset | str | PathLike[str]"]
)
"""A run, an analysis, a path, several paths or readings, or any of the first three by the name to print."""


def panels(name: str, runs: Runs, *, by: str = "", **selection: Any) -> dict[str, str]:
    """The panels that a figure has of some runs.

    Parameters
    ----------
    name : str
        Such as ``"collapse"``.
    runs : run, analysis, path, sequence or mapping
        See `collapse`.
    by : str
        See `collapse`.
    **selection : str
        See `collapse`.

    Returns
    -------
    dict of str to str
        Key → title, in the order of the letters.

    Raises
    ------
    InputError
        For a name that is not known, or runs that feed none of its panels; the error has the reasons.
    """
    return {panel.key: panel.title for panel in _composed(name, runs, by, selection).panels}


def measure(name: str, runs: Runs, *, venue: str = "plain", **selection: Any) -> Figure:
    """One measure as the dashboard shows it, at the width of a venue's column.

    Parameters
    ----------
    name : str
        Name of the figure, such as ``"effective_rank"``.
    runs : run, analysis, path, sequence or mapping
        See `collapse`.
    venue : str
        icml, neurips, iclr, acl, cvpr, ieee or plain.
    **selection : str
        Fields of `Selection`, such as ``scope="data"``.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        For a name that is not known, or runs that do not feed it.
    """
    return to_matplotlib(_specified(name, runs, selection), width=venue_of(venue).name)


def numbers(name: str, runs: Runs, **selection: Any) -> pd.DataFrame:
    """The numbers of one measure.

    Parameters
    ----------
    name, runs, **selection
        See `measure`.

    Returns
    -------
    DataFrame
        One row for each point of a curve, or for each row of a matrix.

    Raises
    ------
    InputError
        As `measure`.
    """
    return figure_table(_specified(name, runs, selection))


def table(name: str, runs: Runs, *, chain: str = "") -> pd.DataFrame:
    """A table of some runs.

    Parameters
    ----------
    name : str
        ``depth`` or ``connection``: every measure along them, of the first run; ``summary`` or ``findings``: of all runs.
    runs : run, analysis, path, sequence or mapping
        See `collapse`.
    chain : str
        Which chain of the first run, where it has several.

    Returns
    -------
    DataFrame

    Raises
    ------
    InputError
        For a name that is not known, or a run without numbers along that axis.
    """
    readings, _ = _readings(runs)
    if name == "summary":
        return summary_table(readings).data
    if name == "findings":
        return findings_table(readings).data
    if name not in ("depth", "connection"):
        raise InputError(f"no table {name!r}; expected one of depth, connection, summary, findings")
    reading = next((each for each in readings if each.chain == chain), readings[0])
    made = (depth_table if name == "depth" else mixing_table)(reading)
    if made is None:
        raise InputError(f"{reading.name} has no numbers along its {name}s")
    return made.data


def _specified(name: str, runs: Runs, selection: Mapping[str, Any]) -> Lines | Heatmap:
    if name not in FIGURES:
        raise InputError(f"no measure {name!r}; {did_you_mean(name, FIGURES)}")
    analyses = {reading.name: reading.analysis for reading in _readings(runs)[0]}
    return FIGURES[name].build(analyses, **selection)


def _composed(name: str, runs: Runs, by: str, selection: Mapping[str, Any]) -> Composed:
    if name not in QUESTIONS:
        raise InputError(f"no figure {name!r}; expected one of {', '.join(QUESTIONS)}")
    readings, trees = _readings(runs)
    view = Selection.of(selection)
    depths = {reading.analysis.sizes.get("depth") for reading in readings} - {None}
    # At the same index a run of 12 layers is at its end and one of 24 in its middle.
    if len(depths) > 1 and "axis" not in selection:
        view = Selection.of({**selection, "axis": "relative"})
    figure = compose(name, readings, view=view, runs=trees, by=by)
    if not figure.panels:
        raise InputError(
            f"{name} has no panel of {', '.join(r.name for r in readings)}: {in_one_line(figure.left_out.values())}"
        )
    return figure


def _readings(runs: Runs) -> tuple[list[Reading], dict[str, xr.DataTree]]:
    """Readings of whatever names some runs, and the runs that are in memory."""
    # Datasets and trees are mappings too, of their variables.
    if isinstance(runs, xr.DataTree | xr.Dataset):
        runs = {"run": runs}
    if isinstance(runs, str | PathLike):
        runs = [runs]
    if isinstance(runs, Mapping):
        named = {str(name): run for name, run in runs.items()}
        trees = {name: run for name, run in named.items() if isinstance(run, xr.DataTree)}
        return [reading for name, run in named.items() for reading in _named(name, run)], trees
    found = [run for run in runs if isinstance(run, Reading)]
    paths = [fspath(run) for run in runs if not isinstance(run, Reading)]
    read, left_out = read_paths(paths) if paths else ([], {})
    if left_out:
        raise InputError("; ".join(f"{name} cannot be read: {reason}" for name, reason in left_out.items()))
    if not (found or read):
        raise InputError("no run was given; name at least one, such as runs/a.zarr")
    return [*found, *read], {}


def _named(name: str, run: xr.DataTree | xr.Dataset | str | PathLike[str]) -> list[Reading]:
    if isinstance(run, xr.DataTree):
        return read_runs({name: run})
    if isinstance(run, xr.Dataset):
        attrs = shown_attributes(dict(run.attrs))
        return [judged(name, attrs, run, chain="", path="", results={})]
    read, _ = read_paths([fspath(run)])
    return [replace(each, name=f"{name}/{each.chain}" if each.chain else name) for each in read]


def _by_key(figure: Composed, axes: Any) -> dict[str, Axes]:
    """Axes by the keys of the panels that they are for."""
    keys = [panel.key for panel in figure.panels]
    listed = ", ".join(f"{panel.key} ({panel.title})" for panel in figure.panels)
    if isinstance(axes, Mapping):
        if unknown := [key for key in axes if key not in keys]:
            raise InputError(f"{figure.name} has no panel {unknown[0]!r} of these runs; it has {listed}")
        return dict(axes)
    flat = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(flat) > len(keys):
        raise InputError(f"{len(flat)} axes for the {len(keys)} panels of {figure.name}: {listed}")
    if len(flat) < len(keys) and len(flat) != 1:
        raise InputError(
            f"{len(flat)} axes for the {len(keys)} panels of {figure.name}; give as many, or name those that you want, "
            f"axes={{{keys[0]!r}: ax}}: {listed}"
        )
    return dict(zip(keys, flat, strict=False))


class Drawing(Protocol):
    """How each figure is called: what it returns depends on whether axes are given."""

    @overload
    def __call__(
        self, runs: Runs, *, axes: None = None, venue: str = "plain", by: str = "", **selection: Any
    ) -> Figure: ...
    @overload
    def __call__(
        self, runs: Runs, *, axes: Any, venue: str = "plain", by: str = "", **selection: Any
    ) -> dict[str, Axes]: ...


_PARAMETERS = """

    Parameters
    ----------
    runs : run, analysis, path, sequence or mapping
        A run, what `analyze` returned, a path; several paths; or a mapping from the names to print to any of the first three.
    axes : Axes, sequence, array or mapping of str to Axes, optional
        Where to draw: one for each panel in their order, or by the keys of `panels`, of which some may be left out; a single
        one takes the first panel. Without them a figure at the full text width of the venue is made.
    venue : str
        Of a new figure: icml, neurips, iclr, acl, cvpr, ieee or plain.
    by : str
        Attribute that the runs of a group share, such as ``"family"`` of several seeds: curves are means with their 95 %
        interval over runs.
    **selection : str
        Fields of `Selection`, such as ``scope="data"``.

    Returns
    -------
    matplotlib.figure.Figure, or dict of str to Axes
        The new figure, or the axes that were given by the keys of their panels.

    Raises
    ------
    InputError
        For runs that feed no panel, axes that do not fit the panels, or a name that is not known.
    """


def _figure(name: str, about: str) -> Drawing:
    """The function that draws one of `QUESTIONS`."""

    def draw(runs: Runs, *, axes: Any = None, venue: str = "plain", by: str = "", **selection: Any) -> Any:
        page = venue_of(venue)
        figure = _composed(name, runs, by, selection)
        if axes is None:
            return to_matplotlib(figure, width=Width(page.text, FIGURE_POINTS))
        given = _by_key(figure, axes)
        draw_into(figure, given)
        return given

    draw.__name__ = draw.__qualname__ = name
    draw.__doc__ = about + _PARAMETERS
    return cast(Drawing, draw)


collapse = _figure(
    "collapse",
    "Collapse across depth: ranks of all and of ordinary tokens with their nulls, cosines of tokens and of streams.",
)
similarity = _figure(
    "similarity",
    "Similarity of depths: CKA of every two, and of each with the one before, with the band over tokens.",
)
gains = _figure(
    "gains", "Gains of the mixing, single and composite, forward and backward (mHC, figures 3 and 7)."
)
mixing = _figure(
    "mixing",
    "Mixing matrices, single and multiplied, with the sums of their rows and columns (mHC, figure 8).",
)
kernel = _figure(
    "kernel",
    "Who reads whom: the depth kernel (the dense connection matrix of HC), with the shares of reads and writes.",
)
spectra = _figure(
    "spectra",
    "Spectra: singular values of states and products along the depth, magnitudes of the eigenvalues of the mixing.",
)
gradients = _figure(
    "gradients",
    "Gradients and sensitivity: norms, gains and ranks of the gradient, norms of states and branches along the depth.",
)
training = _figure(
    "training",
    "Training: the loss with the first warning of each verdict, and profiles along the depth, step by step.",
)
