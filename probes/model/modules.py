"""Which modules and parameters does a model have? Each once, without the names, several times as fast as torch's own walk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn


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


def is_planned(model: nn.Module) -> bool:
    """Whether a model is on the meta device as a whole, and not offloaded: hooks bring the values of that one."""
    parameters = all_parameters(model)
    offloaded = any(hasattr(module, "_hf_hook") for _, module in module_paths(model))
    return bool(parameters) and all(parameter.is_meta for parameter in parameters) and not offloaded
