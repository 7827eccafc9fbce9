"""Are the runs of a pipeline's stages, joined, the run of the whole model?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from depthscope import diagnostics, probes
from tests.models.plain_stack import Block

WIDTH = 8


class Stage(nn.Module):
    """Some blocks of a model, under their numbers in the model or, in a list, from 0 on."""

    def __init__(self, blocks, *, expand=None, reduce=None, numbered=None):
        super().__init__()
        self.layers = (
            nn.ModuleList(blocks)
            if numbered is None
            else nn.ModuleDict(dict(zip(numbered, blocks, strict=True)))
        )
        self.expand, self.reduce = expand, reduce

    def forward(self, x):
        if self.expand is not None:
            x = self.expand(x)
        for block in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = block(x)
        return x if self.reduce is None else self.reduce(x)


def stages_of(blocks, cuts, *, numbered, expand=None, reduce=None):
    ends = [*cuts, len(blocks)]
    found = []
    for number, (first, end) in enumerate(zip([0, *cuts], ends, strict=True)):
        found.append(
            Stage(
                blocks[first:end],
                expand=expand if number == 0 else None,
                reduce=reduce if number == len(cuts) else None,
                numbered=[str(at) for at in range(first, end)] if numbered else None,
            )
        )
    return found


def captured(stages, x, layers="layers.{i}"):
    runs = []
    for number, stage in enumerate(stages):
        runs.append(probes.capture(stage, x, stage=(number, len(stages)), layers=layers))
        x = stage(x).detach()
    return runs


def plain_blocks(number=5):
    torch.manual_seed(0)
    return [Block(WIDTH) for _ in range(number)]


@pytest.mark.slow(but=2, more=1)
@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("cuts", [[2], [1, 3], [1, 2, 3, 4]])
def test_joined_stages_are_the_whole_model(cuts, numbered, tmp_path):
    blocks, x = plain_blocks(), torch.randn(3, 6, WIDTH)
    whole = probes.capture(Stage(blocks), x)
    runs = captured(stages_of(blocks, cuts, numbered=numbered), x)
    joined = probes.merge_runs(
        [
            diagnostics.open_run(diagnostics.save_run(run, tmp_path / f"{at}.zarr.zip"))
            for at, run in enumerate(reversed(runs))
        ]
    )
    for group in ("trace", "statistics"):
        here, there = joined[group].to_dataset(), whole[group].to_dataset()
        assert set(here.data_vars) == set(there.data_vars)
        for name in there.data_vars:
            assert here[name].dims == there[name].dims
            np.testing.assert_allclose(
                here[name].values, there[name].values, rtol=1e-5, atol=1e-6, err_msg=name
            )
        for name in ("depth", "layer"):
            assert here[name].values.tolist() == there[name].values.tolist()
    assert joined.attrs["num_blocks"] == 5
    analysis = diagnostics.analyze(joined)
    expected = diagnostics.analyze(whole)
    np.testing.assert_allclose(analysis["effective_rank"], expected["effective_rank"], rtol=1e-5)


class StreamBlock(nn.Module):
    """X' = H_res X + H_post F(H_pre X), of streams (B, T, N, D)."""

    def __init__(self, streams=3):
        super().__init__()
        self.connection = Coefficients(streams)
        self.net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x):
        read, write, mix = self.connection(x)
        return mix @ x + write.unsqueeze(-1) * self.net(read).unsqueeze(-2)


class Coefficients(nn.Module):
    def __init__(self, streams):
        super().__init__()
        self.project = nn.Linear(streams * WIDTH, streams * (streams + 2))
        self.streams = streams

    def forward(self, x):
        n = self.streams
        read, write, mix = self.project(x.flatten(-2)).split([n, n, n * n], dim=-1)
        return torch.einsum("btn,btnd->btd", read, x), write, mix.unflatten(-1, (n, n)).softmax(-1)


def test_stages_with_streams_are_joined():
    torch.manual_seed(0)
    blocks, x = [StreamBlock() for _ in range(4)], torch.randn(2, 5, 3, WIDTH)
    whole = probes.capture(Stage(blocks), x)
    runs = captured(stages_of(blocks, [2], numbered=True), x, layers=None)
    joined = probes.merge_runs(runs)
    for name in ("connection", "depth_in", "depth_out"):
        assert joined.trace[name].values.tolist() == whole.trace[name].values.tolist()
    np.testing.assert_allclose(joined.trace["h_res"], whole.trace["h_res"], rtol=1e-5, atol=1e-6)
    gains = [diagnostics.analyze(run)["composite_gain"] for run in (joined, whole)]
    np.testing.assert_allclose(*gains, rtol=1e-5)


def test_what_is_not_one_pipeline_is_refused():
    blocks, x = plain_blocks(4), torch.randn(3, 6, WIDTH)
    runs = captured(stages_of(blocks, [1, 3], numbered=True), x)
    with pytest.raises(ValueError, match="expected each of 0 to 2 once"):
        probes.merge_runs(runs[:2])
    with pytest.raises(ValueError, match="expected each of 0 to 2 once"):
        probes.merge_runs([runs[0], runs[1], runs[1]])
    other = captured(stages_of(blocks, [1, 3], numbered=True), x + 1)
    with pytest.raises(ValueError, match="the last state of stage 0"):
        probes.merge_runs([runs[0], other[1], other[2]])
    del runs[2].attrs["pipeline_stage"]
    with pytest.raises(ValueError, match="some do not"):
        probes.merge_runs(runs)
    with pytest.raises(ValueError, match="from 0 to 1"):
        probes.capture(blocks[0], x, stage=(2, 2))


def test_blocks_with_a_gap_in_their_numbers_are_refused():
    blocks, x = plain_blocks(4), torch.randn(3, 6, WIDTH)
    first, second = Stage(blocks[:2], numbered=["0", "1"]), Stage(blocks[2:], numbered=["3", "4"])
    runs = [probes.capture(first, x, stage=(0, 2)), probes.capture(second, first(x).detach(), stage=(1, 2))]
    with pytest.raises(ValueError, match="begin with number 3 and 2 blocks come before"):
        probes.merge_runs(runs)
