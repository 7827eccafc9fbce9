"""Would the same weights lose less if they were used otherwise? Repairs: changes of the forward, each of which names a cause.

A network that is used as it was trained gains nothing by any of them. One whose softmax has another temperature or runs along
another axis, whose gains are read otherwise than they were stored, whose mixing is transposed, or of which one part is far too
large regains what that costs, and the repair that does it says what is wrong. None needs a gradient.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.diagnostics.experiments import estimate
from depthscope.probes.interventions.changes import remixed
from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.model.loss_graph import Loss, loss_value
from depthscope.probes.model.modules import module_paths
from depthscope.probes.model.preserved_state import eager, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.operations import operation_of
from depthscope.probes.session.attention import FUSED, SOFTMAX
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model, copied
from depthscope.probes.session.options import Options

FEWEST, MOST_ALONE = 4, 16  # sequences that are run one by one, for the interval of what a repair regains
# A step has to regain this share of what can be lost to be followed by a further one, and a repair to be reported.
PROMISE = 0.02
FARTHEST = 10  # times that a factor is doubled, or halved
# One part is tried at the size of the others of its kind where it differs by this factor: the farthest few.
APART, MOST_APART, FEWEST_OF_A_KIND = 4.0, 3, 3


@dataclass(frozen=True)
class Use:
    """How the weights are used in a forward: as they are, but for this.

    ``outputs, logits``: factors on what modules give, and on the logits of the softmaxes that run inside of them, by path.
    ``last_axis``: whether every softmax runs along the last axis.
    ``parameters``: what takes the place of some, by name.
    """

    outputs: Mapping[str, float] = field(default_factory=dict)
    logits: Mapping[str, float] = field(default_factory=dict)
    last_axis: bool = False
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)


class UsedForward(TorchDispatchMode):
    """A forward in which the weights are used in some way; it notes the sizes of what modules give and softmaxes get."""

    def __init__(self, model: nn.Module, use: Use) -> None:
        super().__init__()
        self.sizes: dict[str, dict[str, float]] = {"outputs": {}, "logits": {}}
        self.other_axis = False
        self._model, self._use, self._path = model, use, [""]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Use the weights so in the forward made inside, which leaves nothing behind."""
        with ExitStack() as stack:
            for path, module in module_paths(self._model):
                stack.callback(module.register_forward_pre_hook(partial(self._enter, path)).remove)
                stack.callback(module.register_forward_hook(partial(self._leave, path)).remove)
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)  # a whole layer as one operation shows no softmax
            if not (self._use.outputs or self._use.parameters):  # which need no look at the operations
                stack.enter_context(self)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = operation_of(func).name, kwargs or {}
        factor = self._use.logits.get(self._path[-1], 1.0)
        if name in SOFTMAX and args[0].ndim >= 3 and min(args[0].shape[-2:]) > 1:
            logits, axis = args[0], args[1] % args[0].ndim
            self.other_axis |= axis != logits.ndim - 1
            finite = logits[logits.isfinite()]
            self._note("logits", float(finite.float().std()) if finite.numel() > 1 else 0.0)
            axis = logits.ndim - 1 if self._use.last_axis else axis
            args = (factor * logits, axis, *args[2:])
        elif name in FUSED:
            queries, keys = args[:2]
            self._note("logits", _size(queries) * _size(keys))
            scale = kwargs.get("scale")
            kwargs = kwargs | {"scale": factor * (queries.shape[-1] ** -0.5 if scale is None else scale)}
        return func(*args, **kwargs)

    def _note(self, kind: str, size: float) -> None:
        self.sizes[kind].setdefault(self._path[-1], size)

    def _enter(self, path: str, module: nn.Module, given: Any) -> None:
        self._path.append(path)

    def _leave(self, path: str, module: nn.Module, given: Any, output: Any) -> Any:
        parts = output if isinstance(output, tuple) else (output,)
        tensor = parts[0] if parts else None
        made = None
        if path and _has_weights(module) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            if self._use == Use():
                self._note("outputs", _size(tensor))
            if path in self._use.outputs:
                changed = tensor * self._use.outputs[path], *parts[1:]
                # A tuple with names, as some modules return, takes its fields one by one.
                whole = type(output)(*changed) if hasattr(output, "_fields") else changed
                made = changed[0] if parts is not output else whole
        self._path.pop()
        return made


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt()) if tensor.numel() else 0.0


