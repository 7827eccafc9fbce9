"""One residual memory, written by twelve people."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.models.held_out import note
from tests.models.held_out.parts import Attn, Ffn, built, lin, norm, noted, param, rms, small, stack
from tests.models.held_out.register import VOCAB, WIDTH, exam, lm, numbers, tokens

SMALL = partial(param, law=small)
MHA = partial(nn.MultiheadAttention, WIDTH, 2)
SHAPES = {"qkv": (WIDTH, 48), "wo": (WIDTH, WIDTH), "w1": (WIDTH, 32), "w2": (32, WIDTH), "scale": (WIDTH,)}
GAMMAS = {"gamma1": param(WIDTH), "gamma2": param(WIDTH)}
PATCH, CLS = partial(nn.Conv2d, 3, WIDTH, 4, 4), param(1, 1, WIDTH)
VISION = {"patch": PATCH, "cls": CLS, "registers": param(1, 2, WIDTH), "pos": param(1, 10, WIDTH)}
GLU, CONV = lin(32), partial(nn.Conv1d, WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
OVER, WITHIN = stack(nn.Linear, 4, 10, 10), stack(nn.Conv1d, 4, WIDTH, WIDTH, 1)
EPSILON, MESSAGE = param(1), partial(nn.Linear, 2 * WIDTH, WIDTH)
EDGES = torch.stack([torch.arange(11), torch.arange(11) * 3 % 11])


class Layer(nn.Module):
    def forward(self, *inputs, **options):
        return self.call(*inputs, **options)


class Add(Layer):
    def call(self, inputs):
        return reduce(torch.add, inputs)


BARE = {"att": partial(Attn, pre=False), "ffn": partial(Ffn, pre=False), "add": Add, "dropout": nn.Dropout}


class TransformerBlock(Layer, built(**BARE, layernorm1=norm, layernorm2=norm)):
    def call(self, inputs, training=False):
        out1 = self.layernorm1(self.add([inputs, self.dropout(self.att(inputs))]))
        return self.layernorm2(self.add([out1, self.dropout(self.ffn(out1))]))


@lm(8, blocks=stack(TransformerBlock, 3), pos_emb=lin(WIDTH), add=Add)
def keras_port(m, x):
    """A port of the Keras examples: layers have ``call``, sums are layers, norms come after them."""
    return noted(m.add([x, m.pos_emb.weight[: x.shape[1]].expand(len(x), -1, -1)]), m.blocks)


@lm(11, qkv=SMALL(4, 48, 16), up=SMALL(4, 32, 16), down=SMALL(4, 16, 32), alpha=param(4, 2))
def rows_of_tokens(m, x):
    """Einops and functions only: all tokens are rows, all layers slices of one param, sums are scaled (ReZero)."""
    b = len(x)
    x = rearrange(x, "b t d -> (b t) d")
    note.state(x, "(b t) d", b=b)
    for i in range(4):
        q, k, v = rearrange(x @ m.qkv[i].T, "(b t) (s h d) -> s b h t d", b=b, s=3, h=2)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + m.alpha[i, 0] * rearrange(heads, "b h t d -> (b t) (h d)")
        x = x + m.alpha[i, 1] * functional.linear(functional.silu(x @ m.up[i].T), m.down[i])
        note.state(x, "(b t) d", b=b)
    return rearrange(x, "(b t) d -> b t d", b=b)


class EncoderLayer(built(self_attn=MHA, attn_norm=norm, final_norm=norm, fc1=lin(WIDTH), fc2=lin(WIDTH))):
    def residual_connection(self, x, residual):
        return residual * 6**0.25 + x

    def forward(self, x, encoder_padding_mask=None):
        residual = x
        x, _ = self.self_attn(query=x, key=x, value=x, key_padding_mask=encoder_padding_mask)
        x = self.attn_norm(self.residual_connection(x, residual))
        residual = x
        x = self.fc2(functional.relu(self.fc1(x)))
        return self.final_norm(self.residual_connection(x, residual))


@lm(10, layers=stack(EncoderLayer, 3), layernorm_embedding=norm)
def time_first_deepnorm(m, x):
    """The fairseq and torchscale family: time first, a residual_connection method, DeepNorm's alpha."""
    x = m.layernorm_embedding(WIDTH**0.5 * x).transpose(0, 1)
    return noted(x, m.layers, "t b d").transpose(0, 1)


