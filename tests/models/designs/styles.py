"""Networks in the styles of public code that the reading was not built on: what its two trials by other hands left over.

A first score is only worth something once; docs/field_trials.md has it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.depth import OVER_DEPTH
from tests.models.designs.design import Design
from tests.models.designs.mixing import sinkhorn
from tests.models.designs.parts import BLOCKS, STREAMS, VOCABULARY, WIDTH, Attention, Mlp, Rms


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
            truth.state(x, number, "pre|post", need=f"layer {number}")
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

    def begin(self, ids):
        x = self.embed(ids)[:, :, None] + self.offsets
        truth.state(x, -1, "embed", axes="b t n d -> b t n d")
        return x


class Mixed(StreamBase):
    """Streams that a function mixes: ``step(model, row, branch, x)`` gives the next ones, and what joins them."""

    def __init__(self, step, merged=lambda x: x.sum(2), **parts):
        super().__init__()
        self.step, self.merged = step, merged
        for name, make in parts.items():
            setattr(self, name, nn.ModuleList(make() for _ in self.branches))

    def forward(self, ids):
        x = self.begin(ids)
        for row, branch in enumerate(self.branches):
            x, parts = self.step(self, row, branch, x)
            own = {"h_res": self.res[row], "h_pre": self.pre[row], "h_post": self.post[row]}
            truth.connection(**{name: of for name, of in (own | parts).items() if of is not None})
            truth.state(x, row, axes="b t n d -> b t n d")  # the list of branches numbers the blocks
        return self.head(self.norm(self.merged(x)))

    def written(self, row, out):
        """What a branch adds to the streams."""
        return self.post[row][:, None] * out[:, :, None]


class Mixer(nn.Linear):
    """Gives a doubly stochastic matrix, as modules of mHC do."""

    def __init__(self):
        super().__init__(STREAMS * WIDTH, STREAMS**2)

    def forward(self, x):
        return sinkhorn(super().forward(x.flatten(2)).unflatten(-1, (STREAMS, STREAMS)))


def list_of_numbers(m, row, branch, x):
    """A list of streams; every number of every matrix is used alone."""
    x = list(x.unbind(2))
    out = branch(sum(m.pre[row, n] * x[n] for n in range(STREAMS)))
    mixed = [sum(m.res[row, i, j] * x[j] for j in range(STREAMS)) for i in range(STREAMS)]
    return torch.stack([mixed[i] + m.post[row, i] * out for i in range(STREAMS)], 2), {}


def dict_stacked_last(m, row, branch, x):
    """A dict of streams, stacked for each mixture."""
    named = dict(enumerate(x.unbind(2)))
    stacked = torch.stack([named[n] for n in range(STREAMS)], -1)
    out, mixed = branch(stacked @ m.pre[row]), stacked @ m.res[row].mT
    return torch.stack([mixed[..., n] + out * m.post[row, n] for n in range(STREAMS)], 2), {}


def normalised_reads(m, row, branch, x):
    """Branches read mixtures of normalised streams, which are no mixtures of the streams."""
    out = branch(torch.einsum("btnd,n->btd", functional.layer_norm(x, (WIDTH,)), m.pre[row]))
    return m.res[row] @ x + m.written(row, out), {"h_pre": None}


def identity_and_rank_one(m, row, branch, x):
    """The matrix is never made: x + u (v·x), with u by token and v the read."""
    u = torch.tanh(m.weights[row](x.mean(2)))
    read = m.pre[row] @ x
    matrix = torch.eye(STREAMS) + u[..., None] * m.pre[row]
    return x + u[..., None] * read[:, :, None] + m.written(row, branch(read)), {"h_res": matrix}


def written_by_the_output(m, row, branch, x):
    """How much is written depends on what is written."""
    out = branch(m.pre[row] @ x)
    post = 2 * torch.sigmoid(m.weights[row](out))
    return m.res[row] @ x + post[..., None] * out[:, :, None], {"h_post": post}


def never_applied(m, row, branch, x):
    """A matrix is computed and stored for a plot; the streams are carried as they are."""
    m.plotted = m.weights[row](x)
    return x + m.written(row, branch(m.pre[row] @ x)), {"h_res": torch.eye(STREAMS)}


def applied_transposed(m, row, branch, x):
    """A module gives H, and the sum over its first index applies Hᵀ."""
    matrix = m.weights[row](x)
    mixed = torch.einsum("btij,btid->btjd", matrix, x)
    return mixed + m.written(row, branch(m.pre[row] @ x)), {"h_res": matrix.mT}


class Retrofitted(Mixed):
    """Hooks before and after each branch have the streams; the loop looks like a chain."""

    def __init__(self):
        super().__init__(None)
        for row, branch in enumerate(self.branches):
            branch.register_forward_pre_hook(lambda module, args, row=row: (self.pre[row] @ self.x,))
            branch.register_forward_hook(lambda module, args, out, row=row: self.wrote(row, out))

    def wrote(self, row, out):
        self.x = self.res[row] @ self.x + self.written(row, out)
        truth.connection(h_res=self.res[row], h_pre=self.pre[row], h_post=self.post[row])
        truth.state(self.x, row, axes="b t n d -> b t n d")

    def forward(self, ids):
        self.x = self.begin(ids)
        y = self.x[:, :, 0]
        for branch in self.branches:
            y = branch(y)
        return self.head(self.norm(self.x.sum(2)))


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
            truth.state(h + a(h), 2 * block, "post|mid|pre", need="")
            history.append(partial_sum)
        h = self.read(history, self.queries[4])
        truth.state(h, 7, "post|pre")
        return self.head(h)


to_streams = partial(nn.Linear, WIDTH, STREAMS)
STYLE_DESIGNS = (
    Design("branches that are sums of three", SummedBranches, layers=""),
    Design("modules registered twice", TwiceRegistered, layers="layers.{i}"),
    Design("one block with step embeddings", StepEmbedding, layers=""),
    Design(
        "reads of the mean of two states", ReadAverages, layers="layers.{i}", family=f"residual|{OVER_DEPTH}"
    ),
    *(
        Design(
            name,
            partial(Mixed, step, **parts),
            streams=STREAMS,
            layers="branches.{i}",
            branches_named=True,
            layout="B T N D",
            family="hc|mhc|streams|independent_hc",
        )
        for name, step, parts in (
            ("streams in a list, numbers one by one", list_of_numbers, {}),
            ("streams in a dict, stacked last", dict_stacked_last, {}),
            ("reads of normalised streams", normalised_reads, {}),
            ("identity and rank one", identity_and_rank_one, {"weights": to_streams}),
            ("weights of the write from what is written", written_by_the_output, {"weights": to_streams}),
            ("a matrix that is never applied", never_applied, {"weights": Mixer}),
            ("a matrix that is applied transposed", applied_transposed, {"weights": Mixer}),
        )
    ),
    Design(
        "hooks around branches have the streams", Retrofitted, streams=STREAMS, layers="", family="hc|mhc"
    ),
    Design("sums of two branches, read when complete", PaddedBlocks, layers="", family=OVER_DEPTH),
)
