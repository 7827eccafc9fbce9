"""How people run a model: precisions, generation, compilation, checkpoints, sharding; none changes what is read."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from depthscope import probes


def test_connections_are_proven_under_autocast(models, ids):
    model = models["deepseek"]()
    with torch.autocast("cpu", torch.bfloat16):
        run = probes.capture(model, ids)
        with probes.record(model) as recorder:
            for _ in range(2):
                model(ids)
                recorder.step()
    assert recorder.errors == []
    plain = probes.capture(model, ids)
    for each in (run, recorder.run):
        assert each.attrs["autocast"] == "bfloat16"
        assert each.attrs["dtype"] == "float32"
        assert each.attrs["reconstruction_error"] < 5e-3
        assert float(each.trace.read_error.max()) < 5e-3
        np.testing.assert_allclose(  # later ones see states that lower precision has moved
            each.trace.h_res.values[0, :3], plain.trace.h_res.values[0], atol=5e-2
        )
    assert "autocast" not in plain.attrs


def test_each_token_that_is_generated_is_a_sequence_of_one(models, ids):
    model = models["deepseek"]()
    with probes.record(model, max_sequences=32) as recorder:
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        recorder.step()
    assert recorder.errors == []
    trace = recorder.run["trace"].to_dataset()
    assert list(trace.mask.values.sum(1)) == [11] * 3 + [1] * 9


def test_checkpointed_connections_give_the_same(models, ids):
    found = []
    for wrapped in (False, True):
        model = models["lucidrains"]("mhc")
        for module in model.modules():
            if wrapped and hasattr(module, "width_connection"):
                module.forward = partial(checkpoint, module.forward, use_reentrant=True)
        with probes.record(model, gradients=True) as recorder:
            for _ in range(2):
                model.zero_grad()
                model(ids).square().mean().backward()
                recorder.step()
        assert recorder.errors == []
        found.append((recorder.run, [p.grad.clone() for p in model.parameters()]))
    (plain, own), (checkpointed, recomputed) = found
    for variable in ("residual", "gradient", "h_res", "h_pre", "h_post"):
        np.testing.assert_allclose(
            checkpointed.trace[variable].values,
            plain.trace[variable].values,
            atol=1e-5,
            rtol=1e-4,
            err_msg=variable,
        )
    for a, b in zip(own, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)  # attention has another kernel without a graph


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("split", [False, True])
def test_a_split_state_is_refused_and_a_replicated_one_read(split, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (1,))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return DTensor.from_local(x.to_local() + self.linear(x.to_local()), mesh, x.placements)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            state = DTensor.from_local(x, mesh, [Shard(2) if split else Replicate()])
            for block in self.blocks:
                state = block(state)
            return state.to_local()

    model, x = Model(), torch.randn(2, 5, 8)
    if split:
        with pytest.raises(probes.CaptureError, match="split over processes"):
            probes.capture(model, x)
    else:
        run = probes.capture(model, x)
        np.testing.assert_array_equal(run.trace.residual.values[0, ..., 0, :], x.numpy())
