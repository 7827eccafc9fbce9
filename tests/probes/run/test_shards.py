"""Runs of parts of the data, joined, are the run of all of it; parts that do not make one whole are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope import probes
from depthscope.diagnostics import open_run, save_run
from depthscope.probes import merge_runs
from depthscope.probes.run.shards import SHARD
from depthscope.probes.session.reservoir import Reservoir, rank_in_sample
from tests.models.small_models import deepseek, llama

SIZE = 3  # sequences per forward
CUTS = ((0, 1), (1, 3), (3, 5))  # forwards of each part
# A part keeps more sequences than it has among those of the whole: their proofs and their attention count too.
OF_MORE_SEQUENCES = {
    *("reconstruction_error", "other_orientation_error", "read_error"),
    *("attention_query_count", "attention_entropy_sum", "sink_mass_sum"),
}
STREAMED = ("eigenvalue", "stream_eigenvalue", "hsic", "sum_")


@pytest.fixture(scope="module", params=["llama", pytest.param("deepseek", marks=pytest.mark.slow)])
def whole_and_parts(request):
    model = {"llama": llama, "deepseek": deepseek}[request.param]()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (SIZE, 9), generator=generator) for _ in range(5)]
    batches = [{"input_ids": each, "labels": each} for each in ids]
    options = {"gradients": True, "max_sequences": 4, "streaming": True}
    whole = probes.capture(model, batches, **options)
    parts = [probes.capture(model, batches[a:b], first_sequence=SIZE * a, **options) for a, b in CUTS]
    return whole, parts


def test_joined_parts_are_the_whole(whole_and_parts, tmp_path):
    whole, parts = whole_and_parts
    opened = [open_run(save_run(part, tmp_path / f"{i}.zarr")) for i, part in enumerate(parts)]
    joined = merge_runs([opened[2], opened[0], opened[1]])
    for group in ("trace", "statistics", "coverage"):
        expected, found = whole[group].to_dataset(), joined[group].to_dataset()
        assert set(found.variables) == set(expected.variables)
        for name, variable in expected.variables.items():
            values, of_joined = variable.values, found[name].values
            if name in OF_MORE_SEQUENCES or name.startswith(STREAMED):
                continue
            if values.dtype.kind not in "fiub":
                assert of_joined.astype(object).astype(str).tolist() == values.astype(str).tolist(), name
            elif group == "statistics":
                np.testing.assert_allclose(of_joined, values, rtol=1e-12, err_msg=name)
            else:  # the same forwards: bit for bit
                np.testing.assert_array_equal(of_joined, values, err_msg=name)
    np.testing.assert_allclose(joined.statistics.hsic, whole.statistics.hsic, rtol=1e-6)
    assert float(joined.statistics.streamed_count[0]) == 5 * SIZE * 9
    assert joined.attrs["sampling"] == whole.attrs["sampling"]
    for name in ("family", "constraint", "proof", "sites_expected", "sites_fired"):
        assert joined.attrs.get(name) == whole.attrs.get(name), name


def test_parts_that_do_not_make_one_whole_are_refused(whole_and_parts):
    _, parts = whole_and_parts
    with pytest.raises(ValueError, match="the sequences 3 to 8 are in no part"):
        merge_runs([parts[0], parts[2]])
    with pytest.raises(ValueError, match="two parts have the sequences 3 to 8"):
        merge_runs([parts[0], parts[1], parts[1]])
    other = parts[1].copy()
    other.attrs = {**parts[1].attrs, "weights_digest": "of another model"}
    with pytest.raises(ValueError, match="other weights"):
        merge_runs([parts[0], other])
    other.attrs = {**parts[1].attrs, "sampling": {**parts[1].attrs["sampling"], "seed": 7}}
    with pytest.raises(ValueError, match="made with seed 0 and 7"):
        merge_runs([parts[0], other])


def _shard(run, **facts):
    marked = run.copy()
    marked.attrs = {**run.attrs, "data_digest": "sha256:0", SHARD: {"of": 3, "length": 9, **facts}}
    return marked


def test_shards_of_one_text_are_counted(whole_and_parts):
    _, parts = whole_and_parts
    first, second, third = (_shard(part, number=i + 1) for i, part in enumerate(parts))
    assert SHARD not in merge_runs([first, second, third]).attrs
    with pytest.raises(ValueError, match="shard 2/3 is missing"):
        merge_runs([first, third])
    with pytest.raises(ValueError, match="shard 1/3 is given more than once"):
        merge_runs([first, second, third, first])
    with pytest.raises(ValueError, match="length 9 and 10"):
        merge_runs([first, second, _shard(parts[2], number=3, length=10)])
    third.attrs["data_digest"] = "sha256:1"
    with pytest.raises(ValueError, match="different texts"):
        merge_runs([first, second, third])
    with pytest.raises(ValueError, match="others are not"):
        merge_runs([first, parts[1]])


def test_the_sample_is_uniform_and_that_of_the_lowest_ranks():
    counts = np.zeros(10)
    for seed in range(2000):
        reservoir, slots = Reservoir(3, seed), {}
        for first, size in ((0, 4), (4, 1), (5, 5)):
            slots |= {slot: first + row for row, slot in reservoir.choose(size, stamp=1).items()}
        assert sorted(slots.values()) == sorted(sorted(range(10), key=lambda i: rank_in_sample(seed, i))[:3])
        counts[list(slots.values())] += 1
    # Binomial: the standard deviation of a count is √(2000 · 0.3 · 0.7) = 20.5
    assert abs(counts - 600).max() < 4 * 20.5
