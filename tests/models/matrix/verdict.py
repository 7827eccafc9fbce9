"""Is a capture right? Each state and gradient, each label and each axis of a run, against what plain hooks saw."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from torch import nn

from depthscope import probes
from depthscope.diagnostics import schema
from tests.models.families import floats, tilted
from tests.models.matrix import reference
from tests.models.matrix.expectations import Expected
from tests.models.matrix.reference import Call, Group, Seen

RIGHT, PART, UNPROVEN, REFUSED, WRONG, CRASHED, NOT_BUILDABLE = (
    "right",
    "part",
    "unproven",
    "refused",
    "wrong",
    "crashed",
    "not buildable",
)
FAILURES = (WRONG, CRASHED)
MOST_TOWERS = 4
MOST_SEQUENCES = 4096
"""Kept by a capture: all of them, even where a model folds places or windows into its batch."""
REFUSALS = ("ChainError", "LayoutError", "ReconstructionError", "SiteError", "CaptureError")


@dataclass
class Verdict:
    """What came of one model.

    Parameters
    ----------
    outcome : str
        right, part, unproven, refused, wrong, crashed or not buildable.
    reason : str
        Why it is not right; the first words name the kind.
    states : int
        States that equal those of the hooks, bit for bit.
    facts : dict
        What else was seen: family, layout, streams, chains, notes.
    """

    outcome: str
    reason: str = ""
    states: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Record:
    """What the hooks saw of one model, and which axes its states have."""

    calls: list[Call]
    groups: list[Group]
    axes: dict[tuple[str, int, bool], str]

    def given(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path == path]


def loss_of(output: Any, batch: Any) -> torch.Tensor:
    """A weighted mean of all that carries a gradient."""
    if not any(t.requires_grad for t in floats(output)):
        raise NoGradient("nothing in the output carries a gradient")
    return tilted(output, batch)


class NoGradient(Exception):
    """The model's output has no gradient to anything."""


# --- one model ---


