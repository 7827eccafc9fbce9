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
from tests.models.plain_stack import Stack


@pytest.fixture(scope="module")
def llama_run(models, text_batch):
    model = models["llama"]()
    return model, probes.capture(model, text_batch, gradients=True)


def test_states_and_gradients_are_those_of_transformers_bit_for_bit(llama_run, text_batch):
    model, run = llama_run
    output = model(**text_batch, output_hidden_states=True)
    hidden = output.hidden_states
    captured = run.trace.residual.values[..., 0, :]
    for depth in range(3):  # the last hidden state of transformers is behind the norm
        np.testing.assert_array_equal(captured[depth], hidden[depth].detach().numpy())
    np.testing.assert_array_equal(
        model.model.norm(torch.from_numpy(captured[3])).detach(), hidden[3].detach().numpy()
    )
    for depth, gradient in enumerate(torch.autograd.grad(output.loss, hidden[:3])):
        np.testing.assert_array_equal(run.trace.gradient.values[depth, :, :, 0], gradient.numpy())
    assert np.isfinite(run.trace.gradient.values[3]).all()


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


def test_low_precision_is_proven_with_the_matrix_that_is_applied(models, text_batch):
    run = probes.capture(models["deepseek"]().to(torch.bfloat16), text_batch)
    assert run.attrs["dtype"] == "bfloat16"
    assert run.attrs["reconstruction_error"] < 5e-3
    assert run.attrs["orientation"] == "destination_source"
    applied = torch.from_numpy(run.trace.h_res.values)
    assert torch.equal(applied, applied.bfloat16().float())


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


def test_no_chain_is_an_error_with_the_override(ids):
    with pytest.raises(probes.ChainError, match="layers="):
        probes.capture(nn.Embedding(64, 8), ids)


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

    assert len(given) > 30
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
    model, batch = (
        Stack([nn.Linear(64, 64) for _ in range(3)], nn.Embedding(64, 64)),
        torch.randint(0, 64, (2, 5)),
    )
    with pytest.raises(probes.CaptureError, match="meta device, which holds no values; build it with values"):
        probes.capture(copy.deepcopy(model).to("meta"), batch)
    with torch.no_grad(), pytest.raises(probes.CaptureError, match="keeps no graph"):
        probes.capture(model, batch, gradients=True, loss=lambda output, _: output.sum())
