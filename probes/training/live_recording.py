"""How do measured steps get to disk while the loop runs? Each row at once; the large arrays as often as it costs little."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import StorageError, TakenError
from depthscope.diagnostics.schema import LiveRows, is_live_store
from depthscope.diagnostics.schema.live_rows import MemoryRows
from depthscope.diagnostics.schema.live_store import LiveStore, live_log_of, require_live_place

STATE_SHARE = 0.01
"""The raw sequences and pooled sums are saved again when this share of the time since then is what saving them took."""

LOSS = "statistics/loss"
Run = Callable[[], xr.DataTree]
"""Makes a run."""


class LiveRecording:
    """The live store of one recorder, and the file that is written when its block ends.

    ``path``: a folder, or a file with an ending of `schema.SUFFIXES`, next to which the live store is until it is
    written.
    ``resume, force``: as in `LiveStore`.
    ``keep_states``: as in `LiveStore`.
    Raises StorageError: Where nothing can be written at the path; FileExistsError where what is there must stay.
    """

    def __init__(self, path: Path, *, resume: bool, force: bool, keep_states: int) -> None:
        self._file = path if path.name.endswith(schema.SUFFIXES) else None
        self._folder = path if self._file is None else live_log_of(path)
        self._options: dict[str, bool] = {"resume": resume, "force": force}
        self._force, self._keep_states = force, keep_states
        self._store: LiveStore | None = None
        self._is_open, self._is_taken = False, False
        self._num_written = self._num_noted = 0  # of the recorder's rows and findings
        self._has_state = False  # of this recorder
        self._state_cost = self._state_ended = 0.0  # seconds that saving it took, and when it was saved
        self._said = self._error = self._state_error = ""
        if self._file is not None:
            is_finished = resume and self._file.exists() and not is_live_store(self._folder)
            schema.require_replaceable(self._file, force=force or is_finished)
            if is_finished:
                raise TakenError(
                    f"{self._file} is a finished run, to which nothing can be added; resume a store without an ending, "
                    "which is a folder, or name another path"
                )
        require_live_place(self._folder, resume=resume, force=force)
        earlier = LiveRows(self._folder) if resume and is_live_store(self._folder) else None
        self.last_step = None if earlier is None else earlier.last_step
        self.earlier_attrs: dict[Any, Any] = {}  # of the run of earlier attempts
        if self.last_step is not None and schema.newest_state(self._folder) is not None:
            with schema.open_run(self._folder) as known:
                self.earlier_attrs = dict(known.attrs)
        self._earlier_losses: list[tuple[int, float]] = []
        if earlier is not None and LOSS in earlier.variables:
            steps, losses = earlier.steps.tolist(), earlier.column(LOSS).tolist()
            self._earlier_losses = list(zip(steps, losses, strict=True))

    def earlier_losses(self, before: int) -> list[float]:
        """The losses of earlier attempts, of the steps before one."""
        return [loss for step, loss in self._earlier_losses if step < before]

    @property
    def path(self) -> Path:
        """Where the steps are while they are measured."""
        return self._folder

    def open(self) -> None:
        """Open the store, as the block begins."""
        try:
            self._store = LiveStore(self._folder, **self._options, keep_states=self._keep_states)
        except BlockingIOError:
            # For good: whoever holds it goes on with the rows that this recorder would supersede.
            self._is_taken = True
            raise
        self._is_open = True

    def write(self, history: MemoryRows, state: Run) -> str | None:
        """Write the rows that are not written yet, and sometimes the large arrays.

        ``state``: makes the run of the last row.
        Returns: What went wrong; the same is said once.
        """
        if self._is_taken:
            return None
        try:
            try:
                self._write(history, state)
            except FileNotFoundError:
                if not self._is_open:
                    raise
                # The folder has gone: all steps again, into a new one. What somebody else put there meanwhile stays.
                if self._store is not None:
                    self._store.close()
                self._store, self._num_written, self._num_noted, self._options = None, 0, 0, {}
                self._write(history, state)
        except Exception as error:  # the training goes on, and the next measured step tries again
            self._error = str(error)
            return self._once(
                f"the steps are not written to {self._folder} ({error}); they are in recorder.run, and every measured step "
                "tries again"
            )
        if self._state_error:
            return self._once(
                f"the raw sequences are not saved to {self._folder} ({self._state_error}); the numbers of all steps are, and "
                "saving them is tried again"
            )
        if self._said:
            self._said = ""
            return f"all steps are written to {self._folder} again"
        return None

    def _once(self, sentence: str) -> str | None:
        known, self._said = self._said, sentence
        return None if sentence == known else sentence

    def _write(self, history: MemoryRows, state: Run) -> None:
        if self._store is None:
            self.open()
        store = self._store
        assert store is not None
        began = time.monotonic()
        is_due = STATE_SHARE * (began - self._state_ended) >= self._state_cost
        if not self._has_state or not store.has_state or is_due:
            try:
                store.save_state(state())
                self._state_error = ""
            except (OSError, MemoryError) as error:
                # The numbers of the step need less room than its arrays.
                if not store.has_state:
                    raise
                self._state_error = str(error)
            self._has_state, self._state_ended = True, time.monotonic()
            self._state_cost = self._state_ended - began
        for number in range(self._num_written, len(history.rows)):
            store.append(*history.row(number))
            self._num_written += 1
        self._note(store, history)

    def _note(self, store: LiveStore, history: MemoryRows) -> None:
        store.note(history.findings[self._num_noted :])
        self._num_noted = len(history.findings)

    def finish(self, history: MemoryRows, build: Run, run: Run) -> None:
        """End writing: the final arrays, or the file in place of the live store.

        ``build``: makes the run of the last row.
        ``run``: makes that of all of them.
        Raises Exception: Where something was not written. What the live store has stays.
        """
        store, self._store = self._store, None
        missing = len(history.rows) - self._num_written
        complete = None if missing else store
        try:
            if complete is not None and history.rows:
                self._note(complete, history)  # of the last row, which may be judged when the block ends
                complete.save_state(build())
            if not history.rows:
                if store is not None and store.last_step is not None:
                    store.finish()
            elif self._file is not None:
                self._save_file(self._file, complete, run)
            elif complete is None:
                raise StorageError(f"{missing} steps are not in {self._folder} ({self._error})")
            else:
                complete.finish()
        finally:
            self._end(store)

    def _save_file(self, file: Path, complete: LiveStore | None, run: Run) -> None:
        if complete is None:
            schema.save_run(run(), file, force=self._force)
        else:  # with the rows of earlier attempts, which this recorder never had
            with schema.open_run(self._folder) as whole:
                schema.save_run(whole, file, force=self._force)
        self._force = True  # where the block is entered once more, the file is this recorder's
        if complete is not None:
            complete.remove()

    def _end(self, store: LiveStore | None) -> None:
        if store is not None and store.last_step is None:
            with suppress(OSError):  # it has gone, or another one is in its place
                store.remove()  # nothing came of it, and another recorder may begin here
        if store is not None:
            store.close()
        # Where the block of the same recorder is entered once more.
        self._options = {"resume": self._file is None}
        if self._file is not None:
            self._num_written = self._num_noted = 0
