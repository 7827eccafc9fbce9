"""Are weights that are looked for where they were in the step before what a search of all tensors finds?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import depthscope as ds
from depthscope.probes.connections import reading, tensor_watch
from depthscope.probes.connections.read_weights import still_reads
from tests.models.stream_models import deepseek_v4

STEPS = 3


def recorded(monkeypatch, *, remembered: bool):
    """A run of some steps, and among how many tensors each search was."""
    torch.manual_seed(0)
    model, ids = deepseek_v4(), torch.randint(3, 64, (2, 9))
    optimizer, sizes = torch.optim.SGD(model.parameters(), lr=0.1), []
    search, compare = reading.find_read_weights, reading.still_reads

    def counted(x, branch_in, candidates, **more):
        sizes.append(len(candidates))
        return search(x, branch_in, candidates, **more)

    def of_one(*given):
        assert compare(*given)
        sizes.append(1)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(reading, "find_read_weights", counted)
        patch.setattr(reading, "still_reads", of_one)
        if not remembered:
            patch.setattr(
                tensor_watch.WeightPlace, "__setattr__", lambda self, name, value: vars(self).update(among=0)
            )
        with ds.record(model, every=1) as recorder:
            for _ in range(STEPS):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step()
        return recorder.run, sizes


def test_the_place_of_the_read_weights_is_remembered_and_gives_the_same_numbers(monkeypatch):
    (run, sizes), (searched, all_sizes) = (recorded(monkeypatch, remembered=of) for of in (True, False))
    assert min(all_sizes) > 1
    # At every connection, from the second step on.
    assert sizes.count(1) == len(sizes) * (STEPS - 1) // STEPS == len(all_sizes) * (STEPS - 1) // STEPS
    np.testing.assert_array_equal(run["trace"]["h_pre"], searched["trace"]["h_pre"])
    np.testing.assert_array_equal(run["statistics"]["gain_max"], searched["statistics"]["gain_max"])


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_what_does_not_explain_the_branch_input_any_more_is_not_taken(scale):
    draw = torch.Generator().manual_seed(0)
    streams, weights = (torch.randn(2, 9, 4, size, generator=draw) for size in (8, 1))
    read = weights.squeeze(-1)
    branch_in = scale * (read.unsqueeze(-2) @ streams).squeeze(-2)
    assert still_reads(streams, branch_in, scale * read, None)
    assert not still_reads(streams, branch_in, scale * read * 1.001, None)
    assert not still_reads(streams, branch_in, scale * read, scale * read), "it is H_post"
    assert not still_reads(streams, torch.full_like(branch_in, torch.nan), scale * read, None)
    assert not still_reads(streams, branch_in, torch.full_like(read, torch.nan), None)


def test_the_candidate_of_the_forward_before_is_taken_only_where_it_explains_the_goal_as_well():
    draw = torch.Generator().manual_seed(0)
    streams, matrix, other = (torch.randn(2, 9, 4, size, generator=draw) for size in (8, 4, 4))
    goal = matrix @ streams

    def found(candidates, wanted, place):
        asked = []

        def explanation(candidate):
            explain = tensor_watch.mixing(candidate, streams)
            return lambda few: asked.append(len(few)) or explain(few)

        named = [(number, explanation(each)) for number, each in enumerate(candidates)]
        return tensor_watch.explaining(named, wanted, place=place), asked

    place = tensor_watch.WeightPlace()
    assert found([other, matrix], goal, place) == (1, [18, 18])
    assert place.among == 2
    assert found([other, matrix], goal, place) == (1, [tensor_watch.CONFIRMING_TOKENS])
    # Other code that computes as many tensors, in another order; one that is off by a little; and nothing to compare.
    assert found([matrix, other], goal, place)[0] == 0
    assert found([matrix * 1.00005, matrix], goal, place)[0] == 1
    assert found([matrix, other], torch.zeros_like(goal), place)[0] is None
    assert found([matrix, other], torch.full_like(goal, torch.nan), place)[0] is None
