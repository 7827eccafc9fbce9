"""Whatever an address asks for, the page opens, shows what it has, and does a bounded amount of work."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import xarray as xr

from depthscope.app.dashboard.components.chosen_runs import MOST_RUNS
from depthscope.app.dashboard.components.controls import CONTROLS, MOST_DEPTHS
from depthscope.app.dashboard.pages import PAGES
from depthscope.app.dashboard.state import run_library
from depthscope.app.readings.readings import COMPLETE
from depthscope.diagnostics import analyze, save_run
from tests.app.dashboard.opening import charts, open_page, words
from tests.app.hostile_text import TEXTS, mutated

PARAMETERS = (
    *("runs", "run", "part", "stream", "depths", "a", "b", *CONTROLS),
    *(
        "look",
        "pin",
        "against",
        "measure",
        "sequence",
        "of_stream",
        "find",
        "group",
        "fold",
        "strips",
        "still",
    ),
    *("trained", "paused", "measures", "step", "versus", "training_tokens", "training_stream"),
    *("zoom_training", "zoom_microscope", "zoom_chart_cka", "colour", "band"),
    *("at", "run_b", "measure_a", "measure_b", "collapse_scale", "collapse_measure", "training_by"),
    *(
        "measure_of",
        "compare_by",
        "compare_at",
        "map_of",
        "map_less",
        "from_connection",
        "to_connection",
        "venue",
        "over_depths",
    ),
    *("tokens_run", "tokens_sequence", "tokens_stream", "tokens_measure", "tokens_depth", "tokens_find"),
    *("tokens_everywhere", "tokens_massive", "data_of", "data_run", "data_measure"),
)
VALUES = {
    **TEXTS,
    **mutated(seed=4, count=6),
    "negative": "-1",
    "huge": "9" * 400,
    "float": "1.5",
    "exponent": "1e3",
    "infinite": "inf",
    "nan": "nan",
    "two_numbers": "1e308,-1e308",
    "points": "1.2.3,4",
    "long": "9" * 100_000,
    "long_text": "x,<b>" * 20_000,
    "boolean": "true",
    "encoded": "..%2f..%2fetc%2fpasswd",
    "twice_encoded": "..%252f..%252fetc%252fpasswd",
    "backslash": "..\\..\\windows\\win.ini",
    "absolute": "/etc/passwd",
    "drive": "C:\\x",
    "arabic_digits": "٣",
    "comma": "plain,mhc",
    "known_and_more": "plain\x00",
    "object": "{}",
    "list": "[1, 2]",
}

# An address is bytes: a lone surrogate cannot be written in it.
VALUES = {case: value.encode("utf-8", "replace").decode() for case, value in VALUES.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_run) -> Path:
    root = tmp_path_factory.mktemp("runs")
    save_run(make_run("residual", layers=2), root / "plain.zarr.zip")
    save_run(make_run("mhc", layers=2), root / "mhc.zarr.zip")
    return root


@pytest.fixture(autouse=True)
def _own_roots(monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [])


def check(test) -> None:
    """A page as it always is: charts, or a sentence why there are none; nothing of the parameter but as text."""
    said = words(test)
    assert charts(test) or test.info or "No run is chosen" in said
    assert not test.error
    assert "Traceback" not in said


PAGE_NAMES = [page.url_path for page in PAGES]


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_parameter_at_once(page, runs):
    case = list(VALUES)[PAGE_NAMES.index(page) * 5 % len(VALUES)]
    check(open_page(page, [runs], **dict.fromkeys(PARAMETERS, VALUES[case])))


@pytest.mark.parametrize("page", ["", "similarity"])
def test_runs_that_are_not_here_are_said_and_unknown_parameters_change_nothing(page, runs):
    unknown = {"embed": "true", "embed_options": "disable_scrolling", TEXTS["script"]: "1", "": "x"}
    test = open_page(page, [runs], runs=["plain", "gone\u202e", "<b>"], **unknown)
    check(test)
    said = words(test).replace("`", "")
    assert "Not here" in said
    assert "gone" in said
    assert "\u202e" not in said


def test_runs_that_are_here_are_not_missed(runs):
    assert "Not here" not in words(open_page("tokens", [runs], runs="plain"))


def save_measured(run: xr.DataTree, path: Path) -> None:
    """Save a run with a few metrics and no trace: what is measured elsewhere, and opens at once."""
    names = ["effective_rank", "dong_residual", "token_cosine", "residual_norm", "num_tokens"]
    metrics = analyze(run, metrics=names).assign_attrs({COMPLETE: True})
    save_run(xr.DataTree.from_dict({"/": xr.Dataset(attrs=run.attrs), "/metrics": metrics}), path)


def test_all_runs_of_a_large_folder_are_bounded_and_the_limit_is_said(tmp_path, make_run):
    names = [f"run{number:03}" for number in range(200)]
    save_measured(make_run("residual", layers=2), tmp_path / "run000.zarr.zip")
    for name in names[1:]:
        shutil.copy(tmp_path / "run000.zarr.zip", tmp_path / f"{name}.zarr.zip")
    start = time.monotonic()
    test = open_page("collapse", [tmp_path], runs=names)
    assert len(test.multiselect(key="runs").value) == MOST_RUNS
    assert f"At most {MOST_RUNS} of the 200 runs" in words(test)
    assert time.monotonic() - start < 90


def test_all_depths_of_a_deep_run_are_bounded_and_the_limit_is_said(tmp_path, make_run):
    run = make_run("residual", layers=300, samples=1, tokens=3, features=2, gradients=False, weights=False)
    save_measured(run, tmp_path / "deep.zarr.zip")
    test = open_page("collapse", [tmp_path], depths=[str(depth) for depth in range(301)])
    for data in charts(test).values():
        assert len(data["figure"]) < 2_000_000
    if test.multiselect:
        assert all(len(field.value) <= max(MOST_DEPTHS, MOST_RUNS) for field in test.multiselect)
