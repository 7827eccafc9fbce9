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

from benchmarks.analysis import sketches
from depthscope import diagnostics, probes
from depthscope.diagnostics.kernels import rank, similarity
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.statistics import depth_sketch, second_moments, streamed_sums
from depthscope.probes.statistics.streamed_spectra import depth_hsic, moment_spectra, streamed_variables
from depthscope.probes.statistics.streamed_sums import StreamedSums
from depthscope.probes.statistics.token_sums import TokenSums

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


def forward(states: torch.Tensor, mask: torch.Tensor | None, first: int = 0) -> StreamedSums:
    """One forward, whose tokens still wait."""
    sums = TokenSums(StreamedSums(first))
    for depth, state in enumerate(states):
        sums.add_state(depth, state, mask)
    sums.end_forward()
    return sums.streaming


def seen(states: torch.Tensor, mask: torch.Tensor | None, first: int = 0) -> StreamedSums:
    """One forward, added up."""
    return forward(states, mask, first).flushed()


def in_parts(states: torch.Tensor, mask: torch.Tensor, cuts: list[int]) -> list[StreamedSums]:
    """Forwards over some sequences each, cut at some places."""
    places = pairwise([0, *sorted(cuts), states.shape[1]])
    return [forward(states[:, a:b], mask[a:b], a) for a, b in places if b > a]


def joined(parts: list[StreamedSums]) -> StreamedSums:
    return reduce(StreamedSums.merged_with, parts).flushed()


def assert_close(a: second_moments.Moments, b: second_moments.Moments, **allowed: float) -> None:
    """Below the diagonal nothing is meant."""
    torch.testing.assert_close(a.count, b.count)
    torch.testing.assert_close(a.mean_D, b.mean_D, **allowed)
    torch.testing.assert_close(a.scatter_DD.triu(), b.scatter_DD.triu(), **allowed)


