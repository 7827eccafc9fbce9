"""`depthscope watch`: run a training script as it is, and record the first model that it trains."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from depthscope.app.cli.arguments import add_out_folder
from depthscope.app.cli.command import FINE, FOUND, Command
from depthscope.app.cli.paths import InputText
from depthscope.app.cli.values import Number, Text
from depthscope.app.text.terminal import command_line, printable

if TYPE_CHECKING:
    from depthscope.probes.training.watched_script import ScriptWatch


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", metavar="SCRIPT", type=InputText(), help="Python file of the training")
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
        help="measure one step in so many (default 50)",
    )
    parser.add_argument(
        "--no-gradients", dest="gradients", action="store_false", help="measure forwards alone"
    )
    parser.add_argument("--weights", action="store_true", help="measure updates of the weights too")
    parser.add_argument(
        "--resume", action="store_true", help="go on in the store that is there, after its last row"
    )
    parser.add_argument(
        "--force", action="store_true", help="begin anew where a store is, whose rows are lost"
    )


def _run(args: argparse.Namespace) -> int:
    from depthscope.diagnostics.schema import is_live_store
    from depthscope.diagnostics.schema.live_store import require_live_place
    from depthscope.diagnostics.schema.live_store_history import read_history
    from depthscope.probes.training.watched_script import ScriptWatch

    require_live_place(args.out, resume=args.resume, force=args.force)
    options = {"every": args.every, "gradients": args.gradients, "weights": args.weights}
    # Under torchrun every rank runs the script, and one of them writes.
    if os.environ.get("RANK", "0") == "0":
        options |= {"store": args.out, "resume": args.resume, "force": args.force}
    if args.resume and is_live_store(args.out):
        last = read_history(Path(args.out))[0].last_step
        options["first_step"] = 1 if last is None else last + 1
    watch = ScriptWatch(**options)
    try:
        watch.run(Path(args.script), args.arguments)
    except Exception:  # the script's, told as Python tells it; SystemExit is its exit code
        traceback.print_exc()
        return FOUND
    finally:
        sys.stderr.write(f"depthscope: {printable(_outcome(watch, args.out))}\n")
    return FINE if watch.model else FOUND


def _outcome(watch: ScriptWatch, out: str) -> str:
    if watch.error:
        return watch.error
    if not watch.model:
        return (
            "nothing was recorded: no optimiser updated the parameters of a module that had been called in training mode; "
            "record it from within, with depthscope.record"
        )
    return f"recorded {watch.model}; read it with: {command_line('check', out)}"


COMMAND = Command(
    "watch", "run a training script as it is, and record the first model it trains", _add_arguments, _run
)
