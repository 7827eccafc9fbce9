"""Which trainings are measured? A GPT-2, an mHC decoder, transformers' DeepSeek V4, and 200 thin blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.capture.cases import Attention, Sizes, build, feedforward


@dataclass
class Training:
    """A model with its batch and its optimizer."""

    model: nn.Module
    batch: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer

    def step(self) -> torch.Tensor:
        """One step of a training, as a user writes it; returns the loss."""
        loss = self.model(**self.batch)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _training(model: nn.Module, batch: dict[str, torch.Tensor]) -> Training:
    # So slow that the model stays as it is: every round measures the same network.
    return Training(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-6))


def of_capture(name: str, sizes: Sizes) -> Training:
    """A model of the benchmark of captures."""
    case = build(name, sizes)
    return _training(case.model, case.batch())


def deepseek_v4(layers: int, width: int, batch: int, tokens: int) -> Training:
    """transformers' DeepSeek V4: mHC connections around attention and a mixture of experts."""
    import transformers

    config = transformers.DeepseekV4Config(
        vocab_size=64,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        moe_intermediate_size=width,
        head_dim=64,
        q_lora_rank=64,
        partial_rotary_factor=0.5,
        num_experts_per_tok=2,
        n_routed_experts=4,
        o_groups=2,
        o_lora_rank=32,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=4,
        sliding_window=8,
        num_nextn_predict_layers=0,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mlp_layer_types=["hash_moe"] + ["moe"] * (layers - 1),
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "_hc." in name:  # a fresh connection is symmetric: nothing shows which axis is the destination
            nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return _training(model, {"input_ids": ids, "labels": ids})


class Block(nn.Module):
    """Attention and a feed-forward part on one residual stream."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attention, self.feedforward = Attention(sizes), feedforward(sizes.width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(x_BTD)
        return x_BTD + self.feedforward(x_BTD)


def deep(layers: int, width: int) -> Training:
    """As many blocks as cost next to nothing: what is done for each block or operation costs most here."""
    torch.manual_seed(0)
    sizes = Sizes(layers=layers, width=width, batch=2, tokens=32, heads=4)
    blocks = (Block(sizes) for _ in range(layers))
    network = WithLoss(nn.Sequential(nn.Embedding(100, width), *blocks, nn.LayerNorm(width)))
    ids = torch.randint(0, 100, (sizes.batch, sizes.tokens), generator=torch.Generator().manual_seed(0))
    return _training(network, {"input_ids": ids})


class WithLoss(nn.Module):
    """A network with the mean square of its output as its loss."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.network(input_ids).square().mean()}


CASES: dict[str, tuple[str, Callable[[], Training]]] = {
    "deep": ("200 blocks of width 64, 2 × 32 tokens", lambda: deep(200, 64)),
    "gpt2": (
        "GPT-2, 12 × 768, 4 × 128 tokens",
        lambda: of_capture("residual", Sizes(12, 768, 4, 128, heads=12)),
    ),
    "mhc": (
        "mHC of lucidrains, 6 × 384, n = 4, 4 × 128 tokens",
        lambda: of_capture("mhc", Sizes(6, 384, 4, 128)),
    ),
    "deepseek": ("DeepSeek V4, 8 × 256, n = 4, 4 × 128 tokens", lambda: deepseek_v4(8, 256, 4, 128)),
}
QUICK: dict[str, tuple[str, Callable[[], Training]]] = {
    "deep": ("6 blocks of width 32", lambda: deep(6, 32)),
    "gpt2": ("GPT-2, 2 × 32", lambda: of_capture("residual", Sizes(2, 32, 2, 16, heads=4))),
    "mhc": ("mHC, 1 × 32", lambda: of_capture("mhc", Sizes(1, 32, 2, 16))),
}
