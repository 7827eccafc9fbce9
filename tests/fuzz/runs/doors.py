"""Through which doors does a run come in? The function, every command that takes one, merging, and the dashboard."""

from __future__ import annotations

import pickle
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.kinds import Subject
from tests.fuzz.outcomes import CLEAR, DIFFERENT, EQUAL, UNVERIFIED, Answer, of_call, of_command


def warm_up(material: Path) -> None:
    """Import what opening a run imports; neither zarr's event loop nor a pool of threads starts by that."""
    import h5netcdf
    import h5py
    import numcodecs
    import zarr

    from depthscope import diagnostics
    from depthscope.app.cli import main
    from depthscope.app.readings import readings
    from depthscope.app.tables import tables

    assert all((h5netcdf, h5py, numcodecs, zarr, diagnostics, main, readings, tables))
    # Safety must not hang on the default of a dependency: unpickling is allowed here, as a careless environment may have it.
    numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE = True
    # The first run of a process pays for imports inside functions; netCDF starts no thread, zarr would.
    with diagnostics.schema.open_run(material / "tiny.nc") as run:
        diagnostics.judge(diagnostics.analyze(run.load()))


def open_doors(subject: Subject, material: Path, rng: Random) -> list[Answer]:
    """Answers of `open_run` with all arrays read, of of `check`, and for some cases of one other door."""
    path = subject["path"]
    answers = [of_call("open_run", lambda: _open(path, subject, material))]
    # What `open_run` answered to accepted data is the data's outcome; the command can only be worse.
    accepted = answers[0].outcome if answers[0].outcome in (EQUAL, UNVERIFIED, DIFFERENT) else EQUAL
    refused = answers[0].outcome == CLEAR
    # A refusal is quick; an accepted run is analysed, and drawn, which takes seconds.
    more = (_analyze, _compare, _merge, _resave, *((_report, _export, _dashboard) if refused else ()))
    if refused or rng.random() < 0.25:
        answers.append(of_command(["check", path], accepted=accepted))
    if rng.random() < (0.3 if refused else 0.1):
        answers.append(rng.choice(more)(path, accepted))
    return answers


def _open(path: str, subject: Subject, material: Path) -> tuple[str, str]:
    from depthscope.diagnostics import schema
    from tests.fuzz.runs.base_runs import contents, difference

    with schema.open_run(path) as run:
        found = contents(run.load())
        integrity = schema.integrity(run)
    expected = pickle.loads((material / f"{subject['base']}.expected").read_bytes())
    differs = difference(found, expected)
    if subject.get("refuse"):
        return DIFFERENT, f"accepted what must be refused: {subject['refuse']}"
    if not differs:
        return EQUAL, integrity
    return (UNVERIFIED if integrity.startswith("not verified") else DIFFERENT), f"{differs} ({integrity})"


def _beside(path: str, name: str) -> str:
    return str(Path(path).parent / name)


def _analyze(path: str, accepted: str) -> Answer:
    return of_command(["analyze", path, "--json"], accepted=accepted)


def _compare(path: str, accepted: str) -> Answer:
    return of_command(["compare", path, path], accepted=accepted)


def _report(path: str, accepted: str) -> Answer:
    return of_command(["report", path, "--out", _beside(path, "report.html")], accepted=accepted)


def _export(path: str, accepted: str) -> Answer:
    return of_command(["export", path, "--out", _beside(path, "paper")], accepted=accepted)


def _resave(path: str, accepted: str) -> Answer:
    return of_command(["analyze", path, "--out", _beside(path, "copy.nc")], accepted=accepted)


def _merge(path: str, accepted: str) -> Answer:
    def call() -> tuple[str, str]:
        from depthscope.diagnostics import schema
        from depthscope.probes import merge_runs

        with schema.open_run(path) as run:
            merge_runs([run, run])
        return accepted, ""

    return of_call("merge_runs", call)


def _dashboard(path: str, accepted: str) -> Answer:
    def call() -> tuple[str, str]:
        import logging

        logging.disable(logging.CRITICAL)
        from depthscope.app.dashboard.state import run_library

        run_library.allow([Path(path).parent])
        readings: list[Any] = [run_library.read_run(name) for name in run_library.list_runs()]
        for reading in readings:
            if isinstance(reading, run_library.UnreadableRun) and reading.reason.startswith(
                "The analysis failed"
            ):
                raise RuntimeError(reading.reason)
        return accepted, ""

    return of_call("read_run", call)
