"""Every tool that captures residual states, with one step of it as its own documentation writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.capture.cases import Case, build, run
from benchmarks.shared.process import CannotTakeError
from depthscope import probes

Batch = dict[str, torch.Tensor]


@dataclass
class Captured:
    """What a tool returns: states by depth, and gradients by depth where a backward was run."""

    states: list[torch.Tensor]
    gradients: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Tool:
    """A tool prepared for one model.

    ``step``: one forward, with a backward where asked, on one batch; this is what is timed.
    ``read``: from the result of a step to states and gradients; not timed.
    ``around``: A context that is open during a step; entering and leaving it are not timed.
    """

    step: Callable[[Batch], Any]
    read: Callable[[Any], Captured] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


# --- hooks as one writes them by hand ---


def plain(case: Case, backward: bool) -> Tool:
    def step(batch: Batch) -> None:
        run(case, batch, backward=backward)

    return Tool(step)


def hooks(case: Case, backward: bool, store: Callable[[torch.Tensor], torch.Tensor]) -> Tool:
    modules = [case.model.get_submodule(site) for site in case.sites]

    def step(batch: Batch) -> Captured:
        captured = Captured([])

        # A tensor hook has the gradient of the state that the next block read, after all its uses.
        def see(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            captured.states.append(store(output.detach()))
            if backward:
                output.register_hook(lambda gradient: captured.gradients.append(store(gradient)))

        handles = [module.register_forward_hook(see) for module in modules]
        try:
            run(case, batch, backward=backward)
        finally:
            for handle in handles:
                handle.remove()
        captured.gradients.reverse()  # the backward visits the last depth first
        return captured

    return Tool(step, lambda captured: captured)


def clones(case: Case, backward: bool) -> Tool:
    return hooks(case, backward, torch.clone)


# --- peers ---


def hidden_states(case: Case, backward: bool) -> Tool:
    if case.streams > 1:
        raise CannotTakeError("a switch of transformers' own models")

    def step(batch: Batch) -> Captured:
        with torch.set_grad_enabled(backward):
            output = case.model(**batch, output_hidden_states=True)
        if backward:
            # Intermediate tensors retain no gradient unless asked before the backward.
            for state in output.hidden_states:
                state.retain_grad()
            output.loss.backward()
        # The last hidden state comes after the final norm: the output of the last block is missing.
        own = output.hidden_states[:-1]
        return Captured([state.detach() for state in own], [state.grad for state in own] if backward else [])

    return Tool(step, lambda captured: captured)


def nnsight(case: Case, backward: bool) -> Tool:
    import nnsight

    wrapped = nnsight.NNsight(case.model)

    def inside(path: str) -> Any:
        place = wrapped
        for part in path.split("."):
            place = place[int(part)] if part.isdigit() else getattr(place, part)
        return place

    places = [inside(site) for site in case.sites]

    def forward(batch: Batch) -> Captured:
        with torch.no_grad(), wrapped.trace(**batch):
            states = nnsight.save([place.output for place in places])
        return Captured(states)

    def both(batch: Batch) -> Captured:
        with wrapped.trace(**batch):
            states = nnsight.save([place.output for place in places])
            loss = wrapped.output["loss"]
            # nnsight visits gradients in the order of the backward: the last depth first.
            with loss.backward():
                gradients = nnsight.save([state.grad for state in states[::-1]])
        return Captured(states, gradients[::-1])

    return Tool(both if backward else forward, lambda captured: captured)


def transformer_lens(case: Case, backward: bool) -> Tool:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    if case.streams > 1:
        raise CannotTakeError("takes the architectures that it has an adapter for")
    # The bridge rebuilds the model that it is given: it gets one of its own, with the same weights.
    own = build("tiny" if "tiny" in case.name else "residual", case.sizes).model
    bridge = build_bridge_from_module(own, "GPT2LMHeadModel", hf_config=own.config)
    # hook_in of block l + 1 is hook_out of block l: the embedding, then one name for each block.
    names = ["blocks.0.hook_in", *(f"blocks.{i}.hook_out" for i in range(case.sizes.layers))]

    def step(batch: Batch) -> Any:
        own.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            return bridge.run_with_cache(
                batch["input_ids"], names_filter=names, return_type="loss", incl_bwd=backward
            )[1]

    def read(cache: Any) -> Captured:
        gradients = [cache[f"{name}_grad"] for name in names] if backward else []
        return Captured([cache[name] for name in names], gradients)

    return Tool(step, read)


class WithLoss(nn.Module):
    """The model with token numbers as its only argument, for tools that pass no more; it still computes its loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids)["loss"]


