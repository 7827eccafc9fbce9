"""Notes appear where more tokens would really change the number, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics
from depthscope.diagnostics import schema


@pytest.fixture
def run_of(make_run):
    """A plain run of noise in which ``directions`` of the features are used."""

    def build(samples, tokens, features, directions, seed=0):
        sizes = {"samples": samples, "tokens": tokens, "features": features}
        run = make_run("residual", layers=1, **sizes, weights=False)
        trace = run["trace"].to_dataset().load()
        rng = np.random.default_rng(seed)
        shape = (*trace["residual"].shape[:-1], directions)
        trace["residual"].values[:] = rng.standard_normal(shape) @ rng.standard_normal((directions, features))
        trace["mask"].values[:] = True
        return schema.create_run(trace, attrs=run.attrs)

    return build


def notes(run, *names, **options):
    return diagnostics.analyze(run, metrics=names, **options).attrs["notes"]


def test_a_rank_that_more_tokens_would_raise_is_noted(run_of):
    few, many = run_of(6, 10, 64, 64), run_of(6, 80, 64, 64)
    said = notes(few, "effective_rank", "participation_ratio")
    assert said["effective_rank"].startswith("60 tokens for a rank of 4")
    assert "fraction of its noise baseline" in said["effective_rank"]
    assert not notes(many, "effective_rank", "participation_ratio")
    ranks = [
        float(diagnostics.effective_rank(run, scope="data", center=True)[0, 0, 0]) for run in (few, many)
    ]
    assert ranks[1] > 1.2 * ranks[0]


def test_a_rank_that_the_network_sets_is_not(run_of):
    assert not notes(run_of(6, 10, 64, 3), "effective_rank")


def test_gradients_of_few_sequences_are_noted(run_of):
    assert notes(run_of(3, 10, 8, 8), "gradient_rank")["gradient_rank"].startswith(
        "3 sequences for a rank of 2"
    )


def test_unbiased_cka_of_few_tokens_or_with_a_large_error_is_noted(run_of):
    assert "40 tokens" in notes(run_of(5, 8, 16, 16), "cka")["cka"]
    run = run_of(6, 10, 16, 16)
    assert "cka" not in notes(run, "cka") | notes(run, "cka", jackknife=True)
    trace = run["trace"].to_dataset().load()
    trace["residual"].values[:, 0] = 10 * trace["residual"].values[:1, 0]  # one loud sequence decides alone
    loud = schema.create_run(trace, attrs=run.attrs)
    found = diagnostics.analyze(loud, metrics=["cka"], jackknife=True)
    largest = float(found["cka_stderr"].sel(estimator="unbiased", tokens="all").max())
    assert largest > 0.5
    assert f"reaches {largest:.2f}" in found.attrs["notes"]["cka"]


@pytest.mark.parametrize(
    ("samples", "words"), [(1, "one sequence"), (3, "uncertain by about 50 %; 12 give 21 %"), (5, "")]
)
def test_errors_from_few_sequences_are_noted(run_of, samples, words):
    assert not notes(run_of(samples, 10, 8, 2), "dong_residual")  # no errors were asked for
    said = notes(run_of(samples, 10, 8, 2), "dong_residual", jackknife=True)
    assert words in said.get("standard errors", "")
    assert bool(said) == bool(words)
