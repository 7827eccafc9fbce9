"""Does a trace know as much of a module that ran unwatched as if it had watched every operation of it?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.probes.dataflow import trace as tracing
from depthscope.probes.dataflow.axes import ATTENDED, BATCHED, CONTRACTED, NORMALISED, SLID, WEIGHED
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.session import session as sessions
from depthscope.probes.structure.tape import ChainError

WIDTH = 12


class Block(nn.Module):
    """A pre-norm block around any module that keeps the width."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), branch

    def forward(self, x):
        return x + self.branch(self.norm(x))


class Reshaped(nn.Module):
    """A linear layer on a state that was cut into parts, or made one matrix."""

    def __init__(self, shape, back=True):
        super().__init__()
        self.shape, self.layer = shape, nn.Linear(shape[-1], shape[-1])

    def forward(self, x):
        return self.layer(x.reshape(self.shape)).reshape(x.shape)


class OverStreams(nn.Module):
    """Copies of a state, mixed by a linear layer over the axis of the copies: followed, and no branch's work."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.mix(torch.stack([x, x * 0.5, x], -1)).sum(-1)


class Catching(nn.Module):
    """A module that catches what one of its own raises."""

    def __init__(self):
        super().__init__()
        self.layer, self.wrong = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH + 1, WIDTH)

    def forward(self, x):
        try:
            return self.wrong(x)
        except RuntimeError:
            return self.layer(x) * 2


def model(*branches) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block(branch()) for branch in branches * 3))


class Caught(Exception):
    pass


def facts(built: nn.Module, x: torch.Tensor, monkeypatch, *, watched: bool) -> tuple[list, int]:
    """All that the trace of a first forward says: values, what they were computed from, axes; and how many ran unwatched."""
    tapes = []

    def caught(tape, *rest):
        tapes.append(tape)
        raise Caught

    aside = []
    with monkeypatch.context() as patch:
        patch.setattr(sessions, "find_structure", caught)
        if watched:
            patch.setattr(tracing, "known_modules", dict)
        pop = tracing.Trace.watch_again
        patch.setattr(
            tracing.Trace,
            "watch_again",
            lambda self, *of: (aside.append(self._unwatched is not None), pop(self, *of))[1],
        )
        with pytest.raises(CaptureError):
            probes.capture(built, x)
    (tape,) = tapes
    trace = tape.trace
    assert trace.error is None
    atoms: dict[int, int] = {}
    values = {}
    waiting = [value for call in tape.calls for _, _, value in call.shown()]
    while waiting:
        value = waiting.pop()
        step = value.step
        axes = [[_atom(atom, atoms) for atom in axis] for axis in value.axes]
        values[value.number] = (
            *(
                value.shape,
                value.dtype,
                value.merges,
                value.root,
                value.last_merge,
                value.call,
                value.ordinal,
            ),
            *(axes, None if step is None else (step.name, [of.number for of in step.operands], step.item)),
        )
        waiting += [of for of in (step.operands if step is not None else ()) if of.number not in values]
    places = [(call.path, at, item, value.number) for call in tape.calls for at, item, value in call.shown()]
    return [trace.parents, trace.calls, sorted(values.items()), places], sum(aside)


def _atom(atom, atoms):
    own = atom.itself()
    roles = [own.has(role) for role in (BATCHED, CONTRACTED, NORMALISED, SLID, ATTENDED, WEIGHED)]
    return atoms.setdefault(id(own), len(atoms)), own.size, own.whole, roles


@pytest.mark.parametrize(
    "branch",
    [
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        ),
        lambda: nn.Sequential(
            nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.LayerNorm(WIDTH, elementwise_affine=False)
        ),
        lambda: nn.Sequential(nn.Linear(WIDTH, 1), nn.Linear(1, WIDTH), nn.SiLU(inplace=True)),
        lambda: Reshaped((-1, WIDTH)),
        lambda: Reshaped((2, 5, 3, WIDTH // 3)),
        OverStreams,
    ],
    ids=["linear", "feed-forward", "functions", "one feature", "matrix", "parts", "streams"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_ran_unwatched_is_noted_as_if_it_had_been_watched(branch, dtype, monkeypatch):
    built, x = model(branch).to(dtype), torch.randn(2, 5, WIDTH).to(dtype)
    found, unwatched = facts(built, x, monkeypatch, watched=False)
    expected, none = facts(built, x, monkeypatch, watched=True)
    assert found == expected
    assert unwatched > none == 0


def doubling_hook(built, monkeypatch):
    for block in built[1:]:
        block.branch.register_forward_hook(lambda module, args, output: output * 2)


def replaced_function(built, monkeypatch):
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (x @ w.T).add(b) * 2)


def replaced_forward(built, monkeypatch):
    for block in built[1:]:
        block.branch.forward = lambda x, own=block.branch: x @ own.weight.T * 2


@pytest.mark.parametrize("unusual", [doubling_hook, replaced_function, replaced_forward])
def test_what_is_not_torchs_own_any_more_is_watched(unusual, monkeypatch):
    built, x = model(lambda: nn.Linear(WIDTH, WIDTH)), torch.randn(2, 5, WIDTH)
    unusual(built, monkeypatch)
    found, unwatched = facts(built, x, monkeypatch, watched=False)
    expected, none = facts(built, x, monkeypatch, watched=True)
    assert found == expected
    assert unwatched > none == 0


def test_autocast_is_watched(monkeypatch):
    built, x = model(lambda: nn.Linear(WIDTH, WIDTH)), torch.randn(2, 5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        _, unwatched = facts(built, x, monkeypatch, watched=False)
    assert unwatched == 0


def test_a_module_that_raises_leaves_the_modes_of_torch_as_they_were():
    built, x = model(Catching), torch.randn(2, 5, WIDTH)
    before = torch._C._len_torch_dispatch_stack()
    with pytest.raises((CaptureError, ChainError)):
        probes.describe(built, x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        probes.describe(model(lambda: nn.Linear(WIDTH + 1, WIDTH)), x)
    assert torch._C._len_torch_dispatch_stack() == before
    torch.testing.assert_close(built(x), built(x))
