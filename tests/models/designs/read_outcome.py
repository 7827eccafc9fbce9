"""Is what the one reading says of a design right? As `outcome`, of a `NetworkReading` in the place of a run.

The words are those of `outcome`; names of families and constraints, gradients and sampling are no part of a reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from depthscope.probes.reading.description import ConnectionReading, MemoryReading, NetworkReading
from tests.models.designs import truth as notes
from tests.models.designs.design import Design
from tests.models.designs.outcome import ROUNDING, Outcome, are_ones
from tests.models.recorded import read_model


class Mistake(Exception):
    """Something in a reading is not what the model wrote down."""


@dataclass
class _Fit:
    """A memory, the numbers of its states in a chain, and the order of the chain's tokens in it."""

    memory: MemoryReading
    places: list[int]
    order: torch.Tensor


def reading_of(design: Design) -> NetworkReading:
    """The reading of a design's first batch."""
    model, batch = design.build(), design.batch(0)
    with torch.random.fork_rng():
        torch.manual_seed(notes.SEED)
        return read_model(model, batch)


def read_outcome(design: Design) -> Outcome:
    """What the reading of a design is, compared with the design's own truth."""
    truth = design.truth(design.build(), design.batch(0))
    try:
        return judged(reading_of(design), truth, labels=design.labelled, rounding=design.rounding)
    except Exception as error:  # what else a reading raises is a defect, which the table names
        return Outcome("crashed", f"{type(error).__name__}: {error}")


def judged(found: NetworkReading, truth: notes.Truth, *, labels: bool, rounding: float) -> Outcome:
    """A reading compared with the truth."""
    if found.refused:
        return Outcome("refused", found.refused)
    unproven = next((m.proof for m in found.memories if not m.is_proven), "")
    try:
        missing = sorted(_compared(found, truth, labels, rounding)) if truth else ["network"]
    except Mistake as mistake:
        return Outcome("unproven, off" if unproven else "wrong", f"{mistake} {unproven}".strip())
    if not truth:
        return Outcome("unproven" if unproven else "wrong", unproven or "this is no residual network")
    if unproven:
        return Outcome("unproven", unproven.removeprefix("unproven: "))
    if any(name.startswith("chain") for name in missing):
        return Outcome("part", f"without {', '.join(missing)} {dict(found.left_out)}")
    return Outcome("states", f"without {', '.join(missing)}") if missing else Outcome("right")


def _compared(found: NetworkReading, truth: notes.Truth, labels: bool, rounding: float) -> set[str]:
    missing: set[str] = set()
    left = {name: {s.need for s in chain.states if s.need} for name, chain in truth.items()}
    all_needs = {name: set(of) for name, of in left.items()}
    for memory in found.memories:
        name, fit = _placed(memory, truth, labels, rounding)
        if fit is None:
            continue  # a further memory, as of a router, that the design does not write down
        left[name] -= {truth[name].states[place].need for place in fit.places}
        missing |= _parts_missing(fit, truth[name], rounding)
    for name, needs in left.items():
        if needs and needs == all_needs[name]:
            missing.add(f"chain {name!r}")
        elif needs:
            raise Mistake(f"chain {name!r}: no state of {', '.join(sorted(needs))}")
    return missing


def _placed(
    memory: MemoryReading, truth: notes.Truth, labels: bool, rounding: float
) -> tuple[str, _Fit | None]:
    mistakes: dict[int, str] = {}
    for name, chain in truth.items():
        for order in _orders(memory.token_shape):
            places, mistake = _places(memory, chain, order, labels, rounding)
            if not mistake:
                return name, _Fit(memory, places, order)
            mistakes.setdefault(len(places), mistake)
    best = max(mistakes)
    if best == 0 and len(truth) == 0:
        return "", None
    raise Mistake(f"{memory.name}: {mistakes[best]}")


