"""Twelve networks whose branches or states read more than the last state."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.models.held_out import note
from tests.models.held_out.parts import Attn, Ffn, PreNorm, attend, built, lin, param, rms, stack, sublayers
from tests.models.held_out.register import WIDTH, lm

READ = {"attn_proj": lin(1), "mlp_proj": lin(1), "attn_norm": rms, "mlp_norm": rms}
MLP = {"fc": lin(64), "proj": partial(nn.Linear, 64, WIDTH)}


@lm(8, layers=sublayers, query=param(7, WIDTH, law=torch.randn), key_norm=rms)
def full_attention_residuals(m, x):
    """Attention residuals with keys normed in the read: a state is what the next sublayer reads of all outputs."""
    values = [x]
    for query, layer in zip(m.query, [*m.layers, None], strict=True):
        v = torch.stack(values)
        weights = torch.einsum("d,sbtd->sbt", query, m.key_norm(v)).softmax(0)
        x = torch.einsum("sbt,sbtd->btd", weights, v)
        note.state(x)
        if layer is not None:
            values.append(layer(x))
    return x


class BlockLayer(built(attn=Attn, mlp=Ffn, **READ)):
    def forward(self, blocks, partial_block, starts):
        h = block_attn_res(blocks, partial_block, self.attn_proj, self.attn_norm)
        if starts:
            blocks, partial_block = [*blocks, partial_block], None
        out = self.attn(h)
        partial_block = out if partial_block is None else partial_block + out
        h = block_attn_res(blocks, partial_block, self.mlp_proj, self.mlp_norm)
        return blocks, partial_block + self.mlp(h)


def block_attn_res(blocks, partial_block, proj, norm):
    values = torch.stack([*blocks, partial_block])
    logits = torch.einsum("d,nbtd->nbt", proj.weight.squeeze(0), norm(values))
    h = torch.einsum("nbt,nbtd->btd", logits.softmax(0), values)
    note.state(h, also=[partial_block])
    return h


@lm(9, layers=stack(BlockLayer, 4), last_proj=lin(1), last_norm=rms)
def block_attention_residuals(m, x):
    """The report's listing: outputs are summed within blocks of layers; what is read, or the running sum, is the state."""
    blocks = []
    for number, layer in enumerate(m.layers):
        blocks, x = layer(blocks, x, number % 2 == 0)
    return block_attn_res(blocks, x, m.last_proj, m.last_norm)


class Bank:
    def __init__(self, value):
        self.keys, self.values = [], []
        self.put(value)

    def put(self, value):
        self.keys.append(functional.normalize(value, dim=-1))
        self.values.append(value)

    def read(self, query):
        scores = [4 * (query * key).sum(-1, keepdim=True) for key in self.keys]
        weights = torch.cat(scores, -1).softmax(-1).unbind(-1)
        return sum(w.unsqueeze(-1) * v for w, v in zip(weights, self.values, strict=True))


@lm(10, layers=sublayers, queries=stack(lin(WIDTH), 7))
def bank_of_normed_keys(m, x):
    """Attention residuals with keys normed outside: an object holds keys and values; queries are of the last output."""
    bank = Bank(x)
    for k, query in enumerate(m.queries):
        x = bank.read(query(bank.values[-1]))
        note.state(x)
        if k < len(m.layers):
            bank.put(m.layers[k](x))
    return x


