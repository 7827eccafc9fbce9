"""How do the connections of a chain become arrays? Their weights, their branches' inputs and outputs, the proof's errors."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import FROZEN_MODULES
from depthscope.probes.connections.proof import (
    Evidence,
    Joint,
    Parts,
    ReconstructionError,
    relative_error,
    tolerance,
)
from depthscope.probes.run.linear_variables import (
    PlainFactors,
    depth_variables,
    factor_variables,
    plain_factors,
)
from depthscope.probes.session.forward import Sequence as KeptSequence
from depthscope.probes.session.forward import padded, token_masks
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.weight_updates import VARIABLES, WeightNorms
from depthscope.probes.structure.chain import ADD, Chain, Connection

# A connection with one branch input has no view axis; its variables then have the papers' names.
ONE_VIEW_NAMES = {"read": "h_pre", "write": "h_post", "views_in": "branch_in", "views_out": "branch_out"}
VIEW_AXES = {"read": -2, "write": -1, "views_in": -2, "views_out": -2}
# These few numbers of each connection are stored whatever sites were requested.
ERRORS = ("reconstruction_error", "other_orientation_error", "read_error")


def connection_coords(connections: tuple[Connection, ...]) -> dict[str, Any]:
    """Coordinates of the connection axis of a chain."""
    return {
        "connection": np.arange(len(connections)),
        "connection_layer": ("connection", np.array([of.layer for of in connections])),
        "branch": ("connection", np.array([of.branch for of in connections], dtype=object)),
        "connection_module": ("connection", np.array([of.path for of in connections], dtype=object)),
        "depth_in": ("connection", np.array([of.depth_in for of in connections])),
        "depth_out": ("connection", np.array([of.depth_out for of in connections])),
    }


def connection_variables(
    session: Session,
    number: int,
    sequences: list[KeptSequence],
    evidence: Evidence,
    tokens: int,
    positions: list[int],
) -> dict[str, Any]:
    """Variables of some connections of a chain as (dims, array), those that were requested.

    ``positions``: of the connections in the chain; all of them where it has streams or sums over depth.
    ``tokens`` is the number of tokens of the longest sequence, to which the others are padded.
    """
    chain = session.structure.chains[number]
    precision = session.observer.precision
    if chain.has_streams:
        variables = _stream_variables(evidence)
    elif chain.over_depth:
        variables = _depth_variables(number, chain, sequences, tokens, precision)
    else:
        variables = _branch_variables(number, chain, sequences, tokens, precision, positions)
    stores = session.options.selection.stores_variable
    # What is known of a plain connection is known from its branch's output.
    of_branches = dict.fromkeys((*schema.PLAIN_FACTORS, "proof"), "branch_out")
    asked_as = {**ONE_VIEW_NAMES, **of_branches}
    return {
        name: value
        for name, value in variables.items()
        if name in ERRORS or stores(chain, asked_as.get(name, name))
    }


def _stream_variables(evidence: Evidence) -> dict[str, Any]:
    """Weights, branches and errors of stream connections, as proven."""
    joints = evidence.joints
    tensors: dict[str, list[torch.Tensor]] = {"h_res": [joint.matrix for joint in joints]}
    reads = [joint.parts.read for joint in joints if joint.parts.read is not None]
    if len(reads) == len(joints):  # gates per feature have no scalar read weights
        tensors["read"] = reads
    tensors["write"] = [joint.parts.write for joint in joints]
    tensors["views_in"] = [joint.parts.branch_in for joint in joints]
    tensors["views_out"] = [joint.parts.branch_out for joint in joints]
    arrays = {name: np.stack([t.contiguous().numpy() for t in of]) for name, of in tensors.items()}
    if all(joint.parts.write.shape[-1] == joint.parts.branch_in.shape[-2] == 1 for joint in joints):
        arrays = {
            ONE_VIEW_NAMES.get(name, name): array.squeeze(VIEW_AXES[name]) if name in VIEW_AXES else array
            for name, array in arrays.items()
        }
    variables: dict[str, Any] = {name: (schema.TRACE[name].dims, array) for name, array in arrays.items()}
    variables["reconstruction_error"] = ("connection", np.array(evidence.errors))
    variables["other_orientation_error"] = ("connection", np.array([joint.other_error for joint in joints]))
    variables["read_error"] = ("connection", np.array([_read_error(joint) for joint in joints]))
    return variables


def _read_error(joint: Joint) -> float:
    """How well the read weights give the branch's input; NaN where they have several views, or are no scalars."""
    tokens = joint.sample
    if not len(tokens.mask) or tokens.parts.read is None or tokens.parts.read.shape[-2] != 1:
        return math.nan
    again = torch.einsum("tn,tnd->td", tokens.parts.read[:, 0].double(), tokens.x_in.double())
    taken = tokens.parts.branch_in[:, 0].double()
    return relative_error(again - taken, taken)


