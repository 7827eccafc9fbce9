"""Small models as users have them: in wrappers, with adapters, quantised, of other libraries; and where their states are.

Most of these packages are no requirement of the tests. `pip install transformer-lens nnsight peft torchao bitsandbytes
diffusers keras lightning fair-esm` runs all of them; those that are not installed are skipped.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 101
RIGHT, UNPROVEN, REFUSED = "right", "unproven", "refused"


@dataclass(frozen=True)
class UserModel:
    """One model: what `describe` makes of it, and where hooks see its states.

    ``states``: by the name of a chain (empty where it is the only one) the module and side of each state, in order of
    depth; ``>`` before a path is what the module gives (``>1:`` the second of several), ``<`` what it takes first, and
    ``<name:`` what it takes by that name. ``not_covered``: modules whose states the run has to name as left out.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[], tuple[Any, Any]]
    outcome: str = RIGHT
    says: str = ""
    states: Mapping[str, Sequence[str]] = field(default_factory=dict)
    not_covered: tuple[str, ...] = ()
    tokens_first: bool = False
    seen: Callable[[Any], nn.Module] = lambda model: model


def ids() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return _seeded(lambda: transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return _seeded(lambda: transformers.LlamaForCausalLM(config))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def blocks(container: str, count: int = 3) -> list[str]:
    """What the first block takes, and what each gives."""
    return [f"<{container}.0", *(f">{container}.{number}" for number in range(count))]


# --- wrappers


def bridge(*, compatible: bool) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory(prefix="gpt2") as folder:
        model = gpt2()
        model.save_pretrained(folder)
        words = Tokenizer(
            models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
        )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="0", eos_token="0", pad_token="0"
        ).save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        found = TransformerBridge.boot_transformers(folder, tokenizer=tokenizer, hf_model=model, device="cpu")
    if compatible:
        found.enable_compatibility_mode()
    return found.eval(), ids()


def nnsight() -> tuple[Any, Any]:
    from nnsight import NNsight

    return NNsight(gpt2()), {"input_ids": ids()}


def lightning() -> tuple[Any, Any]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = gpt2()

        def forward(self, input_ids):
            return self.net(input_ids)

    return Module().eval(), {"input_ids": ids()}


# --- adapters and quantised weights


def peft(name: str, **options: Any) -> tuple[Any, Any]:
    import peft

    config = getattr(peft, name)(task_type="CAUSAL_LM", **options)
    of_attention = "num_virtual_tokens" in options
    return _seeded(lambda: peft.get_peft_model(gpt2() if of_attention else llama(), config)), {
        "input_ids": ids()
    }


def torchao() -> tuple[Any, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    quantize_(model, Int8WeightOnlyConfig())
    return model, {"input_ids": ids()}


def bitsandbytes(bits: int) -> tuple[Any, Any]:
    import bitsandbytes as bnb

    model = llama()
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            old = getattr(parent, name)
            sizes = old.in_features, old.out_features
            if bits == 8:
                new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32)
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            setattr(parent, name, new.to("cpu"))
    return model, {"input_ids": ids()}


# --- images, diffusion, proteins


def unet() -> tuple[Any, Any]:
    from diffusers import UNet2DConditionModel

    model = _seeded(
        lambda: UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16,
            attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip
    return model, {
        "sample": _random(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": _random(2, 5, 16),
    }


def sd3() -> tuple[Any, Any]:
    from diffusers import SD3Transformer2DModel

    model = _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
            pos_embed_max_size=8,
        )
    )  # fmt: skip
    return model, {
        "hidden_states": _random(2, 4, 8, 8),
        "encoder_hidden_states": _random(2, 5, 16),
        "pooled_projections": _random(2, 24),
        "timestep": torch.tensor([3.0, 7.0]),
    }


