"""How large is the house, and how far must a reader walk? Lines by kind, long functions, hops: ``python -m benchmarks.house``.

A *hop* is a pair (file, other file) of this package such that a function of the first one called a function of the other, with
no function of ours between them, while a task ran: what somebody has to open who follows that task from its first line.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("probes", "diagnostics", "app")
# What a file or function may not exceed; tests are lists of cases, and may be longer.
LONGEST_FILE, LONGEST_FUNCTION = 450, 60


def main() -> None:
    """Count, run the tasks, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-tasks", action="store_true", help="count lines only, without running anything")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"source": size(ROOMS), "tests": size(("tests",))}
    found["rooms"] = {room.name: size((str(room.relative_to(ROOT)),))["lines"] for room in rooms()}
    if not arguments.no_tasks:
        found["tasks"] = {name: walk(task) for name, task in tasks()}
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for part in ("source", "tests"):
        print(f"{part}: " + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in found[part].items()))
    print("rooms: " + ", ".join(f"{name} {n}" for name, n in found["rooms"].items()))
    for name, counts in found.get("tasks", {}).items():
        print(f"{name}: " + ", ".join(f"{what} {n}" for what, n in counts.items()))


def rooms() -> Iterator[Path]:
    """The folders of the three packages that hold code."""
    for package in ROOMS:
        yield from sorted(path for path in (ROOT / package).iterdir() if (path / "__init__.py").exists())


def size(folders: tuple[str, ...]) -> dict[str, int]:
    """Lines by kind, and how many files and functions are too long, in some folders."""
    total = dict.fromkeys(
        ("files", "lines", "code", "docstring", "comment", "blank", "long_files", "long_functions"), 0
    )
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        text = path.read_text(encoding="utf-8")
        counts = kinds(text)
        longest = [function_length(node) for node in ast.walk(ast.parse(text)) if is_function(node)]
        counts |= {"files": 1, "long_files": int(counts["lines"] > LONGEST_FILE)}
        counts["long_functions"] = sum(length > LONGEST_FUNCTION for length in longest)
        for name, number in counts.items():
            total[name] += number
    return total


def kinds(text: str) -> dict[str, int]:
    """Lines of one file: of docstrings, of comments alone, blank, and of code."""
    lines = text.splitlines()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    written = {
        number
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type
        not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        for number in range(token.start[0], token.end[0] + 1)
    }
    code = {number for number in written if number <= len(lines)} - docstrings
    comments = {n for n, line in enumerate(lines, 1) if line.lstrip().startswith("#")} - code - docstrings
    counts = {"code": len(code), "docstring": len(docstrings), "comment": len(comments), "lines": len(lines)}
    return counts | {"blank": len(lines) - len(code | docstrings | comments)}


def is_function(node: ast.AST) -> bool:
    """Whether a node is a function or method."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def function_length(node: Any) -> int:
    """Lines of a function without its docstring."""
    documentation = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (documentation or "").count("\n") - bool(documentation)


@dataclass
class Walk:
    """The calls between files of this package while a task runs."""

    files: set[str] = field(default_factory=set)
    functions: set[Any] = field(default_factory=set)
    hops: set[tuple[str, str]] = field(default_factory=set)
    own: dict[str, str | None] = field(default_factory=dict)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note one call, as a profile function."""
        if event != "call" or (here := self.name_of(frame)) is None:
            return
        self.files.add(here)
        self.functions.add(frame.f_code)
        caller = frame.f_back
        while caller is not None and (there := self.name_of(caller)) is None:
            caller = caller.f_back
        if caller is not None and there is not None and there != here:
            self.hops.add((there, here))

    def name_of(self, frame: FrameType) -> str | None:
        """The file of a frame in this package, by its path in the checkout; None elsewhere."""
        file = frame.f_code.co_filename
        if file not in self.own:
            path = Path(file).resolve()
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in (*ROOMS, "depthscope")
            self.own[file] = str(path.relative_to(ROOT)) if inside else None
        return self.own[file]


def walk(task: Callable[[], object]) -> dict[str, int]:
    """Files, functions and hops of a task; what is imported or built once was so before."""
    task()
    steps = Walk()
    sys.setprofile(steps)
    try:
        task()
    finally:
        sys.setprofile(None)
    return {"files": len(steps.files), "functions": len(steps.functions), "hops": len(steps.hops)}


def tasks() -> Iterator[tuple[str, Callable[[], object]]]:
    """What a newcomer would follow: a capture, an analysis, its verdict, an export."""
    import torch
    from hyper_connections.mHCv2 import get_init_and_expand_reduce_stream_functions

    import depthscope as ds
    from depthscope.app.cli.main import main as command

    def decoder(streams: int) -> torch.nn.Module:
        blocks = [
            torch.nn.Sequential(torch.nn.RMSNorm(16), torch.nn.Linear(16, 16), torch.nn.GELU())
            for _ in range(4)
        ]
        wrap, expand, reduce = get_init_and_expand_reduce_stream_functions(
            streams, add_stream_embed=True, dim=16
        )
        wrapped = [wrap(dim=16, branch=block) for block in blocks]
        return torch.nn.Sequential(
            torch.nn.Embedding(64, 16), expand, *wrapped, reduce, torch.nn.Linear(16, 64)
        )

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64)
            layer = torch.nn.TransformerEncoderLayer(
                16, 2, 32, batch_first=True, norm_first=True, dropout=0.0
            )
            self.encoder = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.embed(ids)))

    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 12))
    plain, streams = Plain().eval(), decoder(4).eval()
    yield "plain capture", lambda: ds.capture(plain, ids)
    yield "mHC capture", lambda: ds.capture(streams, ids)
    run = ds.capture(plain, ids)
    analysis = ds.analyze(run)
    yield "analyze", lambda: ds.analyze(run)
    yield "judge", lambda: ds.judge(analysis)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.zarr"
        ds.save_run(run, file)
        for name in ("export", "report"):
            out = str(Path(folder) / f"{name}{'.html' if name == 'report' else ''}")
            arguments = [name, str(file), "--out", out, "--force"]
            yield name, partial(quietly, partial(command, arguments))


def quietly(task: Callable[[], object]) -> None:
    """Run a command without its output."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            task()
        except SystemExit as exit_:
            if exit_.code:
                raise


if __name__ == "__main__":
    main()
