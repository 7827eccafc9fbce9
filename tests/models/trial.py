"""Networks after the ways of public code that the reading was not built on: a trial set, to which nothing is tuned.

Each writes down its own truth (`tests.models.designs.truth`). A first score is only worth something once.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.mixing import sinkhorn
from tests.models.designs.parts import BLOCKS, STREAMS, VOCABULARY, WIDTH, Attention, Mlp, Rms, normal, tokens


class Base(nn.Module):
    """Embedding, `trunk`, head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm, self.head = Rms(), nn.Linear(WIDTH, VOCABULARY)
        self.build()

    def build(self):
        self.layers = nn.ModuleList(self.layer(number) for number in range(BLOCKS))

    def layer(self, number):
        raise NotImplementedError

    def trunk(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x)
            truth.state(x, number)
        return x

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        return self.head(self.norm(self.trunk(x)))


def plain(x, added, layer, site="post", gate=None, scale=1.0):
    """x + scale · added, written down."""
    parts = {"branch_gate": gate} if gate is not None else {"branch_scale": scale}
    truth.connection(residual_scale=1, branch_out=added, **parts)
    x = x + (gate if gate is not None else scale) * added
    truth.state(x, layer, site)
    return x


class SummedBranches(Base):
    """Attention, MLP and a convolution over tokens are added up, then to the state."""

    def layer(self, number):
        conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        return nn.ModuleDict({"norm": Rms(), "attn": Attention(), "mlp": Mlp(), "conv": conv})

    def trunk(self, x):
        for number, layer in enumerate(self.layers):
            h = layer["norm"](x)
            added = layer["attn"](h) + layer["mlp"](h) + layer["conv"](h.mT).mT
            x = plain(x, added, number)
        return x


class TwoKinds(Base):
    """A decoder whose even layers attend and whose odd layers are recurrent."""

    def layer(self, number):
        return nn.GRU(WIDTH, WIDTH, batch_first=True) if number % 2 else Attention()

    def build(self):
        super().build()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.layers)
        self.mlps = nn.ModuleList(Mlp(norm=True) for _ in self.layers)

    def trunk(self, x):
        for number, (layer, norm, mlp) in enumerate(zip(self.layers, self.norms, self.mlps, strict=True)):
            added = layer(norm(x))
            x = plain(x, added[0] if isinstance(added, tuple) else added, number, "mid")
            x = plain(x, mlp(x), number)
        return x


