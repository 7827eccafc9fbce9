"""Do the examples of CONTRIBUTING.md work, each in a copy of the checkout, and what else does it promise of tests?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = ("metric", "verdict", "figure", "page", "command")
BLOCK = re.compile(r"<!-- (?P<order>[^>]*?) -->\n+```(?:python|text)\n(?P<code>.*?)```", re.DOTALL)


def sections() -> dict[str, list[tuple[str, str]]]:
    """The marked code blocks of each section that begins with `## Add a …`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = re.split(r"^## Add an? (\w+).*$", text, flags=re.MULTILINE)
    return {
        kind: [(block["order"], block["code"]) for block in BLOCK.finditer(body)]
        for kind, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def checkout(folder: Path) -> Path:
    """A copy of the files that git lists, links as links."""
    # Files that are not committed yet are copied too; ignored ones, such as environments and data, are not.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # git still lists a file that was deleted and not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # depthscope/ consists of links to the rooms: followed, it would be a second copy that no edit reaches.
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    for room in ("app", "diagnostics", "probes"):  # what is compiled already is not compiled again
        for compiled in (ROOT / room).rglob("__pycache__"):
            unfinished = shutil.ignore_patterns("*.pyc.*")
            shutil.copytree(compiled, folder / compiled.relative_to(ROOT), ignore=unfinished)
    return folder


def apply(order: str, code: str, folder: Path) -> None:
    """Do what the comment above a code block orders: a new file, an addition, or a line after another one."""
    action, _, rest = order.partition(": ")
    if action == "new file":
        assert not (folder / rest).exists(), f"{rest} exists already"
        (folder / rest).parent.mkdir(parents=True, exist_ok=True)
        (folder / rest).write_text(code, encoding="utf-8")
    elif action == "append to":
        with (folder / rest).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
    else:
        assert action == "line", f"unknown comment above a code block: {order}"
        path, anchor = re.fullmatch(r"(\S+) \| after: (.*)", rest).groups()
        lines = (folder / path).read_text(encoding="utf-8").splitlines(keepends=True)
        # Exactly one such line: an example must not depend on which of two is meant.
        (place,) = [number for number, line in enumerate(lines) if line.strip() == anchor.strip()]
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        lines.insert(place + 1, indent + code.strip() + "\n")
        (folder / path).write_text("".join(lines), encoding="utf-8")


def run(folder: Path, *arguments: str, fails: bool = False) -> str:
    """What Python prints at the root of the copy, which is the package that it imports."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_there_is_one_example_for_each_kind():
    assert tuple(sections()) == KINDS


# All examples are tried in one copy; of all figures, those of the examples are drawn.
PRELUDE = """
from depthscope.app.figures.composed import QUESTIONS
from depthscope.app.paper import contents, export

export.QUESTIONS = {"collapse": QUESTIONS["collapse"]}
if not hasattr(contents, "every"):
    contents.every = contents.draw_all
    contents.draw_all = lambda readings, view: [
        (key, figure) for key, figure in contents.every(readings, view)
        if figure.name in ("token_cosine", "feature_skewness", "trimmed_cka")
    ]

"""


def test_each_example_is_one_definition_and_one_line(tmp_path):
    folder = checkout(tmp_path)
    definitions, lines, rules = {}, {}, []
    for kind, blocks in sections().items():
        definitions[kind], *registered = [(order, code) for order, code in blocks if order != "check"]
        assert definitions[kind][0].partition(":")[0] in ("new file", "append to")
        # A figure and a verdict are in the register by their definition alone.
        assert len(registered) == (kind not in ("figure", "verdict"))
        for order, code in registered:
            lines[kind] = (order, code)
            assert order.partition(":")[0] == "line"
            assert code.strip().count("\n") == 0, "the register takes one line"
        (check,) = [code for order, code in blocks if order == "check"]
        (folder / f"check_{kind}.py").write_text(PRELUDE + check, encoding="utf-8")
        rules.append(f"tests/rules/test_registered_{kind}s.py")
    pytest_rules = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *rules)

    for definition in definitions.values():
        apply(*definition, folder)
    # Before the lines are added: a rule that cannot fail would pass every example.
    said = run(folder, *pytest_rules, "-k", "is_registered", fails=True)
    for order, _ in lines.values():
        assert order.removeprefix("line: ").partition(" | ")[0] in said, "a forgotten line is named"

    for line in lines.values():
        apply(*line, folder)
    # A fresh process: nothing of it was imported before the examples were there. pytest runs a file to look for tests in it.
    of_all = "is_registered or once or defined_under or can_have_a_default or has_a_reason or question"
    run(folder, *pytest_rules, "-k", of_all, "-W", "ignore", *(f"check_{kind}.py" for kind in KINDS))
    run(folder, "-m", "ruff", "check", "--no-cache", "probes", "diagnostics", "app")