def judge(
    model: nn.Module,
    make: Callable[[int, int], Mapping[str, Any]],
    expected: Expected,
    sizes: tuple[int, int],
) -> Verdict:
    """Capture one model and compare.

    Parameters
    ----------
    model : Module
    make : callable
        ``make(sequences, tokens)`` gives a batch.
    expected : Expected
        What is known of its connections.
    sizes : (int, int)
        Sequences and tokens of the batch.
    """
    batch = make(*sizes)
    gradients = _has_gradients(model, batch)
    try:
        record = observe(model, make, sizes, gradients)
    except MemoryError as error:
        return Verdict(NOT_BUILDABLE, f"too large to be compared: {error}")
    facts: dict[str, Any] = {"groups": _sizes(record.groups)}
    before = {
        name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    torch.manual_seed(1)
    try:
        if gradients:
            run = probes.capture(model, batch, gradients=True, loss=loss_of, max_sequences=MOST_SEQUENCES)
        else:
            run = probes.capture(model, batch, max_sequences=MOST_SEQUENCES)
    except Exception as error:
        return refusal(error, facts)
    verdict = compare(run, model, record, expected, facts)
    changed = _changed(model, before)
    if changed:
        return Verdict(WRONG, f"model: the capture has changed {changed[0]}", verdict.states, facts)
    if verdict.outcome == RIGHT:
        more = hands_on_more(model, batch, reference.outermost(record.groups)[:MOST_TOWERS])
        verdict.reason = f"blocks of {', '.join(more)} hand on more than their state" if more else ""
    return verdict


def _changed(model: nn.Module, before: Mapping[str, torch.Tensor]) -> list[str]:
    """Weights and buffers that are not what they were, bit for bit."""
    after = model.state_dict()
    return [
        name
        for name, value in before.items()
        if not torch.equal(value, after[name]) and not value.isnan().any()
    ]


def _has_gradients(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    torch.manual_seed(1)
    try:
        loss_of(model(**reference.listening(batch)), batch).backward()
    except Exception:  # whatever keeps the model from a backward of its own; it is then captured forward only
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def observe(
    model: nn.Module, make: Callable[[int, int], Mapping[str, Any]], sizes: tuple[int, int], gradients: bool
) -> Record:
    """What plain hooks see, in three forwards."""
    b, t = sizes
    torch.manual_seed(1)
    batch = reference.listening(make(b, t)) if gradients else make(b, t)
    calls = reference.calls_of(model, batch, loss_of if gradients else None)
    others = []
    for other in ((b + 1, t), (b, t + 4)):
        torch.manual_seed(1)
        try:
            others.append(reference.calls_of(model, make(*other), None, copies=False))
        except Exception:  # a model of one size; the axes are then told by what is known of the other size
            others.append(None)
    return Record(calls, reference.groups(model, calls), reference.axes_of(calls, b, *others))


def _sizes(groups: list[Group]) -> list[str]:
    return [f"{group.container}×{len(group.calls)}" for group in reference.outermost(groups)]


def refusal(error: Exception, facts: dict[str, Any]) -> Verdict:
    kind = type(error).__name__
    message = " ".join(str(error).split())
    if kind in REFUSALS:
        return Verdict(REFUSED, f"{kind}: {message}", facts=facts)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/probes/" in f.filename or "/diagnostics/" in f.filename
    ]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the model"
    return Verdict(CRASHED, f"{kind} at {place}: {message}", facts=facts)


# --- comparison ---


@dataclass(eq=False)
class Depth:
    """One depth of a run."""

    chain: str
    number: int
    module: str
    site: str
    state: xr.Dataset

    def __str__(self) -> str:
        return f"{self.chain or 'depth'} {self.number} ({self.site} of {self.module})"


def depths(run: xr.DataTree) -> Iterator[Depth]:
    for name in schema.chains(run):
        trace = schema.chain_dataset(run, "trace", name)
        assert trace is not None
        for number in range(trace.sizes["depth"]):
            at = trace.isel(depth=number)
            yield Depth(name, number, str(at.module.item()), str(at.site.item()), at)


def compare(
    run: xr.DataTree, model: nn.Module, record: Record, expected: Expected, facts: dict[str, Any]
) -> Verdict:
    """Everything that can be compared; the first few differences are the reason."""
    found, original = list(depths(run)), expected
    proof = str(run.attrs.get("proof", ""))
    if run.attrs["family"] == "unproven" and not proof.startswith("unproven"):
        proof = f"unproven: {proof}"
    facts |= {
        "family": run.attrs["family"],
        "streams": int(run.attrs["n_streams"]),
        "layout": run.attrs.get("layouts") or run.attrs["layout"],
        "chains": {name: sum(d.chain == name for d in found) for name in schema.chains(run)},
        "proof": proof,
    }
    if expected.streams > 1 and int(run.attrs["n_streams"]) != expected.streams:
        expected = Expected(
            expected.families
        )  # compared as what the run took it for; the family is wrong already
    wrong = [*_family(run, original), *_labels(found, record, expected)]
    wrong += _complete(found, record, expected, run.attrs.get("not_covered", ()))
    wrong += _moves(found)
    right = sum(any(_matches(d, seen, record, expected) == "" for seen in _named(d, record)) for d in found)
    facts["depths"] = len(found)
    if wrong:
        facts["differences"] = wrong[:6]
        if proof.startswith("unproven"):
            return Verdict(UNPROVEN, f"{proof} (and {wrong[0]})", right, facts)
        return Verdict(WRONG, "; ".join(wrong[:3]), right, facts)
    if proof.startswith("unproven"):
        return Verdict(UNPROVEN, proof, right, facts)
    said = [f"not covered: {part['sentence']}" for part in _left_out_towers(run, record)]
    if said:
        return Verdict(PART, "; ".join(said), right, facts)
    return Verdict(RIGHT, "", right, facts)


def _left_out_towers(run: xr.DataTree, record: Record) -> list[Mapping[str, Any]]:
    """What the run itself says that it leaves out and that holds blocks by the hooks."""
    towers = reference.outermost(record.groups)
    return [
        part
        for part in run.attrs.get("not_covered", ())
        if any(says(part, path) for group in towers for path in group.paths)
    ]


def says(part: Mapping[str, Any], path: str) -> bool:
    """Whether a part that a run leaves out is a module or holds it; several blocks are named as the first and the last."""
    first, _, last = part["module"].partition(" … ")
    if not last:
        return path == first or path.startswith(f"{first}.")
    container = first.rpartition(".")[0]
    return path.rpartition(".")[0] == container


def _family(run: xr.DataTree, expected: Expected) -> Iterator[str]:
    family, streams = run.attrs["family"], int(run.attrs["n_streams"])
    if family == "unproven":
        return
    if not expected.families and (family != "residual" or streams != 1):
        yield f"family: {family} with {streams} streams, but the source is plain"
    if expected.families and family not in expected.families:
        yield f"family: called {family}, but the source has {' or '.join(expected.families)}"
    if expected.families and streams != expected.streams:
        yield f"streams: {streams}, but the source has {expected.streams}"


def _named(depth: Depth, record: Record) -> list[tuple[Seen, str]]:
    """The tensors that a depth's label can mean, each with its axes."""
    # A state inside a block is called after the sublayer whose output was added; no module need give the sum.
    if depth.site in ("embed", "mid") or depth.module == "(input)":
        return []
    # Changed between two blocks: what the next one takes, or what a module gives that mixes it of earlier states.
    is_mixture = depth.site == "pre"
    # A branch inside a block can name the state that its output was added to: then it is what the block around it gives.
    parts = depth.module.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return [
        (seen, record.axes.get((path, number, taken), ""))
        for path in around
        for number, call in enumerate(record.given(path))
        for taken in {is_mixture, is_mixture and path != depth.module}
        for seen in (call.taken if taken else call.given)
    ]


def _labels(found: list[Depth], record: Record, expected: Expected) -> Iterator[str]:
    """A depth that is called the output of a module is its output: bit for bit, with its gradient, in the right axes."""
    if expected.streams > 1:
        return  # a connection's next state is functional; the states between the blocks are compared below
    for depth in found:
        named = _named(depth, record)
        if not named:
            continue
        answers = [_matches(depth, seen, record, expected) for seen in named]
        if "" not in answers:
            yield f"{depth}: {min(answers, key=lambda a: ('values' in a, len(a)))}"


def _matches(depth: Depth, seen: tuple[Seen, str], record: Record, expected: Expected) -> str:
    """Nothing where a depth's state is this tensor; otherwise what differs."""
    if expected.apart and depth.state.sizes["stream"] > 1:
        streams = [
            replace(depth, state=depth.state.isel(stream=[n])) for n in range(depth.state.sizes["stream"])
        ]
        return min((_matches(of, seen, record, expected) for of in streams), key=len)
    tensor, axes = seen
    values = np.asarray(depth.state.residual.values)
    ours = [(canonical(tensor.value, a, expected), a) for a in orders(tensor.value, axes)]
    # Sequences that a model packs into one axis are tokens of one sample, or unpacked again; never samples of one token.
    shapes = (
        {values.shape}
        if "P" not in axes
        else {values.shape, (1, values.shape[0] * values.shape[1], *values.shape[2:])}
    )
    packed = "P" in axes and values.shape[1] == 1
    fitting = (
        []
        if packed
        else [a for array, a in ours if array.shape in shapes and same(array.reshape(values.shape), values)]
    )
    if not fitting:
        flat = tensor.value.float().numpy()
        if flat.size == values.size and np.array_equal(np.sort(flat, axis=None), np.sort(values, axis=None)):
            return f"axes: read as {values.shape} (sample, token, stream, feature) from a tensor {tuple(flat.shape)} of {axes}"
        return f"values: {values.shape} is not the tensor {tuple(flat.shape)} with axes {axes}"
    if tensor.gradient is None:
        if "gradient" in depth.state and bool(depth.state.gradient.notnull().any()):
            return "gradient: one is recorded, but none arrived"
        return ""
    if "gradient" not in depth.state or bool(depth.state.gradient.isnull().all()):
        return "gradient: none is recorded, but one arrived"
    gradient = canonical(tensor.gradient, fitting[0], expected).reshape(values.shape)
    found = np.asarray(depth.state.gradient.values)
    return "" if same(gradient, found) else "gradient: differs"


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=True)


