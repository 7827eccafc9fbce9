"""The catalogue: one tiny random model of every family, what batch it takes, and what is expected to be found in it.

`tests/probes/test_compatibility.py` captures each; a new family is one declaration and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import hyper_connections.mHCv2 as constrained_v2
import torch
import transformers
from hyper_connections import manifold_constrained_hyper_connections as constrained
from torch import nn

from tests.models.designs.layouts import unseen
from tests.models.small_models import Feedforward
from tests.models.stream_models import deepseek_v4, hy_v4, perturbed, qwen4_exp

# Tiny random models draw warnings about settings that only trained ones need.
transformers.logging.set_verbosity_error()

VOCABULARY = 64
LENGTH = 22


@dataclass(frozen=True, eq=False)
class Family:
    """One family of models.

    Parameters
    ----------
    name, package : str
        What people call it, and where the code comes from.
    build : callable
        Makes the model, random weights and all; call `built` for the same weights every time.
    batch : callable
        Makes the batch that `probes.capture` takes.
    blocks : tuple of (str, int)
        The chains that must be found: a pattern of the blocks' paths, ``{i}`` a number, and how often they are called.
    chains : tuple of str
        Their names; one chain has no name.
    connection : str
        The connection family that a run must name.
    streams : int
        Number of residual streams.
    layout : str
        The axes of what the blocks take and give, where states inside of blocks have others.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    blocks: tuple[tuple[str, int], ...]
    chains: tuple[str, ...] = ("",)
    connection: str = "residual"
    streams: int = 1
    layout: str = ""


def built(family: Family) -> nn.Module:
    """The model, with the same weights in every process, in evaluation mode."""
    with (
        torch.random.fork_rng()
    ):  # a test's own random numbers must not depend on which models were built before
        torch.manual_seed(0)
        return family.build().eval()


def tilted(output: Any, batch: Any) -> torch.Tensor:
    """A loss for any output: a weighted mean of all that has a gradient; mean squares of normed tensors would be constant."""
    carrying = [t for t in floats(output) if t.requires_grad]
    return sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).mean() for t in carrying)


