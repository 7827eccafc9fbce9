"""What routers choose is counted in a capture and in every later forward, and nothing else is taken for a router."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from depthscope import diagnostics, probes

B, T, D, EXPERTS = 2, 12, 16, 4


class Experts(nn.Module):
    """A mixture of experts that notes what its router chooses."""

    def __init__(self, kind: str, most: int) -> None:
        super().__init__()
        self.gate, self.kind, self.most = nn.Linear(D, EXPERTS), kind, most
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, D)
        logits = self.gate(flat)
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}.get(self.kind, logits)
        if self.kind == "argmax":
            chosen = scores.argmax(-1, keepdim=True)
            weights = scores.softmax(-1).gather(-1, chosen)
        else:
            weights, chosen = scores.topk(self.most, dim=-1)
        found = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            found = found.index_add(0, token, expert(flat[token]) * weights[token, slot, None])
        self.seen = scores.detach(), chosen
        return found.reshape(x.shape)

    def counts(self, real: torch.Tensor | None = None) -> list[int]:
        """How often each expert was chosen in the last forward."""
        chosen = self.seen[1] if real is None else self.seen[1][real.flatten()]
        return torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()

    def entropy(self) -> float:
        """The mean entropy of the scores, as a share of the largest."""
        scores = self.seen[0]
        p = (
            scores / scores.sum(-1, keepdim=True)
            if self.kind in ("softmax", "sigmoid")
            else scores.softmax(-1)
        )
        return float(-(p * p.log()).sum(-1).mean() / math.log(EXPERTS))


class Network(nn.Module):
    """Blocks with a mixture of experts each, and a head that looks for the most probable tokens."""

    def __init__(self, kind: str = "softmax", most: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, D), nn.Linear(D, 20)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.blocks = nn.ModuleList(Experts(kind, most) for _ in range(3))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        logits = self.head(x)
        return {"loss": logits.square().mean(), "likely": logits.topk(3).indices}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 20, (B, T), generator=torch.Generator().manual_seed(0))


def network(*given: object) -> Network:
    torch.manual_seed(0)
    return Network(*given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "most"), [("softmax", 2), ("sigmoid", 2), ("logits", 1), ("argmax", 1)])
def test_a_capture_has_the_load_and_the_entropy_of_each_router(ids, kind, most):
    model = network(kind, most)
    run = probes.capture(model, {"input_ids": ids}, settle=0)
    counts = run["statistics"]["expert_token_count"].values[0]
    assert np.isnan(counts[0]).all()
    assert counts[1:].tolist() == [block.counts() for block in model.blocks]
    found = diagnostics.analyze(run, metrics=["expert_load", "router_entropy"])
    assert np.allclose(found["expert_load"].values[0, 1:].sum(-1), EXPERTS)
    assert np.allclose(
        found["router_entropy"].values[0, 1:], [block.entropy() for block in model.blocks], atol=1e-6
    )


def test_padding_is_not_counted(ids):
    model, real = network(), torch.ones(B, T, dtype=torch.bool)
    real[1, 5:] = False
    run = probes.capture(model, {"input_ids": ids, "attention_mask": real}, settle=0)
    assert run["statistics"]["expert_token_count"].values[0, 1:].tolist() == [
        b.counts(real) for b in model.blocks
    ]
    assert run["statistics"]["routed_token_count"].values[0, 1:].tolist() == [float(real.sum())] * 3


def test_every_measured_step_of_a_training_has_them_and_curves_too(ids):
    model, seen = network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with probes.record(model, every=1, gradients=True, metrics="live") as recorder:
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(ids)["loss"]
            loss.backward()
            recorder.step(loss)
            optimizer.step()
            seen.append([block.counts() for block in model.blocks])
    assert recorder.run["statistics"]["expert_token_count"].values[:, 1:].tolist() == seen
    live, curves = recorder.run["metrics"].to_dataset(), diagnostics.training_curves(recorder.run)
    for name in ("expert_load", "router_entropy"):
        assert np.allclose(live[name].values, curves[name].values, equal_nan=True)
    assert np.allclose(live["expert_load"].values[:, 1:], np.array(seen) * EXPERTS / (2 * B * T))


def test_an_expert_that_no_token_chooses_has_the_load_0(ids):
    model = network()
    with torch.no_grad():
        model.blocks[1].gate.bias[2] = -100.0
    run = probes.capture(model, {"input_ids": ids}, settle=0)
    load = diagnostics.analyze(run, metrics=["expert_load"])["expert_load"]
    assert float(load[0, 2, 2]) == 0.0


def test_a_choice_that_leads_to_no_state_or_is_of_no_layer_is_none_of_a_router(ids):
    class Sparse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x @ x.mT  # of queries and keys, as an indexer's
            chosen = scores.topk(4).indices
            return torch.zeros_like(scores).scatter(-1, chosen, 0.25) @ x

    model = network()
    model.blocks = nn.ModuleList(Sparse() for _ in range(3))
    run = probes.capture(model, {"input_ids": ids}, settle=0)
    assert "expert_token_count" not in run["statistics"]


def test_a_router_of_groups_inside_of_one_of_experts_is_seen_with_it(ids):
    class Grouped(Experts):
        """Chooses two of the experts after a module of its own chose among pairs of them."""

        def __init__(self) -> None:
            super().__init__("logits", 2)
            self.pairs = Pairs()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.pairs(x))

    class Pairs(nn.Module):
        """A choice that is one among the outputs of a layer too."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.values = nn.Linear(D, 3), nn.Parameter(torch.randn(3, D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.values[self.gate(x).argmax(-1)]

    model = network()
    model.blocks = nn.ModuleList(Grouped() for _ in range(3))
    with probes.record(model, every=1, gradients=True) as recorder:
        for _ in range(3):
            loss = model(ids)["loss"]
            loss.backward()
            recorder.step(loss)
    counts = recorder.run["statistics"]["expert_token_count"].values
    assert counts.shape == (3, 4, 3 + EXPERTS)
    assert np.array_equal(counts[0], counts[2], equal_nan=True)
    assert counts[2, 1:, 3:].tolist() == [block.counts() for block in model.blocks]
