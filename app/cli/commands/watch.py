"""`depthscope watch`: run a training script as it is, and record the first model that it trains."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.arguments import add_layers, add_out_folder
from depthscope.app.cli.checkpoints import add_sites, site_names
from depthscope.app.cli.command import FINE, FOUND, INTERRUPTED, Command
from depthscope.app.cli.paths import InputPath
from depthscope.app.cli.process import interrupts_as_python_has_them
from depthscope.app.cli.values import Number, Text
from depthscope.app.text.terminal import command_line, printable

if TYPE_CHECKING:
    from depthscope.probes.training.watched_script import ScriptWatch


class Script(InputPath):
    """A Python file; with ``-m`` the name of a module."""

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse what is no file; see `Checked.check`."""
        if not args.module:
            super().check(value, option, args)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "script", metavar="SCRIPT", type=Script(), help="Python file of the training, or with -m a module"
    )
    parser.add_argument(
        "arguments",
        metavar="ARGS",
        nargs="*",
        default=[],
        type=Text(),
        help="arguments of the script, after --; options of this command come before SCRIPT",
    )
    add_out_folder(parser, about="folder of the live store (default runs/watched)", default="runs/watched")
    parser.add_argument(
        "--every",
        type=Number(1, 10**9),
        default=50,
        metavar="N",
        help="measure every N-th step (default 50)",
    )
    parser.add_argument(
        "-m",
        "--module",
        action="store_true",
        help="SCRIPT is the name of a module, such as package.train, that is run as python -m does",
    )
    add_layers(parser)
    add_sites(parser)
    parser.add_argument(
        "--stop-on",
        choices=("warn", "fail"),
        default=None,
        help="end the training, with exit code 1, at the first step with a finding of this severity",
    )
    parser.add_argument(
        "--no-gradients", dest="gradients", action="store_false", help="measure only forwards"
    )
    parser.add_argument("--weights", action="store_true", help="measure updates of the weights too")
    parser.add_argument(
        "--resume", action="store_true", help="continue the existing store after its last row"
    )
    parser.add_argument(
        "--force", action="store_true", help="start over, and delete the rows of an existing store"
    )


def _run(args: argparse.Namespace) -> int:
    from depthscope.diagnostics.schema import is_live_store
    from depthscope.diagnostics.schema.live_store import require_live_place
    from depthscope.diagnostics.schema.live_store_history import read_history
    from depthscope.probes.training.live.findings import TrainingStopped
    from depthscope.probes.training.watched_script import ScriptWatch

    require_live_place(args.out, resume=args.resume, force=args.force)
    options: dict[str, Any] = {
        "every": args.every,
        "gradients": args.gradients,
        "weights": args.weights,
        "metrics": "live",
        "stop_on": args.stop_on,
        "layers": args.layers,
        "sites": site_names(args),
    }
    # Under torchrun every rank runs the script, and one of them writes.
    if os.environ.get("RANK", "0") == "0":
        options |= {"store": args.out, "resume": args.resume, "force": args.force}
    if args.resume and is_live_store(args.out):
        last = read_history(Path(args.out)).last_step
        if last is not None:
            options["first_step"] = last + 1
    watch = ScriptWatch(**options)
    try:
        with interrupts_as_python_has_them():
            watch.run(args.script, args.arguments, is_module=args.module)
    except TrainingStopped as stopped:
        sys.stderr.write(f"depthscope: {printable(str(stopped))}\n")
        return FOUND
    except (Exception, KeyboardInterrupt) as error:
        # The script's own error, printed as Python prints it; SystemExit is its exit code.
        traceback.print_exc()
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FOUND
    finally:
        sys.stderr.write(f"depthscope: {printable(_outcome(watch, args.out))}\n")
    return FINE if watch.recorder is not None and watch.recorder.measured_steps else FOUND


def _outcome(watch: ScriptWatch, out: str) -> str:
    if watch.error:
        return watch.error
    recorder = watch.recorder
    if recorder is None:
        return (
            "nothing was recorded: no optimizer updated the parameters of a module that had been called with a graph, outside "
            "of compiled functions; record it from within, with depthscope.record"
        )
    num_steps = len(recorder.measured_steps)
    if num_steps:
        return f"recorded {num_steps} steps of {watch.model}; read them with: {command_line('check', out)}"
    if recorder.errors:
        return f"no step of {watch.model} was measured: {recorder.errors[0]}"
    return (
        f"no step of {watch.model} was measured: the script ended at step {recorder.position}, before one that was to be "
        "measured; choose a smaller --every"
    )


COMMAND = Command(
    "watch", "run a training script as it is, and record the first model it trains", _add_arguments, _run
)
