"""Does the matrix see what is wrong, and is a part of it what the page says?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from depthscope import probes
from tests.models.matrix import reference, verdict
from tests.models.matrix.expectations import PLAIN, Expected

ROOT = Path(__file__).resolve().parents[3]


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x, *earlier):
        return x + self.down(self.up(self.norm(x)).relu()) + sum(0.1 * other for other in earlier)


class Plain(nn.Module):
    """Three blocks on vectors; with `history`, each takes the first state too."""

    def __init__(self, history: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.history = history

    def forward(self, x):
        first = x
        for block in self.blocks:
            x = block(x, first) if self.history else block(x)
        return x


def vectors(sequences: int, tokens: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(sequences, tokens, 16, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


@pytest.fixture
def judged(model):
    """``judged(change)``: the verdict on a run that was changed."""
    record = verdict.observe(model, vectors, (3, 7), gradients=True)
    run = probes.capture(model, vectors(3, 7), gradients=True, loss=verdict.loss_of)

    def judge(change=lambda trace: trace, expected: Expected = PLAIN, **attrs) -> verdict.Verdict:
        changed = xr.DataTree.from_dict(
            {path: change(data) if path == "/trace" else data for path, data in run.to_dict().items()}
        )
        changed.attrs = {**run.attrs, **attrs}
        return verdict.compare(changed, model, record, expected, {})

    return judge


def test_a_right_run_is_right(judged):
    found = judged()
    assert (found.outcome, found.states) == ("right", 3)


def changed_state(trace: xr.Dataset) -> xr.Dataset:
    values = trace.residual.values.copy()
    values[2, 0, 0, 0, 0] = np.nextafter(values[2, 0, 0, 0, 0], np.float32(10))
    return trace.assign(residual=(trace.residual.dims, values))


def changed_gradient(trace: xr.Dataset) -> xr.Dataset:
    return trace.assign(gradient=trace.gradient * np.float32(1.0000001))


def moved_labels(trace: xr.Dataset) -> xr.Dataset:
    return trace.assign_coords(module=("depth", np.roll(trace.module.values, 1)))


def without_a_depth(trace: xr.Dataset) -> xr.Dataset:
    return trace.isel(depth=[0, 1, 3])


def first_state_everywhere(trace: xr.Dataset) -> xr.Dataset:
    return trace.assign(
        residual=(trace.residual.dims, np.repeat(trace.residual.values[:1], trace.sizes["depth"], axis=0))
    )


def swapped_axes(trace: xr.Dataset) -> xr.Dataset:
    names = {"token": "feature", "feature": "token"}
    swapped = {
        name: trace[name].rename(names).transpose(*trace[name].dims) for name in ("residual", "gradient")
    }
    return xr.Dataset(swapped, coords={name: trace[name] for name in ("module", "site")})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (changed_state, "values"),
        (changed_gradient, "gradient"),
        (moved_labels, "values"),
        (without_a_depth, "missing"),
        (first_state_everywhere, "still"),
        (swapped_axes, "axes"),
    ],
)
def test_a_run_that_differs_in_one_thing_is_wrong(judged, change, word):
    found = judged(change)
    assert found.outcome == "wrong"
    assert any(word in difference for difference in found.facts["differences"])


def test_a_plain_name_for_streams_is_wrong(judged):
    assert "family" in judged(expected=Expected(("mhc",), 4, "B T N D")).reason


def test_a_run_that_says_that_it_is_unproven_is_not_wrong(judged):
    found = judged(changed_state, proof="unproven: a test")
    assert found.outcome == "unproven"
    assert "values" in found.reason


def test_a_bypass_of_the_state_is_seen():
    torch.manual_seed(0)
    for history in (False, True):
        network = Plain(history).eval()
        batch = reference.listening(vectors(3, 7))
        calls = reference.calls_of(network, batch, None)
        (group,) = reference.groups(network, calls)
        assert group.paths == ["blocks.0", "blocks.1", "blocks.2"]
        assert reference.bypassed(network, batch, group) is history


def test_axes_are_told_by_two_more_forwards():
    torch.manual_seed(0)
    record = verdict.observe(Plain().eval(), vectors, (3, 7), gradients=False)
    assert record.axes["blocks.1", 0, False] == "BTD"
    packed = partial(lambda b, t: {"x": vectors(b * t, 1)["x"][:, 0]})
    assert verdict.observe(Plain().eval(), packed, (3, 7), gradients=False).axes["blocks.1", 0, False] == "PD"
