"""How are many figures written? One by one, or half of them by a second process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

from depthscope.app.drawing.matplotlib import Width, write_figure
from depthscope.app.figures.composed import Composed
from depthscope.app.figures.specification import Figure

# Fewer are drawn in the seconds that a second process takes to start. A heuristic of ours.
MANY = 24


class FigureFiles(NamedTuple):
    """A figure, the files that it is written to, and its width."""

    figure: Figure | Composed
    paths: Sequence[Path]
    width: Width


def write_figures(drawings: Sequence[FigureFiles], *, second_process: bool = False) -> None:
    """Write figures, the same bytes whoever draws them.

    ``second_process``: leave half of them to a process of its own where they are many and there is a core for it:
    matplotlib uses one, and its state is shared by all threads of a process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not second_process or len(drawings) < MANY or cores < 2:
        _write(drawings)
        return
    theirs = drawings[1::2]
    with tempfile.TemporaryFile() as file:
        # A backend is chosen by what a process shows, and here nothing is shown.
        settings = {name: value for name, value in mpl.rcParams.copy().items() if name != "backend"}
        pickle.dump((settings, theirs), file)
        file.seek(0)
        other = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _write_what_is_read; _write_what_is_read()"],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Modules are found where they are found here.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            _write(drawings[::2])
            failed = other.wait() != 0
        except BaseException:  # Ctrl-C too: it would go on writing into a folder that is gone
            other.kill()
            other.wait()
            raise
    if failed:  # what fails here too is raised with its own words
        _write(theirs)


def _write(drawings: Sequence[FigureFiles]) -> None:
    for figure, paths, width in drawings:
        write_figure(figure, *paths, width=width)


def _write_what_is_read() -> None:
    """What the second process does: its standard input is a file that the first one wrote."""
    settings: dict[str, Any]
    settings, drawings = pickle.load(sys.stdin.buffer)
    with mpl.rc_context(settings):
        _write(drawings)
