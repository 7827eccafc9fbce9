"""Is what a capture says of a design right, unproven, refused, or wrong?

``right``: every state is one that the model wrote down, with its true label, none that is needed is missing, and every
matrix, scale and read that is reported equals the model's own; none is missing that the model has.
``states``: the same, but parts of the connections are missing (and nothing else is said of them).
``part``: the same, but one of several chains is missing; the reason is the run's own where it names what it leaves out.
``unproven``: the run says that its reading is not proven, and the states are right; ``unproven, states off``: they are not.
``refused``: a ValueError of ours with a reason. ``misnamed``: right in its numbers, under another family's name.
``crashed``: an error of somebody else's. ``wrong``: all the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope import probes
from depthscope.diagnostics import schema
from tests.models.designs import truth as notes
from tests.models.designs.design import Design

# Of sums of a few hundred float32 numbers in another order, relative to the largest of them.
ROUNDING = 1e-5
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


def outcome(design: Design, *, batches: int = 1, labels: bool = True, **options: Any) -> Outcome:
    """What a capture of the design is, over some batches, compared with the design's own truth.

    Without ``labels`` any of its states are right, under any label and as few as there are.
    """
    model, given = design.build(), [design.batch(seed) for seed in range(batches)]
    truth = design.truth(model, *given, loss=options.get("loss"))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(notes.SEED)
            run = probes.capture(model, given if batches > 1 else given[0], **options)
    except ValueError as error:
        # A ValueError of torch or of numpy is no refusal of ours: its class is theirs.
        ours = type(error).__module__.startswith("depthscope")
        return Outcome("refused" if ours else "crashed", f"{type(error).__name__}: {error}")
    except Exception as error:  # what else a capture raises is a defect, which the table names
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    if not (labels and design.labelled):
        truth = _bare(truth, needs=labels)
    return judged(design, run, truth)


def all_outcomes(design: Design) -> tuple[Outcome | None, ...]:
    """A design's outcome, the one after the advice of a refusal, and the one with its author's answers to all questions."""
    first = outcome(design)
    advice = advised(first)
    answers = design.answers()
    last = outcome(design, labels=not design.branches_named, **answers) if answers else None
    return first, outcome(design, **advice) if advice else None, last


def _bare(truth: notes.Truth, *, needs: bool = False) -> notes.Truth:
    """The states without labels, and on request all of them may be left out."""
    return {
        name: replace(
            chain,
            states=[replace(state, sites=(), need=state.need if needs else "") for state in chain.states],
        )
        for name, chain in truth.items()
    }


def advised(found: Outcome) -> dict[str, Any]:
    """What to ask for next: what a refusal says; the outputs of branches, from which the factors of plain ones are found."""
    return {"refused": hint(found.why), "states": {"sites": ("*", "branch_out")}}.get(found.word, {})


def hint(message: str) -> dict[str, Any]:
    """The overrides that a refusal names, the first of each: its advice, taken."""
    found = {
        "layout": re.search(r"layout='([^']+)'", message),
        "streams": re.search(r"streams=(\d+)", message),
        "layers": re.search(r"layers='([^']+)'", message),
    }
    told = {name: match[1] for name, match in found.items() if match}
    return told | {"streams": int(told["streams"])} if "streams" in told else told


def judged(design: Design, run: xr.DataTree, truth: notes.Truth) -> Outcome:
    """Compare a run with the truth."""
    proof = str(run.attrs.get("proof", ""))
    family = str(run.attrs["family"])
    unproven = proof.startswith("unproven") or family in NO_CLAIM
    try:
        missing = sorted(set(_compared(run, truth, design.rounding)))
    except Mistake as mistake:
        if not unproven:
            return Outcome("wrong", str(mistake))
        if not _are_single_streams(run, truth):
            return Outcome("unproven, states off", str(mistake))
    if unproven:
        return Outcome("unproven", proof.removeprefix("unproven").strip(": "))
    if family not in design.family.split("|"):
        word = "misnamed" if design.family else "wrong"
        return Outcome(word, f"called {family!r}, and is {design.family or 'no residual network'}")
    constraint = str(run.attrs.get("constraint", design.constraint))
    if absent := [words for words in filter(None, design.constraint.split(", ")) if words not in constraint]:
        return Outcome("misnamed", f"said to be {constraint!r}, without {', '.join(absent)}")
    if any(name.startswith("chain") for name in missing):
        said = "; ".join(f"not covered: {part['sentence']}" for part in run.attrs.get("not_covered", ()))
        return Outcome("part", said or f"without {', '.join(missing)}")
    return Outcome("states", f"without {', '.join(missing)}") if missing else Outcome("right")


def _compared(run: xr.DataTree, truth: notes.Truth, rounding: float) -> Iterator[str]:
    """The names of parts that are missing in a run; raises where something is not true."""
    seen = int(run.attrs["sampling"]["sequences_seen"])
    left = {name: _needs(chain) for name, chain in truth.items()}
    for group in schema.chains(run):
        trace = schema.chain_dataset(run, "trace", group)
        assert trace is not None
        sampled = {name: _sampled(chain, trace["sample"].values, seen) for name, chain in truth.items()}
        name, places = _place_states(trace, sampled)
        left[name] -= {truth[name].states[place].need for place in places}
        _compare_gradients(trace, sampled[name], places)
        yield from _compare_connections(trace, sampled[name], places, rounding)
    for name, needs in left.items():
        if needs and needs == _needs(truth[name]):
            yield f"chain {name!r}"
        elif needs:
            raise Mistake(f"chain {name!r}: no state of {', '.join(sorted(needs))}")


def _are_single_streams(run: xr.DataTree, truth: notes.Truth) -> bool:
    """Whether a run has each stream as a chain of its own, which claims nothing of what joins them."""
    (chain,) = truth.values() if len(truth) == 1 else (notes.Chain(),)
    streams = chain.states[0].value.shape[2] if chain.states else 1
    single = {
        str(n): notes.Chain([replace(s, value=s.value[:, :, n : n + 1], gradient=[]) for s in chain.states])
        for n in range(streams)
    }
    try:
        return streams > 1 and not set(_compared(run, single, ROUNDING))
    except Mistake:
        return False


def _needs(chain: notes.Chain) -> set[str]:
    return {state.need for state in chain.states if state.need}


def _sampled(chain: notes.Chain, sequences: np.ndarray, seen: int) -> notes.Chain:
    """The chain of those sequences that a run stores: of many it draws some."""
    # Whether sequences are numbered from zero, those of the first forward counted once, is a question of its own.
    count = len(chain.states[0].value)
    rows = (torch.tensor(sequences.tolist()) - max(seen - count, 0)) % count
    states = [
        replace(state, value=state.value[rows], gradient=[g[rows] for g in state.gradient])
        for state in chain.states
    ]
    parts = [{name: value[rows] for name, value in of.parts.items()} for of in chain.connections]
    joined = [replace(of, parts=part) for of, part in zip(chain.connections, parts, strict=True)]
    return notes.Chain(states, joined)


def _place_states(trace: xr.Dataset, truth: notes.Truth) -> tuple[str, list[int]]:
    """The chain whose states a group holds, and the number of each of them in it."""
    mistakes: dict[int, str] = {}
    for name, chain in truth.items():
        places, mistake = _places(trace, chain)
        if not mistake:
            return name, places
        mistakes.setdefault(len(places), mistake)
    # Of the chain that it fits longest.
    raise Mistake(mistakes[max(mistakes)])


def _places(trace: xr.Dataset, chain: notes.Chain) -> tuple[list[int], str]:
    """The numbers of a group's states in a chain, and what is wrong with the first one that has none."""
    places: list[int] = []
    for depth in range(trace.sizes["depth"]):
        values = trace["residual"].values[depth]
        site, layer = trace["site"].values[depth], trace["layer"].values[depth]
        label = f"{site} of block {layer}"
        begin = places[-1] + 1 if places else 0
        found = next(
            (n for n in range(begin, len(chain.states)) if _same(values, chain.states[n].value)), None
        )
        if found is None:
            return places, f"state {depth}, «{label}», {_wrong_state(values, chain, begin)}"
        true = chain.states[found]
        # A chain's or stage's first state has no number; one that was changed between two blocks has that of the second.
        number = -1 if site == "embed" else true.layer + (site == "pre")
        if true.sites and (site not in true.sites or layer != number):
            return places, f"state {depth}, «{label}», is {'|'.join(true.sites)} of block {true.layer}"
        places.append(found)
    return places, ""


