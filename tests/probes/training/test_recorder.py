"""Over a loop: exact statistics of every token, a uniform sample of complete sequences, bounded memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.checkpoint import checkpoint

from depthscope import probes
from depthscope.diagnostics import analyze, judge
from depthscope.probes.session.step import Reservoir
from tests.models.plain_stack import Block as PlainBlock


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
    concatenated = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    split, joined = probes.capture(model, parts), probes.capture(model, concatenated)
    for name in ("norm_sum", "square_norm_sum", "unit_pair_sum", "adjacent_cosine_sum", "norm_max"):
        np.testing.assert_allclose(split.statistics[name].values, joined.statistics[name].values, rtol=1e-5)
    np.testing.assert_array_equal(split.trace.sample.values, joined.trace.sample.values)
    np.testing.assert_allclose(
        split.trace.residual.values, joined.trace.residual.values, rtol=1e-4, atol=1e-5
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


def test_every_sequence_is_kept_with_the_same_probability():
    counts = np.zeros(20)
    for seed in range(1000):
        reservoir = Reservoir(5, seed)
        held: dict[int, int] = {}
        for batch in range(10):
            held |= {slot: 2 * batch + row for row, slot in reservoir.choose(2, stamp=0).items()}
        counts[list(held.values())] += 1
    expected = 1000 * 5 / 20
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.75)


def test_bad_arguments_are_named(models):
    model = models["llama"]()
    with pytest.raises(ValueError, match="max_sequences is 0; expected at least 1"):
        probes.record(model, max_sequences=0)
    with pytest.raises(ValueError, match="every is 0; expected 1 or more"):
        probes.record(model, every=0)
    with pytest.raises(probes.CaptureError, match=r"the mask has shape \(2, 4\)"):
        probes.capture(model, batches(1), mask=torch.ones(2, 4))


# --- the gradient is that of the captured value, whatever the loop does: against tensor hooks of our own ---


class Block(nn.Module):
    """A residual block; a greedy one overwrites its input, as ReLU(inplace=True) does in a ResNet."""

    def __init__(self, *, greedy: bool = False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.activation = nn.functional.relu_ if greedy else nn.functional.relu

    def forward(self, x):
        x = self.activation(x)
        return x + self.down(self.up(self.norm(x)).tanh())


class Stack(nn.Module):
    def __init__(self, *, checkpoint: bool | None = None, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(3))
        self.checkpoint = checkpoint

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) if self.checkpoint is None else checkpoint(block, x, use_reentrant=self.checkpoint)
        return self.head(x)


def stack(**options) -> Stack:
    torch.manual_seed(0)
    return Stack(**options)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(-1, 1).flatten())


def observed(model: Stack, loop) -> tuple[np.ndarray, np.ndarray]:
    """States and their gradients (depth, sample, token, feature) as hooks without any probe see them in a loop."""
    seen: list[list[torch.Tensor]] = []
    gradients: dict[tuple[int, int], torch.Tensor] = {}

    def see(depth: int, x: torch.Tensor) -> None:
        if depth == 0:
            seen.append([])
        seen[-1].append(x.detach().clone())
        key = (len(seen) - 1, depth)
        gradients[key] = torch.zeros_like(x)

        def add(gradient: torch.Tensor) -> None:  # what a hook returns would replace the gradient
            gradients[key] += gradient

        x.register_hook(add)

    handles = [model.blocks[0].register_forward_pre_hook(lambda module, args: see(0, args[0]))]
    for depth, block in enumerate(model.blocks, start=1):
        hook = partial(lambda depth, module, args, output: see(depth, output), depth)
        handles.append(block.register_forward_hook(hook))
    loop(model)
    for handle in handles:
        handle.remove()
    depths = range(len(model.blocks) + 1)
    states = [torch.cat([forward[depth] for forward in seen]) for depth in depths]
    found = [torch.cat([gradients[number, depth] for number in range(len(seen))]) for depth in depths]
    return torch.stack(states).float().numpy(), torch.stack(found).float().numpy()


def one_step(model: nn.Module, ids: torch.Tensor) -> None:
    loss_of(model, ids).backward()


def micro_batches(model: nn.Module, ids: torch.Tensor) -> None:
    for part in ids.chunk(3):
        (loss_of(model, part) / 3).backward()


def two_forwards_one_backward(model: nn.Module, ids: torch.Tensor) -> None:
    first, second = loss_of(model, ids), loss_of(model, ids.flip(0, 1))
    (first + first * second).backward()


def two_backwards(model: nn.Module, ids: torch.Tensor) -> None:
    output = model(ids)
    output.square().mean().backward(retain_graph=True)
    output.logsumexp(-1).mean().backward()


def two_losses_interleaved(model: nn.Module, ids: torch.Tensor) -> None:
    first, second = loss_of(model, ids), loss_of(model, ids.flip(0))
    second.backward()
    first.backward()


def autocast(model: nn.Module, ids: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, ids)
    loss.backward()


def a_part_is_used(model: nn.Module, ids: torch.Tensor) -> None:
    """A gradient that flows into some of the sequences only."""
    model(ids)[1:].square().mean().backward()


LOOPS = (
    one_step,
    micro_batches,
    two_forwards_one_backward,
    two_backwards,
    two_losses_interleaved,
    autocast,
    a_part_is_used,
)


@pytest.mark.parametrize(
    ("loop", "reentrant"),
    [
        *((loop, None) for loop in LOOPS),
        (micro_batches, False),
        (one_step, True),
        (two_losses_interleaved, False),
    ],
)
def test_states_and_gradients_are_those_that_plain_hooks_see(ids, loop, reentrant):
    states, gradients = observed(stack(), partial(loop, ids=ids))
    with probes.record(model := stack(checkpoint=reentrant), gradients=True, max_sequences=64) as recorder:
        loop(model, ids)
        recorder.step()
    trace = recorder.run.trace
    np.testing.assert_array_equal(trace.residual.values[..., 0, :], states)
    np.testing.assert_allclose(trace.gradient.values[..., 0, :], gradients, rtol=1e-6, atol=1e-12)
    assert np.abs(gradients).max() > 0
    squares = np.square(gradients.astype(np.float64)).sum((1, 2, 3))
    found = recorder.run.statistics.gradient_square_norm_sum.values[0, :, 0]
    np.testing.assert_allclose(found, squares, rtol=1e-5)


def test_the_statistics_of_a_second_backward_are_undefined_where_not_all_is_kept(ids):
    with probes.record(model := stack(), gradients=True, max_sequences=1) as recorder:
        two_backwards(model, ids=ids)
        with pytest.warns(probes.ProbeWarning, match="gradients are NaN in the row of step 0"):
            recorder.step()
        two_backwards(model, ids=ids)
        recorder.step()  # said once
    assert np.isnan(recorder.run.statistics.gradient_square_norm_sum.values).all()
    assert np.isfinite(recorder.run.trace.gradient.values).all()


@pytest.mark.filterwarnings("ignore:step 0 was not measured.*rewritten in place:probes.ProbeWarning")
def test_a_state_that_the_next_block_overwrites_is_kept_as_it_was(ids):
    expected = observed(stack(), partial(one_step, ids=ids))
    model = stack(greedy=True)
    with probes.record(model, gradients=True, max_sequences=64) as recorder:
        for _ in range(2):
            one_step(model, ids)
            recorder.step()
    trace = recorder.run.trace.isel(sample=slice(-len(ids), None), stream=0)
    np.testing.assert_array_equal(trace.residual.values, expected[0])
    np.testing.assert_allclose(trace.gradient.values, expected[1], rtol=1e-6, atol=1e-12)


# --- evaluations within the steps of a training ---


def under_no_grad(model: nn.Module, ids: torch.Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(ids)
    model.train()


def with_a_graph(model: nn.Module, ids: torch.Tensor) -> None:
    model.eval()
    model(ids)
    model.train()


def trained_with(evaluate, places, *, gradients: bool):
    """Three steps of training, of gradient accumulation with a scaler; evaluations at some places of a step."""
    model = stack().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    generator = torch.Generator().manual_seed(1)
    # Fewer sequences than an evaluation has: those of the training must not lose their places to it.
    with probes.record(model, gradients=gradients, scaler=scaler, max_sequences=4) as recorder:
        for _ in range(3):
            for number in range(2):
                if number in places:
                    evaluate(model, torch.full((6, 5), 63))
                ids = torch.randint(0, 60, (2, 5), generator=generator)
                scaler.scale(loss_of(model, ids)).backward()
            if 2 in places:
                evaluate(model, torch.full((6, 5), 63))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            recorder.step()
        evaluate(model, torch.full((6, 5), 63))
    return recorder.run


@pytest.mark.parametrize(("evaluate", "gradients"), [(under_no_grad, True), (with_a_graph, False)])
def test_an_evaluation_neither_drops_a_step_nor_mixes_with_it(evaluate, gradients):
    expected = trained_with(evaluate, (), gradients=gradients)
    found = trained_with(evaluate, (0, 1, 2), gradients=gradients)
    assert list(found.statistics.step.values) == [0, 1, 2]
    xr.testing.assert_identical(
        found.statistics.to_dataset().drop_attrs(), expected.statistics.to_dataset().drop_attrs()
    )
    assert found.trace.sizes["sample"] == 4
    assert set(found.trace.mask.dims) == {"sample", "token"}
    if not gradients:
        assert found.attrs["evaluations_left_out"] >= 9


def test_a_loop_that_only_evaluates_is_measured():
    model = stack().eval()
    with probes.record(model) as recorder:
        for _ in range(2):
            with torch.no_grad():
                model(torch.zeros(2, 5, dtype=torch.long))
            recorder.step()
    assert list(recorder.run.statistics.step.values) == [0, 1]
    assert "evaluations_left_out" not in recorder.run.attrs


def test_a_mask_that_is_given_by_its_position_counts_from_the_first_forward_on():
    class Masked(nn.Sequential):
        def forward(self, ids, attention_mask=None):
            return super().forward(ids)

    model = Masked(nn.Embedding(9, 4), *(PlainBlock(4) for _ in range(2)))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with probes.record(model) as recorder:
        for _ in range(2):
            model(torch.zeros(2, 5, dtype=torch.long), mask)
            recorder.step()
    assert recorder.run.statistics["token_count"].values.tolist() == [8.0, 8.0]


@pytest.mark.filterwarnings("ignore:step 0 was measured without gradients:depthscope.probes.ProbeWarning")
def test_a_frozen_trunk_is_measured_without_gradients_and_says_so(models, ids):
    torch.manual_seed(0)
    model = models["llama"]()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with probes.record(model, gradients=True, metrics="live", weights=True) as recorder:
        for _ in range(3):
            logits = model(ids).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
            recorder.step()
    assert recorder.errors == []
    run = recorder.run
    assert run.statistics.step.values.tolist() == [0, 1, 2]
    assert "no gradient of the loss reaches the residual states" in run.attrs["without_gradients"]
    assert "gradient_square_norm_sum" not in run.statistics
    assert (run.statistics["loss"] > 0).all()
    analysis = analyze(run)
    assert "trunk is frozen" in analysis.attrs["not_computed"]["gradient_norm"]
    found = {finding.verdict for finding in judge(analysis)}
    assert "untrained_module" in found  # the rest is judged
    assert not {name for name in found if "gradient" in name}
