"""Tokens, composites, similarity, comparison and data: the numbers of the run, and a sentence where there are none."""

import json
import re
import shlex
import subprocess
import sys
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from depthscope.app.cli.main import main
from depthscope.app.dashboard.components.run_groups import groups_of
from depthscope.app.dashboard.pages import data as data_page
from depthscope.app.dashboard.pages.similarity import map_difference
from depthscope.app.dashboard.state import run_differences, run_library
from depthscope.app.figures import FIGURES, Selection
from depthscope.app.readings.close_up import read_close_up
from depthscope.app.readings.readings import read_paths
from depthscope.app.tables.difference_map import difference_map
from depthscope.app.tables.differences import profiles_of
from depthscope.app.text.bibliography import entries
from depthscope.diagnostics import create_run, save_run
from depthscope.diagnostics.errors import InputError
from tests.app.dashboard.opening import charts, numbers, open_page, parts, words

ROOT = Path(__file__).parents[3]
RLO = "\u202e"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, residual_run, mhc_run, make_run) -> Path:
    root = tmp_path_factory.mktemp("more")
    save_run(residual_run, root / "plain.zarr.zip")
    save_run(mhc_run, root / "mhc.zarr.zip")
    trace = residual_run["trace"].to_dataset().load()
    broken = trace["residual"].copy(deep=True)
    broken[3] = np.nan
    save_run(create_run(trace.assign(residual=broken), attrs=residual_run.attrs), root / "nan.zarr.zip")
    shape = trace["mask"].shape
    texts = np.array([[f"t{s}.{t}" for t in range(shape[1])] for s in range(shape[0])], dtype=object)
    texts[0, 0] = f"<b>{RLO}evil</b>"
    named = trace.assign(token_text=(trace["mask"].dims, texts))
    save_run(create_run(named, attrs=residual_run.attrs), root / "<i>named.zarr.zip")
    padding = trace.assign(mask=trace["mask"] & False)
    save_run(create_run(padding, attrs=residual_run.attrs), root / "padding.zarr.zip")
    return root


@pytest.fixture
def opened(runs, monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [])

    def opened_page(page: str, *names: str, **parameters: str) -> AppTest:
        return open_page(page, [runs / name for name in names] or [runs], **parameters)

    return opened_page


def test_every_page_opens_on_what_is_undefined_and_on_padding_alone(opened):
    for page in ("collapse", "similarity", "mixing", "gradients", "tokens", "compare", "data"):
        # Both at once, and the one that is looked at alone on some pages: padding.
        for names in (("nan.zarr.zip", "padding.zarr.zip"), ("padding.zarr.zip",)):
            test = opened(page, *names)
            assert not test.error, (page, names, test.error)
            assert charts(test) or test.info, (page, names)


def test_the_table_of_tokens_is_searched_and_shows_what_is_hidden(opened, runs):
    test = opened("tokens", "<i>named.zarr.zip")
    assert len(test.dataframe) == 1
    table = test.dataframe[0].value
    assert RLO not in "".join(table["text"])
    test.text_input(key="tokens_find").set_value("EVIL").run()
    (text,) = test.dataframe[0].value["text"]
    assert "\\u202e" in text
    test.text_input(key="tokens_find").set_value("no such token").run()
    assert "No token with" in words(test) or "No token with" in test.info[0].value
    close_up = read_close_up(runs / "<i>named.zarr.zip")
    depth = test.number_input(key="tokens_depth").value
    np.testing.assert_allclose(
        np.sort(table["norm"]),
        np.sort(np.linalg.norm(close_up.states_at(depth), axis=-1)[0][close_up.mask[0]]),
    )


def test_gaps_are_counted_and_missing_texts_are_said(opened):
    said = words(opened("tokens", "nan.zarr.zip", tokens_depth="3"))
    assert re.search(r"\d+ of its numbers are undefined", said)
    assert "are not finite" in said
    assert "has no text of its tokens" in words(opened("tokens", "plain.zarr.zip"))


