"""How a user's model is called with a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.modules import all_parameters
from depthscope.probes.model.tensors import mapped


def batches(batch: Any) -> Iterator[Any]:
    """The batches in what a user passes.

    ``batch``: one batch or an iterable of them.
    """
    # Objects that hold tensors, as the graphs of torch_geometric do, can be moved to a device; loaders of batches cannot.
    if isinstance(batch, (Mapping, torch.Tensor, tuple)) or is_dataclass(batch) or hasattr(batch, "to"):
        yield batch
    elif isinstance(batch, Iterable):
        yield from batch
    else:
        raise CaptureError(
            f"got a batch of type {type(batch).__name__}; expected a mapping, a tensor, a tuple, a dataclass or "
            "an object with a method to() that holds tensors, or an iterable of these"
        )


def copied(batch: Any) -> Any:
    """The batch with tensors of its own: one of them may be the first state, or be written by the model."""
    return mapped(batch, lambda tensor: tensor.detach().clone())


def call_model(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch: a mapping is passed as keywords, a tuple or list as positional arguments.

    An object is passed as a copy, as a model of graphs may put its states where it found their features.
    """
    # Torch's encoders run on a padded batch as it is: their kernel would make a nested tensor of it.
    was_on = torch.backends.mha.get_fastpath_enabled()
    packs = any(isinstance(part, nn.TransformerEncoder) for part in model.modules())
    torch.backends.mha.set_fastpath_enabled(was_on and not packs)
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (tuple, list)):
            return model(*batch)
        return model(batch if isinstance(batch, torch.Tensor) else copy.copy(batch))
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


def with_gradients(batch: Any) -> Any:
    """The batch with copies of its floating leaves that require gradients, so that the first state has one too."""
    if isinstance(batch, torch.Tensor):
        # A copy, since the flag would stay on the user's tensor, and no leaf, which a model that writes into its input may not
        # write into; one with a history of its own carries a gradient already.
        is_copied = batch.is_floating_point() and batch.is_leaf
        return batch.detach().requires_grad_().clone() if is_copied else batch
    if isinstance(batch, Mapping):
        # A mask that requires gradients would switch fused attention off.
        return {name: of if "mask" in str(name) else with_gradients(of) for name, of in batch.items()}
    return type(batch)(with_gradients(value) for value in batch) if type(batch) in (tuple, list) else batch


@contextmanager
def graph_of_frozen(model: nn.Module, wanted: bool, *, each: bool = False) -> Iterator[None]:
    """Let a model whose parameters are all frozen carry gradients during the capture; else its states have no graph.

    ``each``: whether frozen parameters next to others carry gradients too.
    """
    parameters = [p for p in all_parameters(model) if p.is_floating_point()] if wanted else []
    frozen = [p for p in parameters if not p.requires_grad and p.is_leaf]
    if len(frozen) < len(parameters) and not each:
        frozen = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
