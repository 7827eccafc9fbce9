"""With what a memory begins and ends, in small networks after public code that were once misread, refused or crashed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import depthscope as ds
from depthscope.probes.model.layout import LayoutError
from tests.probes.reading.test_once_misread import WIDTH, Trunk, difference, mlp


class Streams(Trunk):
    """n streams as tensors in a list, which static weights read, mix and write; ``start`` says how they begin."""

    def __init__(self, start: str):
        super().__init__(head=nn.Linear(WIDTH, 3))
        self.start, n = start, 3
        self.starts = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(n))
        self.mix = nn.Parameter(torch.eye(n) + 0.1 * torch.randn(3, n, n))
        self.read, self.write = nn.Parameter(torch.rand(3, n)), nn.Parameter(torch.rand(3, n))

    def first(self, x):
        if self.start == "projections in a list":
            return [project(x) for project in self.starts]
        one, n = self.embed(x), len(self.starts)
        if self.start == "a stack of one":
            return torch.stack([one] * n, -2).unbind(-2)
        return one.unsqueeze(-2).repeat_interleave(n, -2).unbind(-2)

    def forward(self, x):
        streams = self.first(x)
        self.passed = [torch.stack(list(streams), -2)]
        for number, branch in enumerate(self.branches):
            out = branch(sum(w * s for w, s in zip(self.read[number], streams, strict=True)))
            streams = [
                sum(m * s for m, s in zip(row, streams, strict=True)) + w * out
                for row, w in zip(self.mix[number], self.write[number], strict=True)
            ]
            self.passed.append(torch.stack(streams, -2))
        return self.head(sum(streams))


@pytest.mark.parametrize("start", ["projections in a list", "a stack of one", "repeated"])
@pytest.mark.parametrize("shape", [(2, 6, 5), (7, 5)], ids=["tokens", "rows"])
def test_streams_in_a_list_are_read_however_they_begin(start, shape):
    model, x = Streams(start).eval(), torch.randn(*shape)
    run = ds.capture(model, x, max_sequences=16)
    assert run.attrs["proof"] == "proven"
    for found, passed in zip(run.trace.residual.values, model.passed, strict=True):
        assert difference(found, passed.detach()) < 1e-6
    for found, true in zip(run.trace.h_res.values, model.mix, strict=True):
        assert difference(found[0, 0], true.detach()) < 1e-5


class Turned(Trunk):
    """Four streams along the first axis, or in a list, mixed each time by an operation that no matrix product is."""

    def __init__(self, how: str, takes: slice = slice(None)):
        super().__init__()
        self.how, self.takes = how, takes
        self.starts = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(4))
        self.angles, self.kernels = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(3, 1, 1, 3))

    def mixed(self, number, streams):
        """The streams of (4, …), mixed."""
        angles, kernel = self.angles[number], self.kernels[number]
        if self.how == "solved":
            skew = torch.diag(angles[:3], 1) - torch.diag(angles[:3], -1)
            both = torch.eye(4) + skew, torch.eye(4) - skew
            return torch.linalg.solve(both[0], both[1] @ streams.flatten(1)).view_as(streams)
        if self.how == "convolved":
            along = functional.conv1d(streams.movedim(0, -1).reshape(-1, 1, 4), kernel, padding=1)
            return along.view(*streams.shape[1:], 4).movedim(-1, 0)
        if self.how == "summed up":
            return streams + 0.1 * streams.cumsum(0)
        if self.how == "on two axes":  # as a square of streams
            square = angles[0] * streams.view(2, 2, *streams.shape[1:])
            return (square + angles[1] * square.flip(0) + angles[2] * square.flip(1)).view_as(streams)
        turned = list(streams)  # pairs are rotated in turn, in the list itself
        for angle, (p, q) in zip(angles, ((0, 1), (2, 3), (1, 2), (3, 0)), strict=True):
            cos, sin = angle.cos(), angle.sin()
            turned[p], turned[q] = cos * turned[p] - sin * turned[q], sin * turned[p] + cos * turned[q]
        return turned

    def forward(self, x):
        streams = [start(x) for start in self.starts]
        streams = (
            [streams[0] * scale for scale in self.angles[0]]
            if self.how == "rotated"
            else torch.stack(streams)
        )
        self.passed = [torch.stack([*streams], -2)]
        for number, branch in enumerate(self.branches):
            out = branch(streams[0] + streams[1] + streams[2] + streams[3])
            streams = self.mixed(number, streams)
            streams = [*streams[:3], streams[3] + out] if self.how == "rotated" else streams + out
            self.passed.append(torch.stack([*streams], -2))
        return self.head(sum(streams[self.takes]))


@pytest.mark.parametrize("how", ["solved", "convolved", "summed up", "on two axes", "rotated"])
@pytest.mark.parametrize("takes", [slice(None), slice(3, None)], ids=["sum", "one"])
def test_streams_are_mixed_by_any_operation_that_mixes_nothing_else(how, takes):
    run = ds.capture(model := Turned(how, takes).eval(), torch.randn(2, 6, 5))
    assert run.attrs["proof"] == "proven"
    for found, passed in zip(run.trace.residual.values, model.passed, strict=True):
        assert difference(found, passed.detach()) < 1e-6
    for number, found in enumerate(run.trace.h_res.values):
        unit = torch.eye(4)[..., None]
        true = torch.stack([*model.mixed(number, unit)])[..., 0]
        assert difference(found[0, 0], true.detach()) < 1e-5


class Rolled(Trunk):
    """A circulant H_res: Σ c_k roll(X, k), which has no weights but the c_k."""

    def __init__(self):
        super().__init__()
        self.starts = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(4))
        self.shares, self.read = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.rand(3, 4, 1))

    def forward(self, x):
        streams = torch.stack([start(x) for start in self.starts], 2)
        for branch, shares, read in zip(self.branches, self.shares.softmax(-1), self.read, strict=True):
            mixed = sum(share * torch.roll(streams, k, 2) for k, share in enumerate(shares))
            streams = mixed + branch((read * streams).sum(2)).unsqueeze(2)
        return self.head(streams.mean(2))


def test_what_only_moves_streams_is_no_branch():
    run = ds.capture(model := Rolled().eval(), torch.randn(2, 6, 5))
    assert run.attrs["proof"] == "proven"
    assert run.trace.sizes["stream"] == 4
    row = model.shares.softmax(-1)[0].detach()
    assert difference(run.trace.h_res.values[0, 0, 0, 0], row[[0, 3, 2, 1]]) < 1e-5


class Diffusion(Trunk):
    """A DiT: patches by a convolution, and a condition whose projections scale, shift and gate every branch."""

    def __init__(self):
        super().__init__()
        self.patches, self.label = nn.Conv2d(4, WIDTH, 2, 2), nn.Embedding(7, WIDTH)
        self.modulations = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))

    def forward(self, image, label):
        x = self.patches(image).flatten(2).transpose(1, 2)
        self.passed = [x]
        for branch, modulation in zip(self.branches, self.modulations, strict=True):
            scale, shift, gate = modulation(functional.silu(self.label(label)))[:, None].chunk(3, -1)
            x = x + gate * branch(functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)
            self.passed.append(x)
        return self.head(x)


def test_an_image_that_a_convolution_made_is_no_spread_of_itself():
    model = Diffusion().eval()
    run = ds.capture(model, (torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])))
    assert run.attrs["proof"] == "proven"
    for found, passed in zip(run.trace.residual.values, model.passed, strict=True):
        assert difference(found, passed.detach()) < 1e-6


class Pairs(nn.Module):
    """A track of tokens and one of their pairs, which begins with a sum of rows and columns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.single, self.rows, self.columns = (nn.Embedding(9, WIDTH) for _ in range(3))
        self.of_pairs, self.of_tokens = (nn.ModuleList(mlp() for _ in range(3)) for _ in range(2))
        self.bias, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, ids):
        s, z = self.single(ids), self.rows(ids)[:, :, None] + self.columns(ids)[:, None]
        for pairs, tokens in zip(self.of_pairs, self.of_tokens, strict=True):
            z = z + pairs(z)
            s = s + self.bias(z).squeeze(-1).softmax(-1) @ tokens(s)
        return self.head(s), self.head(z + z.transpose(1, 2))


