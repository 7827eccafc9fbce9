"""Do the pages of the site run from a wheel, in an empty folder? Their cells and commands, in the order of the page.

    python -m build -w && python -m venv FRESH && FRESH/bin/pip install "dist/depthscope-….whl[demo,docs]"
    FRESH/bin/python .ci/from_wheel.py docs/start.md docs/gallery/*.md

Of the commands of a page those are run that are `depthscope …`, but for servers, and for placeholders such as CHECKPOINT.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\{code-cell\}|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPTIONS = re.compile(r"\A---\n.*?\n---\n|\A(?::[^\n]*\n)+", re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|…|\*")


def script_of(page: str) -> tuple[str, int]:
    """A page as one script, and how many commands and cells are in it."""
    parts = []
    for kind, block in FENCE.findall(page):
        lines = OPTIONS.sub("", block).splitlines()
        if kind == "bash":
            lines = [f"!{line.partition(' #')[0]}" for line in lines if _can_run(line)]
        if lines:
            parts.append("\n".join(_as_python(line) for line in lines))
    if any("display(" in part for part in parts):  # a notebook has it without an import
        parts.insert(0, "from IPython.display import display")
    for part in parts:
        ast.parse(part)
    return "\n".join(parts) + "\n", len(parts)


def _can_run(line: str) -> bool:
    return bool(re.match(r"depthscope (?!dashboard)", line)) and not PLACEHOLDER.search(
        line.partition(" #")[0]
    )


def _as_python(line: str) -> str:
    return (
        f"__import__('subprocess').run({line[1:]!r}, shell=True, check=True)"
        if line.startswith("!")
        else line
    )


def main(pages: list[str]) -> int:
    """Run each page in a folder of its own; 1 where one fails."""
    # Not from the checkout: Python puts the folder of this script first, and none of its parents.
    where = subprocess.run(
        [sys.executable, "-c", "import depthscope; print(depthscope.__file__)"],
        cwd=tempfile.mkdtemp(),
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if Path(where).resolve().is_relative_to(ROOT):
        sys.exit(f"{sys.executable} imports depthscope from the checkout ({where}); install the wheel there")
    failed = 0
    for page in pages:
        script, count = script_of(Path(page).read_text(encoding="utf-8"))
        began = time.time()
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tempfile.mkdtemp(),
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        how = "ran" if done.returncode == 0 else "FAILED"
        sys.stdout.write(f"{page}: {how}, {count} cells and commands, {time.time() - began:.0f} s\n")
        sys.stdout.flush()
        if done.returncode:
            failed = 1
            sys.stdout.write((done.stdout + done.stderr)[-3000:])
    return failed


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**own, "MPLBACKEND": "Agg", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
