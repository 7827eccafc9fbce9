"""The demo's models and their training: equal but for the connection, on the same batches, recorded as they learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("hyper_connections")

import depthscope as ds
from depthscope.app.demo import small_lm, training
from depthscope.app.demo.small_lm import CONNECTIONS, Size, build
from depthscope.app.demo.training import Recipe

SIZE = Size(layers=2, width=16, heads=2)
RECIPE = Recipe(steps=21, batch=4, length=16, size=SIZE, learning_rate=1e-2, record_every=10)


def models(size: Size = SIZE, seed: int = 0) -> dict[str, small_lm.SmallLM]:
    return {kind: build(kind, size=size, seed=seed) for kind in CONNECTIONS}


def with_head(model: small_lm.SmallLM) -> small_lm.SmallLM:
    """The head starts at zero; to compare functions it must not."""
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


# --- the models


def test_only_the_connections_differ():
    built = models()
    shared = dict(built["residual"].named_parameters())
    for kind in ("hc", "mhc"):
        parameters = dict(built[kind].named_parameters())
        assert all(torch.equal(value, parameters[name]) for name, value in shared.items())
        assert all(".branch." not in name for name in set(parameters) - set(shared))


def test_fresh_hyper_connections_compute_the_residual_function_and_mhc_does_not():
    ids = torch.arange(24).reshape(2, 12)
    logits = {kind: with_head(model)(ids).logits for kind, model in models().items()}
    torch.testing.assert_close(logits["hc"], logits["residual"], atol=1e-4, rtol=1e-4)
    assert (logits["mhc"] - logits["residual"]).abs().max() > 0.01


# --- training


def test_the_held_out_part_is_not_trained_on():
    train, held_out = training.corpus()
    assert len(held_out) == pytest.approx((len(train) + len(held_out)) / 10, rel=0.01)
    assert 2.5 < training.unigram_entropy() < 4.0


def test_a_training_is_recorded_and_its_weights_load_again(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "TITLES", {"mhc": "mHC"})
    (line,) = training.train_all(tmp_path, RECIPE)
    history = ds.open_run(tmp_path / "mhc-training").load()
    assert history["metrics"]["step"].values.tolist() == [0, 10, 20]
    loss = history["statistics"]["loss"].values
    assert loss[0] == pytest.approx(math.log(256))
    assert loss[2] < loss[0] - 1
    assert np.isfinite(history["metrics"]["effective_rank"].sel(depth=1)).any()
    assert "mixing_gain" in history["metrics"]
    loaded = ds.load("tests.app.demo.test_training:mhc", weights=tmp_path / "mhc.safetensors")
    held_out = training.held_out_loss(loaded.model)
    assert f"{held_out:.2f}" in line
    assert held_out < math.log(256) - 1


def mhc():
    return build("mhc", size=SIZE)