def test_pairs_of_tokens_are_a_state_of_their_own():
    run = ds.capture(Pairs().eval(), torch.randint(0, 9, (2, 7)))
    assert sorted(of.residual.shape for of in run["trace"].children.values()) == [
        (4, 2, 7, 1, WIDTH),
        (4, 2, 49, 1, WIDTH),
    ]


class Reversible(Trunk):
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁): at the end y₁ has been read by G."""

    def forward(self, x):
        x = torch.cat([self.embed(x)] * 2, -1)
        for first, second in zip(self.branches[:3], self.branches[3:], strict=True):
            a, b = x.chunk(2, -1)
            a = a + first(b)
            x = torch.cat([a, b + second(a)], -1)
        return self.head(x)

    def __init__(self):
        super().__init__(6, nn.Linear(2 * WIDTH, 3))


def test_a_stream_that_was_read_before_its_state_was_complete_has_no_gradient():
    run = ds.capture(
        Reversible().eval(), torch.randn(2, 6, 5), gradients=True, loss=lambda out, _: out.square().mean()
    )
    assert run.trace.sizes["stream"] == 2
    assert torch.as_tensor(run.trace.gradient.values[-1]).isnan().all()
    assert any("autograd gives one sum of both" in str(of) for of in run.attrs["not_covered"])


class LastMixture(Trunk):
    """Attention over depth of which the head reads the last mixture and the last output, and not a mixture of all."""

    def __init__(self, norm: str):
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(3, WIDTH)), norm

    def forward(self, x):
        values = [self.embed(x)]
        for query, branch in zip(self.queries, self.branches, strict=True):
            stack = torch.stack(values, 2)
            h = ((stack * query).sum(-1).softmax(-1).unsqueeze(-1) * stack).sum(2)
            if self.norm == "by a norm":
                taken = h / (h.norm(dim=-1, keepdim=True) / WIDTH**0.5)
            else:
                taken = h / h.abs().mean(-1, keepdim=True)
            values.append(branch(taken))
        return self.head(h + values[-1])


@pytest.mark.parametrize("norm", ["by a norm", "by a mean"])
def test_a_history_ends_with_the_last_sum_and_a_norm_is_no_weight_of_a_read(norm):
    run = ds.capture(LastMixture(norm).eval(), torch.randn(2, 6, 5))
    assert run.attrs["proof"] == "proven"
    assert run.attrs["family"] == "depth_attention"
    assert difference(run.trace.depth_read.sum("source").values, torch.ones(3, 2, 6)) < 1e-5


class Queries(Trunk):
    """A decoder after DETR: its state begins with zeros, goes through norms, and attends to what the encoder gives."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.decoder = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x):
        for branch in self.branches:
            x = (seen := self.embed(x) if x.shape[-1] == 5 else x) + branch(seen)
        state = torch.zeros(len(x), 4, WIDTH)
        for norm, layer in zip(self.norms, self.decoder, strict=True):
            scores = ((state + self.queries) @ x.mT).softmax(-1)
            state = norm(state + layer(scores @ x))
        return self.head(state)


