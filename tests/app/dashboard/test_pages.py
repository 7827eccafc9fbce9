"""Does every page show what its runs contain, and does a bad run explain itself?"""

import base64
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from streamlit.testing.v1 import AppTest

from depthscope.app.dashboard.components.figure_numbers import numbers_of
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.run_facts import facts_table
from depthscope.app.dashboard.pages import PAGES
from depthscope.app.dashboard.server import CONFIG, free_port, launch
from depthscope.app.dashboard.state import run_library
from depthscope.app.figures import FIGURES, available
from depthscope.app.readings.readings import read_runs
from depthscope.app.text.bibliography import source_words
from depthscope.app.text.numbers import number
from depthscope.diagnostics import analyze, create_run, save_run, schema
from tests.app.dashboard.opening import ENTRY, charts, open_page, words


@pytest.fixture(scope="module")
def runs(tmp_path_factory, residual_run, mhc_run, make_run) -> Path:
    root = tmp_path_factory.mktemp("runs")
    save_run(residual_run, root / "plain.zarr.zip")
    save_run(mhc_run, root / "mhc.zarr.zip")
    save_run(make_run("residual", layers=3, gradients=False), root / "blind.zarr")
    return root


@pytest.fixture
def opened(runs, monkeypatch):
    """Open one page on some files."""
    monkeypatch.setattr(run_library, "_roots", [])

    def opened_page(page: str, *names: str, **parameters: str) -> AppTest:
        return open_page(page, [runs / name for name in names] or [runs], **parameters)

    return opened_page


@pytest.mark.parametrize("page", [page.url_path for page in PAGES])
@pytest.mark.parametrize("names", [("plain.zarr.zip",), ("plain.zarr.zip", "mhc.zarr.zip", "blind.zarr")])
def test_every_page_opens_on_runs_of_any_kind(page, names, opened):
    test = opened(page, *names)
    shown = charts(test)
    # A history needs several steps, and these runs have one; streams have to be there to be mixed.
    assert bool(shown) == (page != "training" and (page != "mixing" or "mhc.zarr.zip" in names))
    for data in shown.values():
        assert len(data["alt"]) > 20
    assert not [
        part for part in test.main if part.type in ("code", "markdown") and part.value in ("None", "`None`")
    ]


def test_a_chart_contains_the_numbers_of_the_analysis(opened, mhc_run):
    data = charts(opened("mixing", "mhc.zarr.zip", part="Streams"))["deflated_gain"]
    traces = json.loads(data["figure"])["data"]
    (sent,) = [t for t in traces if t.get("name") == "mhc"]
    values = np.frombuffer(base64.b64decode(sent["y"]["bdata"]), dtype=sent["y"]["dtype"])
    expected = analyze(mhc_run)["deflated_gain"].isel(step=-1).sel(reduction="mean")
    np.testing.assert_allclose(values, expected)


def test_the_overview_begins_with_the_verdict_and_ends_with_the_facts(monkeypatch, tmp_path, mhc_run):
    trace = mhc_run["trace"].to_dataset().load()
    copies = trace["residual"].isel(stream=[0]).values.repeat(trace.sizes["stream"], axis=3)
    copied = create_run(trace.assign(residual=trace["residual"].copy(data=copies)), attrs=mhc_run.attrs)
    save_run(copied, tmp_path / "copies.zarr.zip")
    monkeypatch.setattr(run_library, "_roots", [])
    test = open_page("", [tmp_path / "copies.zarr.zip"])
    said = words(test)
    assert "The streams are still copies of one another deep in the network." in said
    assert "1 − cosine of any two of them is" in said
    assert "below 1e-9 (depthscope's default)" in said
    assert all(f"{label}:" in said for label in ("Where", "Why", "Next"))
    facts = test.table[0].value
    assert facts.loc["Model"].iloc[0].replace("\\", "") == mhc_run.attrs["model"]
    assert "rebuilt to 1e-7" in facts.loc["Reconstruction proof"].iloc[0].replace("\\", "")
    assert facts.loc["Tokens analysed"].iloc[0] == "28"


def test_a_page_that_nothing_feeds_explains_why_and_what_to_do(opened):
    mixing = words(opened("mixing", "plain.zarr.zip"))
    assert "has streams to mix" in mixing
    assert "depthscope demo" in mixing
    gradients = words(opened("gradients", "blind.zarr"))
    assert "None of the chosen runs has gradients" in gradients
    assert "--gradients" in gradients


def test_the_url_restores_the_choices(opened):
    test = opened("similarity", runs="mhc", estimator="biased", a="2", b="7")
    assert test.multiselect(key="runs").value == ["mhc"]
    assert [field.value for field in test.number_input] == [2, 7]
    assert "Depth 2 against depth 7" in words(test)
    ring = json.loads(charts(test)["cka"]["figure"])["layout"]["shapes"][0]
    assert (ring["x0"], ring["y0"]) == (6.5, 1.5)


