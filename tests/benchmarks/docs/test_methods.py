"""The page of methods has the facts of every declaration, and is current."""

from __future__ import annotations

import pytest

from benchmarks.docs import methods
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.numbers import number
from depthscope.diagnostics.verdicts import VERDICTS


@pytest.fixture(scope="module")
def sections():
    parts = methods.methods_page().split("\n#### ")
    return {part.partition("`")[2].partition("`")[0]: part for part in parts[1:]}


def test_the_committed_page_is_what_the_declarations_say():
    assert methods.PAGE.read_text(encoding="utf-8") == methods.methods_page(), (
        "run python -m benchmarks.docs.methods"
    )
    assert methods.main(["--check"]) == 0


def test_an_old_page_is_found(tmp_path, monkeypatch):
    page = tmp_path / "docs" / "methods.md"
    monkeypatch.setattr(methods, "PAGE", page)
    assert methods.main(["--check"]) == 1
    assert methods.main([]) == 0
    assert methods.main(["--check"]) == 0


def test_every_metric_and_verdict_has_a_section(sections):
    assert list(sections) == [*CATALOGUE, *VERDICTS]


def test_a_metric_has_all_its_facts(sections):
    for name in CATALOGUE:
        metric, section = CATALOGUE[name], sections[name]
        assert metric.description in section
        assert f"$`{metric.symbol}`$" in section
        for fact in (metric.units, metric.estimator, metric.basis):
            assert fact in section
        assert section.count("```math") == metric.__doc__.count(".. math::")
        if callable(metric.null):
            assert f"`{name}_null`" in section


def test_a_verdict_has_all_its_facts(sections):
    for name in VERDICTS:
        verdict, section = VERDICTS[name], sections[name]
        for severity, limit in verdict.limits.levels:
            assert (
                f"{severity.name} {'above' if verdict.limits.above else 'below'} {number(limit)}" in section
            )
        assert verdict.advice in section
        assert verdict.title in section


def test_sources_carry_their_arxiv_number(sections):
    assert "[Dong et al. 2021](https://arxiv.org/abs/2103.03404)" in sections["dong_residual"]
    assert "[Roy & Vetterli 2007]" not in sections["effective_rank"]  # a paper without a link is not one
    assert "Roy & Vetterli 2007" in sections["effective_rank"]
