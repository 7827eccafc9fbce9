"""When a loop has ended, does what its last measured step suspects do harm? The experiments of `settle`, on its last batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xarray as xr
from torch import nn

from depthscope.probes.session.compiled_model import CompiledModel
from depthscope.probes.session.forward import own_calls
from depthscope.probes.session.model_call import copied
from depthscope.probes.session.options import Options
from depthscope.probes.settling import settle

RESULTS = ("consequences", "remarks", "rescaled")


class SettledEnd:
    """Keeps a copy of the last measured batch, and tries it again when the loop has ended.

    ``options``: how it is read.
    ``forwards``: at most so many.
    """

    def __init__(self, model: nn.Module, options: Options, forwards: int):
        self._model, self._options, self._forwards = model, options, forwards
        self._batch: Any = None
        self.found: dict[str, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the arguments of the model's calls inside, of the last one that has a graph where one has."""
        handle = self._model.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An evaluation within a step of training is not what was measured.
        if own_calls.owner is None and (torch.is_grad_enabled() or self._batch is None):
            # A mapping where all arguments came by name: what else can be given again has no such form.
            given = kwargs if not args else args if not kwargs else None
            self._batch = None if given is None else copied(given)

    def settle(self, run: xr.DataTree) -> None:
        """Try what is suspected of a run with the weights of today, and keep the results."""
        batch, self._batch = self._batch, None
        if batch is None or CompiledModel(self._model).callers():
            return
        read = {name: getattr(self._options, name) for name in ("layers", "layout", "streams", "mask")}
        settled = settle(run, self._model, batch, forwards=self._forwards, **read)
        self.found = {
            name: settled.attrs[name] for name in RESULTS if settled.attrs.get(name) != run.attrs.get(name)
        }
