"""Small networks after public code that was misread in the field trials, compared with what their own hooks give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import depthscope as ds
from depthscope.probes.connections.coefficients import spread
from depthscope.probes.model.layout import LayoutError

WIDTH, STREAMS = 16, 4


class Norm(nn.Module):
    """A root mean square norm, whose gain comes first."""

    def __init__(self, scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.weight, self.scale = nn.Parameter(1 + torch.rand(WIDTH)), scale

    def forward(self, x):
        size = x.pow(2).mean(-1, keepdim=True)
        return self.scale(self.weight * x, size)


def by_root(x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return x / (size.sqrt() + 1e-6)


def by_reciprocal(x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(size + 1e-6)


class Block(nn.Module):
    def __init__(self, *, post: bool = False):
        super().__init__()
        self.norm, self.post = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH) if post else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        return self.post(x + self.mlp(self.norm(x)))


class Streams(nn.Module):
    """Hyper-connections, whose branch begins with a norm."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.h_res = nn.Parameter(torch.eye(STREAMS) + 0.1 * torch.rand(STREAMS, STREAMS))
        self.h_pre, self.h_post = nn.Parameter(torch.rand(STREAMS)), nn.Parameter(torch.rand(STREAMS))

    def forward(self, h):
        given = self.mlp(self.norm(torch.einsum("n,btnd->btd", self.h_pre, h)))
        return torch.einsum("mn,btnd->btmd", self.h_res, h) + self.h_post[:, None] * given[:, :, None]


class StreamNetwork(nn.Module):
    def __init__(self, scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks, self.norm = nn.ModuleList(Streams(Norm(scale)) for _ in range(3)), Norm(scale)

    def forward(self, ids):
        h = self.embed(ids)[:, :, None].repeat(1, 1, STREAMS, 1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h.sum(2)))


def ids() -> torch.Tensor:
    return torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [by_root, by_reciprocal])
def test_a_norm_may_have_its_gain_before_its_division(scale):
    model = StreamNetwork(scale).eval()
    run = ds.capture(model, ids())
    assert run.attrs["proof"] == "proven"
    for number, block in enumerate(model.blocks):
        found = torch.as_tensor(run.trace["h_pre"].values[number])
        assert (found - block.h_pre.detach()).abs().max() < 1e-5
    assert "final" in run.trace


class Norms(nn.Module):
    """Post-norm blocks, between which the state is normed once more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.first = nn.ModuleList(Block(post=True) for _ in range(2))
        self.between = nn.RMSNorm(WIDTH)
        self.last = nn.ModuleList(Block(post=True) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.first:
            x = block(x)
        x = self.between(x)
        for block in self.last:
            x = block(x)
        return self.head(x)


def shown(model: nn.Module, names: list[str], batch) -> list[torch.Tensor]:
    """What modules give in a forward."""
    found: list[torch.Tensor] = []
    modules = [model.get_submodule(name) for name in names]
    hooks = [
        module.register_forward_hook(lambda *of: found.append(of[2].detach().clone())) for module in modules
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_a_norm_may_follow_a_norm():
    model = Norms().eval()
    run = ds.capture(model, ids())
    assert run.attrs["proof"] == "proven"
    names = ["embed", "first.0", "first.1", "between", "last.0", "last.1"]
    for found, true in zip(run.trace.residual.values, shown(model, names, ids()), strict=True):
        assert (torch.as_tensor(found[:, :, 0]) - true).abs().max() < 1e-6


class Middle(nn.Module):
    """Two lists of blocks, and one block of their class between them, with no number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.down = nn.ModuleList(Block() for _ in range(2))
        self.middle = Block()
        self.up = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for block in (*self.down, self.middle, *self.up):
            x = block(x)
        return self.head(x)


def test_a_block_without_a_number_is_one_where_others_of_its_class_have_one():
    model, batch = Middle().eval(), ids()

    def loss(output, _):
        return output.pow(2).flatten(1).mean(1)

    trace = ds.capture(model, batch).trace
    modules = ["embed", "down.0", "down.1", "middle", "up.0", "up.1"]
    assert trace.module.values.tolist() == modules
    assert trace.layer.values.tolist() == [-1, 0, 1, 2, 3, 4]

    found = ds.interventions.ablate(model, batch, "skip", loss=loss)
    change = float(found.loss_change.sel(experiment="skip block 2"))
    with torch.no_grad():
        before = loss(model(batch), batch)
        hook = model.middle.register_forward_hook(lambda _, given, __: given[0])
        true = (loss(model(batch), batch) - before).mean()
        hook.remove()
    assert change == pytest.approx(float(true), rel=1e-4)


@dataclass
class Graph:
    x: torch.Tensor


