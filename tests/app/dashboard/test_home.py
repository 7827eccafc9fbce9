"""Does the home page show where each run dies, the worst first, and lead to the microscope there?"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from depthscope.app.dashboard.state import run_library
from depthscope.app.readings.depth_map import MEASURES, MOST_CELLS, profiles_of, summary_of
from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import analyze, create_run, save_run
from tests.app.dashboard.opening import depth_map, open_page, parts, words


def shares(analysis, scope="sequence"):
    at = {"step": -1, "scope": scope, "tokens": "all", "centering": "raw", "stream": "mean"}
    rank, null = (analysis[name] for name in ("effective_rank", "effective_rank_null"))
    step = at.pop("step")
    known = {dim: label for dim, label in at.items() if dim in null.dims}
    null = null.isel(step=step) if "step" in null.dims else null
    return (rank.isel(step=step).sel(at) / null.sel(known)).values


def test_a_row_has_the_numbers_of_its_run_the_worst_run_first(opened, mhc_run):
    rows = depth_map(opened(""))
    assert next(iter(rows)) == "nan"  # a failure comes before all that only warn
    np.testing.assert_allclose(rows["mhc"]["cells"], shares(analyze(mhc_run)), rtol=1e-3)
    assert rows["nan"]["cells"][3] is None
    for row in rows.values():
        assert len(row["alt"]) > 40
        assert all(0 <= mark["at"] < len(row["names"]) for mark in row["marks"])
    first = rows["nan"]
    assert (first["sign"], first["severity"]) == ("✕", "FAIL")
    assert any(mark["at"] == 3 and mark["severity"] == "FAIL" for mark in first["marks"])


def test_every_colour_is_a_number_of_the_analysis(mhc_run):
    (reading,) = read_runs({"a": mhc_run})
    analysis, depths = reading.analysis, reading.analysis.sizes["depth"]
    last = analysis.isel(step=-1)

    def raw(name):
        values = last[name]
        at = {"scope": "sequence", "tokens": "all", "centering": "raw", "stream": "mean"}
        return values.sel({dim: at[dim] for dim in values.dims if dim in at}).values

    gain, norm = last["deflated_gain"].sel(reduction="mean").values, raw("gradient_norm")
    expected = {
        "rank": shares(analysis),
        "tokens": raw("dong_residual"),
        "streams": np.concatenate([[1.0], gain, [gain[-1]] * (depths - 1 - len(gain))]),
        "gradient": norm / np.median(norm),
    }
    assert set(expected) == set(MEASURES)
    for measure, values in summary_of(reading).profiles.items():
        np.testing.assert_allclose(values, expected[measure], err_msg=measure)


def test_a_rank_of_sequences_of_one_token_is_that_of_all_of_them(make_run):
    analysis = analyze(make_run("residual", layers=2, samples=24, tokens=1))
    expected = shares(analysis, "data")
    np.testing.assert_allclose(profiles_of(analysis, analysis.sizes["depth"])["rank"], expected)


def test_a_deep_run_keeps_its_worst_depth(make_run):
    (reading,) = read_runs({"deep": make_run("residual", layers=300, samples=1, tokens=3, features=2)})
    summary = summary_of(reading)
    cells, block = summary.cells("rank")
    assert len(cells) <= MOST_CELLS
    assert min(cells) == pytest.approx(min(summary.profiles["rank"]), rel=1e-3)
    assert block == 3 or block == 2


def test_rows_are_found_and_grouped_by_what_is_shown_of_them(opened, mhc_run):
    assert list(depth_map(opened("", find="mhc"))) == ["mhc"]
    assert "nan" in depth_map(opened("", find="failure"))
    assert list(depth_map(opened("", find=f"{mhc_run.attrs['model']} mhc"))) == ["mhc"]
    assert "No run has" in words(opened("", find="nothing of this kind"))
    grouped = depth_map(opened("", group="family"))
    assert [row["group"] for row in grouped.values()] == sorted(row["group"] for row in grouped.values())
    assert grouped["mhc"]["group"] == "mhc"


def test_the_findings_of_the_row_are_cards_and_open_the_microscope(opened):
    test = opened("", at="nan")
    said = words(test)
    assert all(f"{label}:" in said for label in ("Where", "Why", "Next"))
    (button, *_) = [each for each in test.button if each.label.startswith("Microscope at depth")]
    depth = button.label.rpartition(" ")[2]
    button.click().run()
    assert not test.exception
    (pane,) = parts(test, "pane")
    assert str(pane["pin"]) == depth


def test_the_chains_of_a_run_have_a_row_each(monkeypatch, tmp_path, make_run):
    two = {"encoder": make_run("residual", layers=2), "decoder": make_run("residual", layers=3)}
    traces = {name: run["trace"].to_dataset() for name, run in two.items()}
    save_run(create_run(traces, attrs=dict(two["encoder"].attrs)), tmp_path / "two.zarr.zip")
    monkeypatch.setattr(run_library, "_roots", [])
    assert sorted(depth_map(open_page("", [tmp_path]))) == ["two/decoder", "two/encoder"]


def test_an_empty_folder_gives_the_next_command(monkeypatch, tmp_path):
    monkeypatch.setattr(run_library, "_roots", [])
    said = words(open_page("", [tmp_path]))
    assert "no run here yet" in said
    assert "depthscope demo" in said


def test_five_hundred_runs_are_sent_in_little(monkeypatch, tmp_path, saved_runs):
    monkeypatch.setattr(run_library, "_roots", [])
    (reading,) = read_runs({"plain": run_library.schema.open_run(saved_runs / "plain.zarr.zip")})
    summary = summary_of(reading)
    monkeypatch.setattr(run_library, "summaries_of", lambda name, path, ask: [replace(summary, name=name)])
    for number in range(500):
        (tmp_path / f"run{number:03}.zarr.zip").touch()
    test = open_page("", [tmp_path])
    (sent,) = parts(test, "map")
    assert len(sent["rows"]) == 500
    assert len(json.dumps(sent)) < 2_000_000


def test_a_bad_run_explains_itself_and_leaves_the_others(monkeypatch, tmp_path, saved_runs):
    (tmp_path / "bad.zarr.zip").write_bytes(b"nonsense")
    shutil.copy(saved_runs / "plain.zarr.zip", tmp_path / "good.zarr.zip")
    monkeypatch.setattr(run_library, "_roots", [])
    rows = depth_map(open_page("", [tmp_path]))
    assert rows["good"]["cells"]
    assert "cannot be read" in rows["bad"]["worst"]
    said = words(open_page("compare", [tmp_path], runs=["good", "bad"]))
    assert "bad cannot be shown" in said
    assert "depthscope probe" in said
