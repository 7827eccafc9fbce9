"""Which parametrisation lets a network be made wider or deeper? One decoder, three sets of rules, a coordinate check each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xarray as xr
from torch import nn

from depthscope.app.figures import Line, Lines
from depthscope.app.study.corpus import draw_batch, split_corpus
from depthscope.app.study.small_lm import MLP, NUM_BYTES, Attention, LanguageOutput, Size
from depthscope.diagnostics.atomic_writes import require_replaceable_file
from depthscope.diagnostics.errors import TakenError
from depthscope.diagnostics.experiments import open_result, save_result
from depthscope.diagnostics.experiments.scaling import OUTPUT, scaling_rows, scaling_sentence
from depthscope.probes.checkpoints.text_batch import sample_text
from depthscope.probes.coordinate_check import coordinate_check

# Features of a head, whatever the width: the logits of attention then need no rule of their own.
HEAD = 16
BASE_WIDTH, BASE_DEPTH = 64, 4
WIDTHS, DEPTHS = (32, 64, 128, 256, 512), (4, 8, 12, 16, 32)
SEQUENCES, LENGTH = 8, 32
STEPS, SEEDS, LEARNING_RATE = 6, 2, 3e-3


@dataclass(frozen=True)
class Parametrisation:
    """How the rules of a network depend on its width D and depth L.

    ``title``: for a table.
    ``hidden_rate, head_scale``: powers of the base width over D: of the learning rate of hidden matrices, and of the
    multiplier of the logits.
    ``branch_scale``: power of the base depth over L, of the multiplier of each branch.
    """

    title: str
    hidden_rate: float = 0.0
    head_scale: float = 0.0
    branch_scale: float = 0.0


PARAMETRISATIONS = {
    "standard": Parametrisation("standard"),
    # Adam moves every entry of a matrix by about the learning rate: D of them in line move a feature by D times as much.
    "mup": Parametrisation("μP", hidden_rate=1.0, head_scale=1.0),
    "completep": Parametrisation("CompleteP", hidden_rate=1.0, head_scale=1.0, branch_scale=1.0),
}
"""Standard; μP for Adam (Yang et al. 2022; the spectral condition of 2310.17813 agrees); α = 1 in depth (2505.01618)."""

# At the base depth CompleteP is μP, and at the base width μP is standard.
STUDIES = {"width": (WIDTHS, ("standard", "mup")), "depth": (DEPTHS, ("standard", "completep"))}


class Decoder(nn.Module):
    """A pre-norm byte-level decoder with a multiplier on its branches and one on its logits.

    ``rules``: how the multipliers depend on the size.
    ``width, depth``: features, and layers.
    """

    def __init__(self, rules: Parametrisation, width: int, depth: int):
        super().__init__()
        size = Size(layers=depth, width=width, heads=max(1, width // HEAD))
        self.rules, self.width = rules, width
        self.embedding = nn.Embedding(NUM_BYTES, width)
        self.blocks = nn.ModuleList(
            Layer(size, (BASE_DEPTH / depth) ** rules.branch_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        self.logit_scale = (BASE_WIDTH / width) ** rules.head_scale
        nn.init.normal_(self.embedding.weight)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # As μP's authors advise: random logits at the start, which depend on the width, would be part of what changes.
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> LanguageOutput:
        """Predict each next byte.

        Returns: With a loss where there are labels.
        """
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)) * self.logit_scale
        if labels is None:
            return LanguageOutput(logits)
        return LanguageOutput(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class Layer(nn.Module):
    """Attention and an MLP, each times the multiplier and added to the stream."""

    def __init__(self, size: Size, scale: float):
        super().__init__()
        self.attention, self.mlp, self.scale = Attention(size), MLP(size), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Carry a state (B, T, D) through the layer."""
        x = x + self.scale * self.attention(x)
        return x + self.scale * self.mlp(x)


def optimizer_of(
    model: nn.Module, size: int, *, learning_rate: float = LEARNING_RATE
) -> torch.optim.Optimizer:
    """Adam with the learning rates of the model's rules: those of hidden matrices depend on the width.

    ``size``: what the study varies; the rules are of the model's own width.
    """
    assert isinstance(model, Decoder)
    hidden = [p for name, p in model.blocks.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in hidden)]
    rate = learning_rate * (BASE_WIDTH / model.width) ** model.rules.hidden_rate
    return torch.optim.Adam([{"params": hidden, "lr": rate}, {"params": others, "lr": learning_rate}])


