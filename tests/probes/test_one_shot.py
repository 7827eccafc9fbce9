"""What is captured is what the model computed, forward and backward."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.diagnostics import schema
from tests.models.plain_stack import Stack


def square(output, batch):
    return output.square().mean()


@pytest.fixture(scope="module")
def llama_run(models, text_batch):
    model = models["llama"]()
    return model, probes.capture(model, text_batch, gradients=True)


def test_states_equal_the_hidden_states_of_transformers_bit_for_bit(llama_run, text_batch):
    model, run = llama_run
    hidden = model(**text_batch, output_hidden_states=True).hidden_states
    captured = run.trace.residual.values[..., 0, :]
    for depth in range(3):  # the last hidden state of transformers is behind the norm
        np.testing.assert_array_equal(captured[depth], hidden[depth].detach().numpy())
    np.testing.assert_array_equal(
        model.model.norm(torch.from_numpy(captured[3])).detach(), hidden[3].detach().numpy()
    )


def test_gradients_equal_autograd(llama_run, text_batch):
    model, run = llama_run
    output = model(**text_batch, output_hidden_states=True)
    expected = torch.autograd.grad(output.loss, output.hidden_states[:3])
    for depth, gradient in enumerate(expected):
        np.testing.assert_array_equal(run.trace.gradient.values[depth, :, :, 0], gradient.numpy())
    assert np.isfinite(run.trace.gradient.values[3]).all()


def test_depths_are_named(llama_run):
    _, run = llama_run
    assert list(run.trace.layer.values) == [-1, 0, 1, 2]
    assert list(run.trace.site.values) == ["embed", "post", "post", "post"]
    assert list(run.trace.module.values) == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3))]
    assert run.attrs["family"] == "residual"
    assert run.attrs["orientation"] == "not_applicable"


def test_deepseek_parts_give_the_next_states_by_hand(models, text_batch):
    model = models["deepseek"]()
    run = probes.capture(model, text_batch, gradients=True)
    trace = run.trace
    seen = {}
    layer = model.model.layers[1]
    handles = [
        layer.attn_hc.register_forward_hook(lambda m, a, o: seen.update(x=a[0], hc=o)),
        layer.self_attn.register_forward_hook(lambda m, a, o: seen.update(f=o[0])),
        layer.ffn_hc.register_forward_pre_hook(lambda m, a: seen.update(next=a[0])),
    ]
    model(**text_batch)
    for handle in handles:
        handle.remove()
    post, comb, collapsed = seen["hc"]
    number = 2  # layer 1, attention
    np.testing.assert_array_equal(trace.residual.values[2], seen["x"].detach().numpy())
    np.testing.assert_array_equal(trace.h_res.values[number], comb.mT.detach().numpy())
    np.testing.assert_array_equal(trace.h_post.values[number], post.detach().numpy())
    np.testing.assert_array_equal(trace.branch_in.values[number], collapsed.detach().numpy())
    np.testing.assert_array_equal(trace.branch_out.values[number], seen["f"].detach().numpy())
    read = np.einsum("btn,btnd->btd", trace.h_pre.values[number], trace.residual.values[2])
    np.testing.assert_allclose(read, collapsed.detach().numpy(), rtol=1e-5, atol=1e-6)
    again = np.einsum("btoi,btid->btod", trace.h_res.values[number], trace.residual.values[2])
    again += trace.h_post.values[number][..., None] * trace.branch_out.values[number][:, :, None]
    np.testing.assert_allclose(again, seen["next"].detach().numpy(), rtol=1e-4, atol=1e-5)
    assert run.attrs["orientation"] == "destination_source"
    assert run.attrs["family"] == "mhc"
    assert run.attrs["reconstruction_error"] < 1e-6
    assert list(trace.branch.values) == ["attn", "mlp"] * 3
    assert list(trace.site.values) == ["embed"] + ["mid", "post"] * 3


def test_deepseek_gradients_equal_autograd(models, text_batch):
    model = models["deepseek"]()
    run = probes.capture(model, text_batch, gradients=True)
    states = []
    handles = [
        module.register_forward_pre_hook(lambda m, a: states.append(a[0]))
        for layer in model.model.layers
        for module in (layer.attn_hc, layer.ffn_hc)
    ]
    loss = model(**text_batch).loss
    expected = torch.autograd.grad(loss, states)
    for handle in handles:
        handle.remove()
    for depth, gradient in enumerate(expected):
        np.testing.assert_allclose(run.trace.gradient.values[depth], gradient.numpy(), rtol=1e-6, atol=1e-9)


def test_a_fresh_deepseek_is_ambiguous_only_where_it_must_be(models, text_batch):
    """With base = 0 the matrices of a fresh model are uniform up to the small dynamic part."""
    model = models["deepseek"](fresh=True)
    for name, parameter in model.named_parameters():
        if "_hc." in name:
            nn.init.zeros_(parameter)
    run = probes.capture(model, text_batch)
    assert run.attrs["orientation"] == "destination_source"
    np.testing.assert_allclose(run.trace.h_res.values, 0.25, atol=1e-5)


def test_lucidrains_alpha_by_hand(models, ids):
    """H_res equals the formula of the free connections: static + scale · tanh(normed @ dynamic)."""
    model = models["lucidrains"]("hc")
    run = probes.capture(model, ids)
    module = model.layers[1][0]
    x = torch.from_numpy(run.trace.residual.values[2])
    alpha = (
        torch.tanh(module.norm(x) @ module.dynamic_alpha_fn) * module.dynamic_alpha_scale
        + module.static_alpha
    )
    beta = (
        torch.tanh(module.norm(x) @ module.dynamic_beta_fn) * module.dynamic_beta_scale + module.static_beta
    )
    np.testing.assert_allclose(run.trace.h_res.values[2], alpha[..., 1:].mT.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.trace.h_pre.values[2], alpha[..., 0].detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.trace.h_post.values[2], beta.detach(), rtol=1e-5, atol=1e-6)


def test_the_same_model_without_streams_is_a_plain_chain(models, ids):
    run = probes.capture(models["lucidrains"]("residual"), ids)
    assert run.attrs["family"] == "residual"
    assert run.trace.sizes["depth"] == 7
    assert list(run.trace.site.values) == ["embed"] + ["mid", "post"] * 3
    assert "connection" not in run.trace.dims


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_proven_with_the_matrix_that_is_applied(models, text_batch, dtype):
    model = models["deepseek"]().to(dtype)
    run = probes.capture(model, text_batch)
    assert run.attrs["dtype"] == str(dtype).removeprefix("torch.")
    assert run.attrs["reconstruction_error"] < 5e-3
    assert run.attrs["orientation"] == "destination_source"
    applied = torch.from_numpy(run.trace.h_res.values)
    assert torch.equal(applied, applied.to(dtype).float())


class Streamlike(nn.Module):
    """Streams without a connection module: must be refused, never taken for a plain model."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, 4, -1)
        for block in self.blocks:
            x = block(x)
        return x


