"""Which networks are in a draw? Faulty and healthy ones, all of them from one seed; each can be run again by its own."""

from __future__ import annotations

import copy
import math
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import xarray as xr
from torch import nn

from tests.verdicts import measuring, scoring
from tests.verdicts.faults import FAULTS, Fault, Network
from tests.verdicts.healthy import KINDS, Kind
from tests.verdicts.networks import STREAMED, built
from tests.verdicts.places import Place
from tests.verdicts.plans import Plan, drawn_plan
from tests.verdicts.scoring import CRASHED, REFUSED, Outcome


@dataclass(frozen=True)
class Case:
    """One network of a draw: a fault or a healthy kind, and the seed that draws all the rest."""

    what: Fault | Kind
    seed: int

    @property
    def faulty(self) -> bool:
        return isinstance(self.what, Fault)


def cases(draw: int, count: int, *, slow: bool = True) -> list[Case]:
    """Half faulty and half healthy networks.

    All mechanisms, and all kinds, in an order of their own until they are used up, then again: a large draw has each of them
    about equally often, and a small one others each time.
    """
    rng = random.Random(draw)
    kinds = [kind for kind in KINDS if slow or not kind.slow]
    faulty, healthy = _cycled(FAULTS, count - count // 2, rng), _cycled(kinds, count // 2, rng)
    return [Case(what, rng.randrange(2**31)) for what in (*faulty, *healthy)]


def _cycled(items: list[Any], count: int, rng: random.Random) -> list[Any]:
    chosen: list[Any] = []
    while len(chosen) < count:
        chosen += rng.sample(items, len(items))
    return chosen[:count]


def planted_plan(fault: Fault, rng: random.Random) -> Plan:
    family = rng.choice(fault.hosts)
    trained = fault.age == "trained" or (fault.age == "either" and rng.random() < 0.5)
    streams = rng.choice(fault.streams) if family in STREAMED else 1
    plan = drawn_plan(rng, family, trained=trained, streams=streams)
    return replace(plan, **dict(fault.plan))


@dataclass(frozen=True)
class Planted:
    """A network with a fault: where it is, what it costs, and how it is measured."""

    plan: Plan
    place: Place
    cost: float
    measure: Callable[[], xr.DataTree]
    fact: bool

    @property
    def group(self) -> str:
        """Of a trained network the loss tells harm; of a fresh one, and of what a training shows, the declaration."""
        is_harmless = self.plan.steps and self.cost <= HARM and not self.fact
        return scoring.HARMLESS if is_harmless else scoring.HARMFUL


HARM = 0.05
"""Share of what a network has learned, above which its loss is harmed."""


def faulty_run(fault: Fault, rng: random.Random) -> Planted:
    plan = planted_plan(fault, rng)
    net = Network(built(plan), plan, rng)
    healthy = measuring.trained(copy.deepcopy(net.model), plan) if plan.steps else None
    if not fault.early and healthy is not None:
        net = Network(copy.deepcopy(healthy), plan, rng)
    place = fault.plant(net)
    if fault.early:
        measuring.trained(net.model, plan)
    measure = fault.measure
    if measure is not None:
        return Planted(plan, place, math.inf, lambda: measure(net, place), fault.fact)
    cost = math.inf if healthy is None else measuring.cost(healthy, net.model.eval(), plan)
    return Planted(plan, place, cost, lambda: measuring.settled(net.model.eval(), plan), fault.fact)


def healthy_network(kind: Kind, rng: random.Random) -> tuple[Plan, nn.Module]:
    plan = kind.draw(rng)
    model = measuring.trained(kind.build(plan), plan)
    kind.touch(model, rng)
    return plan, model.eval()


def run_case(case: Case) -> Outcome:
    """Build, measure, judge and score one network."""
    rng, start = random.Random(case.seed), scoring.clock()
    torch.manual_seed(case.seed)
    words = ""
    group, placed = scoring.HEALTHY, False
    try:
        if isinstance(case.what, Fault):
            planted = faulty_run(case.what, rng)
            words, group, trained = planted.plan.words, planted.group, planted.plan.steps > 0
            analysis = measuring.analysed(planted.measure())
            outcome, placed, told = scoring.score_fault(case.what, planted.place, analysis, trained=trained)
        else:
            plan, model = healthy_network(case.what, rng)
            words = plan.words
            outcome, told = scoring.score_healthy(measuring.analysed(measuring.settled(model, plan)))
    except Exception as error:
        # The product's own errors say why it does not read a network.
        if type(error).__module__.startswith("depthscope"):
            outcome, told = REFUSED, (f"{type(error).__name__}: {error}"[:300],)
        else:
            outcome, told = CRASHED, (traceback.format_exc(limit=-3)[-600:],)
    return Outcome(case.what.title, words, group, outcome, told, placed, scoring.clock() - start, case.seed)