class Registered(nn.Module):
    """A block whose modules are registered a second time, in a list."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.layers = nn.ModuleList([self.attn, self.mlp])

    def forward(self, x):
        for layer, site in zip(self.layers, ("mid", "post"), strict=True):
            x = plain(x, layer(x), self.number, site)
        return x


class TwiceRegistered(Base):
    def layer(self, number):
        return Registered(number)

    def trunk(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class UnusedStates(TwiceRegistered):
    """A list of all states that nobody uses but the caller."""

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.head(self.norm(states[-1])), tuple(states)


class LambdaSkips(Base):
    """x = λ₀ x + λ₁ x₀ before every block (modded nanoGPT)."""

    def build(self):
        self.blocks = nn.ModuleList(Registered(number) for number in range(BLOCKS))
        self.lambdas = nn.Parameter(torch.rand(BLOCKS, 2) + 0.2)

    def trunk(self, x):
        first = x
        for number, block in enumerate(self.blocks):
            x = self.lambdas[number, 0] * x + self.lambdas[number, 1] * first
            truth.state(x, number - 1, "pre|post|embed", need=f"layer {number - 1}")
            x = block(x)
        return x


class Gates(Base):
    """tanh gates a layer, then one gate a token from the state."""

    def layer(self, number):
        return nn.ModuleDict(
            {"attn": Attention(norm=True), "mlp": Mlp(norm=True), "to_gate": nn.Linear(WIDTH, 1)}
        )

    def build(self):
        super().build()
        self.scales = nn.Parameter(torch.rand(BLOCKS))

    def trunk(self, x):
        for number, layer in enumerate(self.layers):
            x = plain(x, layer["attn"](x), number, "mid", scale=torch.tanh(self.scales[number]))
            gate = torch.sigmoid(layer["to_gate"](x))
            added = layer["mlp"](x)
            truth.connection(residual_scale=1, branch_scale=gate[..., 0], branch_out=added)
            x = x + gate * added
            truth.state(x, number)
        return x


class Experts(nn.Module):
    """Two experts a token, added with index_add."""

    def __init__(self):
        super().__init__()
        self.norm, self.route = Rms(), nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
        flat = self.norm(x).flatten(0, 1)
        weights, chosen = self.route(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class MixtureOfExperts(Base):
    def layer(self, number):
        return nn.ModuleDict({"self_attn": Attention(norm=True), "block_sparse_moe": Experts()})

    def trunk(self, x):
        for number, layer in enumerate(self.layers):
            x = plain(x, layer["self_attn"](x), number, "mid")
            x = plain(x, layer["block_sparse_moe"](x), number)
        return x


class InPlaceParallel(Base):
    """`x += attn(h); x += mlp(h)`, both of one norm."""

    def layer(self, number):
        return nn.ModuleDict({"ln": nn.LayerNorm(WIDTH), "attn": Attention(), "mlp": Mlp()})

    def trunk(self, x):
        for number, layer in enumerate(self.layers):
            h = layer["ln"](x)
            x = x.clone()
            x += layer["attn"](h)
            x += layer["mlp"](h)
            truth.state(x, number)
        return x


class LearnedSkips(Base):
    """The second half adds learned shares of the states of the first half, in reverse."""

    def build(self):
        self.blocks = nn.ModuleList(Registered(number) for number in range(4))
        self.shares = nn.Parameter(torch.rand(2))

    def trunk(self, x):
        skips = []
        for number, block in enumerate(self.blocks):
            if number >= 2:
                x = x + self.shares[number - 2] * skips.pop()
                truth.state(x, number - 1, "pre|post", need=f"layer {number - 1}")
            x = block(x)
            if number < 2:
                skips.append(x)
        return x


class PostNormEncoder(nn.Module):
    """BERT: a norm after the embeddings and after every sum."""

    def __init__(self):
        super().__init__()
        self.word, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(32, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": Attention(causal=False),
                    "ln1": nn.LayerNorm(WIDTH),
                    "output": Mlp(),
                    "ln2": nn.LayerNorm(WIDTH),
                }
            )
            for _ in range(BLOCKS)
        )
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        x = self.norm(self.word(ids) + self.position(torch.arange(ids.shape[1])))
        truth.state(x, -1, "embed")
        for number, layer in enumerate(self.layer):
            x = layer["ln1"](x + layer["attention"](x))
            truth.state(x, number, "mid")
            x = layer["ln2"](x + layer["output"](x))
            truth.state(x, number)
        return torch.tanh(self.pooler(x[:, 0]))


class ClassToken(nn.Module):
    """ViT: a learned token before the patches, positions added, its last state alone is read."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls, self.positions = nn.Parameter(normal(0, 1, 1, WIDTH)), nn.Parameter(normal(1, 1, 17, WIDTH))
        self.blocks = nn.ModuleList(Registered(number) for number in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, image):
        x = self.patch(image).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        truth.state(x, -1, "embed")
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class CrossBlock(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.self_attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.cross = nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def forward(self, x, memory):
        x = plain(x, self.self_attn(x), self.number, "mid")
        x = plain(x, self.cross(self.norm(x), memory, memory, need_weights=False)[0], self.number, "mid")
        return plain(x, self.mlp(x), self.number)


class CrossAttending(Base):
    """Three branches a block; the memory is the batch's."""

    def layer(self, number):
        return CrossBlock(number)

    def forward(self, ids, memory):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        for layer in self.layers:
            x = layer(x, memory)
        return self.head(self.norm(x))


def with_memory(seed):
    return tokens(seed), normal(seed, 3, 7, WIDTH)


class StepEmbedding(Base):
    """One block, five times; an embedding of the step is added to what its branches read."""

    def build(self):
        self.steps = nn.Embedding(5, WIDTH)
        self.block = nn.ModuleDict({"attn": Attention(norm=True), "mlp": Mlp(norm=True)})

    def trunk(self, x):
        for turn in range(5):
            step = self.steps(torch.tensor(turn))
            x = plain(x, self.block["attn"](x + step), turn, "mid")
            x = plain(x, self.block["mlp"](x + step), turn)
        return x


class ReadAverages(Base):
    """Each branch reads the mean of the last two states."""

    def layer(self, number):
        return (Attention, Mlp)[number % 2](norm=True)

    def trunk(self, x):
        before = x
        for number, layer in enumerate(self.layers):
            added = layer((x + before) / 2)
            before, x = x, x + added
            truth.state(x, number)
        return x


# --- streams ---


class StreamBase(nn.Module):
    """Embedding, streams, blocks, sum, head; weights are bare parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.offsets = nn.Parameter(torch.randn(STREAMS, WIDTH))
        self.branches = nn.ModuleList(kind(norm=True) for _ in range(BLOCKS) for kind in (Attention, Mlp))
        rows = 2 * BLOCKS
        self.pre, self.post = nn.Parameter(torch.rand(rows, STREAMS)), nn.Parameter(torch.rand(rows, STREAMS))
        self.res = nn.Parameter(torch.rand(rows, STREAMS, STREAMS) / 2)
        self.norm, self.head = Rms(), nn.Linear(WIDTH, VOCABULARY)

    def note(self, x, row, branch_in=None):
        """The state after a row, from (B, T, n, D)."""
        truth.state(x, row, axes="b t n d -> b t n d")  # the list of branches numbers the blocks

    def joined(self, row, res=None):
        truth.connection(
            h_res=self.res[row] if res is None else res, h_pre=self.pre[row], h_post=self.post[row]
        )

    def begin(self, ids):
        x = self.embed(ids)[:, :, None] + self.offsets
        truth.state(x, -1, "embed", axes="b t n d -> b t n d")
        return x

    def end(self, x):
        return self.head(self.norm(x))


class ListLoop(StreamBase):
    """A list of streams; every number of every matrix is used alone."""

    def forward(self, ids):
        x = list(self.begin(ids).unbind(2))
        for row, branch in enumerate(self.branches):
            out = branch(sum(self.pre[row, n] * x[n] for n in range(STREAMS)))
            x = [
                sum(self.res[row, i, j] * x[j] for j in range(STREAMS)) + self.post[row, i] * out
                for i in range(STREAMS)
            ]
            self.joined(row)
            self.note(torch.stack(x, 2), row)
        return self.end(sum(x))


class DictOfStreams(StreamBase):
    """A dict of streams, stacked for each mixture."""

    def forward(self, ids):
        x = dict(enumerate(self.begin(ids).unbind(2)))
        for row, branch in enumerate(self.branches):
            stacked = torch.stack([x[n] for n in range(STREAMS)], -1)
            out = branch(stacked @ self.pre[row])
            mixed = stacked @ self.res[row].mT
            x = {n: mixed[..., n] + out * self.post[row, n] for n in range(STREAMS)}
            self.joined(row)
            self.note(torch.stack(list(x.values()), 2), row)
        return self.end(torch.stack(list(x.values())).sum(0))


class NormedReads(StreamBase):
    """Branches read mixtures of normalised streams."""

    def forward(self, ids):
        x = self.begin(ids)
        for row, branch in enumerate(self.branches):
            normed = functional.layer_norm(x, (WIDTH,))
            out = branch(torch.einsum("btnd,n->btd", normed, self.pre[row]))
            x = torch.einsum("ij,btjd->btid", self.res[row], x) + out[:, :, None] * self.post[row][:, None]
            truth.connection(h_res=self.res[row], h_post=self.post[row])
            self.note(x, row)
        return self.end(x.sum(2))


class NextRead(StreamBase):
    """Each step gives the state and what the next branch reads."""

    def forward(self, ids):
        x = self.begin(ids)
        u = torch.einsum("btnd,n->btd", x, self.pre[0])
        for row, branch in enumerate(self.branches):
            x = (
                torch.einsum("ij,btjd->btid", self.res[row], x)
                + branch(u)[:, :, None] * self.post[row][:, None]
            )
            u = torch.einsum("btnd,n->btd", x, self.pre[min(row + 1, 2 * BLOCKS - 1)])
            self.joined(row)
            self.note(x, row)
        return self.end(u)


class Kronecker(StreamBase):
    """Folded into the features; mixed by a product with H ⊗ I."""

    def forward(self, ids):
        x = self.begin(ids).flatten(2)
        for row, branch in enumerate(self.branches):
            streams = x.view(*x.shape[:2], STREAMS, WIDTH)
            out = branch((streams * self.pre[row][:, None]).sum(2))
            mixed = (streams[:, :, None] * self.res[row][:, :, None]).sum(3)
            x = (mixed + out[:, :, None] * self.post[row][:, None]).flatten(2)
            self.joined(row)
            self.note(x.view(*x.shape[:2], STREAMS, WIDTH), row)
        return self.end(x.view(*x.shape[:2], STREAMS, WIDTH).mean(2))


class DynamicMhc(StreamBase):
    """mHC with Sinkhorn of 20 rounds, weights from the normalised, flattened streams, streams second."""

    def __init__(self):
        super().__init__()
        self.dynamic = nn.ModuleList(
            nn.Linear(STREAMS * WIDTH, STREAMS**2 + 2 * STREAMS) for _ in self.branches
        )

    def forward(self, ids):
        x = self.begin(ids).transpose(1, 2)
        for row, branch in enumerate(self.branches):
            flat = functional.rms_norm(x.transpose(1, 2).flatten(2), (STREAMS * WIDTH,))
            pre, post, res = self.dynamic[row](flat).split([STREAMS, STREAMS, STREAMS**2], -1)
            pre, post = torch.sigmoid(pre), 2 * torch.sigmoid(post)
            res = sinkhorn(res.unflatten(-1, (STREAMS, STREAMS)))
            out = branch(torch.einsum("btn,bntd->btd", pre, x))
            x = torch.einsum("btij,bjtd->bitd", res, x) + post.permute(0, 2, 1)[..., None] * out[:, None]
            truth.connection(h_res=res, h_pre=pre, h_post=post)
            self.note(x.transpose(1, 2), row)
        return self.end(x.sum(1))


class PaddedBlocks(nn.Module):
    """Sums that begin anew every two branches and are attended to only when they are complete."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.branches = nn.ModuleList(kind(norm=True) for _ in range(4) for kind in (Attention, Mlp))
        self.queries = nn.Parameter(torch.randn(5, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def read(self, history, query):
        v = torch.stack(history)
        return torch.einsum("jbt,jbtd->btd", (functional.rms_norm(v, (WIDTH,)) @ query).softmax(0), v)

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        history = [x]
        for block in range(4):
            h = self.read(history, self.queries[block])
            truth.state(h, 2 * block - 1, "pre|post|embed", need="")
            a, b = self.branches[2 * block], self.branches[2 * block + 1]
            partial_sum = a(h)
            partial_sum = partial_sum + b(h + partial_sum)
            truth.state(h + a(h), 2 * block, "post|mid", need="")
            history.append(partial_sum)
        h = self.read(history, self.queries[4])
        truth.state(h, 7, "post|pre")
        return self.head(h)


TRIALS = (
    Design("branches that are sums of three", SummedBranches, layers=""),
    Design("layers of two kinds, norms in a list", TwoKinds, layers=""),
    Design("modules registered twice", TwiceRegistered),
    Design("a list of states that nobody uses", UnusedStates),
    Design("shares of the state and of the embedding before each block", LambdaSkips),
    Design("gates a layer and a token", Gates),
    Design("experts by index_add", MixtureOfExperts),
    Design("in place and parallel", InPlaceParallel),
    Design("learned skips in reverse", LearnedSkips),
    Design("post-norm encoder", PostNormEncoder),
    Design("class token", ClassToken, lambda seed: normal(seed, 2, 3, 16, 16)),
    Design("cross attention to the batch's memory", CrossAttending, with_memory),
    Design("one block with step embeddings", StepEmbedding),
    Design("reads of the mean of two states", ReadAverages),
    Design("streams in a list, numbers one by one", ListLoop, streams=STREAMS),
    Design("streams in a dict, stacked last", DictOfStreams, streams=STREAMS),
    Design("reads of normalised streams", NormedReads, streams=STREAMS),
    Design("the next read is handed on", NextRead, streams=STREAMS),
    Design("folded, mixed by broadcasting", Kronecker, streams=STREAMS),
    Design("mHC, streams second, weights of the normed state", DynamicMhc, streams=STREAMS),
    Design("sums of two branches, read when complete", PaddedBlocks),
)
