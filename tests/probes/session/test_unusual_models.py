"""Models of every make are read right or refused in one sentence, and the user's own calls go on as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from depthscope import probes

WIDTH = 16
IDS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module] | None = None):
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Vectorised(Model):
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.vmap(block)(x)
        return self.head(x)


class WithJacobian(Model):
    def forward(self, ids):
        jacobian = torch.func.jacrev(self.blocks[0])(torch.ones(2, WIDTH))
        return super().forward(ids) + jacobian.sum()


class OwnCall(Model):
    def __call__(self, ids):
        return super().__call__(ids)


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def __call__(self, ids):
        return self.model(ids)


@dataclass
class Batch:
    ids: Any


class OfObject(Model):
    def forward(self, batch):
        return super().forward(batch.ids)


class WithoutArguments(Model):
    def forward(self):
        return super().forward(IDS)


class Quantised(torch.Tensor):
    """A weight that knows what a linear layer needs of it and nothing else, as those of torchao and others."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            raise NotImplementedError(f"Quantised dispatch: unimplemented {func}")
        plain = tree_map(lambda t: t.codes * t.scale if isinstance(t, cls) else t, args)
        return func(*plain, **(kwargs or {}))


def quantised() -> Model:
    model = Model()
    for block in model.blocks:
        scale = block.up.weight.detach().abs().max() / 127
        codes = (block.up.weight.detach() / scale).round().to(torch.int8)
        block.up.weight = nn.Parameter(Quantised(codes, scale), requires_grad=False)
    return model


def with_parts(change: Callable[[Block], None]) -> Model:
    model = Model().eval()
    for block in model.blocks:
        change(block)
    return model


READ: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "scripted blocks": lambda: (Model([torch.jit.script(Block()) for _ in range(3)]), IDS),
    "quantised weights": lambda: (quantised(), IDS),
    "parametrised": lambda: (with_parts(lambda block: nn.utils.parametrizations.orthogonal(block.up)), IDS),
    "a jacobian inside": lambda: (WithJacobian(), IDS),
    "own __call__": lambda: (OwnCall(), IDS),
    "a dataclass": lambda: (OfObject(), (Batch(IDS),)),
}
REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str]] = {
    "scripted": (lambda: (torch.jit.script(Model()), IDS), "TorchScript"),
    "vmapped blocks": (lambda: (Vectorised().eval(), IDS), "torch.func"),
    "meta": (lambda: (Model().to("meta"), IDS.to("meta")), "meta"),
    "fake": (lambda: (Model(), FakeTensorMode(allow_non_fake_inputs=True).from_tensor(IDS)), "fake tensors"),
    "no arguments": (lambda: (WithoutArguments(), {}), "without a tensor"),
    "__call__ without forward": (lambda: (NoForward(), IDS), "not called through Module.__call__"),
}
WARNINGS = (
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning:torch",
    "ignore:step 0 was not measured:depthscope.probes.ProbeWarning",
)


def ignore_warnings(test):
    for each in WARNINGS:
        test = pytest.mark.filterwarnings(each)(test)
    return test


def call(model: nn.Module, batch: Any) -> torch.Tensor:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@ignore_warnings
@pytest.mark.parametrize("name", READ)
def test_it_is_read_as_its_blocks_return_it(name):
    torch.manual_seed(0)
    model, batch = READ[name]()
    seen, core = [], next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    expected = call(model, batch)
    handles = [nn.Module.register_forward_hook(b, lambda m, a, out: seen.append(out.detach())) for b in core]
    call(model, batch)
    for handle in handles:
        handle.remove()
    states = [state for state in seen if not torch._C._functorch.is_functorch_wrapped_tensor(state)][-3:]
    run = probes.capture(model, batch)
    np.testing.assert_array_equal(run.trace.residual.values[1:, :, :, 0], torch.stack(states).float())
    assert probes.describe(model, batch).num_blocks == 3
    with probes.record(model, weights=True) as recorder:
        for _ in range(2):
            assert torch.equal(call(model, batch), expected)
            recorder.step()
    assert recorder.errors == []


@ignore_warnings
def test_a_frozen_script_is_read_by_its_operations():
    torch.manual_seed(0)
    model = Model().eval()
    expected = probes.capture(model, IDS)
    run = probes.capture(torch.jit.freeze(torch.jit.script(model)), IDS)
    np.testing.assert_array_equal(run.trace.residual.values, expected.trace.residual.values)
    assert run.attrs["proof"] == "proven"


@ignore_warnings
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_its_name_and_the_users_call_goes_on(name):
    torch.manual_seed(0)
    build, reason = REFUSED[name]
    model, batch = build()
    expected = call(model, batch)
    # `describe` of a model on the meta device is the plan of its capture.
    for ask in (probes.capture,) if name == "meta" else (probes.capture, probes.describe):
        with pytest.raises((ValueError, probes.CaptureError), match=reason):
            ask(model, batch)
    with probes.record(model, gradients=True) as recorder:
        found = call(model, batch)
        with pytest.warns(probes.ProbeWarning, match="step 0 was not measured"):
            recorder.step()
    assert found.shape == expected.shape
    if not (found.is_meta or isinstance(batch, torch._subclasses.FakeTensor)):
        assert torch.equal(found, expected)