def test_a_depth_that_a_shallower_run_lacks_is_brought_into_it(opened):
    test = opened("similarity", runs="blind", a="1", b="9")
    assert [field.value for field in test.number_input] == [1, 3]


def test_a_control_changes_the_chart(opened):
    test = opened("collapse", "plain.zarr.zip")
    before = charts(test)["effective_rank"]["figure"]
    test.segmented_control(key="scope").set_value("data").run()
    assert not test.exception
    assert charts(test)["effective_rank"]["figure"] != before


@pytest.mark.parametrize("question", ["collapse", "mixing", "gradients"])
def test_the_parts_of_a_page_show_every_figure_that_the_run_feeds_once(question, opened, mhc_run):
    fed = {
        name: kind for name, kind in available({"a": analyze(mhc_run)}).items() if kind.question == question
    }
    for part in dict.fromkeys(kind.section for kind in fed.values()):
        expected = {name for name, kind in fed.items() if kind.section == part}
        assert set(charts(opened(question, "mhc.zarr.zip", part=part))) == expected


def test_a_part_of_another_page_opens_the_first_one(opened):
    assert "gradient_norm" in charts(opened("gradients", "mhc.zarr.zip", part="Paths"))


def test_what_costs_more_is_computed_when_it_is_asked_for_and_kept(opened, runs, residual_run):
    test = opened("similarity", "plain.zarr.zip", measure_b="CKNNA")
    before = {path: path.stat().st_mtime_ns for path in runs.glob("plain.zarr.zip")}
    (button,) = [each for each in test.button if each.key == "request_right_compute"]
    button.click().run()
    assert not test.exception
    assert not test.error
    assert "cknna" in charts(test)
    assert before == {path: path.stat().st_mtime_ns for path in runs.glob("plain.zarr.zip")}
    run_library._cache.clear()
    (kept,) = run_library.read_run("plain")
    expected = analyze(residual_run, metrics="cknna")
    np.testing.assert_allclose(kept.analysis["cknna"].values, expected["cknna"].values)
    assert "cknna" not in kept.analysis.attrs["on_request"]


def test_depths_of_spectra_can_be_chosen(runs, opened, whole_run, whole):
    nodes = {"/trace": whole_run["plain"]["trace"].to_dataset(), "/metrics": whole["plain"]}
    run = xr.DataTree.from_dict({"/": xr.Dataset(attrs=whole_run["plain"].attrs), **nodes})
    save_run(run, runs.parent / "whole.zarr.zip")
    test = opened("collapse", "../whole.zarr.zip", part="Spectrum")
    assert "depth 4" in charts(test)["spectrum"]["alt"]
    test.multiselect(key="depths").set_value([1, 2]).run()
    assert not test.exception
    alt = charts(test)["spectral_density"]["alt"]
    assert "depth 1" in alt
    assert "depth 4" not in alt


def test_heat_maps_follow_the_chosen_run(opened):
    test = opened("similarity")
    assert "of blind" in charts(test)["cka"]["alt"]
    test.selectbox(key="run").set_value("mhc").run()
    assert "of mhc" in charts(test)["cka"]["alt"]


def broken(path: Path) -> None:
    path.write_bytes(b"nonsense")


def put(tree: xr.DataTree, path: Path) -> None:
    schema.write_zip(tree, path)


def newer(path: Path) -> None:
    put(xr.DataTree.from_dict({"/": xr.Dataset(attrs={"schema_version": "9.0"})}), path)


def foreign(path: Path) -> None:
    put(xr.DataTree(xr.Dataset({"a": ("x", [1.0])})), path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (broken, "cannot be read"),
        (newer, "read it with a newer depthscope"),
        (foreign, "not a depthscope run"),
    ],
)
def test_a_bad_run_explains_itself_and_leaves_the_good_ones(
    spoil, reason, opened, tmp_path, runs, monkeypatch
):
    spoil(tmp_path / "bad.zarr.zip")
    shutil.copy(runs / "plain.zarr.zip", tmp_path / "good.zarr.zip")
    run_library.allow([tmp_path])
    monkeypatch.setattr(run_library, "allow", lambda paths: None)
    monkeypatch.setattr(run_library, "_roots", [tmp_path.resolve()])
    test = AppTest.from_file(str(ENTRY), default_timeout=120).run()
    assert not test.exception
    said = words(test)
    assert "bad cannot be shown" in said
    assert reason in said
    assert "depthscope probe" in said
    assert "effective_rank" in charts(test)


def test_an_empty_folder_gives_the_next_command(monkeypatch, tmp_path):
    monkeypatch.setattr(run_library, "_roots", [tmp_path])
    test = AppTest.from_file(str(ENTRY), default_timeout=60).run()
    assert not test.exception
    assert "no run here yet" in words(test)
    assert "depthscope demo" in words(test)