def test_a_decoder_that_begins_with_zeros_is_a_tower():
    run = ds.capture(Queries().eval(), torch.randn(2, 6, 5))
    assert run.attrs["proof"] == "proven"
    assert sorted(of.sizes["token"] for of in run["trace"].children.values()) == [4, 6]


class Packed(Trunk):
    """Attention over all rows, as of the patches of several images in one axis."""

    def step(self, number, branch, x):
        return x + (x @ x.mT).softmax(-1) @ branch(x)


def test_packed_tokens_are_refused_unless_they_are_said_to_be_of_one_sequence():
    model, rows = Packed().eval(), torch.randn(12, 5)
    with pytest.raises(LayoutError, match="layout='T D'"):
        ds.capture(model, rows)
    run = ds.capture(model, rows, layout="T D")
    assert run.trace.residual.shape == (4, 1, 12, 1, WIDTH)
    assert run.attrs["proof"] == "proven"
    assert difference(run.trace.residual.values[-1], model.passed[-1].detach()) < 1e-6


class Mixer(nn.Module):
    """Attention over the sums that were put aside and the running one."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH))

    def forward(self, aside, running):
        stack = torch.stack([*aside, running], 2)
        return ((stack * self.query).sum(-1).softmax(-1).unsqueeze(-1) * stack).sum(2)


class RunningBlock(nn.Module):
    """Reads the mixture, and gives the running sum alone, which begins anew with some blocks."""

    def __init__(self, begins: bool):
        super().__init__()
        self.mixer, self.branch, self.begins = Mixer(), mlp(), begins

    def forward(self, running, aside):
        out = self.branch(self.mixer(aside, running))
        return out if self.begins else running + out


class RunningSums(nn.Module):
    """Block-wise attention residuals whose embedding ends with a norm that has gains, as inkling2's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(5, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        self.blocks = nn.ModuleList(RunningBlock(number % 2 == 0) for number in range(4))
        self.last, self.passed = Mixer(), []

    def forward(self, x):
        running, aside, self.passed = self.norm(self.embed(x)), [], []
        for block in self.blocks:
            after = block(running, aside)
            aside, running = [*aside, running] if block.begins else aside, after
            self.passed.append(running)
        return self.head(self.last(aside, running))


