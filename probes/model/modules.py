"""Which modules, parameters and arguments does a model have, and are they still the same? Each is listed once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.errors import CaptureError


def module_paths(model: nn.Module, *, shared: bool = False) -> list[tuple[str, nn.Module]]:
    """Every module of a model with its path, as torch's ``named_modules`` gives them; that is as many generators as levels.

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


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of a model, once, as `Module.parameters` gives them."""
    found = {
        id(p): p for _, module in module_paths(model) for p in module._parameters.values() if p is not None
    }
    return list(found.values())


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
    if not later and not offloaded and parameters and all(parameter.is_meta for parameter in parameters):
        raise CaptureError("the model is on the meta device, which holds no values; build it with values")


class PresentModules:
    """The modules of a model as they are now."""

    def __init__(self, model: nn.Module):
        modules = [module for _, module in module_paths(model) if module._modules]
        self._children = [(module, [*module._modules.values()]) for module in modules]

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


Mask: TypeAlias = torch.Tensor | Callable[[Mapping[str, Any]], torch.Tensor] | None

# The two conventions have opposite signs: transformers' masks are true on real tokens, torch's on padding.
REAL_TOKEN_MASK = "attention_mask"
PADDING_MASKS = ("src_key_padding_mask", "key_padding_mask")


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, including those that the forward collects in ``**kwargs``."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature to read, or a call that does not fit it
        return dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.items():
        # bind_partial collects what **kwargs takes in one dict, under a name that the caller did not use.
        if isinstance(value, dict) and name not in kwargs:
            named.update(value)
        else:
            named[name] = value
    return named


def find_mask(arguments: Mapping[str, Any], given: Mask, prefix: str) -> torch.Tensor | None:
    """The mask (B, T), true on real tokens: the user's ``given`` one, or the one among the arguments.

    ``prefix`` comes before the argument's name, as in ``decoder_attention_mask``.
    """
    if given is not None:
        return (given(arguments) if callable(given) else given).bool()
    for name in (REAL_TOKEN_MASK, *PADDING_MASKS):
        mask = arguments.get(prefix + name)
        # Masks with more axes are attention patterns (causal, per head), which do not show padding.
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            continue
        if name == REAL_TOKEN_MASK:
            return mask > 0.5 if mask.is_floating_point() else mask.bool()
        # A float padding mask is added to the attention logits: 0 on real tokens, -inf on padding.
        return ~mask if mask.dtype == torch.bool else mask == 0
    return None


def fit_mask(mask: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The mask on the state's device, cut or expanded to its tokens; other shapes are refused."""
    batch, tokens = state.shape[:2]
    if mask.shape[0] == batch and mask.shape[1] >= tokens:
        # A decoding step's mask covers the cached tokens too; the state has only the last ones.
        return mask[:, mask.shape[1] - tokens :].to(state.device)
    raise CaptureError(
        f"the mask has shape {tuple(mask.shape)}, the states have {batch} sequences of {tokens} tokens; "
        "pass mask= with one entry per token of the residual state"
    )
