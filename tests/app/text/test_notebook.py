"""Findings, descriptions and metrics show themselves in a notebook: as HTML without a network, nothing outside of one."""

import subprocess
import sys
from dataclasses import replace

import pytest

import depthscope as ds
from depthscope.app.text.notebook import show_in_notebooks
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


def test_without_ipython_nothing_is_imported_for_it():
    code = "import sys, depthscope; assert 'markupsafe' not in sys.modules and 'IPython' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_figure_is_a_picture_and_completion_lists_figures_alone(formatter, mhc_run):
    from IPython.core.interactiveshell import InteractiveShell

    figure = ds.figures.measure("effective_rank", mhc_run)
    png = InteractiveShell.instance().display_formatter.formatters["image/png"](figure)
    assert png.startswith(b"\x89PNG")
    assert {"collapse", "measure"} <= set(dir(ds.figures))
    assert not {"np", "xr", "replace"} & set(dir(ds.figures))
