"""The entry point of ``depthscope``."""

# All imports are inside `main`: an interrupt before it would be a traceback, and at a prompt it comes early.
from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    ``argv``: arguments; those of the process by default.
    Returns: 0 fine, 1 findings above the limits of `check` or a run that was left out, 2 usage or bad input, 70 a bug
    of ours, 130 interrupted, 141 the reader of a pipe left, 143 terminated. Help, the version and a wrong option leave
    by SystemExit, as in argparse.
    """
    try:
        from depthscope.app.cli.outcome import run

        return run(sys.argv[1:] if argv is None else argv, whole_process=argv is None)
    except KeyboardInterrupt:
        sys.stderr.write("depthscope: interrupted\n")
        return 130
