"""What the graph of a loss says of the task is what was put into it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from depthscope.probes.model.loss_graph import compared_by_gradient, mean_task, read_task, squares_by_gradient

IDS = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_classes_and_the_loss_of_guessing():
    task = read_task(functional.cross_entropy(logits(4, 10), torch.arange(4)), torch.randn(4, 2))
    assert task["classes"] == 10
    assert task["guessing"] == pytest.approx(math.log(10))
    assert not task["predicts_next"]
    of_pixels = functional.cross_entropy(logits(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))
    assert read_task(2.0 * of_pixels, None)["classes"] == 3


def test_targets_that_are_the_next_tokens():
    out = logits(3, 5, 7)
    shifted = functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert read_task(shifted, {"input_ids": IDS})["predicts_next"]
    labels = functional.pad(IDS, (0, 1), value=-100)[:, 1:]
    labels[1, 2:] = -100  # padding
    assert read_task(functional.cross_entropy(out.flatten(0, 1), labels.flatten()), IDS)["predicts_next"]
    same = functional.cross_entropy(out.flatten(0, 1), IDS.flatten())
    assert not read_task(same, IDS)["predicts_next"]
    assert read_task(same, IDS)["repeats_input"]
    assert not read_task(shifted, IDS)["repeats_input"]
    # The last token has a target too, as where inputs and targets are cut from one text.
    every = functional.cross_entropy(out.flatten(0, 1), IDS.roll(-1, 1).flatten())
    assert read_task(every, (IDS, IDS.roll(-1, 1)))["predicts_next"]


def test_the_loss_of_an_answer_that_never_changes():
    """The entropy of the classes' frequencies: of two classes 3 to 1, with the bias of Miller and Madow."""
    target = torch.tensor([0, 0, 0, 1] * 100)
    task = read_task(functional.cross_entropy(logits(400, 5), target), torch.randn(400, 3))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + 1 / 800
    assert task["constant"] == pytest.approx(expected)
    assert task["targets_per_sequence"] == 1
    assert mean_task([task, {**task, "constant": 0.6}], 0.5)["constant"] == pytest.approx(
        (expected + 0.6) / 2
    )
    # Labels that are ignored do not count, one class has no other answer, and a sum has another unit.
    ignored = torch.where(target == 1, -100, target)
    assert "constant" not in read_task(functional.cross_entropy(logits(400, 5), ignored), None)
    few = read_task(functional.cross_entropy(logits(4, 5), torch.arange(4)), None)
    assert few["constant"] == few["guessing"]
    assert "constant" not in read_task(
        functional.cross_entropy(logits(400, 5), target, reduction="sum"), None
    )
    # Of many classes with few targets each, equal probabilities lose no less.
    many = read_task(functional.cross_entropy(logits(120, 60), torch.arange(120) % 60), None)
    assert many["constant"] == pytest.approx(math.log(60))
    # Which of many more come is not known from a few.
    unseen = read_task(functional.cross_entropy(logits(120, 5000), torch.arange(120) % 60), None)
    assert unseen["constant"] == unseen["guessing"] == pytest.approx(math.log(5000))
    assert "constant" not in mean_task([task, {k: v for k, v in task.items() if k != "constant"}], 0.5)


def test_how_sure_the_predictions_are_and_how_well_their_loss_is_known():
    out, target = logits(200, 5), torch.arange(200) % 4
    task = read_task(functional.cross_entropy(out, target), None)
    chosen = torch.distributions.Categorical(logits=out.detach())
    assert task["expected"] == pytest.approx(float(chosen.entropy().mean()), rel=1e-5)
    # Every class comes as often: the loss of the constant answer is that of each target.
    error = float(chosen.log_prob(target).std())
    assert task["uncertainty"] == pytest.approx(error / math.sqrt(200), rel=1e-4)
    assert mean_task([task, task], 1.0)["uncertainty"] == pytest.approx(error / math.sqrt(400), rel=1e-4)


def test_the_gradient_of_the_logits_says_the_same():
    out = logits(8, 50, 5)
    target = (torch.arange(400) % 4).where(torch.arange(400) % 7 > 0, -100)
    loss = functional.cross_entropy(out.flatten(0, 1), target)
    task, value = read_task(loss, None), float(loss.detach())
    (gradient,) = torch.autograd.grad(loss, out)
    found = compared_by_gradient(gradient, 5, value)
    assert found == pytest.approx({name: task[name] for name in found}, rel=1e-3)
    assert set(found) == {"constant", "expected", "uncertainty", "expected_error"}
    assert compared_by_gradient(2.0 * gradient, 5, value) == {}  # a sum of two losses, or another one
    assert compared_by_gradient(gradient.flatten(), 5, value) == compared_by_gradient(None, 5, 1.0) == {}


@pytest.mark.parametrize(
    ("gain", "offset", "beyond"),
    # By hand, of targets of variance 1: the error is (1 − gain)² + offset²; what varies by gain² expects 1 less that.
    [(0.9, 0.0, -0.18), (0.5, 0.0, -0.5), (2.0, 0.0, 4.0), (-1.0, 0.0, 4.0), (1.0, 0.7, 0.49)],
)
def test_squared_errors_say_what_a_constant_answer_loses_and_what_the_predictions_expect(
    gain, offset, beyond
):
    target = torch.tensor([-1.0, 1.0]).repeat(500)[:, None] * torch.tensor([1.0, -1.0])
    predicted = (gain * target + offset).requires_grad_()
    loss = functional.mse_loss(predicted, target)
    task = read_task(loss, target)
    assert task["constant"] == pytest.approx(1.0, rel=0.01)
    assert float(loss.detach()) - task["expected"] == pytest.approx(beyond, abs=0.01)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert squares_by_gradient(loss, predicted.detach(), gradient) == pytest.approx(task, abs=1e-5)
    assert squares_by_gradient(loss, predicted.detach(), 2.0 * gradient) == {}  # a sum of two losses


def test_yes_or_no_is_compared_with_how_often_each_comes():
    target = torch.tensor([0.0, 0.0, 0.0, 1.0] * 100)[:, None]
    out = logits(400, 1)
    task = read_task(functional.binary_cross_entropy_with_logits(out, target), None)
    assert task["constant"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-6)
    entropy = torch.distributions.Bernoulli(logits=out.detach()).entropy()
    assert task["expected"] == pytest.approx(float(entropy.mean()), rel=1e-5)


def test_equal_targets_few_rows_sums_and_weights_have_no_constant_answer():
    few, many = logits(3, 2), logits(40, 2)
    assert read_task(functional.mse_loss(few, torch.randn(3, 2)), None) == {}
    assert read_task(functional.mse_loss(many, torch.ones(40, 2)), None) == {}
    assert read_task(functional.mse_loss(many, torch.randn(40, 2), reduction="sum"), None) == {}
    weighted = functional.binary_cross_entropy_with_logits(many, torch.rand(40, 2), torch.ones(2))
    assert read_task(weighted, None) == {}


def test_what_is_no_cross_entropy_says_nothing():
    assert read_task(None, IDS) == {}
    assert read_task(logits(3).square().mean(), IDS) == {}
    assert read_task(torch.tensor(1.0), IDS) == {}


def test_the_task_of_several_batches():
    task = {"classes": 2}
    assert mean_task([task, dict(task)], 0.5) == {"classes": 2, "loss": 0.5}
    assert mean_task([task, {"classes": 3}], 0.5) == {}
    assert mean_task([task], None) == mean_task([{}], 0.5) == mean_task([task], math.nan) == {}
