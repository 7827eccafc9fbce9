"""How is a chain split into tasks that fit? By what each metric takes; what fits in no part is refused before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import xarray as xr

from depthscope.diagnostics.analysis.scheduled.tasks import (
    CONNECTION,
    DEPTH,
    PAIR,
    SEQUENCE,
    STATES,
    STEP,
    WHOLE,
    Task,
    blocks_of,
    needed_quantities,
    separable_by,
)
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.mixing_matrices import KEPT_BYTES
from depthscope.diagnostics.quantities.states import CACHE_BYTES

# What metrics take in memory, in sizes of one stored depth, besides the cached depths: measured with tracemalloc over
# the catalogue (n = 4, float32), and rounded up.
COPIES = 6
MORE_COPIES = {
    **dict.fromkeys(("intrinsic_dimension", "intrinsic_dimension_bias", "corrected_participation_ratio"), 11),
    "relative_gradient": 8,
}
# The same of connections, in sizes of one connection's float64 matrices of every token: each one, and besides all of them.
COPIES_OF_CONNECTION, BESIDE_CONNECTIONS = 3, 8
# Of one number of each token, depth and stream, for steps of all depths: sizes, turns, and what is computed of them.
NUMBERS_OF_STEP = 16
# Of one number of each token and connection, for products of all connections.
NUMBERS_OF_PRODUCT = 6
MOST_POSITIONS = (
    8  # depths or connections of one task: progress is shown, and a lost worker loses little. Heuristic.
)


@dataclass(frozen=True)
class Chain:
    """One chain, as far as it is needed to split it."""

    run: str  # as of `Task`
    path: str  # as of `Task`
    chain: str  # as of `Task`
    trace: xr.Dataset  # its trace, of which only sizes and the mask are read
    budget: int  # bytes that a task may take

    @property
    def one_depth(self) -> int:
        """Bytes of the stored states of one depth."""
        return max(1, self.trace["residual"].nbytes // self.trace.sizes["depth"])

    @property
    def views(self) -> int:
        """Bytes of the views of one depth: the streams, and their mean."""
        streams = self.trace.sizes["stream"]
        return self.one_depth * (streams + 1) // streams if streams > 1 else self.one_depth

    @property
    def num_tokens(self) -> int:
        """Positions of sequences and tokens; a few of them may be padding."""
        return int(self.trace.sizes["sample"] * self.trace.sizes["token"])

    @property
    def one_connection(self) -> int:
        """Bytes of the matrices of one connection in float64."""
        return 8 * self.num_tokens * self.trace.sizes["stream"] ** 2

    def task(
        self,
        kind: str,
        metrics: Iterable[str],
        positions: Iterable[int] = (),
        keep: Iterable[int] = (),
        cache: int = 0,
    ) -> Task:
        """A task of this chain."""
        return Task(
            self.run, self.path, self.chain, kind, tuple(metrics), tuple(positions), tuple(keep), cache
        )


class TooLarge(InputError):
    """Metrics whose smallest part takes more than a worker has."""


def tasks_of(chain: Chain, metrics: Iterable[str]) -> tuple[list[Task], dict[str, str]]:
    """The tasks of one chain, those that take longest first; and why some metrics have none.

    ``chain``: which one, and what a task may take.
    Returns: The reasons by metric: how many bytes its smallest part takes, and how many a task may take.
    """
    groups: dict[tuple[str, object], list[str]] = {}
    for name in metrics:
        kind = separable_by(CATALOGUE[name])
        groups.setdefault(_group(chain, name, kind), []).append(name)
    tasks: list[Task] = []
    refused: dict[str, str] = {}
    order = (WHOLE, SEQUENCE, PAIR, CONNECTION, DEPTH)
    for (kind, _), names in sorted(groups.items(), key=lambda group: order.index(group[0][0])):
        try:
            tasks += list(_SPLIT[kind](chain, names))
        except TooLarge as reason:
            refused.update(dict.fromkeys(names, str(reason)))
    return tasks, refused


def _group(chain: Chain, name: str, kind: str) -> tuple[str, object]:
    """Metrics of one group are measured by the same tasks, and share quantities."""
    roots = CATALOGUE[name].roots
    if kind in (DEPTH, STEP):
        return DEPTH, MORE_COPIES.get(name, COPIES)
    if kind == CONNECTION:
        return kind, "residual" in roots
    if kind == WHOLE and "h_res" in roots:
        fits = 2 * chain.one_connection * chain.trace.sizes.get("connection", 0) <= KEPT_BYTES
        # Matrices that are not cached share nothing.
        return kind, "h_res" if fits else name
    return kind, roots[:1] if kind == WHOLE else None


def _require(chain: Chain, needed: int, part: str) -> None:
    if needed > chain.budget:
        raise TooLarge(
            f"it takes about {needed / 2**30:.3g} GiB for {part}, and a worker has {chain.budget / 2**30:.3g} GiB for a task: "
            "give workers more memory, or capture fewer sequences"
        )


def _depth_tasks(chain: Chain, names: list[str]) -> Iterator[Task]:
    copies = max(MORE_COPIES.get(name, COPIES) for name in names) * chain.one_depth
    steps = any(CATALOGUE[name].of_steps for name in names)
    free = chain.budget - copies
    # A step needs two depths at once, whether they are cached or not.
    _require(chain, copies + (1 + steps) * chain.views, "two depths" if steps else "one depth")
    size = max(1, min(MOST_POSITIONS, free // chain.views - steps))
    for block in blocks_of(chain.trace.sizes["depth"], size):
        before = [block[0] - 1] if steps and block[0] else []
        yield chain.task(DEPTH, names, [*before, *block], block, free)


def _pair_tasks(chain: Chain, names: list[str]) -> Iterator[Task]:
    # All states of both blocks at once, the mean over streams alone, and float64 copies of them.
    one = COPIES * chain.one_depth // chain.trace.sizes["stream"]
    beside = 2 * chain.views
    _require(chain, 2 * one + beside, "two depths")
    blocks = blocks_of(chain.trace.sizes["depth"], max(1, (chain.budget - beside) // (2 * one)))
    for first, second in combinations_with_replacement(blocks, 2):
        both = first if first is second else [*first, *second]
        yield chain.task(PAIR, names, both, first)


def _connection_tasks(chain: Chain, names: list[str]) -> Iterator[Task]:
    count = chain.trace.sizes.get("connection", 0)
    if not count:  # each with the reason why it has no value
        yield chain.task(WHOLE, names)
        return
    beside = BESIDE_CONNECTIONS * chain.one_connection
    if any("residual" in CATALOGUE[name].roots for name in names):
        beside += COPIES * chain.one_depth
    one = COPIES_OF_CONNECTION * chain.one_connection
    _require(chain, beside + one, "one connection")
    for block in blocks_of(count, max(1, min(MOST_POSITIONS, (chain.budget - beside) // one))):
        yield chain.task(CONNECTION, names, block, block)


def _sequence_tasks(chain: Chain, names: list[str]) -> Iterator[Task]:
    depths, streams = chain.trace.sizes["depth"], chain.trace.sizes["stream"]
    num_views = streams + 1 if streams > 1 else 1
    tokens = chain.trace.sizes["token"]
    one = 8 * NUMBERS_OF_STEP * depths * num_views * tokens + 3 * chain.views // chain.trace.sizes["sample"]
    _require(chain, one, "one sequence at all depths")
    real = chain.trace["mask"].transpose("sample", "token").values.any(axis=1)
    # A sequence of padding alone has no value; where all are, one task reports it.
    counted = np.flatnonzero(real) if real.any() else np.arange(1)
    for block in blocks_of(len(counted), max(1, chain.budget // one)):
        sequences = counted[block].tolist()
        yield chain.task(SEQUENCE, names, sequences, sequences)


def _whole_tasks(chain: Chain, names: list[str]) -> Iterator[Task]:
    _require(chain, max(_bytes_of_whole(chain, name) for name in names), "all of the run at once")
    yield chain.task(WHOLE, names)


def _bytes_of_whole(chain: Chain, name: str) -> int:
    """What a metric that is measured in one part takes."""
    metric = CATALOGUE[name]
    roots, needed = set(metric.roots), needed_quantities(metric.function)
    if roots & STATES <= roots <= STATES:
        return CACHE_BYTES + COPIES * chain.one_depth
    one_number = 8 * chain.num_tokens * chain.trace.sizes.get("connection", 0)
    matrices = one_number * chain.trace.sizes["stream"] ** 2
    if "pair_gains" in needed:
        return 3 * matrices
    if "depth_paths" in needed:
        return 4 * matrices
    if "mixing" in needed:
        beside = BESIDE_CONNECTIONS * chain.one_connection
        return NUMBERS_OF_PRODUCT * one_number + beside + min(3 * matrices, 3 * KEPT_BYTES // 2)
    return 4 * sum(chain.trace[root].nbytes for root in roots if root in chain.trace)


_SPLIT = {
    DEPTH: _depth_tasks,
    PAIR: _pair_tasks,
    CONNECTION: _connection_tasks,
    SEQUENCE: _sequence_tasks,
    WHOLE: _whole_tasks,
}
