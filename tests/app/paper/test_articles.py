"""The sample article compiles with names in several alphabets: no lost float, nothing beyond the margin, at most 12 pages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from depthscope.app.figures.composed import QUESTIONS
from depthscope.app.paper.export import write_bundle
from tests.few_figures import draw_few

MOST_OVERFULL = 5.0
"""Points beyond the margin that nobody sees."""
PROBLEMS = (
    *("Missing character", "Float(s) lost", "undefined references", "Citation", "multiply defined"),
    "Float too large",
)


HOSTILE = r"модель с очень длинным именем \input{/etc/passwd} << 6 * 7 >> 50% a&b_c^d~e #1 $x$ \end{document}"


@pytest.fixture
def bundle(make_run, tmp_path) -> Path:
    runs = {
        HOSTILE: make_run("mhc", layers=2, samples=3),
        "模型一号": make_run("residual", layers=3, samples=3, seed=1),
    }
    with pytest.MonkeyPatch.context() as patch:
        draw_few(patch, every=24, composed=tuple(QUESTIONS))
        return write_bundle(runs, tmp_path / "paper", venue="neurips", formats=("pdf",))


def compiled(engine: str, folder: Path) -> str:
    """The log of an article."""
    command = [engine, "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    for step in (command, ["bibtex", "main"], command, command):
        done = subprocess.run(step, cwd=folder, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, f"{step[0]} fails: {done.stdout.decode(errors='replace')[-1500:]}"
    return (folder / "main.log").read_text(errors="replace").replace("\n", "")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_the_article_compiles_and_names_are_text(bundle):
    # Places where a long word may be broken are no part of its letters.
    texts = [path.read_text().replace(r"\allowbreak{}", "") for path in bundle.rglob("*.tex")]
    assert not any(r"\input{/etc" in text for text in texts)
    assert any(r"\textbackslash{}input\{/etc/passwd\}" in text for text in texts)
    log = compiled("pdflatex", bundle)
    overfull = [float(points) for points in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt", log)]
    assert [points for points in overfull if points > MOST_OVERFULL] == []
    assert [words for words in PROBLEMS if words in log] == []
    if shutil.which("pdftotext"):
        printed = ["pdftotext", bundle / "main.pdf", "-"]
        text = subprocess.run(printed, capture_output=True, text=True, check=True).stdout
        assert text.count("\f") <= 12  # pages
        # In brackets as a whole: "over sequences Roy and Vetterli [2007]." is no sentence.
        assert re.search(r"\[Roy and Vetterli,\s+2007", text)
        assert not re.search(r"[a-z] \[\d{4}[a-z]?\]", text)
