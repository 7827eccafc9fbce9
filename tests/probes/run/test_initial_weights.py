"""Whether a model is as it was drawn is told by its vectors: of real fresh networks, and of those that moved by a step."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from depthscope import diagnostics, probes
from depthscope.diagnostics import Severity

GPT = {"n_layer": 8, "n_embd": 64, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 1}
TEXT = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 96, "pad_token_id": 0, "num_key_value_heads": 4}  # fmt: skip
VISION = {
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tokens() -> torch.Tensor:
    return torch.randint(1, 100, (4, 24), generator=torch.Generator().manual_seed(0))


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class _Step(nn.Module):
    """x + b(relu(a(x))), without a norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


def gpt2() -> nn.Module:
    return transformers.GPT2Model(transformers.GPT2Config(**GPT))


FRESH = {
    "gpt2": (gpt2, tokens),
    "gemma": (lambda: transformers.GemmaModel(transformers.GemmaConfig(**TEXT, head_dim=12)), tokens),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)), pictures),
    "linear layers without norms": (
        lambda: nn.Sequential(*(_Step() for _ in range(4))),
        lambda: torch.randn(8, 16),
    ),
}


def facts(make, batch, change=None):
    torch.manual_seed(0)
    model = make().eval()
    if change is not None:
        with torch.no_grad():
            change(model)
    return diagnostics.analyze(probes.capture(model, batch())).attrs


def moved(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(1e-2 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", FRESH)
def test_a_fresh_network_is_known_as_one_and_after_a_step_of_its_vectors_no_longer(kind):
    assert facts(*FRESH[kind])["untouched"] == 1
    assert "untouched" not in facts(*FRESH[kind], moved)


def test_weights_drawn_otherwise_are_not_known_as_fresh():
    def drawn(model):
        for layer in (each for each in model.modules() if isinstance(each, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.5)

    assert "untouched" not in facts(*FRESH["linear layers without norms"], drawn)


def test_a_young_gpt2_with_a_block_that_writes_too_much_does_not_pass():
    def broken():
        model = gpt2()
        with torch.no_grad():
            model.h[5].mlp.c_proj.weight.mul_(3000)
        return model

    def findings(make):
        torch.manual_seed(0)
        return diagnostics.judge(diagnostics.analyze(probes.capture(make().eval(), tokens())))

    found = {each.verdict: each.severity for each in findings(broken)}
    assert found["idle_layer"] >= Severity.INFO, found
    assert all(each.severity <= Severity.INFO for each in findings(gpt2))
