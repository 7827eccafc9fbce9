"""Which modules does a model have? Each once, without the names, several times as fast as `Module.modules`."""

from __future__ import annotations

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
