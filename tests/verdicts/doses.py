"""From which dose on is a fault told, and from which on does the loss suffer? ``python -m tests.verdicts.doses`` measures it.

Each fault is planted in trained networks whose kinds no limit was taken from, at six doses from harmless to fatal.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthscope import diagnostics, probes
from depthscope.diagnostics import Finding, Severity
from depthscope.diagnostics.verdicts import VERDICTS
from tests.verdicts import held_out, measuring, page
from tests.verdicts.faults import ScaledGradient
from tests.verdicts.held_out import Recipe, Shape

STEPS = 300
SEEDS = 2  # networks of each host
HOSTS = {
    "plain": Shape(blocks=6),
    "RMSNorm": Shape(blocks=5, rms=True),
    "streams": Shape(streams=4, blocks=4, start="apart"),
}
SUFFERS = 0.05  # nats
FIGURE = "doses.svg"


@dataclass(frozen=True)
class Fault:
    """One fault that has a dose.

    Parameters
    ----------
    title, unit : str
        What is wrong, and what the dose is.
    verdicts : tuple of str
        That name it.
    doses : tuple of float
        From harmless to fatal.
    plant : callable
        ``plant(model, dose)`` changes a trained network.
    hosts : tuple of str
        Keys of `HOSTS`.
    """

    title: str
    unit: str
    verdicts: tuple[str, ...]
    doses: tuple[float, ...]
    plant: Callable[[Any, float], None]
    hosts: tuple[str, ...] = ("plain", "RMSNorm")


def _after(
    change: Callable[[torch.Tensor, float], torch.Tensor], number: int | None = 2
) -> Callable[[Any, float], None]:
    def plant(model: Any, dose: float) -> None:
        for place, block in enumerate(model.blocks):
            if number is None or place == number:
                block.after = lambda x: change(x, dose)

    return plant


def _averaged(x: torch.Tensor, left: float) -> torch.Tensor:
    mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
    return torch.lerp(mean, x, left)


def _basis(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]


def _projected(x: torch.Tensor, directions: float) -> torch.Tensor:
    kept = _basis(x.shape[-1])[:, : int(directions)]
    return x @ kept @ kept.T


def _shifted(x: torch.Tensor, times: float) -> torch.Tensor:
    return x + times * x.detach().norm(dim=-1).mean() * _basis(x.shape[-1])[0]


def _spiked(x: torch.Tensor, share: float) -> torch.Tensor:
    added = torch.zeros_like(x)
    added[:, torch.arange(x.shape[1]) < share * x.shape[1], 5] = 3000 * x.detach().abs().mean()
    return x + added


def _before(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: ScaledGradient.apply(x, factor)


def _scaled_gradient(model: Any, factor: float) -> None:
    model.blocks[2].before = _before(factor)


def _branches(only: int | None = None) -> Callable[[Any, float], None]:
    """The branches of all blocks, or of one, write less."""

    def plant(model: Any, scale: float) -> None:
        for place, block in enumerate(model.blocks):
            if only is None or place == only:
                block.strength = scale

    return plant


def _constant(model: Any, left: float) -> None:
    """What block 2 writes depends on the token less and less."""
    block = model.blocks[2]
    forward = block.forward

    def changed(x: torch.Tensor) -> torch.Tensor:
        added = forward(x) - x
        mean = added.flatten(0, 1).mean(0)
        return x + mean + left * (added - mean)

    block.forward = changed


def _sharp(model: Any, factor: float) -> None:
    model.blocks[2].branches[0].temperature = factor


def _mixing(change: Callable[[torch.Tensor, float], torch.Tensor]) -> Callable[[Any, float], None]:
    return _weights(lambda pre, post, res, dose: (pre, post, change(res, dose)))


def _weights(change: Callable[..., tuple]) -> Callable[[Any, float], None]:
    def plant(model: Any, dose: float) -> None:
        for block in model.blocks:
            for mixing in block.mixings:
                mixing.edit = lambda weights: change(*weights, dose)

    return plant


def _one(value: float) -> torch.Tensor:
    return torch.tensor([1.0, value, 1.0, 1.0])


STREAMS = ("streams",)
FAULTS = (
    Fault("tokens are averaged over their past", "left", ("rank_collapse",), (0.5, 0.2, 0.1, 0.03, 0.01, 1e-3),
          _after(_averaged)),
    Fault("a block keeps few directions", "directions", ("lost_directions",),
          (40, 24, 12, 6, 3, 1), _after(_projected)),
    Fault("all tokens get one vector", "times their size", ("common_vector",), (0.3, 1, 3, 10, 30, 100), _after(_shifted)),
    Fault("the state is multiplied after every block", "factor", ("exploding_state",), (1.2, 2, 5, 10, 30, 100),
          _after(lambda x, factor: factor * x, None)),
    Fault("some tokens have a massive activation", "share", ("massive_activations",), (0.02, 0.05, 0.1, 0.3, 0.6, 1),
          _after(_spiked)),
    Fault("all branches write less", "scale", ("same_representation", "idle_layer"),
          (0.8, 0.5, 0.2, 0.1, 0.03, 1e-3), _branches()),
    Fault("block 2 writes less", "scale", ("idle_layer",), (0.5, 0.3, 0.1, 0.03, 0.01, 1e-3), _branches(2)),
    Fault("block 2 adds the same to every token", "left", ("constant_branch",), (0.8, 0.5, 0.2, 0.05, 0.01, 0), _constant),
    Fault("attention of block 2 is sharper", "factor", ("attention_entropy_collapse",), (1.5, 3, 10, 30, 100, 1e3), _sharp),
    Fault("the gradient is scaled down behind block 1", "factor", ("vanishing_gradient",), (0.5, 0.2, 0.1, 0.03, 1e-3, 1e-5),
          _scaled_gradient),
    Fault("the gradient is scaled up behind block 1", "factor", ("exploding_gradient",), (2, 10, 30, 100, 1e3, 1e5),
          _scaled_gradient),
    Fault("every mixing amplifies", "factor", ("gain_explosion",), (1.05, 1.2, 1.4, 1.7, 2.5, 5),
          _mixing(lambda res, factor: factor * res), STREAMS),
    Fault("every mixing is nearer to uniform", "share", ("stream_collapse", "uniform_mixing"),
          (0.1, 0.3, 0.5, 0.7, 0.9, 0.999),
          _mixing(lambda res, share: torch.lerp(res, torch.full_like(res, 0.25), share)), STREAMS),
    Fault("every mixing is nearer to the identity", "left", ("stuck_at_identity",), (0.5, 0.2, 0.1, 0.03, 0.01, 0),
          _mixing(lambda res, left: torch.lerp(torch.eye(4).expand_as(res), res, left)), STREAMS),
    Fault("a stream is read less", "factor", ("unread_stream",), (0.5, 0.2, 0.1, 0.05, 0.01, 0),
          _weights(lambda pre, post, res, dose: (pre * _one(dose), post, res)), STREAMS),
    Fault("a stream is written less", "factor", ("unwritten_stream",), (0.5, 0.2, 0.1, 0.05, 0.01, 0),
          _weights(lambda pre, post, res, dose: (pre, post * _one(dose), res)), STREAMS),
    Fault("a stream is fed less", "factor", ("attenuation",), (0.95, 0.9, 0.8, 0.5, 0.1, 0),
          _mixing(lambda res, factor: _one(factor)[:, None] * res), STREAMS),
    Fault("the sums of the mixing are wrong", "error", ("sinkhorn_not_converged",),
          (1e-3, 5e-3, 0.02, 0.05, 0.15, 0.4),
          _mixing(lambda res, error: res * (1 + error * torch.tensor([1.0, -1.0, 0.5, -0.5]))), STREAMS),
)  # fmt: skip


@cache
def trained(host: str, seed: int) -> tuple[dict[str, torch.Tensor], torch.Generator]:
    """The weights of a host after its training."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = held_out.Network(HOSTS[host])
    held_out.train(model, Recipe("", HOSTS[host], steps=STEPS), rng)
    return model.state_dict(), rng


