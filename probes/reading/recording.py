"""A recorder around one forward of a model, whose calls it is told by hooks of torch on all modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as hooked

from depthscope.probes.reading.recorder import GraphRecorder


@contextmanager
def recording(recorder: GraphRecorder) -> Iterator[None]:
    """Record the forward of a model that runs inside; hooks of torch on all modules note the calls."""

    def enter(module: nn.Module, args: Any) -> None:
        path = recorder.paths.get(id(module))
        if path is not None:
            recorder.enter(path, module, args, {})

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path = recorder.paths.get(id(module))
        if path is not None:
            recorder.leave(path, output)

    before = hooked.register_module_forward_pre_hook(enter)
    after = hooked.register_module_forward_hook(leave, always_call=True)
    try:
        with recorder, warnings.catch_warnings():
            # Of a model that torch.compile returned, whose own call is noted as well as that of the model inside.
            warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")
            yield
    finally:
        before.remove()
        after.remove()