def test_the_chains_of_a_run_are_shown_together(monkeypatch, tmp_path, make_run):
    parts = {"encoder": make_run("residual", layers=2), "decoder": make_run("residual", layers=3)}
    traces = {name: run["trace"].to_dataset() for name, run in parts.items()}
    save_run(create_run(traces, attrs=dict(parts["encoder"].attrs)), tmp_path / "two.zarr.zip")
    monkeypatch.setattr(run_library, "_roots", [tmp_path.resolve()])
    test = AppTest.from_file(str(ENTRY), default_timeout=120).run()
    assert not test.exception
    assert "two/encoder:" in charts(test)["effective_rank"]["alt"]
    assert "two/decoder:" in charts(test)["effective_rank"]["alt"]


# --- the library ---


def test_only_what_lies_below_the_roots_is_listed(monkeypatch, tmp_path, runs):
    inside = tmp_path / "inside"
    inside.mkdir()
    shutil.copy(runs / "plain.zarr.zip", inside / "a.zarr.zip")
    (inside / "link.zarr.zip").symlink_to(runs / "mhc.zarr.zip")
    monkeypatch.setattr(run_library, "_roots", [inside.resolve()])
    assert list(run_library.list_runs()) == ["a"]
    outside = run_library.read_run("../../etc/passwd")
    assert isinstance(outside, run_library.UnreadableRun)
    assert "not below the paths" in outside.reason


def test_runs_of_the_same_name_get_distinct_names(monkeypatch, tmp_path, runs):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(runs / "plain.zarr.zip", tmp_path / folder / "a.zarr.zip")
    monkeypatch.setattr(
        run_library, "_roots", [tmp_path / "one" / "a.zarr.zip", tmp_path / "two" / "a.zarr.zip"]
    )
    assert list(run_library.list_runs()) == ["a", "two/a"]


def test_a_run_is_analysed_again_only_when_its_file_changes(monkeypatch, tmp_path, runs, make_run):
    shutil.copy(runs / "plain.zarr.zip", tmp_path / "a.zarr.zip")
    monkeypatch.setattr(run_library, "_roots", [tmp_path.resolve()])
    first = run_library.read_run("a")
    assert run_library.read_run("a") is first
    save_run(make_run("residual", layers=2), tmp_path / "a.zarr.zip", force=True)
    second = run_library.read_run("a")
    assert second is not first
    assert second[0].analysis.sizes["depth"] == 3


# --- numbers and words ---


def test_the_table_contains_every_number_of_a_figure(residual_run):
    analysis = analyze(residual_run)
    lines = FIGURES["effective_rank"].build({"a": analysis})
    table = numbers_of(lines)
    assert len(table) == sum(len(line.x) for line in lines.lines)
    np.testing.assert_array_equal(table.loc[table["role"] == "measured", lines.y_label], lines.lines[0].y)
    cells = numbers_of(FIGURES["cka"].build({"a": analysis}))
    np.testing.assert_array_equal(
        cells.iloc[:, 2:], analysis["cka"].isel(step=-1).sel(estimator="unbiased", tokens="all")
    )


def test_the_rank_among_the_facts_says_its_scope(residual_run):
    (reading,) = read_runs({"plain": residual_run})
    fact = facts_table([reading]).loc["Effective rank of the last state", "plain"]
    rank = reading.analysis["effective_rank"].isel(step=-1, depth=-1)
    pooled = rank.sel(scope="data", tokens="all", centering="raw", stream="mean")
    assert fact.replace("\\", "").startswith(number(float(pooled)))  # escaped for Markdown
    assert "all sequences pooled" in fact


def test_text_from_a_run_is_never_markdown():
    assert escaped("[x](y) :material/home: $x$ <b> &amp;") == (
        r"\[x\]\(y\) \:material\/home\: \$x\$ \<b\> \&amp\;"
    )
    # Streamlit looks for addresses in what Markdown has read, escaped or not; it leaves code alone.
    assert escaped("[x](http://evil) www.a.b `a@b.c") == "`[x](http://evil)` `www.a.b` `` `a@b.c ``"


def test_sources_are_cited_by_author_and_year():
    assert source_words("roy2007effective") == "Roy & Vetterli 2007"
    assert source_words("xie2025mhc") == "Xie et al. 2025"
    assert source_words("this project") == "this project"


# --- the launch ---


def test_the_server_is_local_and_silent():
    assert CONFIG["server.address"] == "127.0.0.1"
    assert CONFIG["server.allowedHosts"] == ["localhost", "127.0.0.1"]
    assert CONFIG["browser.gatherUsageStats"] is False
    assert CONFIG["server.fileWatcherType"] == "none"
    assert not {"server.enableCORS", "server.enableXsrfProtection"} & set(CONFIG)


def test_the_dashboard_needs_no_torch():
    package = "depthscope.app.dashboard"
    code = (
        f"import sys, {package}.server, {package}.state.chosen_runs, {package}.components.page; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_taken_port_is_refused_and_a_free_one_is_found():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken"):
            free_port(port)
    assert free_port(port) == port
    assert free_port() >= 8501


def test_a_launch_without_runs_or_on_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run was given"):
        launch([])
    with pytest.raises(FileNotFoundError, match="absent does not exist; make a run with"):
        launch([tmp_path / "absent"])