def _branch_variables(
    number: int,
    chain: Chain,
    sequences: list[KeptSequence],
    tokens: int,
    precision: torch.dtype,
    positions: list[int],
) -> dict[str, Any]:
    """The branches of plain blocks, their factors where these are not 1, and the error of X' = a X + Σ b F."""
    connections = tuple(chain.connections[position] for position in positions)
    states, outputs = _states_and_outputs(number, positions, sequences, tokens)
    mask = torch.from_numpy(np.stack(token_masks(sequences, number, connections[0].depth_in)))
    found = [
        _connection_factors(states, outputs, connections, at, mask, precision) for at in range(len(outputs))
    ]
    inputs = torch.stack([states(connection.depth_in) for connection in connections])
    return {
        "branch_in": (schema.TRACE["branch_in"].dims, inputs.numpy()),
        "branch_out": (schema.TRACE["branch_out"].dims, torch.stack(outputs).numpy()),
        "reconstruction_error": ("connection", np.array([each.error for each in found])),
        **factor_variables([each.keep for each in found], [each.write[0] for each in found]),
        "proof": ("connection", np.array([_proof_of(each) for each in found], dtype=object)),
    }


def _states_and_outputs(
    number: int, positions: Iterable[int], sequences: list[KeptSequence], tokens: int
) -> tuple[Callable[[int], torch.Tensor], list[torch.Tensor]]:
    """The states of a chain by depth, and the outputs of some of its branches; (K, T, D) each."""

    def states(depth: int) -> torch.Tensor:
        return torch.stack([padded(s.states[number, depth], tokens)[..., 0, :] for s in sequences])

    outputs = [
        torch.stack([padded(s.branches[number, position], tokens) for s in sequences])
        for position in positions
    ]
    return states, outputs


def _depth_variables(
    number: int, chain: Chain, sequences: list[KeptSequence], tokens: int, precision: torch.dtype
) -> dict[str, Any]:
    """The weights of connections over depth, and the error of X_{k+1} = Σ_j carry_kj v_j + scale_k F_k."""
    states, _ = _states_and_outputs(number, (), sequences, tokens)

    def weights(name: str) -> list[torch.Tensor]:
        """One of the weights of each connection, (K, T, …)."""
        return [
            torch.stack([padded(getattr(s.parts[number, position], name), tokens) for s in sequences])
            for position in range(len(chain.connections))
        ]

    reads, carries, scales, outputs = map(weights, ("read", "carry", "scale", "branch_out"))
    sources = torch.stack([states(0), *outputs], -2).double()
    mask = torch.from_numpy(np.stack(token_masks(sequences, number)))
    errors = []
    for position, (carry, scale) in enumerate(zip(carries, scales, strict=True)):
        row = carry.double().clone()
        row[..., position + 1] = scale.double()
        after = states(chain.connections[position].depth_out)
        again = torch.einsum("kts,ktsd->ktd", row, sources[..., : row.shape[-1], :])
        errors.append(relative_error((after.double() - again)[mask], after[mask]))
    worst = int(np.argmax(errors))
    if not errors[worst] <= tolerance(precision):  # NaN is refused too
        raise ReconstructionError(
            f"connection {worst} ({chain.connections[worst].path!r}): the sum over depth of the embedding and of the "
            f"branches' outputs misses the next state by a relative error of {errors[worst]:.1e} (tolerance "
            f"{tolerance(precision):.0e}); the capture is refused"
        )
    views = max(read.shape[-2] for read in reads)
    inputs = [
        _depth_read(states(c.depth_in), read, sources, precision)
        for c, read in zip(chain.connections, reads, strict=True)
    ]
    taken = torch.stack([_with_views(of, views) for of in inputs])
    name = "branch_in" if views == 1 else "views_in"
    return {
        name: (schema.TRACE[name].dims, (taken[..., 0, :] if views == 1 else taken).numpy()),
        "branch_out": (schema.TRACE["branch_out"].dims, torch.stack(outputs).numpy()),
        "reconstruction_error": ("connection", np.array(errors)),
        **depth_variables([_with_views(read, views) for read in reads], carries),
        # Also where it is 1: the weights of the sources leave it out.
        "branch_scale": (schema.TRACE["branch_scale"].dims, torch.stack(scales).numpy()),
    }


