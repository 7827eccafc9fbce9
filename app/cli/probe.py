"""`depthscope probe`: run a checkpoint on text, save what its streams carried, and judge it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthscope.app.cli.main import FINE, FOUND
from depthscope.app.cli.options import (
    Force,
    Json,
    ModelAndText,
    capture_errors_for_users,
    names,
    option,
    say_cards,
    say_next,
    text_digest,
    with_model,
)
from depthscope.app.text.terminal import emit, printable, remark, say, working
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.memory import give_memory_back

if TYPE_CHECKING:
    import xarray as xr

    from depthscope.app.readings.readings import Reading

SIZES = {
    "depth": "depths",
    "sample": "sequences",
    "token": "tokens",
    "stream": "streams",
    "feature": "features",
}
"""Dimensions of a trace whose sizes are printed, and their names in the output."""


@with_model(several=True)
def probe(
    model: ModelAndText,
    out: Annotated[
        Path | None, option("RUN", "Where to save (.zarr; default the checkpoint's name, in this folder).")
    ] = None,
    gradients: Annotated[
        bool | None,
        typer.Option(
            "--gradients/--no-gradients",
            help="Record the gradient of the loss (default: where labels are taken).",
        ),
    ] = None,
    batch: Annotated[int, option("B", "Sequences per forward, which has their memory.", min=1)] = 2,
    keep: Annotated[
        int | None,
        option("K", "Sequences whose states are stored (default all); sums are over every token.", min=1),
    ] = None,
    settle: Annotated[
        int, option("N", "Most forwards to try repairs of a suspected problem; 0 tries nothing.", min=0)
    ] = 60,
    factory: Annotated[
        str | None,
        option("MODULE:FUNCTION", "Builds the model of several checkpoints that are files of weights."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> int:
    """Run a checkpoint on text and judge it.

    What its streams carried is saved as a run. Several checkpoints, or a folder of them, become one history by step.
    """
    from depthscope.diagnostics import schema

    history = bool(model.others) or factory is not None or _is_folder_of_checkpoints(Path(model.checkpoint))
    place = out or Path(_default_name(model))
    if history:
        return _probe_history(model, place, batch, gradients, factory, force=force, json=json)
    # Before torch is imported and the model is loaded, which takes far longer than this.
    schema.require_replaceable(place, force=force)
    text = model.read_text()
    loaded = model.load()
    # After `load`, which prints that torch is being imported while it is.
    from depthscope import probes
    from depthscope.probes.checkpoints.text_batch import batches_of, token_texts

    tokens = model.batch(loaded, text)
    if gradients is None and "labels" not in tokens:
        remark(f"no gradients: {printable(loaded.name)} takes no labels, so that there is no loss")
    parts = batches_of(tokens, batch)
    with working(f"probing {loaded.name} on {model.text_name}"), capture_errors_for_users():
        run = probes.capture(
            loaded.model,
            _with_memory_given_back(parts),
            gradients="labels" in tokens if gradients is None else gradients,
            **model.read_as,
            sites=names(model.sites),
            max_sequences=keep or model.sequences,
            seed=model.seed,
            token_text=token_texts(loaded, tokens),
            attrs={
                **loaded.attrs,
                "checkpoint": 1,
                "data": model.text_name,
                "data_digest": text_digest(text),
            },
        )
    gc.collect()  # what measured it had the states too
    run = _analysed(run)
    # What cannot be analysed raises no suspicion, and is saved as it was measured.
    if settle and "metrics" in run.children:
        with working("trying what is suspected"), capture_errors_for_users():
            run = probes.settle(run, loaded.model, parts, forwards=settle, **model.read_as)
    path = schema.save_run(run, place, force=force)
    # What comes next needs neither, and a model is as large as its run.
    del loaded, tokens, parts
    _print_saved(run, path, _judged(path), json=json)
    return FINE


def _with_memory_given_back(parts: Sequence[Any]) -> Iterator[Any]:
    """Each part; after it the memory that it took goes back to the system."""
    for part in parts:
        yield part
        give_memory_back()


def _default_name(model: ModelAndText) -> str:
    """A name for the run in the working folder: that of the checkpoint, of several that of their folder."""
    path = Path(model.checkpoint).resolve()
    name = (path.parent if model.others else path).name.removesuffix(".gguf")
    return f"{name.replace(':', '-').replace('@', '-') or 'run'}.zarr"


def _is_folder_of_checkpoints(folder: Path) -> bool:
    return folder.is_dir() and not (folder / "config.json").exists() and any(folder.glob("*/config.json"))


def _analysed(run: xr.DataTree) -> xr.DataTree:
    """The run with its metrics; as it is where it cannot be analysed, which is said when it is judged."""
    from depthscope.app.readings.run_arrays import with_metrics
    from depthscope.diagnostics import analyze, schema

    try:
        with working("analysing") as progress:
            return with_metrics(run, schema.by_chain(analyze(run, progress=progress)))
    except ValueError:
        return run


def _judged(path: Path) -> list[Reading]:
    """The saved run, one reading for each of its chains; none where it cannot be judged, since the run is there."""
    from depthscope.app.readings.readings import read_paths

    try:
        return read_paths([str(path)])[0]
    except ValueError as error:
        remark(f"{path} is saved, and not judged: {error}")
        return []


def _print_saved(run: xr.DataTree, path: Path, readings: Sequence[Reading], *, json: bool) -> None:
    from depthscope.app.tables.findings import cards_of, count_words
    from depthscope.diagnostics import schema

    sizes: dict[str, dict[str, int]] = {}
    for chain in schema.chains(run):
        trace = schema.chain_dataset(run, "trace", chain)
        # A run may have statistics alone.
        known: Any = {} if trace is None else trace.sizes
        sizes[chain or "run"] = {word: known[dim] for dim, word in SIZES.items() if dim in known}
    if json:
        cards = [card.as_dict() for reading in readings for card in cards_of(reading)]
        emit({"run": str(path), "attrs": dict(run.attrs), "sizes": sizes, "findings": cards})
        return
    say(f"{printable(path)}: {printable(run.attrs.get('model'))}, {printable(run.attrs.get('family'))}")
    for chain, size in sizes.items():
        counts = " · ".join(f"{word} {count}" for word, count in size.items())
        say(f"  {counts}" if chain == "run" else f"  {chain}: {counts}")
    _print_caveats(run.attrs)
    for reading in readings:
        say()
        say(f"{printable(reading.name)}: {count_words(reading.findings)}")
        say_cards(reading)
    say_next(path)


def _print_caveats(attrs: Mapping[Any, Any]) -> None:
    """What of the network was not proven or not measured, and what is odd about it."""
    if str(attrs.get("proof", "")).startswith("unproven"):
        say(f"  {printable(attrs['proof'])}")
    for name, heading in (("not_covered", "not covered"), ("remarks", "remark")):
        for part in attrs.get(name, ()):
            say(f"  {heading}: {printable(part['sentence'])}")


def _probe_history(
    model: ModelAndText,
    place: Path,
    batch: int,
    gradients: bool | None,
    factory: str | None,
    *,
    force: bool,
    json: bool,
) -> int:
    """Probe all checkpoints on the same text, and save their history."""
    if model.weights is not None:
        raise InputError(
            "--weights is for one checkpoint; give the files of weights as checkpoints, with --factory"
        )
    text = model.read_text()
    with working("importing torch"):
        from depthscope.probes.history import probe_checkpoints
    with working("probing") as progress:
        found = probe_checkpoints(
            [model.checkpoint, *model.others],
            text,
            str(place),
            factory=factory,
            sequences=model.sequences,
            length=model.length,
            batch=batch,
            seed=model.seed,
            gradients=gradients,
            dtype=model.dtype,
            device=model.device,
            force=force,
            attrs={"data": model.text_name},
            progress=progress,
            sites=names(model.sites),
            **model.read_as,
        )
    for path, why in found.left_out.items():
        remark(f"left out {printable(path, longest=120)}: {why}")
    left_out = [{"checkpoint": path, "why": why} for path, why in found.left_out.items()]
    checkpoints = found.run.attrs["checkpoints"]
    if json:
        emit({"run": str(found.path), "checkpoints": checkpoints, "left_out": left_out})
        return FOUND if left_out else FINE
    steps = [str(of["step"]) for of in checkpoints]
    say(
        f"{printable(found.path)}: {len(steps)} checkpoint{'s' * (len(steps) != 1)} of "
        f"{printable(found.run.attrs.get('block'))} models, step {steps[0]} to {steps[-1]}"
    )
    say()
    say_next(found.path)
    return FOUND if left_out else FINE
