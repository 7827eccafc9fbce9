"""What is a command? A name, a line of help, its arguments, and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

# 2 is what argparse itself exits with, 70 is EX_SOFTWARE of sysexits.h; the others are the shell's 128 + SIGINT, SIGPIPE
# and SIGTERM.
FINE, FOUND, USAGE, BUG, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 70, 130, 141, 143


@dataclass(frozen=True)
class Command:
    """One command of ``depthscope``, declared in a file of its own in `depthscope.app.cli.commands`.

    Every command file is imported to print ``depthscope --help``. Import torch, xarray, numpy and the rest of
    depthscope inside `run`: help has to answer in less than half a second.

    Parameters
    ----------
    name : str
        The word on the command line; the file has the same name.
    help : str
        One line, in lower case and without a full stop: it is shown in the list of commands.
    add_arguments : callable
        Takes the command's parser. `depthscope.app.cli.arguments` has the arguments that commands share, and
        `depthscope.app.cli.values` and `paths` the types of all others: their values are checked before `run`.
    run : callable
        Takes the parsed arguments and returns the exit code: `FINE`, or `FOUND` where a check fails or a run was left
        out. A ValueError or an OSError that it raises is printed as one line, and the exit code is `USAGE`; any other
        exception is a bug of ours, and the exit code `BUG`.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
