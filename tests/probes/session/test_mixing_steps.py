"""What a recording tells of the connections at every step, against the tensors that the model itself keeps."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds
from tests.models.logit_models import LogitModel, ids, loss
from tests.probes.interventions import local_streams

CONNECTIONS = 3


def sums(model):
    """What one forward and backward of a model adds to the statistics of its step, by connection."""
    found = {"range": [], "widest": [], "logits": [], "matrix": [], "h_res": []}
    for each in model.coefficients:
        logits = each.logits.detach()
        ranges = logits.amax(-1) - logits.amin(-1)
        found["range"].append(float(ranges.mean(-1).sum()))
        found["widest"].append(float(ranges.max()))
        found["logits"].append(float(each.logits.grad.square().sum()))
        found["matrix"].append(float(each.matrix.grad.square().sum()))
        found["h_res"].append(each.matrix.detach().sum((0, 1)).numpy())
    return {name: np.array(values) for name, values in found.items()}


def run_loop(model, *, record=True, forwards=1, steps=3, learning_rate=1e-2, **options):
    """Train a model; the sums of each step, its gradients and final weights, and the recorder."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    expected, kept = [], []
    recorder = ds.record(model, gradients=True, **options)
    if record:
        recorder.__enter__()
    for step in range(steps):
        of_step = []
        for part in range(forwards):
            batch = ids(seed=10 * step + part)
            loss(model(batch), batch).backward()
            of_step.append(sums(model))
        if record:
            recorder.step()
        expected.append(of_step)
        kept += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    if record:
        recorder.close()
    return expected, [*kept, *(p.detach().clone() for p in model.parameters())], recorder


def test_logits_and_gradients_of_every_step_but_the_first():
    expected, _, recorder = run_loop(LogitModel(), forwards=2)
    statistics = recorder.run.statistics
    assert statistics["logit_token_count"][0].notnull().all()  # the step's second forward
    for step in (1, 2):
        row, parts = statistics.isel(step=step), expected[step]
        assert (row["logit_token_count"] == 2 * 28).all()
        for name, key in (
            *(("logit_range_sum", "range"), ("logit_gradient_square_sum", "logits")),
            ("mixing_gradient_square_sum", "matrix"),
        ):
            np.testing.assert_allclose(row[name], sum(part[key] for part in parts), rtol=1e-4, atol=1e-12)
        widest = np.maximum(*(part["widest"] for part in parts))
        np.testing.assert_allclose(row["logit_range_max"], widest, rtol=1e-6)
    curves = ds.diagnostics.training_curves(recorder.run)
    share = np.sqrt(statistics["logit_gradient_square_sum"] / statistics["mixing_gradient_square_sum"])
    np.testing.assert_allclose(curves["logit_gradient_share"], share)
    np.testing.assert_allclose(
        curves["logit_range"].sel(reduction="mean")[1], sum(p["range"] for p in expected[1]) / 56, rtol=1e-5
    )


def test_coefficients_biases_and_gates_of_every_step():
    model = LogitModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected, _, recorder = run_loop(model, max_sequences=8)
    run = recorder.run
    for step, (part,) in enumerate(expected):
        np.testing.assert_allclose(run.statistics["h_res_sum"][step], part["h_res"], rtol=1e-5)
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
        model = Masked(LogitModel())
        with ds.record(model) as recorder:
            for seed in range(2):
                batch = torch.cat([ids(seed=seed), torch.full((4, 2), extra)], 1)
                mask = torch.ones_like(batch)
                mask[:, -2:] = 0
                model(input_ids=batch, attention_mask=mask)
                recorder.step()
        return recorder.run.statistics.isel(step=1)

    one, other = steps(1), steps(5)
    for name in (
        "logit_token_count",
        "logit_range_sum",
        "logit_range_max",
        "h_res_sum",
        "h_pre_sum",
        "h_post_sum",
    ):
        np.testing.assert_array_equal(one[name], other[name])
    assert (one["logit_token_count"] == 28).all()


def test_the_training_is_the_same_and_no_graph_stays():
    model = LogitModel()
    _, watched, _ = run_loop(model)
    _, plain, _ = run_loop(LogitModel(), record=False)
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
    recorder = ds.record(model, gradients=True)
    with recorder:
        for seed in range(3):
            batch = ids(seed=seed)
            loss(model(batch), batch).backward()
            recorder.step()
            graphs = [weakref.ref(each.logits) for each in model.coefficients]
            for each in model.coefficients:
                each.logits = each.matrix = None
            gc.collect()
            assert not any(each() is not None for each in graphs)


