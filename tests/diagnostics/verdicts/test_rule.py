"""Loud is what does harm, and statistics explain it: one rule, and the facts that tell how old a network is."""

from __future__ import annotations

import pytest
import torch
import xarray as xr
from torch import nn

from depthscope import diagnostics, probes, settle
from depthscope.diagnostics import Severity
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.verdicts import Kind
from depthscope.diagnostics.verdicts.age import Age, age_of
from depthscope.diagnostics.verdicts.rule import grade
from tests.diagnostics.state_runs import run_of, walk
from tests.models.verdict_models import Block, Layer, captured, findings, plain, pre_norm, tokens

torch.set_num_threads(1)

FAIL, WARN, INFO = Severity.FAIL, Severity.WARN, Severity.INFO


def one(found, name):
    (finding,) = [each for each in found if each.verdict == name]
    return finding


@pytest.fixture(scope="module")
def judged():
    """The findings of one verdict about a network without a fault, at a step and with facts."""
    healthy = diagnostics.analyze(run_of(walk(12)))

    def judge(verdict, step, severity, **facts):
        analysis = healthy.assign_coords(step=[step]).assign_attrs(facts)
        found = [each for each in diagnostics.judge(analysis) if each.verdict == verdict]
        assert [each.severity for each in found] == ([] if severity is None else [severity])
        return found

    return judge


def collapsed() -> xr.Dataset:
    """States that are one from depth 4 on."""
    states = walk(12)
    states[5:] = states[4] + 0.001 * (states[5:] - states[4])
    return diagnostics.analyze(run_of(states)).assign_coords(step=[1000])


def test_a_file_may_have_anything_in_place_of_results():
    for odd in ("x", [1, None], [{"verdict": "same_representation"}], {"a": 1}):
        found = one(diagnostics.judge(collapsed().assign_attrs(consequences=odd)), "same_representation")
        assert found.severity == WARN


AGES = {"fresh": Age(False, "A"), "trained": Age(True, "A"), "unknown": Age(None, "A")}
LABELS = {"task": {"loss": 2.0, "constant": 3.0}}


@pytest.mark.parametrize(
    ("kind", "severities"),
    [
        (Kind.FACT, (FAIL, FAIL, FAIL)),
        (Kind.LOSS, (INFO, FAIL, WARN)),
        (Kind.FRESH, (FAIL, INFO, WARN)),
        (Kind.READING, (FAIL, FAIL, FAIL)),
    ],
)
def test_a_kind_decides_at_which_age_a_number_is_loud(kind, severities):
    found = {name: grade(kind, FAIL, age, LABELS) for name, age in AGES.items()}
    assert tuple(each.severity for each in found.values()) == severities
    both = "this is a fault" in found["unknown"].words and "it may be normal" in found["unknown"].words
    assert both == (kind in (Kind.LOSS, Kind.FRESH))
    assert grade(kind, INFO, AGES["unknown"], {}).severity == INFO


@pytest.mark.parametrize(
    ("loss_change", "output_change", "labels", "severity", "settled"),
    [
        (0.0, 0.4, True, FAIL, "shown"),  # the loss decides where there is one
        (0.3, 0.0, True, INFO, "refuted"),
        (None, 0.1, False, WARN, "shown"),
        (None, 0.4, False, INFO, "refuted"),
    ],
)
def test_what_costs_nothing_to_leave_out_is_of_no_use(loss_change, output_change, labels, severity, settled):
    result = {"depths": [1, 3], "output_change": output_change}
    result |= {"loss": 2.0, "loss_change": loss_change} if labels else {}
    attrs = LABELS if labels else {}
    found = grade(Kind.LOSS, FAIL, AGES["trained"], attrs, result, is_tried=True)
    assert (found.severity, found.settled) == (severity, settled)
    assert "Without the steps from depth 1 to 3" in found.words


def test_a_statistic_without_labels_is_suspected_and_what_was_not_tried_is_one_step_milder():
    assert grade(Kind.FRESH, FAIL, AGES["trained"], {})[::2] == (WARN, "not settled")
    assert grade(Kind.FRESH, FAIL, AGES["fresh"], {})[::2] == (FAIL, "")
    untried = grade(Kind.LOSS, FAIL, AGES["trained"], LABELS, is_tried=True)
    assert untried[::2] == (WARN, "not settled")
    assert "depthscope.settle" in untried.words


