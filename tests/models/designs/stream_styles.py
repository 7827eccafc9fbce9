"""How published code calls a stream connection: one block a style, in its own layout and with its own names.

Every block has two sublayers, and writes down the same of each: H_res, H_pre, H_post, what the branch takes and gives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import nn

from tests.models.designs import truth
from tests.models.designs.parts import STREAMS, WIDTH, Attention, Mlp


class StreamBlock(nn.Module):
    """What all of them have; ``axes`` brings their layout to (B, T, n, D)."""

    axes = "b t n d -> b t n d"
    sizes: ClassVar[dict[str, int]] = {}

    def __init__(self, layer: int, mix: type[nn.Module]):
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.build(mix)

    def build(self, mix: type[nn.Module]) -> None:
        self.attn_hc, self.mlp_hc = mix(), mix()

    def note(self, x, site: str, pre, post, res, read, added) -> None:
        """Write down one sublayer; ``x`` is the state after it."""
        truth.connection(h_res=res, h_pre=pre, h_post=post, branch_in=read, branch_out=added)
        truth.state(x, self.layer, site, axes=self.axes, **self.sizes)


class Returned(StreamBlock):
    """The connection is a module that gives what the branch reads, the write weights and the mixing, source × destination."""

    def build(self, mix):
        self.attn_hc, self.mlp_hc = ReturnedWeights(mix), ReturnedWeights(mix)

    def forward(self, hidden_streams):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            collapsed, post, comb = hc(hidden_streams)
            added = branch(collapsed)
            mixed = torch.matmul(comb.transpose(-1, -2), hidden_streams)
            hidden_streams = post.unsqueeze(-1) * added.unsqueeze(-2) + mixed
            self.note(hidden_streams, site, hc.pre_of_truth, post, comb.mT, collapsed, added)
        return hidden_streams


class ReturnedWeights(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix()
        self.pre_of_truth = None

    def forward(self, x):
        pre, post, res = self.mix.weights(x)
        self.pre_of_truth = pre.detach() if truth.on() else None
        return (pre.unsqueeze(-1) * x).sum(2), post, res.mT


class Inference(StreamBlock):
    """All weights are local variables of two methods (DeepSeek's inference code)."""

    def hc_pre(self, x, hc):
        pre, post, comb = hc.weights(x)
        y = torch.sum(pre.unsqueeze(-1) * x, dim=2)
        return y, pre, post, comb.mT

    def hc_post(self, x, residual, post, comb):
        # comb: source × destination, summed over the sources
        return post.unsqueeze(-1) * x.unsqueeze(-2) + torch.sum(
            comb.unsqueeze(-1) * residual.unsqueeze(-2), dim=2
        )

    def forward(self, x, start_pos: int = 0):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            residual = x
            read, pre, post, comb = self.hc_pre(x, hc)
            added = branch(read)
            x = self.hc_post(added, residual, post, comb)
            self.note(x, site, pre, post, comb.mT, read, added)
        return x


class WidthDepth(StreamBlock):
    """A pair of methods opens and closes each connection; the streams are in the batch axis."""

    axes = "(b n) t d -> b t n d"
    sizes: ClassVar = {"n": STREAMS}

    def build(self, mix):
        self.attn_hc, self.mlp_hc = PairedConnection(mix), PairedConnection(mix)

    def forward(self, residuals):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            read, mixed, beta, noted = hc.width_connection(residuals)
            added = branch(read)
            residuals = hc.depth_connection(added, mixed, beta)
            self.note(residuals, site, *noted, read, added)
        return residuals


class PairedConnection(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix()

    def width_connection(self, residuals):
        x = rearrange(residuals, "(b s) t d -> b t s d", s=STREAMS)
        pre, beta, res = self.mix.weights(x)
        # alpha: source × (1 view + destinations), as in the public package
        alpha = torch.cat([pre[..., None], res.mT], -1)
        mixed = torch.einsum("btsv,btsd->btvd", alpha, x)
        return mixed[..., 0, :], mixed[..., 1:, :], beta, (pre, beta, res)

    def depth_connection(self, branch_output, mixed, beta):
        added = torch.einsum("btd,bts->btsd", branch_output, beta)
        return rearrange(mixed + added, "b t s d -> (b s) t d")


class LateMixing(StreamBlock):
    """The module that makes H_res is called after the branch, each of the three weights by a module of its own."""

    axes = "b t (n d) -> b t n d"
    sizes: ClassVar = {"n": STREAMS}

    def build(self, mix):
        self.mixes = nn.ModuleList(mix() for _ in range(2))
        self.attn_res, self.mlp_res = OnlyMatrix(self.mixes[0]), OnlyMatrix(self.mixes[1])

    def forward(self, h):
        rows = ((0, self.attn, self.attn_res, "mid"), (1, self.mlp, self.mlp_res, "post"))
        for number, branch, res_layer, site in rows:
            x = h.view(*h.shape[:2], STREAMS, WIDTH)
            pre, post, _ = self.mixes[number].weights(x)
            read = (pre.unsqueeze(-2) @ x).squeeze(-2)
            added = branch(read)
            h_res = res_layer(x)
            h = (h_res @ x + post.unsqueeze(-1) @ added.unsqueeze(-2)).flatten(-2)
            self.note(h, site, pre, post, h_res, read, added)
        return h


class OnlyMatrix(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x):
        return self.mix.weights(x)[2]


class Megatron(StreamBlock):
    """[s, b, n·D]; the module gives the aggregate, H_res and the write weights, which another method applies."""

    axes = "t b (n d) -> b t n d"
    sizes: ClassVar = {"n": STREAMS}

    def build(self, mix):
        self.attn_hc, self.mlp_hc = MegatronConnection(mix), MegatronConnection(mix)

    def forward(self, hidden_states):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            aggregated, h_res, h_post, h_pre = hc(hidden_states)
            added = branch(aggregated.transpose(0, 1)).transpose(0, 1)
            hidden_states = hc.apply_h_res(h_res, hidden_states) + hc.apply_h_post(added, h_post)
            if truth.on():
                first = [value.transpose(0, 1) for value in (h_pre, h_post, h_res, aggregated, added)]
                self.note(hidden_states, site, *first)
        return hidden_states


class MegatronConnection(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix()

    def forward(self, hidden):
        s, b, _ = hidden.shape
        streams = hidden.view(s, b, STREAMS, WIDTH)
        h_pre, h_post, h_res = self.mix.weights(streams)
        return (streams * h_pre.unsqueeze(-1)).sum(2), h_res, h_post, h_pre

    def apply_h_res(self, h_res, residual):
        s, b, _ = residual.shape
        flat = h_res.reshape(s * b, STREAMS, STREAMS)
        return torch.bmm(flat, residual.reshape(s * b, STREAMS, WIDTH)).view(s, b, -1)

    def apply_h_post(self, added, h_post):
        return (h_post.unsqueeze(-1) * added.unsqueeze(2)).flatten(2)


class StreamsFirst(StreamBlock):
    """[n, B, T, D], with einsum and local variables."""

    axes = "n b t d -> b t n d"

    def forward(self, corrected):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            pre, post, res = hc.weights(corrected.permute(1, 2, 0, 3))
            read = torch.einsum("bti,ibtd->btd", pre, corrected)
            added = branch(read)
            corrected = torch.einsum("btij,jbtd->ibtd", res, corrected)
            corrected = corrected + torch.einsum("bti,btd->ibtd", post, added)
            self.note(corrected, site, pre, post, res, read, added)
        return corrected


class StreamsSecond(StreamBlock):
    """[B, n, T, D]; the streams are added up one by one in a loop over destinations."""

    axes = "b n t d -> b t n d"

    def forward(self, x):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            pre, post, res = hc.weights(x.transpose(1, 2))
            read = sum(pre[..., i, None] * x[:, i] for i in range(STREAMS))
            added = branch(read)
            after = []
            for i in range(STREAMS):
                mixed = sum(res[..., i, j, None] * x[:, j] for j in range(STREAMS))
                after.append(mixed + post[..., i, None] * added)
            x = torch.stack(after, 1)
            self.note(x, site, pre, post, res, read, added)
        return x


class Lagging(StreamBlock):
    """The weights of the next read go with the streams (DeepSeek-V4.1): each sublayer is read by the one before it."""

    def forward(self, given):
        x, pre = given
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            pre_next, post, res = hc.weights(x)
            read = (pre.unsqueeze(-1) * x).sum(2)
            added = branch(read)
            x = torch.einsum("btij,btjd->btid", res, x) + post.unsqueeze(-1) * added.unsqueeze(2)
            self.note(x, site, pre, post, res, read, added)
            pre = pre_next
        return x, pre


class Inlined(StreamBlock):
    """Streams merged into features, one matrix product for all, no method and no module but the branches."""

    axes = "b t (n d) -> b t n d"
    sizes: ClassVar = {"n": STREAMS}

    def forward(self, x):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            pre, post, res = hc.weights(x.unflatten(-1, (STREAMS, WIDTH)))
            s = x.reshape(-1, STREAMS, WIDTH)
            both = torch.cat([pre.unsqueeze(-2), res], -2).flatten(0, 1) @ s
            read = both[:, 0].view(*x.shape[:2], WIDTH)
            added = branch(read)
            s = torch.baddbmm(both[:, 1:], post.reshape(-1, STREAMS, 1), added.reshape(-1, 1, WIDTH))
            x = s.view(x.shape)
            self.note(x, site, pre, post, res, read, added)
        return x


class MixedFirst(StreamBlock):
    """The streams are mixed in place of a buffer before the branch runs, and the branch is added into it."""

    def forward(self, x):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            pre, post, res = hc.weights(x)
            buffer = torch.empty_like(x)
            buffer[:] = res @ x
            read = torch.einsum("bti,btid->btd", pre, x)
            added = branch(read)
            buffer += post.unsqueeze(-1) * added.unsqueeze(-2)
            x = buffer
            self.note(x, site, pre, post, res, read, added)
        return x


class ListOfStreams(StreamBlock):
    """The streams are a list of tensors."""

    def forward(self, streams):
        for hc, branch, site in ((self.attn_hc, self.attn, "mid"), (self.mlp_hc, self.mlp, "post")):
            pre, post, res = hc.weights(torch.stack(streams, 2))
            read = sum(w[..., None] * x for w, x in zip(pre.unbind(-1), streams, strict=True))
            added = branch(read)
            streams = [
                sum(res[..., i, j, None] * x for j, x in enumerate(streams)) + post[..., i, None] * added
                for i in range(len(streams))
            ]
            if truth.on():
                self.note(torch.stack(streams, 2), site, pre, post, res, read, added)
        return streams


STYLES = {
    "weights returned by a module": Returned,
    "local variables of methods": Inference,
    "width and depth connection": WidthDepth,
    "H_res after the branch": LateMixing,
    "[s, b, n·D], weights returned": Megatron,
    "streams first": StreamsFirst,
    "streams second, sums in loops": StreamsSecond,
    "weights of the next read handed on": Lagging,
    "merged into features, inlined": Inlined,
    "into a buffer": MixedFirst,
    "list of streams": ListOfStreams,
}

# How a state of (B, T, n, D) is brought to each layout.
OPENED = {
    WidthDepth: "b t n d -> (b n) t d", LateMixing: "b t n d -> b t (n d)",
    Megatron: "b t n d -> t b (n d)", StreamsFirst: "b t n d -> n b t d", StreamsSecond: "b t n d -> b n t d",
    Inlined: "b t n d -> b t (n d)",
}  # fmt: skip


def opened(x, style: type[StreamBlock]):
    """Streams as the first block of a style takes them."""
    x = rearrange(x, OPENED.get(style, "b t n d -> b t n d")).contiguous()
    if style is Lagging:
        # The first read is of stream 0 alone.
        return x, repeat(torch.eye(STREAMS)[0], "n -> b t n", b=x.shape[0], t=x.shape[1])
    return list(x.unbind(2)) if style is ListOfStreams else x


def closed(given, style: type[StreamBlock]):
    """Streams as (B, T, n, D), of what the last block gives."""
    if style is ListOfStreams:
        return torch.stack(given, 2)
    x = given[0] if style is Lagging else given
    return rearrange(x, style.axes, **style.sizes)
