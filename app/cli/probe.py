"""The commands that run a model: probe saves what its streams carried, describe says what was found."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.cli.parser import FINE
from depthscope.app.cli.terminal import emit, say, show_rows, working
from depthscope.diagnostics import schema

DESCRIBED = {"sequences": 2, "length": 32}


def probe(args: argparse.Namespace) -> int:
    """Run a checkpoint on text and save the run.

    Parameters
    ----------
    args : Namespace
        ``checkpoint, text, out`` and how to run.

    Returns
    -------
    int
        Exit code.

    Raises
    ------
    ValueError
        For an ending of ``out`` that is no run's, an empty text, or a model that cannot be probed.
    """
    _require_run_name(args.out)
    text = read_text(args.text)
    with working("importing torch"):
        from depthscope import probes
        from depthscope.probes.checkpoints.load import encode_text, token_texts
    loaded = _load(args)
    batch = encode_text(loaded, text, sequences=args.sequences, length=args.length, seed=args.seed)
    with working(f"probing {loaded.name}"), user_errors():
        run = probes.capture(
            loaded.model,
            batch,
            gradients=args.gradients,
            layers=args.layers,
            layout=args.layout,
            streams=args.streams,
            sites=_sites(args),
            max_sequences=args.sequences,
            seed=args.seed,
            token_text=token_texts(loaded, batch),
            attrs=_provenance(loaded, args.text, text),
        )
    path = schema.save_run(run, args.out)
    _print_saved(run, path, args)
    return FINE


def _sites(args: argparse.Namespace) -> list[str] | None:
    return None if args.sites is None else [name.strip() for name in args.sites.split(",")]


def _require_run_name(out: str) -> None:
    if not out.endswith(schema.SUFFIXES):
        raise ValueError(
            f"--out {out!r} is no run; expected a name that ends in {', '.join(schema.SUFFIXES)}"
        )


def read_text(source: str) -> str:
    """The text of a file, or of stdin for ``-``.

    Parameters
    ----------
    source : str
        Path or ``-``.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        For text that is empty or not UTF-8.
    """
    raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{source} holds no text; expected a few thousand words of UTF-8")
    return text


def _load(args: argparse.Namespace) -> Any:
    from depthscope.probes.checkpoints.load import load_checkpoint

    with working(f"loading {args.checkpoint}"):
        return load_checkpoint(args.checkpoint, weights=args.weights, dtype=args.dtype, device=args.device)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a refused capture into an error for people, without a traceback.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        With the words of the refusal.
    """
    from depthscope.probes.model.arguments import CaptureError

    try:
        yield
    except CaptureError as error:
        raise ValueError(str(error)) from error


def _provenance(loaded: Any, source: str, text: str) -> dict[str, str]:
    return {
        "model": loaded.name,
        "weights_digest": loaded.digest,
        "data": "stdin" if source == "-" else Path(source).name,
        "data_digest": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
    }


def _print_saved(run: xr.DataTree, path: Path, args: argparse.Namespace) -> None:
    sizes = {
        chain or "run": _sizes(schema.chain_dataset(run, "trace", chain)) for chain in schema.chains(run)
    }
    if args.json:
        emit({"run": str(path), "attrs": dict(run.attrs), "sizes": sizes})
        return
    say(f"{path}: {run.attrs.get('model')}, {run.attrs.get('family')}")
    for chain, size in sizes.items():
        said = " · ".join(f"{name} {count}" for name, count in size.items())
        say(f"  {said}" if chain == "run" else f"  {chain}: {said}")
    say()
    say(f"Next: depthscope check {path}")
    say(f"      depthscope dashboard {path}")


def _sizes(trace: xr.Dataset | None) -> dict[str, int]:
    dims = {
        "depth": "depths",
        "sample": "sequences",
        "token": "tokens",
        "stream": "streams",
        "feature": "features",
    }
    return (
        {}
        if trace is None
        else {words: trace.sizes[dim] for dim, words in dims.items() if dim in trace.sizes}
    )


def describe(args: argparse.Namespace) -> int:
    """Say what was found in a checkpoint: family, blocks, streams, layout, sites.

    Parameters
    ----------
    args : Namespace
        ``checkpoint`` and how to run, or ``weights_only``.

    Returns
    -------
    int
        Exit code.
    """
    if args.weights_only:
        return _describe_weights(args)
    with working("importing torch"):
        from depthscope import probes
        from depthscope.probes.checkpoints.load import encode_text, sample_text
    loaded = _load(args)
    batch = encode_text(loaded, sample_text(), seed=args.seed, **DESCRIBED)
    given = {
        name: getattr(args, name)
        for name in ("layers", "layout", "streams")
        if getattr(args, name) is not None
    }
    with user_errors():
        found = probes.describe(loaded.model, batch, sites=_sites(args), **given)
    if args.json:
        emit({"checkpoint": args.checkpoint, "name": loaded.name, "digest": loaded.digest, **found.as_dict()})
    else:
        say(str(found))
    return FINE


def _describe_weights(args: argparse.Namespace) -> int:
    to_run = [
        name
        for name in ("weights", "layers", "layout", "streams", "sites", "dtype")
        if getattr(args, name) is not None
    ]
    if to_run:
        raise ValueError(
            f"--{', --'.join(to_run)} and --weights-only do not go together: no model is built or run; leave one out"
        )
    with working("importing torch"):
        from depthscope.probes.static import page
        from depthscope.probes.static.describe import describe_weights
    found = describe_weights(args.checkpoint)
    if args.json:
        emit(found.as_dict())
        return FINE
    say(page.heading(found))
    if found.connections:
        say()
        show_rows(page.COLUMNS, page.rows(found))
        say()
        say(page.ending(found))
    return FINE