def orders(tensor: torch.Tensor, axes: str) -> list[str]:
    """The axes that a tensor may have: those that were seen, with every reading of those that could not be told."""
    letters = axes if len(axes) == tensor.ndim else "D" * tensor.ndim
    unchanged = [i for i, letter in enumerate(letters) if letter == "D"]
    # Of several axes that did not change with the batch or the length, one holds the features, the others are places.
    return [
        "".join("T" if i in unchanged and i != f else letter for i, letter in enumerate(letters))
        for f in unchanged
    ]


def canonical(tensor: torch.Tensor, axes: str, expected: Expected) -> np.ndarray:
    """(batch, token, stream, feature)."""
    if expected.layout and tensor.ndim == len(re.findall(r"\w", expected.layout.partition("(")[0])) + (
        "(" in expected.layout
    ):
        words = expected.layout.lower().replace("(n d)", "(n d)")
        return rearrange(tensor, f"{words} -> b t n d", n=expected.streams).float().numpy()
    order = [i for letter in "BPTD" for i, have in enumerate(axes) if have == letter]
    moved = tensor.permute(order)
    sizes = {
        letter: int(np.prod([tensor.shape[i] for i, a in enumerate(axes) if a == letter]))
        for letter in "BPTD"
    }
    return moved.reshape(sizes["B"], sizes["P"] * sizes["T"], 1, sizes["D"]).float().numpy()


