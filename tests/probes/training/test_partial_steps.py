"""Does a step whose connections cannot be read have all that does not depend on them?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds
from depthscope import ProbeWarning

ODD = "H_res differs between the features"
OF_STATES = (
    "loss",
    "norm_sum",
    "square_norm_sum",
    "gradient_square_norm_sum",
    "unit_pair_sum",
    "token_count",
)
OF_CONNECTIONS = ("gain_sum", "gain_max", "h_res_sum", "h_pre_sum", "h_post_sum")


class Connection(nn.Module):
    """A block with three streams; where it is odd, the streams go through a function that is no matrix over them."""

    def __init__(self, width: int, streams: int):
        super().__init__()
        self.streams, self.odd, self.rounds = streams, False, 0
        self.weights = nn.Linear(width, streams * streams + 2 * streams)
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.streams
        logits, read, write = self.weights(x.mean(2)).split((n * n, n, n), -1)
        mixed = torch.einsum("btij,btjd->btid", torch.softmax(logits.unflatten(-1, (n, n)), -1), x)
        if self.odd:
            mixed = torch.tanh(mixed) * mixed.abs().sort(-1).values
        y = self.branch((torch.sigmoid(read).unsqueeze(-1) * x).sum(2))
        for _ in range(self.rounds):
            y = torch.zeros_like(y).add_(y)
        return mixed + 2 * torch.sigmoid(write).unsqueeze(-1) * y.unsqueeze(2)


class Streams(nn.Module):
    def __init__(self, layers: int = 3, width: int = 16, streams: int = 3):
        super().__init__()
        self.streams = streams
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Connection(width, streams) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, self.streams, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.sum(2)))


def trained(odd: dict[int, tuple[bool, ...]], steps: int = 6, **options):
    """A recorder after a training; ``odd``: in which forwards of which steps a connection cannot be read."""
    torch.manual_seed(0)
    model, ids = Streams(), torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ds.record(model, gradients=True, **options) as recorder:
        for step in range(steps):
            for is_odd in odd.get(step, (False,)):
                model.blocks[1].odd = is_odd
                loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
                loss.backward()
            recorder.step(loss)
            optimizer.step()
            optimizer.zero_grad()
    return recorder


def statistics(run):
    return run["statistics"].to_dataset()


@pytest.mark.parametrize("metrics", [None, "live"])
def test_states_gradients_and_loss_are_stored_and_the_connections_are_nan(metrics):
    with pytest.warns(ProbeWarning, match=f"step 2 was measured without its connections.*{ODD}") as said:
        run = trained({2: (True,), 3: (True,)}, metrics=metrics).run
    assert len([each for each in said if issubclass(each.category, ProbeWarning)]) == 1
    found = statistics(run)
    assert found["step"].values.tolist() == [0, 1, 2, 3, 4, 5]
    for name in OF_STATES:
        assert np.isfinite(found[name].values).all(), name
    for name in OF_CONNECTIONS:
        of_step = np.isnan(found[name].values.reshape(6, -1)).all(1)
        assert of_step.tolist() == [False, False, True, True, False, False], name
    missing = run.attrs["without_connections"]
    assert missing["steps"] == [2, 3]
    assert all(ODD in why for why in missing["why"])
    if metrics:
        live = run["metrics"].to_dataset()
        assert (
            np.isfinite(live["effective_rank"].values)
            .any(axis=tuple(range(1, live["effective_rank"].ndim)))
            .all()
        )
        assert np.isnan(live["mixing_gain"].values[2:4]).all()
        assert np.isfinite(live["mixing_gain"].values[[0, 1, 4, 5]]).any()


def test_a_step_of_which_one_forward_is_not_read_has_no_mean_over_the_others():
    with pytest.warns(ProbeWarning, match="step 1 was measured without its connections"):
        found = statistics(trained({1: (False, True)}, steps=3).run)
    assert np.isnan(found["gain_sum"].values[1]).all()
    np.testing.assert_array_equal(found["token_count"].values, [16, 32, 16])
    assert np.isfinite(found["norm_sum"].values).all()


@pytest.mark.filterwarnings("ignore:step 3 was measured without")
@pytest.mark.parametrize("with_graph", [True, False])
def test_of_forwards_that_run_other_operations_each_time_one_step_is_lost(with_graph):
    torch.manual_seed(0)
    model, lost = Streams(), []
    for rounds in ([1] * 8, [1, 1, 1, 2, 1, 3, 3, 3, 2, 2]):
        with torch.set_grad_enabled(with_graph), ds.record(model) as recorder:
            for model.blocks[1].rounds in rounds:
                model(torch.randint(0, 20, (2, 8)))
                recorder.step()
        assert recorder.errors == []
        lost.append(recorder.run.attrs.get("without_connections", {}).get("steps", []))
    assert lost == [[], [3]]


def test_a_capture_refuses_all_the_same():
    model, ids = Streams(), torch.randint(0, 20, (2, 8))
    run = ds.capture(model, ids)
    assert run.attrs["n_streams"] == 3
    model.blocks[1].odd = True
    assert ds.capture(model, ids).attrs["proof"].startswith("unproven")
