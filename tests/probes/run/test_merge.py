"""Runs added offline give what one run of all their tokens gives; runs that do not belong together are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope import diagnostics, probes
from depthscope.probes import merge_runs
from depthscope.probes.statistics import stored_sums
from tests.models.small_models import deepseek, llama

RANKS = ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank")


def batches(count: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 64, (2, 9), generator=generator)} for _ in range(count)]


def captured(model, parts, *, first: int = 0):
    """A run whose sequences are numbered from some number on, as those of another process may be."""
    with probes.record(model, max_sequences=2, streaming={"first_sequence": first}) as recorder:
        for part in parts:
            with torch.no_grad():
                model(**part)
        recorder.step()
    return recorder.run


@pytest.fixture(scope="module", params=["llama", pytest.param("deepseek", marks=pytest.mark.slow)])
def split(request):
    """A run of everything, and the runs of three parts."""
    model = {"llama": llama, "deepseek": deepseek}[request.param]()
    parts = batches(24)
    cuts = [(0, 9), (9, 10), (10, 24)]
    return captured(model, parts), [captured(model, parts[a:b], first=2 * a) for a, b in cuts]


def test_runs_added_are_the_run_of_everything(split, tmp_path):
    single, runs = split
    opened = [
        diagnostics.open_run(diagnostics.save_run(run, tmp_path / f"{i}.zarr.zip"))
        for i, run in enumerate(runs)
    ]
    merged = merge_runs(opened)
    assert merged.attrs["merged_tokens"] == float(single.statistics.streamed_count[0]) == 24 * 18
    found, expected = diagnostics.analyze(merged), diagnostics.analyze(single)
    for name in RANKS:
        name = f"streamed_{name}"
        assert expected[name].notnull().all()
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3 if "effective" in name else 1e-5)
    for name in set(single.statistics.data_vars) & {"stream_eigenvalue"}:
        top = single.statistics[name].max("component")
        np.testing.assert_allclose(merged.statistics[name] / top, single.statistics[name] / top, atol=1e-6)
    np.testing.assert_allclose(found.streamed_cka, expected.streamed_cka, atol=0.1)  # other heavy tokens


def test_adding_is_associative(split):
    _, (a, b, c) = split
    left, right = merge_runs([merge_runs([a, b]), c]), merge_runs([a, merge_runs([b, c])])
    for name in ("eigenvalue", "hsic", "sum_mean"):
        size = float(np.abs(left.statistics[name]).max())
        np.testing.assert_allclose(left.statistics[name], right.statistics[name], atol=1e-6 * size)


def test_sequences_numbered_alike_add_their_moments_only():
    model = llama()
    parts = batches(12)
    merged = merge_runs([captured(model, parts[:6]), captured(model, parts[6:])])
    single = captured(model, parts)
    top = float(single.statistics.eigenvalue.max())
    np.testing.assert_allclose(
        merged.statistics.eigenvalue / top, single.statistics.eigenvalue / top, atol=1e-6
    )
    assert "use the same sequence numbers" in merged.attrs["merged_without"]
    assert "hsic" not in merged.statistics


def test_other_weights_are_refused_and_unknown_ones_are_not():
    model, parts = llama(), batches(6)
    before = captured(model, parts[:2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    after = captured(model, parts[2:4], first=4)
    with pytest.raises(ValueError, match="measured with other weights"):
        merge_runs([before, after])
    del after.attrs["weights_digest"]
    assert merge_runs([before, after]).attrs["merged_tokens"] == 4 * 18


def test_weights_that_were_trained_further_are_not_named():
    model = llama()
    with probes.record(model, streaming=True) as recorder:
        model(**batches(1)[0])
        recorder.step()
    assert len(recorder.run.attrs["weights_digest"]) == 64
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    assert "weights_digest" not in recorder.run.attrs


def test_the_same_data_twice_is_refused():
    run = captured(llama(), batches(3))
    with pytest.raises(ValueError, match="runs 0 and 1 show the same sequences"):
        merge_runs([run, run])


def test_other_models_and_depths_are_refused():
    parts = batches(4)
    model = llama()
    run = captured(model, parts[:2])
    with pytest.raises(ValueError, match="num_blocks is 3 in one run and 2 in another"):
        merge_runs([run, _with(captured(model, parts[2:]), num_blocks=2)])
    fewer = probes.capture(model, parts[2:], streaming=True, sites="blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match=r"depths are \[0, 1, 2, 3\] and"):
        merge_runs([run, _with(fewer, **{name: run.attrs[name] for name in ("num_blocks", "block")})])


def _with(run, **attrs):
    changed = run.copy()
    changed.attrs = run.attrs | attrs
    return changed


def test_one_run_and_a_run_without_sums_are_refused(monkeypatch):
    model, parts = llama(), batches(4)
    run = captured(model, parts[:2])
    with pytest.raises(ValueError, match="got 1 run"):
        merge_runs([run])
    monkeypatch.setattr(stored_sums, "MAX_STORED_BYTES", 0)
    large = captured(model, parts[2:])
    assert "sum_product" not in large.statistics
    with pytest.raises(ValueError, match="the run stores no sum_mean; expected one that was captured with"):
        merge_runs([run, large])


def test_sketches_of_another_hash_are_refused(split):
    _, (a, b, _) = split
    other = a.copy(deep=True)
    other.statistics["sum_sign"].attrs["hash"] = "another"
    with pytest.raises(ValueError, match="a run's sketch is by 'another'"):
        merge_runs([other, b])
