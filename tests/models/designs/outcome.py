"""Is what a capture says of a design right, unproven, refused, or wrong?

``right``: every state is one that the model wrote down, with its true label, none that is needed is missing, and every
matrix, scale and read that is reported equals the model's own; none is missing that the model has.
``states``: the same, but parts of the connections are missing (and nothing else is said of them).
``unproven``: the run says that its reading is not proven, and the states are right; ``unproven, states off``: they are not.
``refused``: a ValueError of ours with a reason. ``misnamed``: right in its numbers, under another family's name.
``crashed``: an error of somebody else's. ``wrong``: all the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope import probes
from depthscope.diagnostics import schema
from tests.models.designs import truth as notes
from tests.models.designs.design import Design

# Rounding: sums of a few hundred float32 numbers in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Names of a run whose family claims nothing: the states alone were captured.
NO_CLAIM = ("unknown", "unproven")


@dataclass(frozen=True)
class Outcome:
    """A word for the table, and what is wrong or why."""

    word: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.why}" if self.why else self.word


class Mistake(Exception):
    """Something in a run is not what the model wrote down."""


def outcome(design: Design, seed: int = 0, **options: Any) -> Outcome:
    """What a capture of the design is, compared with the design's own truth."""
    model, batch = design.build(seed), design.batch(seed)
    truth = design.truth(model, batch)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(notes.SEED)
            run = probes.capture(model, batch, **options)
    except ValueError as error:
        # A ValueError of torch or of numpy is no refusal of ours: its class is theirs.
        ours = type(error).__module__.startswith("depthscope")
        return Outcome("refused" if ours else "crashed", f"{type(error).__name__}: {error}")
    except Exception as error:  # what else a capture raises is a defect, which the table names
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    return judged(design, run, truth)


def judged(design: Design, run: xr.DataTree, truth: notes.Truth) -> Outcome:
    """Compare a run with the truth."""
    proof = str(run.attrs.get("proof", ""))
    family = str(run.attrs["family"])
    unproven = proof.startswith("unproven") or family in NO_CLAIM
    try:
        missing = sorted(set(_compared(run, truth)))
    except Mistake as mistake:
        return Outcome("unproven, states off" if unproven else "wrong", str(mistake))
    if unproven:
        return Outcome("unproven", proof.removeprefix("unproven").strip(": "))
    if family not in design.family.split("|"):
        word = "misnamed" if design.family else "wrong"
        return Outcome(word, f"called {family!r}, and is {design.family or 'no residual network'}")
    return Outcome("states", f"without {', '.join(missing)}") if missing else Outcome("right")


def _compared(run: xr.DataTree, truth: notes.Truth) -> Iterator[str]:
    """The names of parts that are missing in a run; raises where something is not true."""
    left = {name: {s.need for s in chain.states if s.need} for name, chain in truth.items()}
    for group in schema.chains(run):
        trace = schema.chain_dataset(run, "trace", group)
        assert trace is not None
        sampled = {name: _sampled(chain, trace["sample"].values) for name, chain in truth.items()}
        name, places = _place_states(trace, sampled)
        left[name] -= {truth[name].states[place].need for place in places}
        yield from _compare_connections(trace, sampled[name], places)
    for name, needs in left.items():
        if needs:
            raise Mistake(f"chain {name!r}: no state of {', '.join(sorted(needs))}")


def _sampled(chain: notes.Chain, sequences: np.ndarray) -> notes.Chain:
    """The chain of those sequences that a run stores: of many it draws some."""
    rows = torch.tensor(sequences.tolist())
    if int(rows.max()) >= len(chain.states[0].value):
        return chain  # tokens were taken for sequences, which the shapes will tell
    states = [replace(state, value=state.value[rows]) for state in chain.states]
    parts = [{name: value[rows] for name, value in of.parts.items()} for of in chain.connections]
    joined = [replace(of, parts=part) for of, part in zip(chain.connections, parts, strict=True)]
    return notes.Chain(states, joined)


def _place_states(trace: xr.Dataset, truth: notes.Truth) -> tuple[str, list[int]]:
    """The chain whose states a group holds, and the number of each of them in it."""
    mistakes = []
    for name, chain in truth.items():
        try:
            return name, _places(trace, chain)
        except Mistake as mistake:
            mistakes.append(str(mistake))
    raise Mistake(mistakes[0])


def _places(trace: xr.Dataset, chain: notes.Chain) -> list[int]:
    places: list[int] = []
    for depth in range(trace.sizes["depth"]):
        values = trace["residual"].values[depth]
        label = f"{trace['site'].values[depth]} of block {trace['layer'].values[depth]}"
        begin = places[-1] + 1 if places else 0
        found = next(
            (n for n in range(begin, len(chain.states)) if _same(values, chain.states[n].value)), None
        )
        if found is None:
            raise Mistake(f"state {depth}, «{label}», {_wrong_state(values, chain, begin)}")
        true = chain.states[found]
        if trace["site"].values[depth] not in true.sites or trace["layer"].values[depth] != true.layer:
            # A state may stand for two equal ones, as where a block is left out: any label of these is true.
            raise Mistake(f"state {depth}, «{label}», is {'|'.join(true.sites)} of block {true.layer}")
        places.append(found)
    return places


def _wrong_state(values: np.ndarray, chain: notes.Chain, begin: int) -> str:
    shape = chain.states[min(begin, len(chain.states) - 1)].value.shape
    if values.shape != shape:
        return f"has (B, T, n, D) = {values.shape}, and is {tuple(shape)}"
    earlier = [n for n, state in enumerate(chain.states) if _same(values, state.value)]
    return f"is the earlier state {earlier[0]}" if earlier else "is no residual state of the model"


def _same(values: np.ndarray, true: torch.Tensor) -> bool:
    scale = max(float(true.abs().max()), 1e-6)
    return values.shape == true.shape and np.allclose(
        values / scale, true.numpy() / scale, rtol=1e-4, atol=1e-5
    )


def _compare_connections(trace: xr.Dataset, chain: notes.Chain, places: list[int]) -> Iterator[str]:
    """Compare what a group says of its connections; yields the names of the parts that are missing."""
    true = {(of.state_in, of.state_out): of.parts for of in chain.connections}
    wanted = {name for parts in true.values() for name in parts if name not in ("branch_in", "branch_out")}
    # Plain connections without any scale need not say so: 1 is what the family's name means.
    plain = all(set(parts) <= PLAIN and _all_ones(parts) for parts in true.values())
    yield from () if plain else sorted(wanted - set(trace.data_vars))
    for number in range(trace.sizes.get("connection", 0)):
        at = trace.isel(connection=number)
        joined = places[int(at["depth_in"])], places[int(at["depth_out"])]
        for name, value in true.get(joined, {}).items():
            if name in at and not np.allclose(at[name].values, value.numpy(), **CLOSE):
                raise Mistake(f"{name} of connection {number} {_how_wrong(at[name].values, value.numpy())}")


PLAIN = {"residual_scale", "branch_scale", "branch_in", "branch_out"}


def _all_ones(parts: dict[str, torch.Tensor]) -> bool:
    return all(bool((value == 1).all()) for name, value in parts.items() if name.endswith("_scale"))


def _how_wrong(values: np.ndarray, true: np.ndarray) -> str:
    if values.shape != true.shape:
        return f"has shape {values.shape}, not {true.shape}"
    if values.shape[-1] == values.shape[-2] and np.allclose(values.swapaxes(-1, -2), true, **CLOSE):
        return "is the transpose"
    return f"is off by {np.abs(values - true).max():.2g}"