class IntoItsBatch(nn.Module):
    """A model of graphs that puts its states where it found the features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, graph):
        graph.x = self.embed(graph.x)
        for block in self.blocks:
            graph.x = block(graph.x)
        return self.head(graph.x)


def test_an_object_that_a_model_changes_is_as_it_was():
    graph, model = Graph(ids()), IntoItsBatch().eval()
    ds.describe(model, graph)
    first = ds.capture(model, graph, gradients=True, loss=lambda output, _: output.pow(2).mean())
    assert torch.equal(graph.x, ids())
    assert (first.trace.residual.values == ds.capture(model, graph).trace.residual.values).all()


class Experts(nn.Module):
    """Experts that take the tokens of all sequences in their order, each a place of its own."""

    def __init__(self):
        super().__init__()
        self.router, self.expert = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        mask = nn.functional.one_hot(chosen, 2)
        rank = (mask.cumsum(0) - 1).mul(mask).sum(-1)
        places = mask[:, :, None] * nn.functional.one_hot(rank, len(tokens))[:, None]
        taken = torch.einsum("tec,td->ecd", places.to(x.dtype), tokens)
        given = torch.einsum("tec,ecd->td", places * weight[:, None, None], self.expert(taken))
        return x + given.view_as(x)


def test_sequences_that_meet_in_experts_are_refused_with_the_layout_that_reads_them():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, WIDTH), *(Experts() for _ in range(3)), nn.Linear(WIDTH, 20)
    ).eval()
    with pytest.raises(LayoutError, match="layout='B T D'"):
        ds.capture(model, ids())
    trace = ds.capture(model, ids(), layout="B T D").trace
    for found, true in zip(trace.residual.values, shown(model, ["0", "1", "2", "3"], ids()), strict=True):
        assert (torch.as_tensor(found[:, :, 0]) - true).abs().max() < 1e-6


class ListPassing(nn.Module):
    """A block of attention residuals that hands on a list of all sums so far, each of which later blocks hand on too."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = (nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, sums, x):
        for query, branch in zip(self.queries, (self.attn, self.mlp), strict=True):
            values = torch.stack(sums)
            weights = (values @ query).softmax(0)
            x = x + branch((weights[..., None] * values).sum(0))
            sums = [*sums, x]
        return sums, x


def test_a_sum_in_a_list_that_later_blocks_hand_on_is_named_after_its_own_branch():
    torch.manual_seed(0)
    model = nn.Module()
    model.embed, model.layers = nn.Embedding(20, WIDTH), nn.ModuleList(ListPassing() for _ in range(3))

    def forward(ids):
        x = model.embed(ids)
        sums = [x]
        for layer in model.layers:
            sums, x = layer(sums, x)
        return x

    model.forward = forward
    run = ds.capture(model, torch.randint(20, (2, 6)))
    names = [str(name) for name in run.trace["module"].values]
    assert names == ["embed", *(name for n in range(3) for name in (f"layers.{n}.attn", f"layers.{n}"))]


def test_states_are_compared_in_double_precision_whatever_the_default_is():
    count = 1536  # in bfloat16 the last of its indices is the count itself
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert int(spread(count, 64)[-1]) == count - 1
        assert int(spread(2**25, 64)[-1]) == 2**25 - 1
    finally:
        torch.set_default_dtype(torch.float32)


class MixedWithZeros(nn.Module):
    """Attention residuals in blocks of two, whose running sum begins with zeros and is mixed with what came before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.queries = nn.Parameter(torch.randn(5, WIDTH))
        self.blocks = nn.ModuleList(Block().mlp for _ in range(4))
        self.reads: list[torch.Tensor] = []

    def mix(self, query, sources):
        values = torch.stack(sources)
        share = torch.einsum("d,jbtd->jbt", query, nn.functional.rms_norm(values, (WIDTH,))).softmax(0)
        self.reads.append(torch.einsum("jbt,jbtd->btd", share, values))
        return self.reads[-1]

    def forward(self, ids):
        x = self.embed(ids)
        done, part, self.reads = [x], torch.zeros_like(x), []
        for number, (block, query) in enumerate(zip(self.blocks, self.queries, strict=False)):
            if number == 2:
                done, part = [*done, part], torch.zeros_like(x)
            part = part + block(self.mix(query, [*done, part]))
        return self.head(self.mix(self.queries[-1], [*done, part]))


def test_zeros_take_a_share_of_what_is_read():
    model = MixedWithZeros().eval()
    trace = ds.capture(model, ids()).trace
    model(ids())
    for found, read in zip(trace.branch_in.values, model.reads, strict=False):
        assert (torch.as_tensor(found) - read).abs().max() < 1e-5
    assert 0 < trace.depth_read.values[0, ..., 0].max() < 1  # the embedding's, next to zeros


class ReadsAllStates(nn.Module):
    """Plain blocks, of which each adds at once what it makes of its state and of all that earlier blocks gave."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.queries = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(3))
        self.keys = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        states = []
        for block, query, keys in zip(self.blocks, self.queries, self.keys, strict=True):
            asked, own = query(nn.functional.rms_norm(x, (WIDTH,))).chunk(2, -1)
            if states:
                key, value = keys(nn.functional.rms_norm(torch.stack(states, 2), (WIDTH,))).chunk(2, -1)
                share = (asked[:, :, None] * key).sum(-1).softmax(-1)
                own = own + (share[..., None] * value).sum(2)
            x = block(x + torch.tanh(own))
            states.append(x)
        return self.head(x)


