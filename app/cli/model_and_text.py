"""On which model and text does an experiment run? A checkpoint and a text, or those of a saved run, which it must be."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.arguments import add_json
from depthscope.app.cli.checkpoints import add_checkpoint, capture_errors_for_users, load, read_as
from depthscope.app.cli.paths import InputPath, InputText, OutputFile, read_bounded, run_endings
from depthscope.app.cli.values import Number, quoted
from depthscope.app.text.terminal import Progress, printable, working
from depthscope.diagnostics.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

    from depthscope.probes.checkpoints.load import LoadedModel

SEQUENCES, LENGTH = 8, 128

SAMPLE_TEXT = "pydoc_data.topics"
"""The module of Python whose text is run where none is given."""


def _endings() -> list[str]:
    from depthscope.diagnostics.experiments import SUFFIX  # costs xarray

    return [SUFFIX]


RESULT_FILE = OutputFile("result", _endings, "result.zip")
"""The result of experiments that is written."""


@dataclass(frozen=True)
class Subject:
    """What an experiment runs on.

    ``loaded``: the model.
    ``batch``: of `encode_text`.
    ``token_text``: text of every token.
    ``run``: the run that it belongs to.
    ``data_digest``: of the run's text.
    """

    loaded: LoadedModel
    batch: dict[str, Any]
    token_text: np.ndarray
    run: Path | None
    data_digest: str | None = None


def add_subject(parser: argparse.ArgumentParser) -> None:
    """A checkpoint or a run, its text, and where the result goes."""
    add_checkpoint(parser)
    parser.add_argument(
        "--model",
        type=InputPath(must_exist=False),
        metavar="CHECKPOINT",
        help="the checkpoint of the run, where a run file is given in place of CHECKPOINT",
    )
    parser.add_argument(
        "--text",
        type=InputText(),
        metavar="FILE",
        help="UTF-8 text to run, at most 100 MB; - for stdin; of a run: its text (default: English that comes with Python)",
    )
    parser.add_argument(
        "--sequences",
        type=Number(2, 100_000),
        metavar="N",
        help=f"sequences (default {SEQUENCES}, or the run's)",
    )
    parser.add_argument(
        "--length",
        type=Number(2, 2**20),
        metavar="T",
        help=f"tokens per sequence (default {LENGTH}, or the run's)",
    )
    parser.add_argument(
        "--out",
        type=RESULT_FILE,
        metavar="FILE",
        help="where to save (.zip); of a run: next to it by default",
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --out where it exists")
    add_json(parser)


def open_subject(args: argparse.Namespace) -> Subject:
    """The model and the batch that the arguments name.

    Raises InputError: Where a run does not say what it was made from, or the checkpoint or the text is another one.
    """
    if args.sites is not None:
        raise InputError("--sites chooses what a run keeps; experiments change every state, so leave it out")
    text = read_text(args.text)
    run, recorded = _recorded(args)
    if run is not None:
        _require_same_text(text, recorded)
        args.checkpoint = _checkpoint_of(args, recorded)
    loaded = load(args)
    if run is not None and recorded.get("weights_digest") not in (None, loaded.digest):
        raise InputError(
            f"{quoted(args.checkpoint)} has other weights ({loaded.digest[:19]}…) than the run was made with "
            f"({printable(recorded['weights_digest'])[:19]}…); name the run's own checkpoint with --model"
        )
    from depthscope.probes.checkpoints.text_batch import encode_text, token_texts

    batch = encode_text(
        loaded,
        text,
        sequences=args.sequences or recorded.get("sequences", SEQUENCES),
        length=args.length or recorded.get("length", LENGTH),
        seed=recorded.get("seed", args.seed),
    )
    return Subject(loaded, batch, token_texts(loaded, batch), run, recorded.get("data_digest"))


def text_name(source: str | None) -> str:
    """The name of a text for the attributes of a run: no path, which tells who its author is."""
    if source is None:
        return SAMPLE_TEXT
    return "stdin" if source == "-" else Path(source).name


def read_text(source: str | None) -> str:
    """The text of a file, of stdin for ``-``, or for None English that comes with Python."""
    if source is None:
        with working("importing torch"):
            from depthscope.probes.checkpoints.text_batch import sample_text
        return sample_text()
    raw = read_bounded(source)
    try:
        # No guess at another encoding: wrong characters would be other tokens, without an error.
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise InputError(f"{source} contains no text; expected a few thousand words of UTF-8")
    return text


def _recorded(args: argparse.Namespace) -> tuple[Path | None, dict[str, Any]]:
    """The run file among the arguments, and its attributes; nothing for a checkpoint."""
    if not args.checkpoint.endswith(tuple(run_endings())):
        if args.model is not None:
            raise InputError(
                f"--model names the checkpoint of a run, but {quoted(args.checkpoint)} is not a run file; leave --model out"
            )
        return None, {}
    from depthscope.diagnostics import schema

    with schema.open_run(args.checkpoint) as run:
        recorded: dict[str, Any] = {str(name): value for name, value in run.attrs.items()}
        for chain in schema.chains(run)[:1]:
            trace = schema.chain_dataset(run, "trace", chain)
            if trace is not None:
                recorded |= {"sequences": trace.sizes["sample"], "length": trace.sizes["token"]}
    return Path(args.checkpoint), recorded


def _checkpoint_of(args: argparse.Namespace, recorded: dict[str, Any]) -> str:
    if args.model is not None:
        return str(args.model)
    # A run keeps no path, which would tell whose machine it was made on; the packaged model has none.
    if recorded.get("model") == "SmolLM2-135M":
        return "smollm2"
    if recorded.get("repository") and recorded.get("repository_commit"):
        return f"{recorded['repository']}@{recorded['repository_commit']}"
    digest = recorded.get("weights_digest")
    weights = f" with weights {printable(digest)[:19]}…" if digest else ""
    raise InputError(
        f"the run was made of {printable(recorded.get('model', 'a model'))}{weights}, and does not say where that is; name "
        "the checkpoint with --model"
    )


def _require_same_text(text: str, recorded: dict[str, Any]) -> None:
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    known = str(recorded.get("data_digest", ""))
    # Of a run that was captured in Python it is a digest of token ids, which a text cannot be compared with.
    if known.startswith("sha256:") and known != digest:
        raise InputError(
            f"--text is another text than the run's ({printable(recorded.get('data', 'unnamed'))}, {known[:19]}…); expected "
            "the same, or a checkpoint in place of the run"
        )


def measured(
    args: argparse.Namespace,
    what: str,
    doing: str,
    measure: Callable[[Subject, dict[str, Any], Progress], xr.Dataset],
) -> tuple[xr.Dataset, Path | None]:
    """The result of an experiment, saved at ``--out``, or next to its run; no path where neither is given.

    ``what``: the experiment's name, which the name of its file has; ``doing``: what is printed meanwhile.
    ``measure``: takes the subject, how its model is read, and what shows the progress.
    """
    # An existing result is refused before any work.
    is_run = args.checkpoint.endswith(tuple(run_endings()))
    _result_place(Path(args.checkpoint) if is_run else None, args, what)
    subject = open_subject(args)
    with working(f"{doing} {subject.loaded.name}") as progress, capture_errors_for_users():
        result = measure(subject, read_as(args), progress)
    result.attrs.update(subject.loaded.attrs)
    from depthscope.diagnostics.experiments import save_result

    place = _result_place(subject.run, args, what)
    return result, None if place is None else save_result(result, place)


def _result_place(run: Path | None, args: argparse.Namespace, what: str) -> Path | None:
    """Where the result goes; an existing one is refused without ``--force``."""
    from depthscope.diagnostics.experiments import result_path

    if args.out is not None:
        return Path(args.out)
    if run is None:
        return None
    place = result_path(run, what)
    if place.exists() and not args.force:
        raise InputError(f"{place} exists; name another file with --out, or add --force to replace it")
    return place
