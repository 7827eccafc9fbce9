"""Which modules and parameters does a model have, and are they still the same? Each once, faster than by the walk of torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.errors import CaptureError


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of a model, once, parents before children.

    Torch's own walk is a generator inside of generators, as deep as the model, and joins the names on the way.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            waiting.extend(child for child in module._modules.values() if child is not None)
    return found


def module_paths(model: nn.Module, *, shared: bool = False) -> list[tuple[str, nn.Module]]:
    """Every module of a model with its path, as torch's ``named_modules`` gives them.

    ``shared``: whether a module that is in several places comes once for each of them.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if not shared:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found.append((path, module))
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            # Taken from the end, so that the first child comes first, with all that is in it.
            waiting += [(prefix + n, child) for n, child in reversed(children.items()) if child is not None]
    return found


def own_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that some modules own themselves, each once."""
    found = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return list(found.values())


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of a model, once: those that `Module.parameters` gives, in another order."""
    return own_parameters(all_modules(model))


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of modules that are given by their paths, by all of their names."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def require_module(model: object, *, later: bool = False) -> None:
    """Refuse what is no model, and one without values; a training may give a model its values later."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is of type {type(model).__name__}; expected a torch.nn.Module, such as the one that a function calls"
        )
    parameters = all_parameters(model)
    # Of an offloaded model hooks bring the values.
    offloaded = any(hasattr(module, "_hf_hook") for _, module in module_paths(model))
    if not later and parameters and all(parameter.is_meta for parameter in parameters) and not offloaded:
        raise CaptureError("the model is on the meta device, which holds no values; build it with values")


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
