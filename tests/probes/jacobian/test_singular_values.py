"""Singular values of Jacobians against the dense Jacobian of autograd: plain blocks, streams, padding, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian as dense_jacobian

import depthscope as ds
from depthscope.app.demo.small_lm import Size, build

IDS = torch.arange(8).reshape(2, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x).cumsum(1)))


class Model(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(16, 6), nn.ModuleList(block() for _ in range(3))

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def largest(function, x, keep=slice(None), count=4):
    full = dense_jacobian(function, x.detach()).reshape(x.numel(), x.numel())[keep][:, keep]
    return torch.linalg.svdvals(full.double())[:count].numpy()


def require_equal(found, errors, expected):
    """The largest to 0.1 %, and each within the error that is given with it."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)
    assert (abs(found - expected) <= errors + 1e-3 * expected[0]).all()


def test_plain_blocks_and_all_together_against_autograd():
    model = Model()
    found = ds.jacobian(model, IDS, values=4)
    x = model.embed(IDS).detach()
    whole = largest(lambda y: nn.Sequential(*model.blocks)(y), x)
    require_equal(found.whole_singular_value.values, found.whole_singular_value_error.values, whole)
    for depth, block in enumerate(model.blocks, start=1):
        at = found.sel(depth=depth)
        require_equal(at.singular_value.values, at.singular_value_error.values, largest(block, x))
        x = block(x).detach()
    assert all(not parameter.grad_fn and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_streams_against_autograd(kind):
    model = build(kind, size=Size(layers=2, width=8, heads=2, streams=2)).eval()
    found = ds.jacobian(model, {"input_ids": IDS[:1]}, values=3)
    x = model.expand(model.embedding(IDS[:1])).detach()
    start = int(found.attrs["start"])
    parts = [part for block in model.blocks for part in (block.attn, block.mlp)]
    for part in parts[:start]:
        x = part(x).detach()
    at, expected = found.isel(depth=0), largest(parts[start], x, count=3)
    require_equal(at.singular_value.values, at.singular_value_error.values, expected)


def test_padding_is_neither_moved_nor_seen():
    model, mask = Model(), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = ds.jacobian(model, {"ids": IDS, "attention_mask": mask}, values=4)
    keep = mask.bool()[..., None].expand(2, 4, 6).flatten()
    expected = largest(lambda y: nn.Sequential(*model.blocks)(y), model.embed(IDS).detach(), keep)
    require_equal(found.whole_singular_value.values, found.whole_singular_value_error.values, expected)


def test_more_values_than_there_are_is_nan():
    found = ds.jacobian(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2), values=3)
    assert np.isnan(found.singular_value[:, 2]).all()
    assert np.isfinite(found.singular_value[:, :2]).all()


class WithoutSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Kernel(Block):
    def forward(self, x):
        return x + WithoutSecondDerivative.apply(self.linear(x))


@pytest.mark.parametrize(
    ("model", "batch", "options", "said"),
    [
        (Model(), IDS, {"values": 0}, "expected how many singular values are wanted"),
        (Model(), [IDS], {}, "expected one mapping, tensor or tuple"),
        (Model(), IDS, {"chain": "decoder"}, "no chain 'decoder'"),
        (Model(Kernel), IDS, {}, "no derivative of its own"),
    ],
)
def test_what_cannot_be_had_is_refused(model, batch, options, said):
    with pytest.raises(ValueError, match=said):
        ds.jacobian(model, batch, **options)