@dataclass(frozen=True)
class Told:
    """What one dose does in one network: its loss, and the worst finding of the verdicts that name it."""

    loss: float
    severity: Severity
    number: float


def told(fault: Fault, host: str, seed: int, dose: float | None) -> Told:
    """One network with one dose; without any for None."""
    model = held_out.Network(HOSTS[host])
    model.load_state_dict(trained(host, seed)[0])
    model.eval()
    if dose is not None:
        fault.plant(model, dose)
    batch = held_out.prose(8, torch.Generator().manual_seed(seed + 1))
    run = probes.capture(held_out.Called(model), batch, gradients=True, loss=held_out.loss_of)
    found = diagnostics.judge(measuring.analysed(run), passed=True)
    named = [each for each in found if each.verdict in fault.verdicts]
    first = [each for each in named if each.verdict == fault.verdicts[0]]
    number = min((_badness(each) for each in first), default=math.nan, key=lambda x: -x)
    return Told(
        float(run.statistics["loss"][-1]), max((f.severity for f in named), default=Severity.PASS), number
    )


def _badness(finding: Finding) -> float:
    """A number that grows with what is bad."""
    return finding.value if VERDICTS[finding.verdict].limits.above else -finding.value


def area(faulty: Sequence[float], healthy: Sequence[float]) -> float:
    """The area under the ROC: how often a faulty network has a worse number than a healthy one."""
    pairs = [
        (f > h) + 0.5 * (f == h) for f in faulty for h in healthy if math.isfinite(f) and math.isfinite(h)
    ]
    return float(np.mean(pairs)) if pairs else math.nan


