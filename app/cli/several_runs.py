"""Which of the runs that were named can be judged? One that cannot is left out, aloud, and the others go on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from depthscope.app.cli.command import FINE, FOUND
from depthscope.app.text.terminal import remark, working

if TYPE_CHECKING:
    from depthscope.app.readings.readings import Reading


def read_several(args: argparse.Namespace, what: str) -> tuple[list[Reading], list[dict[str, str]]]:
    """Open, analyse and judge the runs of ``args.runs``; those that are left out are printed on stderr.

    ``what``: what is going on, for a person who waits.
    Returns: The readings; and ``{"run": name, "why": reason}`` for each run that was left out, the form of ``--json``.
    """
    from depthscope.app.readings.readings import read_paths

    with working(what) as progress:
        readings, reasons = read_paths(args.runs, max_bytes=args.max_bytes, progress=progress)
    for name, why in reasons.items():
        remark(f"left out {name}: {why}")
    return readings, [{"run": name, "why": why} for name, why in reasons.items()]


def exit_code(left_out: list[dict[str, str]], *, found: bool = False) -> int:
    """`FOUND` where something was found or a run was left out: a broken run must not pass in continuous integration."""
    return FOUND if found or left_out else FINE