def flux() -> tuple[Any, Any]:
    from diffusers import FluxTransformer2DModel

    model = _seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
        )
    )  # fmt: skip
    return model, {
        "hidden_states": _random(2, 16, 4),
        "encoder_hidden_states": _random(2, 5, 32),
        "pooled_projections": _random(2, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def keras() -> tuple[Any, Any]:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    given = keras.Input((7,), dtype="int32")
    x = layers.Embedding(VOCABULARY, 32, name="embed")(given)
    for number in range(3):
        h = layers.LayerNormalization()(x)
        x = layers.Add(name=f"mid{number}")([x, layers.MultiHeadAttention(4, 8)(h, h)])
        h = layers.LayerNormalization()(x)
        x = layers.Add(name=f"post{number}")([x, layers.Dense(32)(layers.Dense(64, activation="gelu")(h))])
    return keras.Model(given, layers.Dense(VOCABULARY)(layers.LayerNormalization()(x))).eval(), ids().int()


DENSENET = {
    f"stage{n}": [place]
    for n, place in enumerate([
        ">features.pool0", "<features.denseblock1.denselayer2.norm1", ">features.denseblock1", ">features.transition1",
        *(f"<features.denseblock2.denselayer{layer}.norm1" for layer in (2, 3)), ">features.denseblock2",
    ])
}  # fmt: skip


def densenet() -> tuple[Any, Any]:
    import torchvision

    build = torchvision.models.DenseNet
    model = _seeded(lambda: build(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=7))
    return model, _random(2, 3, 32, 32)


def graph_network() -> tuple[Any, Any]:
    from torch_geometric.data import Data
    from torch_geometric.nn import DeepGCNLayer, GCNConv

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
            layers = (
                DeepGCNLayer(GCNConv(16, 16), nn.LayerNorm(16), nn.ReLU(), block="res") for _ in range(3)
            )
            self.layers = nn.ModuleList(layers)

        def forward(self, data):
            x = self.embed(data.x)
            for layer in self.layers:
                x = layer(x, data.edge_index)
            return self.head(x)

    edges = torch.randint(0, 8, (2, 20), generator=torch.Generator().manual_seed(0))
    return _seeded(Net), Data(x=_random(8, 5), edge_index=edges)


def timm(name: str, **options: Any) -> tuple[Any, Any]:
    import timm

    return _seeded(lambda: timm.create_model(name, num_classes=7, **options)), _random(2, 3, 32, 32)


def esm() -> tuple[Any, Any]:
    from esm.model.esm2 import ESM2

    build = _seeded(lambda: ESM2(num_layers=3, embed_dim=32, attention_heads=4, alphabet="ESM-1b"))
    return build, torch.randint(4, 24, (2, 7), generator=torch.Generator().manual_seed(0))


def esm_of_transformers() -> tuple[Any, Any]:
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary",
    )  # fmt: skip
    batch = torch.randint(4, 24, (2, 7), generator=torch.Generator().manual_seed(0))
    return _seeded(lambda: transformers.EsmForMaskedLM(config)), {"input_ids": batch}


VIRTUAL = {"num_virtual_tokens": 4}
CONVNEXT = {
    f"stage{stage}": [
        f"<stages.{stage}.blocks.0",
        *(f">stages.{stage}.blocks.{number}" for number in range(count)),
    ]
    for stage, count in enumerate((2, 2, 6, 2))
}
MODELS = (
    UserModel("TransformerBridge", ("transformer_lens",), lambda: bridge(compatible=False), states={"": blocks("blocks")}),
    UserModel(
        "TransformerBridge, compatibility mode",
        ("transformer_lens",), lambda: bridge(compatible=True), states={"": blocks("blocks")},
    ),
    UserModel("NNsight", ("nnsight",), nnsight, REFUSED, "expected a torch.nn.Module"),
    UserModel(
        "NNsight, `._module`",
        ("nnsight",), nnsight, seen=lambda model: model._module, states={"": blocks("transformer.h")},
    ),
    UserModel("LightningModule", ("lightning",), lightning, states={"": blocks("net.transformer.h")}),
    UserModel(
        "peft, LoRA", ("peft",),
        lambda: peft("LoraConfig", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        states={"": blocks("base_model.model.model.layers")},
    ),
    UserModel(
        "peft, prompt tuning", ("peft",), lambda: peft("PromptTuningConfig", **VIRTUAL),
        states={"": blocks("base_model.transformer.h")},
    ),
    UserModel(
        "peft, prefix tuning", ("peft",), lambda: peft("PrefixTuningConfig", **VIRTUAL),
        states={"": blocks("base_model.transformer.h")},
    ),
    UserModel("torchao, int8 weights", ("torchao",), torchao, states={"": blocks("model.layers")}),
    UserModel("bitsandbytes, 8 bit", ("bitsandbytes",), lambda: bitsandbytes(8), states={"": blocks("model.layers")}),
    UserModel("bitsandbytes, 4 bit", ("bitsandbytes",), lambda: bitsandbytes(4), states={"": blocks("model.layers")}),
    UserModel(
        "diffusers, UNet2DConditionModel", ("diffusers",), unet,
        states={
            "stage0": [">conv_in", ">down_blocks.0.resnets.0", ">down_blocks.0.attentions.0"],
            "stage1": ["<mid_block.resnets.0", *(f">mid_block.{n}" for n in ("resnets.0", "attentions.0", "resnets.1"))],
        },
        not_covered=("up_blocks",),
    ),
    UserModel(
        "diffusers, SD3Transformer2DModel", ("diffusers",), sd3,
        states={
            "hidden_states": ["<hidden_states:transformer_blocks.0", *(f">1:transformer_blocks.{n}" for n in range(3))],
            "encoder_hidden_states": [
                "<encoder_hidden_states:transformer_blocks.0", *(f">0:transformer_blocks.{n}" for n in range(2))
            ],
        },
    ),
    UserModel(
        "diffusers, FluxTransformer2DModel", ("diffusers",), flux,
        states={
            "hidden_states": ["<hidden_states:transformer_blocks.0", *(f">1:transformer_blocks.{n}" for n in range(2))],
            "encoder_hidden_states": [
                "<encoder_hidden_states:transformer_blocks.0", *(f">0:transformer_blocks.{n}" for n in range(2))
            ],
        },
        not_covered=("single_transformer_blocks",),
    ),
    UserModel(
        "Keras 3 on torch", ("keras",), keras,
        states={"": [">embed", *(f">{site}{n}" for n in range(3) for site in ("mid", "post"))]},
    ),
    UserModel("torch_geometric, DeepGCNLayer", ("torch_geometric",), graph_network, states={"": blocks("layers")}),
    UserModel("torchvision, DenseNet", ("torchvision",), densenet, states=DENSENET),
    UserModel(
        "timm, ViT", ("timm",), lambda: timm("vit_tiny_patch16_224", img_size=32, depth=3),
        states={"": blocks("blocks")},
    ),
    UserModel("timm, ConvNeXt", ("timm",), lambda: timm("convnext_atto"), states=CONVNEXT),
    UserModel("fair-esm, ESM2", ("esm",), esm, states={"": blocks("layers")}, tokens_first=True),
    UserModel("transformers, ESM2", ("transformers",), esm_of_transformers, states={"": blocks("esm.encoder.layer")}),
)  # fmt: skip
"""In the order of the table in docs/how_to/what_you_have.md."""