def test_a_branch_may_read_all_earlier_states_at_once():
    model = ReadsAllStates().eval()
    run = ds.capture(model, ids())
    given = []
    for block in model.blocks:
        block.register_forward_hook(lambda *of: given.append(of[2].detach()))
    model(ids())
    assert run.attrs["proof"] == "proven"
    states = [torch.as_tensor(state[:, :, 0]) for state in run.trace.residual.values]
    assert all(min((state - after).abs().max() for state in states) < 1e-5 for after in given)


class FromNumbers(nn.Module):
    """The published streams of a library, which begin with a linear map of the input and not with an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        library = pytest.importorskip("hyper_connections")
        begin, self.expand, self.reduce = library.mc_get_init_and_expand_reduce_stream_functions(STREAMS)
        self.begin, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(begin(dim=WIDTH, branch=Block().mlp) for _ in range(4))
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter += 0.1 * torch.randn_like(parameter)

    def forward(self, x):
        x = self.expand(self.begin(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.reduce(x))


def test_streams_may_begin_with_a_linear_map():
    model = FromNumbers().eval()
    batch = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    run = ds.capture(model, batch)
    assert (run.attrs["proof"], run.attrs["n_streams"]) == ("proven", STREAMS)
    given = []
    for block in model.blocks:
        block.register_forward_hook(lambda *of: given.append(of[2].detach()))
    model(batch)
    ends = run.trace.residual.values[1:]
    for state, after in zip(ends, given, strict=True):
        streams = after.unflatten(0, (2, STREAMS)).transpose(1, 2)
        assert (torch.as_tensor(state) - streams).abs().max() < 1e-5


class PutTogether(nn.Module):
    """Blocks on a sequence that is put together in several ways, and a head on the last state or on a sum of all."""

    def __init__(self, way: str):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.embed, self.other = (
            way,
            nn.Embedding(40, WIDTH),
            nn.Parameter(torch.randn(1, 4, WIDTH)),
        )
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.weights = nn.Parameter(torch.rand(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def begin(self, ids):
        if self.way == "another library":
            return self.embed(torch.from_numpy(ids.numpy() + 0))
        x = self.embed(ids)
        if self.way == "parts of a buffer":
            whole = x.new_zeros(len(x), x.shape[1] + 4, WIDTH)
            whole[:, : x.shape[1]] = x
            whole[:, x.shape[1] :] = self.other.expand(len(x), -1, -1)
            return whole
        if self.way == "frames":  # each with a class token, of which the first frame's stays
            frames = torch.cat(
                [self.other[:, :1].expand(len(x) * 3, -1, -1), x.unflatten(1, (3, -1)).flatten(0, 1)], 1
            )
            first = frames.unflatten(0, (-1, 3))[:, 0, :1]
            return torch.cat([first, frames[:, 1:].unflatten(0, (-1, 3)).flatten(1, 2)], 1)
        return x

    def forward(self, ids):
        states = [self.begin(ids)]
        for block in self.blocks:
            states.append(block(states[-1]))
        last = states[-1]
        if self.way == "a sum for the head":
            last = sum(weight * state for weight, state in zip(self.weights, states, strict=True))
        return self.head(self.norm(last))


@pytest.mark.parametrize("way", ["another library", "parts of a buffer", "frames", "a sum for the head"])
def test_a_sequence_may_be_put_together_in_any_way(way):
    model = PutTogether(way).eval()
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    run = ds.capture(model, ids, gradients=True, loss=lambda output, _: output.square().mean())
    assert (run.attrs["proof"], run.trace.sizes["depth"]) == ("proven", 4)
    given = []
    for block in model.blocks:
        block.register_forward_hook(lambda *of: given.append(of[2]) or of[2].retain_grad())
    model(ids).square().mean().backward()
    for state, gradient, after in zip(
        run.trace.residual.values[1:], run.trace.gradient.values[1:], given, strict=True
    ):
        assert (torch.as_tensor(state[:, :, 0]) - after.detach()).abs().max() < 1e-5
        assert (torch.as_tensor(gradient[:, :, 0]) - after.grad).abs().max() < 1e-6
    said = [part["why"] for part in run.attrs.get("not_covered", ())]
    assert any("the head reads a weighted sum" in why for why in said) is (way == "a sum for the head")