def test_a_running_sum_that_a_block_gives_is_a_state_and_a_mixture_has_the_name_of_what_makes_it():
    run = ds.capture(model := RunningSums().eval(), torch.randn(2, 6, 5))
    assert run.attrs["proof"] == "proven"
    assert (
        float(run.trace.depth_read.sum("source").min()) > 1 - 1e-5
    )  # of a running sum each output has its weight
    module, site = run.trace.module.values.tolist(), run.trace.site.values.tolist()
    for number in (1, 3):
        at = [n for n, of in enumerate(zip(module, site, strict=True)) if of == (f"blocks.{number}", "post")]
        assert len(at) == 1
        assert difference(run.trace.residual.values[at[0]], model.passed[number].detach()) < 1e-6
    assert {"blocks.1.mixer", "blocks.2.mixer", "last"} <= set(module)


class OneNumber(nn.Module):
    """A network of series with one number, or three, in each step."""

    def __init__(self, given: int, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(given, width), nn.Linear(width, given)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(3)
        )
        self.passed: list[torch.Tensor] = []

    def forward(self, x):
        x = self.embed(x)
        self.passed = [x]
        for block in self.blocks:
            x = x + block(x)
            self.passed.append(x)
        return self.head(x)


@pytest.mark.parametrize("width", [8, 40, 96])
@pytest.mark.parametrize("given", [1, 3])
def test_features_of_one_number_a_step_are_features(given, width):
    run = ds.capture(model := OneNumber(given, width), torch.randn(3, 12, given))
    assert run.attrs["proof"] == "proven"
    states = torch.stack([state.detach() for state in model.passed]).unsqueeze(-2)
    assert difference(run.trace.residual.values, states) < 1e-6


class Crossed(nn.Module):
    """A cross network: the first value times one number of each row, or of each feature, is added to what there is."""

    def __init__(self, *, of_each: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, 4), nn.Linear(24, 1)
        self.layers = nn.ModuleList(nn.Linear(24, 24 if of_each else 1) for _ in range(3))

    def states(self, ids):
        first = state = self.embed(ids).flatten(1)
        yield state
        for layer in self.layers:
            state = state + first * layer(state)
            yield state

    def forward(self, ids):
        return self.head([*self.states(ids)][-1])


@pytest.mark.parametrize("of_each", [True, False])
def test_a_first_value_that_is_added_again_by_what_came_of_it_is_a_branch(of_each):
    model = Crossed(of_each=of_each).eval()
    ids = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    run = ds.capture(model, ids)
    assert run.attrs["proof"] == "proven"
    for found, state in zip(run.trace.residual.values, model.states(ids), strict=True):
        assert (torch.as_tensor(found[:, 0, 0]) - state.detach()).abs().max() < 1e-6
