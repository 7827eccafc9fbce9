"""What do healthy trained networks look like? ``python -m tests.verdicts.references`` trains them and keeps their numbers.

Every network is trained on a real task until its loss is far below that of guessing, and measured on new data. Its worst
number of every verdict is one row of ``diagnostics/verdicts/healthy_networks.csv``, from which the calibrated limits come; the
weights are not kept. A row that is there is not made again: the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import nn
from torch.nn import functional

from depthscope import diagnostics, probes
from depthscope.diagnostics import Severity
from depthscope.diagnostics.verdicts import VERDICTS, calibration
from tests.verdicts import healthy, measuring
from tests.verdicts.networks import DEPTH, LOOPED, PATCHED, PLAIN, STAGED, STREAMED, built
from tests.verdicts.plans import Plan
from tests.verdicts.tasks import TASKS, Task, loss_of

FILE = Path(calibration.__file__).with_name("healthy_networks.csv")
EACH = 4
LEARNED = 0.9  # of the loss of guessing: a network whose training failed is no example of health
TEXTS = ("documentation", "code", "licences", "words")
FACTS = (
    "kind",
    "number",
    "task",
    "optimizer",
    "steps",
    "blocks",
    "width",
    "streams",
    "loss",
    "guessing",
    "seconds",
    "loud",
)


@dataclass(frozen=True)
class Kind:
    """One kind of reference network.

    Parameters
    ----------
    title : str
        Of the table.
    family : str
        Of `networks.FAMILIES`, or a name that `build` knows.
    tasks : tuple of str
        Of `tasks.TASKS`, taken in turn.
    build : callable
        Makes the network of a plan.
    optimizer : str
        A key of `OPTIMIZERS`.
    steps : int
        Of training; 0 is a fresh network, from which no limit comes.
    dropout : float
        Of every branch, while it is trained.
    touch : callable
        Changes the network after training.
    """

    title: str
    family: str = "pre-norm transformer"
    tasks: tuple[str, ...] = TEXTS
    build: Callable[[Plan], nn.Module] = built
    optimizer: str = "adamw"
    steps: int = 500
    dropout: float = 0.0
    touch: Callable[[nn.Module, random.Random], Any] = lambda model, rng: None


OF_TEXT = (*PLAIN, *LOOPED, *DEPTH, *STREAMED)
OF_TASKS = (
    *(("pre-norm transformer", task) for task in ("induction", "reversal", "sorting", "sums", "majority", "four letters")),
    ("mHC", "induction"), ("HC", "reversal"), ("mHC", "four letters"), ("RMSNorm and SwiGLU", "sums"),
    ("recurrent network", "four letters"), ("attention residuals", "sorting"),
)  # fmt: skip
OF_OPTIMIZERS = (
    ("pre-norm transformer", "sgd"), ("pre-norm transformer", "muon"), ("mHC", "muon"), ("RMSNorm and SwiGLU", "muon"),
    ("ViT", "muon"), ("ResNet", "sgd"),
)  # fmt: skip
OF_THE_STUDY = {"residual": "pre-norm transformer", "hc": "HC", "mhc": "mHC"}


def _grown() -> Iterator[Kind]:
    yield from (Kind(f"{family}, text", family) for family in OF_TEXT)
    for family in (*PATCHED, *STAGED):
        yield Kind(f"{family}, digits", family, ("digits",))
        yield Kind(f"{family}, photographs", family, ("photographs",))
    yield from (Kind(f"{family}, two classes", family, ("odd digits",)) for family in ("ViT", "ResNet"))
    for name in healthy.PUBLISHED:
        yield Kind(f"{name} of transformers", name, TEXTS[:3], healthy.published(name))
    for name, family in OF_THE_STUDY.items():
        yield Kind(f"the study's {name}", family, TEXTS[:3], healthy.of_the_study(name))


def _trained_otherwise() -> Iterator[Kind]:
    yield from (Kind(f"{family}, {task}", family, (task,), steps=1000) for family, task in OF_TASKS)
    for family, optimizer in OF_OPTIMIZERS:
        tasks = ("digits",) if family in PATCHED | STAGED else TEXTS
        yield Kind(f"{family}, {optimizer}", family, tasks, optimizer=optimizer)
    for family in ("pre-norm transformer", "RMSNorm and SwiGLU", "mHC"):
        yield Kind(f"{family}, dropout", family, dropout=0.1)
        yield Kind(f"{family}, 2000 steps", family, TEXTS[:3], steps=2000)
    yield Kind("pre-norm transformer in bfloat16", touch=lambda model, rng: model.bfloat16())
    yield Kind("a sink token", touch=healthy.with_a_sink)


def _fresh() -> Iterator[Kind]:
    for family in (*OF_TEXT, *PATCHED, *STAGED):
        yield Kind(f"{family}, fresh", family, TEXTS if family in OF_TEXT else ("digits",), steps=0)
    for name in healthy.PUBLISHED:
        yield Kind(f"{name} of transformers, fresh", name, TEXTS[:3], healthy.published(name), steps=0)


KINDS = (*_grown(), *_trained_otherwise(), *_fresh())
# By name: how the optimizers of a network's matrices and of its other weights are made, and the learning rate.
OPTIMIZERS = {
    "adamw": lambda matrices, others: [torch.optim.AdamW([*matrices, *others], lr=2e-3, weight_decay=0.05)],
    "sgd": lambda matrices, others: [torch.optim.SGD([*matrices, *others], lr=0.05, momentum=0.9)],
    "muon": lambda matrices, others: [
        torch.optim.Muon(matrices, lr=5e-3),
        torch.optim.AdamW(others, lr=2e-3),
    ],
}


def plan_of(kind: Kind, number: int) -> tuple[Plan, Task]:
    """Sizes and task of one network."""
    rng = random.Random(f"{kind.title} {number}")
    task = TASKS[kind.tasks[number % len(kind.tasks)]]
    plan = Plan(
        family=kind.family,
        blocks=rng.choice((3, 4, 6) if kind.steps <= 500 else (2, 3)),
        width=rng.choice((32, 48)),
        heads=rng.choice((2, 4)),
        streams=healthy.streams_for(kind.family, rng),
        vocabulary=max(task.vocabulary, 2),
        seed=rng.randrange(10_000),
        steps=kind.steps,
        rate=1e-3,
        embedding=rng.choice((0.3, 1.0)),
        style=rng.choice(("returned", "local")),
        start=rng.choice(("copies", "apart")),
    )
    if kind.build is not built:  # the sizes of the catalogue, whose vocabularies have 64 tokens
        plan = replace(plan, vocabulary=64, blocks=3 if kind.family in healthy.PUBLISHED else plan.blocks)
        task = TASKS[TEXTS[number % 3]]
    return plan, task


def _rate_at(step: int, steps: int) -> float:
    """Warm-up over 5 % of the steps, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / max(1.0, 0.05 * steps))
    return warm * (0.525 + 0.475 * math.cos(math.pi * step / steps))


