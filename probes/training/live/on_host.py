"""How do the sums of a step get to the host? In one copy for each dtype: each copy waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from depthscope.probes.statistics.token_sums import TokenSums

OF_TOKENS = ("places", "states", "gradient_norms", "mixes", "reads", "writes", "sums", "values")
NOT_READ = "feature_sum"  # no metric of a row is computed from it


def on_host(sums: Sequence[TokenSums]) -> list[TokenSums]:
    """The sums of each chain in the memory of the host; the same objects where they are there already."""
    far = [tensor for chain in sums for tensor in _tensors(chain) if tensor.device.type != "cpu"]
    if not far:
        return list(sums)
    near: dict[int, torch.Tensor] = {}
    for kind in {(tensor.dtype, tensor.device) for tensor in far}:
        of_kind = [tensor for tensor in far if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensor.reshape(-1) for tensor in of_kind]).cpu()
        parts = flat.split([tensor.numel() for tensor in of_kind])
        near |= {id(one): part.view(one.shape) for one, part in zip(of_kind, parts, strict=True)}
    return [_changed(chain, lambda tensor: near.get(id(tensor), tensor)) for chain in sums]


def _tensors(chain: TokenSums) -> Iterator[torch.Tensor]:
    """The tensors of a chain's sums that rows are computed from."""
    found: list[torch.Tensor] = []
    _changed(chain, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    yield from found


def _changed(chain: TokenSums, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenSums:
    """A copy with other tensors."""
    chain = copy.copy(chain)
    chain.sums = {name: _mapped(parts, change) for name, parts in chain.sums.items() if name != NOT_READ}
    chain.mean_view = None if chain.mean_view is None else _changed(chain.mean_view, change)
    if chain.live is not None:
        chain.live = copy.copy(chain.live)
        for name in OF_TOKENS:
            setattr(chain.live, name, _mapped(getattr(chain.live, name), change))
    return chain


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
