"""Connections over depth: what a sublayer reads, and what is kept, is a mixture of all earlier outputs.

The sources are the embedding and the output of each sublayer. `coefficients` of a state say how much of each source it
holds; the models compute them beside their states by the same formulas, and only where somebody listens.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, VOCABULARY, WIDTH, Attention, Mlp, Rms

ROWS = 2 * BLOCKS
SOURCES = ROWS + 1


def source(number: int, sources: int = SOURCES) -> torch.Tensor:
    """The coefficients of one source alone."""
    return torch.eye(sources)[number]


def write_down(x, layer: int, site: str, before, after, added: int, out, *, back: int = 1, **options) -> None:
    """Write down the state after sublayer ``added`` − 1, whose branch read ``before`` and gave ``out``.

    ``after`` are the coefficients of the state.
    """
    if truth.on():
        kept = after.clone()
        kept[..., added] = 0
        written = {"branch_scale": after[..., added], "branch_out": out}
        truth.connection(depth_read=before, depth_carry=kept, **written, back=back)
        if site == "post":
            # No module gives it, it is mixed between the blocks: both names are true.
            site, options = "pre|post", {"need": f"layer {layer}"} | options
        truth.state(x, layer, site, **options)


class DepthModel(nn.Module):
    """Embedding, `trunk`, head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def trunk(self, x):
        raise NotImplementedError

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        return self.head(self.norm(self.trunk(x)))


def branches() -> list[nn.Module]:
    return [kind(norm=True) for _ in range(BLOCKS) for kind in (Attention, Mlp)]


# --- attention residuals (Kimi, arXiv 2603.15031) ---


class DepthQuery(nn.Module):
    """h = Σ softmax(q · norm(v_i)) v_i over earlier outputs."""

    def __init__(self):
        super().__init__()
        self.norm = Rms()
        self.query = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, values):
        v = torch.stack(values)
        weights = torch.einsum("d,jbtd->jbt", self.query.weight[0], self.norm(v)).softmax(0)
        self.last = weights.detach().permute(1, 2, 0) if truth.on() else None
        return torch.einsum("jbt,jbtd->btd", weights, v)


def padded(weights) -> torch.Tensor:
    return functional.pad(weights, (0, SOURCES - weights.shape[-1]))


class FullAttentionResidual(DepthModel):
    """Every sublayer reads all earlier outputs; the model's loop holds them."""

    def build(self):
        self.layers = nn.ModuleList(branches())
        self.queries = nn.ModuleList(DepthQuery() for _ in range(SOURCES))

    def trunk(self, x):
        values, reads = [x], source(0)
        for number, layer in enumerate(self.layers):
            h = self.queries[number](values)
            if truth.on() and number:
                after = padded(self.queries[number].last)
                write_down(h, number - 1, "post", reads, after, number, values[-1])
                reads = after
            values.append(layer(h))
        h = self.queries[-1](values)
        if truth.on():
            write_down(h, ROWS - 1, "post", reads, self.queries[-1].last, SOURCES - 1, values[-1])
        return h


class HistoryBlock(nn.Module):
    """Takes the list of earlier outputs and gives it longer by two."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.attn_query, self.mlp_query = DepthQuery(), DepthQuery()

    def forward(self, history):
        for offset, query, branch in ((0, self.attn_query, self.attn), (1, self.mlp_query, self.mlp)):
            number = 2 * self.layer + offset
            h = query(history)
            if truth.on():
                self.write(h, number, query.last, history[-1])
            history = [*history, branch(h)]
        return history

    def write(self, h, number: int, weights, out) -> None:
        """The reads go from block to block on the side."""
        after = padded(weights)
        if number:
            site = "post" if number % 2 == 0 else "mid"
            write_down(h, (number - 1) // 2, site, HistoryBlock.reads, after, number, out)
        HistoryBlock.reads = after


class HistoryOfLists(DepthModel):
    """The blocks hand on the list of all outputs."""

    def build(self):
        self.blocks = nn.ModuleList(HistoryBlock(layer) for layer in range(BLOCKS))
        self.last = DepthQuery()

    def trunk(self, x):
        history = [x]
        for block in self.blocks:
            history = block(history)
        h = self.last(history)
        if truth.on():
            write_down(h, BLOCKS - 1, "post", HistoryBlock.reads, self.last.last, SOURCES - 1, history[-1])
        return h


class BlockwiseBlock(nn.Module):
    """Takes (finished sums, running sum): reads attend to both; a boundary finishes the running sum."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.self_attention_res, self.mlp_res = DepthQuery(), DepthQuery()

    def forward(self, finished, running):
        rows = ((self.self_attention_res, self.attn), (self.mlp_res, self.mlp))
        for offset, (query, branch) in enumerate(rows):
            number = 2 * self.layer + offset
            h = query([*finished, running])
            if truth.on():
                LEDGER.read(h, number, query.last)
            if offset == 0 and self.layer % 2 == 1:
                finished, running = [*finished, running], None
                if truth.on():
                    LEDGER.finish()
            added = branch(h)
            running = added if running is None else running + added
            if truth.on():
                LEDGER.add(number, added)
        return finished, running


