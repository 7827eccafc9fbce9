"""What does one text show in all checkpoints of a training? Each is probed once, and all become one run by step."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics import judge, schema
from depthscope.diagnostics.analysis.analyze import analyze
from depthscope.diagnostics.analysis.training_curves import curves_of_sums
from depthscope.diagnostics.errors import InputError, TakenError
from depthscope.diagnostics.schema import storable_attributes
from depthscope.diagnostics.schema.groups import group_path
from depthscope.diagnostics.schema.live_rows import MemoryRows
from depthscope.diagnostics.verdicts.finding import News
from depthscope.probes.checkpoints.errors import is_model_error, own_error
from depthscope.probes.checkpoints.load import load_checkpoint
from depthscope.probes.checkpoints.text_batch import batches_of, encode_text, token_texts
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.one_shot import capture
from depthscope.probes.session.options import ModelOptions, SiteOptions, takes_options
from depthscope.probes.settling import settle
from depthscope.probes.statistics.weight_updates import unreadable

Progress = Callable[[str, int, int], None]

CHECKPOINTS = "checkpoints"
"""Attribute of a history: step, name and digest of each checkpoint in it."""

# The number after one of these words, wherever it is; else the last number of the name.
_WORDED = re.compile(r"(?:global_?step|step|iteration|iter|checkpoint|ckpt)[-_=. ]*(\d{1,15})", re.IGNORECASE)
_NUMBER = re.compile(r"\d{1,15}")
# Endings have numbers of their own (.h5).
_ENDINGS = re.compile(r"(\.(safetensors|gguf|pt|pth|bin|ckpt|zip))+$", re.IGNORECASE)


@dataclass(frozen=True)
class History:
    """A history of checkpoints, and those that are not in it.

    ``run``: the history.
    ``path``: where it was saved.
    ``left_out``: path of a checkpoint to why it could not be probed.
    """

    run: xr.DataTree
    path: Path
    left_out: dict[str, str] = field(default_factory=dict)


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
    """Probe all checkpoints of a training on the same text, and save one run by step.

    Its metrics and statistics have a ``step`` for each checkpoint, its trace is that of the last one. Memory is that of two
    models and one run.

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
        Replace what is at ``out`` also where it is no history.
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
    ordered = in_order(expanded([os.fspath(each) for each in given]))
    # A history is renewed without being asked; anything else is only replaced with force.
    if place.exists() and not force and not _is_history(place):
        raise TakenError(
            f"{place} exists and is not a history of checkpoints; name another file, or replace it with force"
        )
    schema.require_replaceable(place, force=True)
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    attrs = {**storable_attributes(attrs), "data_digest": digest}
    first: dict[str, torch.Tensor] = {}
    parts: list[xr.DataTree] = []
    left_out: dict[str, str] = {}
    findings, news = list[dict[str, Any]](), News()
    for number, (step, path) in enumerate(ordered):
        if progress is not None:
            progress(Path(path).name, number, len(ordered))
        with _reasons_noted(path, left_out):
            spec, weights = (path, None) if factory is None else (factory, path)
            loaded = load_checkpoint(spec, weights=weights, dtype=dtype, device=device)
            first = first or _weights_of(loaded.model)
            tokens = encode_text(loaded, text, sequences=sequences, length=length, seed=seed)
            run = capture(
                loaded.model,
                batches_of(tokens, batch),
                gradients="labels" in tokens if gradients is None else gradients,
                max_sequences=sequences,
                seed=seed,
                token_text=token_texts(loaded, tokens),
                attrs={"model": loaded.name, "weights_digest": loaded.digest, **attrs},
                **options,
            )
            if number == len(ordered) - 1:  # whose trace is the history's
                taken = ModelOptions.__optional_keys__ & options.keys()
                run = settle(run, loaded.model, tokens, **{name: options[name] for name in taken})  # type: ignore[literal-required]
            analysis = analyze(run, metrics=metrics)
            part = _measured(run, analysis, step, loaded.model, first)
            _require_same_model(parts[0] if parts else part, part)
            for earlier in parts[-1:]:  # only the last one's states are part of the history
                del earlier["trace"]
            parts.append(part)
            findings += [{"step": step, **found.as_dict()} for found in news.among(judge(analysis))]
    if not parts:
        reasons = "; ".join(f"{path}: {why}" for path, why in left_out.items())
        raise InputError(f"no checkpoint could be probed ({reasons})")
    run = _joined(parts, findings, dict(ordered), left_out)
    schema.save_run(run, place, force=True)
    if progress is not None:
        progress("", len(ordered), len(ordered))
    return History(run, place, left_out)