@dataclass(frozen=True)
class Curve:
    """One fault at its doses, the mean or the worst over networks.

    Parameters
    ----------
    fault : Fault
        What was planted.
    costs : tuple of float
        What each dose costs, in nats.
    severities : tuple of str
        Of each dose, a letter for every network.
    healthy : str
        The same of the networks without the fault.
    areas : tuple of float
        Under the ROC of each dose.
    """

    fault: Fault
    costs: tuple[float, ...]
    severities: tuple[str, ...]
    healthy: str
    areas: tuple[float, ...]

    @property
    def suffers(self) -> int | None:
        """From which dose on the loss suffers, from 1; None where it never does."""
        return next((n for n, cost in enumerate(self.costs, 1) if not cost < SUFFERS), None)

    def speaks(self, letters: str) -> int | None:
        """From which dose on half of the networks or more have one of these severities."""
        loud = (sum(map(letters.count, found)) * 2 >= len(found) for found in self.severities)
        return next((n for n, is_so in enumerate(loud, 1) if is_so), None)

    @property
    def row(self) -> tuple[str, ...]:
        """Of the table."""
        cells = (
            f"{dose:g}: {cost:+.2g} {found}"
            for dose, cost, found in zip(self.fault.doses, self.costs, self.severities, strict=True)
        )
        begins = (self.suffers, self.speaks("IWF"), self.speaks("WF"))
        areas = " ".join(f"{a:.2f}" for a in self.areas)
        fault = self.fault
        return (fault.title, fault.unit, f"`{fault.verdicts[0]}`", *(str(n or "never") for n in begins), self.healthy,
                *cells, areas)  # fmt: skip


def measured(fault: Fault, seeds: int, only: Sequence[str]) -> Curve:
    """The curve of one fault: at every dose the loss that it costs, and how many networks have a finding of which severity."""
    networks = [(host, 11 + seed) for host in fault.hosts if host in only for seed in range(seeds)]
    healthy = [told(fault, *each, None) for each in networks]
    costs, letters, areas = [], [], []
    for dose in fault.doses:
        found = [told(fault, *each, dose) for each in networks]
        costs.append(float(np.mean([f.loss - h.loss for f, h in zip(found, healthy, strict=True)])))
        letters.append(_letters(found))
        areas.append(area([f.number for f in found], [h.number for h in healthy]))
    return Curve(fault, tuple(costs), tuple(letters), _letters(healthy), tuple(areas))


def _letters(found: Sequence[Told]) -> str:
    return "".join(sorted(each.severity.name[0] if each.severity else "·" for each in found))


