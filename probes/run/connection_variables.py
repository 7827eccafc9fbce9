"""The connections of a chain as arrays: their weights, what their branches took and gave, and the proof's numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from depthscope.diagnostics import schema
from depthscope.probes.connections.coefficients import relative_error
from depthscope.probes.connections.proof import Evidence, Joint, Reading, applied_matrix, solved_branch
from depthscope.probes.connections.read_weights import read_error
from depthscope.probes.session.reservoir import Sequence, padded
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import Chain, Connection

SINGLE = {"h_pre": "read", "h_post": "write", "branch_in": "views_in", "branch_out": "views_out"}


def connection_coords(links: tuple[Connection, ...]) -> dict[str, Any]:
    """Coordinates of the connection axis.

    Parameters
    ----------
    links : tuple of Connection
        The chain's connections.

    Returns
    -------
    dict of str to coordinate
    """
    return {
        "connection": np.arange(len(links)),
        "connection_layer": ("connection", np.array([link.layer for link in links])),
        "branch": ("connection", np.array([link.branch for link in links], dtype=object)),
        "connection_module": ("connection", np.array([link.path for link in links], dtype=object)),
        "depth_in": ("connection", np.array([link.depth_in for link in links])),
        "depth_out": ("connection", np.array([link.depth_out for link in links])),
    }


def connection_variables(
    session: Session, number: int, sequences: list[Sequence], evidence: Evidence, tokens: int
) -> dict[str, Any]:
    """Variables of a chain's connections, those that were asked for.

    Parameters
    ----------
    session : Session
        With its chains found.
    number : int
        Which chain.
    sequences : list of Sequence
        The kept sequences.
    evidence : Evidence
        The proofs of the stream connections.
    tokens : int
        Number of tokens of the longest sequence.

    Returns
    -------
    dict of str to (dims, ndarray)
    """
    chain = session.structure.chains[number]
    found = (
        _stream_variables(session, evidence)
        if chain.has_streams
        else _add_variables(number, chain, sequences, tokens)
    )
    asked = session.options.selection.stores_variable
    alias = {several: single for single, several in SINGLE.items()} | {"h_res_returned": "h_res"}
    numbers = ("reconstruction_error", "other_orientation_error", "read_error", "rounding")
    return {
        name: value for name, value in found.items() if name in numbers or asked(chain, alias.get(name, name))
    }


def _stream_variables(session: Session, evidence: Evidence) -> dict[str, Any]:
    arrays: dict[str, list[torch.Tensor]] = {}
    rounding, read_errors = [], []
    for number, joint in enumerate(evidence.joints):
        reading = evidence.reading(number)
        h_res = applied_matrix(joint, reading).float()
        returned = applied_matrix(joint, replace(reading, cast=False)).float()
        rounding.append(float((h_res - returned).abs().max()))
        read_errors.append(_read_error(joint))
        parts = joint.parts
        arrays.setdefault("h_res", []).append(h_res)
        arrays.setdefault("h_res_returned", []).append(returned)
        if all(other.parts.read is not None for other in evidence.joints):
            assert parts.read is not None
            arrays.setdefault("read", []).append(parts.read)
        arrays.setdefault("write", []).append(parts.write)
        arrays.setdefault("views_in", []).append(parts.branch_in)
        arrays.setdefault("views_out", []).append(_branch_out(joint, reading, h_res))
    if not any(rounding):
        del arrays["h_res_returned"]
    stacked = {
        name: np.stack([value.contiguous().numpy() for value in held]) for name, held in arrays.items()
    }
    several = [joint.parts for joint in evidence.joints]
    single = all(held.write.shape[-1] == held.branch_in.shape[-2] == 1 for held in several)
    variables = {
        name: (schema.TRACE[name].dims, value) for name, value in _named(stacked, single=single).items()
    }
    others = [_other(evidence, number) for number in range(len(evidence.proofs))]
    return variables | {
        "reconstruction_error": ("connection", np.array(evidence.errors)),
        "other_orientation_error": ("connection", np.array(others)),
        "read_error": ("connection", np.array(read_errors)),
        "rounding": ("connection", np.array(rounding)),
    }


def _named(arrays: dict[str, np.ndarray], *, single: bool) -> dict[str, np.ndarray]:
    """With one branch input the view axis is left out, and the weights are called H_pre and H_post."""
    if not single:
        return arrays
    axes = {"read": -2, "write": -1, "views_in": -2, "views_out": -2}
    names = {several: name for name, several in SINGLE.items()}
    return {
        names.get(name, name): value.squeeze(axes[name]) if name in axes else value
        for name, value in arrays.items()
    }


def _read_error(joint: Joint) -> float:
    flat = joint.tokens()
    if not len(flat.mask) or flat.parts.read is None or flat.parts.read.shape[-2] != 1:
        return math.nan
    return read_error(
        flat.x_in.unsqueeze(0), flat.parts.read.mT[None, ..., 0], flat.parts.branch_in[None, :, 0]
    )


def _other(evidence: Evidence, number: int) -> float:
    proof = evidence.proofs[number]
    other = proof.other if proof.reading.transposed == evidence.transposed else proof.error
    return other if math.isfinite(other) else math.nan


def _branch_out(joint: Joint, reading: Reading, h_res: torch.Tensor) -> torch.Tensor:
    if reading.observed and joint.parts.branch_out is not None:
        return joint.parts.branch_out
    rest = joint.x_out - torch.einsum("ktoi,ktid->ktod", h_res, joint.x_in)
    return solved_branch(rest, joint.parts.write)


def _add_variables(number: int, chain: Chain, sequences: list[Sequence], tokens: int) -> dict[str, Any]:
    """A plain block's branches: each takes the state before it, and state + α · Σ branches is proven where it is a state."""

    def states(depth: int) -> torch.Tensor:
        return torch.stack([padded(s.states[number, depth], tokens)[..., 0, :] for s in sequences])

    outs = [
        torch.stack([padded(s.branches[number, position], tokens) for s in sequences])
        for position in range(len(chain.connections))
    ]
    errors = []
    for link in chain.connections:
        if link.style == "normed":
            errors.append(math.nan)  # the sum itself is not a state
            continue
        change = states(link.depth_out) - states(link.depth_in)
        total = torch.stack(
            [o for o, other in zip(outs, chain.connections, strict=True) if other.depth_in == link.depth_in]
        )
        branch = total.sum(0).double()
        scale = (change.double() * branch).sum() / branch.square().sum().clamp_min(
            torch.finfo(torch.float64).tiny
        )
        errors.append(relative_error(change.double() - scale * branch, states(link.depth_out)))
    ins = torch.stack([states(link.depth_in) for link in chain.connections])
    return {
        "branch_in": (schema.TRACE["branch_in"].dims, ins.numpy()),
        "branch_out": (schema.TRACE["branch_out"].dims, torch.stack(outs).numpy()),
        "reconstruction_error": ("connection", np.array(errors)),
    }


def changes_outside(session: Session, sequences: list[Sequence]) -> list[dict[str, Any]]:
    """Where the streams change outside of the connections, as by a per-layer embedding: ‖X' − X‖ / ‖X‖.

    Parameters
    ----------
    session : Session
        With its chains found.
    sequences : list of Sequence
        The kept sequences.

    Returns
    -------
    list of dict
        ``depth_in, depth_out, module, change``.
    """
    joined = {link.depth_out for link in session.structure.connections}
    found = []
    for depth in range(1, len(session.structure.chains[0].points)) if session.structure.connections else ():
        if depth not in joined:
            before = torch.cat([s.states[0, depth - 1].flatten() for s in sequences])
            after = torch.cat([s.states[0, depth].flatten() for s in sequences])
            change = relative_error(after.double() - before.double(), before)
            module = session.structure.chains[0].points[depth].module
            found.append({"depth_in": depth - 1, "depth_out": depth, "module": module, "change": change})
    return found