def _depth_read(
    state: torch.Tensor, read: torch.Tensor, sources: torch.Tensor, precision: torch.dtype
) -> torch.Tensor:
    """What a branch reads, (K, T, V, D): the state before it, bit by bit, where it is that; else the sums of its sources."""
    found = torch.einsum("ktvs,ktsd->ktvd", read.double(), sources[..., : read.shape[-1], :])
    is_state = found.shape[-2] == 1 and relative_error(found[..., 0, :] - state.double(), found) <= tolerance(
        precision
    )
    return state.unsqueeze(-2) if is_state else found.to(state.dtype)


def _with_views(of: torch.Tensor, views: int) -> torch.Tensor:
    """(K, T, V, …) with NaN for the inputs that a branch does not have."""
    missing = of.new_full((*of.shape[:2], views - of.shape[2], *of.shape[3:]), math.nan)
    return torch.cat([of, missing], 2)


def _connection_factors(
    states: Callable[[int], torch.Tensor],
    outputs: list[torch.Tensor],
    connections: tuple[Connection, ...],
    position: int,
    mask: torch.Tensor,
    precision: torch.dtype,
) -> PlainFactors:
    """The factors of one connection, (K, T) or (K, T, D), with the write factor of its own branch alone."""
    own = connections[position]
    if own.style != ADD:  # the next state is a norm of the sum; no module shows the sum itself
        return PlainFactors(None, (None,), math.nan)
    # Parallel branches, as of GPT-J, start from one state and are added together.
    parallel = [i for i, other in enumerate(connections) if other.depth_in == own.depth_in]
    before, after = states(own.depth_in), states(own.depth_out)
    real = mask & before.isfinite().all(-1) & after.isfinite().all(-1)
    for output in outputs:
        real = real & output.isfinite().all(-1)
    found = plain_factors(before[real], [outputs[i][real] for i in parallel], after[real], precision)

    def everywhere(factor: torch.Tensor | None) -> torch.Tensor | None:
        """A factor of the real tokens as one of all, 1 on padding."""
        if factor is None:
            return None
        per_feature = factor.shape[-1] > 1
        whole = torch.ones(before.shape if per_feature else before.shape[:-1])
        whole[real] = (factor.expand(int(real.sum()), -1) if per_feature else factor[:, 0]).float()
        return whole

    write = everywhere(found.write[parallel.index(position)])
    return PlainFactors(everywhere(found.keep), (write,), found.error, found.known)


def _proof_of(found: PlainFactors) -> str:
    if found.known:
        return schema.PROVEN
    return (
        f"{schema.UNPROVEN}no factors of a token or a feature give the next state from the state and the branch's output "
        f"(relative error {found.error:.1e} without factors)"
    )