def draw(curves: Sequence[Curve], path: Path) -> None:
    """A line for each fault: the dose from which on the loss suffers, beside those from which on the verdict speaks."""
    # Figure, not pyplot: no backend, no global state.
    from matplotlib.figure import Figure

    from depthscope.app.drawing.matplotlib.style import figure_style
    from depthscope.app.figures.palette import RUN_COLOURS

    marks = (
        ("the loss suffers", "o", 60, "none", lambda curve: curve.suffers),
        ("a note", "|", 60, RUN_COLOURS[0], lambda curve: curve.speaks("IWF")),
        ("WARN or FAIL", "s", 14, RUN_COLOURS[1], lambda curve: curve.speaks("WF")),
    )
    with figure_style("icml") as size:
        canvas = Figure(figsize=(2 * size.inches, 0.16 * len(curves) + 0.8), layout="constrained")
        axes = canvas.add_subplot(
            xlabel="dose, from harmless to fatal", xlim=(0.5, 7.3), ylim=(len(curves), -1)
        )
        axes.set_xticks(range(1, 8), [*map(str, range(1, 7)), "never"])
        axes.set_yticks(
            range(len(curves)), [f"{each.fault.title} ({each.fault.verdicts[0]})" for each in curves]
        )
        axes.grid(axis="y", linewidth=0.3)
        for label, marker, area_, colour, pick in marks:
            places = [pick(each) or 7 for each in curves]
            edge = {"edgecolors": "black"} if colour == "none" else {}
            axes.scatter(places, range(len(curves)), s=area_, marker=marker, c=colour, label=label, **edge)
        canvas.legend(loc="outside lower center", ncols=3)
        # Without the date: a figure changes only with its numbers.
        canvas.savefig(path, metadata={"Date": None})


def main() -> int:
    """Measure all faults, or those with one of the words, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.verdicts.doses", description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="only faults with one of these words in their title; nothing is written"
    )
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help=f"networks of each host (default {SEEDS})"
    )
    parser.add_argument(
        "--hosts", nargs="+", choices=HOSTS, default=list(HOSTS), help="kinds of networks (default all)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves = []
    for fault in FAULTS:
        wanted = not args.words or any(word in fault.title for word in args.words)
        if wanted and set(fault.hosts) & set(args.hosts):
            curves.append(measured(fault, args.seeds, args.hosts))
            sys.stdout.write(f"{' | '.join(curves[-1].row)}\n")
            sys.stdout.flush()
    if not args.words:
        draw(curves, page.PAGE.with_name("images") / FIGURE)
        _write(curves, args)
    return 0


def _write(curves: Sequence[Curve], args: argparse.Namespace) -> None:
    head = (
        "fault",
        "dose",
        "verdict",
        "the loss suffers from dose",
        "a note from",
        "WARN from",
        "none",
        *(f"dose {n}" for n in range(1, 7)),
        "area under the ROC, by dose",
    )
    begins = [(each.suffers or math.inf, each.speaks("WF") or math.inf) for each in curves]
    same, late, never, early = (
        sum(map(is_so, begins))
        for is_so in (
            lambda of: of[1] == of[0] < math.inf,
            lambda of: of[0] < of[1] < math.inf,
            lambda of: of[0] < of[1] == math.inf,
            lambda of: of[1] < of[0],
        )
    )
    page.write_section("Doses", f"""
`python -m tests.verdicts.doses --seeds {args.seeds} --hosts {" ".join(args.hosts)}`: each fault at six doses in trained
networks ({STEPS} steps on text, {args.seeds} of each host) whose kinds no limit was taken from. Where does the verdict speak,
and where does the loss suffer, by more than {SUFFERS:g} nats? {same} of {len(curves)} faults are warned of from the dose on
that costs as much, {late} only at a larger one, {never} never; and {early} at a smaller one: what does nothing may be left out
at no cost, and a gradient costs only what is trained afterwards. The rest cost nothing and are not warned of.

![From which dose on the loss suffers, a verdict has a note, and a verdict warns](images/{FIGURE})

A cell has the dose, what it costs in nats, and the severity for every network: F, W, I (a note) or · (nothing). The area
compares the number of the first verdict with that of the same networks without the fault.

{page.table(head, [each.row for each in curves])}
""")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
