"""Other stream families of transformers: read by their roles, or refused with the override to give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope import probes
from tests.models.stream_models import gemma3n, qwen4_exp, seeded


@pytest.fixture(scope="module")
def long_ids() -> torch.Tensor:
    return torch.randint(3, 64, (3, 22), generator=torch.Generator().manual_seed(0))


def test_gated_streams_of_qwen4_exp_and_what_is_added_between_them(long_ids):
    model = seeded(qwen4_exp)
    given: list[torch.Tensor] = []
    model.layers[1].ple.register_forward_hook(lambda module, args, output: given.append(output))
    run = probes.capture(model, {"input_ids": long_ids})
    trace = run["trace"].to_dataset()
    assert run.attrs["family"] == "gated"
    assert run.attrs["reconstruction_error"] < 1e-6
    assert list(trace.site.values[:5]) == ["embed", "mid", "post", "pre", "mid"]
    assert list(trace.depth_out.values[:3]) == [1, 2, 4], "no connection joins the depths 2 and 3"
    added = (trace.residual[3] - trace.residual[2]).values
    np.testing.assert_allclose(added, given[0].detach().unflatten(-1, (4, 64)).numpy(), atol=1e-6)
    (outside,) = run.attrs["changes_outside"]
    assert (outside["depth_in"], outside["depth_out"]) == (2, 3)
    assert outside["change"] == pytest.approx(
        np.linalg.norm(added) / np.linalg.norm(trace.residual[2].values), rel=1e-4
    )


def test_named_layers_have_their_connections_too(long_ids):
    run = probes.capture(seeded(gemma3n), {"input_ids": long_ids}, layers="layers.{i}", layout="N B T D")
    assert run.trace.sizes["stream"] == 4
    assert run.attrs["family"] == "altup"
    assert run.attrs["proof"] == "proven"
