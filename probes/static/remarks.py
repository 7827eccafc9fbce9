"""What is worth a warning in the static weights? Uniform, saturated and negative mixing, shut gates, streams made equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from depthscope.probes.static.depth import missing_places
from depthscope.probes.static.facts import StaticComposite, StaticConnection

# Heuristics of ours, except for LOGIT_RANGE.
UNIFORM = 0.01  # largest difference between the rows of H_res
SATURATED = 1e-3  # the second weight of every row: a logit about 7 below the largest
NEGATIVE = 0.01  # size of a negative weight
SHUT = 1e-6  # size of a gate
# max − min; 20 rounds of Sinkhorn on random 4 × 4 logits of this range leave column sums 0.03 (median) away from 1.
LOGIT_RANGE = 30.0
GAIN = 2.0  # of the product over the depth; that of doubly stochastic matrices is 1


def remarks(
    connections: Sequence[StaticConnection],
    composites: Sequence[StaticComposite],
    configured_streams: float | None,
) -> Iterator[str]:
    """Warnings on the static weights of a checkpoint, as sentences.

    ``configured_streams``: the number of streams that the configuration gives.
    """
    for test, words in _TESTS:
        hits = [connection for connection in connections if test(connection)]
        if hits:
            yield f"{_named_connections(hits, len(connections))}: {words(hits)}"
    yield from _on_gates(connections)
    learned = {connection.chain for connection in connections if connection.learns_mixing}
    for composite in composites:
        if composite.chain in learned:
            yield from _on_composite(composite)
    yield from _on_gaps(connections)
    streams = sorted({connection.streams for connection in connections if connection.streams > 1})
    if configured_streams is not None and streams and streams != [int(configured_streams)]:
        yield (
            f"config.json gives {configured_streams:g} streams, the shapes of the tensors {', '.join(map(str, streams))}: "
            "the configuration is another model's"
        )


def _named_connections(hits: Sequence[StaticConnection], total: int) -> str:
    if len(hits) == total:
        return f"all {total} connections" if total > 1 else hits[0].module
    first = ", ".join(hit.module for hit in hits[:2]) + (", …" if len(hits) > 2 else "")
    return f"{len(hits)} of {total} connections ({first})"


# --- one connection


def _is_uniform(connection: StaticConnection) -> bool:
    """H_res sends every stream the same: J/n, or any other matrix of equal rows."""
    if connection.h_res is None or not connection.learns_mixing:
        return False
    rows = connection.h_res
    return float(np.abs(rows - rows.mean(axis=0)).max()) < UNIFORM


def _is_saturated(connection: StaticConnection) -> bool:
    if connection.h_res is None or not connection.constrained:
        return False
    return float(np.sort(connection.h_res, axis=1)[:, -2].max()) < SATURATED


def _logit_range(connection: StaticConnection) -> float:
    return 0.0 if connection.logits is None else float(np.ptp(connection.logits))


def _lowest_weight(connection: StaticConnection) -> float:
    return 0.0 if connection.h_res is None or not connection.learns_mixing else float(connection.h_res.min())


_TESTS: tuple[tuple[Callable[[StaticConnection], bool], Callable[[Sequence[StaticConnection]], str]], ...] = (
    (
        _is_uniform,
        lambda hits: (
            "mixing is uniform, H_res has rank 1: one such connection makes all streams the same. A zero bias does this; "
            "put a bias on the diagonal of the logits"
        ),
    ),
    (
        _is_saturated,
        lambda hits: (
            f"logits are saturated (range up to {max(map(_logit_range, hits)):.3g}): every row of H_res has one weight "
            f"and the others are below {SATURATED:g}, so their gradient is as small and they hardly learn"
        ),
    ),
    (
        lambda connection: _logit_range(connection) > LOGIT_RANGE,
        lambda hits: (
            f"logits range over {max(map(_logit_range, hits)):.3g}: above {LOGIT_RANGE:g} Sinkhorn does not converge; "
            "look at both sums"
        ),
    ),
    (
        lambda connection: _lowest_weight(connection) < -NEGATIVE,
        lambda hits: (
            f"mixing weights are negative (down to {min(map(_lowest_weight, hits)):.3g}): streams are subtracted from one "
            "another, and signed sums hide how much is mixed"
        ),
    ),
)


def _on_gates(connections: Sequence[StaticConnection]) -> Iterator[str]:
    shut: dict[tuple[str, ...], list[StaticConnection]] = defaultdict(list)
    for one in connections:
        shut[tuple(part for part, gate in one.gates.items() if abs(gate) < SHUT)].append(one)
    for parts, hits in shut.items():
        if parts:
            named = ", ".join(f"H_{part}" for part in parts)
            yield f"{_named_connections(hits, len(connections))}: zero gates, so the input does not change {named}"


def _on_gaps(connections: Sequence[StaticConnection]) -> Iterator[str]:
    chains: dict[str, list[StaticConnection]] = defaultdict(list)
    for one in connections:
        # the first attention over depth has nothing to read, and often no query
        if one.depth is None:
            chains[one.chain].append(one)
    for chain, members in chains.items():
        missing = missing_places(members)
        if missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            yield (
                f"chain {chain or '(one)'}: no connection at {shown}, where other layers have one; a product over depth "
                "leaves it out"
            )


# --- their product


def _on_composite(composite: StaticComposite) -> Iterator[str]:
    chain = f"chain {composite.chain or '(one)'}"
    gains = composite.forward_gain, composite.backward_gain
    if max(gains) > GAIN:
        yield (
            f"{chain}: the product of {composite.connections} static matrices amplifies, forward by {gains[0]:.3g} and "
            f"backward by {gains[1]:.3g}"
        )
    if composite.collapsed_after is not None:
        yield (
            f"{chain}: after {composite.collapsed_after} of {composite.connections} static matrices hardly anything (1%) is "
            "left of the differences between the streams of the embedding; later writes can differ"
        )