@contextmanager
def _reasons_noted(path: str, left_out: dict[str, str]) -> Iterator[None]:
    """Note why a checkpoint cannot be probed, in place of raising it."""
    try:
        yield
    except (CaptureError, ValueError, OSError) as error:
        left_out[path] = str(error)
    # The model's own code may raise anything; every other error is ours.
    except Exception as error:
        if not is_model_error(error):
            raise
        left_out[path] = own_error("the model", error)


def _is_history(place: Path) -> bool:
    try:
        with schema.open_run(place) as found:
            return CHECKPOINTS in found.attrs
    except schema.SchemaError:
        return False


# --- one checkpoint ---


def _measured(
    run: xr.DataTree,
    analysis: xr.Dataset | xr.DataTree,
    step: int,
    model: nn.Module,
    first: Mapping[str, torch.Tensor],
) -> xr.DataTree:
    """The run with its step, its metrics, and how far its weights are from the first ones."""
    nodes = dict(run.to_dict())
    for number, chain in enumerate(schema.chains(run)):
        place = f"/{group_path('statistics', chain)}"
        nodes[place] = nodes[place].assign_coords(step=[step])
        if number == 0:  # the weights of all chains, once
            trace = schema.chain_dataset(run, "trace", chain)
            assert trace is not None
            nodes[place] = nodes[place].merge(_weight_distances(model, first, trace))
        of_chain = analysis if isinstance(analysis, xr.Dataset) else analysis[chain].to_dataset()
        curves = curves_of_sums(nodes[place])
        nodes[f"/{group_path('metrics', chain)}"] = _with_curves(of_chain.assign_coords(step=[step]), curves)
    return xr.DataTree.from_dict(nodes)


def _weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters on the CPU, by name."""
    return {name: of.detach().cpu().clone() for name, of in model.named_parameters() if not unreadable(of)}


def _weight_distances(model: nn.Module, first: Mapping[str, torch.Tensor], trace: xr.Dataset) -> xr.Dataset:
    """Squares of ‖W‖, ‖W − W₀‖ and ‖W₀‖ of each module; NaN of one whose parameters the first checkpoint has not."""
    of_module: dict[str, np.ndarray] = {}
    for (
        name,
        parameter,
    ) in model.named_parameters():  # one that two modules share counts for the first of them
        if unreadable(parameter) or not parameter.is_floating_point():
            continue
        now, before = parameter.detach().cpu().double(), first.get(name)
        known = before is not None and before.shape == now.shape
        others = (now - before.double(), before.double()) if known else (now * math.nan, now * math.nan)  # type: ignore[union-attr]
        sums = [float(now.numel()), *(float(of.square().sum()) for of in (now, *others))]
        path = name.rpartition(".")[0]
        of_module[path] = of_module.get(path, np.zeros(4)) + sums
    counts, *squares = np.array(list(of_module.values())).T
    named = ("weight_square_norm", "weight_first_square_distance", "weight_first_square_norm")
    layers = np.array([_layer_of(path, trace) for path in of_module])
    return xr.Dataset(
        {name: (schema.MOTION, row[None]) for name, row in zip(named, squares, strict=True)}
        | {"weight_count": ("weight", counts)},
        {"weight": np.array(list(of_module), dtype=object), "weight_layer": ("weight", layers)},
    )


def _layer_of(path: str, trace: xr.Dataset) -> int:
    """Number of the block that contains a module, -1 outside of all blocks."""
    for state, layer in zip(trace["module"].values.tolist(), trace["layer"].values.tolist(), strict=True):
        # A state in the middle of a block is shown by a module inside of it: layers.3.attn is of the block layers.3.
        block = re.match(r"(?:.*\.)?\d+(?=\.|$)", str(state))
        if layer >= 0 and block is not None and f"{path}.".startswith(f"{block[0]}."):
            return int(layer)
    return -1


# --- all of them ---


def _require_same_model(first: xr.DataTree, run: xr.DataTree) -> None:
    shapes = [(of.attrs["block"], of.attrs["num_blocks"], of.attrs["num_parameters"]) for of in (run, first)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"its blocks, their number and that of its parameters are {shapes[0]}, those of the first checkpoint "
            f"{shapes[1]}; expected checkpoints of one training"
        )


def _joined(
    parts: Sequence[xr.DataTree],
    findings: list[dict[str, Any]],
    paths: Mapping[int, str],
    left_out: Mapping[str, str],
) -> xr.DataTree:
    """``/metrics`` and ``/statistics`` by step, as of a recording; ``/trace`` and ``/coverage`` of the last checkpoint."""
    history, last = MemoryRows(), parts[-1]
    history.findings = findings
    for part in parts:
        history.append(*_row_of(part))
    attrs: dict[str, Any] = {
        CHECKPOINTS: [
            {
                "step": row.step,
                "name": Path(paths[row.step]).name,
                "weights_digest": part.attrs["weights_digest"],
            }
            for row, part in zip(history.rows, parts, strict=True)
        ]
    }
    if left_out:
        attrs["checkpoints_left_out"] = {Path(path).name: why for path, why in left_out.items()}
    run = xr.DataTree.from_dict({f"/{path}": of for path, of in history.groups_of(last).items()}).load()
    run.attrs |= attrs
    schema.validate(run)
    return run


def _row_of(part: xr.DataTree) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Step, numbers and coordinates of one checkpoint, as a history takes them."""
    numbers: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    step = 0
    for node in (
        each for group in ("statistics", "metrics") for each in part[group].subtree if each.data_vars
    ):
        path, step = node.path.strip("/"), int(node.to_dataset()["step"][0])
        for name, of in node.data_vars.items():
            if "step" in of.dims:
                numbers[f"{path}/{name}"] = of.isel(step=0).dims, of.isel(step=0).values, of.attrs
        coords |= {
            f"{path}/{name}": (of.dims, of.values, of.attrs)
            for name, of in node.coords.items()
            if name != "step"
        }
    return step, numbers, coords


