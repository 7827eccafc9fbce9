"""Initial logits of every known mHC, read from a fresh model and from its files, make the matrices that it applies."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hyper_connections import hyper_connections as free
from hyper_connections import manifold_constrained_hyper_connections as constrained
from hyper_connections import mHCv2 as second
from safetensors.torch import save_file
from torch import nn

from depthscope import diagnostics, probes
from depthscope.probes.checkpoints.weight_files import CheckpointError
from tests.models.families import Lucidrains
from tests.models.stream_models import deepseek_v4


def static(model: nn.Module) -> nn.Module:
    """The model with random mixing logits that nothing of the input is added to."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("static_alpha"):
                parameter[:, 1:] = 2 * torch.randn(parameter[:, 1:].shape, generator=generator)
            elif name.endswith("_hc.base"):
                parameter[8:] = 2 * torch.randn(16, generator=generator)
            elif name.endswith("_hc.scale"):
                parameter[2] = 0.0
    return model.eval()


def lucidrains(connections: Any = constrained) -> nn.Module:
    torch.manual_seed(0)
    return Lucidrains(connections)


def rounds_of_three() -> nn.Module:
    model = lucidrains()
    for connection in model.layers:
        connection.residual_mix_constraint_fn.keywords["iters"] = 3
    return model


def deepseek() -> nn.Module:
    torch.manual_seed(0)
    return deepseek_v4(3)


MODELS = {
    "mHC": lucidrains,
    "3 rounds": rounds_of_three,
    "mHC v2": partial(lucidrains, second),
    "deepseek_v4": deepseek,
}


def captured(model, ids):
    return probes.capture(model, {"input_ids": ids} if hasattr(model, "config") else ids)


@pytest.mark.parametrize("name", MODELS)
def test_initial_logits_give_the_matrices_that_the_model_applies(name, ids):
    model = static(MODELS[name]())
    run = diagnostics.with_replay(captured(model, ids), probes.initial_logits(model), decay=0.9)
    found = diagnostics.analyze(run, metrics=["initial_distance"])
    assert float(found.initial_distance.sel(reduction="max").max()) < 2e-5


def test_a_checkpoint_tells_the_same_as_its_model(tmp_path, ids):
    model = static(deepseek())
    model.save_pretrained(tmp_path / "folder")
    told, known = probes.initial_logits(tmp_path / "folder"), probes.initial_logits(model)
    assert told.attrs == known.attrs == {"sinkhorn_steps": 20, "last": "row", "floor": 1e-6}
    np.testing.assert_array_equal(told, known)
    run = captured(model, ids)
    from_file, from_model = (diagnostics.with_replay(run, each, decay=0.9) for each in (told, known))
    xr.testing.assert_equal(from_file.trace.initial_logits, from_model.trace.initial_logits)
    other = static(lucidrains())
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    told, known = probes.initial_logits(tmp_path / "other.safetensors"), probes.initial_logits(other)
    assert told.attrs == known.attrs == {"sinkhorn_steps": 20, "last": "column", "floor": 0.0}
    np.testing.assert_array_equal(told, known)


@pytest.mark.parametrize("name", ["mHC", "deepseek_v4"])
def test_decoupled_weight_decay_is_what_the_replay_says(name, ids):
    """AdamW on logits without a gradient, beside weights that do learn."""
    model = static(MODELS[name]())
    initial = probes.initial_logits(model)
    kinds = ("static_alpha", "_hc.base")
    logits = [p for n, p in model.named_parameters() if n.endswith(kinds)]
    others = [
        p for n, p in model.named_parameters() if not n.endswith((*kinds, "scale", "alpha_fn", "_hc.fn"))
    ]
    optimizer = torch.optim.AdamW(
        [{"params": logits, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}], lr=0.02
    )
    for _ in range(20):
        output = model(ids)
        optimizer.zero_grad()
        nn.functional.cross_entropy(getattr(output, "logits", output).flatten(0, 1), ids.flatten()).backward()
        for one in logits:
            one.grad.zero_()
        optimizer.step()
    decay = diagnostics.decay_factor(0.02, weight_decay=0.5, steps=20)
    run = diagnostics.with_replay(captured(model.eval(), ids), initial, decay=decay)
    analysis = diagnostics.analyze(run)
    assert float(analysis.initial_distance.sel(reduction="median").min()) > 0.01
    found = {finding.verdict: finding for finding in diagnostics.judge(analysis)}
    assert "logits times 0.818" in found["decayed_mixing"].sentence
    assert "unmoved_mixing" not in found


def test_models_without_such_logits_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Linear holds no static logits of mHC"):
        probes.initial_logits(nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="Lucidrains holds no static logits of mHC"):
        probes.initial_logits(lucidrains(free))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        probes.initial_logits(tmp_path / "nowhere")
    both = nn.ModuleList([lucidrains(), rounds_of_three()])
    with pytest.raises(CheckpointError, match="2 kinds of mHC connections"):
        probes.initial_logits(both)
