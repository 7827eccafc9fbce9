"""What starts small is told by what multiplies its branches in the forward, over real code: Conv1D, LayerScale, norms."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn

from depthscope import diagnostics, probes
from depthscope.diagnostics import Severity
from tests.models.plain_stack import Stack

SMALL = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 100, "intermediate_size": 96, "pad_token_id": 0, "num_key_value_heads": 4}
GPT = {"n_layer": 8, "n_embd": 64, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 1}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}


def timm(name: str) -> ModuleType:
    """A module of timm, which takes two seconds to import."""
    return import_module(f"timm.models.{name}")


def tokens() -> torch.Tensor:
    return torch.randint(1, 100, (4, 24), generator=torch.Generator().manual_seed(0))


def pictures(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def capture(make, batch):
    torch.manual_seed(0)
    return probes.capture(make().eval(), batch)


def starts(run) -> list[str | None]:
    """The sentence of each chain; None where nothing says that its branches begin small."""
    trace = run["trace"]
    chains = list(trace.children.values()) or [trace]
    return [chain.attrs.get("small_start") for chain in chains]


# --- Conv1D stores (in, out), and has a bias: no scale


CONV1D = {
    "gpt2": lambda **more: transformers.GPT2Model(transformers.GPT2Config(**GPT | more)),
    "openai-gpt": lambda **more: transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig(**GPT | more)),
    "imagegpt": lambda **more: transformers.ImageGPTModel(transformers.ImageGPTConfig(**GPT, n_positions=32)),
    "decision transformer": lambda **more: transformers.DecisionTransformerGPT2Model(
        transformers.DecisionTransformerConfig(**GPT, hidden_size=64)
    ),
}


@pytest.mark.parametrize("kind", CONV1D)
def test_a_bias_of_conv1d_is_no_scale(kind):
    run = capture(CONV1D[kind], tokens())
    assert all(start is None or "scale" not in start for start in starts(run))


@pytest.mark.parametrize("block", [1, 5])
def test_a_young_gpt2_with_a_block_that_writes_too_much_does_not_pass(block):
    def broken():
        model = CONV1D["gpt2"]()
        with torch.no_grad():
            model.h[block].mlp.c_proj.weight.mul_(3000)
        return model

    found = {each.verdict: each for each in diagnostics.judge(diagnostics.analyze(capture(broken, tokens())))}
    named = found["same_representation"] if block == 1 else found["idle_layer"]
    assert named.severity >= Severity.WARN
    assert "construction" not in " ".join(each.sentence for each in found.values())
    healthy = diagnostics.judge(diagnostics.analyze(capture(CONV1D["gpt2"], tokens())))
    assert all(each.severity <= Severity.INFO for each in healthy)


@pytest.mark.parametrize("kind", ["LlamaConfig", "GemmaConfig", "Gemma2Config", "GraniteConfig"])
def test_weights_of_norms_before_a_branch_multiply_none(kind):
    # Gemma's norms multiply by 1 + w, and w begins at 0; Granite's branches by a constant, which no training changes.
    more = {"residual_multiplier": 0.1} if kind == "GraniteConfig" else {"head_dim": 12}
    config = getattr(transformers, kind)(**TEXT, **more)
    run = capture(lambda: transformers.AutoModel.from_config(config), tokens())
    assert all(start is None or "scale" not in start for start in starts(run))


# --- what is a scale


SCALED = {
    "dinov2": (
        lambda value: transformers.Dinov2Model(transformers.Dinov2Config(**VISION, layerscale_value=value)),
        32,
    ),
    "beit": (
        lambda value: transformers.BeitModel(
            transformers.BeitConfig(
                **VISION, intermediate_size=96, vocab_size=100, layer_scale_init_value=value
            )
        ),
        32,
    ),
    "cait": (lambda value: timm("cait").Cait(**TIMM, init_values=value), 32),
    "vit": (lambda value: timm("vision_transformer").VisionTransformer(**TIMM, init_values=value), 32),
    "vit, norms after branches": (
        lambda value: timm("vision_transformer").VisionTransformer(
            **TIMM, init_values=value, block_fn=timm("vision_transformer").ResPostBlock
        ),
        32,
    ),
    "convnext of timm": (
        lambda value: timm("convnext").ConvNeXt(
            depths=(1, 1, 3, 1), dims=(16, 32, 48, 64), num_classes=10, ls_init_value=value
        ),
        64,
    ),
    "convnext of transformers": (
        lambda value: transformers.ConvNextModel(
            transformers.ConvNextConfig(
                depths=[1, 1, 3, 1], hidden_sizes=[16, 32, 48, 64], layer_scale_init_value=value
            )
        ),
        64,
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_layer_scale_is_read_where_it_multiplies(kind):
    make, size = SCALED[kind]
    found = starts(capture(lambda: make(1e-3), pictures(size)))
    assert all(start is not None and "learned scale of at most 0.001" in start for start in found)
    assert all(
        start is None or "scale" not in start for start in starts(capture(lambda: make(1.0), pictures(size)))
    )


def test_a_norm_at_the_end_of_a_branch_that_begins_at_zero_is_a_scale():
    zero = timm("resnet").ResNet(timm("resnet").Bottleneck, (2, 2, 2, 2), num_classes=10, zero_init_last=True)
    assert all(
        start is not None and "at most 0" in start for start in starts(capture(lambda: zero, pictures(64)))
    )
    one = timm("resnet").ResNet(timm("resnet").Bottleneck, (2, 2, 2, 2), num_classes=10, zero_init_last=False)
    assert not any(start and "scale" in start for start in starts(capture(lambda: one, pictures(64))))
    swin = timm("swin_transformer_v2").SwinTransformerV2(
        img_size=64,
        patch_size=4,
        window_size=4,
        embed_dim=24,
        depths=(2, 4),
        num_heads=(2, 4),
        num_classes=10,
    )
    assert all(
        start is not None and "at most 0" in start for start in starts(capture(lambda: swin, pictures(64)))
    )


class Gated(nn.Module):
    """x + g(α) · F(x) for each branch, with any function of a parameter."""

    def __init__(self, alphas, function):
        super().__init__()
        self.function, self.norm = function, nn.LayerNorm(32)
        self.alphas = nn.ParameterList(nn.Parameter(torch.tensor(float(alpha))) for alpha in alphas)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in alphas
        )

    def forward(self, x):
        for alpha, branch in zip(self.alphas, self.branches, strict=True):
            x = x + self.function(alpha, branch(self.norm(x)))
        return x


def gated(alphas, function) -> Stack:
    return Stack([Gated(alphas, function) for _ in range(4)], nn.Embedding(100, 32), nn.Linear(32, 100))


@pytest.mark.parametrize(
    ("alphas", "function", "largest"),
    [
        ((0.01, 0.02), lambda a, y: a * y, 0.02),
        ((0.01, 0.02), lambda a, y: y * a.to(torch.float64).to(y.dtype).view(1, 1, 1), 0.02),
        ((0.0, 0.0), lambda a, y: torch.tanh(a) * y, 0.0),
        ((-4.0, -5.0), lambda a, y: a.exp() * y, 0.0183),
        ((0.05, 0.05), lambda a, y: nn.functional.dropout(a * y, 0.0), 0.05),
        ((0.0, 0.0), lambda a, y: (1 + a) * y, None),
        # One branch of each block begins small, and the other writes as much as it likes.
        ((0.01, 1.0), lambda a, y: a * y, None),
        ((0.01, 0.01), lambda a, y: y + 0 * a, None),
        ((0.01, 0.01), lambda a, y: y, None),
    ],
)
def test_a_scale_is_any_function_of_a_parameter_that_multiplies_every_branch(alphas, function, largest):
    (start,) = starts(capture(lambda: gated(alphas, function), tokens()))
    if largest is None:
        assert start is None or "scale" not in start
    else:
        assert f"every branch is multiplied by a learned scale of at most {largest:.2g}" in start


def test_the_scale_is_that_of_the_present_weights():
    torch.manual_seed(0)
    model = gated((0.01, 0.01), lambda a, y: a * y)
    with probes.record(model, gradients=False) as recorder:
        model(tokens())
        recorder.step()
    assert "at most 0.01" in starts(recorder.run)[0]
    with probes.record(model, gradients=False) as recorder:
        for _ in range(2):
            model(tokens())
            recorder.step()
            with torch.no_grad():
                for block in model.blocks:
                    for alpha in block.alphas:
                        alpha.fill_(0.7)
    assert not any(start and "scale" in start for start in starts(recorder.run))


class _Step(nn.Module):
    """x + b(relu(a(x))), without a norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


@pytest.mark.parametrize(
    ("moved", "drawn", "facts"),
    [
        (0.0, None, {"untouched": 1, "drawn_moved": 0.0}),
        (0.07, None, {"drawn_moved": 0.07}),
        # Of weights that were drawn otherwise it is not known from where they have moved.
        (0.0, 0.5, {"drawn_moved": None}),
    ],
)
def test_without_norms_the_bounds_of_the_draw_tell_how_far_weights_have_moved(moved, drawn, facts):
    def make():
        model = nn.Sequential(*(_Step() for _ in range(4)))
        with torch.no_grad():
            for layer in (each for each in model.modules() if isinstance(each, nn.Linear)):
                bound = layer.in_features**-0.5
                layer.weight[0, 0] = bound + moved if moved else layer.weight[0, 0]
                layer.weight.normal_(std=drawn) if drawn else None
        return model

    found = diagnostics.analyze(capture(make, torch.randn(8, 16))).attrs
    assert found.get("drawn_moved") == pytest.approx(facts["drawn_moved"], abs=1e-6)
    assert found.get("untouched") == facts.get("untouched")
