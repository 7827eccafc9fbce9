"""What of a probe is still on a model, or alive at all?"""

from __future__ import annotations

import gc

import torch
from torch import nn

MODULE_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
)


def is_ours(value: object) -> bool:
    """Whether an object is of a class of ours."""
    return type(value).__module__.startswith("depthscope.")


def hooks_on_model(model: nn.Module) -> int:
    """Entries of ours in the dictionaries of a model's modules, parameters and buffers, wrapped methods among them."""
    found = 0
    for module in model.modules():
        tables = [getattr(module, name) or {} for name in MODULE_HOOKS]
        found += sum(is_ours(hook) for hooks in tables for hook in hooks.values())
        found += sum(is_ours(value) for value in vars(module).values())
    return found + hooks_on_tensors([*model.parameters(), *model.buffers()])


def hooks_on_tensors(tensors: list[torch.Tensor]) -> int:
    """Gradient hooks of ours on some tensors."""
    tables = [
        (t._backward_hooks or {}, getattr(t, "_post_accumulate_grad_hooks", None) or {}) for t in tensors
    ]
    return sum(is_ours(hook) for pair in tables for hooks in pair for hook in hooks.values())


def alive() -> list[str]:
    """Hooks and wrapped methods of ours that are referenced by anything, such as a node of a graph.

    torch shows the hooks of a node to nobody; so whatever they hold is looked for among all living objects.
    """
    gc.collect()
    names = ("Hook", "WatchedMethod")
    return [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in names and is_ours(o)]
