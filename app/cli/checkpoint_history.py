"""How does `depthscope probe` turn several checkpoints into one history? Options, progress and what is printed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from depthscope.app.cli.checkpoints import read_as, require_device, site_names
from depthscope.app.cli.model_and_text import read_text, text_name
from depthscope.app.cli.paths import OutputFile, run_endings
from depthscope.app.cli.several_runs import exit_code
from depthscope.app.cli.values import quoted
from depthscope.app.text.terminal import command_line, emit, printable, remark, say, working
from depthscope.diagnostics.errors import InputError


def is_history(args: argparse.Namespace) -> bool:
    """Whether several checkpoints were named, or one folder that contains some."""
    if len(args.checkpoints) > 1 or args.factory is not None:
        return True
    folder = Path(args.checkpoints[0])
    return (
        folder.is_dir()
        and not (folder / "config.json").exists()
        and any((child / "config.json").is_file() for child in folder.iterdir())
    )


@dataclass(frozen=True)
class ProbedRun(OutputFile):
    """Where `depthscope probe` writes: a history is renewed without ``--force``."""

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse a name that cannot be written or is taken; see `Checked.check`."""
        # What is there is looked at later, by what reads runs: it must be a history of checkpoints.
        goes_on = Path(value).exists() and is_history(args)
        super().check(value, option, argparse.Namespace(**{**vars(args), "force": True}) if goes_on else args)


PROBED_RUN = ProbedRun("run", run_endings)


def probe_history(args: argparse.Namespace) -> int:
    """Probe all checkpoints on the same text, and save their history.

    Returns: `FOUND` where a checkpoint was left out.
    """
    given = [name for name in ("shard", "keep", "weights") if getattr(args, name)]
    if given:
        raise InputError(f"--{given[0]} is for one checkpoint; leave it out, or name one")
    text = read_text(args.text)
    with working("importing torch"):
        from depthscope.probes.history import probe_checkpoints
    require_device(args.device)
    with working("probing") as progress:
        found = probe_checkpoints(
            args.checkpoints,
            text,
            args.out,
            factory=args.factory,
            sequences=args.sequences,
            length=args.length,
            batch=args.batch,
            seed=args.seed,
            gradients=args.gradients,
            dtype=args.dtype,
            device=args.device,
            force=args.force,
            attrs={"data": text_name(args.text)},
            progress=progress,
            sites=site_names(args),
            **read_as(args),
        )
    for path, why in found.left_out.items():
        remark(f"left out {quoted(path)}: {why}")
    left_out = [{"checkpoint": path, "why": why} for path, why in found.left_out.items()]
    checkpoints = found.run.attrs["checkpoints"]
    if args.json:
        emit(
            {
                "run": str(found.path),
                "checkpoints": checkpoints,
                "left_out": left_out,
            }
        )
        return exit_code(left_out)
    steps = [str(of["step"]) for of in checkpoints]
    say(
        f"{printable(found.path)}: {len(steps)} checkpoint{'s' * (len(steps) != 1)} of "
        f"{printable(found.run.attrs.get('block'))} models, step {steps[0]} to {steps[-1]}"
    )
    say()
    say(f"Next: {command_line('check', found.path)}")
    say(f"      {command_line('dashboard', found.path)}")
    return exit_code(left_out)
