"""How is a script recorded that knows nothing of it? It runs unchanged, and the first model that it trains is found."""

from __future__ import annotations

import gc
import os
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from depthscope.probes.model.hooks import Attachment
from depthscope.probes.session.compiled_model import is_compiled
from depthscope.probes.session.step import living_scalers
from depthscope.probes.training.notices import warn
from depthscope.probes.training.record import record
from depthscope.probes.training.recorder import Recorder
from depthscope.probes.training.sinks import num_updated

Reference: TypeAlias = Callable[[], Any]  # a weak one
NOTED = "_per_optimizer_states"  # of a GradScaler, by the id of the optimizer; there is no public name


class ScriptWatch:
    """Record the first model that a script trains, from the third step of its optimizer on.

    The first step shows the modules that have parameters which it updated. In the second one they have hooks, and the model
    is, of those that were called with a graph, the one with most of these parameters; of several with the same one that was
    called in training mode, and of these the one that was called first. Hooks on every module there is, which would show it in
    the first step, are noticed by torch's compiler: it warns, and compiles anew when they leave. So steps are counted from 2.
    Where another optimizer takes the place of the first one, as in a second phase of the same training, its steps are counted
    from its second one on. Gradients are divided by the scale of the script's GradScaler.

    ``**options``: as of `depthscope.record`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._hooks: Attachment | None = None  # on the modules that may be the model
        # Modules with parameters that are updated, and whether each was in training mode, in the order of their calls.
        self._called: list[tuple[nn.Module, bool]] = []
        self._model = nn.Module()  # until it is found
        self._optimizer: Reference = lambda: None
        self._other: Reference = lambda: None  # that stepped since the one that counts did
        self.recorder: Recorder | None = None
        self.model = ""
        """Name of the class of the model that is recorded; empty before it is found."""
        self.error = ""

    def run(self, script: Path | str, arguments: Sequence[str], *, is_module: bool = False) -> None:
        """Run a script as ``python SCRIPT ARGUMENTS`` would; the store is finished when it ends, however it ends.

        ``script``: A Python file, or the name of a module.
        ``is_module``: whether a module is run, as ``python -m`` does.
        """
        steps = register_optimizer_step_post_hook(self._end_step)
        try:
            with _as_main(script, arguments, is_module=is_module):
                if is_module:
                    runpy.run_module(str(script), run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(script), run_name="__main__")
        finally:
            steps.remove()
            self._remove_hooks()
            if self.recorder is not None:
                self.recorder.__exit__(*sys.exc_info())

    def _end_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.recorder is not None:
            if self._counts(optimizer):
                self.recorder.step()
            return
        if self.error:
            return
        try:
            if self._optimizer() is optimizer:
                self._begin(optimizer)
            elif self._optimizer() is None:
                self._look(optimizer)
        except Exception as error:  # the script goes on
            self._report(error)

    def _report(self, error: Exception) -> None:
        self._remove_hooks()
        if not self.error:
            self.error = f"nothing is recorded: {error}"
            warn(self.error)

    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        """Put hooks on the modules whose parameters an optimizer updates, for one step."""
        self._remove_hooks()
        self._optimizer = weakref.ref(optimizer)
        # All of the process. By the type and not by isinstance, which asks an object for its class and may wake a proxy of the
        # user's. One whose __init__ has not run yet is none.
        modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in vars(m)]
        compiled = [module for module in modules if is_compiled(module)]
        # Inside of compiled code nothing of ours runs; the call of a module that was compiled in place is such code itself.
        inside = {id(each) for outer in compiled for each in outer.modules() if each is not outer}
        self._called = [(module, module.training) for module in compiled if num_updated(module, optimizer)]
        self._hooks = Attachment(self._report)
        for module in modules:
            if id(module) not in inside and num_updated(module, optimizer):
                self._hooks.before(module, self._note_call, computes=False)

    def _note_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not any(module is known for known, _ in self._called):
            self._called.append((module, module.training))

    def _remove_hooks(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks, self._called = None, []

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        counts = [(num_updated(module, optimizer), training, module) for module, training in self._called]
        found = max(counts, key=lambda each: each[:2], default=None)  # the first of those with the most
        if found is None:
            return
        self._remove_hooks()
        model = found[2]
        while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        enabled = living_scalers()
        if len(enabled) > 1:  # this runs inside of the step of one of them, which has noted its optimizer
            stepping = [found for found in enabled if id(optimizer) in getattr(found, NOTED, {})]
            enabled = stepping or enabled
        options = {"first_step": 2, **self._options}
        if options.get("metrics") is not None:
            options["optimizer"] = optimizer
        if len(enabled) == 1:
            options["scaler"] = enabled[0]
        elif enabled:
            options["gradients"] = False  # whose scale they have, nobody can tell
        self.recorder = record(model, **options).__enter__()
        self._model = model
        # And not that of what torch.compile returned.
        self.model = type(getattr(model, "_orig_mod", model)).__name__

    def _counts(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of an optimizer ends one of the training: of several of one model, one counts the steps."""
        if self._optimizer() is not optimizer:
            other, self._other = self._other(), weakref.ref(optimizer)
            if other is not optimizer or not num_updated(self._model, optimizer):
                return False
            # Twice in a row: the one that counted is not used any more.
            self._optimizer = self._other
        self._other = lambda: None
        return True


@contextmanager
def _as_main(script: Path | str, arguments: Sequence[str], *, is_module: bool) -> Iterator[None]:
    """What a script finds that Python itself runs: its arguments, and its folder first among those of modules.

    That of a module is the folder in which the command runs.
    """
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, os.getcwd() if is_module else str(Path(script).resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