def _complete(
    found: list[Depth], record: Record, expected: Expected, left_out: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Every state between blocks is among the depths, in order, and every tower has a chain or is named as left out."""
    modules = {depth.module for depth in found}
    for group in record.groups:
        said = any(says(part, path) for part in left_out for path in group.paths)
        if _read(group, modules, record.groups) and not said:
            yield from _group_complete(found, group, record, expected)
    for group in reference.outermost(record.groups):
        prefix = f"{group.container}."
        inside = any(m.startswith(prefix) or m in group.paths for m in modules)
        around = any(path.startswith(f"{m}.") for path in group.paths[:1] for m in modules if m != "(input)")
        said = any(says(part, path) for part in left_out for path in group.paths)
        if not inside and not around and not said:
            yield f"tower: no chain for {group.container} ({len(group.calls)} blocks)"


def _read(group: Group, modules: set[str], groups: list[Group]) -> bool:
    """Whether the depths are those of this group: of its blocks, or of places in them that no smaller group has."""
    paths = set(group.paths)
    if modules & paths:
        return True
    smaller = {
        path for other in groups for path in other.paths if any(path.startswith(f"{p}.") for p in paths)
    }
    return not modules & smaller and any(
        module.startswith(f"{path}.") for path in paths for module in modules
    )


def _group_complete(found: list[Depth], group: Group, record: Record, expected: Expected) -> Iterator[str]:
    missing = []
    times: dict[tuple[str, bool], int] = {}
    rest = list(found)
    for path, taken, seen in group.states():
        number = times.get((path, taken), 0)
        times[path, taken] = number + 1
        axes = record.axes.get((path, number, taken), "")
        at = next((i for i, d in enumerate(rest) if _matches(d, (seen, axes), record, expected) == ""), None)
        if at is None:
            missing.append(f"{'input' if taken else 'output'} of {path}")
        else:
            rest = rest[at + 1 - expected.apart :]  # another stream of the same state may come next
    if missing:
        yield (
            f"missing: {len(missing)} of {len(group.states())} states of {group.container} are at no depth in order: "
            f"{missing[0]}"
        )


def _moves(found: list[Depth]) -> Iterator[str]:
    """A chain whose state never changes is not the state."""
    by_chain: dict[str, list[np.ndarray]] = {}
    for depth in found:
        by_chain.setdefault(depth.chain, []).append(depth.state.residual.values)
    for name, values in by_chain.items():
        pairs = enumerate(pairwise(values), 1)
        still = [number for number, (before, after) in pairs if same(before, after)]
        if still:
            yield f"still: the state of {name or 'the chain'} is bit for bit the same at depths {still[0] - 1} and {still[0]}"


def hands_on_more(model: nn.Module, batch: Mapping[str, Any], groups: Iterable[Group]) -> list[str]:
    """Containers whose blocks hand on more than their state; what cannot be told is left out."""
    found = []
    for group in groups:
        torch.manual_seed(1)
        with suppress(
            RuntimeError
        ):  # in-place operations that a backward through the whole model does not survive
            if reference.bypassed(model, batch, group):
                found.append(group.container)
    return found
