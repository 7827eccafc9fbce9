"""The paper export: whole, repeatable, TrueType, sourced, and never over somebody else's files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest

from depthscope.app.figures import Selection
from depthscope.app.paper.export import figure_csv, write_bundle
from depthscope.app.text.bibliography import cut, entries, keys_of
from tests.app.example_figures import CURVES, MAP
from tests.few_figures import draw_few

# Two that these runs feed and one that they do not; the article of `test_articles` has all of them.
COMPOSED = ("collapse", "gains", "training")


@pytest.fixture(scope="module")
def runs(make_run):
    return {"plain": make_run("residual", layers=2), "m_1": make_run("mhc", layers=2)}


@pytest.fixture(scope="module")
def bundle(runs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        draw_few(patch, every=20, composed=COMPOSED)
        return write_bundle(runs, tmp_path_factory.mktemp("export") / "paper")


def _hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- the folder


def test_bundle_is_whole_and_hashed(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = _hashes(bundle)
    files.pop("manifest.json")
    assert manifest["files"] == files
    assert manifest["runs"]["m_1"]["attributes"]["family"] == "mhc"
    assert manifest["runs"]["plain"]["attributes"]["data_digest"] == "synthetic"
    assert {"depthscope", "numpy", "matplotlib"} <= set(manifest["software"])
    # The gains of an exactly doubly stochastic matrix are a level, which is said and not drawn.
    assert set(manifest["figures"]) == {"collapse"}
    assert "it is 1.00" in manifest["left_out"]["gains"]["composite, forward"]
    assert "Gains of the stream mixing: composite, forward" in (bundle / "methods.txt").read_text()
    assert "ds.record" in manifest["left_out"]["training"]["training loss"]
    for name, figure in manifest["figures"].items():
        expected = {f"figures/{name}.pdf", f"figures/{name}.svg"}
        assert expected | {f"data/{name}_{key}.csv" for key in figure["panels"]} <= set(files)
    assert {f"data/{name}.csv" for name in manifest["data"]} <= set(files)
    assert {f"tables/summary.{ending}" for ending in ("tex", "csv", "parquet")} <= set(files)


def test_the_methods_tell_settings_and_definitions_in_words(bundle):
    text = (bundle / "methods.txt").read_text()
    assert "2 runs with depthscope" in text
    assert "4 residual streams" in text
    assert "(Roy & Vetterli 2007)" in text
    assert r"\citep{roy2007effective}" in (bundle / "methods.tex").read_text()


def test_parquet_has_the_numbers_of_the_csv(bundle):
    written = pd.read_parquet(bundle / "tables" / "summary.parquet")
    expected = pd.read_csv(bundle / "tables" / "summary.csv")
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)


@pytest.mark.skipif(shutil.which("pdffonts") is None, reason="needs poppler's pdffonts")
def test_no_type_3_fonts(bundle):
    for path in bundle.glob("figures/*.pdf"):
        fonts = subprocess.run(["pdffonts", path], capture_output=True, text=True, check=True).stdout
        assert "TrueType" in fonts
        assert "Type 3" not in fonts


def test_bibliography_holds_exactly_what_is_cited(bundle):
    written = set(entries((bundle / "metrics.bib").read_text()))
    text = "".join(path.read_text() for path in bundle.rglob("*.tex"))
    assert {key for group in re.findall(r"\\citep\{([^}]+)\}", text) for key in group.split(",")} == written
    from depthscope.diagnostics import CATALOGUE

    figures = json.loads((bundle / "manifest.json").read_text())["figures"].values()
    shown = [
        CATALOGUE[metric].cite for figure in figures for metric in figure["metrics"] if metric in CATALOGUE
    ]
    assert set(keys_of(shown)) <= written


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_folder_of_somebody_else_is_refused_and_untouched(runs, tmp_path):
    refused = "is not a folder that depthscope export wrote"
    (tmp_path / "thesis.tex").write_text("mine")
    for force, said in ((False, "has files in it"), (True, refused)):
        with pytest.raises(ValueError, match=said):
            write_bundle(runs, tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    foreign, piped = tmp_path / "foreign", tmp_path / "piped"
    foreign.mkdir()
    piped.mkdir()
    (foreign / "manifest.json").write_text('{"made_by": "another export", "files": {}}')
    os.mkfifo(piped / "manifest.json")  # which would be waited for
    for folder in (foreign, piped):
        with pytest.raises(ValueError, match=refused):
            write_bundle({"plain": runs["plain"]}, folder, force=True)
    assert "another export" in (foreign / "manifest.json").read_text()


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
    table = (out / "tables" / "summary.tex").read_text()
    assert "massive" in table
    assert "massive" in manifest["data"]["effective_rank"]["caption"]


# --- sources


def test_missing_entry_and_torn_bibtex_are_refused():
    with pytest.raises(ValueError, match="lacks nobody2020"):
        cut(["nobody2020"])
    with pytest.raises(ValueError, match="never closes"):
        entries("@book{a2020, title={open}")
