"""Which attributes does a run get? What the model is, how it was measured, with which weights and on which data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any

import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels.memory import StreamMemory, bytes_text
from depthscope.diagnostics.package_versions import package_versions
from depthscope.diagnostics.schema import PROVEN, UNPROVEN
from depthscope.diagnostics.schema.joining import STAGE
from depthscope.probes.connections.proof import Evidence, constraint_of, constraint_words, measured_family
from depthscope.probes.model.modules import all_parameters
from depthscope.probes.run.connection_variables import changes_outside
from depthscope.probes.run.initial_weights import weights_digest
from depthscope.probes.session.forward import Sequence
from depthscope.probes.session.session import Session
from depthscope.probes.session.step import weights_stamp
from depthscope.probes.structure.chain import Chain

PACKAGES = ("torch", "transformers", "hyper-connections", "xarray", "numpy", "depthscope")

PARTS = {"h_res", "h_pre", "h_post"}
"""The formula counts connections that read, write and mix by one scalar for each stream."""


def stage_attribute(stage: tuple[int, int]) -> dict[str, Any]:
    """The attribute of a run of one stage.

    ``stage``: the number of the stage, from 0 on, and how many there are.
    """
    number, stages = stage
    if not 0 <= number < stages:
        raise InputError(
            f"stage is {stage}; expected (number, how many), with a number from 0 to {stages - 1}"
        )
    return {STAGE: [int(number), int(stages)]}


def run_attributes(
    session: Session, sequences: list[Sequence], evidence: Evidence, *, digests: bool = True
) -> dict[str, Any]:
    """The attributes of a run; those that do not apply are left out, and the digests where they are not wanted."""
    structure, options = session.structure, session.options
    dtype, precision = session.observer.dtype, session.observer.precision
    # Weights that were trained further since are not those that the run was measured with: no digest then.
    stored = session.step.reservoir.stored_stamp
    unchanged = digests and stored is not None and stored[0] == weights_stamp(session.model)
    parameters = all_parameters(session.model)
    layouts = [chain.layout for chain in structure.chains]
    attributes = {  # None: does not apply
        "model": type(session.model).__name__,
        "family": structure.family,
        "proof": run_proof(structure.chains, evidence) or None,
        "update": structure.chains[0].update or None,
        "not_covered": [part.as_dict() for part in structure.not_covered] or None,
        "n_streams": structure.num_streams,
        "layout": layouts[0],
        "layouts": layouts if len(set(layouts)) > 1 else None,
        "orientation": "not_applicable",
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": str(precision).removeprefix("torch.") if precision != dtype else None,
        "block": structure.chains[0].block_class,
        "num_blocks": len(structure.chains[0].blocks),
        # Tied weights count once, as parameters() lists them.
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "seed": options.seed,
        "data_digest": _data_digest(sequences) if digests else None,
        "distinct_tokens": _distinct_tokens(sequences),
        "weights_digest": weights_digest(session.model) if unchanged else None,
        "weights_not_read": _not_read(parameters) or None,
        "sampling": {
            "max_sequences": options.max_sequences,
            "seed": options.seed,
            "sequences_seen": session.step.reservoir.total,
            "sequences_kept": len(sequences),
            # Of a part of larger data, by which `open_run` puts the parts in order.
            **({"first_sequence": options.first_sequence} if options.first_sequence else {}),
        },
        "software": package_versions(PACKAGES),
        "forwards_skipped": session.skipped or None,
        "evaluations_left_out": session.step.num_left_out or None,
    }
    if structure.connections:
        attributes |= _of_connections(session, sequences, evidence)
    return {name: value for name, value in attributes.items() if value is not None}


def _of_connections(session: Session, sequences: list[Sequence], evidence: Evidence) -> dict[str, Any]:
    """What is said of connections with streams, and of how they were proven."""
    # NaN where nothing was compared, as where all sampled tokens are padding.
    errors = [error for error in evidence.errors if not math.isnan(error)]
    constraint = constraint_of(evidence)
    return {
        # By what the matrices are measured to satisfy, at these weights and on these tokens.
        "family": measured_family(session.structure.family, constraint),
        "constraint": constraint_words(evidence, constraint) or None,
        "orientation": evidence.orientation,
        "reconstruction_error": max(errors, default=None),
        "reconstruction_tolerance": evidence.tolerance if evidence.joints else None,
        "changes_outside": changes_outside(session, sequences) or None,
    }


def _not_read(parameters: list[nn.Parameter]) -> str:
    """Why nothing is said of the weights themselves; empty where all are in this process."""
    offloaded = sum(parameter.is_meta for parameter in parameters)
    if not offloaded:
        return ""
    return (
        f"{offloaded} of {len(parameters)} parameters are offloaded and come into memory for their module's forward alone: no "
        "digest, norms or updates of the weights, nor whether they are as initialised"
    )


def _distinct_tokens(sequences: list[Sequence]) -> dict[str, float] | None:
    """How many different tokens came in; None where the model's input is no row of integers per sequence."""
    known = [sequence for sequence in sequences if sequence.row is not None]
    rows = [sequence.row.reshape(-1) for sequence in known if sequence.row is not None]
    # Of packed sequences a row is a single number of many tokens.
    is_packed = any(
        len(row) == 1 and any(len(mask) > 1 for mask in sequence.mask.values())
        for row, sequence in zip(rows, known, strict=True)
    )
    if not rows or is_packed or any(row.is_floating_point() or row.is_complex() for row in rows):
        return None
    each = [int(row.unique().numel()) for row in rows]
    return {"per_sequence": sum(each) / len(each), "in_all": float(torch.cat(rows).unique().numel())}


