"""The gradient of all streams together is the derivative of the loss by their mean: against differences of the loss itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import depthscope as ds
from tests.models.small_models import lucidrains
from tests.models.verdict_models import prediction, tokens

STEP = 1e-5


def model_of(num_streams: int) -> torch.nn.Module:
    if num_streams == 1:
        return lucidrains("residual").double()
    return lucidrains("hc", streams=num_streams).double()


def loss_with(model, ids, row: int, change: np.ndarray, num_streams: int) -> float:
    """The loss where the same change (B, T, D) is added to every stream after a row of the model."""

    def moved(module, arguments, output):
        streams = output.reshape(len(ids), num_streams, *output.shape[1:])
        return (streams + torch.as_tensor(change)[:, None]).reshape(output.shape)

    handle = model.layers[row][1].register_forward_hook(moved)
    try:
        with torch.no_grad():
            return float(prediction(model(ids), ids))
    finally:
        handle.remove()


@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_the_norm_is_the_steepest_change_of_the_loss_where_all_streams_move_alike(num_streams):
    model, ids = model_of(num_streams), tokens(2, 9) % 64
    run = ds.capture(model, ids, loss=prediction, gradients=True)
    found = (
        ds.analyze(run, ["gradient_norm", "relative_gradient", "backward_gain"])
        .isel(step=0)
        .sel(stream="mean")
    )
    row = 1
    depth = int(np.flatnonzero(found["module"].values.astype(str) == f"layers.{row}.1")[-1])
    gradient = run.trace.gradient.isel(depth=depth)
    together = gradient.sum("stream").values.astype(float)  # (sample, token, feature)
    norm = np.linalg.norm(together)
    steepest = together / norm
    change = [loss_with(model, ids, row, sign * STEP * steepest, num_streams) for sign in (1, -1)]
    assert float(found["gradient_norm"][depth]) == pytest.approx(
        (change[0] - change[1]) / (2 * STEP), rel=1e-4
    )
    # Any other direction that all streams share: the derivative by the mean state in that direction.
    other = np.random.default_rng(0).standard_normal(together.shape)
    change = [loss_with(model, ids, row, sign * STEP * other, num_streams) for sign in (1, -1)]
    assert (together * other).sum() == pytest.approx((change[0] - change[1]) / (2 * STEP), rel=1e-3)
    # Token by token with the size of the mean state.
    state = run.trace.residual.isel(depth=depth).mean("stream").values.astype(float)
    expected = np.sqrt(((together**2).sum(-1) * (state**2).sum(-1)).sum())
    assert float(found["relative_gradient"][depth]) == pytest.approx(expected, rel=1e-5)
