"""Is this call a stream connection, and of which family? Every family of `FAMILIES` is tried in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.families import FAMILIES
from depthscope.probes.connections.family import Family, ForwardFamily, PairedFamily, Site

PAIRED = [family for family in FAMILIES if isinstance(family, PairedFamily)]


def paired_family(module: nn.Module) -> PairedFamily | None:
    """The family whose two methods a module has, or None.

    The names of the methods only select which calls are looked at; whether they are a connection is decided by what the
    calls take and return.
    """
    for family in PAIRED:
        # The class and the dictionary first: to ask a module for what it lacks takes long, and there are thousands.
        if (
            hasattr(type(module), family.opens)
            or family.opens in vars(module)
            or family.opens in module._modules
        ):
            methods = getattr(module, family.opens, None), getattr(module, family.closes, None)
            if all(map(callable, methods)):
                return family
    return None


def returned_site(module: nn.Module, x: torch.Tensor | None, output: Any) -> Site | None:
    """Detect a forward connection by what a module took and returned.

    Returns: None for a paired connection too: its forward may return what a forward connection returns, but its methods
    are read.
    """
    # Streams have three axes at least (a sequence or token, the stream, the feature), and a connection returns two tensors:
    # the branch's input and weights.
    if x is None or x.ndim < 3 or not isinstance(output, (tuple, list, dict)):
        return None
    if paired_family(module) is not None:
        return None
    for family in FAMILIES:
        if isinstance(family, ForwardFamily):
            site = family.detect(module, x, output)
            if site is not None:
                return _declared(family, site)
    return None


def opened_site(family: PairedFamily, module: nn.Module, x: torch.Tensor, batch_size: int) -> Site | None:
    """Detect a paired connection by what its opening method took; None where the module has a single stream."""
    site = family.detect(module, x, batch_size)
    return None if site is None else _declared(family, site)


def _declared(family: Family, site: Site) -> Site:
    # An invariant of the family's own file: a name that it does not declare would reach every run unexplained.
    assert site.style == family.name
    assert site.family in family.constrains, (
        f"the family {family.name!r} declares no models named {site.family!r}"
    )
    return site


def past_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor | None
) -> list[torch.Tensor] | None:
    """The list of earlier states that a depth-history connection takes after the branch's output, or None."""
    if x is None or not args or args[0] is not x:
        return None
    for value in (*args[1:], *kwargs.values()):
        # By shape and type alone: whether these are states shows in which calls returned them.
        if isinstance(value, (list, tuple)) and value and all(_could_be_state(x, item) for item in value):
            return list(value)
    return None


def _could_be_state(x: torch.Tensor, item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.shape == x.shape and item.is_floating_point()
