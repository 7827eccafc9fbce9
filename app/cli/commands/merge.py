"""`depthscope merge`: join the runs of the parts of a corpus into the run of all of it."""

from __future__ import annotations

import argparse

from depthscope.app.cli.arguments import RUN_FILE, add_json, add_max_bytes, add_out
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.paths import InputRun
from depthscope.app.text.terminal import command_line, emit, printable, say, working


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=InputRun(), help="the runs of all parts, in any order"
    )
    add_max_bytes(parser)
    add_out(parser, RUN_FILE, metavar="RUN", about="where to save (.zarr or .zarr.zip)")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.diagnostics import schema

    schema.require_replaceable(args.out, force=args.force)
    # Streamed sums are added by torch.
    with working("importing torch"):
        from depthscope.probes.run.merge import merge_runs
    with working(f"merging {len(args.runs)} runs"):
        runs = [schema.open_run(path, max_bytes=args.max_bytes) for path in args.runs]
        merged = merge_runs(runs)
        path = schema.save_run(merged, args.out, force=args.force)
    sampling = merged.attrs.get("sampling", {})
    if args.json:
        emit({"run": str(path), "merged_runs": len(runs), "attrs": dict(merged.attrs)})
        return FINE
    say(
        f"{printable(path)}: {len(runs)} runs of {printable(merged.attrs.get('model'))}, "
        f"{sampling.get('sequences_seen')} sequences, the states of {sampling.get('sequences_kept')} of them"
    )
    if "merged_without" in merged.attrs:
        say(f"  without {printable(merged.attrs['merged_without'])}")
    say()
    say(f"Next: {command_line('check', path)}")
    return FINE


COMMAND = Command("merge", "join the runs of the parts of a corpus into one", _add_arguments, _run)
