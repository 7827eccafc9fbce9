"""The first forward is measured like every later one, and what it shows of the model is a constant from then on."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.probes.session.model_call import call_observed
from depthscope.probes.session.options import Options
from depthscope.probes.session.session import Session


def found(model: nn.Module, batch: object, **options: object) -> Session:
    session = Session(model, Options(**options))
    session.attach()
    try:
        with torch.no_grad():
            call_observed(session, batch)
        session.raise_first_error()
    finally:
        session.detach()
    return session


def test_the_structure_is_unknown_before_the_first_forward_and_frozen_after_it(models, ids):
    model = models["deepseek"]()
    with pytest.raises(probes.CaptureError, match="unknown before its first forward; call the model"):
        _ = Session(model, Options()).structure
    structure = found(model, ids).structure
    assert structure.family == "mhc", "the operations of its forward are those of Sinkhorn's iteration"
    assert structure.num_streams == 4
    assert len(structure.connections) == 6
    assert [(state.chain, state.depth) for state in structure.captured] == [
        (0, depth) for depth in range(7)
    ] + [(0, -1)]
    with pytest.raises(FrozenInstanceError):
        structure.chains = ()


def test_two_forwards_show_one_structure(models, ids):
    model = models["llama"]()
    assert found(model, ids).structure == found(model, ids.flip(0)).structure


@pytest.mark.parametrize("name", ["llama", "deepseek", "lucidrains"])
def test_the_first_forward_shows_what_a_later_one_shows(models, ids, name):
    model = models[name](*(["mhc"] if name == "lucidrains" else []))
    with torch.no_grad(), probes.record(model, max_sequences=6) as recorder:
        for _ in range(2):
            model(ids)
        recorder.step()
    assert recorder.errors == []
    trace = recorder.run.trace
    for variable in trace.data_vars:
        if "sample" in trace[variable].dims:
            values = trace[variable].transpose("sample", ...).values
            if values.dtype != object:
                np.testing.assert_array_equal(values[:3], values[3:], err_msg=variable)


class Failing(nn.Module):
    """A chain of linear blocks, whose first call raises in its second block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        for number, block in enumerate(self.blocks):
            if self.calls == 1 and number == 1:
                raise ValueError("bad batch")
            x = block(x)
        return x


def test_a_first_forward_that_fails_is_followed_by_another_first_one():
    model, x = Failing(), torch.randn(2, 8)
    with probes.record(model) as recorder:
        with pytest.raises(ValueError, match="bad batch"):
            model(x)
        model(x)
        recorder.step()
    assert recorder.errors == []
    np.testing.assert_array_equal(recorder.run.trace.residual.values[0, :, 0, 0], x.numpy())
