"""How far does one step move each module? Squared norms of its weights, of their gradient and of their update.

A gradient is read right after the backward has accumulated it, so that what the loop does with it later (clipping, unscaling,
``zero_grad``) changes nothing. Hooks leave their numbers on the device; `WeightUpdates.end` reads them back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.hooks import Hook
from depthscope.probes.model.tensors import here, version

# Elements that are converted to float64 at a time, so that no weight is copied at once: as many as fit into a CPU's cache,
# and enough to make launching a kernel worth it elsewhere.
CHUNK_CPU, CHUNK_GPU = 2**16, 2**22
VARIABLES = ("weight_square_norm", "weight_gradient_square_norm", "weight_update_square_norm")


@dataclass(frozen=True)
class WeightNorms:
    """The squared norms of one step, one entry per module; NaN is undefined."""

    paths: tuple[str, ...]  # modules that own parameters
    counts: np.ndarray  # number of elements of each
    values: Mapping[str, np.ndarray]  # by the names of `VARIABLES`
    overflowed: bool  # whether a gradient had an infinity or a NaN
    skipped: Mapping[str, int]  # number of parameters that could not be measured, by the reason
    frozen: tuple[str, ...] = ()  # modules none of whose parameters is trained

    def without_gradient(self) -> WeightNorms:
        """The same norms with undefined gradients."""
        undefined = np.full(len(self.paths), math.nan)
        return replace(self, values={**self.values, "weight_gradient_square_norm": undefined})


@dataclass(frozen=True)
class _Before:
    """One parameter before the step; frozen ones are not copied."""

    parameter: nn.Parameter
    version: int | None
    copy: torch.Tensor | None


class WeightUpdates:
    """Measures the weights of one model: `begin` starts a step, `end` returns its norms.

    Between the two every trainable weight is in memory twice. A parameter that two modules share counts for the first of them.

    ``model``: the model; its parameters are only read.
    ``scale``: returns the factor that the loss of the running backward was multiplied by, a tensor, or None for 1.
    ``share``: where several processes measure: by which factor the numbers of a parameter, or of the shard that is
    here, are multiplied, so that their sum over the processes is that of the model; None where such a factor does not
    exist.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: Callable[[], torch.Tensor | None],
        share: Callable[[nn.Parameter], float | None] | None = None,
    ):
        self._model = model
        self._scale = scale
        self._share = share
        self._shares: dict[str, float] = {}
        # Whose gradients are read when the backward has ended.
        self._reduced_later: dict[str, nn.Parameter] = {}
        self._owners: dict[str, list[str]] = {}
        for name, _ in model.named_parameters():
            self._owners.setdefault(name.rpartition(".")[0], []).append(name)
        self._before: dict[str, _Before] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._reasons: dict[str, str] = {}
        self._errors: list[Exception] = []
        self._stack = ExitStack()

    def begin(self) -> None:
        """Copy the trainable weights and hook their gradients; an error is raised by `end`."""
        self.drop()
        try:
            # With duplicates: a parameter may have been tied to another one since the names were collected.
            parameters = dict(self._model.named_parameters(remove_duplicate=False))
            for names in self._owners.values():
                for name in names:
                    self._copy(name, parameters.get(name))
            known = {id(of.parameter) for of in self._before.values()}
            added = {name for name, p in parameters.items() if id(p) not in known} - set(self._reasons)
            self._reasons.update(dict.fromkeys(added, "not in the model when the recorder was made"))
        except Exception as error:  # such as out of memory for the copy: the user's run must go on
            self.drop()
            self._errors.append(error)

    def end(self) -> WeightNorms:
        """Measure what changed since `begin`, and release everything; an error that `begin` or a hook met is raised."""
        try:
            if self._errors:
                raise self._errors[0]
            self._leave_out_replaced()
            norms = _read_back({name: square_norm(here(of.parameter)) for name, of in self._before.items()})
            gradients = _read_back(self._gradients)
            counts = {name: float(here(of.parameter).numel()) for name, of in self._before.items()}
            values = (norms, gradients, self._updates())
            return WeightNorms(
                paths=tuple(self._owners),
                counts=self._by_module(counts),
                values={name: self._by_module(each) for name, each in zip(VARIABLES, values, strict=True)},
                overflowed=not all(map(math.isfinite, gradients.values())),
                skipped=Counter(self._reasons.values()),
                frozen=tuple(path for path, names in self._owners.items() if self._is_frozen(names)),
            )
        finally:
            self.drop()

    def _leave_out_replaced(self) -> None:
        """Leave out the parameters that the model no longer has, whose copies say nothing about its weights."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name, of in list(self._before.items()):
            if parameters.get(name) is not of.parameter:
                self._reasons[name] = "replaced during the step"
                self._gradients.pop(name, None)
                del self._before[name]

    def drop(self) -> None:
        """Remove the hooks and discard the step; calling it twice is fine."""
        self._stack.close()
        self._stack = ExitStack()
        self._before, self._gradients, self._reasons = {}, {}, {}
        self._shares, self._reduced_later = {}, {}
        self._errors = []  # a new list: a hook that still runs in another thread writes to the old one

    def _copy(self, name: str, parameter: nn.Parameter | None) -> None:
        reason = "gone from the model" if parameter is None else self._unreadable(name, parameter)
        if parameter is None or reason:
            self._reasons[name] = reason
            return
        trained = parameter.requires_grad
        copy = here(parameter).detach().clone() if trained else None
        self._before[name] = _Before(parameter, version(parameter), copy)
        if trained:
            # After the accumulation, so that several backwards of a step, and tied weights, are summed in .grad.
            receive = self._add_gradient if self._share is None else self._read_later
            hook = Hook(partial(receive, name), self._errors.append)
            self._stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)

    def _unreadable(self, name: str, parameter: nn.Parameter) -> str:
        """The reason why a parameter cannot be read; of a shard, why it cannot be added to the others."""
        if self._share is None:
            return unreadable(parameter)
        share = self._share(parameter)
        if share is None:
            return "sharded over other processes than those that measure (DTensor)"
        self._shares[name] = share
        return unreadable(here(parameter))

    def _read_later(self, name: str, parameter: nn.Parameter) -> None:
        """Read the gradient when the backward has ended: only then it is that of all processes."""
        first = not self._reduced_later
        self._reduced_later[name] = parameter
        if first:
            # Data parallelism writes the reduced gradients in a callback of its own, which may be queued after this one, and
            # before the one that this one queues.
            read = Hook(self._read_reduced, self._errors.append)
            _at_end_of_backward(Hook(partial(_at_end_of_backward, read), self._errors.append))

    def _read_reduced(self) -> None:
        arrived, self._reduced_later = self._reduced_later, {}
        for name, parameter in arrived.items():
            self._add_gradient(name, parameter)

    def _add_gradient(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            self._reasons[name] = "gradient freed inside the backward, as by an optimizer in a hook"
            return
        square, scale = square_norm(here(parameter.grad)), self._scale()
        if getattr(parameter.grad, "placements", None) != getattr(parameter, "placements", None):
            # Such as a gradient that every process has all of, of a weight that is sharded.
            share = None if self._share is None else self._share(parameter.grad)
            if share is None:
                self._reasons[name] = "gradient placed otherwise than the weight over processes (DTensor)"
                return
            square = square * (share / self._shares[name])
        if scale is not None:
            square = square / scale.to(square.device, torch.float64, non_blocking=True).square()
        self._gradients[name] = square

    def _updates(self) -> dict[str, float]:
        """Squared distances to the copies; empty where no weight was written, as without an optimizer step in between."""
        trained = {name: of for name, of in self._before.items() if of.copy is not None}
        distances = _read_back({name: _square_distance(of) for name, of in trained.items()})
        # The version counter tells a step that changed nothing (update 0) from no step (undefined). A write through .data
        # does not count, so that the distances are looked at too.
        written = any(version(of.parameter) != of.version for of in trained.values())
        return distances if written or any(distances.values()) else {}

    def _is_frozen(self, names: list[str]) -> bool:
        """Whether all parameters of a module are known and none is trained."""
        return all(name in self._before and self._before[name].copy is None for name in names)

    def _by_module(self, values: Mapping[str, float]) -> np.ndarray:
        """Sums over the parameters of each module; NaN where one could not be read, or none has a value."""
        sums = []
        for names in self._owners.values():
            known = [values[name] * self._shares.get(name, 1.0) for name in names if name in values]
            readable = all(name in self._before for name in names)
            sums.append(math.fsum(known) if known and readable else math.nan)
        return np.array(sums)


class LossScale:
    """The scale of a gradient scaler, read as a tensor inside the backward, before the scaler changes it.

    ``scaler``: the scaler that multiplies the user's loss.
    Raises InputError: For something that is not a ``torch.amp.GradScaler``.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None):
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise InputError(
                f"scaler is a {type(scaler).__name__}; expected the torch.amp.GradScaler that scales the loss"
            )
        self._scaler = scaler
        self._first: torch.Tensor | None = None  # of the present step

    def __call__(self) -> torch.Tensor | None:
        """The present scale, on the scaler's device; divide by it at once, since ``scaler.update`` overwrites it.

        Returns: None without a scaler, with a disabled one, and before it scaled anything.
        """
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        # The private tensor: get_scale() reads it back, and inside a backward nothing may wait for the device.
        scale = self._scaler._scale
        if self._first is None and scale is not None:
            self._first = scale.detach().clone()
        return scale

    def end(self) -> float | None:
        """End a step: the scale of its first gradient, read back from the device; None where no gradient was divided."""
        first, self._first = self._first, None
        return None if first is None else float(first)


