"""`depthscope watch`: run a training script as it is, and record the first model that it trains."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthscope.app.cli.main import FINE, FOUND, INTERRUPTED
from depthscope.app.cli.options import names, option
from depthscope.app.text.terminal import command_line, printable
from depthscope.diagnostics.errors import AbsentError, InputError

if TYPE_CHECKING:
    from depthscope.probes.training.watched_script import ScriptWatch


def watch(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="Python file of the training, or with -m a module.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARGS", help="What follows SCRIPT is passed on to it; our options come before it."
        ),
    ] = None,
    out: Annotated[Path, option("DIR", "Folder of the live store.")] = Path("runs/watched"),
    every: Annotated[int, option("N", "Measure every N-th step.", min=1)] = 50,
    module: Annotated[
        bool, typer.Option("--module", "-m", help="SCRIPT is a module, run as python -m does.")
    ] = False,
    layers: Annotated[str | None, option("PATH", "Module path of the blocks (default: found).")] = None,
    sites: Annotated[str | None, option("NAMES", "Sites to record (default: all states).")] = None,
    stop_on: Annotated[
        str | None,
        option("warn|fail", "End the training with exit code 1 at the first finding of this severity."),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients/--no-gradients", help="Measure backwards too.")
    ] = True,
    weights: Annotated[bool, typer.Option("--weights", help="Measure updates of the weights too.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the existing store after its last row.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start over, and delete the rows of an existing store.")
    ] = False,
) -> int:
    """Record a training script as it is.

    The first model that it trains is recorded while it trains, into a live store.
    """
    from depthscope.diagnostics.schema import LiveRows, is_live_store
    from depthscope.diagnostics.schema.live_store import require_live_place
    from depthscope.probes.training.notices import TrainingStopped
    from depthscope.probes.training.watched_script import ScriptWatch

    if stop_on not in (None, "warn", "fail"):
        raise InputError(f"--stop-on {printable(stop_on, longest=40)!r}; expected warn or fail")
    if not module and not Path(script).is_file():
        raise AbsentError(
            f"no script at {printable(script, longest=200)}; name a Python file, or a module with -m"
        )
    require_live_place(str(out), resume=resume, force=force)
    options: dict[str, Any] = {
        "every": every,
        "gradients": gradients,
        "weights": weights,
        "metrics": "live",
        "stop_on": stop_on,
        "layers": layers,
        "sites": names(sites),
    }
    # Under torchrun every rank runs the script, and one of them writes.
    if os.environ.get("RANK", "0") == "0":
        options |= {"store": str(out), "resume": resume, "force": force}
    if resume and is_live_store(out):
        last = LiveRows(out).last_step
        if last is not None:
            options["first_step"] = last + 1
    watched = ScriptWatch(**options)
    words = list(arguments or ())
    try:
        watched.run(script, words[1:] if words[:1] == ["--"] else words, is_module=module)
    except TrainingStopped as stopped:
        sys.stderr.write(f"depthscope: {printable(str(stopped))}\n")
        return FOUND
    except (Exception, KeyboardInterrupt) as error:
        # The script's own error, printed as Python prints it; SystemExit is its exit code.
        traceback.print_exc()
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FOUND
    finally:
        sys.stderr.write(f"depthscope: {printable(_outcome(watched, str(out)))}\n")
    return FINE if watched.recorder is not None and watched.recorder.measured_steps else FOUND


def _outcome(watched: ScriptWatch, out: str) -> str:
    if watched.error:
        return watched.error
    recorder = watched.recorder
    if recorder is None:
        return (
            "nothing was recorded: no optimizer updated the parameters of a module that had been called with a graph, outside "
            "of compiled functions; record it from within, with depthscope.record"
        )
    num_steps = len(recorder.measured_steps)
    if num_steps:
        return f"recorded {num_steps} steps of {watched.model}; read them with: {command_line('check', out)}"
    if recorder.errors:
        return f"no step of {watched.model} was measured: {recorder.errors[0]}"
    return (
        f"no step of {watched.model} was measured: the script ended at step {recorder.position}, before one that was to be "
        "measured; choose a smaller --every"
    )