@pytest.mark.parametrize(("a", "b"), [(0, 5), (5, 0), (2, 2)])
def test_the_bench_multiplies_any_two_connections(a, b, opened, runs, mhc_run):
    test = opened("mixing", "mhc.zarr.zip", from_connection=str(a), to_connection=str(b))
    h = mhc_run["trace"]["h_res"].values.astype(np.float64)
    first, last = min(a, b), max(a, b)
    product = np.eye(h.shape[-1])
    for connection in range(first, last + 1):
        product = h[connection] @ product
    mask = mhc_run["trace"]["mask"].values
    mean = product[mask].mean(axis=0)
    (bench,) = parts(test, "bench")
    np.testing.assert_allclose(bench["matrices"][0]["h"], mean, rtol=1e-5)
    assert "row sums" in words(test)
    pictures = charts(test)["h_res_pictures"]
    n, (low, high) = h.shape[-1], (first, last)
    cells = numbers(
        next(each for each in json.loads(pictures["figure"])["data"] if each["type"] == "heatmap")["z"]
    )
    for connection in (low, high):
        start = connection * (n + 3)
        expected = h[connection][mask].mean(axis=0)
        np.testing.assert_allclose(cells[:n, start : start + n], expected, rtol=1e-5)
        np.testing.assert_allclose(cells[:n, start + n + 1], expected.sum(axis=1) - 1, atol=1e-6)
        np.testing.assert_allclose(cells[n + 1, start : start + n], expected.sum(axis=0) - 1, atol=1e-6)


def test_two_runs_by_one_measure_have_a_difference(opened, runs):
    test = opened("similarity", "plain.zarr.zip", "mhc.zarr.zip")
    assert {"cka", "cka_right", "cka_difference"} <= set(charts(test))
    readings, _ = read_paths([str(runs / "plain.zarr.zip"), str(runs / "mhc.zarr.zip")])
    maps = [FIGURES["cka"].build({each.name: each.analysis}) for each in readings]
    same = map_difference(maps[0], maps[0])
    assert np.nanmax(np.abs(same.z)) == 0
    shallow = min(maps, key=lambda each: len(each.x))
    difference = map_difference(*maps)
    assert difference.z.shape == shallow.z.shape
    np.testing.assert_allclose(difference.z[0, -1], maps[0].z[0, -1] - maps[1].z[0, -1])


def test_the_map_of_differences_has_the_largest_first_and_no_units(opened, runs):
    assert "difference_map" in charts(opened("compare", "plain.zarr.zip", "mhc.zarr.zip"))
    readings, _ = read_paths([str(runs / "plain.zarr.zip"), str(runs / "mhc.zarr.zip")])
    one, other = readings
    metrics = ["residual_norm", "effective_rank", "composite_gain"]
    view = Selection()
    figure, rows = difference_map({"a": [one], "b": [other]}, metrics, view, axis="depth")
    assert set(rows) == {"residual_norm", "effective_rank"}
    largest = np.nanmax(np.abs(figure.z), axis=1)
    assert largest[0] == largest.max() == figure.limits[1] == -figure.limits[0]
    (first,), (second,) = (profiles_of([reading], "residual_norm", view) for reading in readings)
    depth = len(figure.x) - 1
    a, b = float(first[-1]), float(second[-1])
    assert figure.z[rows.index("residual_norm"), depth] == pytest.approx(2 * (b - a) / (b + a))
    # The mean of a group; and of twice the same run nothing is left.
    same, _ = difference_map({"a": [one, one], "b": [one]}, metrics, view, axis="depth")
    assert np.nanmax(np.abs(same.z)) == 0
    with pytest.raises(InputError, match="no measure along their connections"):
        difference_map({"a": [one], "b": [other]}, metrics, view, axis="connection")


def test_a_measure_on_request_is_offered_and_explained(opened):
    test = opened("similarity", "plain.zarr.zip", measure_b="Procrustes distance")
    assert "--metrics procrustes" in words(test)


def test_runs_are_grouped_by_what_several_share(runs):
    readings, _ = read_paths(
        [str(runs / name) for name in ("plain.zarr.zip", "nan.zarr.zip", "mhc.zarr.zip")]
    )
    assert "family" in groups_of(readings)
    assert "seed" not in groups_of(readings)


def test_compared_runs_are_tested_and_the_command_is_named(opened, monkeypatch):
    test = opened("compare", "plain.zarr.zip", "<i>named.zarr.zip")
    said = words(test)
    assert "difference" in said
    assert any(name.startswith("difference_") for name in charts(test))
    assert any(block.value.startswith("depthscope compare ") for block in test.code)
    # Kept beside the first run: another process does not test them again.
    run_differences._tested.clear()
    monkeypatch.setattr(run_differences, "between_runs", None)
    again = charts(opened("compare", "plain.zarr.zip", "<i>named.zarr.zip"))
    assert again == charts(test)


