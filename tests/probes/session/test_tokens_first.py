"""Is a model that takes its tokens first measured from the first step on, as a capture measures it?"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from depthscope import probes

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


def test_the_first_step_is_that_of_a_capture():
    model = TokensFirst()
    options = {"gradients": True, "max_sequences": 2, "sites": ["attention", "embed", "post"]}
    with probes.record(model, metrics="live", live_tokens=20, **options) as recorder:
        for step in range(2):
            loss_of(model).backward()
            recorder.step()
            if step == 0:
                first = recorder.run
    assert recorder.errors == []
    assert recorder.measured_steps == [0, 1]
    statistics = recorder.run["statistics"].to_dataset()
    assert statistics["sequence_count"].values.tolist() == [SEQUENCES] * 2
    assert statistics["token_count"].values.tolist() == [SEQUENCES * TOKENS] * 2
    captured = probes.capture(model, IDS, loss=lambda output, _: loss_of(lambda _: output), **options)
    assert first.attrs["layout"] == captured.attrs["layout"] == "T B D"
    assert first["trace"]["sample"].values.tolist() == captured["trace"]["sample"].values.tolist()
    for name in ("residual", "gradient"):
        np.testing.assert_allclose(first["trace"][name], captured["trace"][name], atol=1e-6)
    # What its tokens attend to is seen from the second step on.
    entropy = statistics["attention_entropy_sum"].values
    assert np.isnan(entropy[0]).all()
    assert (entropy[1, 1:] > 0).all()
