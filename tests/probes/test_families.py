"""Other stream families of transformers: read by their roles, or refused with the override to give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

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


def test_altup_of_gemma3n_is_read_from_its_two_methods(long_ids):
    model = seeded(gemma3n)
    for layer in model.layers:
        nn.init.normal_(layer.altup.correct_output_scale, std=0.5)  # zero in a fresh model
    seen: list[tuple[torch.Tensor, ...]] = []
    altup = model.layers[1].altup
    predict, correct = altup.predict, altup.correct

    def see_predict(x):
        seen.append((x.clone(), predict(x).clone()))
        return predict(x)

    def see_correct(predictions, activated):
        out = correct(predictions, activated)
        seen.append((activated.clone(), out.clone()))
        return out

    altup.predict, altup.correct = see_predict, see_correct
    run = probes.capture(model, {"input_ids": long_ids})
    trace = run["trace"].to_dataset()
    (x, predictions), (activated, corrected) = seen[:2]
    assert run.attrs["family"] == "altup"
    assert run.attrs["layout"] == "N B T D"
    assert run.attrs["orientation"] == "destination_source"
    assert run.attrs["reconstruction_error"] < 1e-6
    assert list(trace.site.values) == ["embed"] + ["mid", "post"] * 4
    assert list(trace.depth_in.values) == list(range(8)), (
        "AltUp, and the per-layer embedding that a gate scales"
    )
    states = trace.residual.transpose("depth", "stream", "sample", "token", "feature").values
    np.testing.assert_allclose(states[2], x.detach(), atol=0)
    np.testing.assert_allclose(states[3], corrected.detach(), atol=0)
    np.testing.assert_allclose(trace.branch_in.values[2], predictions[0].detach(), atol=0)
    np.testing.assert_allclose(trace.branch_out.values[2], activated.detach(), atol=0)
    h_res, h_post, h_pre = trace.h_res.values[2], trace.h_post.values[2], trace.h_pre.values[2]
    again = np.einsum("stoi,istd->ostd", h_res, states[2]) + np.einsum(
        "sto,std->ostd", h_post, activated.detach()
    )
    np.testing.assert_allclose(again, states[3], atol=1e-5)
    np.testing.assert_allclose(
        np.einsum("sti,istd->std", h_pre, states[2]), predictions[0].detach(), atol=1e-5
    )
    assert "changes_outside" not in run.attrs, "what the per-layer embedding adds is a branch of its own"


def test_named_layers_have_their_connections_too(long_ids):
    run = probes.capture(seeded(gemma3n), {"input_ids": long_ids}, layers="layers.{i}", layout="N B T D")
    assert run.trace.sizes["stream"] == 4
    assert run.attrs["family"] == "altup"
    assert run.attrs["proof"] == "proven"
