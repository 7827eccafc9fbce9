"""Findings, descriptions and metrics show themselves in a notebook: as HTML without a network, nothing outside of one."""

import subprocess
import sys
from dataclasses import replace

import pytest
import xarray as xr

import depthscope as ds
from depthscope.app.text.cards import card_of
from depthscope.app.text.notebook import _metric_html, show_in_notebooks
from depthscope.diagnostics import analyze, judge
from depthscope.diagnostics.verdicts import Findings


@pytest.fixture
def formatter():
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactive.InteractiveShell.instance()
    show_in_notebooks()
    yield shell.display_formatter.formatters["text/html"]
    interactive.InteractiveShell.clear_instance()


def test_findings_are_cards_with_everything_escaped(formatter, mhc_run):
    findings = judge(analyze(mhc_run))
    shown = formatter(findings)
    assert shown.count('class="card') == len(findings)
    assert "Where" in shown
    assert "Next" in shown
    hostile = replace(findings[0], sentence="<script>alert(1)</script>", advice="<img src=http://a.example>")
    one = formatter(hostile)
    assert "<script" not in one
    assert "<img" not in one
    assert "src=" not in shown
    assert "href=" not in shown


def test_no_finding_says_so(formatter):
    assert "Nothing found" in formatter(Findings())
    assert repr(Findings()) == "nothing found"


def test_a_metric_shows_its_equation(formatter):
    shown = formatter(ds.CATALOGUE["effective_rank"])
    assert "effective rank" in shown.lower()
    assert 'display="block"' in shown
    assert "\\exp" not in shown


@pytest.mark.parametrize("name", ds.CATALOGUE)
def test_every_equation_can_be_rendered(name):
    assert "<pre>" not in _metric_html(ds.CATALOGUE[name])


def test_findings_print_one_line_each(mhc_run):
    findings = judge(analyze(mhc_run))
    assert repr(findings).count("\n") == len(findings) - 1
    assert isinstance(findings, list)


def test_without_ipython_nothing_is_imported_for_it():
    code = "import sys, depthscope; assert 'markupsafe' not in sys.modules and 'IPython' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_a_card_and_no_tree(formatter, mhc_run):
    shown = formatter(mhc_run)
    assert len(shown) < 10_000
    assert mhc_run.attrs["model"] in shown
    assert "proven" in shown or mhc_run.attrs.get("proof") is None
    assert "Findings" not in shown
    analysis = analyze(mhc_run)
    measured = mhc_run.assign({"metrics": xr.DataTree(analysis)})
    (worst, *others) = judge(analysis)
    assert f"{card_of(worst).title.rstrip('.')} ({card_of(worst).where})" in formatter(measured)
    assert (f"; {len(others) - 1} more" in formatter(measured)) == (len(others) > 1)
    hostile = mhc_run.copy()
    hostile.attrs["model"] = "<script>alert(1)</script>"
    assert "<script" not in formatter(hostile)
    other = xr.DataTree.from_dict({"/": xr.Dataset({"a": ("x", [1.0])})})
    assert "xr-section" in formatter(other)


def test_a_figure_is_a_picture_and_completion_lists_figures_alone(formatter, mhc_run):
    from IPython.core.interactiveshell import InteractiveShell

    figure = ds.figures.measure("effective_rank", mhc_run)
    png = InteractiveShell.instance().display_formatter.formatters["image/png"](figure)
    assert png.startswith(b"\x89PNG")
    assert {"collapse", "measure"} <= set(dir(ds.figures))
    assert not {"np", "xr", "replace"} & set(dir(ds.figures))
