"""The lens reads what final norm and unembedding, applied by hand, read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds
from depthscope.probes.interventions import ModelUnderTest
from depthscope.probes.lens import HeadError
from depthscope.probes.lens.readings import find_head, prediction_depth
from tests.models.families import PAIRS, built
from tests.models.small_models import deepseek, llama, lucidrains
from tests.probes.interventions.local_streams import STREAMS, LocalStreams, ids


def texts(sequences: int = 4) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 64, (sequences, 10), generator=torch.Generator().manual_seed(0))}


def test_the_lens_is_the_final_norm_and_the_unembedding_of_each_state():
    model, batch = llama(), texts()
    found = ds.lens(model, batch)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states  # the last one is normed
        output = torch.log_softmax(model(**batch).logits, -1)
        for depth in range(3):
            read = torch.log_softmax(model.lm_head(model.model.norm(states[depth])), -1)
            one = found.sel(depth=depth, stream="all")
            entropy = -(read.exp() * read).sum(-1).mean()
            kl = (output.exp() * (output - read)).sum(-1).mean()
            agrees = (read.argmax(-1) == output.argmax(-1)).float().mean()
            loss = nn.functional.nll_loss(read[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
            for name, expected in (
                ("entropy", entropy),
                ("kl", kl),
                ("agreement", agrees),
                ("cross_entropy", loss),
            ):
                assert float(one[name]) == pytest.approx(float(expected), abs=1e-5), (depth, name)
    last = found.sel(depth=3, stream="all")
    assert (float(last.kl), float(last.agreement)) == (0, 1)


def test_a_single_stream_is_read_alone():
    model = LocalStreams().eval()
    found = ds.lens(model, ids())
    assert list(found.stream.values) == ["all", "0", "1", "2"]
    under_test = ModelUnderTest(model, ids())
    with torch.no_grad():
        output = torch.log_softmax(model(ids()), -1)
        read = [
            torch.log_softmax(model.head(model.norm(under_test.base.states[2][:, :, s])), -1)
            for s in range(STREAMS)
        ]
    kl = (output.exp() * (output - read[1])).sum(-1).mean()
    assert float(found.kl.sel(depth=2, stream="1")) == pytest.approx(float(kl), abs=1e-5)


@pytest.mark.parametrize(
    "build", [lambda: lucidrains("hc", closure=True, layers=1), lambda: deepseek(layers=1)]
)
def test_the_head_of_streams_is_found_by_proof(build):
    model = build()
    batch = texts(3) if hasattr(model, "config") else texts(3)["input_ids"]
    under_test = ModelUnderTest(model, batch)
    head = find_head(under_test)
    last = under_test.base.states[len(under_test.chain.points) - 1]
    with torch.no_grad():
        torch.testing.assert_close(head(last), under_test.values(under_test.base.output), rtol=0, atol=1e-6)


def test_an_output_that_reads_more_than_the_last_state_is_refused():
    class Skipping(LocalStreams):
        def forward(self, ids):
            x = self.embed(ids).unsqueeze(2).repeat(1, 1, STREAMS, 1) * self.start
            first = x
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x.mean(2)) + first[:, :, 0])

    with pytest.raises(HeadError, match="the output is computed from more than the last state"):
        ds.lens(Skipping().eval(), ids())
    encoder = next(family for family in PAIRS if family.name == "t5")
    with pytest.raises(HeadError, match="name another chain with chain=: 'encoder', 'decoder'"):
        ds.lens(built(encoder), encoder.batch())
    found = ds.lens(built(encoder), encoder.batch(), chain="decoder")
    assert float(found.agreement[-1, 0]) == 1


def test_prediction_depth_is_the_first_from_which_the_prediction_stays():
    agrees = np.array([[1, 0, 0, 1], [0, 1, 0, np.nan], [1, 1, 0, 1], [1, 1, 0, np.nan]])  # depth × token
    depths = np.array([0, 2, 3, 5])
    found = prediction_depth(agrees[:, None, None], depths)[0, 0]
    np.testing.assert_array_equal(found, [3, 2, np.nan, np.nan])


def test_one_sequence_is_too_few_for_the_proof():
    with pytest.raises(HeadError, match="at least two sequences"):
        ds.lens(llama(), texts(1))
