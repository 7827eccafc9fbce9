"""Small networks after public code that were misread once: each is compared with what hooks and autograd give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import depthscope as ds
from depthscope import LayoutError
from depthscope.probes.connections.proof import spread
from depthscope.probes.reading.graph import ReadingError

WIDTH, STREAMS = 16, 4


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    )


def states(run) -> list[tuple[str, int]]:
    trace = run["trace"]
    return list(zip(trace.site.values.tolist(), trace.layer.values.tolist(), strict=True))


def difference(found, true: torch.Tensor) -> float:
    found = torch.as_tensor(found).reshape(true.shape)
    return float((found - true).abs().max() / true.abs().max())


class Trunk(nn.Module):
    """An embedding, `step` as often as there are branches, and a head."""

    def __init__(self, depth: int = 3, head: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.branches = nn.Linear(5, WIDTH), nn.ModuleList(mlp() for _ in range(depth))
        self.head = head or nn.Linear(WIDTH, 3)
        self.passed: list[torch.Tensor] = []

    def forward(self, x):
        self.passed = [x := self.embed(x)]
        for number, branch in enumerate(self.branches):
            x = self.step(number, branch, x)
            self.passed.append(x)
        return self.head(x)

    def step(self, number, branch, x):
        return x + branch(x)


class FirstAgain(Trunk):
    """x = λ x + λ₀ x₀ before every block: what a block gives and what the next one reads are two states."""

    def __init__(self):
        super().__init__()
        self.keep, self.first = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))

    def step(self, number, branch, x):
        x = self.keep[number] * x + self.first[number] * self.passed[0]
        return x + branch(x)


def noted(model: nn.Module, batch) -> list[torch.Tensor]:
    """What a model notes in a forward of its own: a capture puts back what its forward noted."""
    with torch.no_grad():
        model(batch)
    return model.passed


def test_what_a_block_gives_is_a_state_next_to_the_mixture_that_the_next_one_reads():
    model, x = FirstAgain().eval(), torch.randn(2, 6, 5)
    run = ds.capture(model, x)
    assert run.attrs["proof"] == "proven"
    found = states(run)
    assert found[-3:] == [("post", 1), ("pre", 2), ("post", 2)]
    for number, passed in enumerate(noted(model, x)[1:]):
        assert difference(run["trace"].residual.values[found.index(("post", number))], passed) < 1e-6


class TakenOff(FirstAgain):
    """The head reads the last state less an earlier one: two values are alive all the time, and are no two streams."""

    def forward(self, x):
        super().forward(x)
        return self.head(self.passed[-1] - 0.2 * self.passed[2])


def test_a_value_that_waits_is_no_stream():
    run = ds.capture(TakenOff().eval(), torch.randn(2, 6, 5))
    assert (run.attrs["family"], run.attrs["proof"]) == ("depth_history", "proven")


class GatedReads(Trunk):
    """Each branch reads Σ sigmoid(q · norm(v)) v over the embedding and earlier outputs, and norms that."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(0.3 * torch.randn(4, WIDTH))

    def read(self, values, query):
        stack = torch.stack(values)
        gates = torch.einsum("d,sbtd->sbt", query, functional.rms_norm(stack, stack.shape[-1:])).sigmoid()
        return torch.einsum("sbt,sbtd->btd", gates, stack)

    def forward(self, x):
        values = [self.embed(x)]
        for query, branch in zip(self.queries, self.branches, strict=False):
            values.append(branch(self.read(values, query)))
        return self.head(functional.rms_norm(self.read(values, self.queries[-1]), (WIDTH,)))


def test_a_gate_before_the_norm_of_a_branch_is_a_weight_of_its_read():
    model, taken = GatedReads().eval(), []
    for branch in model.branches:
        branch[0].register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    trace = ds.capture(model, torch.randn(2, 6, 5))["trace"]
    for number, read in enumerate(taken[: len(model.branches)]):
        assert difference(trace.branch_in.values[number], read) < 1e-5
    assert 0 < float(trace.depth_read.values[0, ..., 0].max()) < 1


