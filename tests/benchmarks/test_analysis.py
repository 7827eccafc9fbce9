"""The benchmark of the analyzers: its references are right by hand, its goals and its page say what was found."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from benchmarks.analysis import cka, comparison, goals, inputs, measure, page, ranks, scalars
from benchmarks.growth import operations
from benchmarks.growth import page as growth_page
from benchmarks.shared import tables


def rows(**errors):
    """Rows of a comparison whose baseline takes a second."""
    return {
        "depthscope, numpy": {"errors": errors, "times": {"N 8": cell(1.0, peak=10.0)}},
        "pytorch-cka": {"errors": {}, "times": {"N 8": cell(3.0, peak=30.0)}},
    }


def cell(ratio, *, peak):
    return {"ratio": ratio, "quartiles": [ratio, ratio], "rounds": 3, "seconds": ratio, "peak": peak}


def test_a_goal_is_met_missed_or_not_measured():
    results = {"cka": {"rows": rows(plain=2e-7, far=5e-7)}}
    found = {goal["text"]: goal for goal in goals.judged(results)}
    error = found["exact CKA: error at any offset"]
    assert error["met"]
    assert error["found"] == 5e-7
    faster = found["exact CKA: × faster than pytorch-cka"]
    assert faster["met"]
    assert faster["found"] == 3.0
    memory = found["exact CKA: memory, as a share of pytorch-cka's"]
    assert memory["met"] is False
    assert memory["found"] == pytest.approx(1 / 3)
    assert found["one-pass CKA: rms error"]["reason"] == "not asked in this run"


def test_an_error_that_is_not_a_number_misses_the_goal():
    goal = goals.judged({"cka": {"rows": rows(plain=1e-9, far=float("nan"))}})[0]
    assert goal["met"] is False


def test_a_missing_peer_is_a_reason():
    known = rows(plain=0.0)
    known["pytorch-cka"] = {"errors": {}, "times": {"N 8": {"reason": "not installed"}}}
    found = {goal["text"]: goal for goal in goals.judged({"cka": {"rows": known}})}
    assert found["exact CKA: × faster than pytorch-cka"]["reason"] == "not installed"
    assert found["exact CKA: × faster than pytorch-cka"]["met"] is None


def test_a_page_has_every_goal_and_cell():
    comparison = {
        "title": "CKA",
        "note": "By hand.",
        "baseline": "depthscope, numpy",
        "rows": rows(plain=2e-7),
    }
    results = {
        "comparisons": {"cka": comparison},
        "goals": goals.judged({"cka": comparison}),
        "rounds": 3,
        "date": "2026-01-01",
        "machine": "a machine",
        "versions": {"torch": "2", "torch-cka": "0.21"},
        "command": "python -m benchmarks.analysis",
    }
    text = page.markdown(results)
    assert "pip install torch-cka==0.21`;" in text
    assert "| exact CKA: × faster than pytorch-cka | ≥ 2 | 3.00 | met |" in text
    assert "| pytorch-cka | 3.00 (3.00–3.00), 3 s, 30 MiB |" in text
    assert "| depthscope, numpy | 2e-07 |" in text
    assert "**missed**" in page.text(results)


def test_a_part_of_a_page_is_written_anew_and_the_others_stay(tmp_path):
    page = tmp_path / "page.md"
    for name, text in (("one", "a"), ("two", "b"), ("one", "c")):
        tables.put_section(page, name, text)
    assert (
        page.read_text() == "<!-- one -->\nc\n<!-- end of one -->\n\n<!-- two -->\nb\n<!-- end of two -->\n"
    )


def test_rows_hold_errors_and_times_and_reasons():
    def absent(_data):
        raise ModuleNotFoundError("no module")

    def wrong(_data):
        raise ValueError("expected something else")

    tools = {
        "exact": comparison.Tool(lambda data: lambda: data.sum()),
        "off": comparison.Tool(lambda data: lambda: data.sum() + 0.5),
        "absent": comparison.Tool(absent),
        "wrong": comparison.Tool(wrong),
    }
    asked = comparison.Comparison(
        title="a sum",
        tools=tools,
        baseline="exact",
        sizes={"4": lambda: np.ones(4)},
        variants={"ones": lambda: np.ones(4)},
        truths={"": lambda data: np.asarray(float(len(data)))},
    )
    found = measure.rows(asked, asked.groups()[0], rounds=2)
    assert found["exact"]["errors"] == {"ones": 0.0}
    assert found["off"]["errors"] == {"ones": 0.5}
    assert found["absent"]["errors"] == {"ones": "not installed"}
    assert found["wrong"]["times"]["4"] == {"reason": "ValueError: expected something else"}
    assert found["exact"]["times"]["4"]["ratio"] == 1.0
    assert found["off"]["times"]["4"]["rounds"] == 2


def test_peers_have_processes_of_their_own():
    groups = cka.comparisons(quick=True)["cka"].groups()
    assert groups[0] == ["depthscope, numpy", "depthscope, torch"]
    assert ["depthscope, numpy", "ckatorch cka_base", "ckatorch cka_batch"] in groups


def test_the_true_cka_is_songs_sum_over_distinct_tokens():
    x, y = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    table = cka.truth(np.stack([x, y]), unbiased=True)
    sums = [by_index(a, b) for a, b in ((x, y), (x, x), (y, y))]
    assert table[0, 1] == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), rel=1e-9)


def by_index(x, y):
    """HSIC₁ as an average over four distinct tokens (Song et al., 2012), in plain loops."""
    k, q = (side.astype(np.float64) @ side.astype(np.float64).T for side in (x, y))
    every, n, total = range(len(x)), len(x), 0.0
    for i in every:
        for j in every:
            for a in every:
                for b in every:
                    if len({i, j, a, b}) == 4:
                        total += k[i, j] * (q[i, j] + q[a, b] - 2 * q[i, a])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_the_true_rank_of_a_spectrum_is_that_of_its_values():
    values = inputs.spectra(64)["power law 1/i"]
    matrix = inputs.of_spectrum(values, 64)
    assert float(ranks.truth(matrix)) == pytest.approx(ranks.entropy_of(values), rel=1e-5)


def test_the_true_participation_ratio_averages_distinct_rows_and_columns():
    x = np.random.default_rng(0).standard_normal((5, 3))
    over = under = 0.0
    for a in range(3):
        for b in range(3):
            if a == b:
                continue
            for i, j, k, m in permutations(range(5), 4):
                u, v = x[:, a], x[:, b]
                over += u[i] * u[i] * v[j] * v[j] - 2 * u[i] * u[i] * v[j] * v[k] + u[i] * u[j] * v[k] * v[m]
                under += u[i] * u[j] * v[i] * v[j] - 2 * u[i] * u[j] * v[j] * v[k] + u[i] * u[j] * v[k] * v[m]
    assert scalars.true_participation(x) == pytest.approx(over / under, rel=1e-9)


def test_exponents_are_slopes_of_the_last_points():
    sizes = (1.0, 2.0, 4.0, 8.0)
    points = [
        {"value": x, "seconds": {"ranks": 5.0 if x == 1 else x**2}, "operations": {"ranks": 3 * x**1.5}}
        for x in sizes
    ]
    measured, expected = growth_page.exponents(points)["ranks"]
    assert measured == pytest.approx(2.0)
    assert expected == pytest.approx(1.5)


def test_every_group_of_metrics_is_in_the_catalogue():
    from benchmarks.capture.cases import Sizes
    from depthscope.diagnostics import CATALOGUE

    groups = operations.groups()
    assert all(names and set(names) <= set(CATALOGUE) for names in groups.values())
    counted = operations.of(Sizes(layers=2, width=8, batch=1, tokens=4))
    assert set(groups) | {"capture"} == set(counted)
