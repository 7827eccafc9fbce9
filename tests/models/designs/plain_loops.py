"""Plain residual networks whose adds are outside of the blocks: in the loop, deferred, or over several tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, VOCABULARY, WIDTH, Attention, Mlp, Rms, normal, tokens


class Embedded(nn.Module):
    """Embedding and head around `trunk`, which the designs here write."""

    def __init__(self):
        super().__init__()
        self.to_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.to_logits = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))
        self.build()

    def build(self) -> None:
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(norm=True), Mlp(norm=True)]) for _ in range(BLOCKS)
        )

    def forward(self, ids):
        x = self.to_embedding(ids)
        truth.state(x, -1, "embed")
        return self.to_logits(self.trunk(x))

    def trunk(self, x):
        for number, (attn, ff) in enumerate(self.layers):
            x = attn(x) + x
            truth.state(x, number, "mid")
            x = ff(x) + x
            truth.state(x, number)
        return x


class LoopOfPairs(Embedded):
    """``for attn, ff in layers: x = attn(x) + x; x = ff(x) + x`` (vit-pytorch)."""


class FunctionsOnly(Embedded):
    """No modules for the branches: linear maps in dicts, used by functions (minGPT-like exercises)."""

    def build(self) -> None:
        self.up = nn.ParameterList(torch.randn(WIDTH, 2 * WIDTH) / WIDTH**0.5 for _ in range(BLOCKS))
        self.down = nn.ParameterList(torch.randn(2 * WIDTH, WIDTH) / WIDTH**0.5 for _ in range(BLOCKS))

    def trunk(self, x):
        for number in range(BLOCKS):
            read = functional.layer_norm(x, (WIDTH,))
            x = x + functional.gelu(read @ self.up[number]) @ self.down[number]
            truth.state(x, number)
        return x


class DeferredBlock(nn.Module):
    """Takes (hidden, residual), adds them, and gives the branch's output with the sum (mamba_ssm)."""

    def __init__(self, layer: int, mixer: nn.Module):
        super().__init__()
        self.layer, self.mixer = layer, mixer
        self.norm = Rms()

    def forward(self, hidden_states, residual=None, inference_params=None):
        residual = hidden_states if residual is None else hidden_states + residual
        # The sum of what the block takes: the state before it.
        truth.state(residual, self.layer - 1, "post|embed|pre")
        return self.mixer(self.norm(residual)), residual


class Deferred(nn.Module):
    """Blocks hand on (hidden, residual); the add of the last one is behind the loop (mamba_ssm)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        mixers = [Attention(), Mlp(), Attention(), Mlp()]
        self.layers = nn.ModuleList(DeferredBlock(number, mixer) for number, mixer in enumerate(mixers))
        self.norm_f = Rms()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids):
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        residual = hidden + residual
        truth.state(residual, len(self.layers) - 1)
        return self.lm_head(self.norm_f(residual))


# --- two towers, two streams ---


class Tower(nn.Module):
    def __init__(self, chain: str, blocks: int, causal: bool):
        super().__init__()
        self.chain = chain
        self.layers = nn.ModuleList(TowerBlock(chain, number, causal) for number in range(blocks))

    def forward(self, x):
        truth.state(x, -1, "embed", chain=self.chain)
        for layer in self.layers:
            x = layer(x)
        return x


class TowerBlock(nn.Module):
    def __init__(self, chain: str, layer: int, causal: bool):
        super().__init__()
        self.chain, self.layer = chain, layer
        self.attn, self.mlp = Attention(norm=True, causal=causal), Mlp(norm=True)

    def forward(self, x):
        x = x + self.attn(x)
        truth.state(x, self.layer, "mid", chain=self.chain)
        x = x + self.mlp(x)
        truth.state(x, self.layer, chain=self.chain)
        return x


class TwoTowers(nn.Module):
    """A picture's encoder whose tokens go before those of the text (LLaVA, qwen-vl)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(12, WIDTH)
        self.vision = Tower("vision", 2, causal=False)
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.language = Tower("language", BLOCKS, causal=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, pixel_values):
        seen = self.connector(self.vision(self.patches(pixel_values)))
        return self.lm_head(self.language(torch.cat([seen, self.embed_tokens(input_ids)], 1)))


def words_and_pixels(seed: int):
    return {"input_ids": tokens(seed), "pixel_values": normal(seed, 3, 7, 12)}


class DeepInjection(nn.Module):
    """Features of a picture are added to the first tokens after the first blocks (qwen3-vl's deepstack)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.ModuleList(nn.Linear(12, WIDTH) for _ in range(2))
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(TowerBlock("", number, causal=True) for number in range(BLOCKS))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, pixel_values):
        x = self.embed_tokens(input_ids)
        truth.state(x, -1, "embed")
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number < len(self.patches):
                x = x.clone()
                x[:, : pixel_values.shape[1]] += self.patches[number](pixel_values)
                truth.state(x, number, "pre", need=f"layer {number}")
        return self.lm_head(x)


class DoubleBlock(nn.Module):
    """Image and text attend to each other and keep states of their own (SD3, Flux)."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.joint = Attention(causal=False)
        self.image_mlp, self.text_mlp = Mlp(norm=True), Mlp(norm=True)

    def forward(self, image, text, time):
        gate_image, gate_text = self.modulation(time)[:, None].chunk(2, -1)
        mixed = self.joint(self.norm(torch.cat([text, image], 1)))
        at_text, at_image = mixed.split([text.shape[1], image.shape[1]], 1)
        image = image + gate_image * at_image
        truth.state(image, self.layer, "mid", chain="image")
        image = image + self.image_mlp(image)
        truth.state(image, self.layer, chain="image")
        text = text + gate_text * at_text
        truth.state(text, self.layer, "mid", chain="text")
        text = text + self.text_mlp(text)
        truth.state(text, self.layer, chain="text")
        return image, text


class DoubleStreams(nn.Module):
    """Two tracks through all blocks."""

    def __init__(self):
        super().__init__()
        self.img_in, self.txt_in, self.time_in = (
            nn.Linear(8, WIDTH),
            nn.Linear(10, WIDTH),
            nn.Linear(6, WIDTH),
        )
        self.double_blocks = nn.ModuleList(DoubleBlock(number) for number in range(BLOCKS))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, img, txt, timesteps):
        image, text, time = self.img_in(img), self.txt_in(txt), self.time_in(timesteps)
        truth.state(image, -1, "embed", chain="image")
        truth.state(text, -1, "embed", chain="text")
        for block in self.double_blocks:
            image, text = block(image, text, time)
        return self.out(image)


def noise(seed: int):
    return {"img": normal(seed, 3, 13, 8), "timesteps": normal(seed + 1, 3, 6)}


def noise_and_text(seed: int):
    return noise(seed) | {"txt": normal(seed + 2, 3, 9, 10)}


LOOP_DESIGNS = (
    Design("adds in the loop", LoopOfPairs, layers="layers.{i}.1", branches_named=True),
    Design("branches by functions and parameters alone", FunctionsOnly, layers=""),
    Design("hidden and residual, deferred add", Deferred, layers="layers.{i}"),
    Design(
        "two towers, one before the other",
        TwoTowers,
        words_and_pixels,
        layers=("vision.layers.{i}", "language.layers.{i}"),
    ),
    Design(
        "features added to some tokens between blocks", DeepInjection, words_and_pixels, layers="layers.{i}"
    ),
    Design("double streams", DoubleStreams, noise_and_text, layers="double_blocks.{i}"),
)
