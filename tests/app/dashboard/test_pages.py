"""Does every page show the numbers of its runs, restore what a link asks for, and say what it cannot show?"""

import json
import re
from io import BytesIO, StringIO

import numpy as np
import pandas as pd
import pytest

from depthscope.app.dashboard.components import exports
from depthscope.app.dashboard.components.chart import numbers_of
from depthscope.app.dashboard.components.controls import CONTROLS
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.pages import PAGES
from depthscope.app.dashboard.state import run_library
from depthscope.app.figures import FIGURES, Selection
from depthscope.app.readings.readings import read_paths
from depthscope.app.tables.differences import difference_map, profiles_of
from depthscope.app.tables.formats import to_csv, to_latex, to_parquet
from depthscope.app.text.bibliography import entries
from depthscope.app.text.numbers import number
from depthscope.diagnostics.errors import InputError
from tests.app.dashboard.opening import charts, numbers, parts, words
from tests.app.hostile_text import TEXTS, mutated

PAGE_NAMES = [page.url_path for page in PAGES]


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_page_opens_on_runs_of_any_kind(page, opened):
    for names in (["plain", "mhc", "blind"], ["nan", "padding"], ["padding"]):
        test = opened(page, runs=names)
        assert not test.error, (names, test.error)
        assert charts(test) or parts(test, "map") or test.info, names
        assert all(len(data["alt"]) > 20 for data in charts(test).values())
        shown = [part.value for part in test.main if part.type in ("code", "markdown")]
        assert not {"None", "`None`"} & set(shown)


PARAMETERS = (
    *("runs", "run", "stream", "depths", "at", "colour", "find", "group", "look", "pin", *CONTROLS),
    *("measure", "sequence", "of_stream", "whose", "token", "strips", "mixing_run", "from_connection"),
    *("to_connection", "trained", "measures", "step", "training_tokens"),
    *("zoom_training", "zoom_microscope", "training_by", "measure_of", "compare_by"),
    *("map_of", "map_less", "similarity", "similar_a", "similar_b", "venue"),
)
VALUES = [
    *({**TEXTS, **mutated(seed=4, count=3)}.values()),
    *(
        "-1",
        "9" * 400,
        "1.5",
        "1e3",
        "inf",
        "nan",
        "1e308,-1e308",
        "1.2.3,4",
        "x,<b>" * 20_000,
        "true",
        "٣",
        "{}",
    ),
    *("..%2f..%2fetc%2fpasswd", "..\\..\\windows\\win.ini", "/etc/passwd", "plain,mhc", "plain\x00"),
]


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_whatever_an_address_asks_for_the_page_opens(page, opened):
    # An address is bytes: a lone surrogate cannot be written in it.
    values = [value.encode("utf-8", "replace").decode() for value in VALUES[PAGE_NAMES.index(page) :: 5]]
    asked = {name: values[number % len(values)] for number, name in enumerate(PARAMETERS)}
    test = opened(page, **asked, **{"embed": "true", "": "x", TEXTS["script"]: "1"})
    assert not test.error
    assert "Traceback" not in words(test)
    test = opened(page, runs=["plain", "gone\u202e", "<b>"])
    said = words(test).replace("`", "")
    assert "Not here" in said
    assert "\u202e" not in said


# --- the microscope


def test_the_map_has_the_norm_of_every_token(opened, residual_run):
    data = charts(opened("microscope", runs="plain", sequence="1", measure="norm ‖x‖"))["microscope"]
    maps = [trace for trace in json.loads(data["figure"])["data"] if trace["type"] == "heatmap"]
    trace = residual_run["trace"].to_dataset()
    expected = np.linalg.norm(trace["residual"].values[:, 1, :, 0], axis=-1).T
    expected[~trace["mask"].values[1]] = np.nan
    shown = numbers(maps[-1].get("customdata", maps[-1]["z"]))
    np.testing.assert_allclose(shown, expected[: len(shown)], rtol=1e-6)
    assert len(data["names"]) == trace.sizes["depth"]


def test_the_text_has_the_numbers_of_the_map_and_shows_what_is_hidden(opened, residual_run):
    (text,) = parts(opened("microscope", runs="<i>named"), "text")
    assert "\\u202e" in text["texts"][0]
    norms = np.linalg.norm(residual_run["trace"]["residual"].values[:, 0, :, 0], axis=-1).T
    values = np.array(text["values"])
    np.testing.assert_allclose(values, norms[: len(values)], rtol=1e-5)