def _data_digest(sequences: list[Sequence]) -> str:
    """SHA-256 over the model's input of the sampled sequences."""
    digest = hashlib.sha256()
    for sequence in sequences:
        if sequence.row is not None:
            # As bytes: numpy has no bfloat16. Flat: of packed sequences a row is a single number, which has no bytes to view.
            digest.update(sequence.row.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def memory_facts(
    trace: xr.Dataset, dtype: torch.dtype, measured: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The attribute ``memory`` of a run.

    ``measured``: what `kept_bytes` found, where it was asked.
    Returns: The counts of `StreamMemory`, those of `kept_bytes`, and ``sentence``; empty where nothing is known.
    """
    facts: dict[str, Any] = {}
    sentences: list[str] = []
    if set(trace.data_vars) >= PARTS:
        memory = StreamMemory(
            width=trace.sizes["feature"],
            streams=trace.sizes["stream"],
            sublayers=trace.sizes["connection"],
            element_bytes=dtype.itemsize,
        )
        facts |= memory.as_dict()
        sentences.append(memory.sentence())
    facts |= measured or {}
    if measured and "measured_kept_bytes" in measured:
        a_token = measured["measured_kept_bytes"] / measured["measured_tokens"]
        sentences.append(f"measured: a forward keeps {bytes_text(a_token)} a token for its backward in all")
    if sentences:
        facts["sentence"] = "; ".join(sentences)
    return facts


def chain_proof(chain: Chain, evidence: Evidence) -> str:
    """Whether a chain's reading is proven: its own statement, or else that of its stream connections; empty for none.

    ``evidence``: of the stream connections, which the first chain has.
    Returns: ``"proven"``, or ``"unproven: "`` and the reason.
    """
    stated = str(getattr(chain, "proof", ""))
    # A run whose stream connections do not give their next states is refused before this is asked.
    if stated.startswith(UNPROVEN) or not chain.has_streams or not evidence.joints:
        return stated
    unknown = [joint.path for joint in evidence.joints if math.isnan(joint.error)]
    if unknown:
        return f"{UNPROVEN}no sampled token has finite states around {unknown[0]!r}, so that nothing was recomputed"
    return PROVEN


def run_proof(chains: Many[Chain], evidence: Evidence) -> str:
    """The proof of a whole run: ``"proven"`` where every chain is, else the reasons of those that are not.

    Returns: Empty where a chain states nothing and none is unproven.
    """
    proofs = [(chain.name, chain_proof(chain, evidence)) for chain in chains]
    unproven = [(name, proof.removeprefix(UNPROVEN)) for name, proof in proofs if proof.startswith(UNPROVEN)]
    reasons = [f"{name}: {why}" if name else why for name, why in unproven]
    if reasons:
        return UNPROVEN + "; ".join(reasons)
    return PROVEN if all(proof == PROVEN for _, proof in proofs) else ""