class Ledger:
    """Coefficients of the finished sums and of the running one, of one forward."""

    def begin(self) -> None:
        self.finished, self.running, self.reads = [], source(0), None

    def read(self, h, number: int, weights) -> None:
        sums = torch.stack(torch.broadcast_tensors(*self.finished, self.running), -2)
        after = weights.unsqueeze(-2) @ sums
        after = after.squeeze(-2)
        if number:
            site = "post" if number % 2 == 0 else "mid"
            write_down(h, (number - 1) // 2, site, self.reads, after, number, self.out)
        self.reads = after

    def finish(self) -> None:
        self.finished = [*self.finished, self.running]
        self.running = torch.zeros(SOURCES)

    def add(self, number: int, out) -> None:
        self.out = out
        self.running = self.running + source(number + 1)


LEDGER = Ledger()


class BlockwiseAttentionResidual(DepthModel):
    """Attention over sums of a few blocks (Kimi-K3)."""

    def build(self):
        self.layers = nn.ModuleList(BlockwiseBlock(layer) for layer in range(BLOCKS))
        self.output_attn_res = DepthQuery()

    def trunk(self, x):
        if truth.on():
            LEDGER.begin()
        finished, running = [], x
        for layer in self.layers:
            finished, running = layer(finished, running)
        h = self.output_attn_res([*finished, running])
        if truth.on():
            LEDGER.read(h, 2 * BLOCKS, self.output_attn_res.last)
        return h


# --- weighted sums of all earlier states ---


class OneBranch(nn.Module):
    """A block of one branch with its own plain residual."""

    def __init__(self, number: int):
        super().__init__()
        self.branch = (Attention, Mlp)[number % 2](norm=True)

    def forward(self, x):
        return x + self.branch(x)


def write_down_average(y, x, number: int, before, averaged, out) -> None:
    """Write down what a block gives and the average after it: one of them is the state after the block."""
    given = before + source(number + 1)
    write_down(y, number, "post|mid", before, given, number + 1, out, need=f"layer {number}")
    write_down(x, number, "pre|post", before, averaged, number + 1, out, need=f"layer {number}", back=2)


class DenseFormer(DepthModel):
    """After each block a learned static average of all block outputs is the next state (arXiv 2402.02622)."""

    def build(self):
        self.blocks = nn.ModuleList(OneBranch(number) for number in range(ROWS))
        self.alphas = nn.ParameterList(torch.randn(number + 2) / 2 for number in range(ROWS))

    def trunk(self, x):
        outputs, c, held = [x], source(0), [source(0)]
        for number, block in enumerate(self.blocks):
            y = block(x)
            outputs.append(y)
            out = y - x if truth.on() else None
            x = sum(a * y for a, y in zip(self.alphas[number], outputs, strict=True))
            if truth.on():
                held.append(c + source(number + 1))
                after = sum(a * y for a, y in zip(self.alphas[number].detach(), held, strict=True))
                write_down_average(outputs[-1], x, number, c, after, out)
                c = after
        return x


class DenseFormerMatrix(DenseFormer):
    """The same with the outputs in one buffer and the weights in one matrix."""

    def build(self):
        self.blocks = nn.ModuleList(OneBranch(number) for number in range(ROWS))
        self.weights = nn.Parameter(torch.randn(ROWS, ROWS + 1) / 2)

    def trunk(self, x):
        buffer = self.put(x.new_zeros(ROWS + 1, *x.shape), 0, x)
        c, held = source(0), torch.zeros(ROWS + 1, SOURCES)
        held[0] = c
        for number, block in enumerate(self.blocks):
            buffer = self.put(buffer, number + 1, block(x))
            out = buffer[number + 1] - x if truth.on() else None
            weights = self.weights[number, : number + 2]
            x = torch.tensordot(weights, buffer[: number + 2], 1)
            if truth.on():
                held[number + 1] = c + source(number + 1)
                after = weights.detach() @ held[: number + 2]
                write_down_average(buffer[number + 1], x, number, c, after, out)
                c = after
        return x

    def put(self, buffer, number: int, x):
        buffer[number] = x
        return buffer


class Mudd(DepthModel):
    """Queries, keys, values and the residual each have a mixture of their own, with dynamic weights (arXiv 2502.12170)."""

    def build(self):
        self.blocks = nn.ModuleList(FourWayBlock(number) for number in range(BLOCKS))
        self.mixers = nn.ModuleList(nn.Linear(WIDTH, 4 * (number + 2)) for number in range(BLOCKS))

    def trunk(self, x):
        history, ways = [x], x.expand(4, *x.shape)
        for number, block in enumerate(self.blocks):
            y = block(ways)
            history.append(y)
            weights = self.mixers[number](functional.gelu(y)).unflatten(-1, (4, number + 2))
            ways = torch.einsum("btwj,jbtd->wbtd", weights, torch.stack(history))
            # What the residual way holds is the next state; the block's own output is another true one.
            truth.state(y, number, "post|mid")
            truth.state(ways[3], number, "pre|post", need=f"layer {number}")
        return ways[3]


class FourWayBlock(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = Mlp(norm=True)

    def forward(self, ways):
        query, key, value, x = ways
        mixed = functional.scaled_dot_product_attention(
            self.q(query), self.k(key), self.v(value), is_causal=True
        )
        x = x + self.o(mixed)
        truth.state(x, self.number, "mid")
        return x + self.mlp(x)


class Lime(DepthModel):
    """Keys and values are of a mixture of all earlier states; the residual itself is plain (arXiv 2502.09245)."""

    def build(self):
        self.q, self.kv, self.o, self.mlps = (
            nn.ModuleList(of) for of in zip(*(self.layer() for _ in range(BLOCKS)), strict=True)
        )
        self.routers = nn.ParameterList(torch.rand(number + 1) for number in range(BLOCKS))

    def layer(self):
        return nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), Mlp(norm=True)

    def trunk(self, x):
        history = []
        for number in range(BLOCKS):
            history.append(x)
            mixed = torch.einsum("j,jbtd->btd", self.routers[number], torch.stack(history))
            k, v = self.kv[number](mixed).chunk(2, -1)
            read = functional.scaled_dot_product_attention(self.q[number](x), k, v, is_causal=True)
            x = x + self.o[number](read)
            truth.state(x, number, "mid")
            x = x + self.mlps[number](x)
            truth.state(x, number)
        return x


class HistoryStep(nn.Module):
    """Takes the last states and gives the next: Σ w_j x_j + F(x_last), over at most three of them."""

    def __init__(self, number: int):
        super().__init__()
        self.branch = (Attention, Mlp)[number % 2](norm=True)
        self.weights = nn.Parameter(torch.rand(min(number + 1, 3)))

    def forward(self, history):
        kept = history[-len(self.weights) :]
        return sum(w * x for w, x in zip(self.weights, kept, strict=True)) + self.branch(history[-1])


class GrowingHistory(DepthModel):
    """A list of all states, to which the loop appends."""

    def build(self):
        self.steps = nn.ModuleList(HistoryStep(number) for number in range(ROWS))

    def trunk(self, x):
        history, held = [x], [source(0)]
        for number, step in enumerate(self.steps):
            history.append(step(history))
            if truth.on():
                weights = step.weights.detach()
                after = weights @ torch.stack(held[-len(weights) :]) + source(number + 1)
                write_down(history[-1], number, "post", held[-1], after, number + 1, step.branch(history[-2]))
                held.append(after)
        return history[-1]


# --- skips to the first state and across the middle ---


class FirstStateSkips(DepthModel):
    """x = λ x + λ₀ x₀ before every block (nanochat); x₀ is the normed embedding."""

    def build(self):
        self.blocks = nn.ModuleList(OneBranch(number) for number in range(ROWS))
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.rand(ROWS)), nn.Parameter(torch.rand(ROWS))

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        x = functional.rms_norm(x, (WIDTH,))
        truth.state(x, -1, "embed")
        return self.head(self.norm(self.trunk(x)))

    def trunk(self, x):
        x0, c = x, source(0)
        for number, block in enumerate(self.blocks):
            keep, first = self.resid_lambdas[number], self.x0_lambdas[number]
            x = keep * x + first * x0
            truth.state(x, number - 1, "pre|embed|post", need=f"layer {number - 1}")
            before, x = x, block(x)
            if truth.on():
                read = keep.detach() * c + first.detach() * source(0)
                c = read + source(number + 1)
                write_down(x, number, "post", read, c, number + 1, x - before, back=2)
        return x


