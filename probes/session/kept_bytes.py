"""How many bytes does a forward keep for its backward? Counted in one more forward, without a hook on what autograd saves.

The same forward shows which weights get hardly anything but zeros, and batch norms whose data are others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.operations import OperationsShown
from depthscope.probes.model.preserved_state import preserved_attributes, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.while_needed import eager
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model
from depthscope.probes.session.session import Session
from depthscope.probes.session.zero_inputs import ZeroInputs

ZERO_INPUTS = "zero_inputs"
COMPILED = "the model is compiled: its kernels keep other tensors than the code as it is written"


class _Storages:
    """Weak references to every memory that operations made, with its size.

    Hooks on saved tensors would see less (what checkpoints and custom functions hold they do not save) and change more:
    they hide writes in place from autograd, and `torch.func` refuses to run below them.
    """

    def __init__(self) -> None:
        # Memory of weights, buffers and the batch, which is there without a backward.
        self.known: set[int] = set()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what an operation made."""
        for storage in _memory(tensors_in(result)):
            if storage._cdata not in self.known and storage._cdata not in self.made:
                # As long as the weak reference is there, the address is given to no other memory.
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count the memory of some tensors."""
        self.known.update(storage._cdata for storage in _memory(tensors))

    def kept(self) -> int:
        """Bytes of what is still there."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def _memory(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    """The memory of tensors; sparse ones, and those of subclasses that wrap others, have none of their own."""
    for tensor in tensors:
        if tensor.layout is torch.strided and type(tensor) in (torch.Tensor, nn.Parameter):
            yield tensor.untyped_storage()


def kept_bytes(session: Session, batch: Any, batch_size: int) -> dict[str, Any]:
    """Run a model once more with a graph, and count what only the graph of its outputs keeps alive.

    Weights, buffers and the batch do not count; outputs count where the backward needs them. A recomputed
    (checkpointed) block counts with what it keeps until then.

    ``session``: that measured this batch; its hooks are off.
    Returns: ``measured_kept_bytes`` and ``measured_tokens``, or ``not_measured``: why not; and `ZERO_INPUTS`, by kind, the
    modules whose inputs are odd.
    """
    model = session.model
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()) or hasattr(
        model, "_orig_mod"
    ):
        return {"not_measured": COMPILED}
    storages, zeros = _Storages(), ZeroInputs(model)
    try:
        # By name: their memory must not be given to another tensor before the end.
        held = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
        storages.know(held)
        with ExitStack() as stack:
            modes = (
                preserved_state(model),
                preserved_attributes(model),
                eager(),
                own_call(session.owner),
                torch.enable_grad(),
            )
            for mode in modes:
                stack.enter_context(mode)
            storages.know(model.buffers())  # the copies, which a forward of ours writes into
            graph = _graph_of_outputs(model, batch, storages, zeros)
    except Exception as error:
        return {"not_measured": f"one more forward failed: {type(error).__name__}: {without_frames(error)}"}
    if not graph:
        return {"not_measured": "no output of the model has a gradient"}
    kept = storages.kept()  # while `graph` holds the graph, and nothing holds the outputs
    del graph
    structure = session.structure
    first = torch.empty(structure.chains[0].shapes[0], device="meta")
    return {
        "measured_kept_bytes": kept,
        "measured_tokens": math.prod(structure.canonical(0, first, batch_size).shape[:2]),
        ZERO_INPUTS: zeros.modules(),
    }


def _graph_of_outputs(model: nn.Module, batch: Any, storages: _Storages, zeros: ZeroInputs) -> list[Any]:
    """The last nodes of the graph, without the outputs that they belong to."""
    with OperationsShown(zeros.note), OperationsShown(storages.note):
        output = call_model(model, batch)
    return [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
