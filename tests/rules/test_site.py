"""Do the commands and the Python that the site shows exist? The notebooks themselves are run when it is built."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import typer

from depthscope.app.cli.main import application

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in (*DOCS.glob("*.md"), *DOCS.glob("*/*.md"))
    if "project" not in path.parts
)


def test_the_python_of_a_page_is_python():
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for kind, block in re.findall(
            r"^```(python|\{code-cell\})\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        ):
            block = re.sub(r"\A---\n.*?\n---\n|\A(:.*\n)+", "", block, flags=re.DOTALL)
            lines = [line for line in block.splitlines() if kind == "python" or not line.startswith("!")]
            ast.parse("\n".join(lines))


def test_every_command_of_the_site_has_its_options():
    """Blocks that are not run when the site is built: a renamed option must not stay in them."""
    known = _options()
    shown = [
        (page, words) for page in PAGES for words in _commands((DOCS / page).read_text(encoding="utf-8"))
    ]
    assert len(shown) > 10
    for page, (command, *words) in shown:
        # What comes after a script is the script's own.
        script = next(
            (place for place, word in enumerate(words) if word == "-m" or word.endswith(".py")), None
        )
        words = words[:script]
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert command in known, f"{page}: depthscope {command}"
        assert options <= known[command], f"{page}: depthscope {command} has no {options - known[command]}"


def test_every_picture_of_a_notebook_has_words():
    for page in [page for page in PAGES if page.startswith(("gallery/", "concepts/"))]:
        text = (DOCS / page).read_text(encoding="utf-8")
        for cell in re.findall(r"^```\{code-cell\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            drawn = re.search(r"plt\.subplots|to_matplotlib\(|^ds\.figures\.(?!panels)", cell, re.MULTILINE)
            if drawn:
                assert re.search(r"^    alt: \S.{30}", cell, re.MULTILINE), cell


def _commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line.removeprefix("!") for line in re.findall(r"^!depthscope .*", text, re.MULTILINE)]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("depthscope ")]
    return [words[1:] for words in found if not words[1].startswith("-")]


def _options() -> dict[str, set[str]]:
    commands = typer.main.get_command(application()).commands
    return {
        name: {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        for name, command in commands.items()
    }
