"""A loop: measure every so many steps of a training or an evaluation that the user runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xarray as xr
from torch import nn

from diagnostics import schema
from probes.accumulate import Sums, merged
from probes.capture import eager, raise_first, settings
from probes.inputs import CaptureError, Mask
from probes.record import Row, build_run
from probes.session import Session


class ProbeWarning(UserWarning):
    """A step could not be measured; the user's run goes on."""


class Recorder:
    """Measure the model inside a ``with`` block; `step` ends one step of the user's loop.

    Every measured step gives one row of ``/statistics`` (exact over all its tokens). The raw sequences in ``/trace`` are a
    uniform sample of all that the *present* weights have seen: over a whole evaluation all batches, in training the last
    measured step. Memory does not grow with the number of batches, but for the few numbers of each row.

    Parameters
    ----------
    session : Session
        The hooks.
    every : int
        Measure one step in so many.
    start_step, end_step : int
        First step to measure, and the step before which measuring stops.
    store : Path or None
        Where the run is saved when the block ends, on every path.
    attrs : mapping or None
        Attributes to add.
    """

    def __init__(
        self,
        session: Session,
        *,
        every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        store: Path | None = None,
        attrs: Mapping[str, Any] | None = None,
        token_text: Any = None,
    ):
        if every < 1:
            raise ValueError(f"every is {every}; expected 1 or more")
        self.errors: list[Exception] = []
        self.position = 0
        self._session = session
        self._every, self._start, self._end = every, start_step, end_step
        self._store, self._attrs, self._token_text = store, attrs, token_text
        self._rows: list[Row] = []
        self._pooled: list[Sums] = []
        self._pooled_stamp: int | None = None
        self._stack = ExitStack()
        self._inside = False

    def __enter__(self) -> Recorder:
        self._inside = True
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def step(self, loss: float | torch.Tensor | None = None) -> None:
        """End one step: keep what its forwards and backwards showed, and get ready for the next.

        Parameters
        ----------
        loss : float or Tensor, optional
            The step's loss, to be kept beside the statistics.
        """
        if not self._inside:
            raise CaptureError(
                "step() outside the block: use it inside `with probes.record(model) as recorder:`"
            )
        if self.measuring:
            self._fold(float(loss.detach()) if isinstance(loss, torch.Tensor) else loss)
        self.position += 1
        self._arm()

    @property
    def measuring(self) -> bool:
        """Whether the present step is measured."""
        since = self.position - self._start
        return since >= 0 and since % self._every == 0 and (self._end is None or self.position < self._end)

    @property
    def run(self) -> xr.DataTree:
        """The run so far.

        Raises
        ------
        CaptureError
            Where no step was measured whole; the first error says why.
        """
        if not self._rows:
            reason = f": {self.errors[0]}" if self.errors else "; call the model and then recorder.step()"
            raise CaptureError(f"no measured step is whole{reason}")
        return build_run(
            self._session, self._rows, self._pooled, attrs=self._attrs, token_text=self._token_text
        )

    def close(self) -> None:
        """Take the hooks off and save the run where a store was given; calling it twice is fine."""
        if not self._inside:
            return
        self._inside = False
        try:
            if self.measuring and self._session.pending:
                self._fold(None)  # a loop that ended before step() loses nothing that is whole
        finally:
            self._disarm()
        if self._store is not None and self._rows:
            schema.save_run(self.run, self._store)

    def _fold(self, loss: float | None) -> None:
        try:
            raise_first(self._session)
            parts = self._session.fold()
            if not parts:
                raise CaptureError("the model was not called between two steps; nothing to measure")
        except Exception as error:
            self._session.drop()
            self.errors.append(error)
            warnings.warn(f"step {self.position} was not measured: {error}", ProbeWarning, stacklevel=3)
            return
        sums: list[Sums] = []
        for part in parts:
            sums = merged(sums, part.sums)
            if part.stamp != self._pooled_stamp:
                self._pooled, self._pooled_stamp = [], part.stamp
            self._pooled = merged(self._pooled, part.sums)
        compact = [chain.compact() for chain in sums]
        self._rows.append(Row(self.position, compact, sum(part.batch_size for part in parts), loss))

    def _arm(self) -> None:
        self._disarm()
        if self.measuring:
            self._stack.enter_context(eager())
            self._session.attach()
            self._stack.callback(self._session.detach)

    def _disarm(self) -> None:
        self._stack.close()
        self._stack = ExitStack()


def record(
    model: nn.Module,
    *,
    every: int = 1,
    start_step: int = 0,
    end_step: int | None = None,
    gradients: bool = False,
    store: str | Path | None = None,
    layers: str | Iterable[str] | None = None,
    layout: str | None = None,
    streams: int | None = None,
    mask: Mask = None,
    max_sequences: int = 8,
    seed: int = 0,
    token_text: Any = None,
    attrs: Mapping[str, Any] | None = None,
) -> Recorder:
    """Measure a model while the user's own loop runs it.

    Nothing of the user's run changes: hooks return nothing, errors in them are reported by a `ProbeWarning` at the end of the
    step (and kept in ``recorder.errors``), and between measured steps no hook is on.

    Parameters
    ----------
    model : Module
        The model that the loop calls.
    every, start_step, end_step : int
        Which steps are measured.
    gradients : bool
        Keep the gradients that the loop's own backward gives; several forwards and backwards in a step add up.
    store : path-like, optional
        Where to save the run when the block ends; ``.nc`` is added where no ending is given.
    layers, layout, streams, mask, max_sequences, seed, token_text, attrs
        As in `probes.capture`.

    Returns
    -------
    Recorder
        Used as ``with probes.record(model) as recorder:``; its ``run`` is the result.
    """
    session = Session(model, settings(gradients, layers, layout, streams, mask, max_sequences, seed))
    path = None if store is None else Path(store)
    if path is not None and not path.name.endswith(schema.SUFFIXES):
        path = path.with_name(path.name + ".nc")
    return Recorder(
        session,
        every=every,
        start_step=start_step,
        end_step=end_step,
        store=path,
        attrs=attrs,
        token_text=token_text,
    )
