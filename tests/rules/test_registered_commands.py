"""Every command that a module of `app/cli` defines is in COMMANDS, which is the order of `depthscope --help`."""

from __future__ import annotations

import ast
from pathlib import Path

from depthscope.app import cli
from depthscope.app.cli.main import COMMANDS


def defined():
    """The modules with a function of their own name; `main` is the entry point."""
    return {
        path.stem
        for path in Path(cli.__file__).parent.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == path.stem != "main"
    }


def test_every_defined_command_is_registered():
    missing = sorted(defined() - set(COMMANDS))
    assert not missing, (
        f"{', '.join(missing)} of app/cli is defined but not registered: add the line "
        f'`"{missing[0]}",` to COMMANDS in app/cli/main.py'
    )