class Ladder(DepthModel):
    """Each branch reads the state before the last branch was added (ladder residual, arXiv 2501.06589)."""

    def build(self):
        self.layers = nn.ModuleList(branches())

    def trunk(self, x):
        before, c, read = x, source(0), source(0)
        for number, layer in enumerate(self.layers):
            added = layer(before)
            before = x
            x = x + added
            if truth.on():
                write_down(x, number, "post", read, c + source(number + 1), number + 1, added)
                read, c = c, c + source(number + 1)
        return x


class ValueResidual(DepthModel):
    """The first block's values go into all attentions; the residual is plain (arXiv 2410.17897)."""

    def build(self):
        self.blocks = nn.ModuleList(ValueBlock(number) for number in range(BLOCKS))

    def trunk(self, x):
        first = None
        for block in self.blocks:
            x, first = block(x, first)
        return x


class ValueBlock(nn.Module):
    def __init__(self, number: int):
        super().__init__()
        self.number = number
        self.norm = nn.LayerNorm(WIDTH)
        self.qk, self.v, self.o = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.mlp = Mlp(norm=True)

    def forward(self, x, first):
        read = self.norm(x)
        q, k = self.qk(read).chunk(2, -1)
        v = self.v(read)
        first = v if first is None else first
        x = x + self.o(functional.scaled_dot_product_attention(q, k, (v + first) / 2, is_causal=True))
        truth.state(x, self.number, "mid")
        x = x + self.mlp(x)
        truth.state(x, self.number)
        return x, first


