"""How does a shell complete our commands? By a script that shtab writes from the parsers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from depthscope.app.cli.paths import InputPath, InputRun, InputText, OutputFile, OutputFolder, run_endings
from depthscope.app.cli.values import Names, OneOf, quoted

SHELLS = ("bash", "zsh", "fish")


class PrintCompletion(argparse.Action):
    """Print the completion script of one shell."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        """Print it on stdout and leave; see `argparse.Action`."""
        if values not in SHELLS:
            parser.error(f"no completion for {quoted(str(values))}; expected one of {', '.join(SHELLS)}")
        sys.stdout.write(completion_script(parser, str(values)))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script that completes the program's command line.

    ``parser``: of the program, with its commands.
    """
    import shtab

    actions = [action for each in _parsers(parser) for action in each._actions]
    before = [action.choices for action in actions]
    try:
        for action in actions:
            if isinstance(action, PrintCompletion):
                action.choices = SHELLS
            else:
                _tell_completion(action)
        return shtab.complete(parser, shell=shell)
    finally:
        # The parser goes on reading lines, and would compare a list of names with the choices as if it were one of them.
        for action, choices in zip(actions, before, strict=True):
            action.choices = choices


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(each for action in below for each in action.choices.values())]


def _tell_completion(action: argparse.Action) -> None:
    """Give an argument what shtab reads: its choices, or which files it takes."""
    import shtab

    kind = action.type
    # The labels are read here, and not when the parser is built: that would import what declares them for --help.
    if isinstance(kind, (OneOf, Names)) and kind.labels is not None:
        action.choices = list(kind.labels())
    elif isinstance(kind, InputRun) or (isinstance(kind, OutputFile) and not kind.example):
        # A zarr run is a folder; folders are completed in any case.
        action.complete = shtab.glob(*(f"*{ending}" for ending in run_endings()))  # type: ignore[attr-defined]
    elif isinstance(kind, OutputFolder):
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif isinstance(kind, (InputPath, InputText, OutputFile)):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
