"""Every family is captured forward and backward, and compared with what hooks of the test's own see."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
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

# Chains that are written as those of other families; the zoo of verdicts and tests of experiments have them too.
ALIKE = (
    *("gpt2", "llama", "qwen3", "gemma3", "gpt_neox", "opt", "bert", "convnext", "mHCv2"),
    "undeclared streams in the batch axis",
)


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


@pytest.mark.parametrize(
    "family",
    [of for of in FAMILIES if of.name not in ALIKE],
    ids=lambda of: f"{of.package}: {of.name}",
)
def test_every_family_is_captured(family):
    """The chains are found, and every state and gradient is the one that hooks of our own see, bit for bit."""
    run = probes.capture(built(family), family.batch(), gradients=True, loss=tilted)
    assert chain_names(run) == family.chains
    assert run.attrs["family"] == family.connection
    assert run.attrs["n_streams"] == family.streams
    for number, (name, (pattern, calls)) in enumerate(zip(family.chains, family.blocks, strict=True)):
        earlier = [blocks for blocks, _ in family.blocks[:number]]
        expected = seen_by_hooks(family, pattern, earlier.count(pattern))
        found = depths(run, name)
        compare = compare_all if family.connection == "residual" else compare_some
        assert len(expected) >= calls + 1
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