def _orders(token_shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The orders in which a truth may have the tokens: as they are, or sequences before tokens."""
    base = torch.arange(torch.Size(token_shape).numel())
    return [base, base.reshape(token_shape).T.reshape(-1)] if len(token_shape) == 2 else [base]


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, *value.shape[2:])


def _same(mine: torch.Tensor, true: torch.Tensor, rounding: float = ROUNDING) -> bool:
    scale = max(float(true.abs().max()), 1e-6)
    return mine.shape == true.shape and float((mine - true).abs().max()) < 2 * rounding * scale


def _places(
    memory: MemoryReading, chain: notes.Chain, order: torch.Tensor, labels: bool, rounding: float
) -> tuple[list[int], str]:
    places: list[int] = []
    for depth, state in enumerate(memory.states):
        if len(order) != len(state.value):
            return places, f"state {depth} has {len(state.value)} tokens, not {len(order)}"
        values, begin = state.value[order].float(), places[-1] + 1 if places else 0
        fits = [n for n, s in enumerate(chain.states) if _same(values, _flat(s.value), rounding)]
        place = next((n for n in fits if n >= begin), None)
        label = f"{state.site} of block {state.layer}"
        if place is None:
            where = f"state {depth} of {len(memory.states)}, «{label}», {tuple(values.shape)}"
            return places, f"{where} is none (earlier: {fits})"
        true_state = chain.states[place]
        number = -1 if state.site == "embed" else true_state.layer + (state.site == "pre")
        if labels and (state.site not in true_state.sites or state.layer != number):
            return (
                places,
                f"state {depth}, «{label}», is {'|'.join(true_state.sites)} of block {true_state.layer}",
            )
        places.append(place)
    return places, ""


def _parts_missing(fit: _Fit, chain: notes.Chain, rounding: float) -> set[str]:
    true = {(c.state_in, c.state_out): c.parts for c in chain.connections}
    missing: set[str] = set()
    unsaid = are_ones(true.values()) | {"branch_in", "branch_out"}
    for connection in fit.memory.connections:
        joined = fit.places[connection.depth_in], fit.places[connection.depth_out]
        for name, value in true.get(joined, {}).items():
            mine = _part(connection, name, value)
            if mine is None:
                missing |= {name} - unsaid
                continue
            mine, value = mine.expand(len(fit.order), *mine.shape[1:])[fit.order].float(), _flat(value)
            if not _same(mine, value, rounding):
                raise Mistake(f"{name} of connection {connection.depth_in} {_how(mine, value)}")
    return missing


def _how(mine: torch.Tensor, true: torch.Tensor) -> str:
    if mine.shape != true.shape:
        return f"has shape {tuple(mine.shape)}, not {tuple(true.shape)}"
    return f"is off by {float((mine - true).abs().max()):.2g}"


def _part(connection: ConnectionReading, name: str, true: torch.Tensor) -> torch.Tensor | None:
    """What a connection says of a part, in the truth's shape; None where it says nothing of it."""
    parts, branches = connection.parts, connection.branches
    one = branches[0].parts if len(branches) == 1 else {}
    if name == "residual_scale":
        return parts["h_res"][:, 0, 0] if "h_res" in parts else None
    if name == "residual_gate":
        found = parts.get("residual_gate", parts["h_res"][:, 0] if "h_res" in parts else None)
        return None if found is None else found.expand(-1, true.shape[-1])
    if name == "branch_gate":
        found = one.get("branch_gate", _single(one, "write"))
        return None if found is None or found.ndim > 2 else found.expand(-1, true.shape[-1])
    if name == "branch_scale":
        return _branch_scale(branches)
    if name in ("depth_read", "depth_carry") and name in parts:
        return torch.nn.functional.pad(parts[name], (0, true.shape[-1] - parts[name].shape[-1]))
    if name == "branch_out" and "out" in one and one["out"].shape[1] == 1:
        return one["out"][:, 0]
    if name in ("h_pre", "h_post"):
        return _single(one, "read" if name == "h_pre" else "write")
    return parts.get(name) if name == "h_res" else one.get(name)


def _single(parts: Any, name: str) -> torch.Tensor | None:
    """The weights of a branch with one input, and one output."""
    found, axis = parts.get(name), -2 if name == "read" else -1
    return None if found is None or found.shape[axis] > 1 else found.squeeze(axis)


def _branch_scale(branches: Any) -> torch.Tensor | None:
    written = [_single(branch.parts, "write") for branch in branches]
    scales = [write[:, 0] for write in written if write is not None]
    if not scales or len(scales) < len(branches) or any(not torch.equal(s, scales[0]) for s in scales[1:]):
        return None
    return scales[0]
