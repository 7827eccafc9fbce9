"""Every family is built, captured forward and backward, and checked against hooks of the test's own; the table says what came.

``python -m tests.probes.test_compatibility`` writes the first part of `docs/compatibility.md`. The second part of the
page, every class that can be built tiny, is written by ``python -m tests.models.matrix --write``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from einops import rearrange
from torch import nn

from depthscope import probes
from depthscope.diagnostics import schema
from tests.models.families import FAMILIES, Family, built, floats, tilted

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "compatibility.md"
COMMAND = "python -m tests.probes.test_compatibility"
NAMES = [f"{family.package}: {family.name}" for family in FAMILIES]


@dataclass(frozen=True)
class Outcome:
    """What a capture gave."""

    family: Family
    run: xr.DataTree


@cache
def outcome(family: Family) -> Outcome:
    """Capture a family, as a user would."""
    return Outcome(family, probes.capture(built(family), family.batch(), gradients=True, loss=tilted))


# --- the states, by hooks of our own ---


@dataclass
class Seen:
    """One tensor that a block took or gave, as it was at that moment, and its gradient."""

    value: torch.Tensor
    taken: bool
    gradient: torch.Tensor | None = None


def seen_by_hooks(family: Family, pattern: str, track: int) -> list[Seen]:
    """What the blocks took and gave, without what was handed on from one to the next."""
    model, seen = built(family), []

    def note(tensor: torch.Tensor, taken: bool) -> None:
        state = Seen(tensor.detach().clone(), taken)
        seen.append(state)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: setattr(state, "gradient", gradient.clone()))

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        note(states_in((args, *kwargs.values()))[track], True)

    def give(module: nn.Module, args: Any, output: Any) -> None:
        note(states_in(output)[track], False)

    for path, module in model.named_modules():
        if re.fullmatch(expression(pattern), path):
            if family.takes:
                module.register_forward_pre_hook(take, with_kwargs=True)
            module.register_forward_hook(give)
    batch = listening(family.batch())
    tilted(model(**batch) if isinstance(batch, dict) else model(*batch), batch).backward()
    return [state for before, state in zip([None, *seen], seen, strict=False) if not handed_on(before, state)]


def expression(pattern: str) -> str:
    return pattern.replace(".", r"\.").replace("{i}", r"\d+").replace("*", r"[^.]+")


def states_in(value: Any) -> list[torch.Tensor]:
    return [tensor for tensor in floats(value) if tensor.ndim >= 2]


def listening(batch: Any) -> Any:
    """The batch with leaves that carry gradients, as keywords or as positions."""
    if isinstance(batch, dict):
        return {name: listening(value)[0] for name, value in batch.items()}
    parts = batch if isinstance(batch, tuple) else (batch,)
    return tuple(part.clone().requires_grad_() if part.is_floating_point() else part for part in parts)


def handed_on(before: Seen | None, state: Seen) -> bool:
    return (
        before is not None
        and (not before.taken and state.taken)
        and before.value.shape == state.value.shape
        and bool((before.value == state.value).all())
    )


def canonical(tensor: torch.Tensor, layout: str, streams: int) -> np.ndarray:
    """(batch, token, stream, feature), by einops."""
    letters = layout.lower()
    tokens = " ".join(letter for letter in "hwt" if letter in letters) or "1"
    held = "n f" if "f" in letters else "n" if "n" in letters else "1"
    sizes = {"n": 1 if "f" in letters else streams, "f": streams, "b": 3}
    known = {letter: size for letter, size in sizes.items() if letter in letters}
    return rearrange(tensor, f"{letters} -> b ({tokens}) ({held}) d", **known).float().numpy()


# --- what the run holds ---


def depths(run: xr.DataTree, chain: str) -> list[xr.Dataset]:
    """The depths of one chain, its stages joined."""
    traces = [
        schema.chain_dataset(run, "trace", name) for name in schema.chains(run) if chain_of(name) == chain
    ]
    return [
        trace.isel(depth=depth)
        for trace in traces
        if trace is not None
        for depth in range(trace.sizes["depth"])
    ]


def chain_of(name: str) -> str:
    return re.sub(r"(^|_)stage\d+$", "", name)


def chain_names(run: xr.DataTree) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chain_of(name) for name in schema.chains(run)))


def layout_of(run: xr.DataTree, number: int) -> str:
    layouts = run.attrs.get("layouts")
    return layouts[number] if layouts else run.attrs["layout"]


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_every_family_is_captured(family):
    """The chains are found, and every state and gradient is the one that hooks of our own see, bit for bit."""
    run = outcome(family).run
    assert chain_names(run) == family.chains
    assert run.attrs["family"] == family.connection
    assert run.attrs["n_streams"] == family.streams
    for number, (name, (pattern, calls)) in enumerate(zip(family.chains, family.blocks, strict=True)):
        earlier = [blocks for blocks, _ in family.blocks[:number]]
        expected = seen_by_hooks(family, pattern, earlier.count(pattern))
        found = depths(run, name)
        compare = compare_all if family.connection == "residual" else compare_some
        assert len(expected) >= calls + family.takes
        layout = family.layout or layout_of(run, number)
        compare(found, expected, lambda t, layout=layout: canonical(t, layout, family.streams))


def compare_all(found: list[xr.Dataset], expected: list[Seen], canonical: Callable[..., np.ndarray]) -> None:
    assert len(found) == len(expected)
    for at, state in zip(found, expected, strict=True):
        np.testing.assert_array_equal(at.residual.values, canonical(state.value))
        compare_gradients(at, state, canonical)


def compare_some(found: list[xr.Dataset], expected: list[Seen], canonical: Callable[..., np.ndarray]) -> None:
    """With connections there are states inside the blocks, too; those between the blocks must be among them, in order."""
    rest = iter(found)
    for state in expected:
        value = canonical(state.value)
        at = next((at for at in rest if np.array_equal(at.residual.values, value)), None)
        assert at is not None, "a state that a block took or gave is not among the captured ones"
        compare_gradients(at, state, canonical)


def compare_gradients(at: xr.Dataset, state: Seen, canonical: Callable[..., np.ndarray]) -> None:
    if state.gradient is None:
        assert "gradient" not in at or bool(at.gradient.isnull().all())
    else:
        np.testing.assert_array_equal(at.gradient.values, canonical(state.gradient))


# --- the table ---

HEAD = (
    "family",
    "from",
    "states",
    "streams",
    "layout",
    "connection",
    "orientation",
    "error",
    "gradients",
    "notes",
)


def row(result: Outcome) -> dict[str, str]:
    """What one family showed, in words."""
    family, run = result.family, result.run
    plain = run.attrs.get("reconstruction_error") is None
    layouts = [layout_of(run, number) for number in range(len(family.chains))]
    return {
        "family": family.name,
        "from": family.package,
        "states": ", ".join(states_in_words(run, name) for name in family.chains),
        "streams": str(run.attrs["n_streams"]),
        "layout": ", ".join(f"`{layout}`" for layout in dict.fromkeys(layouts)),
        "connection": connection_in_words(run),
        "orientation": run.attrs["orientation"].replace("_", " ").replace("not applicable", "–"),
        "error": "–" if plain else f"≤ {order_of(run.attrs['reconstruction_error'])}",
        "gradients": gradients_in_words(run, family.chains),
        "notes": family.note,
    }


def states_in_words(run: xr.DataTree, chain: str) -> str:
    found = depths(run, chain)
    shapes = {(at.sizes["token"], at.sizes["feature"]) for at in found}
    stages = f" in {len(shapes)} stages" if len(shapes) > 1 else ""
    return f"{chain} {len(found)}{stages}".strip()


def connection_in_words(run: xr.DataTree) -> str:
    trace = schema.chain_dataset(run, "trace", schema.chains(run)[0])
    assert trace is not None
    named = {
        "h_res": "H_res",
        "h_pre": "H_pre",
        "read": "H_pre by views",
        "h_post": "H_post",
        "write": "H_post by views",
    }
    words = [word for name, word in named.items() if name in trace and bool(trace[name].notnull().any())]
    return f"{run.attrs['family'].replace('_', ' ')}{': ' if words else ''}{', '.join(words)}"


def order_of(error: float) -> str:
    """The power of ten above an error; below 1e-6 the machine decides."""
    return f"1e{max(-6, math.ceil(math.log10(error))) if error else -6}"


def gradients_in_words(run: xr.DataTree, chains: Iterable[str]) -> str:
    have = {
        name: [bool(at.gradient.notnull().any()) if "gradient" in at else False for at in depths(run, name)]
        for name in chains
    }
    if all(all(known) for known in have.values()):
        return "all"
    return ", ".join(
        f"{name} {'all' if all(known) else f'{sum(known)} of {len(known)}' if any(known) else 'none'}".strip()
        for name, known in have.items()
    )