def square_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The squared Frobenius norm of a floating tensor, dense or sparse, in float64 and on its device."""
    squares = []
    for chunk in _chunks(tensor):
        values = chunk.double()
        squares.append(torch.dot(values, values))  # without a copy for the squares
    return torch.stack(squares).sum()


def _at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the running backward has ended, after those that asked for it earlier."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _square_distance(of: _Before) -> torch.Tensor:
    assert of.copy is not None
    squares = []
    for now, before in zip(_chunks(here(of.parameter)), _chunks(of.copy), strict=True):
        difference = now.to(torch.float64, copy=True).sub_(before)
        squares.append(torch.dot(difference, difference))
    return torch.stack(squares).sum()


def _chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        # A sparse gradient has a row as often as its token occurs; they add up
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.reshape(-1).split(CHUNK_CPU if tensor.device.type == "cpu" else CHUNK_GPU)


def unreadable(parameter: nn.Parameter) -> str:
    """The reason why a parameter cannot be read in this process; empty where it can."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "not initialised yet"
    if parameter.is_meta:
        return "on the meta device, offloaded"
    if hasattr(parameter, "device_mesh"):  # a DTensor, whose import would need torch.distributed
        return "sharded over processes (DTensor)"
    if isinstance(parameter, FakeTensor):
        return "a fake tensor, without values"
    if type(parameter).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a tensor of a class of its own, quantised ({type(parameter).__name__})"
    return "" if parameter.is_floating_point() or parameter.is_complex() else "not floating point, quantised"


def _read_back(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Numbers from all devices, by one transfer per device, each of which waits for its queue of kernels."""
    devices: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        devices.setdefault(value.device, []).append(name)
    return {
        name: number
        for names in devices.values()
        for name, number in zip(names, torch.stack([values[name] for name in names]).tolist(), strict=True)
    }