def _with_curves(metrics: xr.Dataset, curves: xr.Dataset) -> xr.Dataset:
    """The metrics of a checkpoint, with those that only its statistics give."""
    added = {
        name: curves[name]
        for name in curves.data_vars
        if name not in metrics and "stream" not in curves[name].dims
    }
    reasons = {name: why for name, why in metrics.attrs.get("not_computed", {}).items() if name not in added}
    return metrics.assign(added).assign_attrs(not_computed=reasons)


# --- the steps of checkpoints ---


def checkpoint_step(path: str | Path) -> int:
    """The training step of a checkpoint.

    Returns: ``global_step`` of its ``trainer_state.json``; else of its name the number after ``step``, ``iter``,
    ``checkpoint`` or ``ckpt``; else the last number of its name.

    Examples
    --------
    >>> [checkpoint_step(name) for name in ("step-00200", "epoch=1-step=40.ckpt", "checkpoint-7", "iter_0003.pt", "12")]
    [200, 40, 7, 3, 12]
    """
    path = Path(path)
    state = path / "trainer_state.json"
    if state.is_file():
        try:
            return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"{state} has no global_step that can be read ({error}); repair or remove it"
            ) from None
    name = _ENDINGS.sub("", path.name)
    found = _WORDED.findall(name) or _NUMBER.findall(name)
    if not found:
        raise InputError(
            f"the name {path.name!r} has no step in it; expected such as step-1000 or checkpoint-1000"
        )
    return int(found[-1])


def in_order(paths: Iterable[str]) -> list[tuple[int, str]]:
    """Checkpoints, one for each step, by their steps as numbers and not as text."""
    steps: dict[int, str] = {}
    for path in dict.fromkeys(paths):
        other = steps.setdefault(checkpoint_step(path), path)
        if other != path:
            raise InputError(
                f"{other} and {path} are both of step {checkpoint_step(path)}; name one of them, or rename the other"
            )
    return sorted(steps.items())


def expanded(paths: Sequence[str]) -> list[str]:
    """Checkpoints in place of a single folder that contains them; anything else as it is."""
    folder = Path(paths[0])
    if len(paths) > 1 or not folder.is_dir() or (folder / "config.json").exists():
        return list(paths)
    inside = [str(child) for child in folder.iterdir() if (child / "config.json").is_file()]
    return sorted(inside) or list(paths)
