"""Which sites fired? Every site of a model, in how many forwards it was expected and fired, and why it did not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.probes.connections.proof import DepthWeights, Evidence
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import DEPTH, PLAIN, Chain, Connection, HookPoint
from depthscope.probes.structure.model_structure import FINAL

NOT_REQUESTED = "not asked for; name it in sites="
FOR_PROOF = "seen for a proof only; name it in sites= to keep it"
NO_SUMS = "the blocks do not show how they add their branches to the state"
SEVERAL_SUMS = "several branch inputs: see views_in and depth_reads"
FINAL_NAME, MID_NAME = "ln_final.hook_normalized", "blocks.{i}.hook_resid_mid"
PATTERN_NAME = "blocks.{i}.attn.hook_pattern"
TEXTS = ("name", "site", "module", "chain", "why")


class Coverage(NamedTuple):
    """One site: its common name, the module that shows it, and the forwards in which it was expected and fired."""

    name: str
    site: str
    module: str
    layer: int
    chain: str
    expected: int
    fired: int
    why: str


def coverage(session: Session, evidence: Evidence) -> list[Coverage]:
    """The coverage of every site of every chain.

    ``session``: with its chains found and its forwards counted.
    ``evidence``: the proofs of the stream connections.
    Returns: In depth order; where ``fired`` is below ``expected``, or both are 0, ``why`` gives the reason.
    """
    rows: list[Coverage] = []
    for number, chain in enumerate(session.structure.chains):
        rows += _state_rows(session, number, chain)
        rows += _connection_rows(session, chain, evidence)
        rows += _attention_rows(session, number, chain)
    # Expected in no forward, as what does not exist: a model need not show its attention.
    rows += [
        Coverage(PATTERN_NAME, "attention", "", -1, "", 0, 0, f"{reason} ({count} ×)")
        for reason, count in session.first.attention.reasons.items()
    ]
    return rows


def coverage_counts(rows: list[Coverage]) -> dict[str, int]:
    """The attributes of a run that count its sites."""
    # Sites that were not requested are expected in no forward, and count on neither side.
    expected = [row for row in rows if row.expected]
    return {
        "sites_expected": len(expected),
        "sites_fired": sum(row.fired >= row.expected for row in expected),
    }


def coverage_dataset(rows: list[Coverage]) -> xr.Dataset:
    """The coverage as a table, one row per site."""
    columns = zip(Coverage._fields, zip(*rows, strict=True), strict=True)
    found = {
        name: ("place", np.array(of, dtype=object if name in TEXTS else np.int64)) for name, of in columns
    }
    return xr.Dataset({"place_name": found.pop("name"), **found})  # as the schema has it


def _state_rows(session: Session, number: int, chain: Chain) -> Iterator[Coverage]:
    # A forward counts only if every captured state and connection fired in it, so that a site that is hooked at all fired in
    # all of them.
    count, selection = session.step.num_forwards, session.options.selection
    captured = {(of.chain, of.depth) for of in session.structure.shown}
    wanted = selection.stored(chain)
    for depth, point in enumerate(chain.points):
        fired, stored = (number, depth) in captured, depth in wanted
        not_stored = FOR_PROOF if fired else NOT_REQUESTED
        name, seen = state_name(chain, depth), (count if stored else 0, count if fired else 0)
        why = "" if stored else not_stored
        yield Coverage(name, point.site, _call_name(point), point.layer, chain.name, *seen, why)
    # Sites that this chain has nowhere are listed once, without a layer: that they are missing must not look like an omission.
    if not any(point.site == "mid" for point in chain.points):
        why = NO_SUMS if selection.inside_blocks else NOT_REQUESTED
        yield Coverage(MID_NAME, "mid", "", -1, chain.name, 0, 0, why)
    if chain.final is None:
        yield Coverage(FINAL_NAME, "final", "", -1, chain.name, 0, 0, chain.without_final)
    else:
        times = count if (number, FINAL) in captured else 0
        why = "" if (number, FINAL) in captured else NOT_REQUESTED
        module, layer = _call_name(chain.final), chain.final.layer
        yield Coverage(FINAL_NAME, "final", module, layer, chain.name, times, times, why)


def state_name(chain: Chain, depth: int) -> str:
    """The common name of a state, ``blocks.{i}.hook_resid_…``, as TransformerLens has it."""
    point = chain.points[depth]
    return "hook_embed" if point.site == "embed" else f"blocks.{point.layer}.hook_resid_{point.site}"


def _call_name(point: HookPoint) -> str:
    """The call that shows a state, such as ``model.layers.0 (output)``."""
    return f"{point.path} ({point.at})"


def _attention_rows(session: Session, number: int, chain: Chain) -> Iterator[Coverage]:
    """The states that attention leads to, with the module that attends."""
    places, selection = session.first.attention, session.options.selection
    for (owner, depth), module in sorted(places.modules.items()):
        if owner != number:
            continue
        point, stored = chain.points[depth], selection.stores_attention(chain, depth)
        # A first forward that had to be repeated showed it too, and counts as none.
        times = min(places.seen[owner, depth], session.step.num_forwards) if stored else 0
        name, why = PATTERN_NAME.replace("{i}", str(point.layer)), "" if stored else NOT_REQUESTED
        yield Coverage(name, "attention", module, point.layer, chain.name, times, times, why)


def _connection_rows(session: Session, chain: Chain, evidence: Evidence) -> Iterator[Coverage]:
    for number, connection in enumerate(chain.connections):
        for variable, why in _connection_variables(session, connection, evidence, number):
            stored = session.options.selection.stores_variable(chain, variable)
            # What does not exist is expected in no forward: it must not count as a site that failed to fire.
            times = session.step.num_forwards if stored and not why else 0
            name, module = f"blocks.{connection.layer}.{connection.branch}.{variable}", connection.path
            reason = why or ("" if stored else NOT_REQUESTED)
            yield Coverage(name, variable, module, connection.layer, chain.name, times, times, reason)


def _reads_several_sums(session: Session) -> bool:
    weights = (
        part for sequence in session.step.reservoir.stored.values() for part in sequence.parts.values()
    )
    return any(isinstance(of, DepthWeights) and of.read.shape[-2] > 1 for of in weights)


def _connection_variables(
    session: Session, connection: Connection, evidence: Evidence, number: int
) -> Iterator[tuple[str, str]]:
    """The variables of a connection, each with the reason why it does not exist."""
    if connection.style in (*PLAIN, DEPTH):
        yield "branch_in", SEVERAL_SUMS if connection.style == DEPTH and _reads_several_sums(session) else ""
        yield "branch_out", ""
        return
    parts, read = evidence.joints[number].parts, session.structure.read
    one_view = parts.write.shape[-1] == parts.branch_in.shape[-2] == 1
    several_views = "" if one_view else "several branch inputs: see read and write"
    gated = "read by gates per feature: no scalar weights exist" if parts.read is None else ""
    yield "h_res", "" if read is not None and read.mixes else "nothing mixes: the identity"
    yield "h_pre", gated or several_views
    yield "h_post", several_views
    yield "branch_in", ""
    yield "branch_out", ""


class Group(NamedTuple):
    """Depths of a chain whose states have one shape, so that they fit into one array."""

    name: str
    depths: list[int]


def chain_groups(session: Session, number: int) -> list[Group]:
    """Split a chain where the width or the number of tokens of its states changes; only states that are stored count."""
    chain = session.structure.chains[number]
    selection = session.options.selection
    stages: list[list[int]] = []
    for depth in sorted(selection.stored(chain)):
        if stages and chain.shapes[stages[-1][-1]] == chain.shapes[depth]:
            stages[-1].append(depth)
        else:
            stages.append([depth])
    # A chain of one stage has the chain's own name: runs of plain transformers have no groups below /trace.
    if len(stages) == 1:
        return [Group(chain.name, stages[0])]
    prefix = f"{chain.name}_" if chain.name else ""
    return [Group(f"{prefix}stage{i}", depths) for i, depths in enumerate(stages)]


def connections_within(chain: Chain, depths: list[int]) -> list[int]:
    """The positions of the connections that join two states of a group; others lead from one stage into the next."""
    first = last = depths[0]
    while first > 0 and chain.shapes[first - 1] == chain.shapes[first]:
        first -= 1
    while last + 1 < len(chain.shapes) and chain.shapes[last + 1] == chain.shapes[last]:
        last += 1
    connections = enumerate(chain.connections)
    return [at for at, of in connections if first <= of.depth_in and of.depth_out <= last]


def depth_coords(chain: Chain, depths: list[int]) -> dict[str, Any]:
    """Coordinates of the depth axis of a group."""
    points = [chain.points[depth] for depth in depths]
    return {
        "depth": np.array(depths),
        "layer": ("depth", np.array([point.layer for point in points])),
        "site": ("depth", np.array([point.site for point in points], dtype=object)),
        "module": ("depth", np.array([point.module for point in points], dtype=object)),
    }


def without_gradient(
    depths: list[int], reached: set[int], carried: set[int] | None = None
) -> dict[str, list[int]]:
    """The attributes that list depths which no gradient reached: below frozen weights, or below what detaches a state.

    ``carried`` are those that have a graph: their gradient was cut on its way, where it reached a later depth.
    """
    missing = [depth for depth in depths if depth not in reached]
    cut = [depth for depth in missing if depth in (carried or ()) and max(reached, default=-1) > depth]
    named = {schema.WITHOUT_GRADIENT: missing, schema.CUT_GRADIENT: cut}
    return {name: of for name, of in named.items() if of}
