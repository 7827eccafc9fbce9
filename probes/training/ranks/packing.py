"""How do statistics of a step become flat vectors that can be added, and sums become statistics again? In one order.

Shapes: K sampled tokens, R processes, V a value's components.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from depthscope.probes.run.statistics_dataset import OF_HEADS
from depthscope.probes.statistics.histograms import bins_of, counts, extremes, histogram
from depthscope.probes.statistics.live_sums import PADDING, LiveSums, Places
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.training.ranks.layout import OF_GRADIENTS, Entry, Layout, place_of, summed

RANK_STRIDE = 2**40  # between the numbers of tokens of two processes; none has as many tokens in a step


def sums_vector(
    sums: Sequence[TokenSums], layout: Layout, rank: int, ranks: int, gradient_factor: float
) -> torch.Tensor:
    """What is added, float64, on the CPU.

    ``rank, ranks``: this process, and how many there are.
    ``gradient_factor``: by which the gradients of this process are multiplied.
    """
    parts = [torch.zeros(layout.num_sets * ranks, dtype=torch.float64)]
    for at, real in enumerate(_real_tokens(sums, layout)):
        parts[0][at * ranks + rank] = len(real)
    by_entry = dict(summed(sums))
    for entry in layout.sums:
        value = by_entry[entry].detach().double().reshape(-1)
        parts.append(value * gradient_factor**2 if entry.name in OF_GRADIENTS else value)
    parts += [_maximum(sums, entry).isnan().double().reshape(-1) for entry in layout.maxima]
    parts += [counts(_values(sums, entry), bins_of(entry.name)).reshape(-1) for entry in layout.values]
    return _joined(parts)


def maxima_vector(sums: Sequence[TokenSums], layout: Layout) -> torch.Tensor:
    """What combines by maximum, float64, on the CPU, without NaN: these are counted in `sums_vector`."""
    parts = [_maximum(sums, entry).double().reshape(-1) for entry in layout.maxima]
    parts = [torch.where(part.isnan(), -torch.inf, part) for part in parts]
    parts += [extremes(_values(sums, entry)).reshape(-1) for entry in layout.values]
    return _joined(parts)


def samples_vector(
    sums: Sequence[TokenSums], layout: Layout, numbers: torch.Tensor, rank: int, gradient_factor: float
) -> torch.Tensor:
    """The share of this process in the sampled tokens, as bits in int32; zeros in the places of the others.

    ``numbers``: (sets, R), how many tokens each process can give.
    """
    shares = [apportioned(of.tolist(), layout.most) for of in numbers]
    chosen = []
    for share, real in zip(shares, _real_tokens(sums, layout), strict=True):
        # A subset that is drawn, since the first ones would be those of the first sequences.
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(rank))
        chosen.append(real[order[: share[rank]]].sort().values)
    vector = torch.zeros(layout.sample_length, dtype=torch.int32)
    at = 0
    for entry, dtype in zip(layout.samples, layout.dtypes, strict=True):
        number = layout.sets[entry]
        tokens = getattr(sums[entry.chain].live, entry.name)[entry.key]
        tokens = tokens[chosen[number].to(tokens.device)].cpu()
        if entry.name == "gradient_norms":
            tokens = tokens * gradient_factor
        at = _put(vector, at, tokens.to(dtype), layout.most, sum(shares[number][:rank]))
    positions_of = [place.position_K.cpu() for place in _places(sums, layout)]
    for number, positions in enumerate(positions_of):
        at = _put(
            vector,
            at,
            positions[chosen[number]] + rank * RANK_STRIDE,
            layout.most,
            sum(shares[number][:rank]),
        )
    return vector


def _put(vector: torch.Tensor, at: int, tokens: torch.Tensor, most: int, first: int) -> int:
    """Write tokens as bits into their places; returns where the next tensor begins."""
    if not len(tokens):
        width = prod(tokens.shape[1:]) * tokens.element_size() // 4
        return at + most * width
    bits = tokens.contiguous().reshape(len(tokens), -1).view(torch.int32)
    width = bits.shape[1]
    vector[at : at + most * width].view(most, width)[first : first + len(bits)] = bits
    return at + most * width


def apportioned(available: Sequence[float], most: int) -> list[int]:
    """How many of some tokens each process gives: in proportion to what it has, by largest remainders.

    Returns: Their sum is ``most``, or all there are.

    Examples
    --------
    >>> apportioned([10, 0, 5], 6)
    [4, 0, 2]
    >>> apportioned([1, 2], 8)
    [1, 2]
    """
    total = sum(available)
    if total <= most:
        return [int(number) for number in available]
    exact = [number * most / total for number in available]
    shares = [int(number) for number in exact]
    # Equal remainders go to the first ones; Python sorts stably.
    order = sorted(range(len(exact)), key=lambda rank: shares[rank] - exact[rank])
    for rank in order[: most - sum(shares)]:
        shares[rank] += 1
    return shares


def _real_tokens(sums: Sequence[TokenSums], layout: Layout) -> list[torch.Tensor]:
    """Of each set, which of the tokens that this process sampled are real."""
    found = []
    for place in _places(sums, layout):
        if place.real_K is None:
            found.append(torch.arange(len(place.position_K)))
        else:
            found.append(place.real_K.cpu().nonzero().flatten())
    return found


def _places(sums: Sequence[TokenSums], layout: Layout) -> list[Places]:
    """The sampled tokens of each set."""
    found: dict[int, Places] = {}
    for entry, number in layout.sets.items():
        live = sums[entry.chain].live
        assert live is not None
        found.setdefault(number, place_of(live, entry.name, entry.key))
    return [found[number] for number in range(layout.num_sets)]


def _maximum(sums: Sequence[TokenSums], entry: Entry) -> torch.Tensor:
    of = sums[entry.chain]
    part = of.mean_view if entry.part == "mean" else of
    assert part is not None
    return part.maxima[entry.name][entry.key]


def _values(sums: Sequence[TokenSums], entry: Entry) -> torch.Tensor:
    """Values of every real token, (t, V)."""
    live = sums[entry.chain].live
    assert live is not None
    values = live.values[entry.name][entry.key].detach()
    return values if entry.name == "largest" else values[values[:, 0] != PADDING]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Vectors one after another, read back from their devices at once."""
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    return torch.cat(list(parts)).cpu()


