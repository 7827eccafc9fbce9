"""How many bytes does a forward keep for its backward? Counted in one more forward, without a hook on what autograd saves.

The same forward shows batch norms whose data are others than those of their running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.model.tensors import OperationsShown, tensors_in
from depthscope.probes.session.compiled_model import is_compiled
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model
from depthscope.probes.session.session import Session

FOREIGN_NORMS = "foreign_norms"
COMPILED = "the model is compiled: its kernels keep other tensors than the code as it is written"

FEWEST = 8  # tokens, of fewer of which mean and deviation may be off by chance
# By which factor the standard deviation of a typical channel differs from the running one, or by how many of the running ones
# its mean is apart, where the statistics are those of other data. This project.
FOREIGN = 3.0
BATCH_NORM = torch.ops.aten.native_batch_norm.default
# The arguments of a batch norm in evaluation.
MEAN, VARIANCE, TRAINING = 3, 4, 5


class _Storages:
    """Weak references to every memory that operations made, with its size.

    Hooks on saved tensors would see less (what checkpoints and custom functions hold they do not save) and change more:
    they hide writes in place from autograd, and `torch.func` refuses to run below them.
    """

    def __init__(self) -> None:
        self.known: set[int] = set()  # of weights, buffers and the batch, which are there without a backward
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


def kept_bytes(session: Session, batch: Any) -> dict[str, Any]:
    """Run a model once more with a graph, and count what only the graph of its outputs keeps alive.

    Weights, buffers and the batch do not count; outputs count where the backward needs them. A recomputed
    (checkpointed) block counts with what it keeps until then.

    ``session``: that measured this batch; its hooks are off.
    Returns: ``measured_kept_bytes`` and ``measured_tokens``, or ``not_measured``: why not; and `FOREIGN_NORMS`, the
    batch norms whose running statistics are of other data.
    """
    model = session.model
    if any(map(is_compiled, model.modules())):
        return {"not_measured": COMPILED}
    storages, norms = _Storages(), NormInputs(model)
    try:
        # By name: their memory must not be given to another tensor before the end.
        held = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
        storages.know(held)
        with preserved_state(model), own_call(session.owner), torch.enable_grad():
            storages.know(model.buffers())  # the copies, which a forward of ours writes into
            with OperationsShown(norms.note), OperationsShown(storages.note):
                output = call_model(model, batch)
            # The last nodes of the graph, without the outputs that they belong to.
            graph = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
            del output
    except Exception as error:
        return {"not_measured": f"one more forward failed: {type(error).__name__}: {without_frames(error)}"}
    if not graph:
        return {"not_measured": "no output of the model has a gradient"}
    kept = storages.kept()  # while `graph` holds the graph, and nothing holds the outputs
    del graph
    structure, last = session.structure, session.step.last
    assert last is not None
    first = torch.empty(structure.chains[0].shapes[0], device="meta")
    return {
        "measured_kept_bytes": kept,
        "measured_tokens": math.prod(structure.canonical(0, first, last.batch_size).shape[:2]),
        FOREIGN_NORMS: norms.foreign(),
    }


class NormInputs:
    """What the batch norms of a model get, against their running statistics."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._norms: dict[int, str] = {}
        self._foreign: dict[str, bool] = {}

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a batch norm in evaluation took."""
        if func is not BATCH_NORM or args[TRAINING]:
            return
        taken, mean, variance = args[0], args[MEAN], args[VARIANCE]
        # Not before the forward, whose buffers are copies.
        self._norms = self._norms or {
            module.running_mean.untyped_storage()._cdata: name
            for name, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        }
        name = self._norms.get(mean.untyped_storage()._cdata)
        rows = taken.transpose(1, -1).flatten(0, -2).float()
        if name is None or len(rows) < FEWEST:
            return
        running = variance.float().sqrt()
        known = running > 0
        apart = ((rows.mean(0) - mean.float()).abs() / running)[known]
        factor = (rows.std(0) / running)[known]
        if factor.numel():
            ratio = float(factor.median())
            found = float(apart.median()) > FOREIGN or not 1 / FOREIGN < ratio < FOREIGN
            self._foreign[name] = self._foreign.get(name, True) and found

    def foreign(self) -> list[str]:
        """Those whose running statistics are of other data, in the order of the forward."""
        return [name for name, is_foreign in self._foreign.items() if is_foreign]
