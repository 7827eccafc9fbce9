"""A model whose weights accelerate keeps elsewhere is probed like any other, and nothing is read of what is not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope import capture
from tests.models.small_models import deepseek, llama

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize(("make", "where"), [(llama, "disk"), (deepseek, "cpu")])
def test_an_offloaded_model_gives_the_same_numbers(make, where, tmp_path):
    ids = torch.arange(22).reshape(2, 11) + 1
    batch = {"input_ids": ids, "labels": ids}
    whole, offloaded = make().eval(), make().eval()
    offloaded.load_state_dict(whole.state_dict())
    if where == "cpu":
        accelerate.cpu_offload(offloaded, execution_device="cpu")
    else:
        accelerate.disk_offload(offloaded, tmp_path, execution_device="cpu")
    expected, found = (capture(model, batch, gradients=True) for model in (whole, offloaded))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for group in ("trace", "statistics"):
        for name, variable in expected[group].to_dataset().variables.items():
            if variable.dtype.kind in "fiub":
                np.testing.assert_array_equal(found[group][name].values, variable.values, err_msg=name)
    assert "weights_digest" in expected.attrs
    assert "weights_digest" not in found.attrs
    assert "are offloaded" in found.attrs["weights_not_read"]
