"""What a recording tells of the connections at every step, against the tensors that the model itself keeps."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import torch
from torch import nn

import depthscope as ds
from tests.models.sinkhorn_model import SinkhornModel, ids, loss

CONNECTIONS = 3


def test_coefficients_biases_and_gates_of_every_step():
    model = SinkhornModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, expected = torch.optim.Adam(model.parameters(), 1e-2), []
    with ds.record(model, gradients=True, max_sequences=8) as recorder:
        for step in range(3):
            batch = ids(seed=10 * step)
            loss(model(batch), batch).backward()
            recorder.step()
            expected.append([each.matrix.detach().sum((0, 1)).numpy() for each in model.coefficients])
            optimizer.step()
            optimizer.zero_grad()
    run = recorder.run
    np.testing.assert_allclose(run.statistics["h_res_sum"], expected, rtol=1e-5)
    # The sample is the complete batch of the last step.
    for name in ("h_res", "h_pre", "h_post"):
        summed = run.trace[name].sum(("sample", "token"))
        np.testing.assert_allclose(run.statistics[f"{name}_sum"][-1], summed, rtol=1e-5)
    assert (run.statistics["h_pre_token_count"] == 28).all()
    names = run.statistics["cell_parameter"].values.astype(str)
    assert sorted(set(names)) == sorted(
        f"layers.{i}.coefficients.{name}" for i in range(CONNECTIONS) for name in ("base", "gate")
    )
    values = run.statistics["connection_parameter"]
    curves = ds.diagnostics.training_curves(run)
    for name in set(names):
        np.testing.assert_array_equal(values[0, names == name], before[name])
        drift = curves["connection_parameter_drift"].sel(parameter=name)
        moved = values[:, names == name].values - values[0, names == name].values
        np.testing.assert_allclose(drift, np.linalg.norm(moved, axis=1), rtol=1e-6)
        assert float(drift[0]) == 0 < float(drift[1]) < float(drift[2])


def test_padding_counts_nowhere():
    class Masked(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask=None):
            return self.model(input_ids)

    def steps(extra):
        model = Masked(SinkhornModel())
        with ds.record(model) as recorder:
            for seed in range(2):
                batch = torch.cat([ids(seed=seed), torch.full((4, 2), extra)], 1)
                mask = torch.ones_like(batch)
                mask[:, -2:] = 0
                model(input_ids=batch, attention_mask=mask)
                recorder.step()
        return recorder.run.statistics.isel(step=1)

    one, other = steps(1), steps(5)
    for name in ("h_res_sum", "h_pre_sum", "h_post_sum"):
        np.testing.assert_array_equal(one[name], other[name])
    assert (one["h_pre_token_count"] == 28).all()


def test_no_graph_stays():
    model = SinkhornModel()
    with ds.record(model, gradients=True) as recorder:
        for seed in range(3):
            batch = ids(seed=seed)
            loss(model(batch), batch).backward()
            recorder.step()
            graphs = [weakref.ref(each.matrix) for each in model.coefficients]
            for each in model.coefficients:
                each.matrix = None
            gc.collect()
            assert not any(each() is not None for each in graphs)
