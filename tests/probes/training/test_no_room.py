"""Where a recording cannot be written at all, the training goes on, and nothing of it is left on the disk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.diagnostics.schema import saving


def _no_memory(*_arguments):
    raise MemoryError("there is no room")


def _trained(model, store):
    with probes.record(model, store=store) as recorder:
        for _ in range(3):
            model(torch.ones(2, 6, 8))
            recorder.step()
    return recorder


@pytest.mark.parametrize("name", ["a", "a.zarr.zip"])
def test_without_memory_for_a_file_the_training_goes_on(tmp_path, monkeypatch, name):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    monkeypatch.setattr(saving, "_write_folder", _no_memory)
    with pytest.warns(probes.ProbeWarning) as said:
        recorder = _trained(model, tmp_path / name)
    assert recorder.run.statistics.sizes["step"] == 3
    sentences = [str(each.message) for each in said]
    assert len(sentences) == 2
    assert "the steps are not written to" in sentences[0]
    assert "there is no room" in sentences[0]
    assert "the run was not saved" in sentences[1]
    assert "there is no room" in sentences[1]
    assert not list(tmp_path.iterdir())
