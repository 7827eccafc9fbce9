"""Which networks are in a draw? Faulty and healthy ones, all of them from one seed; each can be run again by its own."""

from __future__ import annotations

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


def faulty_run(fault: Fault, rng: random.Random) -> tuple[Plan, Place, Callable[[], xr.DataTree]]:
    """A network with the fault, where it is, and how it is measured."""
    plan = planted_plan(fault, rng)
    net = Network(built(plan), plan, rng)
    if not fault.early:
        measuring.trained(net.model, plan)
    place = fault.plant(net)
    if fault.early:
        measuring.trained(net.model, plan)
    measure = fault.measure
    if measure is not None:
        return plan, place, lambda: measure(net, place)
    return plan, place, lambda: measuring.captured(net.model.eval(), plan)


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
    try:
        if isinstance(case.what, Fault):
            plan, place, measure = faulty_run(case.what, rng)
            words = plan.words
            outcome, told = scoring.score_fault(case.what, place, measuring.analysed(measure()))
        else:
            plan, model = healthy_network(case.what, rng)
            words = plan.words
            outcome, told = scoring.score_healthy(measuring.analysed(measuring.captured(model, plan)))
    except Exception as error:
        # The product's own errors say why it does not read a network.
        if type(error).__module__.startswith("depthscope"):
            outcome, told = REFUSED, (f"{type(error).__name__}: {error}"[:300],)
        else:
            outcome, told = CRASHED, (traceback.format_exc(limit=-3)[-600:],)
    return Outcome(case.what.title, words, outcome, told, scoring.clock() - start, case.seed)
