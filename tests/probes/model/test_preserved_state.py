"""A look changes nothing: what a forward notes in plain attributes of its modules is afterwards as it was."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds

IDS = torch.randint(0, 16, (3, 8), generator=torch.Generator().manual_seed(1))


class Noting(nn.Module):
    """A block that notes what it sees in every way that code of users has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh())
        self.calls, self.average = 0, 1.0
        self.kept: list[torch.Tensor] = []
        self.recent: deque[float] = deque([0.0, 0.0], maxlen=2)
        self.by_name = {"sums": [torch.zeros(16)], "pair": (torch.zeros(16),)}
        self.lengths = {8}
        self.last: torch.Tensor | None = None
        self.total, self.counted = torch.zeros(16), np.zeros(2)
        self.scale = torch.ones(1, requires_grad=True)
        self.register_buffer("table", torch.zeros(4, 16))
        self.row = self.table[1]
        self.drawn = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            mean = x.detach().mean((0, 1))
            self.calls += 1
            self.average = 0.9 * self.average + 0.1 * float(mean.norm())
            self.kept.append(x.detach())
            self.recent.append(float(mean.sum()))
            for tensor in (*self.by_name["sums"], *self.by_name["pair"], self.total, self.row, self.scale):
                tensor.add_(mean.mean())
            self.lengths.add(len(self.kept))
            self.last = self.new = x.detach()
            self.counted += 1.0
            torch.rand(1, generator=self.drawn)
            # The buffer and the view of it are one memory in our forwards too.
            assert torch.equal(self.table[1], self.row)
        return x + self.inner(x)

    def noted(self) -> list[object]:
        tensors = (*self.by_name["sums"], *self.by_name["pair"], self.total, self.table, self.row, self.scale)
        lists = [self.calls, self.average, len(self.kept), list(self.recent), set(self.lengths)]
        arrays = [tensor.tolist() for tensor in tensors] + [
            self.counted.tolist(),
            self.drawn.get_state().tolist(),
        ]
        return [*lists, *arrays, None if self.last is None else self.last.tolist(), hasattr(self, "new")]


class Model(nn.Module):
    """Blocks, each inside of another module, and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(16, 16), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(Noting()) for _ in range(2))
        self.calls = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def noted(self) -> list[object]:
        return [self.calls, *(block[0].noted() for block in self.blocks)]


def next_token(output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


LOOKS = {
    "describe": lambda model: ds.describe(model, IDS),
    "capture": lambda model: ds.capture(model, IDS, gradients=True, loss=next_token),
    "settle": lambda model: ds.settle(ds.capture(model, IDS), model, IDS),
    "ablate": lambda model: ds.interventions.ablate(model, IDS, "skip"),
    "jacobian": lambda model: ds.jacobian(model, IDS, values=2),
}


@pytest.mark.parametrize("look", LOOKS)
def test_plain_attributes_are_as_before_a_look(look):
    model = Model()
    model(IDS)
    before, total = model.noted(), model.blocks[0][0].total
    version = total._version
    LOOKS[look](model)
    assert model.noted() == before
    assert model.blocks[0][0].total is total
    assert total._version == version  # a graph of the user's may hold it


def test_plain_attributes_are_as_before_a_look_that_fails():
    model = Model()
    before = model.noted()
    with pytest.raises(ZeroDivisionError):
        ds.capture(model, IDS, gradients=True, loss=lambda output, batch: 1 / 0)
    assert model.noted() == before


@pytest.mark.parametrize("compiled", [False, True])
def test_a_measured_step_notes_what_the_forward_of_the_user_notes_and_no_more(compiled):
    found = []
    for recorded in (False, True):
        model = Model() if not compiled else Compiled()
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(called=called, optimizer=optimizer):
            loss = next_token(called(IDS), IDS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        if recorded:
            with ds.record(called, gradients=True) as recorder:
                for _ in range(3):
                    recorder.step(step())
            assert recorder.run.statistics.sizes["step"] == 3
        else:
            for _ in range(3):
                step()
        found.append(model.noted())
    assert found[0] == found[1]


class Adding(nn.Module):
    """What a compiler can follow: a tensor written in place and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.total, self.calls = nn.Linear(16, 16), torch.zeros(16), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.total += x.detach().mean((0, 1))
        return x + self.inner(x).tanh()

    def noted(self) -> list[object]:
        return [self.calls, self.total.tolist()]


class Compiled(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Adding()) for _ in range(2))