def test_a_link_restores_the_pinned_depth(opened):
    test = opened("microscope", runs="mhc", pin="3")
    (pane,) = parts(test, "pane")
    assert pane["pin"] == 3
    assert "spectrum" in charts(test)


def test_the_browser_has_the_numbers_tokens_and_matrices_of_every_depth(opened, mhc_run):
    test = opened("microscope", runs="mhc", token="0.2")
    (pane,) = parts(test.selectbox(key="whose").set_value("marked").run(), "pane")
    trace = mhc_run["trace"].to_dataset()
    depths = trace.sizes["depth"]
    assert all(len(row["values"]) == len(row["noise"]) == depths for row in pane["numbers"])
    h = trace["h_res"].values[:, 0, 2].astype(np.float64)
    np.testing.assert_allclose([each["h"] for each in pane["matrices"]], h, rtol=1e-5)
    product = np.eye(h.shape[-1])
    for connection, shown in zip(h, pane["products"], strict=True):
        product = connection @ product
        np.testing.assert_allclose(shown["h"], product, rtol=1e-4, atol=1e-9)
        found = np.sort_complex([complex(*each) for each in shown["eigenvalues"]])
        np.testing.assert_allclose(found, np.sort_complex(np.linalg.eigvals(product)), atol=1e-5)
    mask, states = trace["mask"].values, trace["residual"].values.astype(np.float64).mean(axis=3)
    states[:, ~mask] = 0.0
    for x, shown in zip(states, pane["tokens"], strict=True):
        _, sequence, position, size, ratio = shown["tokens"][0]
        norms = np.linalg.norm(x, axis=-1)
        assert norms[sequence, position] == norms.max()
        assert (size, ratio) == (number(norms.max()), number(norms.max() / np.median(norms[mask])))
        assert [tuple(each[1:4]) for each in shown["entries"]] == [
            np.unravel_index(at, x.shape) for at in np.argsort(-np.abs(x), axis=None)[:5]
        ]
    assert pane["token"] == [0, 2]
    (pane,) = parts(test.selectbox(key="whose").set_value("worst").run(), "pane")
    for tokens, shown in zip(
        trace["h_res"].values.astype(np.float64)[:, mask], pane["matrices"], strict=True
    ):
        sums = np.abs([tokens.sum(axis=1), tokens.sum(axis=2)]).max(axis=(0, 2))
        np.testing.assert_allclose(shown["h"], tokens[sums.argmax()], rtol=1e-5)


@pytest.mark.parametrize("wrong", ["99", "99.0", "-1.0", "٣.٣", "9" * 30])
def test_a_depth_or_token_that_there_is_not_is_none(opened, wrong):
    (pane,) = parts(opened("microscope", runs="mhc", pin=wrong, token=wrong), "pane")
    assert 0 <= pane["pin"] < len(pane["names"])
    assert pane["token"] is None


# --- streams


@pytest.mark.parametrize(("a", "b"), [(0, 5), (5, 0), (2, 2)])
def test_the_product_of_any_two_connections(a, b, opened, mhc_run):
    test = opened("streams", runs="mhc", from_connection=str(a), to_connection=str(b))
    h = mhc_run["trace"]["h_res"].values.astype(np.float64)
    first, last = min(a, b), max(a, b)
    product = np.eye(h.shape[-1])
    for connection in range(first, last + 1):
        product = h[connection] @ product
    mask = mhc_run["trace"]["mask"].values
    (bench,) = parts(test, "bench")
    np.testing.assert_allclose(bench["matrices"][0]["h"], product[mask].mean(axis=0), rtol=1e-5)
    drawn = json.loads(charts(test)["h_res_pictures"]["figure"])["data"]
    cells = numbers(next(each for each in drawn if each["type"] == "heatmap")["z"])
    n = h.shape[-1]
    for connection in (first, last):
        start = connection * (n + 3)
        expected = h[connection][mask].mean(axis=0)
        np.testing.assert_allclose(cells[:n, start : start + n], expected, rtol=1e-5)
        np.testing.assert_allclose(cells[:n, start + n + 1], expected.sum(axis=1) - 1, atol=1e-6)


def test_what_a_run_lacks_is_said(opened, monkeypatch):
    assert "has streams to mix" in opened("streams", runs="plain").info[0].value
    monkeypatch.setattr(run_library, "close_up_of", lambda reading: None)
    assert "matrices of single tokens" in words(opened("streams", runs="mhc"))


# --- compare and export