def tokens_of(states: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray:
    """Every real token in float64, the mean over streams: (L, tokens, D)."""
    mean = states.double().mean(3)
    return (mean.flatten(1, 2) if mask is None else mean[:, mask]).numpy()


def cka_of(found: StreamedSums) -> np.ndarray:
    table, _ = depth_hsic(found, range(L))
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
        error = np.abs(np.triu(found.moments[depth, 0].scatter_DD - scatter)) / np.outer(size, size)
        assert error.max() < 1e-6
        assert float(found.moments[depth, 0].count) == mask.sum()
        np.testing.assert_allclose(found.moments[depth, 0].mean_D, x[depth].mean(0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
def test_what_padding_holds_does_not_matter(filling):
    states, mask = walk(6), padding(6)
    filled = torch.where(mask[..., None, None], states, filling)
    clean = joined(in_parts(torch.where(mask[..., None, None], states, 0.0), mask, [4]))
    found = joined(in_parts(filled, mask, [4]))
    for depth in range(L):
        for a, b in zip(found.moments[depth, 0][:3], clean.moments[depth, 0][:3], strict=True):
            assert torch.equal(a, b)
    assert np.array_equal(cka_of(found), cka_of(clean))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_taken_as_they_are(dtype):
    states = walk(5).to(dtype) + torch.tensor(1e4 if dtype == torch.float64 else 0.0, dtype=dtype)
    x = tokens_of(states)
    found = seen(states, None)
    away = x[2] - x[2].mean(0)
    np.testing.assert_allclose(
        np.triu(found.moments[2, 0].scatter_DD), np.triu(away.T @ away), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("sequences", [1, 9], ids=["fewer tokens than features", "more"])
def test_ranks_are_the_one_shot_ones(sequences):
    states = walk(sequences, tokens=7) + 5.0
    x = tokens_of(states)
    found = joined(in_parts(states, torch.ones(sequences, 7, dtype=torch.bool), [sequences // 2]))
    for depth in range(L):
        plain, shaken = moment_spectra(found.moments[depth, 0])
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
    sums = TokenSums(StreamedSums())
    sums.add_state(1, rows.reshape(16, 128, 1, 48), None)
    sums.end_forward()
    found = moment_spectra(sums.streaming.flushed().moments[1, 0])
    plain, shaken = (float(rank.effective_rank_of(values[1].sqrt())) for values in found)
    off = abs(plain / float(rank.effective_rank(rows.numpy(), center=True)) - 1)
    moved = abs(shaken / plain - 1)
    assert off < 1e-6 or off < 2 * moved
    assert (moved < 1e-3) == (not turned or name == "power")
    for measure in (rank.entropy_rank_of, rank.participation_ratio_of, rank.stable_rank_of):
        shifts = [float(measure(values[1].sqrt())) for values in found]
        assert shifts[1] == pytest.approx(shifts[0], rel=1e-4)


def test_equal_words_are_equal_tokens_and_their_embedding_has_its_rank():
    """Few words, turned: the covariance of the first depth is deficient, which float32 products would not show."""
    words = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)) + 3.0
    states = words[torch.arange(160) % 7].reshape(1, 8, 20, 1, 24)
    parts = in_parts(states, torch.ones(8, 20, dtype=torch.bool), [1, 5])
    found = moment_spectra(joined(parts).moments[0, 0])
    x = tokens_of(states)[0]
    for centred in CENTRED:
        exact = float(rank.effective_rank(x, center=centred))
        for values in found:
            assert float(rank.effective_rank_of(values[int(centred)].sqrt())) == pytest.approx(
                exact, rel=1e-4
            )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_tokens_that_are_not_finite_are_left_out_everywhere_and_counted(bad, offset):
    states, mask = walk(30) + offset, padding(30)
    states[1, 4, 7, 0, 2] = bad
    states[2, 11] = bad
    states[0, 20:] = bad  # complete batches
    good = mask & states.isfinite().all(-1).all(-1).all(0)
    found = joined(in_parts(states, mask, [7, 20, 25]))
    assert int(found.left_out[0, 1, 2]) == (mask & ~good).sum()
    x = tokens_of(states, good)
    for depth in range(L):
        assert float(found.moments[depth, 0].count) == good.sum()
        np.testing.assert_allclose(found.moments[depth, 0].mean_D, x[depth].mean(0), rtol=1e-7, atol=1e-6)
        got = float(rank.effective_rank_of(moment_spectra(found.moments[depth, 0])[0][1].sqrt()))
        assert got == pytest.approx(float(rank.effective_rank(x[depth], center=True)), rel=1e-5)
    np.testing.assert_allclose(cka_of(found), similarity.cka_matrix(x, unbiased=True), atol=0.1)


def test_nothing_finite_is_undefined():
    found = seen(torch.full((L, 2, T, 1, D), math.nan), None)
    assert float(found.moments[0, 0].count) == 0
    assert int(found.left_out[0, 1, 2]) == 2 * T
    assert not moment_spectra(found.moments[1, 0])[0].any()  # no direction
    assert np.isnan(cka_of(found)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_squares_that_float32_cannot_hold(scale):
    states = walk(30) * scale
    found, x = seen(states, None), tokens_of(states)
    for depth in range(L):
        got = float(rank.effective_rank_of(moment_spectra(found.moments[depth, 0])[0][1].sqrt()))
        assert got == pytest.approx(float(rank.effective_rank(x[depth], center=True)), rel=1e-6)
    np.testing.assert_allclose(cka_of(found), cka_of(seen(walk(30), None)), rtol=1e-5)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_coarser_products_of_the_user_do_not_reach_the_sums(setting):
    states = walk(9)
    x = tokens_of(states)[2]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        found = seen(states, None).moments[2, 0]
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.rounding == second_moments.ROUNDING_FLOAT64
    away = x - x.mean(0)
    np.testing.assert_allclose(np.triu(found.scatter_DD), np.triu(away.T @ away), rtol=1e-6, atol=1e-5)


def test_states_too_wide_for_their_sums_are_refused():
    with pytest.raises(CaptureError, match="keep 288 MiB at each depth for 6144 features, more than 256"):
        forward(torch.zeros(1, 1, 1, 1, 6144), None)


# The sketch


def test_buckets_and_signs_are_those_of_the_kernel(monkeypatch):
    monkeypatch.setattr(depth_sketch, "NUM_HEAVY", 1)
    states = walk(4)
    found = seen(states, None, first=7).sketches[0, 1, 2]
    index = depth_sketch.token_index(torch.arange(7, 11), T)
    x = tokens_of(states)
    expected, signs = sketches.row_sketch(x, index.numpy(), depth_sketch.NUM_BUCKETS)
    heavy = sketches.row_sketch(found.heavy_LhD.numpy(), found.index_h.numpy(), depth_sketch.NUM_BUCKETS)
    np.testing.assert_allclose(found.buckets_LmD + heavy[0], expected, atol=1e-5)
    np.testing.assert_array_equal(found.signs_m + heavy[1], signs)


def test_token_numbers_are_distinct():
    index = torch.cat(
        [depth_sketch.token_index(torch.arange(first, first + 500), 2000) for first in (0, 40_000)]
    )
    assert len(index.unique()) == len(index) == 2_000_000
    assert torch.equal(index[3 * 2000 : 4 * 2000], depth_sketch.token_index(torch.tensor([3]), 2000))


def test_up_to_the_number_of_heavy_tokens_cka_is_exact():
    states, mask = walk(10) + 1e3, padding(10)
    assert mask.sum() <= depth_sketch.NUM_HEAVY
    found = joined(in_parts(states, mask, [1, 4, 5]))
    exact = similarity.cka_matrix(tokens_of(states, mask), unbiased=True)
    np.testing.assert_allclose(cka_of(found), exact, atol=1e-6)


def test_hsic_without_a_group_rests_on_the_same_heavy_tokens():
    table, without = depth_hsic(seen(walk(10), None), range(L))
    torch.testing.assert_close(without, table.expand_as(without))


@pytest.mark.slow(but=1, more=1)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_hsic_is_unbiased_and_says_how_near_it_is(offset, monkeypatch):
    """Over many sketches the mean is right, by all buckets and by some, and the spread is as large as the stated error."""
    monkeypatch.setattr(depth_sketch, "NUM_HEAVY", 20)
    monkeypatch.setattr(depth_sketch, "NUM_BUCKETS", 128)
    states, mask = walk(100, width=16), padding(100)
    states[:, ::10, 6] *= torch.tensor([8.0, 10.0, 12.0])[:, None, None, None]  # massive tokens
    x = tokens_of(states, mask)
    square = ((x - x.mean(1, keepdims=True)) ** 2).sum(-1).mean(1)
    exact = similarity.hsic_matrix(x) / np.outer(square, square)
    found = []
    for first in range(0, 300_000, 1000):
        parts = [forward(states[:, a : a + 50] + offset, mask[a : a + 50], first + a) for a in (0, 50)]
        found.append([table.numpy() for table in depth_hsic(joined(parts), range(L))])
    full = np.array([table for table, _ in found])
    without = np.array([tables.mean(0) for _, tables in found])
    for estimates in (full, without):
        error = estimates.std(0) / math.sqrt(len(found))
        assert (error < 0.01 * exact).all()
        assert (np.abs(estimates.mean(0) - exact) < 4 * error).all()
    groups = depth_sketch.NUM_GROUPS
    jackknife = [((t - t.mean(0)) ** 2).sum(0) * (groups - 1) / groups for _, t in found]
    ratio = np.sqrt(np.mean(jackknife, axis=0)) / full.std(0)
    assert (ratio > 0.7).all()
    assert (ratio < 1.6).all()


def test_cka_with_massive_tokens_is_near_the_exact_one(monkeypatch):
    monkeypatch.setattr(depth_sketch, "NUM_HEAVY", 32)
    states, mask = walk(200, width=24) + 1e3, padding(200)
    states[1:, ::40, 6, 0, :3] += 3000.0
    found = joined(in_parts(states, mask, [50, 100, 150]))
    exact = similarity.cka_matrix(tokens_of(states, mask), unbiased=True)
    np.testing.assert_allclose(cka_of(found), exact, atol=0.04)


def test_heavy_tokens_found_on_the_way_are_the_heaviest_of_all(monkeypatch):
    monkeypatch.setattr(depth_sketch, "NUM_HEAVY", 5)
    states, mask = walk(20), padding(20)
    heavy = [(1, 7), (4, 11), (9, 6), (9, 10), (16, 5)]
    for sequence, position in heavy:
        states[:, sequence, position] *= 100.0
    index = depth_sketch.token_index(torch.arange(20), T).reshape(20, T)
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
    merged = joined(parts)
    pool = data.draw(st.permutations(parts))
    while len(pool) > 1:  # a random tree, as processes may reduce
        a, b = (pool.pop(data.draw(st.integers(0, len(pool) - 1))) for _ in range(2))
        pool.append(a.merged_with(b))
    found = pool[0].flushed()
    for depth in range(L):
        assert_close(found.moments[depth, 0], merged.moments[depth, 0], rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(cka_of(found), cka_of(merged), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_order_and_split_is_the_whole_whatever_a_batch_holds(data):
    """Batches of one sequence, of none, of padding, in any order, some added up before, after an odd first batch."""
    states, mask = walk(24, seed=5, streams=2), padding(24)
    offset = data.draw(st.sampled_from([0.0, 1e2, 1e4]))
    states[:, 0] += offset  # a first forward far from all others
    mask[data.draw(st.integers(1, 23))] = False
    cuts = data.draw(st.lists(st.integers(1, 23), unique=True, max_size=23))
    parts = [*in_parts(states, mask, cuts), forward(states[:, :0], mask[:0], 24)]
    early = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    parts = [part.flushed() if now else part for part, now in zip(parts, early, strict=True)]
    found = joined(data.draw(st.permutations(parts)))
    x = states.double()[:, mask].numpy()
    for depth in range(L):
        for view, rows in enumerate([x[depth].mean(1), x[depth][:, 0], x[depth][:, 1]]):
            away = rows - rows.mean(0)
            scatter = away.T @ away
            size = np.sqrt(np.diag(scatter))
            error = np.abs(np.triu(found.moments[depth, view].scatter_DD - scatter)) / np.outer(size, size)
            assert error.max() < found.moments[depth, view].rounding
            assert float(found.moments[depth, view].count) == len(rows)
    assert found.sequences == ((0, 24),)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_first_batch_that_is_an_outlier_costs_no_digits(offset):
    """Ranks of what all other batches hold, about a mean that the first one is a million spreads away from."""
    states, mask = walk(24, seed=6), torch.ones(24, T, dtype=torch.bool)
    states[:, 1:] += offset
    parts = in_parts(states, mask, [1, 5, 9])
    for found in (joined(parts[1:]), joined([part.flushed() for part in parts[1:]])):
        x = tokens_of(states[:, 1:])
        got = float(rank.effective_rank_of(moment_spectra(found.moments[2, 0])[0][1].sqrt()))
        assert got == pytest.approx(float(rank.effective_rank(x[2], center=True)), rel=1e-6)
    x = tokens_of(states)[2]
    away = x - x.mean(0)
    found = joined(parts).moments[2, 0].scatter_DD
    np.testing.assert_allclose(np.triu(found), np.triu(away.T @ away), rtol=1e-7)


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 23), unique=True, max_size=8))
def test_any_split_gives_the_moments_of_the_whole_and_cka_within_its_error(cuts):
    states, mask = walk(24, seed=4) + 10.0, padding(24)
    split, at_once = joined(in_parts(states, mask, cuts)), seen(states, mask)
    for depth in range(L):
        assert_close(split.moments[depth, 0], at_once.moments[depth, 0], rtol=1e-6, atol=1e-4)
    exact = similarity.cka_matrix(tokens_of(states, mask), unbiased=True)
    np.testing.assert_allclose(cka_of(split), exact, atol=0.12)  # 512 buckets and 128 tokens of 240


def test_merging_writes_neither_side():
    states, mask = walk(24), padding(24)
    a, b = in_parts(states, mask, [12])
    before = [value.clone() for part in (a, b) for value in numbers(part)]
    a.merged_with(b)
    assert all(torch.equal(x, y) for x, y in zip(before, [*numbers(a), *numbers(b)], strict=True))


def numbers(of: StreamedSums) -> list[torch.Tensor]:
    """Every tensor that is held, those that wait included."""
    parts = [part for waiting in of._buffer.values() for part in waiting]
    waiting = [view.signed_tD for part in parts for state in part.states for view in state.views]
    added = [value for part in (*of.moments.values(), *of.sketches.values()) for value in part]
    return waiting + [value for value in added if isinstance(value, torch.Tensor)]


def test_no_number_of_batches_enlarges_what_is_held():
    held = {}
    for count in (2, 8, 24):
        parts = (forward(walk(16, seed=i), None, 16 * i) for i in range(count))
        merged = reduce(StreamedSums.merged_with, parts)
        assert (
            sum(len(part.placement.real_t) for waiting in merged._buffer.values() for part in waiting) < 2 * D
        )
        held[count] = sum(value.numel() for value in numbers(merged))
    assert held[2] == held[8] == held[24]
    of_moments = L * (D * D + D + 1)
    of_sketch = (
        L * (depth_sketch.NUM_BUCKETS + depth_sketch.NUM_HEAVY + 1) * D
        + L
        + depth_sketch.NUM_BUCKETS
        + 2 * depth_sketch.NUM_HEAVY
        + 1
    )
    assert held[24] == of_moments + of_sketch


def test_nothing_waits_for_the_device():
    """A meta tensor has no numbers, so that reading one back raises."""
    for mask in (None, torch.ones(4, T, dtype=torch.bool, device="meta")):
        parts = [seen(torch.empty(L, 4, T, 2, D, device="meta"), mask, first) for first in (0, 4)]
        found = joined([part.flushed() for part in parts])
        assert found.moments[1, 0].scatter_DD.device.type == "meta"
        assert found.sketches[0, 1, 2].buckets_LmD.device.type == "meta"


def test_depths_of_another_width_or_number_of_tokens_are_sketched_apart():
    sums = TokenSums(StreamedSums())
    shapes = [(2, T, 1, D), (2, T, 1, D), (2, T // 2, 1, 2 * D), (2, T // 2, 1, 2 * D)]
    for depth, shape in enumerate(shapes):
        sums.add_state(depth, torch.randn(shape), None)
    sums.end_forward()
    found = sums.streaming.flushed()
    assert set(found.sketches) == {(0, 1), (2, 3)}
    assert depth_hsic(found, [2, 3])[0].shape == (2, 2)
    assert depth_hsic(found, [1, 2]) is None


# A part of the sequences


def test_of_each_so_many_sequences_one_is_drawn_at_random():
    drawn = [i for i in range(4000) if streamed_sums.is_drawn(i, 4)]
    assert [i // 4 for i in drawn] == list(range(1000))
    shares = np.bincount([i % 4 for i in drawn]) / 1000
    assert (np.abs(shares - 0.25) < 0.05).all()
    assert all(streamed_sums.is_drawn(i, 1) for i in range(9))


@pytest.mark.parametrize("streams", [1, 3])
def test_what_is_drawn_is_all_that_is_streamed_in_any_split(streams):
    states, mask = walk(30, streams=streams) + 1e3, padding(30)
    places = [i for i in range(30) if streamed_sums.is_drawn(7 + i, 3)]
    parts = [seen(states[:, [i]], mask[[i]], 7 + i) for i in places]
    for cuts in ([], [1, 2, 9, 25], [20]):
        found = StreamedSums(7, every=3)
        for a, b in pairwise([0, *cuts, 30]):
            sums = TokenSums(StreamedSums(7 + a, every=3))
            for depth, state in enumerate(states[:, a:b]):
                sums.add_state(depth, state, mask[a:b])
            sums.end_forward()
            found = found.merged_with(sums.streaming)
        found, expected = found.flushed(), joined(parts)
        assert found.every == 3
        assert set(found.moments) == set(expected.moments)
        for key, of in expected.moments.items():
            assert_close(found.moments[key], of, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(cka_of(found), cka_of(expected), atol=1e-6)


def test_where_nothing_is_drawn_nothing_is_known():
    place = next(i for i in range(4) if not streamed_sums.is_drawn(i, 4))
    sums = TokenSums(StreamedSums(place, every=4))
    for depth, state in enumerate(walk(1)):
        sums.add_state(depth, state, None)
    sums.end_forward()
    variables, _ = streamed_variables(sums.streaming, range(L))
    assert not variables["streamed_count"][1].any()
    assert np.isnan(variables["hsic"][1]).all()


# In place, where nobody else refers to it


def test_sums_write_what_they_made_and_not_what_they_were_given():
    states, mask = walk(30), padding(30)
    parts = [TokenSums(part) for part in in_parts(states, mask, [10, 20])]
    given = parts[0].streaming.flushed()
    before = [value.clone() for value in numbers(given)]
    merged = TokenSums(given)
    for part in parts[1:]:
        merged.merge(part)
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(given), strict=True))
    held = merged.streaming.flushed()
    merged = TokenSums(held)
    merged.merge(TokenSums(forward(walk(30, seed=2), None, 30)))
    place = merged.streaming.moments[1, 0].scatter_DD.data_ptr()
    merged.merge(TokenSums(forward(walk(30, seed=3), None, 60)))
    assert merged.streaming.moments[1, 0].scatter_DD.data_ptr() == place
    assert held.moments[1, 0].scatter_DD.data_ptr() != place


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
    """Where every sequence is sampled, streamed metrics and those of the trace agree."""
    run = probes.capture(models[family](), batches(4), max_sequences=8, streaming=True)
    found = diagnostics.analyze(run)
    assert float(run.statistics.streamed_count[0]) == run.trace.mask.values.sum() == 4 * 15
    for name in ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank"):
        exact = found[name].sel(scope="data", tokens="all", drop=True)
        got = found[f"streamed_{name}"].transpose(*exact.dims)
        known = got.notnull().values
        assert got.sel(stream="mean").notnull().all(), name  # one stream may hold few words, turned
        rtol = 1e-3 if name == "effective_rank" else 1e-5
        np.testing.assert_allclose(got.values[known], exact.values[known], rtol=rtol, err_msg=name)
    exact = found.cka.sel(estimator="unbiased", tokens="all").values
    np.testing.assert_allclose(
        found.streamed_cka.values, exact, atol=1e-5
    )  # so few tokens are all stored exactly
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


def test_one_sequence_in_four_says_of_how_many_tokens(models):
    parts = batches(12)
    run = probes.capture(models["llama"](), parts, streaming={"every": 4, "first_sequence": 40})
    drawn = [i for i in range(24) if streamed_sums.is_drawn(40 + i, 4)]
    expected = sum(int(parts[i // 2]["attention_mask"][i % 2].sum()) for i in drawn)
    count = run.statistics.streamed_count
    assert len(drawn) == 6
    assert (count == expected).all()
    assert count.attrs["every"] == 4
    assert int(run.trace["sample"].max()) < 24  # the sample's numbers stay


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": 0.25}, {"first_sequence": -1}, {"share": 4}])
def test_other_ways_of_streaming_are_refused(models, wrong):
    with pytest.raises(ValueError, match="expected True, or some of every"):
        probes.capture(models["llama"](), batches(1), streaming=wrong)


def test_off_by_default(models):
    run = probes.capture(models["llama"](), batches(1))
    assert not {"eigenvalue", "hsic"} & set(run.statistics.data_vars)
    reason = diagnostics.analyze(run).attrs["not_computed"]["streamed_effective_rank"]
    assert "capture it with streaming=True" in reason


def test_a_saved_run_keeps_what_was_streamed(models, tmp_path):
    run = probes.capture(models["llama"](), batches(2), streaming=True)
    opened = diagnostics.open_run(diagnostics.save_run(run, tmp_path / "a.zarr.zip"))
    for name in ("eigenvalue", "hsic_without"):
        np.testing.assert_array_equal(opened.statistics[name].values, run.statistics[name].values)


# The stated errors


def heavy_tailed(sequences: int, width: int) -> torch.Tensor:
    """States (L, B, T, 1, D) whose tokens' sizes have no fourth moment: Student's t with 3 degrees of freedom."""
    states = walk(sequences, seed=7, width=width)
    generator = torch.Generator().manual_seed(8)
    square = torch.randn(sequences, T, 3, generator=generator).square().mean(-1)
    return states / square.sqrt()[None, ..., None, None] + 50.0


def assert_honest(states: torch.Tensor, found: StreamedSums) -> None:
    """True errors of the ranks and of CKA lie within what is stated."""
    depths, x = range(len(states)), tokens_of(states)
    for depth in depths:
        plain, shaken = moment_spectra(found.moments[depth, 0])
        for centred in CENTRED:
            exact = float(rank.effective_rank(x[depth], center=centred))
            got, moved = (float(rank.effective_rank_of(v[int(centred)].sqrt())) for v in (plain, shaken))
            assert abs(got - exact) <= 2 * abs(moved - got) + 2e-7 * exact
    exact = similarity.cka_matrix(x, unbiased=True)
    table, without = (part.numpy() for part in depth_hsic(found, depths))
    got, of_groups = (
        hsic / np.sqrt(own(hsic)[..., :, None] * own(hsic)[..., None, :]) for hsic in (table, without)
    )
    groups = len(of_groups)
    error = np.sqrt(((of_groups - of_groups.mean(0)) ** 2).sum(0) * (groups - 1) / groups)
    pairs = np.triu_indices(len(states), 1)
    assert np.abs(got - exact)[pairs].max() < 0.05
    assert (np.abs(got - exact)[pairs] < 6 * error[pairs]).all()
    assert np.mean(np.abs(got - exact)[pairs] < 3 * error[pairs]) > 0.8


def own(tables: np.ndarray) -> np.ndarray:
    return np.diagonal(tables, axis1=-2, axis2=-1)


@pytest.mark.parametrize("width", [8, 40])
def test_errors_are_as_stated_on_heavy_tails(width):
    states = heavy_tailed(250, width)
    assert_honest(states, joined(in_parts(states, torch.ones(250, T, dtype=torch.bool), [1, 60, 130])))


@pytest.mark.model
@pytest.mark.slow(one_in=5)
def test_errors_are_as_stated_on_real_text_through_smollm2(smollm2):
    batch = encode_text(smollm2, sample_text(), sequences=12, length=128)
    with torch.inference_mode():
        shown = smollm2.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    states = torch.stack(shown[:-1:5]).unsqueeze(3)
    assert_honest(states, joined(in_parts(states, batch["attention_mask"].bool(), [4, 9])))


# Streams one by one


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_every_stream_has_its_spectra_beside_the_mean(offset):
    states, mask = walk(9, streams=3) + offset, padding(9)
    found = joined(in_parts(states, mask, [2, 3, 7]))
    x = states.double()[:, mask].numpy()
    for depth in range(L):
        for stream in range(3):
            plain, _ = moment_spectra(found.moments[depth, 1 + stream])
            for centred in CENTRED:
                exact = float(rank.effective_rank(x[depth][:, stream], center=centred))
                got = float(rank.effective_rank_of(plain[int(centred)].sqrt()))
                assert got == pytest.approx(exact, rel=2e-5)


def test_streams_whose_sums_are_too_large_give_way_to_their_mean(monkeypatch):
    monkeypatch.setattr(streamed_sums, "ALL_STREAMS_BYTES", 3 * D * D * 8 - 1)
    merged = joined([forward(walk(4, streams=3), None), forward(walk(4, streams=3), None, 4)])
    assert set(merged.moments) == {(depth, 0) for depth in range(L)}
    variables, _ = streamed_variables(merged, range(L))
    assert variables["stream_eigenvalue"][1].shape == (2, L, 3, D)
    assert np.isnan(variables["stream_eigenvalue"][1]).all()
    assert "3 streams of 10 features" in variables["eigenvalue"][2]["streams_left_out"]


def test_a_capture_keeps_the_spectra_of_each_stream(models):
    run = probes.capture(models["deepseek"](), batches(4), max_sequences=8, streaming=True)
    exact = diagnostics.analyze(run).stable_rank.sel(scope="data", tokens="all").isel(step=0)
    values = run.statistics.stream_eigenvalue.transpose("centering", "depth", "stream", "component")
    got = values.sum("component") / values.max("component")
    for stream in range(4):
        expected = exact.sel(stream=str(stream)).transpose("centering", "depth")
        np.testing.assert_allclose(got.isel(stream=stream), expected, rtol=1e-5)


def test_blocks_of_tokens_and_strips_of_features_add_up(monkeypatch):
    states = walk(6)
    at_once = seen(states, None)
    monkeypatch.setattr(second_moments, "TOKENS_PER_PRODUCT", 5)
    monkeypatch.setattr(second_moments, "STRIP_WIDTH", 4)
    cut, at_once = (moment_spectra(found.moments[2, 0])[0] for found in (seen(states, None), at_once))
    torch.testing.assert_close(cut, at_once, rtol=1e-5, atol=1e-5)