def run_scaling_study(
    over: str,
    *,
    seeds: int | None = None,
    steps: int | None = None,
) -> dict[str, xr.Dataset]:
    """Check every parametrisation over widths or depths.

    ``over``: what is varied; the other one is the base.
    ``seeds, steps``: models of each size, and training steps of each.
    """
    of_study, names = STUDIES[over]
    ids = draw_batch(
        split_corpus(sample_text()).train, SEQUENCES, LENGTH - 1, torch.Generator().manual_seed(0)
    )
    batch = {"input_ids": ids, "labels": ids}
    return {
        name: coordinate_check(
            partial(_made, PARAMETRISATIONS[name], over),
            batch,
            of_study,
            over=over,
            seeds=seeds or SEEDS,
            steps=steps or STEPS,
            optimizer=optimizer_of,
        )
        for name in names
    }


def _made(rules: Parametrisation, over: str, size: int) -> Decoder:
    return Decoder(rules, *((size, BASE_DEPTH) if over == "width" else (BASE_WIDTH, size)))


def summary(results: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """What each parametrisation gave, with plain values.

    Returns: Name, sentence and one row a place.
    """
    return [
        {
            "parametrisation": name,
            "title": PARAMETRISATIONS[name].title,
            "sentence": scaling_sentence(result),
            "places": scaling_rows(result),
        }
        for name, result in results.items()
    ]


def figure_of(results: Mapping[str, xr.Dataset]) -> Lines:
    """The change of the last state against the size, one line a parametrisation, bands over seeds."""
    lines, words = [], []
    for name, result in results.items():
        place = [str(each) for each in result["place"].values if str(each) != OUTPUT][-1]
        change = result["change"].sel(place=place)
        row = next(row for row in scaling_rows(result) if row["place"] == place)
        exponent = row["change_exponent"]
        title = PARAMETRISATIONS[name].title
        lines.append(
            Line(
                result["size"].values.astype(float),
                change.mean("seed").values,
                title,
                lower=change.min("seed").values,
                upper=change.max("seed").values,
            )
        )
        words.append(f"{title}: exponent {'not known' if exponent is None else f'{exponent:.2f}'}.")
    over = str(next(iter(results.values())).attrs["over"])
    steps = int(next(iter(results.values())).attrs["steps"])
    caption = (
        f"Root mean square change of the last state after {steps} training steps, against the {over}; bands from the least to "
        f"the largest of the seeds. {' '.join(words)}"
    )
    return Lines(
        f"study_{over}",
        f"Coordinate check over {over}",
        over,
        "rms change of the last state",
        tuple(lines),
        log_y=True,
        log_x=True,
        caption=caption,
        alt=caption,
    )


def save_study(results: Mapping[str, xr.Dataset], folder: Path) -> list[Path]:
    """Write each result and the figure; files of an earlier study are replaced.

    Raises TakenError: Where a file of another origin has a name of the study's.
    """
    from depthscope.app.drawing.matplotlib import write_figure  # matplotlib takes a second to import

    over = str(next(iter(results.values())).attrs["over"])
    require_replaceable(over, folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = _paths(over, folder)
    saved = [save_result(result, paths[name]) for name, result in results.items()]
    figure = folder / f"{over}.svg"
    write_figure(figure_of(results), figure)
    return [*saved, figure]


def require_replaceable(over: str, folder: Path) -> None:
    """Refuse to replace files that an earlier study did not write.

    ``folder``: where its results go; it may be missing.
    """
    for path in _paths(over, folder).values():
        require_replaceable_file(path, _require_own)
    require_replaceable_file(folder / f"{over}.svg", _require_figure)


def _paths(over: str, folder: Path) -> dict[str, Path]:
    return {name: folder / f"{over}-{name}.zip" for name in STUDIES[over][1]}


def _require_figure(path: Path) -> None:
    """A figure has no mark of its own: it is taken for the study's where its first result is."""
    if not any(result.exists() for result in _paths(path.stem, path.parent).values()):
        raise TakenError(f"{path} exists without results of a study; move it away, or name another folder")


def _require_own(path: Path) -> None:
    try:
        found = open_result(path)
    except ValueError:
        found = xr.Dataset()
    if "change_exponent" not in found:
        raise TakenError(
            f"{path} exists and is not the result of an earlier study; move it away, or name another folder"
        )


def table_cells(results: Mapping[str, xr.Dataset]) -> list[list[str]]:
    """The exponents of the change with their intervals as text, one row a place, one column a parametrisation."""
    columns = [scaling_rows(result) for result in results.values()]
    return [[rows[0]["place"], *map(_cell, rows)] for rows in zip(*columns, strict=True)]


def _cell(row: dict[str, Any]) -> str:
    if row["change_exponent"] is None:
        return "no change"
    if row["change_exponent_low"] is None:
        return f"{row['change_exponent']:+.2f}"
    return f"{row['change_exponent']:+.2f} ({row['change_exponent_low']:+.2f} to {row['change_exponent_high']:+.2f})"
