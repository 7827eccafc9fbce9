"""What a change does is measured against losses, divergences and intervals that are computed here by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import depthscope as ds
from depthscope.diagnostics import experiments
from depthscope.probes.interventions import InterventionError
from depthscope.probes.interventions.changes import changes
from tests.models.small_models import llama
from tests.probes.interventions.local_streams import LocalStreams, ids


def test_loss_divergence_and_interval_of_a_skipped_block():
    model, batch = LocalStreams(layers=2).eval(), ids(5)
    without = LocalStreams(layers=2).eval()
    without.load_state_dict(model.state_dict())
    del without.layers[0]
    with torch.no_grad():
        p, q = torch.log_softmax(model(batch), -1), torch.log_softmax(without(batch), -1)

    def loss(log_p):
        return nn.functional.nll_loss(log_p[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")

    found = ds.interventions.ablate(model, batch, ds.interventions.plan("skip", blocks=0))
    change = (loss(q) - loss(p)).reshape(5, -1).mean(1).numpy()
    assert float(found.loss_change[0]) == pytest.approx(change.mean(), abs=1e-5)
    reach = scipy.stats.t.ppf(0.975, 4) * change.std(ddof=1) / np.sqrt(5)
    assert float(found.loss_change_low[0]) == pytest.approx(change.mean() - reach, abs=1e-5)
    kl = (p.exp() * (p - q)).sum(-1)
    np.testing.assert_allclose(found.token_kl[0], kl, atol=1e-5)
    assert float(found.kl[0]) == pytest.approx(float(kl.mean()), abs=1e-5)
    with torch.no_grad():
        moved = (without(batch) - model(batch)).norm(dim=-1) / model(batch).norm(dim=-1)
    np.testing.assert_allclose(found.token_output_change[0], moved, atol=1e-5)
    assert np.isnan(found.base_loss.values[:, -1]).all()  # no next token is known there


def test_the_state_before_a_step_takes_the_place_of_that_after_it():
    model, batch = LocalStreams(layers=2).eval(), ids(3)
    model_under_test = ds.interventions.ModelUnderTest(model, batch)
    depth, last = 2, max(model_under_test.base.states)
    (change,) = changes(ds.interventions.plan("bypass", depths=depth), model_under_test)
    passed = model_under_test.forward(change.edits)
    before = model_under_test.base.states[depth - 1]
    torch.testing.assert_close(passed.states[depth], before, atol=1e-5, rtol=1e-4)
    (change,) = changes(ds.interventions.plan("bypass", depths=range(1, last + 1)), model_under_test)
    passed = model_under_test.forward(change.edits)
    assert torch.equal(passed.states[last], model_under_test.base.states[0])
    assert len(changes(ds.interventions.plan("bypass"), model_under_test)) == last


def test_padding_does_not_count():
    model, batch = llama(), torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(batch)
    mask[1, 6:] = 0
    found = ds.interventions.ablate(model, {"input_ids": batch, "attention_mask": mask}, "skip")
    assert np.isnan(found.token_kl.values[:, 1, 6:]).all()
    # The last real token predicts a padding token.
    assert np.isnan(found.token_loss.values[:, 1, 5:]).all()
    assert not np.isnan(found.token_loss.values[:, 0, :-1]).any()
    alone = ds.interventions.ablate(model, {"input_ids": batch[1:2, :6]}, "skip")
    np.testing.assert_allclose(alone.token_loss.values[:, 0], found.token_loss.values[:, 1, :6], atol=1e-5)


def test_a_model_that_sees_later_tokens_has_no_next_token_loss():
    class Bidirectional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(41, 8)
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
            )
            self.head = nn.Linear(8, 41)

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Bidirectional().eval()
    found = ds.interventions.ablate(model, ids(), "skip")
    assert "the model sees later tokens" in found.attrs["no_loss"]
    assert bool(found.loss_change.isnull().all())
    assert float(found.output_change.min()) > 0

    def loss(output, batch):
        return nn.functional.cross_entropy(output.mT, batch, reduction="none")

    given = ds.interventions.ablate(model, ids(), "skip", loss=loss)
    assert given.attrs["no_loss"] == ""
    assert not bool(given.loss_change.isnull().any())
    scalar = ds.interventions.ablate(model, ids(), "skip", loss=lambda output, batch: output.square().mean())
    assert bool(scalar.loss_change_error.isnull().all())
    assert not bool(scalar.loss_change.isnull().any())
    with pytest.raises(RuntimeError, match=r"loss= returned a tensor of shape \(4, 9, 41\)"):
        ds.interventions.ablate(model, ids(), "skip", loss=lambda output, batch: output)


def test_an_unknown_experiment_names_the_closest():
    with pytest.raises(ValueError, match="no experiment 'skipp'; closest: 'skip'"):
        ds.interventions.ablate(LocalStreams(), ids(), "skipp")
    with pytest.raises(InterventionError, match="has blocks 0 … 2"):
        ds.interventions.ablate(LocalStreams(), ids(), ds.interventions.plan("skip", blocks=7))


def test_a_result_is_saved_beside_its_run(tmp_path):
    from depthscope.diagnostics.schema import list_runs

    result = ds.interventions.ablate(
        LocalStreams().eval(), ids(), ["skip", "identity"], token_text=[["a"] * 9] * 4
    )
    ds.save_run(ds.capture(LocalStreams().eval(), ids()), tmp_path / "a.zarr.zip")
    place = experiments.save_result(result, experiments.result_path(tmp_path / "a.zarr.zip", "ablate"))
    assert place.name == "a.ablate.zip"
    assert list(list_runs(tmp_path)) == ["a"]  # it is no run
    again = experiments.open_result(place)
    assert list(again.experiment.values) == list(result.experiment.values)
    np.testing.assert_array_equal(again.token_loss, result.token_loss)
    with pytest.raises(ValueError, match="is not a result of experiments"):
        experiments.open_result(tmp_path / "a.zarr.zip")


# --- what a block is worth to the later ones
