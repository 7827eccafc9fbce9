"""Hyper-connections as eighteen people wrote them by themselves; matrices are noted as they are applied."""

from __future__ import annotations

from functools import partial, wraps

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import nn

from tests.models.held_out import note
from tests.models.held_out.parts import Attn, Ffn, PreNorm, built, lin, norm, param, small, stack, sublayers
from tests.models.held_out.register import STREAMS, WIDTH, lm

N, FLAT = STREAMS, STREAMS * WIDTH


def near_identity(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.eye(N) + 0.3 * torch.randn(*shape, N, N))


# Six sublayers, with a matrix and two vectors of parameters for each.
STATIC = {"layers": sublayers, "res": partial(near_identity, 6), "pre": param(6, N), "post": param(6, N)}


ALPHA, BETA = lambda: nn.Parameter(torch.cat([torch.rand(N, 1), near_identity()], 1)), param(N)
PHI = partial(nn.Linear, FLAT, 2 * N + N * N)
ONE = {"res": near_identity, "pre": param(N), "post": param(N)}
FOLD = partial(repeat, pattern="b t d -> (b n) t d", n=N)


def copies(x):
    return x.unsqueeze(2).repeat(1, 1, N, 1)


def mean(h):
    return h.mean(2)


def hyper(length, axes="b t n d", begin=copies, end=mean, **parts):
    """Enters a step (m, k, layer, h) → next h and the matrix; streams begin as copies and end as their mean."""
    sizes = {"n": N} if "(" in axes else {}

    def enter(step):
        @wraps(step)
        def trunk(m, x):
            h = begin(x)
            note.state(h, axes, **sizes)
            for k, layer in enumerate(m.layers):
                h, matrix = step(m, k, layer, h)
                note.step(matrix, h, axes, **sizes)
            return end(h)

        lm(length, **STATIC | parts)(trunk)
        return step

    return enter


@hyper(8, begin=lambda x: [x.clone() for _ in range(N)], end=sum)
def list_and_two_loops(m, k, layer, streams):
    """A teaching notebook: a list of tensors, loops over both indices of the matrix; the sum at the end."""
    out, mixed = layer(sum(m.pre[k, j] * streams[j] for j in range(N))), []
    for i in range(N):
        total = m.post[k, i] * out
        for j in range(N):
            total = total + m.res[k, i, j] * streams[j]
        mixed.append(total)
    return mixed, m.res[k]


@hyper(9, begin=lambda x: dict.fromkeys("abcd", x), end=lambda h: torch.stack(list(h.values())).mean(0))
def dict_and_python_floats(m, k, layer, streams):
    """A script that reads its tables once: streams have names, and weights are Python numbers."""
    names, table = [*streams], m.res[k].softmax(-1)
    out = layer(sum(w * s for w, s in zip(m.pre[k].tolist(), streams.values(), strict=True)))
    kept = [sum(w * s for w, s in zip(row, streams.values(), strict=True)) for row in table.tolist()]
    return {a: s + w * out for a, s, w in zip(names, kept, m.post[k].tolist(), strict=True)}, table


class PaperConnection(built(norm=norm, alpha=ALPHA, alpha_fn=lin(N + 1), beta=BETA, beta_fn=lin(1))):
    def width_connection(self, h):
        normed = self.norm(h)
        alpha = 0.5 * torch.tanh(self.alpha_fn(normed)) + self.alpha[:, None]
        beta = 0.5 * torch.tanh(self.beta_fn(normed))[..., 0] + self.beta[:, None]
        return torch.einsum("bntm,bntd->bmtd", alpha, h), alpha, beta

    def depth_connection(self, mixed, out, beta):
        return beta[..., None] * out[:, None] + mixed[:, 1:]


@hyper(
    10, "b n t d", lambda x: torch.stack([x] * N, 1), lambda h: h.sum(1), connect=stack(PaperConnection, 6)
)
def paper_width_and_depth(m, k, layer, h):
    """The HC paper's listing, (B, N, T, D): alpha has the read in its first column, all weights dynamic by tanh."""
    mixed, alpha, beta = m.connect[k].width_connection(h)
    h = m.connect[k].depth_connection(mixed, layer(mixed[:, 0]), beta)
    return h, lambda: alpha[..., 1:].permute(0, 2, 3, 1)


def knopp(logits, rounds=12):
    m = logits.exp()
    for _ in range(rounds):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    return m


@hyper(11, "n b t d", lambda x: x.expand(N, *x.shape), lambda h: h[0])
def streams_first_tensordot(m, k, layer, h):
    """(N, B, T, D): Sinkhorn in the plain domain, tensordot; the first stream is read at the end."""
    matrix = knopp(2 * m.res[k])
    out = layer(torch.tensordot(torch.sigmoid(m.pre[k]), h, dims=1))
    return torch.tensordot(matrix, h, dims=1) + m.post[k].view(-1, 1, 1, 1) * out, matrix