class LastOfOneToken(Trunk):
    """Tokens made of numbers by weights of their own; the last block goes on with the first token alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, WIDTH))
        self.embed = nn.Identity()
        self.attention = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))

    def forward(self, x):
        return super().forward(self.weight[None] * x[:, :, None])

    def step(self, number, branch, x):
        y, few = functional.layer_norm(x, (WIDTH,)), slice(0, 1 if number == 2 else 5)
        x = x[:, few] + self.attention[number](y[:, few], y, y, need_weights=False)[0]
        return x + branch(x)


def test_blocks_of_some_tokens_end_the_chain_before_and_are_said():
    model, x = LastOfOneToken().eval(), torch.randn(4, 5)
    run = ds.capture(model, x)
    assert run.attrs["proof"].startswith("unproven: ")
    trace = run["trace"]
    assert trace.sizes["token"] == 5
    last = next(depth for depth, of in enumerate(states(run)) if of == ("post", 1))
    assert difference(trace.residual.values[last], noted(model, x)[2]) < 1e-6


class OneBmm(nn.Module):
    """The matrices are made of the streams before they are put into another order, in which they are mixed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.branches = nn.ModuleList(mlp() for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(WIDTH, 12) for _ in range(2))

    def forward(self, x):
        self.first = streams = self.embed(x)[:, None].expand(-1, 3, -1, -1).clone()
        if streams.requires_grad:
            streams.retain_grad()
        for branch, maps in zip(self.branches, self.maps, strict=True):
            batch, _, tokens, _ = streams.shape
            weights = torch.tanh(maps(streams.mean(1))).view(batch * tokens, 4, 3) + 0.2
            mixed = torch.bmm(weights, streams.permute(0, 2, 1, 3).reshape(batch * tokens, 3, WIDTH))
            new = mixed[:, 1:] + branch(mixed[:, :1])
            streams = new.view(batch, tokens, 3, WIDTH).permute(0, 2, 1, 3)
        return self.head(streams.sum(1))


def test_the_gradient_of_a_state_comes_from_everything_that_reads_it():
    model, x = OneBmm().eval(), torch.randn(2, 6, 5)
    run = ds.capture(model, x, gradients=True, loss=lambda output, batch: output.square().mean())
    model(x).square().mean().backward()
    true = model.first.grad.permute(0, 2, 1, 3)
    assert difference(run["trace"].gradient.values[0], true) < 1e-5


class Encoder(nn.Module):
    """torch packs a padded batch into a nested tensor where nobody looks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.embed, self.encoder, self.head = (
            nn.Embedding(50, WIDTH),
            nn.TransformerEncoder(layer, 3),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, ids, mask):
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=mask))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_encoders_are_read_and_torch_is_left_as_it_was():
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 6:] = True
    batch = {"ids": torch.randint(0, 50, (2, 9)), "mask": mask}
    run = ds.capture(Encoder().eval(), batch)
    assert run.attrs["proof"] == "proven"
    assert run["trace"].sizes["depth"] >= 4
    loss = {"loss": lambda output, batch: output.square().mean((1, 2))}
    assert ds.interventions.ablate(Encoder().eval(), batch, "skip", **loss).loss_change.size >= 3
    assert torch.backends.mha.get_fastpath_enabled()


class Jagged(Trunk):
    def forward(self, x):
        nested = torch.nested.nested_tensor([self.embed(x[0]), self.embed(x[1][:4])], layout=torch.jagged)
        for branch in self.branches:
            nested = nested + branch[3](branch[2](branch[1](nested)))
        return self.head(torch.stack([of.mean(0) for of in nested.unbind()]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_and_a_training_goes_on():
    model, x = Jagged(), torch.randn(2, 6, 5)
    with pytest.raises(ReadingError, match="nested tensors"):
        ds.capture(model, x)
    with pytest.warns(match="nested tensors"), ds.record(model):
        model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.head.parameters())


# --- with what a memory begins and ends


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


# --- norms, and sequences that meet


class Norm(nn.Module):
    """A root mean square norm, whose gain comes first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + torch.rand(WIDTH))

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