@dataclass(frozen=True)
class Carry:
    hidden: torch.Tensor
    step: int = 0


class HighwayStep(built(attn=Attn, transform=Ffn, gate=lin(WIDTH))):
    def forward(self, carry: Carry) -> Carry:
        x = carry.hidden
        gate = torch.sigmoid(self.gate(x) - 1)
        new = gate * self.transform(x + self.attn(x)) + (1 - gate) * x
        return replace(carry, hidden=new, step=carry.step + 1)


@lm(9, steps=stack(HighwayStep, 4))
def dataclass_highway(m, x):
    """Equinox habits: a frozen dataclass goes from step to step, with a highway's gates."""
    carry = Carry(x)
    note.state(carry.hidden)
    for step in m.steps:
        carry = step(carry)
        note.state(carry.hidden)
    return carry.hidden


def parallel_layer(p, i, x, cache):
    t, h = x.shape[1], functional.rms_norm(x, (WIDTH,), 1 + p["scale"][i])
    q, k, v = (h @ p["qkv"][i]).split(WIDTH, -1)
    cache["k"][i][:, :t], cache["v"][i][:, :t] = k, v
    scores = q @ cache["k"][i][:, :t].mT / WIDTH**0.5
    mask = torch.ones(t, t, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(mask, -1e9).softmax(-1) @ cache["v"][i][:, :t]
    return x + attended @ p["wo"][i] + functional.gelu(h @ p["w1"][i]) @ p["w2"][i]


@lm(7, p=lambda: nn.ParameterDict({name: small(3, *shape) for name, shape in SHAPES.items()}))
def pure_functions_and_cache(m, x):
    """A port from JAX: pure functions of a parameter dict; parallel branches; keys go through a preallocated cache."""
    cache = {name: [torch.zeros(len(x), 12, WIDTH) for _ in range(3)] for name in "kv"}
    note.state(x)
    for i in range(3):
        x = parallel_layer(m.p, i, x, cache)
        note.state(x)
    return x


class VisionBlock(built(attn=Attn, post1=norm, mlp=Ffn, post2=norm, **GAMMAS)):
    def drop_path(self, x):
        return x * torch.empty(len(x), 1, 1).bernoulli_(0.9) / 0.9 if self.training else x

    def forward(self, x):
        x = x + self.drop_path(self.gamma1 * self.post1(self.attn(x)))
        return x + self.drop_path(self.gamma2 * self.post2(self.mlp(x)))


@exam(numbers(2, 3, 12, 12))
class VisionWithRegisters(built(**VISION, blocks=stack(VisionBlock, 3), norm=norm, head=lin(10))):
    """The DINO family: class and register tokens, LayerScale, stochastic depth; norms before and after a branch."""

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
        return self.head(self.norm(noted(x, self.blocks))[:, 0])


@lm(12, ffn=stack(Ffn, 6), attn=stack(Attn, 3), ln=stack(norm, 6), glu=stack(GLU, 3), conv=stack(CONV, 3))
def flat_conformer(m, x):
    """Speech people, without classes for blocks: macaron halves, a convolution, and a norm at each block's end."""
    note.state(x)
    for i in range(3):
        x = 0.5 * m.ffn[2 * i](x) + x
        x = m.attn[i](x) + x
        x = m.conv[i](functional.glu(m.glu[i](m.ln[i](x)), -1).mT).mT + x
        x = m.ln[3 + i](0.5 * m.ffn[2 * i + 1](x) + x)
        note.state(x)
    return x


class SeqBlock(nn.Module):
    def __init__(self, decodes):
        super().__init__()
        self.own, self.across, self.ffn = Attn(causal=decodes), Attn() if decodes else None, Ffn()

    def forward(self, x, memory=None):
        x = x + self.own(x)
        if self.across is not None:
            x = x + self.across(x, memory)
        return x + self.ffn(x)


EMBED, ENCODER, DECODER = (
    partial(nn.Embedding, VOCAB, 16),
    stack(SeqBlock, 3, False),
    stack(SeqBlock, 3, True),
)


@exam({"source": tokens(10), "target": tokens(7, seed=1)})
class CheckpointedTranslator(built(embed=EMBED, bridge=norm, encoder=ENCODER, decoder=DECODER)):
    """Translation code that saves memory: each block of encoder and decoder under a checkpoint."""

    def run(self, name, x, *memory):
        note.state(x, chain=name)
        for block in getattr(self, name):
            x = checkpoint(block, x, *memory, use_reentrant=False)
            note.state(x, chain=name)
        return x

    def forward(self, source, target):
        memory = self.bridge(self.run("encoder", self.embed(source)))
        return self.run("decoder", self.embed(target), memory) @ self.embed.weight.T


class PreActivation(nn.Module):
    def __init__(self, planes_in, planes):
        super().__init__()
        self.bn1, self.bn2, self.grow = nn.BatchNorm2d(planes_in), nn.BatchNorm2d(planes), planes - planes_in
        self.conv1 = nn.Conv2d(planes_in, planes, 3, 1 + bool(self.grow), 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)

    def shortcut(self, x):
        half = self.grow // 2
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half)) if half else x

    def forward(self, x):
        out = self.conv1(functional.relu(self.bn1(x)))
        out = self.conv2(functional.relu(self.bn2(out)))
        out += self.shortcut(x)
        return out


