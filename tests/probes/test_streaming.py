"""One pass against all tokens at once in float64: at any offset, in any order and split, in memory that does not grow."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diagnostics
import probes
from diagnostics.kernels import rank, similarity
from probes import sketch, streaming
from probes.accumulate import Sums
from probes.spectra import similarity as streamed_similarity
from probes.spectra import spectra
from probes.streaming import Streaming

L, T, D = 3, 12, 10
CENTRED = (False, True)


def walk(sequences: int, *, seed: int = 0, streams: int = 1, width: int = D, tokens: int = T) -> torch.Tensor:
    """States (L, B, T, N, D) that every depth adds to, on feature axes of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(L, sequences, tokens, streams, width, generator=generator)
    return steps.cumsum(0) * torch.logspace(0, -1, width)


def padding(sequences: int, tokens: int = T) -> torch.Tensor:
    """Each sequence begins with another number of padded tokens."""
    return torch.arange(tokens) >= (torch.arange(sequences) % 5)[:, None]


def seen(states: torch.Tensor, mask: torch.Tensor | None, first: int = 0) -> Streaming:
    """One forward."""
    sums = Sums(Streaming(first))
    for depth, state in enumerate(states):
        sums.see_state(depth, state, mask)
    sums.end_forward()
    return sums.streaming


def in_parts(states: torch.Tensor, mask: torch.Tensor, cuts: list[int]) -> list[Streaming]:
    """Forwards over some sequences each, cut at some places."""
    places = pairwise([0, *sorted(cuts), states.shape[1]])
    return [seen(states[:, a:b], mask[a:b], a) for a, b in places if b > a]


def joined(parts: list[Streaming]) -> Streaming:
    return reduce(Streaming.joined, parts)


