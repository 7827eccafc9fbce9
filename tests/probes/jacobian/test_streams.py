"""Full and frozen routing of stream connections against autograd, central differences and their formula."""

from __future__ import annotations

import pytest
import torch
import transformers
from hyper_connections import hyper_connections as free
from hyper_connections import hyper_connections_with_multi_branch_inputs as several
from hyper_connections import mHCv2 as second
from torch import nn
from torch.autograd.functional import jacobian as dense_jacobian

from depthscope import probes
from depthscope.probes.jacobian.operator import jacobian
from tests.probes.jacobian.dense import dense, own_blocks


def lucidrains_rows(model, x, first, last):
    for connection, branch in [pair for row in model.layers for pair in (row[:2], row[2:])][first:last]:
        read, add = connection(x)
        x = add(branch(read))
    return x


@pytest.mark.parametrize("family", ["hc", "mhc"])
def test_lucidrains_full_routing_against_autograd(models, ids, family):
    model = models["lucidrains"](family, closure=True, streams=2, width=8, layers=2)
    short = ids[:1, :3]
    state = lucidrains_rows(model, model.expand(model.embed(short)), 0, 1).detach()  # ((b n) t d)
    full = dense_jacobian(lambda x: lucidrains_rows(model, x, 1, 3), state)
    expected = full.permute(1, 0, 2, 4, 3, 5).reshape(48, 48).double()
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(
        dense(jacobian(model, short, start=1, stop=3, tokens="all")), expected, **close
    )
    own = dense(jacobian(model, short, start=1, stop=3))
    torch.testing.assert_close(own, own_blocks(expected, 16), **close)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("family", ["hc", "mhc"])
def test_lucidrains_frozen_routing_is_the_formula_with_constant_parts(models, ids, family, closure):
    model = models["lucidrains"](family, closure=closure, streams=2, width=8, layers=2)
    short = ids[:1, :3]
    trace = probes.capture(model, short).trace
    parts = [
        {name: torch.from_numpy(trace[name].values[i, 0]) for name in ("h_res", "h_pre", "h_post")}
        for i in (1, 2)
    ]
    row = [model.layers[0][1], model.layers[1][0]]
    branches = [model.layers[0][3], model.layers[1][1]] if closure else [c.branch for c in row]
    state = torch.from_numpy(trace.residual.values[1, 0])

    def frozen(x):  # (T, N, D)
        for part, branch in zip(parts, branches, strict=True):
            inner = branch(torch.einsum("tn,tnd->td", part["h_pre"], x)[None])[0]
            x = torch.einsum("toi,tid->tod", part["h_res"], x) + part["h_post"][..., None] * inner[:, None]
        return x

    expected = dense_jacobian(frozen, state).reshape(48, 48).double()
    op = jacobian(model, short, start=1, stop=3, tokens="all", routing="frozen")
    torch.testing.assert_close(dense(op), expected, atol=1e-5, rtol=1e-4)
    full = jacobian(model, short, start=1, stop=3, tokens="all")
    assert not torch.allclose(dense(full), expected, atol=1e-2)
    for connection in row:
        assert "width_connection" not in vars(connection)