def _has_weights(module: nn.Module) -> bool:
    return any(p is not None and p.is_floating_point() for p in module._parameters.values())


class _Called(nn.Module):
    """A model that is called with a batch, for `torch.func.functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return call_model(self.model, batch)


Output = Callable[[Any], Any]
"""What the model returns for a batch, used in some way."""


@dataclass(frozen=True)
class Repair:
    """One way to use the same weights.

    ``words``: what is done, to be followed by what it does to the loss; ``{factor}`` in it.
    ``cause``: what was wrong where it helps.
    ``used``: how, at a factor.
    ``factors``: the first steps; each is taken again as long as the loss falls.
    """

    words: str
    cause: str
    used: Callable[[float], Output]
    factors: tuple[float, ...] = (1.0,)


@dataclass
class Patient:
    """A model and the parts of a batch, which is run again and again; ``forwards``: how often at most."""

    model: nn.Module
    parts: Sequence[Any]
    loss: Loss | None
    forwards: int
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)
    other_axis: bool = False

    def as_used(self, use: Use) -> Output:
        """The forward with the weights used in some way."""
        named = {f"model.{name}": value for name, value in use.parameters.items()}

        def output(batch: Any) -> Any:
            forward = UsedForward(self.model, use)
            with forward.on():
                found = torch.func.functional_call(_Called(self.model), named, (batch,))
            if use == Use():
                self.sizes, self.other_axis = forward.sizes, forward.other_axis
            return found

        return output

    def lost(self, output: Output, parts: Sequence[Any] | None = None) -> float:
        """The mean loss over some parts; NaN where there is none."""
        parts = self.parts if parts is None else parts
        total = 0.0
        for part in parts:
            given = copied(part)
            with preserved_state(self.model), eager(), torch.no_grad(), own_call(object()):
                value = loss_value(output(given), given, self.loss, required=False)
            total += math.nan if value is None else float(value) * first_size(part)
        return total / max(sum(map(first_size, parts)), 1)


# --- the table of repairs


SCALED = {
    "logits": ("multiplying the logits of the softmax in {} by {}", "another scale of attention"),
    "outputs": ("multiplying what {} gives by {}", "another scale of these modules"),
}


def _kinds(paths: Mapping[str, float]) -> dict[str, list[str]]:
    """Places of a kind, by its name: the same path in all blocks."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        found[re.sub(r"\d+", "*", path)].append(path)
    return found


def _odd(patient: Patient) -> Iterator[Repair]:
    """What one forward shows to be odd: softmaxes along another axis, and parts far from the size of their kind."""
    if patient.other_axis:
        output = patient.as_used(Use(last_axis=True))
        yield Repair(
            "running every softmax along the last axis", "a softmax along another axis", lambda _: output
        )
    apart = []
    for kind in SCALED:
        for paths in _kinds(patient.sizes[kind]).values():
            sizes = {path: patient.sizes[kind][path] for path in paths}
            usual = median(sizes.values())
            far = [(path, usual / size) for path, size in sizes.items() if size > 0.0 < usual]
            apart += [(kind, *each) for each in far] if len(paths) >= FEWEST_OF_A_KIND else []
    apart = [each for each in apart if not 1 / APART < each[2] < APART]
    for kind, path, factor in sorted(apart, key=lambda each: -abs(math.log(each[2])))[:MOST_APART]:
        output = _multiplied(patient, kind, (path,), factor)
        words, cause = SCALED[kind]
        words = words.format(path, f"{factor:.2g} (to the size of the others)")
        yield Repair(words, cause, lambda _, output=output: output)


def _scales(patient: Patient) -> Iterator[Repair]:
    """A factor on all parts of a kind."""
    for kind, (words, cause) in SCALED.items():
        for name, paths in _kinds(patient.sizes[kind]).items():
            used = partial(_multiplied, patient, kind, tuple(paths))
            yield Repair(words.format(name, "{factor:g}"), cause, used, (0.5, 2.0))


def _multiplied(patient: Patient, kind: str, paths: tuple[str, ...], factor: float) -> Output:
    return patient.as_used(Use(**{kind: dict.fromkeys(paths, factor)}))


