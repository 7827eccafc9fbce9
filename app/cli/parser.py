"""How is a command line read? Option names first, so that a typing error is answered with the closest one."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from depthscope.app.cli.command import USAGE, Command
from depthscope.app.cli.commands import COMMANDS
from depthscope.app.cli.completion import PrintCompletion
from depthscope.app.cli.values import Text, check_arguments, quoted
from depthscope.app.text.terminal import MAX_MESSAGE, printable

_ABOUT = """See what happens to the signal on its way through the depth of a network, forward and backward,
and where it dies, explodes or collapses: residual, hyper-connection (HC) and mHC streams."""

_EXAMPLES = """start here:
  depthscope demo                                          a real model, a dashboard, no arguments
  depthscope probe ./checkpoint --text corpus.txt --out runs/a.zarr
  depthscope check runs/a.zarr                               exit 1 where the signal fails
  depthscope dashboard runs/
  depthscope export runs/a.zarr runs/b.zarr --out paper/

exit codes:
  0 fine; 1 findings above the limit, or a run that was left out; 2 a wrong argument or a file that cannot be read;
  70 a bug in depthscope; 130 interrupted; 141 the reader of a pipe left"""

# As argparse has it: a value, not an option.
_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text before it."""

    def __init__(self, **options: Any) -> None:
        # No abbreviations: --metric would become another option's name with the next version that adds one.
        super().__init__(**{"allow_abbrev": False, **options})

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse drops the error of a standard output that is closed or full, and exits with 0.
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with 2."""
        line = printable(" ".join(message.split()), longest=MAX_MESSAGE)
        sys.stderr.write(f"{self.prog}: {line}; see {self.prog} --help\n")
        sys.exit(USAGE)

    def check_options(self, words: Sequence[str]) -> None:
        """Refuse a name of no option, with the closest one, and an option that was given twice.

        argparse would name a required argument that is missing, or the leftover words, instead of the typing error.

        ``words``: the command line, without the name of the command.
        """
        known = {name: action for action in self._actions for name in action.option_strings}
        given: Counter[str] = Counter()
        before: argparse.Action | None = None
        for word in words:
            if word == "--":  # what follows are values
                break
            takes_word = before is not None and before.nargs != 0
            name, equals, _ = word.partition("=")
            before = None
            if name in known:
                if equals and known[name].nargs == 0:
                    self.error(f"{name} takes no value; leave out what is after it")
                given[known[name].dest] += 1
                before = None if equals else known[name]
            # A word with a space is a value for argparse too; so is one after an option that takes a value.
            elif _looks_like_an_option(word) and not takes_word:
                self.error(f"no option {quoted(name)}; {_closest(name, known)}")
        for dest, count in given.items():
            if count > 1:
                option = next(name for name, action in known.items() if action.dest == dest)
                self.error(f"{option} was given {count} times; give it once")


def _looks_like_an_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and " " not in word and not _NEGATIVE_NUMBER.fullmatch(word)


def _closest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    from depthscope.diagnostics.closest_names import did_you_mean  # imports xarray, which --help must not

    # Abbreviations are not read, but understood.
    longer = [option for option in known if len(name) > 2 and option.startswith(name)]
    if longer:
        return f"did you mean {', '.join(longer)}?"
    # The dashes are the same in all of them and would make any two names similar.
    plain = {option.lstrip("-"): option for option in known}
    advice = did_you_mean(name.strip("-")[:100], plain, otherwise="expected one of " + ", ".join(known))
    for bare, option in plain.items():
        advice = advice.replace(f"'{bare}'", option)
    return advice.replace("closest: ", "did you mean ") + ("?" if advice.startswith("closest") else "")


class _Version(argparse.Action):
    """Print the version. It is read only then: `version=` of argparse's own action is computed for every call."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from depthscope.app.readings.provenance import depthscope_version

        sys.stdout.write(f"depthscope {depthscope_version()}\n")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of every registered command.

    Returns: What it parses has the command's function as ``run_command``.
    """
    return _build(COMMANDS)[0]


@cache  # a parser remembers nothing of the lines that it read
def _build(registered: tuple[Command, ...]) -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="depthscope",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    parser.add_argument(
        "--completion",
        action=PrintCompletion,
        metavar="bash|zsh|fish",
        help="print a script that completes commands, options and files in this shell",
    )
    # metavar: argparse would otherwise print all names in braces, in the usage and again above the list.
    # parser_class: errors inside a command are one line too.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in registered:
        title = f"{command.help[0].upper()}{command.help[1:]}."
        subparser = commands.add_parser(command.name, help=command.help, description=title)
        # The type of every argument that declares none, in its groups too.
        subparser.register("type", None, Text())
        # Not `run`: the argument RUN of `analyze` has that name in the parsed arguments.
        subparser.set_defaults(run_command=command.run)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(subparser)
    return parser, dict(commands.choices)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; a wrong one is printed as one line, and leaves with 2.

    ``words``: without the program's name; at least one.
    Returns: With the command's function as ``run_command``, and ``check`` to call before it: it refuses what is wrong
    with values by what is on disk.
    """
    parser, commands = _build(COMMANDS)
    if words[0].startswith("-"):
        name = words[0].partition("=")[0]
        if name not in ("-h", "--help") and any(
            name in each._option_string_actions for each in commands.values()
        ):
            parser.error(f"option {quoted(words[0])} came before the command; give the command first")
        parser.check_options(words[:1])
    # argparse would answer with all names; the closest one is what helps after a typing error.
    elif words[0] not in commands:
        parser.error(f"no command {quoted(words[0])}; {_closest(words[0], commands)}")
    else:
        commands[words[0]].check_options(words[1:])
    args, leftover = parser.parse_known_args(list(words))
    command = commands[args.command]
    if leftover:
        command.error(f"too many arguments: {' '.join(map(quoted, leftover))}")
    args.check = lambda: check_arguments(command, args)
    return args
