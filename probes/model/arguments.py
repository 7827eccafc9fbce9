"""What was the model called with? Its arguments by name, and the mask of real tokens among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError

Mask: TypeAlias = torch.Tensor | Callable[[Mapping[str, Any]], torch.Tensor] | None

# The two conventions have opposite signs: transformers' masks are true on real tokens, torch's on padding.
REAL_TOKEN_MASKS = ("attention_mask",)
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


def is_decoding(arguments: Mapping[str, Any]) -> bool:
    """Whether a call continues from a non-empty cache, as every step of a generation after the first does."""
    # get_seq_length is the method that all cache classes of transformers share.
    lengths = [getattr(value, "get_seq_length", None) for value in arguments.values()]
    return any(callable(length) and int(length()) > 0 for length in lengths)


def find_mask(arguments: Mapping[str, Any], given: Mask, prefix: str) -> torch.Tensor | None:
    """The mask (B, T), true on real tokens: the user's ``given`` one, or the one among the arguments.

    ``prefix`` comes before the argument's name, as in ``decoder_attention_mask``.
    """
    if given is not None:
        return (given(arguments) if callable(given) else given).bool()
    # Masks with more axes are attention patterns (causal, per head), which do not show padding.
    for name in REAL_TOKEN_MASKS:
        mask = arguments.get(prefix + name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask > 0.5 if mask.is_floating_point() else mask.bool()
    for name in PADDING_MASKS:
        mask = arguments.get(prefix + name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            # A float padding mask is added to the attention logits: 0 on real tokens, -inf on padding.
            return ~mask if mask.dtype == torch.bool else mask == 0
    return None


def fit_mask(mask: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The mask on the state's device, cut or expanded to its tokens; other shapes are refused."""
    batch, tokens = state.shape[:2]
    if mask.shape[0] == batch and mask.shape[1] >= tokens:
        # A decoding step's mask covers the cached tokens too; the state has only the last ones.
        return mask[:, mask.shape[1] - tokens :].to(state.device)
    if mask.shape[0] == batch and mask.shape[1] ** 2 == tokens:
        # A pair state (as in protein models) has one entry per ordered pair of tokens: real where both are.
        return (mask[:, :, None] & mask[:, None, :]).flatten(1).to(state.device)
    raise CaptureError(
        f"the mask has shape {tuple(mask.shape)}, the states have {batch} sequences of {tokens} tokens; "
        "pass mask= with one entry per token of the residual state"
    )
