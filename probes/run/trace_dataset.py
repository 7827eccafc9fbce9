"""How does ``/trace`` come from the sampled sequences? States, gradients, connections, masks and texts as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.probes.connections.proof import Evidence
from depthscope.probes.run.attributes import chain_proof
from depthscope.probes.run.connection_variables import connection_coords, connection_variables
from depthscope.probes.run.coverage import connections_within, depth_coords, without_gradient
from depthscope.probes.run.initial_weights import weight_facts
from depthscope.probes.run.linear_variables import linear_coords
from depthscope.probes.session.forward import Sequence, padded, token_masks
from depthscope.probes.session.session import Session
from depthscope.probes.structure.model_structure import FINAL


def trace_dataset(
    session: Session,
    number: int,
    depths: list[int],
    sequences: list[Sequence],
    evidence: Evidence,
    token_text: Any,
    *,
    described: bool = False,
) -> xr.Dataset:
    """The trace of one group: some depths of chain ``number``; ``token_text`` is by the sequence's index.

    ``described``: leave out what the weights say of the start of the training.
    """
    chain, selection = session.structure.chains[number], session.options.selection
    mask = np.stack(token_masks(sequences, number, depths[0]))
    tokens = mask.shape[1]
    # Sequences of several batches may differ in length: zeros, which the mask marks as padding.
    states = [padded(s.states[number, depth], tokens) for depth in depths for s in sequences]
    residual = torch.stack(states).unflatten(0, (len(depths), len(sequences))).numpy()
    variables: dict[str, Any] = {"residual": (schema.STATE, residual), "mask": (("sample", "token"), mask)}
    if any(sequence.gradients for sequence in sequences):
        values = _gradients(number, depths, sequences, residual.shape)
        reached = {depth for sequence in sequences for owner, depth in sequence.gradients if owner == number}
        carried = {depth for sequence in sequences for owner, depth in sequence.carried if owner == number}
        variables["gradient"] = (schema.STATE, values, without_gradient(depths, reached, carried))
    coords = depth_coords(chain, depths)
    coords["sample"] = np.array([sequence.index for sequence in sequences])
    coords["token"] = np.arange(tokens)
    coords["stream"] = np.arange(residual.shape[3])
    within = connections_within(chain, depths)
    if within and selection.stores_connections(chain):
        of_connections = connection_variables(session, number, sequences, evidence, tokens, within)
        variables |= {
            name: of_connections[name] for name in of_connections if name not in schema.TRACE_COORDS
        }
        coords |= {name: of_connections[name] for name in of_connections if name in schema.TRACE_COORDS}
        connections = tuple(chain.connections[position] for position in within)
        coords |= connection_coords(connections) | linear_coords(connections, over_depth=chain.over_depth)
    if selection.includes("attention"):
        variables.update(_attention_variables(session, number, depths, sequences, tokens))
    variables.update(_final_variables(number, sequences, tokens, residual.shape[-1]))
    if token_text is not None:
        variables["token_text"] = (("sample", "token"), _token_texts(token_text, sequences, tokens))
    # The chain's own: another chain of the run may be unproven.
    proof = chain_proof(chain, evidence)
    facts = {"proof": proof} if proof else {}
    if not described:  # of the age of a chain's blocks, and of mistakes in loading them
        facts |= weight_facts(session.model, chain)
    trace = xr.Dataset(variables, coords, attrs=facts)
    if "connection" not in trace.dims:
        return trace
    # Cut only now: the variables are computed from all connections, whose branches add up to one state.
    kept = [selection.stores_connection(chain.connections[position]) for position in within]
    stored = [i for i, is_kept in enumerate(kept) if is_kept]
    return trace.isel(connection=stored)


def _gradients(
    number: int, depths: list[int], sequences: list[Sequence], shape: tuple[int, ...]
) -> np.ndarray:
    """Gradients in the shape of the states; NaN where none reached a state."""
    gradients = np.full(shape, np.nan, dtype=np.float32)
    for i, depth in enumerate(depths):
        for j, sequence in enumerate(sequences):
            gradient = sequence.gradients.get((number, depth))
            if gradient is not None:
                gradients[i, j] = padded(gradient, shape[2]).numpy()
    return gradients


def _attention_variables(
    session: Session, number: int, depths: list[int], sequences: list[Sequence], tokens: int
) -> dict[str, Any]:
    """What the queries attend to before each state; NaN where no attention leads to it, or it was not looked at."""
    chain, selection = session.structure.chains[number], session.options.selection
    known = {
        (i, j): rows
        for i, depth in enumerate(depths)
        for j, sequence in enumerate(sequences)
        if (rows := sequence.attention.get((number, depth))) is not None
        and selection.stores_attention(chain, depth)
    }
    if not known:
        return {}
    heads = max(rows.shape[1] for rows in known.values())
    values = np.full(
        (len(schema.OF_ATTENTION), len(depths), len(sequences), heads, tokens), np.nan, np.float32
    )
    for (i, j), rows in known.items():
        values[:, i, j, : rows.shape[1], : rows.shape[2]] = rows.numpy()
    return {name: (schema.QUERY, of_one) for name, of_one in zip(schema.OF_ATTENTION, values, strict=True)}


def _final_variables(number: int, sequences: list[Sequence], tokens: int, width: int) -> dict[str, Any]:
    """The states after the last norm and their gradients, where all have the group's tokens and width."""
    # Another width or more tokens belong to another stage, or to a head that pools or projects.
    found = {}
    for name, attribute in (("final", "states"), ("final_gradient", "gradients")):
        tensors = [getattr(sequence, attribute).get((number, FINAL)) for sequence in sequences]
        fitting = [t for t in tensors if t is not None and t.shape[0] <= tokens and t.shape[-1] == width]
        if fitting and len(fitting) == len(tensors):
            values = torch.stack([padded(t, tokens) for t in fitting]).numpy()
            found[name] = (("sample", "token", "feature"), values)
    return found


def _token_texts(token_text: Any, sequences: list[Sequence], tokens: int) -> np.ndarray:
    texts = np.full((len(sequences), tokens), "", dtype=object)
    for i, sequence in enumerate(sequences):
        if sequence.index < len(token_text):  # of a loader's later batches the user may have given no text
            words = list(token_text[sequence.index])[:tokens]
            texts[i, : len(words)] = words
    return texts
