"""How far does one step move each module? Squared norms of its weights, of their gradient and of their update.

A gradient is read where the backward has just added to it, so that what the loop does with it later (clipping, unscaling,
``zero_grad``) changes nothing. Hooks leave their numbers on the device; `Weights.end` reads them back.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope.probes.model.hooks import Hook
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.tape import version

# Elements that are float64 at a time, so that no weight is copied whole: what a CPU's cache holds, and enough for one
# kernel elsewhere.
CACHED, LAUNCHED = 2**16, 2**22
VARIABLES = ("weight_square_norm", "weight_gradient_square_norm", "weight_update_square_norm")


@dataclass(frozen=True)
class WeightRow:
    """The squared norms of one step, one entry a module; NaN is undefined.

    Parameters
    ----------
    paths : tuple of str
        Modules that own parameters.
    counts : ndarray
        Number of elements of each.
    values : mapping of str to ndarray
        By the names of `VARIABLES`.
    overflowed : bool
        Whether a gradient held an infinity or a NaN.
    skipped : mapping of str to int
        How many parameters could not be measured, by the reason.
    """

    paths: tuple[str, ...]
    counts: np.ndarray
    values: Mapping[str, np.ndarray]
    overflowed: bool
    skipped: Mapping[str, int]

    def without_gradient(self) -> WeightRow:
        """The same row, its gradients undefined.

        Returns
        -------
        WeightRow
        """
        nothing = np.full(len(self.paths), math.nan)
        values = dict(self.values) | {"weight_gradient_square_norm": nothing}
        return WeightRow(self.paths, self.counts, values, self.overflowed, self.skipped)


@dataclass(frozen=True)
class _Held:
    """One parameter as the step found it; frozen ones have no copy."""

    parameter: nn.Parameter
    version: int | None
    before: torch.Tensor | None


class Weights:
    """The weights of one model in the steps that are measured: `begin` opens a step, `end` gives its row.

    Between the two every trainable weight is held twice. A parameter that two modules share counts for the first of them.

    Parameters
    ----------
    model : Module
        The model; its parameters are only looked at.
    scale : callable
        Gives what the loss of the running backward was multiplied by, a tensor, or None for 1.
    """

    def __init__(self, model: nn.Module, scale: Callable[[], torch.Tensor | None]):
        self._model = model
        self._scale = scale
        self._owners: dict[str, list[str]] = {}
        for name, _ in model.named_parameters():
            self._owners.setdefault(name.rpartition(".")[0], []).append(name)
        self._held: dict[str, _Held] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._reasons: dict[str, str] = {}
        self._errors: list[Exception] = []
        self._stack = ExitStack()

    def begin(self) -> None:
        """Copy the trainable weights and listen to their gradients; an error is kept for `end`."""
        self.drop()
        try:
            parameters = dict(self._model.named_parameters(remove_duplicate=False))
            for names in self._owners.values():
                for name in names:
                    self._hold(name, parameters.get(name))
        except Exception as error:  # such as no memory left for the copy: the user's run must go on
            self.drop()
            self._errors.append(error)

    def end(self) -> WeightRow:
        """Measure what changed since `begin`, and let go of everything.

        Returns
        -------
        WeightRow

        Raises
        ------
        Exception
            The first error that `begin` or a hook met.
        """
        try:
            if self._errors:
                raise self._errors[0]
            norms = _read_back({name: square_norm(held.parameter) for name, held in self._held.items()})
            gradients = _read_back(self._gradients)
            values = (norms, gradients, self._updates())
            return WeightRow(
                paths=tuple(self._owners),
                counts=np.array([self._count(names) for names in self._owners.values()]),
                values={name: self._by_module(each) for name, each in zip(VARIABLES, values, strict=True)},
                overflowed=not all(map(math.isfinite, gradients.values())),
                skipped=Counter(self._reasons.values()),
            )
        finally:
            self.drop()

    def drop(self) -> None:
        """Take the hooks off and forget the step; calling it twice is fine."""
        self._stack.close()
        self._stack = ExitStack()
        self._held, self._gradients, self._reasons = {}, {}, {}
        self._errors = []  # a new list: a hook that still runs in another thread writes to the old one

    def _hold(self, name: str, parameter: nn.Parameter | None) -> None:
        reason = "gone from the model" if parameter is None else _unreadable(parameter)
        if parameter is None or reason:
            self._reasons[name] = reason
            return
        trained = parameter.requires_grad
        before = parameter.detach().clone() if trained else None
        self._held[name] = _Held(parameter, version(parameter), before)
        if trained:
            hook = Hook(partial(self._see_gradient, name), self._errors.append)
            self._stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)

    def _see_gradient(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            self._reasons[name] = "gradient freed inside the backward, as by an optimiser in a hook"
            return
        square, scale = square_norm(parameter.grad), self._scale()
        if scale is not None:
            square = square / scale.to(square.device, torch.float64, non_blocking=True).square()
        self._gradients[name] = square

    def _updates(self) -> dict[str, float]:
        """Squared distances to the copies; none at all where no weight was written."""
        trained = {name: held for name, held in self._held.items() if held.before is not None}
        found = _read_back({name: _square_distance(held) for name, held in trained.items()})
        written = any(version(held.parameter) != held.version for held in trained.values())
        return found if written or any(found.values()) else {}

    def _by_module(self, values: Mapping[str, float]) -> np.ndarray:
        sums = []
        for names in self._owners.values():
            known = [values[name] for name in names if name in values]
            whole = all(name in self._held for name in names)
            sums.append(math.fsum(known) if known and whole else math.nan)
        return np.array(sums)

    def _count(self, names: Sequence[str]) -> float:
        held = [self._held.get(name) for name in names]
        return math.fsum(math.nan if each is None else each.parameter.numel() for each in held)


def square_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The squared Frobenius norm in float64, on the tensor's device.

    Parameters
    ----------
    tensor : Tensor
        Of any floating type, dense or sparse.

    Returns
    -------
    Tensor
        Without axes.
    """
    return torch.stack([_squared(part.double()) for part in _parts(tensor)]).sum()