def test_compared_runs_are_tested_once_and_the_command_is_named(opened, monkeypatch):
    names = ["plain", "<i>named"]
    test = opened("compare", runs=names)
    assert any(name.startswith("difference_") for name in charts(test))
    assert any(block.value.startswith("depthscope compare ") for block in test.code)
    monkeypatch.setattr(run_library, "between_runs", None)
    assert charts(opened("compare", runs=names)) == charts(test)


def test_two_runs_have_two_maps_of_similarity(opened, saved_runs):
    shown = charts(opened("compare", runs=["plain", "mhc"]))
    assert {"similarity_a", "similarity_b"} <= set(shown)


def test_the_map_of_differences_has_the_largest_first_and_no_units(saved_runs):
    readings, _ = read_paths([str(saved_runs / "plain.zarr.zip"), str(saved_runs / "mhc.zarr.zip")])
    one, other = readings
    metrics = ["residual_norm", "effective_rank", "composite_gain"]
    view = Selection()
    figure, rows = difference_map({"a": [one], "b": [other]}, metrics, view, axis="depth")
    assert set(rows) == {"residual_norm", "effective_rank"}
    largest = np.nanmax(np.abs(figure.z), axis=1)
    assert largest[0] == largest.max() == figure.limits[1] == -figure.limits[0]
    (first,), (second,) = (profiles_of([reading], "residual_norm", view) for reading in readings)
    a, b = float(first[-1]), float(second[-1])
    assert figure.z[rows.index("residual_norm"), len(figure.x) - 1] == pytest.approx(2 * (b - a) / (b + a))
    same, _ = difference_map({"a": [one, one], "b": [one]}, metrics, view, axis="depth")
    assert np.nanmax(np.abs(same.z)) == 0
    with pytest.raises(InputError, match="no measure along their connections"):
        difference_map({"a": [one], "b": [other]}, metrics, view, axis="connection")


def test_a_figure_for_a_paper_comes_with_the_entries_that_it_cites(opened):
    codes = [block.value for block in opened("compare", runs="plain").code]
    (latex,) = [code for code in codes if "includegraphics" in code]
    (bibtex,) = [code for code in codes if code.startswith("@")]
    (cited,) = re.findall(r"\\citep\{([^}]*)\}", latex)
    assert set(entries(bibtex)) == set(cited.split(","))
    python = [code for code in codes if "import " in code]
    assert [re.findall("(?:import|from) .*", code) for code in python] == [["import depthscope as ds"]] * 2


def test_every_format_has_what_is_shown(saved_runs):
    readings, _ = read_paths([str(saved_runs / "mhc.zarr.zip")])
    figure = FIGURES["cka"].build({"mhc": readings[0].analysis})
    table = exports.measure_table(figure)
    np.testing.assert_array_equal(numbers_of(figure).iloc[:, 2:], figure.z)  # under the figure
    parquet = pd.read_parquet(BytesIO(to_parquet(table)))
    np.testing.assert_allclose(parquet.iloc[:, 2:].to_numpy(float), figure.z)
    saved = pd.read_csv(StringIO(to_csv(table)))
    np.testing.assert_allclose(saved.iloc[:, 2:].to_numpy(float), figure.z)
    assert to_latex(table, {}).count(r"\\") >= len(figure.y)


def test_the_python_gives_the_numbers_that_are_shown(opened, capsys):
    test = opened("compare", runs="mhc", scope="data")
    drawn = json.loads(charts(test)["effective_rank"]["figure"])["data"]
    (shown,) = [trace for trace in drawn if trace.get("mode") == "lines+markers"]
    codes = [block.value for block in test.code]
    python = next(code for code in codes if code.startswith("import") and "print(" in code)
    exec(compile(python, "shown", "exec"), {})
    made = pd.read_csv(StringIO(capsys.readouterr().out))
    np.testing.assert_allclose(made.loc[made["role"] == "measured", "y"], numbers(shown["y"]))


def test_the_facts_of_the_runs_end_the_page(opened, mhc_run):
    facts = json.loads(opened("compare", runs="mhc").json[-1].value)
    assert facts["model"] == mhc_run.attrs["model"]


# --- numbers and words


def test_text_from_a_run_is_never_markdown():
    assert escaped("[x](y) :material/home: $x$ <b> &amp;") == (
        r"\[x\]\(y\) \:material\/home\: \$x\$ \<b\> \&amp\;"
    )
    # Streamlit looks for addresses in what Markdown has read, escaped or not; it leaves code alone.
    assert escaped("[x](http://evil) www.a.b `a@b.c") == "`[x](http://evil)` `www.a.b` `` `a@b.c ``"
