"""How is a script recorded that knows nothing of it? It runs unchanged, and the first model that it trains is found."""

from __future__ import annotations

import gc
import runpy
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from depthscope.probes.training.record import record
from depthscope.probes.training.recorder import ProbeWarning, Recorder


class ScriptWatch:
    """Record the first model that a script trains, from the step after the first one of its optimiser on.

    The model is, of all modules that were called in training mode with a graph, the one with most of the parameters that the
    first optimiser updates; of several with the same, the one that was called first. A step is one of that optimiser; the
    first one only shows the model, so that steps are counted from 1. Gradients are divided by the scale of the script's
    GradScaler.

    Parameters
    ----------
    **options
        As of `depthscope.record`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._called: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._calls: Any = None  # the handle of the hook on every module, until the model is found
        self.recorder: Recorder | None = None
        self.model = ""
        """Name of the class of the model that is recorded; empty before it is found."""
        self.error = ""

    def run(self, script: Path, arguments: Sequence[str]) -> None:
        """Run a script as ``python SCRIPT ARGUMENTS`` would; the store is finished when it ends, however it ends.

        Parameters
        ----------
        script : Path
            A Python file.
        arguments : sequence of str
            Its own.
        """
        self._calls = register_module_forward_pre_hook(self._note_call)
        steps = register_optimizer_step_post_hook(self._end_step)
        try:
            with _as_main(script, arguments):
                runpy.run_path(str(script), run_name="__main__")
        finally:
            steps.remove()
            self._calls.remove()
            if self.recorder is not None:
                self.recorder.__exit__(*sys.exc_info())

    def _note_call(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and module not in self._called:
            self._called[module] = len(self._called)

    def _end_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.recorder is not None:
            # Of several optimisers of one model, one counts the steps.
            if self._optimizer is not None and self._optimizer() is optimizer:
                self.recorder.step()
            return
        if self.error:
            return
        try:
            self._begin(optimizer)
        except Exception as error:  # the script goes on
            self.error = f"nothing is recorded: {error}"
            warnings.warn(self.error, ProbeWarning, stacklevel=2)

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        model = self._trained_by(optimizer)
        if model is None:
            return
        self._calls.remove()
        # By their type: isinstance asks the objects themselves, some of which answer with a warning.
        scalers: list[Any] = [
            found for found in gc.get_objects() if issubclass(type(found), torch.amp.GradScaler)
        ]
        enabled = [scaler for scaler in scalers if scaler.is_enabled()]
        options = {"first_step": 1, **self._options}
        if len(enabled) == 1:
            options["scaler"] = enabled[0]
        elif enabled:
            options["gradients"] = False  # whose scale they have, nobody can tell
        self.recorder = record(model, **options).__enter__()
        self.model, self._optimizer = type(model).__name__, weakref.ref(optimizer)

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> nn.Module | None:
        updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        counts = {
            module: sum(id(parameter) in updated for parameter in module.parameters())
            for module in sorted(self._called, key=self._called.__getitem__)
        }
        found = max(counts, key=counts.__getitem__, default=None)  # the first of those with the most
        if found is None or not counts[found]:
            return None
        while isinstance(found, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            found = found.module
        return found


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """What a script finds that Python itself runs: its arguments, and its folder first among those of modules."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