def _squared(part: torch.Tensor) -> torch.Tensor:
    return torch.dot(part, part)


def _square_distance(held: _Held) -> torch.Tensor:
    assert held.before is not None
    pairs = zip(_parts(held.parameter), _parts(held.before), strict=True)
    return torch.stack(
        [_squared(now.to(torch.float64, copy=True).sub_(before)) for now, before in pairs]
    ).sum()


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()  # an embedding's rows may come several times, and add up
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.reshape(-1).split(CACHED if tensor.device.type == "cpu" else LAUNCHED)


def _unreadable(parameter: nn.Parameter) -> str:
    """Why a parameter's numbers cannot be read here; empty where they can."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "not initialised yet"
    if parameter.is_meta:
        return "on the meta device, offloaded"
    if hasattr(parameter, "device_mesh"):  # a DTensor, whose import would need torch.distributed
        return "sharded over processes (DTensor)"
    return "" if parameter.is_floating_point() or parameter.is_complex() else "not floating point, quantised"


def _read_back(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Numbers from all devices, one transfer a device."""
    devices: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        devices.setdefault(value.device, []).append(name)
    return {
        name: number
        for names in devices.values()
        for name, number in zip(names, torch.stack([values[name] for name in names]).tolist(), strict=True)
    }


# --- which module belongs to which chain ---


def weight_variables(
    rows: Sequence[WeightRow | None], chains: Sequence[Chain], number: int, starts: Sequence[int], stage: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables and coordinates of one group of ``/statistics``, as xarray takes them.

    Parameters
    ----------
    rows : sequence of WeightRow or None
        One a step; None where the weights were not measured.
    chains : sequence of Chain
        All chains of the model.
    number : int
        The chain of this group. A module goes to the chain whose block holds it, any other one to the first chain.
    starts : sequence of int
        The first depth of every stage of that chain.
    stage : int
        The stage of this group; it holds the modules of the blocks that end in it.

    Returns
    -------
    variables, coords : dict
        Empty where nothing was measured.
    """
    known = next((row for row in reversed(rows) if row is not None), None)
    if known is None:
        return {}, {}
    homes = [_home(path, chains) for path in known.paths]
    kept = [
        i
        for i, (chain, _, depth) in enumerate(homes)
        if chain == number and max(0, bisect_right(starts, depth) - 1) == stage
    ]
    if not kept:
        return {}, {}
    nothing = np.full(len(known.paths), math.nan)
    variables: dict[str, Any] = {
        name: (
            ("step", "weight"),
            np.stack([nothing if row is None else row.values[name] for row in rows])[:, kept],
        )
        for name in VARIABLES
    }
    variables["weight_count"] = ("weight", known.counts[kept])
    coords = {
        "weight": np.array([known.paths[i] for i in kept], dtype=object),
        "weight_layer": ("weight", np.array([homes[i][1] for i in kept], dtype=int)),
    }
    return variables, coords


def _home(path: str, chains: Sequence[Chain]) -> tuple[int, int, int]:
    """Chain, block number and last depth of a module; the first chain, -1 and 0 outside all blocks."""
    for number, chain in enumerate(chains):
        numbered = _numbered(chain)
        holders = [holder for holder in numbered if path == holder or path.startswith(f"{holder}.")]
        if holders:
            layer = numbered[max(holders, key=len)]
            return number, layer, max(i for i, place in enumerate(chain.points) if place.layer == layer)
    return 0, -1, 0


def _numbered(chain: Chain) -> dict[str, int]:
    """Paths that hold a block's weights, with the number that the block has among the depths."""
    found: dict[str, int] = {}
    for place, following in pairwise(chain.points):
        if place.path in chain.blocks:
            found.setdefault(place.path, following.layer if place.at == "input" else place.layer)
    for link in chain.connections:
        around = [block for block in chain.blocks if link.path.startswith(f"{block}.")]
        for path in filter(None, (*around, link.path, link.branch_path)):
            found.setdefault(path, link.layer)
    return found
