"""What the model was called with: its arguments by name, and which tokens of them are real."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

Mask: TypeAlias = torch.Tensor | Callable[[Mapping[str, Any]], torch.Tensor] | None
REAL_MASKS = ("attention_mask",)
PADDING_MASKS = ("src_key_padding_mask", "key_padding_mask")


class CaptureError(RuntimeError):
    """A capture that could not be made, or that would be incomplete."""


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those behind ``**kwargs`` included."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a forward that hides its signature
        return dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.items():
        named |= value if isinstance(value, dict) and name not in kwargs else {name: value}
    return named


def is_decoding(arguments: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache that holds tokens, as the later steps of a generation do."""
    lengths = [getattr(value, "get_seq_length", None) for value in arguments.values()]
    return any(callable(length) and int(length()) > 0 for length in lengths)


def find_mask(arguments: Mapping[str, Any], given: Mask, prefix: str) -> torch.Tensor | None:
    """The mask (B, T), true on real tokens, that the user gave or that the arguments carry."""
    if given is not None:
        return (given(arguments) if callable(given) else given).bool()
    for name in REAL_MASKS:
        mask = arguments.get(prefix + name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask.bool() if not mask.is_floating_point() else mask > 0.5
    for name in PADDING_MASKS:
        mask = arguments.get(prefix + name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return ~mask if mask.dtype == torch.bool else mask == 0
    return None


def fit_mask(mask: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The mask on the state's device and tokens; a shape that does not fit is refused."""
    batch, tokens = state.shape[:2]
    if mask.shape[0] == batch and mask.shape[1] >= tokens:
        return mask[:, mask.shape[1] - tokens :].to(
            state.device
        )  # a decoding step's mask covers the past too
    if mask.shape[0] == batch and mask.shape[1] ** 2 == tokens:  # the state is one of pairs of tokens
        return (mask[:, :, None] & mask[:, None, :]).flatten(1).to(state.device)
    raise CaptureError(
        f"the mask has shape {tuple(mask.shape)}, the states have {batch} sequences of {tokens} tokens; "
        "pass mask= with one entry per token of the residual state"
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The state that a distributed tensor stands for; one that is split over processes is refused.

    Parameters
    ----------
    tensor : Tensor
        A state or a gradient.

    Returns
    -------
    Tensor

    Raises
    ------
    CaptureError
        For a sharded or partial state, whose norms and spectra are not those of the whole.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor
    if not all(placement.is_replicate() for placement in placements):
        raise CaptureError(
            f"a residual state is split over processes ({', '.join(map(str, placements))}); a part of it has other norms and "
            "spectra than the whole. Capture a model whose residual states are replicated, without sequence or tensor "
            "parallelism of the states"
        )
    return tensor.to_local()
