"""How streams begin and are held: as tensors of their own, as in a list, or with one stream filled; each is measured."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds

STREAMS, WIDTH, BLOCKS = 4, 16, 3


class ListOfStreams(nn.Module):
    """Streams in a Python list; every sum is written out."""

    starts: ClassVar = {
        "copies": lambda x, scale: [x.clone() for _ in range(STREAMS)],
        "scaled": lambda x, scale: [x * scale[n] for n in range(STREAMS)],
        "first and scaled": lambda x, scale: [x, *(x * scale[n] for n in range(1, STREAMS))],
        "cut": lambda x, scale: list((x[:, :, None] * scale[:, None]).unbind(2)),
        "one tensor": lambda x, scale: [x] * STREAMS,
    }

    def __init__(self, start: str, *, takes_first: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.put_in: dict[tuple[int, int], torch.Tensor] = {}  # by depth and stream
        self.takes_first = takes_first  # the head takes the first stream alone
        self.start = self.starts[start]
        self.embed = nn.Embedding(30, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(BLOCKS)
        )
        self.scale = nn.Parameter(torch.rand(STREAMS))
        self.res, self.pre, self.post = (
            nn.Parameter(torch.rand(BLOCKS, *size)) for size in ((STREAMS, STREAMS), (STREAMS,), (STREAMS,))
        )
        self.head = nn.Linear(WIDTH, 30)
        self.states: list[list[torch.Tensor]] = []

    def replaced(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        depth = len(self.states)
        return [self.put_in.get((depth, number), stream) for number, stream in enumerate(streams)]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.states = []
        streams = self.replaced(self.start(self.embed(ids), self.scale))
        self.states.append(streams)
        for block, res, pre, post in zip(self.blocks, self.res, self.pre, self.post, strict=True):
            out = block(sum(weight * x for weight, x in zip(pre, streams, strict=True)))
            before, streams = streams, []
            for row, gain in zip(res, post, strict=True):
                streams.append(sum(weight * x for weight, x in zip(row, before, strict=True)) + gain * out)
            streams = self.replaced(streams)
            self.states.append(streams)
        self.second = streams[1]
        taken = streams[0] if self.takes_first else sum(streams)
        return self.head(taken)


def loss(output: torch.Tensor, batch: object = None) -> torch.Tensor:
    return output.logsumexp(-1).mean()


def truth(model: ListOfStreams, ids: torch.Tensor, loss=loss) -> tuple[torch.Tensor, torch.Tensor]:
    """The states and their gradients, (depth, sequence, token, stream, feature)."""
    value = loss(model(ids))
    flat = [stream for state in model.states for stream in state]
    gradients = torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True)
    return tuple(
        torch.stack([torch.stack(parts[at : at + STREAMS], 2) for at in range(0, len(parts), STREAMS)])
        for parts in ([of.detach() for of in flat], list(gradients))
    )


def tensor(trace, name: str) -> torch.Tensor:
    return torch.from_numpy(trace[name].transpose("depth", "sample", "token", "stream", "feature").to_numpy())


IDS = torch.arange(7).repeat(3, 1)  # equal sequences: which of them a recording samples makes no difference


def captured(model, loss=loss):
    return ds.capture(model, IDS, loss=loss, gradients=True)


def recorded(model, loss=loss):
    """The last of three measured steps: the first is read whole, the next ones by places."""
    options = {"gradients": True, "keep_traces": True, "max_sequences": 3}
    with ds.record(model, every=1, **options) as recorder:
        for _ in range(3):
            model.zero_grad()
            loss(model(IDS)).backward()
            recorder.step()
    return recorder.run


@pytest.mark.parametrize(
    ("start", "measured"),
    [("copies", recorded), ("first and scaled", captured), ("cut", recorded), ("one tensor", captured)],
)
def test_each_stream_is_measured(start, measured):
    model = ListOfStreams(start)
    run = measured(model)
    trace, (states, gradients) = run["trace"], truth(model, IDS)
    assert trace.attrs["proof"] == "proven"
    assert run.attrs["n_streams"] == STREAMS
    assert torch.equal(tensor(trace, "residual"), states)
    assert torch.equal(tensor(trace, "gradient")[1:], gradients[1:])
    h_res = torch.from_numpy(trace["h_res"].isel(sample=0, token=0).to_numpy())
    assert torch.equal(h_res, model.res.detach()[-len(h_res) :])
    shared = start == "one tensor"  # every stream's gradient is a part of its own, and the tensor has the sum
    # A stream that the others are made of has their gradients in its own.
    assert tensor(trace, "gradient")[0].isnan().all() == (shared or start == "first and scaled")
    assert len(h_res) == BLOCKS - shared
    said = [part["why"] for part in run.attrs.get("not_covered", ())]
    assert any("one tensor is each of the 4 streams" in why for why in said) == shared


@pytest.mark.parametrize(("term", "measured"), [(0.0, captured), (1.0, recorded)])
def test_streams_that_the_head_does_not_take_have_the_gradient_of_what_else_takes_them(term, measured):
    model = ListOfStreams("scaled", takes_first=True)

    def with_term(output, batch=None):
        return loss(output) + (term * model.second.square().mean() if term else 0.0)

    trace, (_, gradients) = measured(model, with_term)["trace"], truth(model, IDS, with_term)
    assert bool(gradients[-1, :, :, 1].any()) == bool(term)
    found = tensor(trace, "gradient")
    known = ~found.isnan()
    # Of what no operation takes inside of the model, steps after the first measured one know no gradient.
    assert bool(known[:-1].all())
    assert bool(known.all()) == (not term or measured is captured)
    torch.testing.assert_close(found[known], gradients[known])


@pytest.mark.parametrize("start", ["first and scaled", "one tensor"])
def test_each_stream_is_patched(start):
    """As where the model's own code puts other tensors into its list."""
    model, other = ListOfStreams(start), (3 * IDS + 1) % 30
    found = ds.interventions.patch(model, IDS, other, answer=3, against=7, tokens="all")
    model(IDS)
    clean = [[stream.detach() for stream in state] for state in model.states]
    shared = start == "one tensor"  # its streams cannot differ
    assert [reason.split(":")[0] for reason in found.attrs["left_out"]] == ["depth 0"] * shared
    for depth in range(BLOCKS + 1):
        for stream in (-1, *range(STREAMS)):
            several = range(STREAMS) if stream < 0 else (stream,)
            model.put_in = {(depth, number): clean[depth][number] for number in several}
            with torch.no_grad():
                output = model(other)[:, -1]
            patched = found.patched.sel(depth=depth, token=-1, stream=stream).values
            if depth or stream < 0 or not shared:
                np.testing.assert_allclose(patched, output[:, 3] - output[:, 7], rtol=1e-5)
    np.testing.assert_allclose(found.effect.sel(stream=-1), 1, rtol=1e-6)