@hyper(12, "(b n) t d", FOLD, partial(reduce, pattern="(b n) t d -> b t d", reduction="mean", n=N))
def streams_in_the_batch(m, k, layer, h):
    """Einops people, (B N, T, D): the streams hide in the batch between sublayers."""
    residuals = rearrange(h, "(b n) t d -> b n t d", n=N)
    out = layer(einsum(residuals, m.pre[k], "b n t d, n -> b t d"))
    residuals = einsum(m.res[k], residuals, "m n, b n t d -> b m t d")
    residuals = residuals + einsum(out, m.post[k], "b t d, n -> b n t d")
    return rearrange(residuals, "b n t d -> (b n) t d"), m.res[k]


class Fused(built(norm=partial(nn.RMSNorm, FLAT), phi=PHI, alpha=param(3))):
    def forward(self, x):
        pre, post, res = self.phi(self.norm(x)).split([N, N, N * N], -1)
        log = (self.alpha[2] * res).unflatten(-1, (N, N)) + torch.eye(N)
        for _ in range(8):
            log = log - log.logsumexp(-1, keepdim=True)
            log = log - log.logsumexp(-2, keepdim=True)
        return torch.sigmoid(self.alpha[0] * pre), 2 * torch.sigmoid(self.alpha[1] * post), log.exp()


@hyper(7, "b t (n d)", lambda x: x.repeat(1, 1, N), lambda h: sum(h.chunk(N, -1)), fused=stack(Fused, 6))
def fused_mhc(m, k, layer, h):
    """The mHC paper, (B, T, N D): one linear over the normed whole gives all, Sinkhorn over logarithms."""
    pre, post, res = m.fused[k](h)
    streams = h.view(*h.shape[:2], N, WIDTH)
    out = layer((pre.unsqueeze(-2) @ streams).squeeze(-2))
    return (res @ streams + post.unsqueeze(-1) * out.unsqueeze(-2)).flatten(2), res


@hyper(8, "b t d n", lambda x: torch.stack([x] * N, -1), lambda h: h.mean(-1), to_res=stack(lin(N * N), 6))
def streams_last(m, k, layer, h):
    """(B, T, D, N): mixing is a product from the right; the matrix is dynamic, its rows are softmaxes."""
    matrix = (m.to_res[k](h.mean(-1)).unflatten(-1, (N, N)) + 2 * torch.eye(N)).softmax(-1)
    return h @ matrix.transpose(-1, -2) + layer(h @ m.pre[k]).unsqueeze(-1) * m.post[k], matrix


@hyper(9, begin=lambda x: x.unsqueeze(2).expand(-1, -1, N, -1), end=lambda h: h.sum(2))
def rolled_streams(m, k, layer, h):
    """Nothing is learned in the mixing: streams are rolled by one at each sublayer; the sum at the end."""
    out = layer((m.pre[k][:, None] * h).sum(2))
    return torch.roll(h, 1, dims=2) + m.post[k][:, None] * out[:, :, None], lambda: torch.eye(N).roll(1, 0)


@hyper(10)
def cayley(m, k, layer, h):
    """Orthogonal mixing: (I + A)⁻¹ (I − A) of a skew-symmetric A."""
    skew, eye = m.res[k] - m.res[k].T, torch.eye(N)
    rotation = torch.linalg.solve(eye + skew, eye - skew)
    h, out = torch.matmul(rotation, h), layer(torch.matmul(m.pre[k], h))
    return h + torch.einsum("n,btd->btnd", m.post[k], out), rotation


@hyper(11, v=param(6, N, law=small), to_u=stack(lin(N), 6), end=lambda h: h.sum(2))
def identity_and_rank_one(m, k, layer, h):
    """The matrix is never made: x + u (v·x), with u by token; the sum at the end."""
    u = torch.tanh(m.to_u[k](h.mean(-2)))
    out, inner = layer(torch.einsum("n,btnd->btd", m.pre[k], h)), m.v[k] @ h
    h = h + u[..., None] * inner[..., None, :] + m.post[k][:, None] * out[..., None, :]
    return h, lambda: torch.eye(N) + u[..., :, None] * m.v[k]


@hyper(12, end=lambda h: h[:, :, 0], to_post=stack(lin(N), 6))
def post_of_the_output(m, k, layer, h):
    """How much is written depends on what is written; the first stream is read at the end."""
    out = layer(torch.einsum("btnd,n->btd", h, m.pre[k]))
    post = 2 * torch.sigmoid(m.to_post[k](out))
    return torch.einsum("mn,btnd->btmd", m.res[k], h) + torch.einsum("btn,btd->btnd", post, out), m.res[k]


@lm(7, widen=stack(lin(WIDTH), 3), merge=param(N), **STATIC)
def apart_by_baddbmm(m, x):
    """(B T, N, D): streams begin as different vectors; a step is one torch.baddbmm; a learned sum at the end."""
    batch, length = x.shape[:2]
    h = torch.stack([x, *(widen(x) for widen in m.widen)], 2).flatten(0, 1)
    note.state(h, "(b t) n d", b=batch)
    for k, layer in enumerate(m.layers):
        out = layer((m.pre[k] @ h).view(batch, length, WIDTH)).view(-1, 1, WIDTH)
        h = torch.baddbmm(m.post[k].view(1, N, 1) * out, m.res[k].expand(len(h), N, N), h)
        note.step(m.res[k], h, "(b t) n d", b=batch)
    return (m.merge @ h).view(batch, length, WIDTH)