def moved_deepseek(model, ids, start, stop, direction, size):
    """State at a block's end when the state before another block is moved, by plain hooks and no gradient."""
    seen = []
    layers = model.model.layers
    handles = [
        layers[start].register_forward_pre_hook(lambda m, args: (args[0] + size * direction, *args[1:])),
        layers[stop - 1].register_forward_hook(lambda m, args, output: seen.append(output)),
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen[0]


def test_deepseek_full_routing_against_central_differences(models, ids):
    model = models["deepseek"]()
    op = jacobian(model, ids, start=2, stop=6, tokens="all")  # depths are sublayers: from block 1 to the end
    generator = torch.Generator().manual_seed(0)
    v, u = (torch.randn(op.shape[0], generator=generator, dtype=torch.float64) for _ in range(2))
    direction = v.reshape(3, 11, 4, 64).float()
    ends = [moved_deepseek(model, ids, 1, 3, direction, size).double() for size in (1e-4, -1e-4)]
    difference = ((ends[0] - ends[1]) / 2e-4).flatten()
    pushed = op.matvec(v)
    assert (pushed - difference).norm() / difference.norm() < 1e-3
    assert float(u @ pushed) == pytest.approx(float(op.rmatvec(u) @ v), rel=1e-3)


@pytest.mark.parametrize("depth", [2, 3])
def test_deepseek_frozen_routing_is_the_formula_with_constant_parts(models, ids, depth):
    """X' = H_res X + H_post ⊗ F(H_pre · X), with the parts that capture proved and F run by hand."""
    model = models["deepseek"]()
    layer, kept = model.model.layers[1], {}
    handle = layer.register_forward_pre_hook(lambda m, a, k: kept.update(k), with_kwargs=True)
    batch = {"input_ids": ids, "use_cache": False}
    trace = probes.capture(model, batch, max_sequences=3).trace
    handle.remove()
    h_res, h_pre, h_post = (
        torch.from_numpy(trace[name].values[depth]).double() for name in ("h_res", "h_pre", "h_post")
    )
    x = torch.from_numpy(trace.residual.values[depth]).double()
    hashed = kept.pop("input_ids", None)

    def branch(read):
        if depth == 2:
            return layer.self_attn(layer.input_layernorm(read.float()), **kept)[0].double()
        return layer.mlp(layer.post_attention_layernorm(read.float()), input_ids=hashed).double()

    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    read, moved = (torch.einsum("btn,btnd->btd", h_pre, z) for z in (x, v))
    with torch.no_grad():
        ahead = (branch(read + 1e-4 * moved) - branch(read - 1e-4 * moved)) / 2e-4
    expected = torch.einsum("btoi,btid->btod", h_res, v) + h_post[..., None] * ahead[..., None, :]
    frozen = jacobian(model, batch, start=depth, stop=depth + 1, tokens="all", routing="frozen")
    pushed = frozen.matvec(v.flatten()).reshape(x.shape)
    assert (pushed - expected).norm() / expected.norm() < 1e-3
    full = jacobian(model, batch, start=depth, stop=depth + 1, tokens="all")
    assert (full.matvec(v.flatten()).reshape(x.shape) - expected).norm() / expected.norm() > 0.05


def test_freezing_moves_no_state(models, ids):
    for model in (models["deepseek"](), models["lucidrains"]("mhc")):
        full, frozen = (jacobian(model, ids, routing=routing) for routing in ("full", "frozen"))
        assert torch.equal(full._target.value, frozen._target.value)


def fractions(count):
    return lambda streams, **options: free.HyperConnections(streams, num_fracs=count, **options)


CONNECTIONS = {
    "mhc v2": lambda: second.mHC(4, dim=16, layer_index=1, branch=nn.Linear(16, 16)),
    "mhc v2 in fractions": lambda: second.mHC(
        4, dim=16, layer_index=1, num_fracs=2, branch=nn.Linear(16, 16)
    ),
    "hc in fractions": lambda: free.HyperConnections(
        4, dim=16, layer_index=1, num_fracs=2, branch=nn.Linear(16, 16)
    ),
    "two branch inputs": lambda: several.HyperConnections(
        4, dim=16, layer_index=1, num_branch_inputs=2, branch=nn.Linear(16, 16)
    ),
}


class Stack(nn.Module):
    def __init__(self, connection, merged: bool):
        super().__init__()
        self.embed, self.merged = nn.Embedding(64, 64), merged
        self.connections = nn.ModuleList(connection() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids).unflatten(-1, (4, 16))
        x = x.permute(0, 2, 1, 3).flatten(0, 1) if self.merged else x
        for connection in self.connections:
            x = connection(x)
        return x


@pytest.mark.parametrize("name", CONNECTIONS)
def test_frozen_routing_of_every_version_is_that_of_a_detached_norm(ids, name):
    """All weights of these connections come from their norm, so a detached norm freezes them and nothing else."""
    torch.manual_seed(0)
    model = Stack(CONNECTIONS[name], merged="v2" not in name).eval()
    for parameter_name, parameter in model.named_parameters():
        if any(word in parameter_name for word in ("alpha", "beta", "_scale")):
            nn.init.normal_(parameter, std=0.5)
    frozen = jacobian(model, ids, tokens="all", routing="frozen")
    v = torch.randn(frozen.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pushed = frozen.matvec(v)
    full = jacobian(model, ids, tokens="all").matvec(v)
    for connection in model.connections:
        connection.norm.register_forward_hook(lambda module, args, output: output.detach())
    expected = jacobian(model, ids, tokens="all").matvec(v)
    torch.testing.assert_close(pushed, expected, atol=1e-5, rtol=1e-4)
    assert (full - expected).norm() / expected.norm() > 1e-2


def test_frozen_routing_of_altup_is_that_of_detached_modalities(ids):
    config = transformers.Gemma3nTextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, intermediate_size=64,
        num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, laurel_rank=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextModel

    model = Gemma3nTextModel(config).eval()
    for layer in model.layers:
        for parameter in (
            *layer.altup.modality_router.parameters(),
            *layer.altup.prediction_coefs.parameters(),
        ):
            nn.init.normal_(parameter, std=0.5)
        nn.init.normal_(layer.altup.correct_output_scale, std=0.5)
    frozen = jacobian(model, {"input_ids": ids}, tokens="all", routing="frozen")
    v = torch.randn(frozen.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pushed = frozen.matvec(v)
    full = jacobian(model, {"input_ids": ids}, tokens="all").matvec(v)
    for layer in model.layers:
        own = layer.altup.compute_router_modalities
        layer.altup.compute_router_modalities = lambda x, own=own: own(x).detach()
    expected = jacobian(model, {"input_ids": ids}, tokens="all").matvec(v)
    torch.testing.assert_close(pushed, expected, atol=1e-4, rtol=1e-3)
    assert (full - expected).norm() / expected.norm() > 1e-2
