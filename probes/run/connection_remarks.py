"""What is odd about the connections and modules of a run? Facts of the sample, and what `settle` found in more forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.proof import Evidence
from depthscope.probes.connections.remarks import passing_inside, remarks
from depthscope.probes.session.session import Session


def all_remarks(
    session: Session,
    evidence: Evidence,
    indices: Sequence[int],
    foreign_norms: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """What is odd about a run, as plain values.

    ``indices``: of the sampled sequences, over all forwards.
    ``foreign_norms``: the batch norms whose running statistics are of other data, as a forward has shown, see `NormInputs`.
    """
    structure, origins, joints = session.structure, session.observer.origins, evidence.joints
    # The sampled sequences are in the order of the data, and these are of its first batch.
    kept = [] if origins is None else [n for n, index in enumerate(origins.indices) if index in indices]
    if origins is not None and kept:
        pairs = zip(joints, origins.origins, strict=True)
        joints = tuple(replace(joint, origin=origin.at(kept)) for joint, origin in pairs)
    inner = (
        passing_inside(structure.inner_streams, len(structure.chains[0].points) - 1)
        if structure.inner_streams
        else ()
    )
    of_modules = _module_remarks(session.model, foreign_norms)
    return [*(remark.as_dict() for remark in (*inner, *remarks(joints))), *of_modules]


NAMED = 3  # modules in a sentence


def _module_remarks(model: nn.Module, foreign_norms: Sequence[str]) -> list[dict[str, Any]]:
    """Remarks in the form of those about connections; empty where nothing is odd."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    trained = [name for name, module in norms.items() if not module.training and _is_trained(module)]
    # As they were made.
    stale = [
        name
        for name in trained
        if bool((norms[name].running_mean == 0).all() and (norms[name].running_var == 1).all())
    ]
    foreign = [name for name in trained if name in foreign_norms]
    if not stale and not foreign:
        return []
    sentence = (
        f"{len(stale)} of {len(norms)} batch norms ({_named(stale)}) have trained weights, and running "
        "statistics of mean 0 and variance 1 as they were made"
        if stale
        else f"{len(foreign)} of {len(norms)} batch norms ({_named(foreign)}) have running statistics of other data: in a "
        "typical channel the standard deviation differs by a factor of 3 or more, or the mean by 3 of them"
    )
    count = float(len(stale or foreign))
    return [
        {"kind": "stale_statistics", "sentence": sentence, "value": count, "connections": [], "sure": True}
    ]


def _named(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - NAMED} more" if len(modules) > NAMED else ""
    return f"{', '.join(modules[:NAMED])}{more}"


def _is_trained(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether its weights have moved from 1 and 0."""
    known = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if any(not isinstance(each, torch.Tensor) or each.is_meta for each in known):
        return False
    return bool((norm.weight != 1).any()) or bool((norm.bias != 0).any())
