"""What does a live row need beyond the sums of a step? Sampled tokens, the mean over streams, products of the connections.

Shapes: B batch, T token, t = B T, K sampled tokens, N stream, V view of the streams (their mean, then each of several), D
feature. Everything stays on the device until `probes.training.live` reads it back at the end of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

PADDING = -1.0  # in values of every token that cannot be negative


class Places(NamedTuple):
    """Which tokens of a batch are sampled: their positions in (B T,), and whether each of them is a real one."""

    position_K: torch.Tensor
    real_K: torch.Tensor | None


class Product(NamedTuple):
    """The product of the matrices of every token up to a connection, the later ones on the left.

    ``matrix``: (t, N, N), float64, with its largest entry at 1; ``scale``: (t,), the logarithm of what it was divided by.
    """

    matrix: torch.Tensor
    scale: torch.Tensor


@lru_cache(maxsize=16)
def _drawn_order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def draw_places(shape: tuple[int, int], mask_BT: torch.Tensor | None, most: int, seed: int) -> Places:
    """Draw tokens of a batch uniformly; batches of one shape and mask give the same ones.

    ``seed``: of the order in which they are drawn.
    Returns: Ascending positions. Where fewer tokens are real than are wanted, padding follows, which is not real.
    """
    order = _drawn_order(shape[0] * shape[1], seed)
    if mask_BT is None:
        return Places(order[:most].sort().values, None)
    order = order.to(mask_BT.device)
    real = mask_BT.flatten()[order]
    # A stable sort, real ones first, in place of a selection by booleans: that would wait for the device to count them.
    first = torch.argsort(~real, stable=True)[:most]
    position, by_position = order[first].sort()
    return Places(position, real[first][by_position])


class LiveSums:
    """Of one chain: what its forwards of one step show of sampled tokens, of the mean over streams and of every token.

    The sample is of the first forward of the step; sums and values of every token are of all forwards.

    ``most``: number K of sampled tokens.
    ``seed``: of the sample.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.seed = most, seed
        self.places: dict[int, Places] = {}  # by depth: the tokens of a chain may change their number
        self.states: dict[int, torch.Tensor] = {}  # (K, N, D)
        self.gradient_norms: dict[int, torch.Tensor] = {}  # (K, V)
        self.mixes: dict[int, torch.Tensor] = {}  # (K, N, N) by connection, as the module computes it
        self.reads: dict[int, torch.Tensor] = {}  # (K, views, N)
        self.writes: dict[int, torch.Tensor] = {}  # (K, N, views)
        self.sums: dict[str, dict[int, torch.Tensor]] = {}
        self.values: dict[str, dict[int, torch.Tensor]] = {}  # of every token, the token first
        self._drawn: dict[tuple[int, int], Places] = {}
        # Over the connections so far, and the last one's number
        self._product: tuple[int, Product] | None = None

    def _places(self, tensor_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> Places:
        shape = (tensor_BT.shape[0], tensor_BT.shape[1])
        if shape not in self._drawn:
            position, real = draw_places(shape, mask_BT, self.most, self.seed)
            # Sent to the device once a forward.
            self._drawn[shape] = Places(position.to(tensor_BT.device), real)
        return self._drawn[shape]

    def sample_state(self, depth: int, state_BTND: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Copy the sampled tokens of a state, in float32."""
        if not state_BTND.numel():
            return
        places = self._places(state_BTND, mask_BT)
        self.places[depth] = places
        self.states[depth] = _tokens(state_BTND, places).float()

    def sample_gradient(self, depth: int, gradient_BTND: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Norms of the gradient at the sampled tokens, of the sum over streams and of each."""
        if not gradient_BTND.numel():
            return
        places = self._places(gradient_BTND, mask_BT)
        gradient = with_sum(_tokens(gradient_BTND, places))
        self.gradient_norms[depth] = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float64)

    def add(self, name: str, key: int, value: torch.Tensor) -> None:
        """Add to a sum."""
        parts = self.sums.setdefault(name, {})
        parts[key] = parts[key] + value if key in parts else value

    def add_values(self, name: str, key: int, value: torch.Tensor) -> None:
        """Append the values of every token of a forward, the token first."""
        parts = self.values.setdefault(name, {})
        parts[key] = torch.cat([parts[key], value]) if key in parts else value

    def add_stream_cosines(
        self, depth: int, sums: Sequence[torch.Tensor | float], pair_sum_NN: torch.Tensor
    ) -> None:
        """Add the cosines between the streams of some tokens."""
        names = "stream_cosine_sum", "stream_cosine_count", "pair_cosine_count"
        for name, value in zip(names, sums, strict=True):
            self.add(name, depth, torch.as_tensor(value, dtype=torch.float64))
        self.add("pair_cosine_sum", depth, pair_sum_NN)

    # --- connections ---

    def add_connection(
        self,
        number: int,
        mix: torch.Tensor | None,
        read: torch.Tensor | None,
        write: torch.Tensor,
        mask_BT: torch.Tensor | None,
    ) -> None:
        """Add the coefficients of one connection: shares of reads and writes, and the gains of products up to it.

        ``number``: connection index; they come in the order in which they are applied.
        ``mix``: H_res, (B, T, N, N), destination by source.
        ``read``: H_pre, (B, T, views, N), of every token.
        """
        if not write.numel():
            return
        places = self._places(write, mask_BT)
        self.writes[number] = _tokens(write, places).float()
        real = None if mask_BT is None else mask_BT[..., None]
        if write.shape[-1] == 1:
            self.add("write_size_sum", number, _size_sum(write[..., 0], real))
        if read is not None:
            self.reads[number] = _tokens(read, places).float()
            if read.shape[-2] == 1:
                self.add("read_size_sum", number, _size_sum(read[..., 0, :], real))
        if mix is not None:
            self.mixes[number] = _tokens(mix, places).float()
            self._add_gains(number, mix.detach().flatten(0, 1).double(), mask_BT)

    def _add_gains(self, number: int, mix_tNN: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Keep the Amax gains of every token: of the matrix, and of the product up to it."""
        known = self._product
        before = None
        if known is not None and known[0] == number - 1 and known[1].matrix.shape == mix_tNN.shape:
            before = known[1]
        elif number != 0:  # a connection in between was not seen: no product from the first on is known
            before = Product(torch.full_like(mix_tNN, torch.nan), torch.zeros_like(mix_tNN[:, 0, 0]))
        gains, product = _gains(mix_tNN, before)
        self._product = number, product
        if mask_BT is not None:
            gains = gains.masked_fill(~mask_BT.flatten()[:, None], PADDING)
        for name, of_name in zip(("gain", "product_gain"), gains, strict=True):
            self.add_values(name, number, of_name)

    def forget_connections(self) -> None:
        """Drop all that is of connections."""
        for parts in (self.mixes, self.reads, self.writes):
            parts.clear()
        for name in ("write_size_sum", "read_size_sum"):
            self.sums.pop(name, None)
        for name in ("gain", "product_gain"):
            self.values.pop(name, None)

    def end_forward(self) -> None:
        """Drop the product: the next connection belongs to another forward."""
        self._product = None

    def merged_with(self, other: LiveSums) -> LiveSums:
        """The same of two parts of a step; the sample is of the first one that has states."""
        merged = LiveSums(self.most, self.seed)
        sampled = self if self.states else other
        for name in ("places", "states", "gradient_norms", "mixes", "reads", "writes"):
            setattr(merged, name, dict(getattr(sampled, name)))
        for part in (self, other):
            for name, sums in part.sums.items():
                for key, value in sums.items():
                    merged.add(name, key, value)
            for name, values in part.values.items():
                for key, value in values.items():
                    merged.add_values(name, key, value)
        return merged


def with_mean(x_tND: torch.Tensor) -> torch.Tensor:
    """The views (t, V, D) of some tokens: the mean over streams before the streams, where there are several."""
    if x_tND.shape[1] == 1:
        return x_tND
    # In float64: of streams that nearly cancel, the rounding would be the mean.
    return torch.cat([x_tND.mean(1, keepdim=True, dtype=torch.float64).to(x_tND.dtype), x_tND], dim=1)


def with_sum(gradient_tND: torch.Tensor) -> torch.Tensor:
    """The same of gradients, of which the sum over streams is the gradient with respect to the mean state."""
    if gradient_tND.shape[1] == 1:
        return gradient_tND
    together = gradient_tND.sum(1, keepdim=True, dtype=torch.float64).to(gradient_tND.dtype)
    return torch.cat([together, gradient_tND], dim=1)


def stream_cosine_sums(
    cosine_tNN: torch.Tensor, norm_tN: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Sums of the cosines between the streams of some tokens; a stream of zeros has none.

    ``cosine_tNN``: products of unit vectors, zero where a stream is zero.
    Returns: Of the mean over the pairs of a token's streams, and how many tokens have two directions or more, and all.
    Returns: (N, N), over the tokens that have all.
    """
    cosine = cosine_tNN.double()
    num_streams = cosine.shape[-1]
    directed = (norm_tN > 0).sum(-1).double()
    defined = directed > 1
    mean = (cosine.sum((-2, -1)) - directed) / (directed * (directed - 1)).clamp_min(1)
    complete = directed == num_streams
    sums = torch.where(defined, mean, 0.0).sum(), defined.sum().double(), complete.sum().double()
    return sums, torch.where(complete[:, None, None], cosine, 0.0).sum(0)


def amax_gains(matrix_tNN: torch.Tensor) -> torch.Tensor:
    """The largest signed sums (t, 2): over the last axis of a matrix, and over the one before."""
    sums = torch.stack([matrix_tNN.sum(-1), matrix_tNN.sum(-2)], dim=1)
    return sums.abs().amax(-1)


def _gains(mix_tNN: torch.Tensor, before: Product | None) -> tuple[torch.Tensor, Product]:
    """The largest signed sums of rows and of columns, of the matrices of one connection and of the product up to it.

    ``before``: up to the connection before; None for the first one.
    Returns: (2, t, 2): of the matrix, and of the product; each over the last axis, and over the one before.
    """
    if before is None:
        matrix, scale = _scaled(mix_tNN, torch.zeros_like(mix_tNN[:, 0, 0]))
    else:
        matrix, scale = _scaled(mix_tNN @ before.matrix, before.scale)
    gains = [amax_gains(mix_tNN), amax_gains(matrix) * scale.exp()[:, None]]
    return torch.stack(gains), Product(matrix, scale)


def _scaled(product: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A product with its largest entry at 1, and the logarithm of its scale: hundreds of connections cannot overflow."""
    size = product.abs().amax((-2, -1))
    # A product of exactly zero stays zero; NaN and infinities stay what they are.
    size = torch.where(size > 0, size, torch.ones_like(size))
    return product / size[:, None, None], log_scale + size.log()


def _tokens(tensor_BT: torch.Tensor, places: Places) -> torch.Tensor:
    """The sampled tokens of a tensor (B, T, …), as a copy; two indices, so that a strided tensor is not copied first."""
    position = places.position_K.to(tensor_BT.device)
    tokens = tensor_BT.shape[1]
    rows = torch.div(position, tokens, rounding_mode="floor")
    return tensor_BT.detach()[rows, position % tokens]


def _size_sum(weights_BTN: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    sizes = weights_BTN.detach().abs()
    if real is not None:
        sizes = torch.where(real, sizes, 0.0)
    return sizes.sum((0, 1), dtype=torch.float64)