def tokens_of(states: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray:
    """Every real token in float64, the mean over streams: (L, tokens, D)."""
    mean = states.double().mean(3)
    return (mean.flatten(1, 2) if mask is None else mean[:, mask]).numpy()


def cka_of(found: Streaming) -> np.ndarray:
    table, _ = streamed_similarity(found, range(L))
    own = table.diagonal().sqrt()
    return (table / own.outer(own)).numpy()


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_those_of_all_tokens_at_any_offset(streams, offset):
    states, mask = walk(9, streams=streams), padding(9)
    states = states + offset * torch.linspace(-1, 1, D)
    x = tokens_of(states, mask)
    found = joined(in_parts(states, mask, [2, 3, 7]))
    for depth in range(L):
        away = x[depth] - x[depth].mean(0)
        scatter = away.T @ away
        size = np.sqrt(np.diag(scatter))
        error = np.abs(np.triu(found.moments[depth].scatter_DD - scatter)) / np.outer(size, size)
        assert error.max() < 1e-6
        assert float(found.moments[depth].count) == mask.sum()
        np.testing.assert_allclose(found.moments[depth].mean_D, x[depth].mean(0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
def test_what_padding_holds_does_not_matter(filling):
    states, mask = walk(6), padding(6)
    filled = torch.where(mask[..., None, None], states, filling)
    clean = joined(in_parts(torch.where(mask[..., None, None], states, 0.0), mask, [4]))
    found = joined(in_parts(filled, mask, [4]))
    for depth in range(L):
        for a, b in zip(found.moments[depth], clean.moments[depth], strict=True):
            assert torch.equal(a, b)
    assert np.array_equal(cka_of(found), cka_of(clean))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_taken_as_they_are(dtype):
    states = walk(5).to(dtype) + torch.tensor(1e4 if dtype == torch.float64 else 0.0, dtype=dtype)
    x = tokens_of(states)
    found = seen(states, None)
    away = x[2] - x[2].mean(0)
    np.testing.assert_allclose(
        np.triu(found.moments[2].scatter_DD), np.triu(away.T @ away), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("sequences", [1, 9], ids=["fewer tokens than features", "more"])
def test_ranks_are_the_one_shot_ones(sequences):
    states = walk(sequences, tokens=7) + 5.0
    x = tokens_of(states)
    found = joined(in_parts(states, torch.ones(sequences, 7, dtype=torch.bool), [sequences // 2]))
    for depth in range(L):
        plain, shaken = spectra(found.moments[depth])
        for centred in CENTRED:
            for name in ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank"):
                exact = float(getattr(rank, name)(x[depth], center=centred))
                for values in (plain, shaken):
                    got = float(getattr(rank, f"{name}_of")(values[int(centred)].sqrt()))
                    assert got == pytest.approx(exact, rel=2e-5), (name, centred)


SPECTRA = {
    "power": torch.arange(1, 49).double() ** -1,
    "spike of 1e5": torch.cat([torch.tensor([1e5]), torch.arange(1, 48).double() ** -1]),
    "all but one 1e-5": torch.cat([torch.ones(1), torch.full((47,), 1e-5)]).double(),
    "half": torch.cat([torch.ones(24), torch.zeros(24)]).double(),
}


@pytest.mark.parametrize("turned", [False, True], ids=["on the axes", "turned"])
@pytest.mark.parametrize("name", SPECTRA)
def test_what_float32_cannot_resolve_is_told_by_shaking(name, turned):
    """Rounding is relative to each pair of features: a collapse onto some of them is exact, one that is turned is not."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2048, 48, generator=generator, dtype=torch.float64) * SPECTRA[name]
    if turned:
        rows = rows @ torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64))[0]
    rows = rows.float()
    found = spectra(seen(rows.reshape(1, 16, 128, 1, 48), None).moments[0])
    plain, shaken = (float(rank.effective_rank_of(values[1].sqrt())) for values in found)
    off = abs(plain / float(rank.effective_rank(rows.numpy(), center=True)) - 1)
    moved = abs(shaken / plain - 1)
    assert off < 1e-6 or off < 2 * moved
    assert (moved < 1e-3) == (not turned or name == "power")
    for measure in (rank.entropy_rank_of, rank.participation_ratio_of, rank.stable_rank_of):
        shifts = [float(measure(values[1].sqrt())) for values in found]
        assert shifts[1] == pytest.approx(shifts[0], rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite_makes_its_depth_undefined(bad):
    states = walk(30)
    states[1, 0, 4, 0, 2] = bad
    found = seen(states, None)
    assert torch.isnan(spectra(found.moments[1])[0]).all()
    assert torch.isfinite(spectra(found.moments[0])[0]).all()
    assert (found.sketches[0, 1, 2].score_h >= 0).all()  # the token is not taken for padding
    table = cka_of(found)
    assert np.isnan(table[1]).all()
    exact = similarity.cka_matrix(tokens_of(states)[[0, 2]], unbiased=True)
    np.testing.assert_allclose(table[[0, 2]][:, [0, 2]], exact, atol=0.1)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_squares_that_float32_cannot_hold(scale):
    states = walk(30) * scale
    found, x = seen(states, None), tokens_of(states)
    for depth in range(L):
        got = float(rank.effective_rank_of(spectra(found.moments[depth])[0][1].sqrt()))
        assert got == pytest.approx(float(rank.effective_rank(x[depth], center=True)), rel=1e-6)
    np.testing.assert_allclose(cka_of(found), cka_of(seen(walk(30), None)), rtol=1e-5)


@pytest.mark.parametrize(("setting", "dtype"), [("highest", torch.float32), ("medium", torch.float64)])
def test_coarser_products_of_the_user_do_not_reach_the_sums(setting, dtype):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert streaming._product(torch.ones(3, 2)).dtype == dtype
    finally:
        torch.set_float32_matmul_precision(before)


# The sketch


def test_buckets_and_signs_are_those_of_the_kernel(monkeypatch):
    monkeypatch.setattr(sketch, "HEAVY", 1)
    states = walk(4)
    found = seen(states, None, first=7).sketches[0, 1, 2]
    index = sketch.token_index(7, 4, T, torch.device("cpu"))
    x = tokens_of(states)
    expected, signs = similarity.row_sketch(x, index.numpy(), sketch.BUCKETS)
    heavy = similarity.row_sketch(found.heavy_LhD.numpy(), found.index_h.numpy(), sketch.BUCKETS)
    np.testing.assert_allclose(found.buckets_LmD + heavy[0], expected, atol=1e-5)
    np.testing.assert_array_equal(found.signs_m + heavy[1], signs)


def test_token_numbers_are_distinct():
    index = torch.cat([sketch.token_index(first, 500, 2000, torch.device("cpu")) for first in (0, 40_000)])
    assert len(index.unique()) == len(index) == 2_000_000
    assert torch.equal(index[3 * 2000 : 4 * 2000], sketch.token_index(3, 1, 2000, torch.device("cpu")))


def test_up_to_the_number_of_heavy_tokens_cka_is_exact():
    states, mask = walk(10) + 1e3, padding(10)
    assert mask.sum() <= sketch.HEAVY
    found = joined(in_parts(states, mask, [1, 4, 5]))
    exact = similarity.cka_matrix(tokens_of(states, mask), unbiased=True)
    np.testing.assert_allclose(cka_of(found), exact, atol=1e-6)


def test_hsic_without_a_group_rests_on_the_same_heavy_tokens():
    table, without = streamed_similarity(seen(walk(10), None), range(L))
    torch.testing.assert_close(without, table.expand_as(without))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_hsic_is_unbiased_and_says_how_near_it_is(offset, monkeypatch):
    """Over many sketches the mean is right, by all buckets and by some, and the spread is what the error says."""
    monkeypatch.setattr(sketch, "HEAVY", 20)
    monkeypatch.setattr(sketch, "BUCKETS", 128)
    states, mask = walk(100, width=16), padding(100)
    states[:, ::10, 6] *= torch.tensor([8.0, 10.0, 12.0])[:, None, None, None]  # massive tokens
    x = tokens_of(states, mask)
    square = ((x - x.mean(1, keepdims=True)) ** 2).sum(-1).mean(1)
    exact = similarity.hsic_matrix(x) / np.outer(square, square)
    found = []
    for first in range(0, 300_000, 1000):
        parts = [seen(states[:, a : a + 50] + offset, mask[a : a + 50], first + a) for a in (0, 50)]
        found.append([table.numpy() for table in streamed_similarity(joined(parts), range(L))])
    whole = np.array([table for table, _ in found])
    without = np.array([tables.mean(0) for _, tables in found])
    for estimates in (whole, without):
        error = estimates.std(0) / math.sqrt(len(found))
        assert (error < 0.01 * exact).all()
        assert (np.abs(estimates.mean(0) - exact) < 4 * error).all()
    groups = sketch.GROUPS
    jackknife = [((t - t.mean(0)) ** 2).sum(0) * (groups - 1) / groups for _, t in found]
    ratio = np.sqrt(np.mean(jackknife, axis=0)) / whole.std(0)
    assert (ratio > 0.7).all()
    assert (ratio < 1.6).all()


def test_cka_with_massive_tokens_is_near_the_exact_one(monkeypatch):
    monkeypatch.setattr(sketch, "HEAVY", 32)
    states, mask = walk(200, width=24) + 1e3, padding(200)
    states[1:, ::40, 6, 0, :3] += 3000.0
    found = joined(in_parts(states, mask, [50, 100, 150]))
    exact = similarity.cka_matrix(tokens_of(states, mask), unbiased=True)
    np.testing.assert_allclose(cka_of(found), exact, atol=0.04)


def test_heavy_tokens_found_on_the_way_are_the_heaviest_of_all(monkeypatch):
    monkeypatch.setattr(sketch, "HEAVY", 5)
    states, mask = walk(20), padding(20)
    heavy = [(1, 7), (4, 11), (9, 6), (9, 10), (16, 5)]
    for sequence, position in heavy:
        states[:, sequence, position] *= 100.0
    index = sketch.token_index(0, 20, T, torch.device("cpu")).reshape(20, T)
    for cuts in ([], [5], [2, 9, 10, 17]):
        found = joined(in_parts(states, mask, cuts)).sketches[0, 1, 2]
        assert set(found.index_h.tolist()) == {int(index[place]) for place in heavy}


# Any order and split


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_order_of_merging_gives_the_same(data):
    states, mask = walk(24, seed=3) + 10.0, padding(24)
    cuts = data.draw(st.lists(st.integers(1, 23), unique=True, max_size=6))
    parts = in_parts(states, mask, cuts)
    whole = joined(parts)
    pool = data.draw(st.permutations(parts))
    while len(pool) > 1:  # a random tree, as processes may reduce
        a, b = (pool.pop(data.draw(st.integers(0, len(pool) - 1))) for _ in range(2))
        pool.append(a.joined(b))
    for depth in range(L):
        torch.testing.assert_close(pool[0].moments[depth], whole.moments[depth], rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(cka_of(pool[0]), cka_of(whole), atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 23), unique=True, max_size=8))
def test_any_split_gives_the_moments_of_the_whole_and_cka_within_its_error(cuts):
    states, mask = walk(24, seed=4) + 10.0, padding(24)
    split, whole = joined(in_parts(states, mask, cuts)), seen(states, mask)
    for depth in range(L):
        torch.testing.assert_close(split.moments[depth], whole.moments[depth], rtol=1e-6, atol=1e-4)
    exact = similarity.cka_matrix(tokens_of(states, mask), unbiased=True)
    np.testing.assert_allclose(cka_of(split), exact, atol=0.12)  # 256 buckets and 128 tokens of 240


def test_merging_writes_neither_side():
    states, mask = walk(24), padding(24)
    a, b = in_parts(states, mask, [12])
    before = [value.clone() for part in (a, b) for value in numbers(part)]
    a.joined(b)
    assert all(torch.equal(x, y) for x, y in zip(before, [*numbers(a), *numbers(b)], strict=True))


def numbers(of: Streaming) -> list[torch.Tensor]:
    """Every tensor that is held."""
    return [value for part in (*of.moments.values(), *of.sketches.values()) for value in part]


def test_no_number_of_batches_enlarges_what_is_held():
    held = {}
    for count in (2, 8, 24):
        parts = (seen(walk(16, seed=i), None, 16 * i) for i in range(count))
        held[count] = sum(value.numel() for value in numbers(reduce(Streaming.joined, parts)))
    assert held[2] == held[8] == held[24]
    of_moments = L * (D * D + D + 1)
    of_sketch = L * (sketch.BUCKETS + sketch.HEAVY) * D + sketch.BUCKETS + 2 * sketch.HEAVY + 1
    assert held[24] == of_moments + of_sketch


def test_nothing_waits_for_the_device():
    """A meta tensor holds no numbers, so that reading one back raises."""
    for mask in (None, torch.ones(4, T, dtype=torch.bool, device="meta")):
        parts = [seen(torch.empty(L, 4, T, 2, D, device="meta"), mask, first) for first in (0, 4)]
        found = joined(parts)
        assert found.moments[1].scatter_DD.device.type == "meta"
        assert found.sketches[0, 1, 2].buckets_LmD.device.type == "meta"


def test_depths_of_another_width_or_number_of_tokens_are_sketched_apart():
    sums = Sums(Streaming())
    shapes = [(2, T, 1, D), (2, T, 1, D), (2, T // 2, 1, 2 * D), (2, T // 2, 1, 2 * D)]
    for depth, shape in enumerate(shapes):
        sums.see_state(depth, torch.randn(shape), None)
    sums.end_forward()
    assert set(sums.streaming.sketches) == {(0, 1), (2, 3)}
    assert streamed_similarity(sums.streaming, [2, 3])[0].shape == (2, 2)
    assert streamed_similarity(sums.streaming, [1, 2]) is None


# Through the model


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 64, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_a_capture_streams_what_its_trace_shows(models, family):
    """Where every sequence is kept raw, the metrics of both roads agree."""
    run = probes.capture(models[family](), batches(4), max_sequences=8, streaming=True)
    found = diagnostics.analyze(run)
    assert float(run.statistics.streamed_count[0]) == run.trace.mask.values.sum() == 4 * 15
    for name in ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank"):
        exact = found[name].sel(scope="data", tokens="all", stream="mean", drop=True)
        got = found[f"streamed_{name}"].transpose(*exact.dims)
        known = got.notnull().values
        assert known[..., 1:].all(), name  # embeddings of few words are turned zeros
        rtol = 1e-3 if name == "effective_rank" else 1e-5
        np.testing.assert_allclose(got.values[known], exact.values[known], rtol=rtol, err_msg=name)
    exact = found.cka.sel(estimator="unbiased", tokens="all").values
    np.testing.assert_allclose(found.streamed_cka.values, exact, atol=1e-5)  # so few are all kept as they are
    assert float(found.streamed_cka_error.max()) < 1e-9


def test_a_loop_streams_every_batch_and_begins_anew_with_other_weights(models):
    model = models["llama"]().eval()
    parts = batches(5)

    def recorded(some, *, change: bool = False):
        with probes.record(model, max_sequences=10, streaming=True) as recorder:
            for batch in some:
                with torch.no_grad():
                    model(**batch)
                recorder.step()
                if change:
                    with torch.no_grad():
                        next(model.parameters()).add_(0.0)
        return recorder.run.statistics

    one_shot = probes.capture(model, parts, streaming=True).statistics
    looped = recorded(parts)
    for name in ("streamed_count", "eigenvalue", "hsic"):
        np.testing.assert_allclose(looped[name].values, one_shot[name].values, rtol=1e-6, atol=1e-6)
    last = recorded(parts, change=True)
    assert float(last.streamed_count[0]) == 15


def test_off_by_default(models):
    run = probes.capture(models["llama"](), batches(1))
    assert not {"eigenvalue", "hsic"} & set(run.statistics.data_vars)
    reason = diagnostics.analyze(run).attrs["not_computed"]["streamed_effective_rank"]
    assert "capture it with streaming=True" in reason


def test_a_saved_run_keeps_what_was_streamed(models, tmp_path):
    run = probes.capture(models["llama"](), batches(2), streaming=True)
    opened = diagnostics.open_run(diagnostics.save_run(run, tmp_path / "a.nc"))
    for name in ("eigenvalue", "hsic_without"):
        np.testing.assert_array_equal(opened.statistics[name].values, run.statistics[name].values)


def test_blocks_of_tokens_and_strips_of_features_add_up(monkeypatch):
    states = walk(6)
    whole = seen(states, None)
    monkeypatch.setattr(streaming, "ADDED", 5)
    monkeypatch.setattr(streaming, "STRIP", 4)
    cut, whole = (spectra(found.moments[2])[0] for found in (seen(states, None), whole))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