def floats(value: Any) -> list[torch.Tensor]:
    """Floating tensors in a model's output."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    items = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    return [tensor for item in items for tensor in floats(item)]


# --- batches ---


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ids(length: int = LENGTH) -> torch.Tensor:
    """Three sequences of tokens."""
    # From 3: the lower ones are padding and the marks of begin and end, which some models mask or treat alone.
    return torch.randint(3, VOCABULARY, (3, length), generator=_generator())


def text(**more: Any) -> dict[str, Any]:
    """A batch for a model of transformers."""
    return {"input_ids": ids(), **more}


def pairs_of_text() -> dict[str, torch.Tensor]:
    """A source and a target."""
    return {"input_ids": ids(), "decoder_input_ids": ids(9)}


def vectors(length: int = LENGTH, width: int = 32) -> torch.Tensor:
    """Three sequences of vectors."""
    return torch.randn(3, length, width, generator=_generator())


def image(side: int = 32) -> torch.Tensor:
    """Three square images."""
    return torch.randn(3, 3, side, side, generator=_generator())


# --- transformers ---

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEED = {"intermediate_size": 64}
SEQUENCES = {
    "vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip


def _huggingface(model: str, config: str, **sizes: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def _text_model(model: str, config: str, blocks: str, **more: Any) -> dict[str, Any]:
    return {
        "build": partial(_huggingface, model, config, **{**SIZES, **more}),
        "batch": text,
        "blocks": ((blocks, 3),),
        "package": "transformers",
    }


def _decoder(name: str, prefix: str, blocks: str = "model.layers.{i}", **more: Any) -> Family:
    return Family(name=name, **_text_model(f"{prefix}ForCausalLM", f"{prefix}Config", blocks, **more))


def _encoder(name: str, prefix: str, blocks: str = "encoder.layer.{i}", **more: Any) -> Family:
    return Family(name=name, **_text_model(f"{prefix}Model", f"{prefix}Config", blocks, **{**FEED, **more}))


DECODERS = (
    Family(
        name="gpt2",
        package="transformers",
        build=partial(_huggingface, "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4),
        batch=text,
        blocks=(("transformer.h.{i}", 3),),
    ),
    _decoder("llama", "Llama", **FEED),
    _decoder("qwen3", "Qwen3", **FEED, num_key_value_heads=2, head_dim=8),
    Family(
        name="gemma3",
        **_text_model(
            "Gemma3ForCausalLM", "Gemma3TextConfig", "model.layers.{i}", **FEED, num_key_value_heads=2, head_dim=8,
            sliding_window=8,
        ),
    ),
    Family(
        name="gemma4",
        **_text_model(
            "Gemma4ForCausalLM", "Gemma4TextConfig", "model.layers.{i}", **FEED, num_key_value_heads=2, head_dim=8,
            sliding_window=8, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
    ),
    _decoder("gpt_neox", "GPTNeoX", "gpt_neox.layers.{i}", **FEED),
    Family(
        name="opt",
        **_text_model(
            "OPTForCausalLM", "OPTConfig", "model.decoder.layers.{i}", ffn_dim=64, word_embed_proj_dim=32
        ),
    ),
    _decoder("mixtral", "Mixtral", **FEED, num_local_experts=4, num_key_value_heads=2),
    _decoder("mamba", "Mamba", "backbone.layers.{i}", state_size=4),
)  # fmt: skip

ENCODERS = (
    _encoder("bert", "Bert"),
    _encoder(
        "albert", "Albert", "encoder.albert_layer_groups.0.albert_layers.0", embedding_size=16
    ),
)  # fmt: skip


PAIRS = (
    Family(
        name="t5",
        package="transformers",
        build=partial(
            _huggingface, "T5ForConditionalGeneration", "T5Config", **SEQUENCES, d_kv=8, d_ff=64, num_layers=3,
            num_decoder_layers=2, num_heads=4,
        ),
        batch=pairs_of_text,
        blocks=(("encoder.block.{i}", 3), ("decoder.block.{i}", 2)),
        chains=("encoder", "decoder"),
    ),
    Family(
        name="nn.Transformer",
        package="torch",
        build=partial(
            nn.Transformer, 32, 4, num_encoder_layers=3, num_decoder_layers=2, dim_feedforward=64, batch_first=True
        ),
        batch=lambda: (vectors(), vectors(9)),
        blocks=(("encoder.layers.{i}", 3), ("decoder.layers.{i}", 2)),
        chains=("encoder", "decoder"),
    ),
)  # fmt: skip


# --- torch itself ---


class Universal(nn.Module):
    """One block called again and again (arXiv 1807.03819)."""

    def __init__(self, times: int = 4):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.times = times

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(self.times):
            x = self.block(x)
        return x


def _torch_encoder(norm_first: bool, batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=norm_first)
    # torch would warn that pre-norm and token-first layers use no nested tensors; in the tests warnings are errors.
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


TORCH = (
    Family(
        name="nn.TransformerEncoder, pre-norm, token first",
        package="torch",
        build=partial(_torch_encoder, norm_first=True, batch_first=False),
        batch=lambda: vectors().transpose(0, 1).contiguous(),
        blocks=(("layers.{i}", 3),),
    ),
    Family(
        name="nn.TransformerEncoder, post-norm, batch first",
        package="torch",
        build=partial(_torch_encoder, norm_first=False, batch_first=True),
        batch=vectors,
        blocks=(("layers.{i}", 3),),
    ),
    Family(
        name="universal transformer",
        package="torch",
        build=Universal,
        batch=ids,
        blocks=(("block", 4),),
    ),
)


# --- images ---


def _torchvision_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes=5)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 2)]
    return ConvNeXt(settings, num_classes=5)


def _torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        [2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )


def _image_model(
    name: str, package: str, build: Callable[[], nn.Module], blocks: str, count: int, **more: Any
) -> Family:
    return Family(name=name, package=package, build=build, batch=image, blocks=((blocks, count),), **more)


IMAGES = (
    _image_model("resnet18", "torchvision", _torchvision_resnet, "layer*.{i}", 8),
    # ConvNeXt and Swin have their stages at odd positions, with a downsampling module between two of them.
    _image_model("convnext", "torchvision", _torchvision_convnext, "features.[135].{i}", 6),
    _image_model("swin", "torchvision", _torchvision_swin, "features.[13].{i}", 4),
)  # fmt: skip


# --- streams ---


class Lucidrains(nn.Module):
    """A language model on one of lucidrains' connections."""

    def __init__(self, connections: Any, width: int = 32, layers: int = 3):
        super().__init__()
        functions = connections.get_init_and_expand_reduce_stream_functions
        init, self.expand, self.reduce = functions(4, dim=width)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(init(branch=Feedforward(width)) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens):
        x = self.expand(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.reduce(x))


def _lucidrains(connections: Any) -> nn.Module:
    # Fresh connections are near the identity, where a wrong reading would fit as well as the right one.
    return perturbed(Lucidrains(connections), "alpha", "beta", "_scale")


def _streams(name: str, build: Callable[[], nn.Module], blocks: str, connection: str) -> Family:
    return Family(
        name=name, package="transformers", build=lambda: perturbed(build()), batch=text, blocks=((blocks, 4),),
        connection=connection, streams=4,
    )  # fmt: skip


def _hyper(name: str, connections: Any) -> Family:
    return Family(
        name=name, package="hyper-connections", build=partial(_lucidrains, connections), batch=ids,
        blocks=(("layers.{i}", 3),), connection="mhc", streams=4,
    )  # fmt: skip


STREAMS = (
    _streams("deepseek_v4", deepseek_v4, "model.layers.{i}", "mhc"),
    _streams("hy_v4", hy_v4, "model.layers.{i}", "independent_hc"),
    _streams("qwen4_exp", qwen4_exp, "layers.{i}", "gated"),
    _hyper("mHC", constrained),
    _hyper("mHCv2", constrained_v2),
)


# --- streams that nobody has declared ---


def _undeclared(name: str, layout: str) -> Family:
    return Family(
        name=f"undeclared streams {name}", package="nobody", build=partial(unseen, layout), batch=ids,
        blocks=(("blocks.{i}", 3),), streams=4, connection="hc", layout=layout.upper(),
    )  # fmt: skip


UNDECLARED = (
    _undeclared("in the feature axis", "b t (n d)"),
    _undeclared("in the batch axis", "(b n) t d"),
)


FAMILIES: tuple[Family, ...] = (
    *DECODERS,
    *ENCODERS,
    *PAIRS,
    *TORCH,
    *IMAGES,
    *STREAMS,
    *UNDECLARED,
)