class GainFirst(nn.Module):
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
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks, self.norm = nn.ModuleList(GainFirst(Norm()) for _ in range(3)), Norm()

    def forward(self, ids):
        h = self.embed(ids)[:, :, None].repeat(1, 1, STREAMS, 1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h.sum(2)))


def ids() -> torch.Tensor:
    return torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))


def test_a_norm_may_have_its_gain_before_its_division():
    model = StreamNetwork().eval()
    run = ds.capture(model, ids())
    assert run.attrs["proof"] == "proven"
    for number, block in enumerate(model.blocks):
        found = torch.as_tensor(run.trace["h_pre"].values[number])
        assert (found - block.h_pre.detach()).abs().max() < 1e-5
    assert "final" in run.trace


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


def test_states_are_compared_in_double_precision_whatever_the_default_is():
    count = 1536  # in bfloat16 the last of its indices is the count itself
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert int(spread(count, 64)[-1]) == count - 1
        assert int(spread(2**25, 64)[-1]) == 2**25 - 1
    finally:
        torch.set_default_dtype(torch.float32)


class Latents(Trunk):
    """Learned latents, once for each sequence, to which what they read of it is added."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x):
        context, x = self.embed(x), self.latents[None].repeat(len(x), 1, 1)
        self.passed = [x]
        for branch in self.branches:
            read = functional.scaled_dot_product_attention(x, context, context)
            self.passed.append(x := x + branch(read))
        return self.head(x)


class Interleaved(Trunk):
    """Tokens of three kinds that are written into zeros one after the other."""

    def forward(self, x):
        tokens = torch.zeros(len(x), 2 * x.shape[1], WIDTH)
        for kind, of in enumerate((self.embed(x)[:, ::3], self.embed(-x), self.embed(x.exp())[:, ::2])):
            tokens[:, kind * 2 : kind * 2 + of.shape[1]] = of
        self.passed = [tokens]
        for branch in self.branches:
            self.passed.append(self.passed[-1] + branch(self.passed[-1]))
        return self.head(self.passed[-1])


class ByHand(nn.Module):
    """A norm in single operations."""

    def forward(self, x):
        return x / (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5).clamp(min=1e-8)


class Listed(nn.Module):
    """A whole trunk is a numbered module, and ends with a norm in single operations: what it gives is no state."""

    def __init__(self):
        super().__init__()
        self.trunks = nn.ModuleList([Trunk(head=ByHand())])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        y = self.trunks[0](x)
        self.passed = self.trunks[0].passed
        return self.head(y)


class NormedFirst(Trunk):
    """A block norms its state and adds to that: the first state is what the first block takes, before the norm."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(Normed() for _ in range(3))

    def step(self, number, branch, x):
        return branch(x)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), mlp()

    def forward(self, x):
        x = self.norm(x)
        return x + self.branch(x)


@pytest.mark.parametrize(
    "model", [Latents(), Interleaved(), Listed(), NormedFirst()], ids=lambda model: type(model).__name__
)
def test_the_states_of_a_trunk_are_neither_more_nor_fewer(model):
    x = torch.randn(2, 6, 5)
    run, passed = ds.capture(model.eval(), x), noted(model, x)
    assert run.attrs["proof"] == "proven"
    assert run["trace"].sizes["depth"] == len(passed)
    assert max(map(difference, run["trace"].residual.values, passed)) < 1e-5


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_a_layer_that_makes_the_embedding_is_no_block_of_the_same_sequential():
    layers = [nn.Linear(5, WIDTH), *(Residual(*mlp()) for _ in range(3)), nn.LayerNorm(WIDTH)]
    run = ds.capture(nn.Sequential(*layers).eval(), torch.randn(2, 6, 5))
    assert run["trace"].site.values.tolist() == ["embed", "post", "post", "post"]
