"""How does a run get from disk? Checked before any of it is believed; its arrays are read when they are used."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import xarray as xr

from depthscope.diagnostics.atomic_writes import kind_of
from depthscope.diagnostics.errors import AbsentError, InputError
from depthscope.diagnostics.schema.attributes import decode_dataset
from depthscope.diagnostics.schema.groups import chain_dataset, group_path
from depthscope.diagnostics.schema.joining import PARTS, join_parts, parts_of
from depthscope.diagnostics.schema.live_rows import LiveRows, Status
from depthscope.diagnostics.schema.live_store import (
    RUN_ID,
    STATES,
    is_live_store,
    live_log_of,
    newest_state,
)
from depthscope.diagnostics.schema.saving import LIVE, ORDER, SUFFIXES, short_names, suffix_of, without_suffix
from depthscope.diagnostics.schema.validation import SchemaError, validate
from depthscope.diagnostics.schema.zarr_stores import check_zarr

# Values as stored: a run has no dates, and no packed numbers. A unit such as "s" must not become a time span. Version 3 by
# name: a store that also has metadata of version 2 would be read by those, which were not checked.
_OPTIONS: dict[str, Any] = {
    **{"decode_times": False, "decode_timedelta": False, "mask_and_scale": False},
    **{"engine": "zarr", "consolidated": False, "zarr_format": 3},
}
# A run in a folder counts as one. A heuristic of ours: some seconds of reading.
MAX_ENTRIES = 200_000

POOLED_STEP = "pooled_step"
"""Attribute of /statistics: the step of its variables without a step and of the trace, where later steps have rows."""

RESUMED_AT = "resumed_at"
"""Attribute of a run: the steps at which a later attempt went on."""

Opened = TypeVar("Opened")


def open_run(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, checksums: bool = True
) -> xr.DataTree:
    """Open a saved run; arrays are read when they are used.

    Only what `save_run` writes is opened, whatever the store claims about itself: plain arrays of numbers and text, in the
    folder or file itself. Its metadata are checked first, then the checksum of every chunk.

    Parameters
    ----------
    path : path-like
        A ``.zarr`` folder, a ``.zarr.zip`` file, or the folder of a live store, which may be growing: its attribute ``live``
        tells. Of a folder with the parts of one run (``part-00000`` and so on) the run that they are parts of.
    max_bytes : int, optional
        Most bytes that all arrays of the run may have in memory; by default 256 MiB and 32 times the bytes on disk.
    checksums : bool
        Read every chunk once and compare it with its checksum. Without, each is compared when it is used, as of runs that are
        larger than memory.

    Returns
    -------
    DataTree

    Raises
    ------
    AbsentError
        Where the path does not exist.
    SchemaError
        For a damaged, foreign or newer run, for one with anything in it that a run does not have, and above `max_bytes`.
    """
    source, open_part = Path(path), partial(open_run, max_bytes=max_bytes, checksums=checksums)
    if is_live_store(source):
        with _path_named(source):
            return _open_live(source, open_part)
    if parts := parts_of(source):
        with _path_named(source):
            return _open_parts(parts, open_part)
    if not source.suffix and not source.exists():
        raise AbsentError(f"no run at {source}; a live store is there from its first measured step on")
    _require_present(source)
    run = open_tree(source, max_bytes=max_bytes, checksums=checksums)
    try:
        with _path_named(source):
            validate(run)
    except BaseException:
        run.close()  # the caller gets no tree that could be closed
        raise
    return run


def _open_parts(parts: Iterable[Path], open_part: Callable[[Path], xr.DataTree]) -> xr.DataTree:
    """The run whose parts are in a folder; a part that cannot be opened is named, and the others are shown."""
    runs: dict[str, xr.DataTree] = {}
    unreadable: dict[str, str] = {}
    for part in parts:
        try:
            runs[part.name] = open_part(part)
        except (SchemaError, AbsentError) as error:
            unreadable[part.name] = str(error)
    if not runs:
        raise SchemaError(f"no part of it can be opened: {next(iter(unreadable.values()))}")
    try:
        joined = join_parts(runs).load()
        if unreadable:
            facts = joined.attrs[PARTS]
            sentence = f"{facts['sentence']}; {', '.join(unreadable)} cannot be opened"
            joined.attrs[PARTS] = {**facts, "unreadable": unreadable, "sentence": sentence}
        validate(joined)
    finally:
        for run in runs.values():
            run.close()
    return joined


def _open_live(store: Path, open_state: Callable[[Path], xr.DataTree]) -> xr.DataTree:
    """Open a live store: what has a step is of its rows, read when they are used, and the rest of its newest state."""
    # Before the log: a writer saves the arrays of a step before its row.
    state = _opened_state(store, open_state)
    try:
        rows = LiveRows(store)
        status = rows.status(None if state is None else _step_of(state))
        if state is None or not rows.rows:
            raise SchemaError(f"no step was finished in it yet ({status.as_dict()['sentence']})")
        if state.attrs.pop(RUN_ID, None) != rows.run:
            raise SchemaError(
                f"its newest file in {STATES} is of another run than its log; copy the folder again"
            )
        try:
            opened = xr.DataTree.from_dict(_groups_with_rows(state, rows, status))
        except ValueError as error:  # unlike labels
            raise SchemaError(f"its rows do not fit to its saved arrays ({error})") from None
        validate(opened)
    except BaseException:
        if state is not None:
            state.close()
        raise
    opened.set_close(state.close)
    return opened


def _groups_with_rows(state: xr.DataTree, rows: LiveRows, status: Status) -> dict[str, xr.Dataset]:
    """Every group of a live store, with its attributes."""
    groups = rows.groups_of(state)
    if status.state_step != status.last_step:
        for path in {name.rpartition("/")[0] for name in rows.variables}:
            groups[path].attrs[POOLED_STEP] = status.state_step
    groups[""].attrs |= {"created": rows.created, LIVE: status.as_dict()}
    if rows.resumed:
        groups[""].attrs[RESUMED_AT] = rows.resumed
    return {f"/{path}": dataset for path, dataset in groups.items()}


def _opened_state(store: Path, open_state: Callable[[Path], Opened]) -> Opened | None:
    """The newest file with the arrays of one step, opened; None where none was saved yet."""
    for _ in range(5):
        state = newest_state(store)
        if state is None:
            return None
        try:
            return open_state(state)
        except (AbsentError, SchemaError):
            if os.path.lexists(state):
                raise
        # Its writer has just removed it for a newer one.
    raise SchemaError(f"{store}: its files change faster than they can be opened; try again")


def _step_of(run: xr.DataTree) -> int | None:
    """The last step of the statistics of a saved state."""
    steps = [
        node.to_dataset()["step"].values
        for node in run.subtree
        if node.path.startswith("/statistics") and node.sizes.get("step")
    ]
    return int(steps[0][-1]) if steps else None


def open_group(
    path: str | os.PathLike[str], group: str, chain: str = "", *, max_bytes: int | None = None
) -> xr.Dataset:
    """One group of a run that `open_run` has opened before; arrays are read when they are used.

    The metadata of a run with many metrics take seconds to read: for a look at its states alone this reads those of their
    group. Chunks are not compared with their checksums before they are read, and nothing is validated.

    ``chain``: the chain's name, empty where the run has one.
    Returns: Of a live store what its newest state has; where that has steps, they are of the state alone.
    Raises AbsentError: Where there is no such group.
    Raises SchemaError: For what `open_run` refuses.
    """
    source = Path(path)
    if is_live_store(source):
        opened = _opened_state(source, lambda state: open_group(state, group, chain, max_bytes=max_bytes))
        if opened is None:
            raise SchemaError(f"{source}: no step was finished in it yet")
        return opened
    if parts_of(source):
        found = chain_dataset(open_run(source, max_bytes=max_bytes), group, chain)
        if found is None:
            raise AbsentError(f"{source}: it has no group {group_path(group, chain)}")
        return found
    _require_present(source)
    tree = open_tree(source, group_path(group, chain), max_bytes=max_bytes, checksums=False)
    dataset = tree.to_dataset()
    dataset.set_close(tree.close)
    return dataset


def open_tree(
    path: Path, group: str = "", *, max_bytes: int | None = None, checksums: bool = True
) -> xr.DataTree:
    """A Zarr folder or zip file, or a group of it, as a decoded tree, whatever it is of, once it was checked.

    Raises SchemaError: With the path and what is wrong, for what `save_run` does not write.
    Raises AbsentError: Where there is no such group.
    """
    with _damage_named(path):
        mode, is_folder = os.stat(path).st_mode, path.name.endswith(".zarr")
        # Opening a pipe waits for ever, and a device has no end; links are followed.
        if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
            raise SchemaError(f"it is {kind_of(mode)}; expected {'a folder' if is_folder else 'a file'}")
        check_zarr(path, max_bytes, chunks=checksums)
        store = _store(path)
        datasets: dict[str, xr.Dataset] = {}
        try:
            waiting = [xr.open_datatree(store, group=group or None, **_OPTIONS)]
        except FileNotFoundError:  # the error of zarr for it
            raise AbsentError(f"{path}: it has no group {group}") from None
        while waiting:
            node = waiting.pop()
            datasets[node.path], order = _decoded(node.to_dataset(inherit=False))
            waiting += [node.children[name] for name in reversed(_sorted(node.children, order))]
        decoded = xr.DataTree.from_dict(datasets)
        decoded.set_close(store.close)
        return decoded


def _decoded(dataset: xr.Dataset) -> tuple[xr.Dataset, list[str]]:
    """A dataset with its variables as they were when it was saved, and the order of all that its group has."""
    decoded = decode_dataset(dataset)
    order = json.loads(decoded.attrs.pop(ORDER, "[]"))
    data = {name: decoded.variables[name] for name in _sorted(decoded.data_vars, order)}
    return xr.Dataset(data, {name: decoded.variables[name] for name in decoded.coords}, decoded.attrs), order


def _sorted(names: Iterable[Hashable], order: list[str]) -> list[str]:
    """Names in the order in which they were saved: a folder lists them in any."""
    place = {name: number for number, name in enumerate(order)} if isinstance(order, list) else {}
    return sorted(map(str, names), key=lambda name: (place.get(name, len(place)), name))


def _store(path: Path) -> Any:
    from zarr.storage import LocalStore, ZipStore

    return LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")


@contextmanager
def _path_named(path: Path) -> Iterator[None]:
    try:
        yield
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        with _path_named(path):
            yield
    except (SchemaError, AbsentError):
        raise
    # Each library has its own errors for a damaged store; RecursionError and MemoryError are among them.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SchemaError(
            f"{path}: it cannot be read ({reason}); copy it again from where it came"
        ) from error


def _require_present(source: Path) -> None:
    suffix_of(source)
    if not source.exists():
        log = live_log_of(source)
        hint = (
            f"the steps that were measured until its writer ended are in {log}"
            if is_live_store(log)
            else "list the runs of a folder with: depthscope dashboard FOLDER"
        )
        raise AbsentError(f"no run at {source}; {hint}")


def list_runs(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Saved runs below a folder, by their short names, see `short_names`; the path of a run gives that run.

    ``root``: a folder, or one run.
    Returns: In alphabetical order; links that leave the root are left out.
    Raises InputError: For a folder of more than `MAX_ENTRIES` files.
    """
    # Resolved, so that a root that is reached by a link is not itself taken for a place outside.
    base = Path(root).resolve()
    if _is_run(base) and base.exists():
        return {without_suffix(base.name): base}
    found: list[Path] = []
    num_entries = 0
    # Links to folders are not followed: they may lead in a circle.
    for place, folders, files in os.walk(base):
        num_entries += len(folders) + len(files)
        # The root of a disk would be read for minutes.
        if num_entries > MAX_ENTRIES:
            raise InputError(
                f"more than {MAX_ENTRIES} files up to {place}; name the folder that the runs are in"
            )
        # A name with a dot is a run that is being written, see `save_run`.
        entries = [Path(place, name) for name in (*folders, *files) if not name.startswith(".")]
        runs = [entry for entry in entries if _is_run(entry)]
        found += runs
        folders[:] = sorted({entry.name for entry in entries} - {run.name for run in runs} - {*files})
    # A dashboard may serve this folder to others: nothing outside it is offered.
    below = [path for path in sorted(found) if _is_below(base, path)]
    return dict(zip(short_names([str(path.relative_to(base)) for path in below]), below, strict=True))


def _is_run(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) or is_live_store(path) or bool(parts_of(path))


def _is_below(base: Path, entry: Path) -> bool:
    try:
        return entry.resolve().is_relative_to(base)
    except (OSError, RuntimeError):  # a link that leads in a circle
        return False
