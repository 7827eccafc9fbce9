"""Every command that a file declares is registered, and every file of the commands declares one."""

from importlib import import_module
from pathlib import Path

import pytest

from depthscope.app.cli import commands
from depthscope.app.cli.command import Command
from depthscope.app.cli.commands import COMMANDS

FOLDER = Path(commands.__file__).parent
FILES = sorted(path.stem for path in FOLDER.rglob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", FILES)
def test_every_file_declares_one_command_that_is_registered(name):
    module = import_module(f"{commands.__name__}.{name}")
    declared = [value for value in vars(module).values() if isinstance(value, Command)]
    assert len(declared) == 1, (
        f"app/cli/commands/{name}.py declares {len(declared)} commands; expected one, COMMAND = Command(…); "
        "code that commands share belongs in app/cli"
    )
    command = declared[0]
    assert command in COMMANDS, (
        f"app/cli/commands/{name}.py declares the command {command.name!r}, which is not registered: "
        f'add the line "{name}", to COMMANDS in app/cli/commands/__init__.py'
    )
    assert command.name == name, (
        f"app/cli/commands/{name}.py declares the command {command.name!r}; expected the name of its file"
    )


def test_no_command_is_registered_twice():
    names = [command.name for command in COMMANDS]
    assert len(set(names)) == len(names), f"a name stands twice in COMMANDS: {', '.join(names)}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_line_of_help_fits_into_the_list(command):
    # In the manner of argparse's own line: «show this help message and exit».
    assert command.help
    assert not command.help.endswith("."), f"{command.name}: {command.help!r} ends in a full stop"
    assert command.help[0].islower(), f"{command.name}: {command.help!r} does not begin in lower case"