def _begin_step(optimizers: list[Any], rates: list[list[float]], share: float) -> None:
    for each, started in zip(optimizers, rates, strict=True):
        for group, rate in zip(each.param_groups, started, strict=True):
            group["lr"] = rate * share
        each.zero_grad()


def _dropping(model: nn.Module, share: float) -> list[Any]:
    """Dropout behind every branch, which is gone when the hooks are removed."""
    kinds = {"branches", "branch"}
    branches = [
        m
        for name, m in model.named_modules()
        if kinds & set(name.split(".")[-2:]) and not isinstance(m, nn.ModuleList)
    ]
    return [
        each.register_forward_hook(lambda module, args, out: functional.dropout(out, share, module.training))
        for each in branches
    ]


def trained(model: nn.Module, kind: Kind, plan: Plan, task: Task, *, record: bool) -> xr.DataTree | None:
    """Train a network, and record its last steps where that is asked."""
    rng = torch.Generator().manual_seed(plan.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    inner = {
        id(p)
        for name, p in model.named_parameters()
        if p.ndim == 2 and not {"embed", "head"} & set(name.split("."))
    }
    matrices = [p for p in weights if id(p) in inner]
    optimizers = OPTIMIZERS[kind.optimizer](matrices, [p for p in weights if id(p) not in inner])
    rates = [[group["lr"] for group in each.param_groups] for each in optimizers]
    hooks = _dropping(model.train(), kind.dropout) if kind.dropout else []
    recorder = None
    for step in range(kind.steps):
        if record and step == kind.steps - 10:
            recorder = probes.record(
                model, every=5, gradients=True, weights=True, start_step=step, first_step=step
            )
            recorder.__enter__()
        _begin_step(optimizers, rates, _rate_at(step, kind.steps))
        inputs, targets = task.draw(16, 24, rng)
        loss = loss_of(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for each in optimizers:
            each.step()
        if recorder is not None:
            recorder.step(loss.detach())
    if recorder is not None:
        recorder.__exit__(None, None, None)
    for hook in hooks:
        hook.remove()
    return None if recorder is None else recorder.run


def captured(model: nn.Module, task: Task, seed: int) -> xr.DataTree:
    inputs, targets = task.draw(16 if task.vocabulary else 48, 32, torch.Generator().manual_seed(seed + 1))
    return probes.capture(
        model.eval(), inputs, gradients=True, loss=lambda output, batch: loss_of(output, targets)
    )


def numbers_of(run: xr.DataTree) -> Iterator[tuple[str, float, bool]]:
    """Of every verdict its number in one run, and whether it is loud; of several streams and chains, each."""
    for finding in diagnostics.judge(measuring.analysed(run), passed=True):
        if not math.isnan(finding.value):
            yield finding.verdict, finding.value, finding.severity > Severity.INFO


def measured(kind: Kind, number: int) -> dict[str, Any]:
    """The row of one network."""
    start = time.process_time()
    plan, task = plan_of(kind, number)
    torch.manual_seed(plan.seed)
    model = kind.build(plan)
    if not task.vocabulary and task.guessing != 8:
        model.head = nn.Linear(model.head.in_features, task.guessing)
    recorded = trained(model, kind, plan, task, record=number == 0 and kind.steps > 0)
    kind.touch(model, random.Random(plan.seed))
    run = captured(model, task, plan.seed)
    worst: dict[str, float] = {}
    loud = set()
    for name, value, is_loud in chain(numbers_of(run), () if recorded is None else numbers_of(recorded)):
        pick = max if VERDICTS[name].limits.above else min
        worst[name] = pick(value, worst.get(name, value))
        loud |= {name} if is_loud else set()
    found = run.attrs.get("task", {})
    facts = (kind.title, number, next(n for n, each in TASKS.items() if each is task), kind.optimizer, kind.steps, plan.blocks,
             plan.width, plan.streams, f"{found.get('loss', math.nan):.3g}", f"{math.log(task.guessing):.3g}",
             f"{time.process_time() - start:.0f}", " ".join(sorted(loud)))  # fmt: skip
    return dict(zip(FACTS, facts, strict=True)) | {
        name: f"{value:.{12 if VERDICTS[name].limits.scale == 'cosine' else 4}g}"
        for name, value in worst.items()
    }


def kept_rows() -> list[dict[str, str]]:
    """The rows that are there."""
    if not FILE.exists():
        return []
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _is_of(row: dict[str, str], kind: Kind, number: int) -> bool:
    return (row["kind"], row["number"]) == (kind.title, str(number))


def write(rows: list[dict[str, Any]]) -> None:
    """All rows, in the order of the kinds."""
    order = {kind.title: place for place, kind in enumerate(KINDS)}
    rows = sorted(rows, key=lambda row: (order.get(row["kind"], len(order)), int(row["number"])))
    columns = (*FACTS, *(name for name in VERDICTS if any(row.get(name) for row in rows)))
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Train and measure what is missing, one network of every kind before the second of any."""
    parser = argparse.ArgumentParser(prog="python -m tests.verdicts.references", description=__doc__)
    parser.add_argument(
        "--each", type=int, default=EACH, metavar="N", help=f"networks of each kind (default {EACH})"
    )
    parser.add_argument(
        "--backwards", action="store_true", help="the last kind first, next to another process"
    )
    parser.add_argument(
        "words", nargs="*", help="only kinds with one of these words in their title, made again"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for number in range(args.each):
        for kind in KINDS[::-1] if args.backwards else KINDS:
            if kind.steps == 0 and number:  # fresh networks differ by their seeds alone
                continue
            if args.words and not any(word in kind.title for word in args.words):
                continue
            if not args.words and any(_is_of(row, kind, number) for row in kept_rows()):
                continue
            row = measured(kind, number)
            if kind.steps and not float(row["loss"]) < LEARNED * float(row["guessing"]):
                sys.stdout.write(
                    f"{kind.title} {number}: loss {row['loss']}: it has not learned its task, and is left out\n"
                )
                continue
            # Read again: another process may have added rows since.
            write([*(each for each in kept_rows() if not _is_of(each, kind, number)), row])
            calibration.healthy_networks.cache_clear()
            calibration.healthy_values.cache_clear()
            sys.stdout.write(
                f"{kind.title} {number}: loss {row['loss']}, {row['seconds']} s, loud: {row['loud'] or 'none'}\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
