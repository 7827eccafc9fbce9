"""Every option of every registered command refuses hostile values in one line, before any work; so does a new one."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from depthscope.app.cli import parser as parsing
from depthscope.app.cli.command import FINE, USAGE
from depthscope.app.cli.commands import COMMANDS
from depthscope.app.cli.main import main
from depthscope.app.cli.paths import InputPath, InputRun, InputText, OutputFile, OutputFolder
from depthscope.app.cli.values import ByteCount, Checked, Number, Text
from depthscope.diagnostics import schema

ROOT = Path(__file__).parents[2]
PARSER, PARSERS = parsing._build(COMMANDS)

ALWAYS_WRONG = {
    "empty": "",
    "blank": " \t ",
    "NUL": "a\0.zarr.zip",
    "bytes that are not UTF-8": os.fsdecode(b"\xff\xfe.zarr.zip"),
    "a megabyte": "x" * 10**6,
}
NO_NUMBER = (
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "-1e5",
    "٣",
    "²",
    "1_000",
    "0x10",
    "9" * 5000,
    str(10**30),
    "many",
)
SPECIAL = (
    "FIFO",
    "FIFO.zarr.zip",
    "SOCKET.zarr.zip",
    "/dev/zero",
    "/dev/full",
    "/proc/kmsg",
    "/proc/self/mem",
    "LOOP.zarr.zip",
    "TEXT/",
)
UNWRITABLE = (
    "/dev/full",
    "/dev/null/x.zarr.zip",
    "TEXT/x.zarr.zip",
    "FIFO.zarr.zip",
    "LOOP.zarr.zip",
    "SOCKET.zarr.zip",
    "y" * 300 + ".zarr.zip",
    "/proc/x/y.zarr.zip",
)
# What is wrong for an argument by its type; for a new type, add what it must refuse.
WRONG = {
    Number: NO_NUMBER,
    ByteCount: (*NO_NUMBER, "0", "5 apples", "10XB"),
    InputPath: SPECIAL,
    InputText: (*SPECIAL, "FOLDER", "nowhere.txt", "DANGLING.zarr.zip"),
    InputRun: (*SPECIAL, "TEXT", "nowhere.zarr.zip", "DANGLING.zarr.zip"),
    OutputFile: (*UNWRITABLE, "RUN", "PAGE", "FOLDER", "FOLDER.zarr.zip", "DANGLING.zarr.zip"),
    OutputFolder: (*UNWRITABLE, "RUN", "TEXT"),
}
ODD = (
    "-",
    "--",
    "a\nb",
    "\x1b[2J",
    "\u202e",
    "%s{0}",
    "$(id)",
    "a b;c",
    "~",
    ".",
    "..",
    "/",
    "NOWHERE/../x.zarr.zip",
    "*",
)
"""May be taken or refused, but never answered by a traceback."""

# The words of a valid call, without the argument that is tried.
VALID = {
    "checkpoint": "some.module:factory",
    "checkpoints": "some.module:factory",
    "run": "RUN",
    "runs": "RUN",
    "text": "TEXT",
    "script": "TEXT",
    "names": "rank_collapse",
    "out": {"probe": "NEW.zarr.zip", "merge": "NEW.zarr.zip", "report": "NEW.html"},
}


def _arguments() -> Iterator[tuple[str, argparse.Action]]:
    for name, parser in PARSERS.items():
        for action in parser._actions:
            if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
                yield name, action


ARGUMENTS = list(_arguments())
STOPPED = tuple(replace(command, run=lambda args: FINE) for command in COMMANDS)
NAMES = [f"{name} {action.dest}" for name, action in ARGUMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_run) -> Path:
    """Files of every kind, under the names that stand for them above."""
    folder = tmp_path_factory.mktemp("files")
    schema.save_run(make_run("residual", layers=1), folder / "run.zarr.zip")
    (folder / "text.txt").write_text("some words")
    (folder / "page.html").write_text("<p>of somebody else")
    for ending in ("", ".zarr.zip"):
        os.mkfifo(folder / f"fifo{ending}")
        (folder / f"folder{ending}").mkdir()
        (folder / f"folder{ending}" / "notes.txt").write_text("of somebody else")
    (folder / "loop.zarr.zip").symlink_to("loop.zarr.zip")
    (folder / "dangling.zarr.zip").symlink_to("nowhere.zarr.zip")
    place = os.getcwd()
    # The address of a socket is at most 107 characters long.
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.zarr.zip")
    os.chdir(place)
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Check a command line as `main` does, with nothing after the checks; gives the exit code and what is on stderr."""
    monkeypatch.setattr(parsing, "COMMANDS", STOPPED)
    monkeypatch.chdir(folder)
    named = {
        "RUN": "run.zarr.zip",
        "TEXT": "text.txt",
        "PAGE": "page.html",
        "FIFO": "fifo",
        "FOLDER": "folder",
    }
    named |= {"SOCKET": "socket", "LOOP": "loop", "DANGLING": "dangling", "NEW": "new"}

    def call(words: list[str]) -> tuple[int, str]:
        for name, file in named.items():
            words = [re.sub(rf"^{name}\b", file, word) for word in words]
        try:
            code = main(words)
        except SystemExit as left:
            code = int(left.code or 0)
        return code, capsys.readouterr().err

    return call