# --- and back ---


def unpacked(
    layout: Layout,
    ranks: int,
    summed: torch.Tensor,
    maxima: torch.Tensor,
    sampled: torch.Tensor,
    gradient_factor: float,
    seed: int,
) -> list[TokenSums]:
    """The statistics of all processes together."""
    chains = 1 + max(entry.chain for entry in (*layout.sums, *layout.samples))
    found = [TokenSums(live=LiveSums(layout.most, seed) if layout.most else None) for _ in range(chains)]
    cursor = _Cursor(summed)
    numbers = cursor.take((layout.num_sets, ranks))
    for entry in layout.sums:
        value = cursor.take(entry.shape)
        if entry.name in OF_GRADIENTS:
            value = value * gradient_factor**2
        _sums_of(found, entry).setdefault(entry.name, {})[entry.key] = value
    of_maxima = _Cursor(maxima)
    for entry in layout.maxima:
        undefined = cursor.take(entry.shape) > 0
        value = torch.where(undefined, torch.nan, of_maxima.take(entry.shape))
        _part_of(found, entry).maxima.setdefault(entry.name, {})[entry.key] = value
    for entry in layout.values:
        bins, components = bins_of(entry.name), entry.shape[0]
        counted = cursor.take((components, bins.number + 2)).numpy()
        extreme = of_maxima.take((components, 2))
        live = found[entry.chain].live
        assert live is not None
        live.histograms.setdefault(entry.name, {})[entry.key] = histogram(bins, counted, extreme.numpy())
        if entry.name == "largest":  # whose maximum is looked at for each depth
            live.values.setdefault("largest", {})[entry.key] = extreme[None, :, 1]
    _put_back(found, layout, numbers, sampled, gradient_factor)
    return found


def _put_back(
    found: Sequence[TokenSums],
    layout: Layout,
    numbers: torch.Tensor,
    sampled: torch.Tensor,
    gradient_factor: float,
) -> None:
    """The sampled tokens of all processes."""
    totals = [sum(apportioned(of.tolist(), layout.most)) for of in numbers]
    at = 0
    for entry, dtype in zip(layout.samples, layout.dtypes, strict=True):
        width = prod(entry.shape) * dtype.itemsize // 4
        bits = sampled[at : at + layout.most * width].view(layout.most, width)[: totals[layout.sets[entry]]]
        tokens = bits.contiguous().view(dtype).reshape(-1, *entry.shape)
        if entry.name == "gradient_norms":
            tokens = tokens * gradient_factor
        getattr(found[entry.chain].live, entry.name)[entry.key] = tokens
        at += layout.most * width
    places = []
    for total in totals:
        positions = sampled[at : at + layout.most * 2].view(torch.int64)[:total]
        places.append(Places(positions, None))
        at += layout.most * 2
    for entry in layout.samples:
        live = found[entry.chain].live
        if entry.name == "states" and live is not None:
            live.places[entry.key] = places[layout.sets[entry]]


def keep_own(together: Sequence[TokenSums], own: Sequence[TokenSums]) -> None:
    """Take over what is not added: values of weights, which are copies, and the attention of this process's sequences."""
    for of_all, of_one in zip(together, own, strict=True):
        of_all.latest = of_one.latest
        of_all.sums.update({name: of_one.sums[name] for name in OF_HEADS if name in of_one.sums})


class _Cursor:
    """Reads tensors one after another from a vector."""

    def __init__(self, vector: torch.Tensor) -> None:
        self._vector, self._at = vector, 0

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The next numbers, as a tensor of its own."""
        number = prod(shape)
        self._at += number
        return self._vector[self._at - number : self._at].reshape(shape).clone()


def _part_of(sums: Sequence[TokenSums], entry: Entry) -> TokenSums:
    of = sums[entry.chain]
    if entry.part != "mean":
        return of
    of.mean_view = of.mean_view or TokenSums()
    return of.mean_view


def _sums_of(sums: Sequence[TokenSums], entry: Entry) -> dict[str, dict[int, torch.Tensor]]:
    if entry.part == "live":
        live = sums[entry.chain].live
        assert live is not None
        return live.sums
    return _part_of(sums, entry).sums
