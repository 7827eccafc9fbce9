"""Whether layers came, went or were replaced while hooks were on the others."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.modules import module_paths


class PresentModules:
    """The modules of a model as they are now.

    ``above``: paths of modules; only the modules that contain these are compared. All, where it is None.
    """

    def __init__(self, model: nn.Module, above: Iterable[str] | None = None):
        modules = dict(module_paths(model, shared=True))
        if above is None:
            paths = {path for path, module in modules.items() if module._modules}
        else:
            direct = {path.rpartition(".")[0] for path in above}
            paths = (
                direct | {path[: dot.start()] for path in direct for dot in re.finditer(r"\.", path)} | {""}
            )
        self._children = [(modules[path], [*modules[path]._modules.values()]) for path in sorted(paths)]

    def require_same(self) -> None:
        """Require that they are the same: a new layer has no hooks."""
        for module, children in self._children:
            if [*module._modules.values()] != children:  # modules are equal where they are one object
                raise CaptureError(
                    f"layers of {type(module).__name__} came, went or were replaced within the step; change a model between "
                    "two steps, before recorder.step()"
                )


def module_types(model: nn.Module) -> frozenset[tuple[str, type]]:
    """Which modules a model has: what changes where layers are added, dropped, wrapped or parametrised."""
    return frozenset([(path, type(module)) for path, module in module_paths(model, shared=True)])
