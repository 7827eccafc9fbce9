"""Do the tests notice a mistake in the code? ``python -m tests.mutants ROOM [--number 40] [--seed 0]``; see ``--help``.

A mutant is the code of a room with one small mistake. The tests are collected once. A forked process runs them all and notes
which test calls which function; then each mutant is a forked process that exchanges the code of one function, and runs the
tests that call it, the quickest first, until one fails. (mutmut leaves out functions with decorators, which all verdicts and
metrics have; cosmic-ray starts pytest anew for every mutant, which costs more than most of these tests.) What a test runs in
another program stays as it is, and so do constants, decorators and defaults: they are no part of a function's code.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parents[1]
Function = tuple[str, str, int]  # file below the checkout, qualified name, first line

# The files of a room, and the tests that concern it.
ROOMS = {
    "kernels": ("diagnostics/kernels/**/*.py", ["tests/diagnostics/kernels"]),
    "verdicts": ("diagnostics/verdicts/*.py", ["tests/diagnostics/verdicts"]),
    "reading": ("probes/reading/*.py", ["tests/probes/reading"]),
    "store": ("diagnostics/schema/live_store*.py", ["tests/diagnostics/schema"]),
}

EXCHANGED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Continue: ast.Break, ast.Break: ast.Continue,
}  # fmt: skip
FAILED = "the process failed"  # for a reason of this program's
# What an error says, an annotation and what only a reader sees are no behaviour; a default is evaluated elsewhere.
LEFT_OUT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.AnnAssign, ast.arguments)


@dataclass(frozen=True)
class Mutant:
    """One mistake: the ``number``-th place of a file, and which of the mistakes that can be made there."""

    file: str
    line: int
    number: int
    way: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.what}"


Made = tuple[str, Callable[[], ast.AST]]


def mistakes(node: ast.AST) -> list[Made]:
    """What can be done wrong at a node: in words, and what makes the node that takes its place."""
    return [*operators(node), *values(node), *conditions(node), *left_out(node)]


def changed(node: ast.AST, what: str, **fields: Any) -> Made:
    """The same node with other fields."""
    return what, lambda: ast.copy_location(type(node)(**{**vars(node), **fields}), node)


def operators(node: ast.AST) -> Iterator[Made]:
    """Another operator, or its factors exchanged."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in EXCHANGED:
            yield changed(node, f"{type(op).__name__} exchanged", ops=[EXCHANGED[type(op)]()])
        case ast.BinOp(op=ast.MatMult()):
            yield changed(node, "factors exchanged", left=node.right, right=node.left)
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in EXCHANGED:
            yield changed(node, f"{type(op).__name__} exchanged", op=EXCHANGED[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield f"without {type(node.op).__name__}", lambda: node.operand


def values(node: ast.AST) -> Iterator[Made]:
    """Another number or truth value."""
    match node:
        case ast.Constant(value=bool()):
            yield changed(node, f"not {node.value}", value=not node.value)
        case ast.Constant(value=int() | float()):
            yield changed(node, f"{node.value} + 1", value=node.value + 1)


def conditions(node: ast.AST) -> Iterator[Made]:
    """A condition reversed or left out, a loop that ends where it should go on."""
    match node:
        case ast.If() | ast.IfExp() | ast.While():
            yield changed(node, "condition reversed", test=ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension(ifs=[_, *_]):
            yield changed(node, "without its condition", ifs=node.ifs[1:])
        case ast.Continue() | ast.Break():
            yield "exchanged", lambda: ast.copy_location(EXCHANGED[type(node)](), node)


def left_out(node: ast.AST) -> Iterator[Made]:
    """A statement or an argument that is not there."""
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "left out", lambda: ast.copy_location(ast.Pass(), node)
        case ast.Call(keywords=[_, *_]):
            for at, keyword in enumerate(node.keywords):
                if keyword.arg is not None:
                    rest = node.keywords[:at] + node.keywords[at + 1 :]
                    yield changed(node, f"without {keyword.arg}=", keywords=rest)


def places(tree: ast.AST, inside: bool = False) -> Iterator[ast.AST]:
    """The nodes within functions at which a mistake can be made, always in the same order."""
    for name, field in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST) and not isinstance(child, LEFT_OUT):
                if inside:
                    yield child
                yield from places(child, inside or isinstance(child, ast.FunctionDef))


def mutants(files: list[str]) -> list[Mutant]:
    """Every mutant of some files."""
    found = []
    for file in files:
        line = 0
        for number, node in enumerate(places(ast.parse((ROOT / file).read_text()))):
            line = getattr(node, "lineno", line)
            found += [Mutant(file, line, number, way, of[0]) for way, of in enumerate(mistakes(node))]
    return found


class Replace(ast.NodeTransformer):
    """A tree with one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """The new node, or the old one with its children visited."""
        return self.new if node is self.old else self.generic_visit(node)


def mutated(mutant: Mutant) -> ast.Module:
    """The tree of the mutant's file with its mistake."""
    tree = copy.deepcopy(ast.parse((ROOT / mutant.file).read_text()))
    node = next(node for number, node in enumerate(places(tree)) if number == mutant.number)
    return ast.fix_missing_locations(Replace(node, mistakes(node)[mutant.way][1]()).visit(tree))


def codes(code: CodeType, file: str) -> dict[Function, CodeType]:
    """The code of every function within some code."""
    found = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found[file, inner.co_qualname, inner.co_firstlineno] = inner
            found |= codes(inner, file)
    return found


def named(code: CodeType) -> Function | None:
    """The function of this checkout that has some code; a file is the same by the links in ``depthscope/``."""
    path = code.co_filename.removeprefix(f"{ROOT}/")
    return (
        None
        if path == code.co_filename
        else (path.removeprefix("depthscope/"), code.co_qualname, code.co_firstlineno)
    )


def changed_functions(mutant: Mutant) -> dict[Function, CodeType]:
    """The code of the functions that the mistake changes."""
    before = codes(compile((ROOT / mutant.file).read_text(), "", "exec"), mutant.file)
    after = codes(compile(mutated(mutant), "", "exec"), mutant.file)
    return {name: code for name, code in after.items() if name in before and code != before[name]}


def exchange(changed: dict[Function, CodeType]) -> int:
    """Give every function in memory its changed code; how many there were."""
    gc.unfreeze()
    count = 0
    for function in gc.get_objects():  # by their types: of isinstance some objects make a warning
        if type(function) is FunctionType and (name := named(function.__code__)) in changed:
            function.__code__ = changed[name].replace(co_filename=function.__code__.co_filename)
            count += 1
    return count


class Trial:
    """A pytest plugin that runs the tests on mutants."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.killed, self.tried = options, 0, 0
        files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(ROOMS[options.room][0]))]
        every = mutants(files)
        self.chosen = Random(options.seed).sample(every, min(options.number, len(every)))
        self.before = earlier(options.again) if options.again else {}
        self.report(
            f"{len(every)} mutants of {len(files)} files, {len(self.chosen)} drawn by seed {options.seed}"
        )

    def report(self, text: str) -> None:
        """A line on the screen, past pytest's capture."""
        self.options.screen.write(text + "\n")
        self.options.screen.flush()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """All tests once, then each mutant."""
        found = self.forked(lambda: calls(session.items), self.options.longest)
        assert isinstance(found, dict), "the tests could not be run without a mistake"
        good = {at: of for at, of in found.items() if not of[2]}
        seconds = sum(of[1] for of in found.values())
        self.report(
            f"{len(good)} tests pass in {seconds:.0f} s of processor time, {len(found) - len(good)} do not"
        )
        names = {item.nodeid for item in session.items}
        for mutant in self.chosen:
            if (known := self.before.get(str(mutant))) in names:
                self.tell(mutant, str(known), 0, 0)
                continue
            changed = changed_functions(mutant)
            reaching = [(of[1], at) for at, of in good.items() if of[0] & set(changed)]
            items, spent = [], 0.0
            for seconds, at in sorted(reaching):
                spent += seconds
                if items and spent > self.options.seconds:
                    break
                items.append(session.items[at])
            self.tell(mutant, self.judged(changed, items), len(items), len(reaching))
        self.report(f"{self.options.room}: {self.killed} of {self.tried} killed")
        return True

    def judged(self, changed: dict[Function, CodeType], items: list[pytest.Item]) -> str:
        """What became of a mutant."""
        if not changed:
            return "same code"
        return (
            str(self.forked(lambda: first_failure(changed, items), self.options.longest))
            if items
            else "survived"
        )

    def tell(self, mutant: Mutant, result: str, run: int, reaching: int) -> None:
        """Count and report one mutant."""
        if result in ("same code", "not exchanged") or result.startswith(FAILED):
            self.report(f"{mutant}: {result}")
            return
        self.tried += 1
        self.killed += result != "survived"
        line = (ROOT / mutant.file).read_text().splitlines()[mutant.line - 1].strip()
        text = (
            f"SURVIVED {run} of the {reaching} tests that call it"
            if result == "survived"
            else f"killed: {result}"
        )
        self.report(f"{mutant}: {text}\n    {line}")

    def forked(self, task: Callable[[], Any], longest: float) -> Any:
        """What a function gives in a forked process; how the process ended where it gives nothing."""
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "answer")
            if not (child := os.fork()):
                os.setpgid(0, 0)
                resource.setrlimit(resource.RLIMIT_CPU, (int(longest), int(longest)))
                try:
                    answer.write_bytes(pickle.dumps(task()))
                except BaseException as error:
                    answer.write_bytes(pickle.dumps(f"{FAILED}: {error!r}"))
                finally:
                    os._exit(0)
            end = time.monotonic() + 10 * longest  # others may use the processors
            while not os.waitpid(child, os.WNOHANG)[0]:
                if time.monotonic() > end:
                    os.killpg(child, signal.SIGKILL)
                time.sleep(0.05)
            return (
                pickle.loads(answer.read_bytes()) if answer.exists() else "the process did not end by itself"
            )


def earlier(output: Path) -> dict[str, str]:
    """Which test killed which mutant, by what this program printed."""
    return dict(re.findall(r"^(\S+ .*?): killed: (\S+::.*)$", output.read_text(), re.MULTILINE))


def calls(items: list[pytest.Item]) -> dict[int, tuple[set[Function], float, bool]]:
    """The functions that each test calls, its processor time, and whether it fails."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        seen.add(frame.f_code)

    found = {}
    for at, item in enumerate(items):
        seen.clear()
        start = time.process_time()
        threading.settrace(note)
        sys.settrace(note)
        failed = fails(item, items[at + 1] if at + 1 < len(items) else None)
        sys.settrace(None)
        found[at] = ({name for code in seen if (name := named(code))}, time.process_time() - start, failed)
    return found


def first_failure(changed: dict[Function, CodeType], items: list[pytest.Item]) -> str:
    """The first test that fails with the changed functions."""
    try:
        if not exchange(changed):
            return "not exchanged"
    except ValueError:  # the changed code needs another set of variables of its surroundings
        return "not exchanged"
    for at, item in enumerate(items):
        if fails(item, items[at + 1] if at + 1 < len(items) else None):
            return item.nodeid
    return "survived"


def fails(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run one test, its fixtures too."""
    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def main() -> None:
    """Try the mutants that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--number", type=int, default=40, help="how many mutants are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds",
        type=float,
        default=30,
        help="processor time of the tests of a mutant, the quickest first",
    )
    parser.add_argument(
        "--longest", type=float, default=900, help="processor time after which a process is stopped"
    )
    parser.add_argument(
        "--again",
        type=Path,
        metavar="OUTPUT",
        help="try only what no test killed there that is still among the tests",
    )
    parser.add_argument("--tests", nargs="*", help="other tests than those of the room")
    options = parser.parse_args()
    options.screen = os.fdopen(os.dup(1), "w")
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not model and not browser"]
    sys.exit(pytest.main([*words, *(options.tests or ROOMS[options.room][1])], plugins=[Trial(options)]))


if __name__ == "__main__":
    main()
