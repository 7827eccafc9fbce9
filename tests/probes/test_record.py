"""Over a loop: exact statistics of every token, a uniform sample of whole sequences, bounded memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import probes
from diagnostics import schema
from probes.sampling import Reservoir


def batches(count: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 64, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        labels = torch.where(mask.bool(), ids, -100)
        labels[0, 3] = -100  # the first real token would be predicted from padding
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def test_statistics_equal_the_raw_states_when_all_sequences_are_kept(models):
    run = probes.capture(models["deepseek"](), batches(3), gradients=True, max_sequences=6)
    x = run.trace.residual.values.astype(np.float64)
    mask = run.trace.mask.values
    rows = x[:, mask]  # depth, token, stream, feature
    norms = np.linalg.norm(rows, axis=-1)
    unit = rows / norms[..., None]
    stats = run.statistics
    assert float(stats.token_count[0]) == mask.sum() == 3 * 15
    np.testing.assert_allclose(stats.norm_sum.values[0], norms.sum(1), rtol=1e-6)
    np.testing.assert_allclose(stats.square_norm_sum.values[0], np.square(norms).sum(1), rtol=1e-6)
    np.testing.assert_allclose(stats.norm_max.values[0], norms.max(1), rtol=1e-6)
    np.testing.assert_allclose(stats.abs_max.values[0], np.abs(rows).max((1, 3)), rtol=1e-6)
    np.testing.assert_allclose(stats.feature_sum.values, rows.sum(1), rtol=1e-4, atol=1e-4)
    cosines = np.einsum("dtsf,dusf->dstu", unit, unit)
    off_diagonal = cosines.sum((2, 3)) - np.trace(cosines, axis1=2, axis2=3)
    np.testing.assert_allclose(stats.unit_pair_sum.values[0], off_diagonal, rtol=1e-4, atol=1e-4)
    adjacent = (unit[1:] * unit[:-1]).sum(-1).sum(1)
    np.testing.assert_allclose(stats.adjacent_cosine_sum.values[0, 1:], adjacent, rtol=1e-5)
    gradient = run.trace.gradient.values.astype(np.float64)[:, mask]
    np.testing.assert_allclose(
        stats.gradient_square_norm_sum.values[0], np.square(gradient).sum((1, 3)), rtol=1e-5
    )
    h_res = run.trace.h_res.values.astype(np.float64)[:, mask]
    forward, backward = np.abs(h_res.sum(-1)).max(-1), np.abs(h_res.sum(-2)).max(-1)
    np.testing.assert_allclose(stats.gain_sum.values[0], [forward.sum(1), backward.sum(1)], rtol=1e-5)
    np.testing.assert_allclose(stats.gain_max.values[0], [forward.max(1), backward.max(1)], rtol=1e-5)


def test_statistics_do_not_depend_on_the_split_into_batches(models):
    model, parts = models["llama"](), batches(4)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    split, joined = probes.capture(model, parts), probes.capture(model, whole)
    for name in ("norm_sum", "square_norm_sum", "unit_pair_sum", "adjacent_cosine_sum", "norm_max"):
        np.testing.assert_allclose(split.statistics[name].values, joined.statistics[name].values, rtol=1e-5)
    np.testing.assert_array_equal(split.trace.sample.values, joined.trace.sample.values)
    np.testing.assert_allclose(
        split.trace.residual.values, joined.trace.residual.values, rtol=1e-4, atol=1e-5
    )


def test_padding_changes_no_statistic(models):
    model, (batch,) = models["llama"](), batches(1)
    other = dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7))
    first, second = probes.capture(model, batch, gradients=True), probes.capture(model, other, gradients=True)
    for name, values in first.statistics.to_dataset().data_vars.items():
        np.testing.assert_allclose(
            second.statistics[name].values, values.values, rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_one_row_per_measured_step_and_the_trace_of_the_present_weights(models):
    model = models["llama"]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (batch,) = batches(1)
    with probes.record(model, every=2, start_step=1, gradients=True) as recorder:
        for _ in range(6):
            loss = model(**batch).loss
            loss.backward()
            recorder.step(loss)
            last = probes.capture(model, batch) if recorder.position == 6 else None
            optimizer.step()
            optimizer.zero_grad()
    run = recorder.run
    assert list(run.statistics.step.values) == [1, 3, 5]
    assert (np.diff(run.statistics.loss.values) < 0).all()
    assert run.attrs["sampling"]["sequences_kept"] == 2
    np.testing.assert_allclose(run.trace.residual.values, last.trace.residual.values, rtol=1e-5, atol=1e-6)


def test_several_forwards_in_a_step_add_up(models):
    model, parts = models["llama"]().train(), batches(3)
    with probes.record(model, gradients=True) as recorder:
        for part in parts:
            model(**part).loss.backward()
        recorder.step()
    run = recorder.run
    assert float(run.statistics.token_count[0]) == 45
    assert run.trace.sizes["sample"] == 6
    assert np.isfinite(run.trace.gradient.values).all()


def test_two_backwards_through_one_forward_add_up(models):
    model, (batch,) = models["llama"](), batches(1)
    runs = []
    for times in (1, 2):
        with probes.record(model, gradients=True) as recorder:
            loss = model(**batch).loss
            for _ in range(times):
                loss.backward(retain_graph=True)
            recorder.step()
        runs.append(recorder.run.trace.gradient.values)
    np.testing.assert_allclose(runs[1], 2 * runs[0], rtol=1e-5, atol=1e-9)


def test_a_step_without_a_forward_or_a_backward_is_reported(models):
    model, (batch,) = models["llama"](), batches(1)
    with probes.record(model, gradients=True) as recorder:
        with pytest.warns(probes.ProbeWarning, match="was not called"):
            recorder.step()
        model(**batch)
        with pytest.warns(probes.ProbeWarning, match=r"call loss.backward\(\)"):
            recorder.step()
    with pytest.raises(probes.CaptureError, match="outside the block"):
        recorder.step()


@pytest.mark.parametrize("stepping", [True, False])
def test_memory_does_not_grow_with_the_number_of_batches(models, stepping):
    model, parts = models["llama"](), batches(40)

    def held(count: int) -> int:
        gc.collect()
        with probes.record(model, max_sequences=4) as recorder, torch.no_grad():
            for part in parts[:count]:
                model(**part)
                if stepping:
                    recorder.step()
            gc.collect()
            return sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim >= 2)

    assert held(40) <= held(8)


def test_the_store_is_written_even_when_the_loop_breaks(models, tmp_path):
    model, parts = models["llama"](), batches(3)

    def loop():
        with probes.record(model, store=tmp_path / "runs" / "a") as recorder:
            for number, part in enumerate(parts):
                model(**part)
                recorder.step()
                if number == 1:
                    raise RuntimeError("the cluster says goodbye")

    with pytest.raises(RuntimeError, match="goodbye"):
        loop()
    with schema.open_run(tmp_path / "runs" / "a.nc") as run:
        assert run.statistics.sizes["step"] == 2
        assert run.trace.sizes["sample"] == 4


def test_sequences_of_unlike_length_are_padded_and_masked(models):
    short = {"input_ids": torch.randint(1, 64, (1, 5))}
    long = {"input_ids": torch.randint(1, 64, (1, 9))}
    run = probes.capture(models["llama"](), [short, long])
    np.testing.assert_array_equal(run.trace.mask.values.sum(1), [5, 9])
    assert (run.trace.residual.values[:, 0, 5:] == 0).all()


def test_generation_is_recorded_prefill_and_steps(models):
    model = models["llama"]()
    with probes.record(model) as recorder:
        model.generate(torch.randint(1, 64, (1, 6)), max_new_tokens=3, do_sample=False, pad_token_id=0)
        recorder.step()
    assert float(recorder.run.statistics.token_count[0]) == 6 + 2


def test_every_sequence_is_kept_with_the_same_probability():
    counts = np.zeros(20)
    for seed in range(2000):
        reservoir = Reservoir(5, seed)
        held: dict[int, int] = {}
        for batch in range(10):
            held |= {slot: 2 * batch + row for row, slot in reservoir.choose(2, stamp=0).items()}
        counts[list(held.values())] += 1
    expected = 2000 * 5 / 20
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.75)


def test_bad_arguments_are_named(models):
    model = models["llama"]()
    with pytest.raises(ValueError, match="max_sequences is 0; expected at least 1"):
        probes.record(model, max_sequences=0)
    with pytest.raises(ValueError, match="every is 0; expected 1 or more"):
        probes.record(model, every=0)
    with pytest.raises(probes.CaptureError, match=r"the mask has shape \(2, 4\)"):
        probes.capture(model, batches(1), mask=torch.ones(2, 4))
