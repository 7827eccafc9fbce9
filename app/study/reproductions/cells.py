"""Which cells of a study are done? Each is saved when it is measured; the next call goes on with the others."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from depthscope.app.study.reproductions.plan import Cell, Row, Scale, Study
from depthscope.app.study.training import single_threaded
from depthscope.app.text.terminal import progress_bar, remark
from depthscope.diagnostics import schema
from depthscope.diagnostics.atomic_writes import one_at_a_time, replaced_file, require_replaceable_file
from depthscope.diagnostics.errors import InputError, TakenError

FORMAT = "depthscope study cell"
# A cell of ours takes some thousand bytes.
LARGEST = 1 << 20
# Seconds until a second process on one folder gives up.
PATIENCE = 10.0


def row_path(out: Path, cell: Cell) -> Path:
    """Where a cell's row is saved: the digest of its settings is in the name."""
    return out / "cells" / f"{cell.name}-{cell.digest}.json"


def run_path(out: Path, cell: Cell) -> Path:
    """Where a cell's run is saved, if it is."""
    return out / "runs" / f"{cell.name}-{cell.digest}.zarr"


def weights_path(out: Path, cell: Cell) -> Path:
    """Where a cell's weights are saved, if they are."""
    return out / "weights" / f"{cell.name}-{cell.digest}.safetensors"


def kept_row(out: Path, cell: Cell) -> Row | None:
    """The row of a cell that is done.

    Returns: None where it has to be measured: its row or its run is not there.
    Raises TakenError: Where a file of another origin, or one that was changed, has the row's name.
    """
    path = row_path(out, cell)
    if not path.exists() or (cell.keeps_run and not run_path(out, cell).exists()):
        return None
    return _read(path, cell)


def _read(path: Path, cell: Cell) -> Row:
    try:
        if path.stat().st_size > LARGEST:
            raise InputError("it is too large")
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["study"] != cell.study or data["settings"] != dict(cell.settings):
            raise InputError("it is of something else")
        numbers = {str(name): _number(value) for name, value in data["numbers"].items()}
        curves = {str(name): [_number(value) for value in line] for name, line in data["curves"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TakenError(
            f"{path} exists and is not what the study keeps of this cell; move it away, or name another folder"
        ) from error
    return Row(cell.settings, numbers, curves)


def _number(value: Any) -> float:
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"got {value!r}, expected a number")
    return math.nan if value is None else float(value)


def keep(out: Path, cell: Cell, row: Row) -> None:
    """Write a row; the cell is done once it is there."""
    # JSON has no NaN.
    plain = {name: value if math.isfinite(value) else None for name, value in row.numbers.items()}
    lines = {name: [v if math.isfinite(v) else None for v in line] for name, line in row.curves.items()}
    data = {
        "format": FORMAT,
        "study": cell.study,
        "settings": dict(cell.settings),
        "numbers": plain,
        "curves": lines,
    }
    path = row_path(out, cell)
    with replaced_file(path, check=partial(_read, cell=cell)) as fresh:
        fresh.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def run_cells(
    study: Study, scale: Scale, out: Path, *, minutes: float | None = None
) -> tuple[list[Row], int]:
    """Measure every cell that is not saved yet, one after the other.

    ``out``: folder of the study; rows and runs of other settings in it stay.
    ``minutes``: no further cell begins after so long; one is measured in any case.
    Raises TakenError: Where a file of another origin has the name of a cell; before anything is measured.
    """
    cells = list(study.cells(scale))
    for cell in cells:
        kept_row(out, cell)
        require_replaceable_file(row_path(out, cell), partial(_read, cell=cell))
        if cell.keeps_run:
            schema.require_replaceable(run_path(out, cell))
    rows: list[Row] = []
    with _one_study(out), progress_bar(study.name) as show, single_threaded():
        started = time.monotonic()
        measured = 0
        try:
            for number, cell in enumerate(cells):
                show(number / len(cells), cell.name)
                row = kept_row(out, cell)
                if (
                    row is None
                    and measured
                    and minutes is not None
                    and time.monotonic() - started > 60 * minutes
                ):
                    continue  # a later cell may be done
                if row is None:
                    row = _measured(study, cell, out)
                    measured += 1
                rows.append(row)
        except KeyboardInterrupt:
            remark(
                f"stopped: {len(rows)} of {len(cells)} cells are kept in {out}; the same command goes on with the others"
            )
            raise
    return rows, len(cells)


def _measured(study: Study, cell: Cell, out: Path) -> Row:
    where = [weights_path(out, cell)] if study.keeps_weights else []
    found = study.measure(cell.settings, *where)
    if cell.keeps_run and found.run is not None:
        schema.save_run(found.run, run_path(out, cell))
    row = Row(cell.settings, found.numbers, found.curves)
    # Last: the row shows that the cell is done.
    keep(out, cell, row)
    return row


@contextmanager
def _one_study(out: Path) -> Iterator[None]:
    """Two processes would measure each cell twice: the second one waits."""
    out.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(out / "cells", "measuring", seconds=PATIENCE):
        yield
