"""Errors that are raised inside of our hooks, wherever they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthscope import probes

PROBES = Path(probes.__file__).parent
STOPS = (KeyboardInterrupt, SystemExit)  # which must reach the user from wherever they are raised


def _inside_a_hook(frame: Any) -> bool:
    names = ("__call__", "_report_errors")
    while frame is not None:
        if frame.f_code.co_filename.endswith("probes/model/hooks.py") and frame.f_code.co_name in names:
            return True
        frame = frame.f_back
    return False


@contextmanager
def fault(error: type[BaseException], after: int, tripped: list[str]) -> Iterator[None]:
    """Raise an error at the n-th function that code of ours calls inside of a hook, be it ours or torch's."""
    left = after

    def profile(frame: Any, kind: str, argument: Any) -> None:
        nonlocal left
        caller = frame if kind == "c_call" else frame.f_back
        if (
            kind not in ("call", "c_call")
            or caller is None
            or not caller.f_code.co_filename.startswith(str(PROBES))
        ):
            return
        # What ends a hook is not a measurement: an error there is one of the interpreter's.
        if caller.f_code.co_name in ("__torch_function__", "outside_user_modes", "__exit__"):
            return
        if caller.f_code.co_filename.endswith("hooks.py") or not _inside_a_hook(caller):
            return
        left -= 1
        if left == 0:
            sys.setprofile(None)
            tripped.append(f"{caller.f_code.co_name}:{caller.f_lineno}")
            raise error("no memory for a probe")

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
