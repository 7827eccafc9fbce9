"""The first forward is measured like every later one, and what it shows of the model is a constant from then on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from depthscope import probes


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_the_first_forward_shows_what_a_later_one_shows(models, ids, name):
    model = models[name]()
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
