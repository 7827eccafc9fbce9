"""What does another process need to complete a row? The sums and the sampled tokens of its step, as arrays.

A row's input is pickled with the memory of its arrays apart, so that it is copied once: from where it is to the slot.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from depthscope.probes.statistics.live_sums import LiveSums, Places
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.training.live.row import Begun

OF_TOKENS = ("places", "states", "gradient_norms", "mixes", "reads", "writes", "sums", "values", "histograms")
NOT_READ = ("feature_sum",)  # no metric of a row is computed from it


@dataclass(frozen=True)
class RowInput:
    """All that the rest of a row is computed from."""

    step: int  # of the training
    sums: list[TokenSums]  # of the step, by chain
    begun: list[Begun]  # see `LiveMetrics.begin`

    def pickled(self) -> tuple[bytes, list[memoryview]]:
        """A header, and the memory of the arrays."""
        buffers: list[pickle.PickleBuffer] = []
        chains = [_arrays_of(chain) for chain in on_host(self.sums)]
        header = pickle.dumps((self.step, chains, self.begun), protocol=5, buffer_callback=buffers.append)
        return header, [buffer.raw() for buffer in buffers]

    @classmethod
    def unpickled(cls, header: bytes, buffers: Sequence[memoryview]) -> RowInput:
        """The input whose parts these are."""
        step, chains, begun = pickle.loads(header, buffers=buffers)
        return cls(step, [_sums_of(chain) for chain in chains], begun)


def on_host(sums: Sequence[TokenSums]) -> list[TokenSums]:
    """The same sums in the memory of the host, copied from a device at once: one tensor for each dtype.

    Returns: The same objects where all of them are there already.
    """
    far: list[torch.Tensor] = []
    for chain in sums:
        _mapped(_plain(chain), lambda tensor: far.append(tensor) if tensor.device.type != "cpu" else None)
    if not far:
        return list(sums)
    near: dict[int, torch.Tensor] = {}
    for kind in {(tensor.dtype, tensor.device) for tensor in far}:
        alike = [tensor for tensor in far if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike]).cpu()
        parts = flat.split([tensor.numel() for tensor in alike])
        near |= {id(one): part.view(one.shape) for one, part in zip(alike, parts, strict=True)}
    return [_sums_of(_mapped(_plain(chain), lambda tensor: near.get(id(tensor), tensor))) for chain in sums]


def _plain(chain: TokenSums) -> dict[str, Any]:
    """The parts of a chain's sums that rows are computed from, in nested dicts."""
    found: dict[str, Any] = {
        "sums": {name: parts for name, parts in chain.sums.items() if name not in NOT_READ},
        "mean_view": None if chain.mean_view is None else _plain(chain.mean_view),
    }
    live = chain.live
    if live is not None:
        found["live"] = {"most": live.most, "seed": live.seed}
        found["live"] |= {name: getattr(live, name) for name in OF_TOKENS}
    return found


def _mapped(value: Any, change: Any) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(part, change) for part in value)
    return value


def _arrays_of(chain: TokenSums) -> Any:
    # Only contiguous memory is pickled apart.
    return _mapped(_plain(chain), lambda tensor: tensor.detach().contiguous().numpy())


def _sums_of(plain: Any) -> TokenSums:
    """The sums whose parts are tensors or arrays."""
    parts = _with_tensors(plain)
    chain = TokenSums()
    chain.sums = parts["sums"]
    chain.mean_view = None if parts["mean_view"] is None else _sums_of(parts["mean_view"])
    if "live" in parts:
        chain.live = LiveSums(parts["live"]["most"], parts["live"]["seed"])
        for name in OF_TOKENS:
            setattr(chain.live, name, parts["live"][name])
        chain.live.places = {depth: Places(*place) for depth, place in chain.live.places.items()}
    return chain


def _with_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, Mapping):
        return {key: _with_tensors(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_with_tensors(part) for part in value)
    return value