def _line(name: str, tried: argparse.Action, value: str) -> list[str]:
    """A valid line of a command, with one argument replaced."""
    words = [name]
    for action in PARSERS[name]._actions:
        valid = VALID.get(action.dest)
        valid = valid.get(name, "NEW") if isinstance(valid, dict) else valid
        if action is tried:
            words += [*action.option_strings[-1:], value]
        elif action.required and action.nargs != 0:
            words += [*action.option_strings[-1:], str(valid)]
    return words


def _listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def _require_one_line(code: int, error: str) -> None:
    assert "Traceback" not in error
    assert code in (FINE, USAGE), error
    if code == USAGE:
        assert error.endswith("\n")
        assert error.count("\n") == 1
        assert error[:-1].isprintable()
        assert len(error) < 2000


@pytest.mark.parametrize(("name", "action"), ARGUMENTS, ids=NAMES)
def test_a_wrong_value_is_one_line_before_any_work_and_leaves_nothing(name, action, call, folder):
    before = _listing(folder)
    wrong = [*ALWAYS_WRONG.values(), *WRONG.get(type(action.type), ())]
    for value in wrong:
        code, error = call(_line(name, action, value))
        _require_one_line(code, error)
        assert code == USAGE, f"{value[:50]!r} was taken"
    for value in ODD:
        _require_one_line(*call(_line(name, action, value)))
    assert _listing(folder) == before


def test_a_valid_line_is_taken(call):
    for name in PARSERS:
        code, error = call(_line(name, PARSER._actions[0], ""))
        assert (code, error) == (FINE, "")


def test_the_type_of_every_argument_is_one_that_refuses():
    for name, action in ARGUMENTS:
        kind = action.type
        assert kind is None or isinstance(kind, (Checked, Number, ByteCount, Text)), (
            f"{name} {action.dest} has the type {kind!r}; expected none, or one of depthscope.app.cli.values and paths"
        )
        if isinstance(kind, Number):
            assert kind(str(kind.lowest)) == kind.lowest
            assert kind(str(kind.highest)) == kind.highest


@pytest.mark.parametrize("name", PARSERS)
def test_an_option_with_a_typing_error_is_answered_by_the_option(name, call):
    for action in PARSERS[name]._actions:
        for option in action.option_strings:
            if not option.startswith("--") or option == "--help":
                continue
            place = len(option) // 2 + 1
            for typed in (
                option[:place] + option[place + 1 :],
                f"{option}s",
                option[:-1] + "=1",
                option[:-1],
            ):
                if typed.partition("=")[0] in PARSERS[name]._option_string_actions:
                    continue
                code, error = call([*_line(name, PARSER._actions[0], ""), typed])
                _require_one_line(code, error)
                assert code == USAGE
                assert re.search(rf"did you mean .*{option}\b", error), error


@pytest.mark.parametrize("name", PARSERS)
def test_an_option_that_is_given_twice_is_refused(name, call):
    for action in PARSERS[name]._actions:
        option = action.option_strings[-1] if action.option_strings else None
        if option is not None and option != "--help":
            words = [option] if action.nargs == 0 else [option, "1"]
            code, error = call([*_line(name, action, "1")[:1], *words, *words])
            _require_one_line(code, error)
            assert "was given 2 times; give it once" in error


# A command in a message, up to what cannot be a part of it.
_ADVISED = re.compile(rf"depthscope ((?:{'|'.join(PARSERS)})\b[^\n`:;()\"<>]*)")


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every text in a source that is no docstring; {} stands for what is filled in."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    silent = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    silent |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield place, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield place, node.value


def test_a_command_in_a_message_can_be_given_and_destroys_nothing():
    sources = [path for room in ("app", "probes", "diagnostics") for path in (ROOT / room).rglob("*.py")]
    naming = [path for path in sources if "depthscope " in path.read_text(encoding="utf-8")]
    advice = [
        (place, found[1])
        for path in naming
        for place, text in _messages(path)
        for found in _ADVISED.finditer(text)
    ]
    assert len(advice) > 8
    for place, words in advice:
        _require_harmless(place, words)


def _require_harmless(place: str, words: str) -> None:
    # In a list of examples an explanation follows after spaces.
    given = shlex.split(re.split(r" {2,}", words.strip())[0].rstrip("."))
    # The names of commands alone, such as the title of a page that a command wrote.
    if len(given) == 1:
        assert given[0] in PARSERS
        return
    # What a message is about is filled in; a command must not write to it.
    filled = [before for before, word in pairwise(given) if "{}" in word]
    assert "--out" not in filled, f"{place}: the command writes to what the message is about"
    # The names of metrics are ours; a path of the user may contain anything that a shell obeys.
    assert set(filled) <= {"--metrics"}, f"{place}: a path without quotes; use terminal.command_line"
    args = parsing.parse([word.strip(",") for word in given])
    assert args.command == given[0]