def captum(case: Case, backward: bool) -> Tool:
    from captum.attr import LayerActivation

    if backward:
        raise CannotTakeError("forward only here: its layer gradients come one layer a run")
    modules = [case.model.get_submodule(site) for site in case.sites]
    # LayerActivation passes one tensor and expects one tensor back.
    activation = LayerActivation(WithLoss(case.model), modules)

    def step(batch: Batch) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(activation.attribute(batch["input_ids"]))

    return Tool(step, Captured)


def pyvene(case: Case, backward: bool) -> Tool:
    import pyvene

    if case.streams > 1:
        raise CannotTakeError("takes the model types in its own table")
    if backward:
        raise CannotTakeError("collects activations only")
    collected: list[torch.Tensor] = []

    def collect(base: torch.Tensor, _source: Any = None) -> torch.Tensor:
        collected.append(base.clone())
        return base

    # Its own notation: indices in brackets.
    paths = ["transformer.drop", *(f"transformer.h[{i}]" for i in range(case.sizes.layers))]
    places = [{"component": f"{path}.output", "intervention": collect} for path in paths]
    model = pyvene.IntervenableModel(pyvene.IntervenableConfig(places), model=case.model)

    def step(batch: Batch) -> list[torch.Tensor]:
        collected.clear()
        with torch.no_grad():
            model(batch)
        return list(collected)

    return Tool(step, Captured)


def torchlens(case: Case, backward: bool) -> Tool:
    import torchlens

    if backward:
        raise CannotTakeError("its extract() is of a forward")

    model, sites = WithLoss(case.model), [f"model.{site}" for site in case.sites]

    def step(batch: Batch) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(torchlens.extract(model, batch["input_ids"], sites).values())

    return Tool(step, Captured)


# --- this package ---


def capture(case: Case, backward: bool) -> Tool:

    def step(batch: Batch) -> Any:
        return probes.capture(case.model, batch, gradients=backward, loss=lambda output, _: output["loss"])

    return Tool(step, read_run)


def read_run(tree: Any) -> Captured:
    """States (B, T, N, D) of a run, in the order of the batch."""
    # The reservoir stores sequences in any order; hooks see the order of the batch.
    trace = tree.trace.to_dataset().sortby("sample")
    states = [torch.from_numpy(state) for state in trace.residual.values]
    gradients = [torch.from_numpy(g) for g in trace.gradient.values] if "gradient" in trace else []
    return Captured(states, gradients)


def recording(case: Case, backward: bool, *, sequences: int = 8, start: int = 0) -> Tool:
    # every=1 measures each step: the default would leave most of them out of the timing.
    recorder = probes.record(
        case.model, start_step=start, gradients=backward, max_sequences=sequences, every=1
    )

    def step(batch: Batch) -> None:
        run(case, batch, backward=backward)
        recorder.step()

    # States are compared where the raw sample is the full batch.
    samples_batch = sequences >= case.sizes.batch and not start
    return Tool(step, (lambda _: read_run(recorder.run)) if samples_batch else None, lambda: recorder)


Prepare = Callable[[Case, bool], Tool]

PLAIN: dict[str, Prepare] = {
    "plain": plain,
    "plain again": plain,
    "hooks, clones": clones,
    "transformers output_hidden_states": hidden_states,
}
OWN: dict[str, Prepare] = {
    "probes.capture": capture,
    "probes.record, a measured step": recording,
    "· 1 sequence kept raw": partial(recording, sequences=1),
    "probes.record, between measured steps": partial(recording, start=10**9),
}
PEERS: dict[str, Prepare] = {
    "nnsight": nnsight,
    "transformer-lens": transformer_lens,
    "captum": captum,
    "pyvene": pyvene,
    "torchlens": torchlens,
}
TOOLS = PLAIN | OWN | PEERS


def groups() -> Iterable[list[str]]:
    """Tools that share a process. Some peers patch torch when they are imported: each has its own, with plain."""
    yield [*PLAIN, *OWN]
    for name in PEERS:
        yield ["plain", name]