def _gains(patient: Patient) -> Iterator[Repair]:
    """All gains of norms at once."""
    gains = {
        f"{path}.weight": module.weight
        for path, module in module_paths(patient.model)
        if "norm" in type(module).__name__.lower()
        and isinstance(module._parameters.get("weight"), torch.Tensor)
    }
    changes = {
        "adding 1 to every gain of a norm": (
            "gains that are stored as their distance from 1",
            lambda gain: gain + 1,
        ),
        "taking 1 from every gain of a norm": ("gains to which 1 is added twice", lambda gain: gain - 1),
        "resetting every gain of a norm to 1": ("gains that are not those of these norms", torch.ones_like),
    }
    for words, (cause, change) in changes.items() if gains else ():
        output = patient.as_used(
            Use(parameters={name: change(gain.detach()) for name, gain in gains.items()})
        )
        yield Repair(words, cause, lambda _, output=output: output)


MIXINGS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "transposing every mixing matrix": ("mixing matrices that are applied transposed", lambda mix: mix.mT),
    "dividing every mixing matrix by the sums of its rows": (
        "mixing matrices that amplify or starve streams",
        lambda mix: mix / mix.sum(-1, keepdim=True),
    ),
}


def _mixings(patient: Patient, options: Mapping[str, Any]) -> Iterator[Repair]:
    def used(change: Callable[[torch.Tensor], torch.Tensor]) -> Output:
        def output(batch: Any) -> Any:
            under_test = ModelUnderTest(patient.model, batch, Options(**options))
            edits = {}
            for number, known in under_test.base.mixing.items():
                edits |= remixed(change(known) - known, under_test.chain.connections[number])
            return under_test.forward(edits, checked=False).output

        return output

    for words, (cause, change) in MIXINGS.items():
        yield Repair(words, cause, lambda _, change=change: used(change))


def repaired(
    patient: Patient, reach: float, options: Mapping[str, Any], *, streams: bool, is_suspected: bool
) -> dict[str, Any]:
    """The repair that lowers the loss most, with what it regains and a 95 % interval over sequences; empty for none.

    ``reach``: what there is to lose, in the units of the loss.
    ``is_suspected``: whether something is; else what one forward shows to be odd is repaired alone.
    """
    unchanged = patient.as_used(Use())
    base = patient.lost(unchanged)
    tried = [*_odd(patient)]
    if is_suspected:
        tried += [*_gains(patient), *(_mixings(patient, options) if streams else ()), *_scales(patient)]
    lowest, words, cause, best = min(
        (
            (loss, repair.words.format(factor=factor), repair.cause, output)
            for repair in tried
            for loss, factor, output in _steps(patient, repair, base, PROMISE * reach)
        ),
        key=lambda each: each[0],
        default=(base, "", "", unchanged),
    )
    if not lowest < base - PROMISE * reach:
        return {}
    alone = [row for part in patient.parts for row in rows_of(part)][:MOST_ALONE]
    changes = [patient.lost(best, [row]) - patient.lost(unchanged, [row]) for row in alone]
    interval = estimate(torch.tensor(changes).numpy())
    return {
        "repair": words,
        "cause": cause,
        "loss": base,
        "repaired": lowest,
        "half_width": (interval.high - interval.low) / 2,
    }


def _steps(
    patient: Patient, repair: Repair, base: float, least: float
) -> Iterator[tuple[float, float, Output]]:
    """The losses of a repair with its factors, each of which is taken again as long as the loss falls."""
    for step in repair.factors:
        factor, before = step, base
        for _ in range(FARTHEST if step != 1.0 else 1):
            if patient.forwards <= 0:
                return
            patient.forwards -= 1
            output = repair.used(factor)
            try:
                loss = patient.lost(output)
            except Exception:  # a model may do anything where its numbers are others
                break
            if not math.isfinite(loss):
                break
            yield loss, factor, output
            if not loss < before - least:
                break
            factor, before = factor * step, loss


# --- batches


def first_size(batch: Any) -> int:
    """Number of rows of the first tensor of a batch."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 0)


def rows_of(batch: Any) -> list[Any]:
    """Each sequence of a batch as a batch of its own."""
    count = first_size(batch)
    return [row_of(batch, number, count) for number in range(count)]


def row_of(value: Any, number: int, count: int) -> Any:
    """One sequence of a batch of ``count``, in every tensor that has so many."""
    if isinstance(value, torch.Tensor):
        return value[number : number + 1] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: row_of(item, number, count) for name, item in value.items()}
    return (
        type(value)(row_of(item, number, count) for item in value) if type(value) in (tuple, list) else value
    )
