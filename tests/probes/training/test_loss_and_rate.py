"""Are loss and learning rate of a row those of the step, where the user gives neither? And what is said of a loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from depthscope import judge, probes
from depthscope.diagnostics import schema, training_curves
from depthscope.diagnostics.schema.loss_course import LossCourse


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def batch(number: int) -> torch.Tensor:
    return torch.randn(4, 40, 8, generator=torch.Generator().manual_seed(number))


def numbers(recorder, name: str) -> list[float]:
    return schema.chain_dataset(recorder.run, "metrics")[name].values.tolist()


@pytest.mark.parametrize(("gradients", "compiled"), [(True, False), (False, True)])
def test_the_loss_is_what_the_backwards_of_the_step_began_at(gradients, compiled):
    model, other, expected = Small(), torch.nn.Linear(8, 1), []
    called = torch.compile(model, backend="eager") if compiled else model
    with probes.record(called, gradients=gradients, metrics="live", live_tokens=8) as recorder:
        for step in range(2):
            total = 0.0
            for part in range(3):
                loss = called(batch(10 * step + part)).square().mean() / 3
                loss.backward()
                total += float(loss.detach())
            other(batch(1)).sum().backward()  # of another model
            penalised = called(batch(3)).square().sum()
            torch.autograd.grad(penalised, list(model.parameters()))  # no loss: nothing is accumulated
            with torch.no_grad():
                called(batch(4))
            expected.append(total)
            recorder.step()
    np.testing.assert_allclose(numbers(recorder, "loss"), expected, rtol=1e-6)
    assert numbers(recorder, "loss_not_finite") == [0.0, 0.0]


def test_a_given_loss_counts_and_a_backward_of_many_numbers_has_none():
    model = Small()
    with probes.record(model, gradients=True, metrics="live", live_tokens=8) as recorder:
        output = model(batch(0))
        output.backward(torch.ones_like(output))
        recorder.step()
        model(batch(0)).sum().backward()
        recorder.step(7.0)
    loss, broken = numbers(recorder, "loss"), numbers(recorder, "loss_not_finite")
    assert math.isnan(loss[0])
    assert math.isnan(broken[0])
    assert (loss[1], broken[1]) == (7.0, 0.0)


def test_a_scaled_loss_is_divided_by_its_scale_or_not_known():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for given in (scaler, None):
        model = Small()
        with probes.record(model, gradients=True, metrics="live", live_tokens=8, scaler=given) as recorder:
            loss = model(batch(0)).square().mean()
            scaler.scale(loss).backward()
            recorder.step()
        found = numbers(recorder, "loss") if given else [math.nan] * ("loss" in recorder.run["metrics"])
        assert found == ([pytest.approx(float(loss.detach()))] if given else [])


def test_the_rate_is_that_of_the_optimizer_step_whatever_comes_first():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    with probes.record(model, gradients=True, metrics="live", live_tokens=8, optimizer=optimizer) as recorder:
        for step in range(3):
            model(batch(step)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            recorder.step()
    assert numbers(recorder, "learning_rate") == [pytest.approx(0.5 * 0.1**step) for step in range(3)]
    assert not optimizer._optimizer_step_pre_hooks


# --- what is said of a loss


def steps_with(losses, told, **options):
    model = Small()
    with probes.record(
        model,
        gradients=True,
        metrics="live",
        live_tokens=8,
        on_finding=lambda step, finding: told.append((step, finding.verdict, finding.severity.name)),
        **options,
    ) as recorder:
        for number, loss in enumerate(losses):
            model(batch(number)).square().mean().backward()
            recorder.step(loss)
    return recorder


def test_a_loss_that_diverges_is_a_finding_live_and_later(tmp_path):
    told: list[tuple[int, str, str]] = []
    losses = [2.65, 2.6, 2.62, 2.58, 2.6, 5.0, 8.0, 8.1, 7.9]
    recorder = steps_with(losses, told, store=tmp_path / "run")
    found = [each for each in told if each[1] == "diverged_loss"]
    assert found[0][0] in (6, 7)
    assert found[-1][2] == "FAIL"
    rise = training_curves(recorder.run)["loss_rise"].values
    course = LossCourse()
    np.testing.assert_allclose(rise, [course.add(loss) for loss in losses])
    assert "diverged_loss" in {finding.verdict for finding in judge(training_curves(recorder.run))}


@pytest.mark.parametrize("bad", [math.nan])
def test_a_loss_that_is_not_finite_is_told_between_measured_steps(bad, capsys):
    told: list[tuple[int, str, str]] = []
    steps_with([1.0, torch.tensor(bad), 1.0, 1.0], told, every=3)
    assert told == [(1, "not_finite", "FAIL")]
    assert "step 1: FAIL: The number of losses that are not finite is 1" in capsys.readouterr().err
    with pytest.raises(probes.TrainingStopped) as stopped:
        steps_with([1.0, bad], told, every=10, stop_on="fail")
    assert stopped.value.step == 1
