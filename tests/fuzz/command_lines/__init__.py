"""Mutated command lines: every argument of every registered command, with values that a slip or an attacker gives."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from depthscope.diagnostics import schema
from tests.fuzz.command_lines.words import BASES, hostile_line, make_files
from tests.fuzz.kinds import Kind, Mutator, Subject
from tests.fuzz.outcomes import EQUAL, Answer, of_command
from tests.models.synthetic_run import synthetic_run

# These read a run and print; what others do takes minutes, starts a server or trains, and ends here where their checks end.
_QUICK = ("check", "analyze", "compare")


def prepare(folder: Path) -> None:
    """One good run, of which the bad files are made."""
    run = synthetic_run("residual", layers=1, samples=1, tokens=4, features=4, gradients=False, weights=False)
    schema.save_run(run, folder / "good.nc")


def warm_up(material: Path) -> None:
    """Import what every command imports."""
    from depthscope.app.cli import main
    from depthscope.app.readings import readings

    assert all((main, readings))


def _of_command(name: str) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        os.chdir(folder)  # the address of a socket is short
        paths = make_files(folder, material / "good.nc")
        odd, words = hostile_line(name, paths, rng)
        # Of a file name that is no text, JSON keeps the bytes as they are.
        return {"words": words, "folder": str(folder), "odd": odd}

    return mutate


def open_doors(subject: Subject, material: Path, rng: Random) -> list[Answer]:
    """The answer of the command line."""
    from depthscope.app.cli.commands import COMMANDS

    os.chdir(subject["folder"])
    for command in COMMANDS:
        if command.name not in _QUICK:
            object.__setattr__(command, "run", lambda args: 0)
    return [of_command(subject["words"], accepted=EQUAL)]


COMMAND_LINES = Kind(
    name="command_lines",
    mutators={name: _of_command(name) for name in BASES},
    prepare=prepare,
    warm_up=warm_up,
    doors=open_doors,
    command=lambda subject: f"depthscope {' '.join(map(ascii, subject['words']))}"[:500],
)
