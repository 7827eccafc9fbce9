"""Which commands are there? Each is a file of this folder with a `COMMAND`, and a line in the list below."""

from __future__ import annotations

from importlib import import_module

from depthscope.app.cli.command import Command

COMMANDS: tuple[Command, ...] = tuple(
    # A new command is one word here and no import line above it.
    import_module(f"depthscope.app.cli.commands.{name}").COMMAND
    for name in (
        "demo",
        "probe",
        "merge",
        "watch",
        "describe",
        "analyze",
        "check",
        "explain",
        "compare",
        "ablate",
        "patch",
        "lens",
        "jacobian",
        "dashboard",
        "report",
        "export",
    )
)
"""Every command, in the order of ``depthscope --help``."""
