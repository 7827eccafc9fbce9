"""The layout of a plain state follows from its shape and the signs; without enough of them it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.structure.infer_layout import infer_layout, takes_tokens_first
from depthscope.probes.structure.layout_evidence import Copies, LayoutEvidence


def test_plain_shapes():
    assert infer_layout((2, 7, 5), batch_size=2) == "B T D"
    assert infer_layout((2, 5), batch_size=2) == "B D"
    assert infer_layout((7, 2, 5), batch_size=2, evidence=LayoutEvidence(tokens_first=True)) == "T B D"
    assert infer_layout((2, 2, 5), batch_size=2, evidence=LayoutEvidence(tokens_first=True)) == "T B D"
    assert infer_layout((2, 5, 8, 8), batch_size=2, evidence=LayoutEvidence(image="first")) == "B D H W"
    assert infer_layout((2, 8, 8, 5), batch_size=2, evidence=LayoutEvidence(image="last")) == "B H W D"


@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (8, 7, 5), (7, 2, 5), (7, 5), (2, 3, 4, 5, 6)])
def test_other_shapes_are_refused_with_examples_of_what_to_give(shape):
    with pytest.raises(LayoutError, match="layout='B T N D'"):
        infer_layout(shape, batch_size=2)


@pytest.mark.parametrize(
    ("shape", "signs", "layout"),
    [
        ((2, 7, 20), LayoutEvidence(copies=(Copies(2, 4, True),)), "B T (N D)"),
        ((2, 7, 20), LayoutEvidence(copies=(Copies(2, 4, False),)), "B T (D N)"),
        ((2, 7, 20), LayoutEvidence(parts=4), "B T (N D)"),
        ((2, 28, 5), LayoutEvidence(copies=(Copies(1, 4, True),)), "B (N T) D"),
        ((2, 4, 5), LayoutEvidence(copies=(Copies(1, 4, True),)), "B N D"),
        ((8, 7, 5), LayoutEvidence(copies=(Copies(0, 4, False),)), "(B N) T D"),
        ((8, 7, 5), LayoutEvidence(copies=(Copies(0, 4, True),)), "(N B) T D"),
        ((4, 2, 7, 5), LayoutEvidence(copies=(Copies(0, 4, True),)), "N B T D"),
        ((2, 20, 8, 8), LayoutEvidence(image="first", copies=(Copies(1, 4, True),)), "B (N D) H W"),
    ],
)
def test_hidden_streams_are_refused_with_their_layout(shape, signs, layout):
    with pytest.raises(LayoutError) as refusal:
        infer_layout(shape, batch_size=2, evidence=signs)
    assert f"layout={layout!r} and streams=4" in str(refusal.value)


def test_like_sequences_of_a_batch_are_no_streams():
    assert (
        infer_layout((2, 7, 5), batch_size=2, evidence=LayoutEvidence(copies=(Copies(0, 2, True),)))
        == "B T D"
    )


def test_tokens_come_first_where_a_module_says_so_and_the_shapes_agree():
    signs = LayoutEvidence(tokens_first=True)
    assert takes_tokens_first((7, 2, 5), (7, 2, 5), signs)
    assert takes_tokens_first((7, 2, 5), (7, 2), signs)
    assert not takes_tokens_first((7, 2, 5), (2, 7), signs)
    assert not takes_tokens_first((7, 2, 5), (7, 2), LayoutEvidence())


class Same(nn.Module):
    """A model whose tokens are all alike and have no positions, so that its first state repeats itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_like_tokens_are_no_streams():
    run = probes.capture(Same().eval(), torch.ones(2, 6, dtype=torch.long))
    assert run.attrs["layout"] == "B T D"
    assert run.trace.residual.shape == (3, 2, 6, 1, 8)
