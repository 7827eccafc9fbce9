"""The paper export: whole, repeatable, TrueType, sourced, and never over somebody else's files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from depthscope.app.drawing.matplotlib import WIDTHS, to_matplotlib, to_svg, write_figure
from depthscope.app.drawing.matplotlib.matrices import edges
from depthscope.app.figures import Heatmap, Line, Lines, Selection
from depthscope.app.paper.export import figure_csv, write_bundle
from depthscope.app.text.bibliography import cut, entries, keys_of

X = np.arange(8.0)
CURVES = Lines(
    name="curves",
    title="Curves",
    x_label="depth",
    y_label="gain",
    lines=(
        Line(X, np.exp(X), "a", lower=np.exp(X) * 0.9, upper=np.exp(X) * 1.1, group="a"),
        Line(X, np.full(8, 3.0), "a · null", role="null", group="a"),
        Line(X, np.where(X == 2, np.nan, X + 1), "cost $5_a", group="b"),
        Line(X[[0, -1]], np.full(2, 10.0), "warn: 10", role="threshold"),
        Line(X[[0, -1]], np.full(2, 1e9), "far: 1e9", role="threshold"),
    ),
    log_y=True,
    healthy=(0.5, 10.0),
)
MAP = Heatmap("map", "Map", X, X[:5], np.outer(X[:5], X) - 9.0, "x", "y", "z", diverging=True)


@pytest.fixture(scope="module")
def runs(make_run):
    return {"plain": make_run("residual", layers=2), "m_1": make_run("mhc", layers=2)}


@pytest.fixture(scope="module")
def bundle(runs, tmp_path_factory):
    return write_bundle(runs, tmp_path_factory.mktemp("export") / "paper")


@pytest.fixture
def few_figures(monkeypatch):
    """Two figures instead of sixty, where the folder is what matters."""
    from depthscope.app.paper import contents

    draw = contents.draw_all
    monkeypatch.setattr(contents, "draw_all", lambda readings, view: draw(readings, view)[:2])


def _hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- figures


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("figure", [CURVES, MAP], ids=["curves", "map"])
def test_figures_have_the_width_of_the_venue(figure, width):
    assert to_matplotlib(figure, width=width).get_size_inches()[0] == WIDTHS[width].inches


def test_curves_draw_the_numbers_of_the_specification():
    axes = to_matplotlib(CURVES).axes[0]
    drawn = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_array_equal(drawn["a"].get_ydata(), CURVES.lines[0].y)
    np.testing.assert_array_equal(
        drawn[r"cost \$5_a"].get_ydata() if r"cost \$5_a" in drawn else drawn["cost $5_a"].get_ydata(),
        CURVES.lines[2].y,
    )
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] < 1e6  # a far threshold does not flatten the curves


def test_null_is_dashed_in_the_colour_of_its_run():
    lines = to_matplotlib(CURVES).axes[0].get_lines()
    assert lines[1].get_color() == lines[0].get_color() != lines[2].get_color()
    assert lines[1].get_linestyle() == "--"


def test_a_law_has_its_own_dashes_and_entry_and_does_not_stretch_the_axis():
    law = Line(X, np.exp(9 * X), "a · law", role="theory", group="a", law="law of growth")
    figure = replace(CURVES, lines=(CURVES.lines[0], law, *CURVES.lines[1:3]))
    canvas = to_matplotlib(figure)
    axes = canvas.axes[0]
    drawn = {tuple(line.get_ydata()): line for line in axes.get_lines()}
    measured, beside = drawn[tuple(CURVES.lines[0].y)], drawn[tuple(law.y)]
    assert beside.get_color() == measured.get_color()
    assert beside.get_linestyle() == "--"
    assert axes.get_ylim()[1] == pytest.approx(10 * np.exp(7), rel=0.2)
    legends = [axes.get_legend(), *canvas.legends]
    words = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
    assert words.count("law of growth") == 1


def test_map_draws_the_numbers_and_centres_zero():
    mesh = to_matplotlib(MAP).axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_array(), MAP.z)
    assert mesh.norm.vmin == -mesh.norm.vmax


def test_dense_maps_are_rasterised_inside_the_vector_file(tmp_path):
    size = np.arange(60.0)
    dense = Heatmap("dense", "D", size, size, np.add.outer(size, size), "x", "y", "z")
    write_figure(dense, tmp_path / "d.pdf", tmp_path / "d.svg")
    assert b"/Subtype /Image" in (tmp_path / "d.pdf").read_bytes()
    assert (tmp_path / "d.svg").read_text().count("<path") < 500


def test_matplotlib_settings_are_left_alone(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    write_figure(CURVES, tmp_path / "c.pdf", tmp_path / "c.svg", width="neurips")
    assert dict(mpl.rcParams) == before


def test_empty_and_single_values_are_drawn(tmp_path):
    nothing = Lines("n", "N", "x", "y", (Line(X, np.full(8, np.nan), "a"),), log_y=True)
    one = Heatmap("o", "O", np.array([3.0]), np.array([0.0]), np.array([[np.nan]]), "x", "y", "z", log_z=True)
    write_figure(nothing, tmp_path / "n.pdf")
    write_figure(one, tmp_path / "o.pdf")
    assert edges(np.array([3.0])).tolist() == [2.5, 3.5]


def test_many_runs_keep_the_axes_visible(tmp_path):
    lines = tuple(Line(X, X + k, f"run number {k} of twelve", group=str(k)) for k in range(12))
    canvas = to_matplotlib(Lines("m", "M", "x", "y", lines))
    canvas.draw_without_rendering()
    assert canvas.axes[0].get_position().height * canvas.get_size_inches()[1] > 1.0  # inches


def test_svg_ids_carry_the_name_of_the_figure():
    text = to_svg(CURVES)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert ids
    assert all(name.startswith("curves-") for name in ids)
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)


@pytest.mark.parametrize("bad", [{"width": "a4"}, {"path": "f.gif"}])
def test_unknown_width_or_format_is_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        write_figure(CURVES, tmp_path / bad.get("path", "f.pdf"), width=bad.get("width", "icml"))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_pgf_is_written_on_request(tmp_path):
    write_figure(replace(CURVES, y_label="log₁₀ σ₁ of H_res on 1⊥ ‖x‖"), tmp_path / "c.pgf")
    assert r"\begin{pgfpicture}" in (tmp_path / "c.pgf").read_text()


def test_pgf_without_latex_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="need pdflatex"):
        write_figure(CURVES, tmp_path / "c.pgf")


# --- the folder


def test_bundle_is_whole_and_hashed(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = _hashes(bundle)
    files.pop("manifest.json")
    assert manifest["files"] == files
    assert manifest["runs"]["m_1"]["family"] == "mhc"
    assert manifest["runs"]["plain"]["data_digest"] == "synthetic"
    assert {"depthscope", "numpy", "matplotlib"} <= set(manifest["software"])
    for name in manifest["figures"]:
        assert {f"figures/{name}.pdf", f"figures/{name}.svg", f"data/{name}.csv"} <= set(files)
    assert {f"tables/summary.{ending}" for ending in ("tex", "csv", "md")} <= set(files)


def test_rerun_gives_identical_bytes(runs, tmp_path, monkeypatch):
    from depthscope.app.paper import contents

    draw = contents.draw_all
    monkeypatch.setattr(contents, "draw_all", lambda readings, view: draw(readings, view)[::8])
    first, again = (_hashes(write_bundle(runs, tmp_path / name)) for name in ("first", "again"))
    assert first == again
    assert sum(name.endswith(".pdf") for name in first) >= 5


@pytest.mark.skipif(shutil.which("pdffonts") is None, reason="needs poppler's pdffonts")
def test_no_type_3_fonts(bundle):
    for path in (bundle / "figures").glob("*.pdf"):
        fonts = subprocess.run(["pdffonts", path], capture_output=True, text=True, check=True).stdout
        assert "TrueType" in fonts
        assert "Type 3" not in fonts


def test_bibliography_holds_exactly_what_is_cited(bundle):
    written = set(entries((bundle / "metrics.bib").read_text()))
    text = "".join(path.read_text() for path in [*bundle.glob("*.tex"), *bundle.glob("tables/*.tex")])
    cited = {key for group in re.findall(r"\\cite\{([^}]+)\}", text) for key in group.split(",")}
    assert cited <= written
    from depthscope.diagnostics import CATALOGUE

    figures = json.loads((bundle / "manifest.json").read_text())["figures"].values()
    expected = keys_of(
        CATALOGUE[figure["metric"]].cite for figure in figures if figure["metric"] in CATALOGUE
    )
    assert set(expected) <= written


def test_runs_of_other_depth_share_a_relative_axis(bundle):
    assert json.loads((bundle / "manifest.json").read_text())["selection"]["axis"] == "relative"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
@pytest.mark.slow
def test_document_compiles(bundle, tmp_path):
    place = shutil.copytree(bundle, tmp_path / "paper")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert (place / "main.pdf").stat().st_size > 10_000


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
@pytest.mark.usefixtures("few_figures")
def test_a_name_that_looks_like_latex_is_text(runs, tmp_path):
    hostile = r"\input{/etc/passwd} << 6 * 7 >> 50% a&b_c^d~e #1 $x$ \end{document}"
    out = write_bundle({hostile: runs["plain"]}, tmp_path / "paper")
    texts = {path.name: path.read_text() for path in out.rglob("*.tex")}
    assert not any(r"\input{/etc" in text for text in texts.values())
    assert r"\textbackslash{}input\{/etc/passwd\}" in texts["summary.tex"]
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_foreign_folder_is_refused_and_untouched(runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="did not write"):
        write_bundle(runs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("few_figures")
def test_a_rerun_keeps_files_of_others(runs, tmp_path):
    one = {"plain": runs["plain"]}
    out = write_bundle(one, tmp_path / "paper")
    (out / "figures" / "mine.pdf").write_bytes(b"mine")
    (out / "main.aux").write_text("latex")
    write_bundle(one, out)
    assert (out / "figures" / "mine.pdf").read_bytes() == b"mine"
    assert (out / "main.aux").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["paper"]


@pytest.mark.usefixtures("few_figures")
def test_edited_files_are_not_overwritten(runs, tmp_path):
    one = {"plain": runs["plain"]}
    out = write_bundle(one, tmp_path / "paper")
    (out / "main.tex").write_text("edited by hand")
    with pytest.raises(ValueError, match="was edited"):
        write_bundle(one, out)
    assert (out / "main.tex").read_text() == "edited by hand"


def test_a_failed_export_leaves_nothing(runs, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("depthscope.app.paper.export.write_figure", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bundle(runs, tmp_path / "paper")
    assert os.listdir(tmp_path) == []


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run was given"):
        write_bundle({}, tmp_path / "paper")


def test_csv_holds_the_numbers_drawn():
    lines = figure_csv(CURVES).splitlines()
    assert lines[0] == "line,role,x,y,lower,upper"
    assert len(lines) == 1 + sum(len(line.x) for line in CURVES.lines)
    matrix = figure_csv(MAP).splitlines()
    assert len(matrix) == 1 + len(MAP.y)
    assert [float(cell) for cell in matrix[2].split(",")[1:]] == MAP.z[1].tolist()


@pytest.mark.usefixtures("few_figures")
def test_selection_reaches_figures_and_tables(runs, tmp_path):
    one = {"plain": runs["plain"]}
    out = write_bundle(one, tmp_path / "paper", view=Selection(scope="data", tokens="ordinary"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["selection"]["scope"] == "data"
    table = (out / "tables" / "summary.md").read_text()
    assert "massive" in table
    assert "massive" in manifest["figures"]["effective_rank"]["caption"]


# --- sources


def test_every_metric_and_verdict_has_its_entry():
    from depthscope.diagnostics import CATALOGUE

    known = set(entries(cut(keys_of(metric.cite for metric in CATALOGUE.values()))))
    assert known
    assert all(keys_of([metric.cite]) for metric in CATALOGUE.values() if metric.cite != "heuristic")


def test_missing_entry_and_torn_bibtex_are_refused():
    with pytest.raises(ValueError, match="lacks nobody2020"):
        cut(["nobody2020"])
    with pytest.raises(ValueError, match="never closes"):
        entries("@book{a2020, title={open}")