@exam(numbers(2, 3, 6, 6))
class CifarResNet(nn.Module):
    """The CIFAR repositories: pre-activation, shortcuts of option A (zeros for new channels); a memory each stage."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.Linear(16, 10)
        self.layer1 = nn.Sequential(*(PreActivation(8, 8) for _ in range(3)))
        self.layer2 = nn.Sequential(*(PreActivation(8 if i == 0 else 16, 16) for i in range(3)))

    def forward(self, x):
        x = self.layer2[0](noted(self.stem(x), self.layer1, "b d h w", "layer1"))
        x = noted(x, self.layer2[1:], "b d h w", "layer2")
        return self.fc(functional.relu(x).mean((2, 3)))


@lm(10, norms=stack(nn.BatchNorm1d, 8, WIDTH), over=OVER, within=WITHIN)
def mixer_channels_first(m, x):
    """An all-MLP network on channels first: a linear over tokens, then one by one convolutions over channels."""
    x = x.transpose(1, 2)
    note.state(x, "b d t")
    for i in range(4):
        x = torch.add(x, functional.gelu(m.over[i](m.norms[2 * i](x))))
        x = torch.add(x, functional.gelu(m.within[i](m.norms[2 * i + 1](x))))
        note.state(x, "b d t")
    return x.transpose(1, 2)


class Convolve(built(message=MESSAGE, update=partial(Ffn, pre=False), ln=norm, epsilon=EPSILON)):
    def forward(self, x, edges):
        sender, receiver = edges
        messages = functional.relu(self.message(torch.cat([x[:, sender], x[:, receiver]], -1)))
        gathered = torch.zeros_like(x).index_add_(1, receiver, messages)
        return self.update(self.ln((1 + self.epsilon) * x + gathered))


@exam({"nodes": numbers(2, 11, 8), "edges": EDGES})
class GraphByIndexAdd(built(encode=partial(nn.Linear, 8, WIDTH), convs=stack(Convolve, 4), decode=lin(3))):
    """Graph people: nodes instead of tokens, messages along edges, a residual around each layer."""

    def forward(self, nodes, edges):
        h = self.encode(nodes)
        note.state(h)
        for conv in self.convs:
            h_in = h
            h = conv(h, edges)
            h = h + h_in
            note.state(h)
        return self.decode(h).mean(1)


@lm(12, pre=stack(rms, 4), shifts=param(4, WIDTH), rates=stack(lin(48), 4), out=stack(lin(16), 4))
def scan_over_tokens(m, x):
    """Minimal Mamba and RWKV: a recurrence over tokens in Python, after a shift by one token; sums in place."""
    x = x.clone()
    note.state(x)
    for pre, shift, rates, out_proj in zip(m.pre, m.shifts, m.rates, m.out, strict=True):
        u = pre(x)
        u = torch.lerp(functional.pad(u, (0, 0, 1, -1)), u, shift)
        memory, outputs = torch.zeros_like(u[:, 0]), []
        for decay, value, gate in (step.chunk(3, -1) for step in rates(u).unbind(1)):
            memory = torch.sigmoid(decay) * memory + value
            outputs.append(memory * functional.silu(gate))
        x += out_proj(torch.stack(outputs, 1))
        note.state(x)
    return x