def test_unknown_streams_are_refused_with_the_override(ids):
    with pytest.raises(probes.LayoutError, match=r"layout='B T N D'"):
        probes.capture(Streamlike(), ids)


def test_layout_and_layers_override(ids):
    run = probes.capture(Streamlike(), ids, layout="B T N D", layers="blocks.{i}")
    assert run.trace.residual.shape == (4, 3, 11, 4, 16)
    assert run.attrs["n_streams"] == 4


class Gated(nn.Module):
    """Per-feature read gates on merged streams, as in Qwen4-exp: one module gives (branch input, streams, write gates)."""

    def __init__(self):
        super().__init__()
        self.read = nn.Parameter(torch.randn(4, 16))
        self.write = nn.Parameter(torch.randn(4))

    def forward(self, x):
        streams = x.unflatten(-1, (4, 16))
        return (self.read * streams).sum(-2), x, self.write.expand(*x.shape[:-1], 4)


class GatedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.ffn = Gated(), nn.Linear(16, 16)

    def forward(self, x):
        read, streams, write = self.gate(x)
        return streams + (write.unsqueeze(-1) * self.ffn(read).unsqueeze(-2)).flatten(-2)


def test_gated_streams_are_read_without_a_scalar_h_pre(ids):
    model = Stack([GatedBlock() for _ in range(3)], nn.Embedding(64, 64))
    run = probes.capture(model, ids)
    trace = run["trace"].to_dataset()
    assert run.attrs["family"] == "gated"
    assert run.attrs["layout"] == "B T (N D)"
    assert run.attrs["reconstruction_error"] < 1e-6
    assert "h_pre" not in trace
    np.testing.assert_array_equal(trace.residual.values[-1].reshape(3, 11, 64), model(ids).detach().numpy())
    written = model.blocks[1].gate.write.detach().numpy()
    np.testing.assert_allclose(trace.h_post.values[1, 0, 0], written, rtol=1e-6)
    why = run["coverage"].to_dataset().to_dataframe().set_index("place_name").why
    assert "gates per feature" in why["blocks.0.mlp.h_pre"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("model.layer.{i}", r"names no module; closest: "),
        (
            ["model.layers.0", "model.layers.9"],
            r"no module 'model.layers.9' in the model; closest: 'model.layers",
        ),
        ([3], r"expected module paths"),
    ],
)
def test_wrong_layers_are_named(models, text_batch, layers, message):
    with pytest.raises(ValueError, match=message):
        probes.capture(models["llama"](), text_batch, layers=layers)