def saved(figure_or_table) -> pd.DataFrame:
    return pd.read_csv(StringIO(data_page.to_csv(figure_or_table)))


def test_a_figure_for_a_paper_comes_with_the_entries_that_it_cites(opened):
    codes = [block.value for block in opened("data", "plain.zarr.zip").code]
    (latex,) = [code for code in codes if "includegraphics" in code]
    (bibtex,) = [code for code in codes if code.startswith("@")]
    (cited,) = re.findall(r"\\citep\{([^}]*)\}", latex)
    assert set(entries(bibtex)) == set(cited.split(","))
    python = [code for code in codes if "import " in code]
    assert [re.findall("(?:import|from) .*", code) for code in python] == [["import depthscope as ds"]] * 2


def test_every_format_has_what_is_shown(runs):
    readings, _ = read_paths([str(runs / "mhc.zarr.zip")])
    figure = FIGURES["cka"].build({"mhc": readings[0].analysis})
    table = data_page.measure_table(figure)
    plain = data_page.plain_frame(table.data)
    parquet = pd.read_parquet(BytesIO(data_page.parquet_bytes(plain)))
    pd.testing.assert_frame_equal(parquet, plain.astype(parquet.dtypes))
    np.testing.assert_allclose(saved(table).iloc[:, 2:].to_numpy(float), figure.z)
    assert data_page.to_latex(table, {}).count(r"\\") >= len(figure.y)


def test_columns_of_one_name_and_hidden_signs_can_be_saved():
    data = pd.DataFrame([[1.0, 2.0, f"a{RLO}b"]], columns=["x", "x", f"n{RLO}"])
    plain = data_page.plain_frame(data)
    assert list(plain.columns) == ["x", "x (1)", "n\\u202e"]
    assert plain.iloc[0, 2] == "a\\u202eb"
    assert len(pd.read_parquet(BytesIO(data_page.parquet_bytes(plain)))) == 1


def test_the_command_and_the_python_of_a_measure_run_and_give_what_is_shown(
    opened, tmp_path, monkeypatch, capsys
):
    test = opened("data", "mhc.zarr.zip", data_measure="effective_rank", scope="data")
    shown = test.dataframe[0].value
    command, python = (block.value for block in test.code[:2])
    found = subprocess.run(
        [sys.executable, "-c", python], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    made = pd.read_csv(StringIO(found.stdout))
    np.testing.assert_allclose(made["y"], shown["y"].astype(float))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    printed = json.loads(capsys.readouterr().out)
    text = json.dumps(printed)
    assert "effective_rank" in text
    first = float(shown["y"].iloc[0])
    numbers = [float(each) for each in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)]
    assert any(abs(each - first) < 1e-9 * abs(first) for each in numbers)


@pytest.mark.parametrize(
    "what", [data_page.DEPTH, data_page.CONNECTION, data_page.SUMMARY, data_page.FINDINGS]
)
def test_the_python_of_every_table_gives_what_is_shown(what, opened, capsys):
    test = opened("data", "mhc.zarr.zip", data_of=what)
    shown = test.dataframe[0].value
    commands = test.code[0].value.splitlines()
    assert all(shlex.split(each)[0] == "depthscope" for each in commands)
    exec(compile(test.code[1].value, "shown", "exec"), {})
    made = pd.read_csv(StringIO(capsys.readouterr().out))
    assert made.shape == shown.shape


def test_a_run_of_sums_alone_says_what_it_lacks(opened, runs, monkeypatch):
    monkeypatch.setattr(run_library, "close_up_of", lambda reading: None)
    assert "has no states of single tokens" in words(opened("tokens", "plain.zarr.zip"))
    assert "matrices of single tokens" in words(opened("mixing", "mhc.zarr.zip"))


def test_a_card_opens_the_microscope_at_its_depth(opened, runs):
    test = opened("", "nan.zarr.zip")
    (button, *_) = [each for each in test.button if each.label.startswith("Microscope")]
    depth = re.search(r"depth (\d+)", button.label)
    button.click().run()
    assert not test.exception
    assert test.query_params.get("pin") == ([depth[1]] if depth else None) or "Microscope" in words(test)
