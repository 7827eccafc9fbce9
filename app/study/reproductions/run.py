"""How is a study run? Its cells one by one, then its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from depthscope.app.study.reproductions.answer_page import write_page
from depthscope.app.study.reproductions.catalogue import STUDIES
from depthscope.app.study.reproductions.cells import run_cells
from depthscope.app.study.reproductions.claims import Claim
from depthscope.app.study.reproductions.plan import Scale, Study
from depthscope.app.study.reproductions.results import require_own, summary_text, write_results
from depthscope.app.text.terminal import working
from depthscope.diagnostics.errors import InputError

# One block alone is no chain whose states could be read.
MOST_LAYERS = 256


@dataclass(frozen=True)
class Outcome:
    """What a study gave: its claims, its summary, and what was written."""

    claims: Sequence[Claim]
    summary: str
    done: int
    planned: int
    written: Sequence[Path]


def scale_of(study: Study, *, quick: bool, depths: Sequence[int] | None, seeds: int | None) -> Scale:
    """The size of a study as it was asked for.

    ``seeds``: how many, in place of the study's.
    Raises InputError: For depths or seeds where nothing is trained, no depth, or one outside 2 … 256.
    """
    scale = study.quick if quick else study.scale
    if not study.trained and (depths is not None or seeds is not None):
        raise InputError(f"{study.name} trains nothing: it has neither depths nor seeds; leave them out")
    if depths is not None:
        if not depths or not all(2 <= depth <= MOST_LAYERS for depth in depths):
            raise InputError(
                f"got depths {list(depths)}; expected one or several from 2 to {MOST_LAYERS} layers"
            )
        scale = replace(scale, depths=tuple(sorted(set(depths))))
    return scale if seeds is None else replace(scale, seeds=seeds)


def run_reproduction(
    name: str,
    out: Path,
    *,
    quick: bool = False,
    depths: Sequence[int] | None = None,
    seeds: int | None = None,
    minutes: float | None = None,
    page: Path | None = None,
) -> Outcome:
    """Run a study, or go on with one: cells that are saved in the folder with the same settings are not measured again.

    ``out``: folder for ``cells/``, ``runs/``, ``results/``, ``paper/`` and ``summary.md``. Files of others in it stay.
    ``quick``: tiny networks and a few steps: to see that it runs, not to learn from.
    ``minutes``: no further network begins after so long.
    ``page``: of the study of the answer: a folder where its page is written too.
    Raises InputError: For a size that cannot be run, or folders that are somebody else's.
    Raises OSError: Where a file of another origin has a name of the study's, or nothing can be written.
    """
    study = STUDIES[name]
    scale = scale_of(study, quick=quick, depths=depths, seeds=seeds)
    require_own(study, out)
    rows, planned = run_cells(study, scale, out, minutes=minutes)
    with working("drawing"):
        written = write_results(study, scale, rows, planned, out)
        if page is not None:
            written += write_page(page, rows, planned)
    return Outcome(study.claims(rows), summary_text(study, scale, rows, planned), len(rows), planned, written)