def changes_outside(session: Session, sequences: list[KeptSequence]) -> list[dict[str, Any]]:
    """Where the streams change outside of the connections and branches, as by a per-layer embedding or noise: ‖change‖ / ‖X‖.

    One dict with ``depth_in, depth_out, module, change`` for each such place.
    """

    def whole(depth: int) -> torch.Tensor:
        return torch.cat([sequence.states[0, depth].flatten() for sequence in sequences])

    numbers = {of.depth_out: number for number, of in enumerate(session.structure.connections)}
    changes = []
    for depth in range(1, len(session.structure.chains[0].points)):
        number = numbers.get(depth)
        begin = depth - 1 if number is None else session.structure.connections[number].depth_in
        parts = [] if number is None else [s.parts[0, number] for s in sequences]
        known = [of.constant.flatten() for of in parts if isinstance(of, Parts) and of.constant is not None]
        if number is not None and not known:
            continue
        before = whole(begin)
        added = torch.cat(known) if known else whole(depth).double() - before.double()
        module = session.structure.chains[0].points[depth].module
        change = relative_error(added, before)
        changes.append({"depth_in": begin, "depth_out": depth, "module": module, "change": change})
    return changes


OUTSIDE_BLOCKS = -1  # for a layer


def weight_variables(
    measured: WeightNorms | None,
    chains: Sequence[Chain],
    number: int,
    starts: Sequence[int],
    stage: int,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of one group of ``/statistics`` what a step has of its weights, what has no step, and the coordinates; empty for none.

    A module belongs to the chain whose block contains it, any other one to the first chain. Of a chain's stages, whose first
    depths are ``starts``, each gets the modules of the blocks that end in it.
    """
    chosen, layers = [], []
    for i, path in enumerate([] if measured is None else measured.paths):
        chain, layer, depth = _chain_layer_depth(path, chains)
        # Of the stage that contains this depth; weights before the first stored depth go to the first stage.
        if chain == number and max(0, bisect_right(starts, depth) - 1) == stage:
            chosen.append(i)
            layers.append(layer)
    if measured is None or not chosen:
        return {}, {}, {}
    numbers: dict[str, Any] = {name: (("weight",), measured.values[name][chosen]) for name in VARIABLES}
    paths = [measured.paths[i] for i in chosen]
    if frozen := [path for path in paths if path in measured.frozen]:
        # Its update is undefined, since nothing was to change.
        update = "weight_update_square_norm"
        numbers[update] = (*numbers[update], {FROZEN_MODULES: frozen})
    coords = {
        "weight": (("weight",), np.array(paths, dtype=object)),
        "weight_layer": (("weight",), np.array(layers, dtype=int)),
    }
    return numbers, {"weight_count": ("weight", measured.counts[chosen])}, coords


def _chain_layer_depth(path: str, chains: Sequence[Chain]) -> tuple[int, int, int]:
    """Chain, block number and last depth of a module; outside of all blocks the start of the first chain."""
    for number, chain in enumerate(chains):
        layers = _block_layers(chain)
        containing = [block for block in layers if path == block or path.startswith(f"{block}.")]
        if containing:
            layer = layers[max(containing, key=len)]  # the innermost of nested blocks
            own = [i for i, place in enumerate(chain.points) if place.layer == layer]
            # The state of a block may be none of the chain's, as that of the first one where queries read outputs.
            earlier = [i for i, place in enumerate(chain.points) if place.layer < layer]
            return number, layer, max(own or earlier, default=0)
    return 0, OUTSIDE_BLOCKS, 0


def _block_layers(chain: Chain) -> dict[str, int]:
    """Paths of the modules with a block's weights, with the number of the block among the depths."""
    layers: dict[str, int] = {}
    for place, following in pairwise(chain.points):
        if place.path in chain.blocks:
            # A state read at a block's input was made by the block before: this block makes the next one.
            layers.setdefault(place.path, following.layer if place.at == "input" else place.layer)
    for link in chain.connections:
        around = [block for block in chain.blocks if link.path.startswith(f"{block}.")]
        for path in filter(None, (*around, link.path, link.branch_path)):
            layers.setdefault(path, link.layer)
    return layers