@lm(8, **STATIC)
def normed_before_mixing(m, x):
    """Streams are divided by their root mean square before they are mixed; the matrix with and without it is true."""
    h, matrices = copies(x), ()
    for k, layer in enumerate(m.layers):
        size = h.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        normed = h * size
        note.state(h, "b t n d", also=[normed], mixes=matrices)
        out = layer(torch.einsum("n,btnd->btd", m.pre[k], normed))
        h = m.res[k] @ normed + m.post[k][:, None] * out.unsqueeze(2)
        matrices = m.res[k], lambda k=k, size=size: m.res[k] * size.mT
    note.step(matrices, h)
    return h.mean(2)


class HyperConnected(built(block=PreNorm, **ONE)):
    def forward(self, h, **options):
        out = self.block(torch.einsum("n,nbtd->btd", self.pre, h), **options)
        return torch.einsum("mn,nbtd->mbtd", self.res, h) + torch.einsum("n,btd->nbtd", self.post, out)


@lm(9, blocks=stack(HyperConnected, 4))
def wrapper_of_whole_blocks(m, x):
    """A drop-in wrapper for any block. The block has a residual of its own, so that two matrices are true."""
    h = torch.stack([x for _ in range(N)])
    note.state(h, "n b t d")
    for block in m.blocks:
        h = block(h)
        note.step((block.res, lambda b=block: b.res + b.post[:, None] * b.pre), h, "n b t d")
    return h.sum(0)


def hyper_connected(method):
    @wraps(method)
    def widened(self, h):
        out = method(self, torch.einsum("bntd,n->btd", h, self.pre))
        written = self.post.view(-1, 1, 1) * out[:, None]
        return torch.einsum("mn,bntd->bmtd", self.res.softmax(-1), h) + written

    return widened


class Decorated(built(layer=Ffn, **ONE)):
    @hyper_connected
    def forward(self, x):
        return self.layer(x)


@lm(10, layers=stack(Decorated, 4))
def decorator_on_forward(m, x):
    """A decorator turns a feed-forward layer's forward of one stream into one of several, (B, N, T, D)."""
    h = torch.tile(x[:, None], (1, N, 1, 1))
    note.state(h, "b n t d")
    for layer in m.layers:
        h = layer(h)
        note.step(lambda r=layer.res: r.softmax(-1), h, "b n t d")
    return h.mean(1)


class HyperMixin:
    def add_streams(self, names):
        for name in names:
            setattr(self, f"res_{name}", near_identity())
            setattr(self, f"read_{name}", nn.Linear(FLAT, N))
            setattr(self, f"post_{name}", param(N)())

    def hyper(self, name, h):
        pre = getattr(self, f"read_{name}")(h.flatten(2)).softmax(-1)
        res, out = getattr(self, f"res_{name}"), getattr(self, name)((pre[..., None] * h).sum(2))
        h = torch.einsum("ij,btjd->btid", res, h) + getattr(self, f"post_{name}")[:, None] * out.unsqueeze(2)
        note.step(res, h)
        return h


class MixinBlock(nn.Module, HyperMixin):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attn(), Ffn()
        self.add_streams(("attention", "mlp"))

    def forward(self, h):
        return self.hyper("mlp", self.hyper("attention", h))


@lm(11, h=lambda: nn.Sequential(*stack(MixinBlock, 3)()))
def mixin_with_names(m, x):
    """A mixin that finds its weights by name; the read is a softmax over streams."""
    streams = x[:, :, None].expand(-1, -1, N, -1).contiguous()
    note.state(streams, "b t n d")
    return m.h(streams).sum(2)


class Retrofit(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.res, self.pre, self.post = (make() for make in STATIC.values())
        for k, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self.before, k))
            layer.register_forward_hook(partial(self.after, k))

    def before(self, k, _, args):
        return (torch.einsum("n,btnd->btd", self.pre[k], self.h),)

    def after(self, k, _, args, out):
        self.h = torch.einsum("mn,btnd->btmd", self.res[k], self.h) + self.post[k][:, None] * out[:, :, None]
        note.step(self.res[k], self.h)


@lm(12, inner=Retrofit)
def hooks_around_sublayers(m, x):
    """Retrofitted: hooks before and after each sublayer keep the streams; the loop looks like a chain."""
    m.inner.h = x[:, :, None].repeat(1, 1, N, 1)
    note.state(m.inner.h, "b t n d")
    for layer in m.inner.layers:
        x = layer(x)
    return m.inner.h.mean(2)


@hyper(8, begin=lambda x: x.unflatten(-1, (N, WIDTH // N)), end=lambda h: h.flatten(-2))
def fractions_of_the_width(m, k, layer, h):
    """Frac-connections: the width is split in four, and the branch has the whole width."""
    out = layer(((m.pre[k][:, None] + 0.5) * h).flatten(-2)).unflatten(-1, (N, WIDTH // N))
    return torch.einsum("mn,btnd->btmd", m.res[k], h) + m.post[k][:, None] * out, m.res[k]