@pytest.mark.parametrize(
    "layers", ["model.layers", "model.layers.{i}", ["model.layers.0", "model.layers.1", "model.layers.2"]]
)
def test_named_layers_give_the_found_chain(models, text_batch, layers):
    model = models["llama"]()
    found, named = (
        probes.capture(model, text_batch),
        probes.capture(model, text_batch, layers=layers),
    )
    np.testing.assert_array_equal(found.trace.residual.values, named.trace.residual.values)


class OutsideSkips(nn.Module):
    """Blocks that are branches; the skip is in the model's own forward, so no call links to the next."""

    def __init__(self, head: bool):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16) if head else None

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x if self.norm is None else self.norm(x)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("layers", ["blocks.{i}", "blocks", ["blocks.0", "blocks.1", "blocks.2"]])
def test_named_blocks_need_not_link(ids, layers, head):
    model = OutsideSkips(head)
    run = probes.capture(model, ids, layers=layers, gradients=True, loss=square)
    states = [model.embed(ids)]
    for block in model.blocks:
        states.append(states[-1] + block(states[-1]))
    assert run.trace.sizes["depth"] == 4
    for depth, captured in enumerate(run.trace.residual.values[..., 0, :]):
        np.testing.assert_array_equal(captured, states[depth].detach().numpy())


def test_no_chain_is_an_error_with_the_override(ids):
    with pytest.raises(probes.ChainError, match="layers="):
        probes.capture(nn.Embedding(64, 8), ids)