def why(run):
    table = run["coverage"].to_dataset().to_dataframe()
    return set(table[table["site"] == "mixing_logits"]["why"])


@pytest.mark.parametrize(
    ("projection", "local"),
    [
        *((of, False) for of in ("stable", "in logarithms", "potentials", "softmax of the other axis")),
        ("turned", True),
    ],
)
def test_logits_are_found_however_they_are_projected(projection, local):
    """The first step is measured too, but for the logits: how many streams there are is known at its end."""
    expected, watched, recorder = run_loop(LogitModel(projection, local=local, layers=2), steps=2)
    _, plain, _ = run_loop(LogitModel(projection, local=local, layers=2), record=False, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
    row, (part,) = recorder.run.statistics.sel(step=1), expected[1]
    if projection != "turned":  # by row of the matrix as it is applied
        np.testing.assert_allclose(row["logit_range_sum"], part["range"], rtol=1e-4)
    np.testing.assert_allclose(row["logit_gradient_square_sum"], part["logits"], rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(row["mixing_gradient_square_sum"], part["matrix"], rtol=1e-4)
    assert why(recorder.run) == {""}


def reasons(model, batch=None):
    with ds.record(model.eval()) as recorder:
        for seed in range(2):
            model(ids(seed=seed) if batch is None else batch)
            recorder.step()
    return why(recorder.run)


class Free(nn.Module):
    """H_res as HC has it: the identity and a learned part."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        h_pre, h_post, mix = self.model(x)
        return h_pre, h_post, torch.eye(3) + 0.3 * torch.tanh(self.model.logits) + 0 * mix


def test_free_matrices_and_mixtures_of_permutations_have_no_logits():
    (reason,) = reasons(local_streams.LocalStreams(), local_streams.ids())
    assert "not positive" in reason or "no tensor whose exponential" in reason
    model = LogitModel(layers=2)
    for layer in model.layers:
        layer.connection.coefficients = Free(layer.coefficients)
        layer.coefficients = None
    assert "" not in reasons(model)


def test_saturated_logits_let_hardly_any_gradient_through():
    """Off-diagonal logits of −8: what reaches the logits is about e^−8 of what reaches H_res."""
    model = LogitModel()
    for far in (8, 8 / 3):
        with torch.no_grad():
            for each in model.coefficients:
                each.gate[2] = 0.0
                each.base[-9:] = (far * (torch.eye(3) - 1)).flatten()
        parts, _, recorder = run_loop(model, steps=2, learning_rate=0.0, metrics="live")
        analysis = recorder.run["metrics"].to_dataset().isel(step=1)
        share = analysis["logit_gradient_share"]
        wanted = np.sqrt(parts[1][0]["logits"] / parts[1][0]["matrix"])
        np.testing.assert_allclose(share, wanted, rtol=1e-3)
        np.testing.assert_allclose(analysis["logit_range"].sel(reduction="mean"), far, rtol=1e-5)


def test_two_backwards_through_one_forward_have_no_sum_of_squares():
    model = LogitModel()
    with ds.record(model, gradients=True) as recorder:
        for seed in range(2):
            batch = ids(seed=seed)
            output = model(batch)
            loss(output, batch).backward(retain_graph=True)
            output.square().mean().backward()
            recorder.step()
    statistics = recorder.run.statistics
    assert statistics["logit_range_sum"][1].notnull().all()
    assert statistics["logit_gradient_square_sum"][1].isnull().all()


def test_gradients_are_those_of_the_loss_whatever_a_scaler_multiplies_it_by():
    model, scaler = LogitModel(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with ds.record(model, gradients=True, scaler=scaler) as recorder:
        for step in range(2):
            batch = ids(seed=step)
            scaler.scale(loss(model(batch), batch)).backward()
            recorder.step()
    scaled = sums(model)["logits"] / 1024.0**2
    np.testing.assert_allclose(
        recorder.run.statistics["logit_gradient_square_sum"][1], scaled, rtol=1e-4, atol=1e-12
    )