def _wrong_state(values: np.ndarray, chain: notes.Chain, begin: int) -> str:
    shape = chain.states[min(begin, len(chain.states) - 1)].value.shape
    if values.shape != shape:
        return f"has (B, T, n, D) = {values.shape}, and is {tuple(shape)}"
    earlier = [n for n, state in enumerate(chain.states) if _same(values, state.value)]
    return f"is the earlier state {earlier[0]}" if earlier else "is no residual state of the model"


def _same(values: np.ndarray, true: torch.Tensor, rounding: float = ROUNDING) -> bool:
    """Whether two arrays are the same but for rounding, relative to the largest number."""
    scale = max(float(true.abs().max()), 1e-6)
    return values.shape == true.shape and float(np.abs(values - true.numpy()).max()) < 2 * rounding * scale


def _compare_gradients(trace: xr.Dataset, chain: notes.Chain, places: list[int]) -> None:
    for depth, place in enumerate(places if "gradient" in trace else []):
        true, values = chain.states[place].gradient, trace["gradient"].values[depth]
        # A state inside of a checkpoint is another tensor in the backward: its own code has no gradient of it.
        if true and not _same(values, true[0], 1e-4):
            error = np.abs(values - true[0].numpy()).max() / float(true[0].abs().max())
            raise Mistake(f"the gradient of state {depth} is off by {error:.2g} of its size")


def _compare_connections(
    trace: xr.Dataset, chain: notes.Chain, places: list[int], rounding: float
) -> Iterator[str]:
    """Compare what a group says of its connections; yields the names of the parts that are missing."""
    true = {(of.state_in, of.state_out): of.parts for of in chain.connections}
    wanted = {name for parts in true.values() for name in parts if name not in ("branch_in", "branch_out")}
    yield from sorted(wanted - are_ones(true.values()) - set(trace.data_vars))
    for number in range(trace.sizes.get("connection", 0)):
        at = trace.isel(connection=number)
        joined = places[int(at["depth_in"])], places[int(at["depth_out"])]
        for name, value in true.get(joined, {}).items():
            if name in at and not _same(at[name].values, value, rounding):
                raise Mistake(f"{name} of connection {number} {_how_wrong(at[name].values, value)}")


def are_ones(connections: Iterable[dict[str, torch.Tensor]]) -> set[str]:
    """The factors of plain connections that are 1 everywhere: they are not stored, and 1 is what their absence means."""
    known = [(name, value) for parts in connections for name, value in parts.items()]
    others = {name for name, value in known if not bool((value == 1).all())}
    return set(schema.PLAIN_FACTORS) - others


def _how_wrong(values: np.ndarray, true: torch.Tensor) -> str:
    if values.shape != tuple(true.shape):
        return f"has shape {values.shape}, not {tuple(true.shape)}"
    if values.shape[-1] == values.shape[-2] and _same(values.swapaxes(-1, -2), true):
        return "is the transpose"
    return f"is off by {np.abs(values - true.numpy()).max():.2g}"
