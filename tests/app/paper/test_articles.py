"""The sample article compiles with names of every kind: no lost float, nothing beyond the margin, at most 12 pages."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from depthscope.app.figures.composed import QUESTIONS
from depthscope.app.paper.export import write_bundle
from tests.app.paper.articles import problems_of, runs_of
from tests.few_figures import draw_few


@pytest.mark.parametrize(("venue", "engine"), [("neurips", "pdflatex"), ("acl", "lualatex")])
def test_the_article_compiles(venue, engine, tmp_path, monkeypatch):
    if shutil.which(engine) is None:
        pytest.skip(f"needs {engine}")
    draw_few(monkeypatch, every=24, composed=tuple(QUESTIONS))
    bundle = write_bundle(runs_of(2), tmp_path / "paper", venue=venue, formats=("pdf",))
    assert problems_of(bundle, engine) == []
    if shutil.which("pdftotext"):
        text = subprocess.run(
            ["pdftotext", bundle / "main.pdf", "-"], capture_output=True, text=True, check=True
        ).stdout
        assert text.count("\f") <= 12  # pages
        # In brackets as a whole: "over sequences Roy and Vetterli [2007]." is no sentence.
        assert re.search(r"\[Roy and Vetterli,\s+2007", text)
        assert not re.search(r"[a-z] \[\d{4}[a-z]?\]", text)