def test_what_the_loss_shows_says_where_to_look():
    states = walk(12)
    states[5:] = states[5:].mean(2, keepdims=True) + 1e-3 * states[5:]
    task = {"guessing": 4.4, "constant": 2.4, "loss": 2.9, "uncertainty": 0.01}
    analysis = diagnostics.analyze(run_of(states)).assign_coords(step=[1000]).assign_attrs(task=task)
    found = diagnostics.judge(analysis)
    worse, collapse = one(found, "worse_than_constant"), one(found, "rank_collapse")
    assert (worse.severity, collapse.severity) == (FAIL, INFO)
    assert worse.because in {each.verdict for each in found if each.explains}
    assert f"Look first at {worse.because.replace('_', ' ')} at depth" in worse.sentence


# --- in hand of the model ---


def with_small_branches(share: float) -> nn.Module:
    """Blocks that add little, with gains that are not as they were drawn."""
    model = plain(lambda i: Layer(lambda x, block: x + share * (block(x) - x), Block()), 8)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
    return model


def test_capture_tries_what_it_suspects_and_leaves_the_model_as_it_was():
    model, batch = with_small_branches(0.003), tokens(4, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    run = captured(model, batch)
    (result,) = [each for each in run.attrs["consequences"] if each["verdict"] == "same_representation"]
    assert result["depths"] == [1, 8]
    # The blocks left out by hand.
    with torch.no_grad():
        bypassed = model.head(model.embed(batch))
        apart = (bypassed - model(batch)).norm(dim=-1) / model(batch).norm(dim=-1)
    assert result["output_change"] == pytest.approx(float(apart.mean()), rel=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    found = one(findings(run), "same_representation")
    assert (found.severity, found.settled) == (WARN, "shown")  # whether it is trained is not known
    assert "before training it may be normal" in found.sentence


@pytest.mark.parametrize(
    ("loss", "repaired", "half_width", "severity"),
    [
        (2.5, 2.46, None, None),  # a sixteenth of what it then is below a constant answer
        (2.5, 2.2, None, WARN),
        (2.5, 2.2, 0.25, None),
        (2.5, 1.2, 0.1, FAIL),
        (2.99, 2.75, None, None),  # it has still to learn
        (2.99, 2.65, 0.1, None),  # and may have, beyond the noise
        (2.99, 2.0, None, FAIL),
    ],
)
def test_a_loss_that_a_repair_lowers(judged, loss, repaired, half_width, severity):
    task = {"classes": 30, "guessing": 3.4, "constant": 3.0, "loss": loss}
    changed = {"loss": loss, "repaired": repaired, "repair": "turning a by 0.5", "cause": "another turn"}
    changed |= {} if half_width is None else dict.fromkeys(("half_width", "repaired_half_width"), half_width)
    found = judged("off_minimum", 0, severity, task=task, repair=changed)
    assert all(each.sentence.startswith("Turning a by 0.5 lowers the loss by ") for each in found)
    assert all("Another turn would look like this" in each.sentence for each in found)
    # A file may have anything in its place.
    judged("off_minimum", 0, None, task=task, repair=changed | {"cause": 3})


@pytest.mark.parametrize(
    ("loss", "expected", "error", "step", "severity"),
    [
        (2.0, 1.9, 0.05, 1000, None),  # a part of it may be chance
        (2.0, 1.5, 0.05, 1000, WARN),
        (2.0, 1.5, 0.2, 1000, None),
        (2.5, 1.0, 0.05, 1000, FAIL),
        (2.8, 1.0, 0.05, 10, INFO),  # what was just drawn is sure of anything
        (3.5, 1.0, 0.05, 1000, INFO),  # follows from a loss that is worse than a constant answer
    ],
)
def test_predictions_that_are_surer_than_right(judged, loss, expected, error, step, severity):
    task = {"classes": 30, "guessing": 3.4, "constant": 3.0, "loss": loss, "expected": expected}
    errors = dict.fromkeys(("uncertainty", "expected_error"), error)
    found = judged("surer_than_right", step, severity, task=task | errors)
    assert all(f"claim to know {3.0 - expected:.2g} more" in each.sentence for each in found)


def test_a_healthy_network_costs_two_forwards_that_examine_it_and_two_of_one_sequence_that_ask_for_a_leak():
    model, calls = pre_norm(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    captured(model, settle=0)
    without = len(calls)
    run = captured(model)
    assert len(calls) == 2 * without + 4
    assert "consequences" not in run.attrs


def test_no_more_forwards_than_allowed():
    model, calls = with_small_branches(0.003), []
    model.register_forward_hook(lambda *_: calls.append(1))
    captured(model, tokens(4, 32), settle=0)
    without = len(calls)
    captured(model, tokens(4, 32), settle=7)
    # Three examine it, six leave steps out, one shows what is odd, and two of each sequence are for the interval.
    assert len(calls) - 2 * without <= 3 + 6 + 1 + 2 * 4 + 7


def test_a_recording_is_settled_afterwards(tmp_path):
    model, batch = with_small_branches(0.003), tokens(4, 32)
    with probes.record(model, gradients=False) as recorder:
        model(batch)
        recorder.step()
    assert one(findings(recorder.run), "same_representation").settled == "not settled"
    run = settle(recorder.run, model, batch)
    path = diagnostics.save_run(run, tmp_path / "a.zarr.zip")
    assert one(findings(diagnostics.open_run(path)), "same_representation").settled == "shown"
    with pytest.raises(InputError, match="got forwards=-1; expected 0 or more"):
        settle(run, model, batch, forwards=-1)


# --- relative to what came in ---


def test_a_batch_of_equal_tokens_shows_no_collapse():
    found = findings(captured(pre_norm(), torch.full((4, 24), 7)))
    assert not [each for each in found if each.severity > INFO]
    told = one(found, "small_sample").sentence
    assert (
        "All tokens of each sequence are identical at the embedding: this batch cannot show rank collapse"
        in told
    )


def test_an_embedding_that_gives_equal_states_for_different_tokens_is_the_networks_own():
    model = pre_norm()
    with torch.no_grad():
        model.embed.weight[:] = model.embed.weight[:1]
    collapse = one(findings(captured(model)), "rank_collapse")
    assert collapse.first == 0
    assert collapse.severity >= WARN


# --- age ---

WRONG = {"guessing": 4.2, "constant": 2.7, "loss": 4.0, "uncertainty": 0.05, "expected": 1.3}


@pytest.mark.parametrize(
    ("facts", "step", "trained"),
    [
        ({"untouched": 1}, 0, False),
        ({}, 40, False),
        ({"task": {"constant": 4.0, "loss": 3.9}}, 40, False),
        ({"task": {"constant": 4.0, "loss": 2.3}}, 0, True),
        ({"task": {"constant": 4.0, "loss": 2.3}}, 40, True),  # what is tuned further was trained before
        ({"untouched": 1, "task": {"constant": 4.0, "loss": 1.0}}, 0, True),
        ({"task": {"constant": 4.0, "loss": 6.0}, "repair": {"repaired": 2.0}}, 0, True),  # a repair shows it
        # What it learned is used wrongly, or it claims no more than one that was just drawn.
        ({"task": WRONG}, 0, True),
        ({"task": WRONG | {"loss": 4.5}}, 0, None),
        ({"task": WRONG | {"expected": 2.5}}, 0, None),
        ({}, 400, True),
        ({"task": {"constant": 4.0, "loss": 3.9}}, 400, True),
        # What a fault does to the loss is no age, and neither are gains near 1.
        ({"task": {"constant": 4.0, "loss": 3.9}, "norms_moved": 0.5}, 0, None),
        ({}, 0, None),
    ],
)
def test_age_is_a_fact_of_the_training_or_unknown(facts, step, trained):
    assert age_of(xr.Dataset(coords={"step": step}, attrs=facts)).trained is trained


def test_weights_that_have_moved_are_trained():
    moved = xr.Dataset({"first_weight_distance": ("weight", [0.01, 0.4])})
    assert age_of(moved).trained is True


@pytest.mark.parametrize(
    ("loss", "uncertainty", "step", "severity"),
    [
        (2.8, 0.1, 1000, FAIL),
        (2.8, 0.3, 1000, None),
        (2.5, 0.01, 1000, WARN),
        (2.3, 0.01, 1000, None),
        (2.4, 0.01, 1000, WARN),
        (2.8, 0.1, 10, INFO),  # in its first steps
        (2.8, 0.1, 0, WARN),  # at an age that is not known both readings are told
    ],
)
def test_a_loss_is_worse_than_a_constant_answer_beyond_its_error(judged, loss, uncertainty, step, severity):
    task = {"guessing": 4.4, "constant": 2.4, "loss": loss, "uncertainty": uncertainty}
    found = judged("worse_than_constant", step, severity, task=task)
    assert all(("before training it may be normal" in each.sentence) == (step == 0) for each in found)
