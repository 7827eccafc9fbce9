"""Is every sentence of the methods true, of whatever runs?"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from depthscope.app.figures import Selection
from depthscope.app.figures.composed import QUESTIONS, compose
from depthscope.app.paper.methods import methods_text
from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import CATALOGUE, Severity
from tests.app.tables.test_tables import FINDING


@pytest.fixture(scope="module")
def readings(make_run):
    plain, hc = read_runs(
        {"plain": make_run("residual", layers=2, samples=4), "hc": make_run("hc", layers=2, samples=6)}
    )
    return [replace(plain, attrs={**plain.attrs, "reconstruction_error": None}), hc]


def text_of(readings, metrics=("effective_rank",)):
    return methods_text(readings, Selection(), metrics, "")


def with_attrs(reading, **attrs):
    return replace(reading, attrs={**reading.attrs, **attrs})


@pytest.mark.parametrize("severity", [Severity.INFO, Severity.WARN, Severity.FAIL])
def test_a_number_that_crossed_a_limit_is_never_denied(readings, severity):
    found = [replace(readings[0], findings=(replace(FINDING, severity=severity),))]
    assert "No number crossed" not in text_of(found)
    assert "each number that crossed one" in text_of(found)
    nothing = replace(readings[0], findings=())
    assert "No number crossed the limit of a verdict." in text_of([nothing])
    # Where nothing was judged, nothing is said.
    assert "limit" not in text_of([replace(nothing, passed=())])


def test_every_metric_is_named_with_its_source_and_in_few_words(readings):
    definitions = text_of(readings, tuple(CATALOGUE)).split("\n\n")[2]
    assert all(metric.label.casefold() in definitions.casefold() for metric in CATALOGUE.values())
    assert "ffective rank" in definitions.partition("Roy & Vetterli 2007")[0]
    assert not set(re.findall(r"\b\w+_\w+\b|`|\bdims?\b|\bNaN\b|\bkwargs?\b", definitions)) - {"H_res"}
    shown = [metric for question in QUESTIONS for metric in compose(question, readings).metrics]
    assert len(text_of(readings, shown).split()) <= 350


def test_a_seed_is_named_with_what_it_is_of(readings):
    sampled = {"max_sequences": 4, "seed": 7, "sequences_seen": 90, "sequences_kept": 4}
    trained = with_attrs(readings[0], seed=3, training={"steps": 40}, sampling=sampled)
    text = text_of([trained])
    assert "trained for 40 steps from seed 3" in text
    assert "a uniform sample of the sequences (plain: 4 of 90 sequences, drawn with seed 7)" in text
    everything = {**sampled, "sequences_seen": 4}
    assert "seed" not in text_of([with_attrs(readings[0], seed=3, sampling=everything)])


def test_only_runs_whose_next_state_was_recomputed_are_said_to_be(readings):
    text = text_of(readings)
    assert "of hc the next state was recomputed" in text
    assert "recomputed" not in text_of(readings[:1])
    assert "of the run the next state" in text_of(readings[1:])
    open_run = with_attrs(readings[1], orientation="ambiguous")
    assert "fit H_res and its transpose equally well" in text_of([readings[0], open_run])
    assert "transpose" not in text


def test_the_same_data_are_claimed_only_where_they_are_known(readings):
    assert "All runs have seen the same data." in text_of(readings)
    unknown = [readings[0], with_attrs(readings[1], data_digest=None)]
    assert "What data hc have seen is not recorded." in text_of(unknown)
    other = [readings[0], with_attrs(readings[1], data_digest="other")]
    assert "The runs have not all seen the same data." in text_of(other)


def test_intervals_and_nulls_are_those_of_what_is_shown(readings):
    text = text_of(readings)
    assert "(Student's t over 4 sequences) for plain, half of a 95 % interval (Student's t over 6" in text
    assert "A noise baseline is what a metric would be" in text
    assert "baseline" not in text_of(readings, ("residual_norm",))


def test_what_several_panels_say_names_their_letters(readings):
    caption = compose("gains", readings[1:]).caption
    assert "(all) Mean over tokens;" in caption
    # Panels of products have a sentence that those of single connections lack.
    products = caption.rindex("Product of H_res")
    assert caption[:products].rpartition("(c, d) ")[2].count("(") == 0
    assert "(a, b) Largest signed row sum" in caption
