"""What does one text show in all checkpoints of a training? Each is probed once, and all become one history."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.analysis.analyze import analyze
from depthscope.diagnostics.atomic_writes import made_folder
from depthscope.diagnostics.errors import InputError, TakenError
from depthscope.diagnostics.schema import storable_attributes
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.checkpoints.load import LoadedModel, load_checkpoint
from depthscope.probes.checkpoints.text_batch import batches_of, encode_text, token_texts
from depthscope.probes.checkpoints.user_code import is_model_error, own_error
from depthscope.probes.history.assembly import CHECKPOINTS, assembled
from depthscope.probes.history.references import (
    SAMPLED,
    compared_states,
    sampled_states,
    weight_distances,
    weights_of,
)
from depthscope.probes.history.steps import expanded, in_order
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.one_shot import capture
from depthscope.probes.session.options import SiteOptions, takes_options

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class History:
    """A history of checkpoints, and those that are not in it.

    ``run``: the history.
    ``path``: where it was saved.
    ``left_out``: path of a checkpoint to why it could not be probed.
    ``num_probed``: how many were probed now; the others had been before.
    """

    run: xr.DataTree
    path: Path
    left_out: dict[str, str] = field(default_factory=dict)
    num_probed: int = 0


@takes_options(SiteOptions)
def probe_checkpoints(
    checkpoints: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    text: str,
    out: str | os.PathLike[str],
    *,
    factory: str | None = None,
    sequences: int = 8,
    length: int = 256,
    batch: int | None = None,
    seed: int = 0,
    gradients: bool | None = None,
    metrics: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    force: bool = False,
    attrs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Unpack[SiteOptions],
) -> History:
    """Probe all checkpoints of a training on the same text, and save their history.

    A run whose metrics and statistics have a ``step`` for each checkpoint, with the distance of its weights and states from
    the first checkpoint and the CKA to the first and to the last one. What was measured of each checkpoint is saved next to
    the history (``NAME.checkpoints``): called again, only new, changed and formerly broken checkpoints are probed. Memory is
    that of two models and one run.

    Parameters
    ----------
    checkpoints : sequence of path-like, or one folder that contains them
        As of `load_checkpoint`; the step is in ``trainer_state.json``, or in the name. In any order.
    text : str
        What all of them read.
    out : path-like
        Where the history is saved.
    factory : str, optional
        ``package.module:function`` that builds the model: then each checkpoint is a file of its weights.
    sequences, length, seed : int
        As of `encode_text`.
    batch : int, optional
        Sequences a forward; all in one by default.
    gradients : bool, optional
        Also the gradient of the loss; by default where the model takes labels.
    metrics : sequence of str, optional
        Those of an analysis; its default ones by default.
    dtype, device : str
        As of `load_checkpoint`.
    force : bool
        Replace a file at ``out`` that is no history.
    attrs : mapping, optional
        Attributes to add.
    progress : function, optional
        Called with (checkpoint, number done, number in all).
    **options
        Some options of `Options`.

    Returns
    -------
    History
        With the reasons of checkpoints that could not be loaded or probed.

    Raises
    ------
    InputError
        Where two are of one step, or none could be probed.
    TakenError
        Where something else is at ``out``.
    """
    place = Path(out)
    given = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else checkpoints
    ordered, left_out = in_order(expanded([os.fspath(each) for each in given]))
    _require_place(place, force=force)
    attrs = storable_attributes(attrs)
    folder = parts_folder(place)
    made_folder(folder)
    settings = {
        **{"sequences": sequences, "length": length, "batch": batch, "seed": seed, "gradients": gradients},
        **{"dtype": dtype, "factory": factory, "metrics": None if metrics is None else list(metrics)},
        **{name: value if value is None else str(value) for name, value in options.items()},
        "text": hashlib.sha256(text.encode()).hexdigest(),
    }
    prober = _Prober(text, settings, {**options}, device, attrs)
    progress = progress or (lambda name, done, total: None)
    done = _measure_all(prober, ordered, folder, left_out, progress)
    paths, last = dict(ordered), max(done)
    states = prober.states_of(last, paths[last], place)
    facts: dict[str, Any] = {
        CHECKPOINTS: [
            {"step": step, "name": Path(paths[step]).name, "weights_digest": part.attrs["weights_digest"]}
            for step, part in done.items()
        ]
    }
    if left_out:
        facts["checkpoints_left_out"] = {Path(path).name: why for path, why in left_out.items()}
    run = assembled(list(done.values()), states, facts)
    schema.save_run(run, place, force=True)
    progress("", len(ordered), len(ordered))
    return History(run, place, left_out, prober.num_probed)


def _measure_all(
    prober: _Prober,
    ordered: Sequence[tuple[int, str]],
    folder: Path,
    left_out: dict[str, str],
    progress: Progress,
) -> dict[int, xr.DataTree]:
    """What was measured of each checkpoint, by its step; those that could not be probed are added to ``left_out``."""
    done: dict[int, xr.DataTree] = {}
    for number, (step, path) in enumerate(ordered):
        progress(Path(path).name, number, len(ordered))
        try:
            done[step] = prober.measure(step, path, folder)
        except (CaptureError, ValueError, OSError) as error:
            left_out[path] = str(error)
        # The model's own code may raise anything; every other error is ours.
        except Exception as error:
            if not is_model_error(error):
                raise
            left_out[path] = own_error("the model", error)
    if not done:
        reasons = "; ".join(f"{path}: {why}" for path, why in left_out.items())
        raise InputError(f"no checkpoint could be probed ({reasons})")
    return done


def _require_place(place: Path, *, force: bool) -> None:
    """A history is renewed without being asked; anything else is only replaced with force."""
    if place.exists() and not force:
        try:
            with schema.open_run(place) as found:
                is_history = CHECKPOINTS in found.attrs
        except schema.SchemaError:
            is_history = False
        if not is_history:
            raise TakenError(
                f"{place} exists and is not a history of checkpoints; name another file, or replace it with force"
            )
    schema.require_replaceable(place, force=True)


@dataclass
class _Prober:
    """Measures one checkpoint after the other, each against the first."""

    text: str
    settings: dict[str, Any]
    options: dict[str, Any]
    device: str
    attrs: dict[str, Any]
    num_probed: int = 0
    _first: tuple[str, str] | None = None  # path and fingerprint of the first one that could be probed
    _first_states: dict[str, np.ndarray] = field(default_factory=dict)  # by chain
    _first_weights: dict[str, torch.Tensor] | None = None
    _newest: tuple[int, xr.DataTree] | None = None  # that was probed now, with its trace

    def measure(self, step: int, path: str, folder: Path) -> xr.DataTree:
        """What was measured of a checkpoint, before or now, without its states."""
        options = self._options_of(path)
        place = part_path(folder, step)
        part = open_part(place, options)
        if part is None:
            part = without_trace(self._probe(step, path, options))
            schema.save_run(part, place, force=True)
        if self._first is None:
            self._first = (path, fingerprint(path))
            self._first_states = {
                chain: _statistics(part, chain)[SAMPLED].values[0] for chain in schema.chains(part)
            }
        return part

    def states_of(self, step: int, path: str, history: Path) -> xr.DataTree:
        """The run of the last checkpoint with its trace: as probed now, or of the history that is there already."""
        if self._newest is not None and self._newest[0] == step:
            return self._newest[1]
        options = self._options_of(path)
        if history.exists():
            with schema.open_run(history) as opened:
                if opened.attrs.get(HISTORY_OPTIONS) == options and "trace" in opened.children:
                    return opened.load()
        return self._probe(step, path, options)

    def _options_of(self, path: str) -> dict[str, Any]:
        mark = fingerprint(path)
        return {**self.settings, "checkpoint": mark, "reference": self._first[1] if self._first else mark}

    def _load(self, path: str) -> LoadedModel:
        spec, weights = (path, None) if self.settings["factory"] is None else (self.settings["factory"], path)
        return load_checkpoint(spec, weights=weights, dtype=self.settings["dtype"], device=self.device)

    def _probe(self, step: int, path: str, options: Mapping[str, Any]) -> xr.DataTree:
        """The run of one checkpoint with its metrics and its distances from the first one."""
        loaded = self._load(path)
        if self._first_weights is None:
            # That of an earlier call is only loaded where something is left to compare with it.
            same = self._first is None or self._first[0] == path
            self._first_weights = weights_of(loaded.model if same else self._load(self._first[0]).model)  # type: ignore[index]
        wanted = self.settings
        batch = encode_text(
            loaded, self.text, sequences=wanted["sequences"], length=wanted["length"], seed=wanted["seed"]
        )
        asked = wanted["gradients"]
        run = capture(
            loaded.model,
            batches_of(batch, wanted["batch"]),
            gradients="labels" in batch if asked is None else asked,
            max_sequences=wanted["sequences"],
            seed=wanted["seed"],
            token_text=token_texts(loaded, batch),
            attrs={
                "model": loaded.name,
                "weights_digest": loaded.digest,
                "data_digest": f"sha256:{wanted['text']}",
                "step": step,
                **self.attrs,
                HISTORY_OPTIONS: dict(options),
            },
            **self.options,
        )
        self._require_same_depths(run)
        measured = self._measured(run, step, loaded)
        self.num_probed += 1
        self._newest = (step, measured)
        return measured

    def _require_same_depths(self, run: xr.DataTree) -> None:
        for chain, states in self._first_states.items():
            trace = schema.chain_dataset(run, "trace", chain)
            shape = None if trace is None else (trace.sizes["depth"], trace.sizes["feature"])
            if shape != (len(states), states.shape[-1]):
                raise InputError(
                    f"it has {shape} depths and features{f' of {chain}' if chain else ''}, the first checkpoint "
                    f"{(len(states), states.shape[-1])}; expected checkpoints of one training"
                )

    def _measured(self, run: xr.DataTree, step: int, loaded: LoadedModel) -> xr.DataTree:
        """The run with its step, its metrics, and what compares it with the first checkpoint."""
        nodes = dict(run.to_dict())
        analysis = analyze(run, metrics=self.settings["metrics"])
        for number, chain in enumerate(schema.chains(run)):
            trace = schema.chain_dataset(run, "trace", chain)
            assert trace is not None
            states = sampled_states(trace)
            cka, distance = compared_states(states, self._first_states.get(chain, states))
            variables: dict[str, Any] = {
                "first_state_cka": (schema.DEPTH_STEP, cka[None]),
                "first_state_distance": (schema.DEPTH_STEP, distance[None]),
                SAMPLED: (("step", "depth", "sampled", "feature"), states[None]),
            }
            coords: dict[str, Any] = {}
            if number == 0:  # the weights of all chains, once
                assert self._first_weights is not None
                of_weights, coords = weight_distances(loaded.model, self._first_weights, trace)
                variables |= of_weights
            place = f"/{group_path('statistics', chain)}"
            nodes[place] = nodes[place].assign_coords(step=[step], **coords).assign(variables)
            of_chain = analysis if isinstance(analysis, xr.Dataset) else analysis[chain].to_dataset()
            nodes[f"/{group_path('metrics', chain)}"] = of_chain
        return xr.DataTree.from_dict(nodes)


def _statistics(part: xr.DataTree, chain: str) -> xr.Dataset:
    found = schema.chain_dataset(part, "statistics", chain)
    assert found is not None
    return found


ENDING = ".checkpoints"
HISTORY_OPTIONS = "history_options"
"""Attribute of a part: how it was measured. One that was measured in another way is measured again."""

_PART = re.compile(r"step-(\d{15})\.zarr")


def parts_folder(out: Path) -> Path:
    """The folder of the parts of a history."""
    folder = out.with_name(schema.without_suffix(out.name) + ENDING)
    foreign = (
        [child.name for child in folder.iterdir() if not _PART.fullmatch(child.name)]
        if folder.exists()
        else []
    )
    if foreign:
        raise TakenError(
            f"{folder} contains {foreign[0]}, which is not a part of a history; move it away, or name another --out"
        )
    return folder


def part_path(folder: Path, step: int) -> Path:
    """The file of one checkpoint."""
    return folder / f"step-{step:015d}.zarr"


def open_part(path: Path, options: Mapping[str, Any]) -> xr.DataTree | None:
    """What was measured of a checkpoint before, in memory; None where it is to be measured now.

    ``options``: how it has to have been measured.
    """
    if not path.exists():
        return None
    try:
        with schema.open_run(path) as opened:
            if opened.attrs.get(HISTORY_OPTIONS) != dict(options):
                return None
            return opened.load()
    except schema.SchemaError:  # torn, as by a full disk
        return None


def fingerprint(checkpoint: str) -> str:
    """Sizes and times of a checkpoint's files: whether it is still the one that was measured, without reading it."""
    place = Path(checkpoint)
    files = sorted(child for child in place.iterdir() if child.is_file()) if place.is_dir() else [place]
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def without_trace(run: xr.DataTree) -> xr.DataTree:
    """A run without its sampled states."""
    nodes = {path: node for path, node in run.to_dict().items() if not path.startswith("/trace")}
    return xr.DataTree.from_dict({**nodes, "/": xr.Dataset(attrs=run.attrs)})