class AttentionOverDepth(nn.Module):
    """Patches of an image; every layer attends to what all before it gave, by projected values: no sum carries a state."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Sequential(nn.Flatten(2), nn.LayerNorm(64), nn.Linear(64, 16), nn.LayerNorm(16))
        self.depth = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(16, 16), nn.GELU()]) for _ in range(3))

    def forward(self, image):
        states = [self.patch(image)]
        for linear, activation in self.layers:
            every = torch.stack(states, 2).flatten(0, 1)
            read, _ = self.depth(every[:, -1:], every, every)
            states.append(activation(linear(read.view(states[0].shape))))
        return states[-1].mean(1)


def test_without_a_state_the_error_says_why_and_names_modules_that_have_some():
    image = torch.randn(2, 3, 8, 8)
    with pytest.raises(probes.ChainError, match=r"name the modules .* layers='layers\.\{i\}\.\{i\}'"):
        probes.describe(AttentionOverDepth(), image)
    found = str(probes.describe(AttentionOverDepth(), image, layers="layers.{i}.{i}"))
    assert "unproven: the states are asserted by layers=" in found


def test_nothing_of_a_graph_outlives_a_capture_with_gradients(models, text_batch):
    model, given = models["llama"](), []
    for module in model.modules():
        module.register_forward_hook(
            lambda module, args, output: (
                given.append(weakref.ref(output)) if isinstance(output, torch.Tensor) else None
            )
        )
    run = probes.capture(model, text_batch, gradients=True)
    gc.collect()

    assert len(given) > 40
    assert run.trace.gradient.notnull().all()
    assert [each() for each in given if each() is not None] == []


def test_gradients_need_a_loss(models, ids):
    with pytest.raises(probes.CaptureError, match=r"add labels to the batch, or pass loss="):
        probes.capture(models["llama"](), {"input_ids": ids}, gradients=True)
    with pytest.raises(probes.CaptureError, match="no batch was given"):
        probes.capture(models["llama"](), [])


def test_a_frozen_model_gives_gradients_and_stays_frozen(models, text_batch):
    model = models["llama"]()
    free = probes.capture(model, text_batch, gradients=True)
    model.requires_grad_(False)
    frozen = probes.capture(model, text_batch, gradients=True)
    np.testing.assert_array_equal(free.trace.gradient.values, frozen.trace.gradient.values)
    assert not any(p.requires_grad for p in model.parameters())


class InPlace(nn.Module):
    """A model that writes into its last state after the chain has passed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        kept = x.clone()
        x.mul_(0.0)
        return kept


def test_a_state_rewritten_in_place_is_never_kept_with_the_wrong_value(ids):
    model = InPlace()
    with probes.record(model) as recorder:
        expected = model(ids)
        recorder.step()
    assert not recorder.errors
    for run in (recorder.run, probes.capture(model, ids)):
        np.testing.assert_array_equal(run.trace.residual.values[-1, :, :, 0], expected.detach().numpy())


def test_two_stacks_are_two_chains(text_batch):
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    run = probes.capture(transformers.T5ForConditionalGeneration(config).eval(), text_batch, gradients=True)
    assert schema.chains(run) == ["encoder", "decoder"]
    encoder = schema.chain_dataset(run, "trace", "encoder")
    assert int(encoder.mask.sum()) == int(text_batch["attention_mask"].sum())
    assert np.abs(encoder.gradient.values[0]).max() > 0


def test_widths_that_change_become_stages():
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    run = probes.capture(model, batch, gradients=True)
    assert schema.chains(run) == ["stage0", "stage1"]
    widths = [schema.chain_dataset(run, "trace", name).sizes["feature"] for name in schema.chains(run)]
    assert widths == [8, 16]


def test_describe_prints_what_was_found(models, text_batch):
    description = probes.describe(models["deepseek"](), text_batch)
    page = str(description)
    assert "mhc" in page
    assert "4 of width 64, layout B T N D" in page
    assert "orientation destination_source" in page
    assert description.reconstruction_error < description.reconstruction_tolerance
    assert len(description.connections) == 6
    assert description.as_dict()["connections"][0]["module"] == "model.layers.0.attn_hc"


def test_what_can_carry_no_values_or_gradients_is_refused_with_the_way_on():
    model, batch = Stack([GatedBlock() for _ in range(3)], nn.Embedding(64, 64)), torch.randint(0, 64, (2, 5))
    with pytest.raises(probes.CaptureError, match="meta device, which holds no values; build it with values"):
        probes.capture(copy.deepcopy(model).to("meta"), batch)
    with torch.no_grad(), pytest.raises(probes.CaptureError, match="keeps no graph"):
        probes.capture(model, batch, gradients=True, loss=lambda output, _: output.sum())
