"""Eight networks in which a naive reader is wrong."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.models.held_out import note
from tests.models.held_out.parts import Ffn, PreNorm, built, lin, noted, param, stack, sublayers
from tests.models.held_out.register import STREAMS, WIDTH, lm
from tests.models.held_out.streams import hyper, knopp, near_identity

WITHIN = {"layers": partial(sublayers, 1), "res": partial(near_identity, 2), "merge": param(1, STREAMS)}


class Mixer(built(weight=partial(nn.Linear, STREAMS * WIDTH, STREAMS**2))):
    """Gives a doubly stochastic matrix, as every module of mHC does."""

    def forward(self, h):
        return knopp(self.weight(h.flatten(2)).unflatten(-1, (STREAMS, STREAMS)))


@hyper(8, mixers=stack(Mixer, 6))
def matrix_never_applied(m, k, layer, h):
    """The matrix is computed and kept for a plot; the streams are carried as they are."""
    m.plotted = m.mixers[k](h)
    return h + m.post[k][:, None] * layer(m.pre[k] @ h).unsqueeze(2), lambda: torch.eye(STREAMS)


@hyper(9, mixers=stack(Mixer, 6))
def matrix_applied_transposed(m, k, layer, h):
    """The module gives H, and the sum over its first index applies Hᵀ."""
    matrix, out = m.mixers[k](h), layer(torch.einsum("n,btnd->btd", m.pre[k], h))
    h = torch.einsum("btij,btid->btjd", matrix, h) + m.post[k][:, None] * out.unsqueeze(2)
    return h, lambda: matrix.mT


@lm(10, blocks=stack(PreNorm, 4))
def list_that_nobody_uses(m, x):
    """What is collected as hidden states is normed, and goes nowhere."""
    m.hidden_states = []
    note.state(x)
    for block in m.blocks:
        x = block(x)
        note.state(x)
        m.hidden_states.append(m.norm(x))
        note.decoy(m.hidden_states[-1])
    return x


@lm(11, blocks=stack(PreNorm, 4), auxiliary=stack(Ffn, 4))
def branch_thrown_away(m, x):
    """A third branch is added to a copy that only a loss would read."""
    note.state(x)
    for block, auxiliary in zip(m.blocks, m.auxiliary, strict=True):
        x = block(x)
        note.state(x)
        m.aside = x + auxiliary(x)
        note.decoy(m.aside)
    return x


@lm(12, blocks=stack(PreNorm, 4), depths=param(4, WIDTH), again=lin(WIDTH))
def sums_between_blocks(m, x):
    """Between blocks the loop adds a vector of the depth, and something of the token's embedding."""
    extra = m.again(x)
    for number, block in enumerate(m.blocks):
        before, x = x, x + m.depths[number] + 0.5 * extra
        note.state(x, also=[before])
        x = block(x)
    note.state(x)
    return x


@lm(7, blocks=stack(PreNorm, 3))
def blocks_called_twice(m, x):
    """Each block is called on its own output again, and once more for nothing."""
    note.state(x)
    for block in m.blocks:
        for _ in range(2):
            x = block(x)
            note.state(x)
        m.aside = block(x)
        note.decoy(m.aside)
    return x


class InnerStreams(built(**WITHIN, pre=param(2, STREAMS), post=param(2, STREAMS))):
    def forward(self, x):
        h = x.unsqueeze(2).expand(-1, -1, STREAMS, -1)
        for layer, res, pre, post in zip(self.layers, self.res, self.pre, self.post, strict=True):
            h = res @ h + post[:, None] * layer(pre @ h).unsqueeze(2)
        return (self.merge @ h).squeeze(2)


@lm(8, blocks=stack(InnerStreams, 3))
def streams_within_a_block(m, x):
    """Between blocks there is one stream; within each there are four, from its first line to its last."""
    return noted(x, m.blocks)


@lm(9, lower=stack(PreNorm, 2), upper=stack(PreNorm, 2))
def detached_halfway(m, x):
    """The lower half is trained by something else: the state is cut from the graph and goes on."""
    x = noted(x, m.lower).detach()
    for block in m.upper:
        x = block(x)
        note.state(x)
    return x