@lm(11, h=stack(PreNorm, 6), alphas=lambda: nn.ParameterList(torch.rand(n) for n in (2, 3, 4)))
def dilated_denseformer(m, x):
    """DenseFormer, dilation 2 and period 2: averages of every second output, after every second block."""
    groups = [x.unsqueeze(0), x.new_zeros(0, *x.shape)]
    note.state(x)
    for i, block in enumerate(m.h):
        x, group = block(x), (i + 1) % 2
        groups[group] = torch.cat([groups[group], x.unsqueeze(0)])
        if i % 2:
            x = torch.tensordot(m.alphas[i // 2], groups[group], dims=1)
        note.state(x)
    return x


@lm(12, qkv=stack(lin(48), 4), o=stack(lin(WIDTH), 4), mlp=stack(Ffn, 4), route=param(2, 4, 4))
def routed_keys_and_values(m, x):
    """LIMe: the residual is plain; attention reads mixtures of the keys and values of all layers up to its own."""
    keys, values = [], []
    note.state(x)
    for i in range(4):
        q, *kv = m.qkv[i](functional.rms_norm(x, (WIDTH,))).chunk(3, -1)
        for cache, new in zip((keys, values), kv, strict=True):
            cache.append(new)
        w = m.route[:, i, : i + 1]
        k, v = (torch.einsum("j,jbtd->btd", w[n], torch.stack(c)) for n, c in enumerate((keys, values)))
        x = x + m.o[i](attend(q, k, v))
        x = x + m.mlp[i](x)
        note.state(x)
    return x


class WayBlock(built(q=lin(WIDTH), k=lin(WIDTH), v=lin(WIDTH), o=lin(WIDTH), norm=rms, ffn=Ffn)):
    def forward(self, ways):
        q, k, v = (getattr(self, n)(self.norm(ways[n])) for n in "qkv")
        x = ways["r"] + self.o(attend(q, k, v))
        return x + self.ffn(x)


@lm(7, blocks=stack(WayBlock, 3), mixers=stack(lin(4), 12))
def mudd_ways_in_a_dict(m, x):
    """MUDD: queries, keys, values and the residual have a dynamic mixture each; the residual's is the next state."""
    note.state(x)
    history, ways = [x], dict.fromkeys("qkvr", x)
    for i, block in enumerate(m.blocks):
        y = block(ways)
        history.append(y)
        for n, name in enumerate("qkvr"):
            weights = torch.tanh(m.mixers[4 * i + n](y)).unsqueeze(-1)
            ways[name] = sum(weights[..., j, :] * past for j, past in enumerate(history))
        note.state(ways["r"], also=[y])
    return ways["r"]


@lm(8, layers=partial(sublayers, 2), edges=param(5, 5, 1, 1, 1))
def densenet_by_sums(m, x):
    """Hyper-DenseNet: no residual is written; each layer reads a weighted sum of all earlier outputs."""
    outputs = [x]
    for k in range(5):
        x = (m.edges[k, : k + 1] * torch.stack(outputs)).sum(0)
        note.state(x, also=[outputs[0]] if k == 0 else ())
        if k < 4:
            outputs.append(m.layers[k](x))
    return x


class SpeedrunBlock(built(qkv=lin(48), o=lin(WIDTH), lambdas=param(2), lamb=param(1), **MLP)):
    def forward(self, x, v1, x0):
        before, x = x, self.lambdas[0] * x + self.lambdas[1] * x0
        note.state(x, also=[before])
        q, k, v = self.qkv(functional.rms_norm(x, (WIDTH,))).chunk(3, -1)
        v1 = v if v1 is None else v1
        x = x + self.o(attend(q, k, (1 - self.lamb) * v + self.lamb * v1))
        return x + self.proj(functional.relu(self.fc(functional.rms_norm(x, (WIDTH,)))).square()), v1


@lm(9, blocks=stack(SpeedrunBlock, 4))
def speedrun_skips_to_the_embedding(m, x):
    """The GPT speedruns: the normed embedding comes in again at each block, and so do the first block's values."""
    x = x0 = functional.rms_norm(x, (WIDTH,))
    v1 = None
    for block in m.blocks:
        x, v1 = block(x, v1, x0)
    note.state(x)
    return x


@lm(10, blocks=stack(PreNorm, 4), weights=param(5), gamma=param(1))
def elmo_scalar_mix(m, x):
    """ELMo: the trunk is plain; the head reads a softmax over all states."""
    states = [x]
    note.state(x)
    for block in m.blocks:
        states.append(block(states[-1]))
        note.state(states[-1])
    return m.gamma * sum(w * s for w, s in zip(m.weights.softmax(0), states, strict=True))


@lm(11, blocks=stack(PreNorm, 6), skip_weights=param(3))
def unet_with_a_stack(m, x):
    """The speedruns' U-net: the second half pops the first half's outputs, with learned weights."""
    skips = []
    for i, block in enumerate(m.blocks):
        before, x = x, x + m.skip_weights[i - 3] * skips.pop() if i >= 3 else x
        note.state(x, also=[before] if i >= 3 else ())
        x = block(x)
        if i < 3:
            skips.append(x)
    note.state(x)
    return x


@lm(12, layers=partial(sublayers, 2), gamma=param(1))
def heavy_ball(m, x):
    """Momentum: a velocity is carried beside the state; the state alone, or both as two streams, are true."""
    v = torch.zeros_like(x)
    note.state(x, also=[[x, v], [v, x]])
    for layer in m.layers:
        v = m.gamma * v + layer(x)
        x = x + v
        note.state(x, also=[[x, v], [v, x]])
    return x


def note_pair(a, b):
    note.state([a, b], also=[[b, a], (a, b), lambda: torch.cat([a, b], -1)])


@lm(8, f=stack(Attn, 3), g=stack(Ffn, 3))
def reversible_pairs(m, x):
    """Reformer: two halves that update each other; two streams, two memories or one wide state are true."""
    first, second = x, x
    note_pair(first, second)
    for f, g in zip(m.f, m.g, strict=True):
        first = first + f(second)
        second = second + g(first)
        note_pair(first, second)
    return (first + second) / 2
