"""The logits of H_res and the gradient that reaches them, against those that the model itself keeps."""

from __future__ import annotations

import hyper_connections.manifold_constrained_hyper_connections as constrained
import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds
from tests.models.families import Lucidrains
from tests.models.logit_models import PROJECTIONS, LogitModel, ids, loss
from tests.probes.interventions import local_streams


def hand(model, batch):
    """Logits, and norms of the gradients at them and at the matrices, by the model's own tensors."""
    loss(model(batch), batch).backward()
    model.zero_grad()
    kept = model.coefficients
    return (
        [each.logits.detach() for each in kept],
        [float(each.logits.grad.norm()) for each in kept],
        [float(each.matrix.grad.norm()) for each in kept],
    )


@pytest.mark.parametrize(
    ("projection", "local"), [*((name, False) for name in PROJECTIONS), ("sinkhorn", True), ("turned", True)]
)
def test_logits_and_gradients_are_those_of_the_model(projection, local):
    model, batch = LogitModel(projection, local=local, layers=2).eval(), ids()
    run = ds.capture(model, batch, gradients=True, loss=loss)
    logits, at_logits, at_matrix = hand(model, batch)
    # The model applies the transpose of what it computes.
    wanted = torch.stack([z.mT for z in logits] if projection == "turned" else logits)
    if projection == "stable":  # what the exponential takes
        wanted = wanted - wanted.amax((-2, -1), keepdim=True)
    np.testing.assert_allclose(run.trace["mixing_logits"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.trace["logit_gradient_norm"], at_logits, rtol=1e-4)
    np.testing.assert_allclose(run.trace["mixing_gradient_norm"], at_matrix, rtol=1e-4)
    assert all(each.grad is None for each in model.parameters())


def test_rows_are_destinations_whichever_way_a_module_has_them():
    model, batch = LogitModel(transposed=True, layers=2).eval(), ids()
    run = ds.capture(model, batch)
    model(batch)  # a capture puts back what its forward noted on the modules
    wanted = torch.stack([each.logits.detach().mT for each in model.coefficients])
    np.testing.assert_allclose(run.trace["mixing_logits"], wanted, rtol=1e-5, atol=1e-6)


def test_a_matrix_that_all_tokens_share():
    model, batch = LogitModel(static=True).eval(), ids()
    run = ds.capture(model, batch, gradients=True, loss=loss)
    logits, at_logits, at_matrix = hand(model, batch)
    for found, wanted in zip(run.trace["mixing_logits"].values, logits, strict=True):
        np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), rtol=1e-5)
    np.testing.assert_allclose(run.trace["logit_gradient_norm"], at_logits, rtol=1e-4)
    np.testing.assert_allclose(run.trace["mixing_gradient_norm"], at_matrix, rtol=1e-4)


def test_without_gradients_the_logits_alone():
    run = ds.capture(LogitModel().eval(), [ids(), ids(seed=1)])
    assert "logit_gradient_norm" not in run.trace
    assert run.trace["mixing_logits"].isel(sample=slice(0, 4)).notnull().all()
    assert run.trace["mixing_logits"].isel(sample=slice(4, 8)).isnull().all()  # of the first batch alone
    analysis = ds.analyze(run)
    logits = run.trace["mixing_logits"].values[:, :4].astype(float)
    spread = np.ptp(logits, axis=-1).mean(-1).reshape(3, -1)
    np.testing.assert_allclose(analysis["logit_range"].sel(reduction="mean")[0], spread.mean(1), rtol=1e-6)
    assert "gradients=True" in analysis.attrs["not_computed"]["logit_gradient_share"]


def why(run):
    coverage = run["coverage"].to_dataset()
    return set(coverage["why"].values[coverage["site"].values.astype(str) == "mixing_logits"].tolist())


def test_a_mixture_of_permutations_has_no_logits_of_its_entries():
    run = ds.capture(local_streams.LocalStreams().eval(), local_streams.ids())
    assert "mixing_logits" not in run.trace
    (reason,) = why(run)
    assert "not positive" in reason or "no tensor whose exponential" in reason


class Free(nn.Module):
    """H_res as HC has it: the identity and a learned part."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        h_pre, h_post, mix = self.model(x)
        return h_pre, h_post, torch.eye(3) + 0.3 * torch.tanh(self.model.logits) + 0 * mix


def test_free_matrices_have_no_logits():
    model = LogitModel()
    for layer in model.layers:
        layer.connection.coefficients = Free(layer.coefficients)
        layer.coefficients = None
    run = ds.capture(model.eval(), ids())
    assert "mixing_logits" not in run.trace
    assert "" not in why(run)


def test_an_exponential_before_the_logits_is_not_taken_for_them():
    """The logits are scaled by an exponential of the same shape: what that one takes gives no H_res by scaling."""
    torch.manual_seed(1)
    model = LogitModel()
    plain = PROJECTIONS["sinkhorn"]
    PROJECTIONS["scaled"] = lambda z: plain(z * torch.exp(0.3 * z.roll(1, -1)))
    try:
        for each in model.coefficients:
            each.projection = "scaled"
        run = ds.capture(model.eval(), ids())
    finally:
        del PROJECTIONS["scaled"]
    assert "mixing_logits" not in run.trace
    (reason,) = why(run)
    assert "no tensor whose exponential" in reason


def test_saturated_logits_let_hardly_any_gradient_through():
    """Off-diagonal logits of −8: what reaches the logits is about e^−8 of what reaches H_res."""
    model, batch = LogitModel().eval(), ids()
    with torch.no_grad():
        for each in model.coefficients:
            each.gate[2] = 0.0
            each.base[-9:] = (8 * (torch.eye(3) - 1)).flatten()
    analysis = ds.analyze(ds.capture(model, batch, gradients=True, loss=loss)).isel(step=0)
    share = analysis["logit_gradient_share"]
    _, at_logits, at_matrix = hand(model, batch)
    np.testing.assert_allclose(share, np.array(at_logits) / at_matrix, rtol=1e-4)
    assert float(share.max()) < 2e-3
    assert float(analysis["logit_saturation"].sel(reduction="mean").min()) > 0.99
    np.testing.assert_allclose(analysis["logit_range"].sel(reduction="mean"), 8.0, rtol=1e-5)
    (found,) = [f for f in ds.judge(analysis) if f.verdict == "saturated_logits"]
    assert (found.severity.name, found.value) == ("INFO", float(share.max()))
    # The same logits three times nearer to each other let enough through.
    with torch.no_grad():
        for each in model.coefficients:
            each.base[-9:] /= 3
    healthy = ds.judge(ds.analyze(ds.capture(model, batch, gradients=True, loss=loss)))
    assert "saturated_logits" not in {f.verdict for f in healthy}


def test_a_package_whose_matrix_reads_and_mixes():
    """lucidrains' part that mixes has an axis of proposals before that of the sequences; its logits begin at the identity."""
    torch.manual_seed(0)
    run = ds.capture(Lucidrains(constrained), ids())
    logits = run.trace["mixing_logits"].values
    np.testing.assert_allclose(np.ptp(logits, axis=-1), 1.0, rtol=0.05)
    np.testing.assert_allclose(logits.argmax(-1), np.broadcast_to(np.arange(4), logits.shape[:-1]))
