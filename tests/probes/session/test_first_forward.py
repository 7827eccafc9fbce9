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


# --- a model that takes its tokens first


SEQUENCES, TOKENS = 5, 12


class TokensFirst(nn.Module):
    """As the word language model of pytorch/examples: tokens, then sequences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(50, 32), nn.Parameter(0.1 * torch.randn(40, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids) + self.place[: len(ids)]))


IDS = torch.randint(0, 50, (TOKENS, SEQUENCES), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


def test_the_first_step_of_tokens_first_is_said_and_the_second_is_that_of_a_capture():
    model = TokensFirst()
    options = {"gradients": True, "max_sequences": 2, "sites": ["attention", "embed", "post"]}
    with probes.record(model, metrics="live", live_tokens=20, **options) as recorder:
        loss_of(model).backward()
        with pytest.warns(probes.ProbeWarning, match="the batch is its second axis"):
            recorder.step()
        loss_of(model).backward()
        recorder.step()
    assert recorder.measured_steps == [1]
    statistics = recorder.run["statistics"].to_dataset()
    assert statistics["sequence_count"].values.tolist() == [SEQUENCES]
    assert statistics["token_count"].values.tolist() == [SEQUENCES * TOKENS]
    captured = probes.capture(model, IDS, loss=lambda output, _: loss_of(lambda _: output), **options)
    assert recorder.run.attrs["layout"] == captured.attrs["layout"] == "T B D"
    assert (statistics["attention_entropy_sum"].values[0, 1:] > 0).all()