class Injected(DepthModel):
    """One block in a loop; the embedding is added before every turn (recurrent depth)."""

    def build(self):
        self.core = OneBranch(0)

    def trunk(self, x):
        e, x = x, torch.zeros_like(x)
        for turn in range(4):
            x = x + e
            truth.state(x, turn - 1, "pre|embed|post", need=f"layer {turn - 1}")
            x = self.core(x)
            truth.state(x, turn)
        return x


OVER_DEPTH = "depth_attention|depth_history"
DEPTH_DESIGNS = (
    Design(
        "attention residuals, full, in the loop",
        FullAttentionResidual,
        layers="layers.{i}",
        branches_named=True,
        family=OVER_DEPTH,
    ),
    Design("attention residuals, full, lists handed on", HistoryOfLists, family=OVER_DEPTH),
    Design(
        "attention residuals, block-wise",
        BlockwiseAttentionResidual,
        layers="layers.{i}",
        family=OVER_DEPTH,
    ),
    Design("DenseFormer", DenseFormer, family=OVER_DEPTH),
    Design("DenseFormer in one buffer", DenseFormerMatrix, family=OVER_DEPTH),
    Design("MUDD, four ways", Mudd, family=OVER_DEPTH),
    Design("LIMe", Lime, layers="mlps.{i}", branches_named=True, family=f"residual|{OVER_DEPTH}"),
    Design("history that grows in the loop", GrowingHistory, layers="steps.{i}", family=OVER_DEPTH),
    Design("skips to the first state", FirstStateSkips, family=OVER_DEPTH),
    Design(
        "ladder residual", Ladder, layers="layers.{i}", branches_named=True, family=f"residual|{OVER_DEPTH}"
    ),
    Design("value residual", ValueResidual),
    Design("one block, embedding injected", Injected, layers="core", family=OVER_DEPTH),
)
