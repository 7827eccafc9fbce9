"""What would recording this model take? Its states, bytes and operations, from a forward without values.

What is planned is ``record(model, gradients=True, metrics="live")``, as a training is recorded: one sequence is stored.
Letters: L states of N streams and D features (V = N + 1 views of several streams with their mean, 1 of one), C connections, K
sampled tokens, t tokens of a forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.registry import LABELS
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.modules import all_parameters, is_planned, module_paths
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.session.model_call import call_model
from depthscope.probes.training.live.live import TOKENS
from depthscope.probes.training.live.row import LIVE
from depthscope.probes.training.live.sampled_quantities import CHOSEN

FLOAT32, FLOAT64 = 4, 8
RATES = {"bytes": "GB/s", "operations": "GFLOP/s"}
"""What the user may say of a machine, and its unit."""

UNPROVEN = "by shapes alone: a forward without values proves nothing; what mixes the streams is proven when the model runs"


@dataclass(frozen=True)
class CapturePlan:
    """What recording a model would take; prints as a page. Bytes and operations are estimates by the formulas named there.

    ``raw`` has bytes of the sequences that are stored, ``memory`` by part what a measured step needs above the model's own in
    each process, ``writer`` what the process that writes needs besides, ``work`` the bytes that a measured forward reads and
    its operations, ``seconds`` these over the rates that were given (empty where none were), ``collectives`` the bytes that
    processes exchange in a measured step.
    """

    model: str
    num_parameters: int
    block: str
    num_blocks: int
    num_states: int
    num_connections: int
    streams: int
    width: int
    sequences: int
    tokens: int
    processes: int
    stored_sequences: int
    raw: dict[str, int]
    memory: dict[str, int]
    writer: dict[str, int]
    work: dict[str, float]
    collectives: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    proof: str = UNPROVEN

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        state = f"{self.sequences} × {self.tokens} × {self.streams} × {self.width}"
        each = "each process" if self.processes > 1 else "the process"
        lines = [
            f"{self.model}: {self.num_parameters:.3g} parameters, {self.num_blocks} × {self.block}; planned without values",
            '  plan         record(model, gradients=True, metrics="live"), which stores '
            f"{self.stored_sequences} of the {self.sequences} sequences",
            f"  states       {self.num_states} of sequences × tokens × streams × width = {state}",
            f"  connections  {self.num_connections} that give a matrix of {self.streams} × {self.streams} streams"
            if self.num_connections
            else "  connections  none that gives a matrix of streams",
            f"  proof        {self.proof}",
            f"  stored       {_named_bytes(self.raw)}; and {_size(self.writer['row'])} a measured step",
            f"  memory       {_size(sum(self.memory.values()))} in {each} above the model's own: {_named_bytes(self.memory)}",
            f"  work         a measured forward reads {_size(self.work['bytes'])} of states once more, and takes "
            f"{self.work['operations']:.2g} operations; its row takes {self.work['operations of the row']:.2g}",
        ]
        if self.seconds:
            by_part = ", ".join(f"{name} {_seconds(value)}" for name, value in self.seconds.items())
            lines.append(f"  time         {by_part}, at the rates that were given")
        if self.processes > 1:
            lines.append(
                f"  collectives  of {self.processes} processes a measured step: one SUM of {_size(self.collectives['sum'])}, "
                f"one MAX of {_size(self.collectives['max'])}, {_size(self.collectives['sampled'])} of sampled tokens "
                "gathered once"
            )
        return "\n".join(lines)


def capture_plan(
    model: nn.Module,
    batch: Any,
    *,
    gradients: bool = True,
    sequences: int = 1,
    processes: int = 1,
    rates: Mapping[str, float] | None = None,
) -> CapturePlan:
    """Plan a recording from one forward on the meta device.

    ``model``: on the meta device, as built under ``torch.device("meta")``.
    ``batch``: one batch of one process, as in `probes.capture`; of its tensors the shapes count.
    ``sequences``: how many are stored raw; a capture stores all that it is given.
    ``rates``: what the machine of the training does a second: ``bytes`` that it reads and ``operations``. Without them
    no time is planned: those of the machine that plans say nothing about another one.
    Raises CaptureError: Where the forward does not run without values, or no blocks whose states have one shape are
    found in it.
    """
    found = _states_by_shape(model, batch)
    stored = min(sequences, found.sequences)
    raw, work = _raw_bytes(found, stored, gradients=gradients), _work(found)
    return CapturePlan(
        model=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in all_parameters(model)),
        block=found.block,
        num_blocks=found.num_blocks,
        num_states=found.num_states,
        num_connections=found.num_connections,
        streams=found.streams,
        width=found.width,
        sequences=found.sequences,
        tokens=found.tokens,
        processes=processes,
        stored_sequences=stored,
        raw=raw,
        memory=_memory_bytes(found, raw),
        writer={"row": _row_bytes(found)},
        work=work,
        # Additive sums in one flat buffer, maxima in another, sampled tokens gathered once.
        collectives={
            "sum": _sum_bytes(found),
            "max": (found.num_states * 2 * found.views + found.num_connections * 2) * FLOAT64,
            "sampled": _sampled_bytes(found),
        },
        seconds=_seconds_by_part(work, rates or {}),
    )


@dataclass(frozen=True)
class _Shapes:
    """What the shapes of a forward show of the states."""

    block: str
    num_blocks: int
    num_connections: int
    sequences: int
    tokens: int
    streams: int
    width: int
    bytes_per_number: int

    @property
    def num_states(self) -> int:
        """The embedding, and one state after each sublayer that is seen, else after each block."""
        return 1 + max(self.num_blocks, self.num_connections)

    @property
    def numbers(self) -> int:
        """Of one state."""
        return self.streams * self.width

    @property
    def views(self) -> int:
        """The streams, and of several their mean."""
        return self.streams + (self.streams > 1)


def _states_by_shape(model: nn.Module, batch: Any) -> _Shapes:
    """Run the model without values, and find the largest group of blocks that give states of one shape."""
    if not is_planned(model):
        raise CaptureError(
            "the model has values; a plan is made of one on the meta device: build it under torch.device('meta')"
        )
    calls: dict[str, list[torch.Tensor]] = {}

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        calls.setdefault(path, list(tensors_in(output)))  # returns nothing: the output stays as it is

    handles = [module.register_forward_hook(partial(note, path)) for path, module in module_paths(model)]
    try:
        # The device also for what the forward makes itself, such as positions.
        with torch.no_grad(), torch.device("meta"):
            call_model(model, _on_meta(batch))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"the forward does not run without values ({type(error).__name__}: {reason}); nothing is known of its states: "
            "plan with a batch as the model takes it, or describe a smaller one with values"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    lead = next(tensor for tensor in tensors_in(batch) if tensor.ndim > 1)
    modules = dict(module_paths(model))
    blocks = _blocks(calls, modules, tuple(lead.shape[:2]))
    if not blocks:
        raise CaptureError(
            f"no blocks were found whose output begins with (sequences, tokens) = {tuple(lead.shape[:2])}; a plan needs "
            "states of one shape, B T D or B T N D"
        )
    state = next(tensor for tensor in calls[blocks[0]] if tuple(tensor.shape[:2]) == tuple(lead.shape[:2]))
    streams = state.shape[2] if state.ndim == 4 else 1
    connections = [
        path
        for path, outputs in calls.items()
        if streams > 1
        and any(path.startswith(f"{block}.") for block in blocks)
        and any(output.shape[-2:] == (streams, streams) for output in outputs)
    ]
    # Of a module inside another one that returns the same matrix the outer one is the connection.
    outermost = [
        path for path in connections if not any(path.startswith(f"{other}.") for other in connections)
    ]
    return _Shapes(
        block=type(modules[blocks[0]]).__name__,
        num_blocks=len(blocks),
        num_connections=len(outermost),
        sequences=state.shape[0],
        tokens=state.shape[1],
        streams=streams,
        width=state.shape[-1],
        bytes_per_number=state.element_size(),
    )


def _on_meta(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to("meta")
    if isinstance(batch, Mapping):
        return {name: _on_meta(value) for name, value in batch.items()}
    return type(batch)(_on_meta(value) for value in batch) if type(batch) in (tuple, list) else batch


def _blocks(
    calls: Mapping[str, list[torch.Tensor]], modules: Mapping[str, nn.Module], lead: tuple[int, ...]
) -> list[str]:
    """Paths of the children of one list that give a state each, all of one shape; the longest such list."""
    lists: dict[str, list[str]] = {}
    for path, outputs in calls.items():
        parent, _, name = path.rpartition(".")
        if name.isdigit() and any(
            tuple(output.shape[:2]) == lead and output.ndim in (3, 4) for output in outputs
        ):
            lists.setdefault(parent, []).append(path)
    candidates = [_of_one_shape(paths, calls, lead) for paths in lists.values()]
    # The outermost of equally long lists: a block's own list of experts is inside of it.
    return max(candidates, key=lambda paths: (len(paths), -paths[0].count(".")), default=[])


def _of_one_shape(
    paths: list[str], calls: Mapping[str, list[torch.Tensor]], lead: tuple[int, ...]
) -> list[str]:
    shapes = {
        path: next(tuple(o.shape) for o in calls[path] if tuple(o.shape[:2]) == lead and o.ndim in (3, 4))
        for path in paths
    }
    usual, _ = Counter(shapes.values()).most_common(1)[0]
    return [path for path, shape in shapes.items() if shape == usual]


def _raw_bytes(found: _Shapes, stored: int, *, gradients: bool) -> dict[str, int]:
    """What a run stores of the sampled sequences, in float32."""
    tokens = stored * found.tokens
    states = found.num_states * tokens * found.numbers * FLOAT32
    raw = {"states": states}
    if gradients:
        raw["gradients"] = states
    if found.num_connections:
        n = found.streams
        of_one = n * n + 2 * n + 2 * found.width  # H_res, H_pre and H_post, the branch's input and output
        raw["connections"] = found.num_connections * tokens * of_one * FLOAT32
    return raw


def _sum_bytes(found: _Shapes) -> int:
    """Of what is added up, in float64: Σ x and Σ x/‖x‖ of each view, counts, norms, cosines and gradients; coefficients."""
    n, views = found.streams, found.views
    of_pairs = n * n + 3 if n > 1 else 0
    of_depths = found.num_states * (2 * views * found.width + 5 * views + 1 + (n > 1) + of_pairs)
    return (of_depths + found.num_connections * (n * n + 4 * n + 3)) * FLOAT64


def _sampled_bytes(found: _Shapes) -> int:
    """Of the states, norms of gradients, and coefficients at the sampled tokens."""
    n, tokens = found.streams, min(TOKENS, found.sequences * found.tokens)
    of_depth = found.numbers * FLOAT32 + n * FLOAT64
    return tokens * (found.num_states * of_depth + found.num_connections * (n * n + 2 * n) * FLOAT32)


def _memory_bytes(found: _Shapes, raw: Mapping[str, int]) -> dict[str, int]:
    """What a measured step holds at its end, and the state that is read at the moment, in float32."""
    tokens = found.sequences * found.tokens
    of_tokens = tokens * (found.num_states * found.views * FLOAT32 + found.num_connections * 6 * FLOAT64)
    return {
        "stored sequences": sum(raw.values()),
        "sums": _sum_bytes(found),
        "sampled tokens": _sampled_bytes(found),
        "numbers of every token": of_tokens,  # the largest magnitude, and three gains in both directions
        "one state": tokens * found.numbers * FLOAT32,
    }


def _row_bytes(found: _Shapes) -> int:
    """What a measured step adds to the store: the numbers of the live metrics, and the sums that have one per step."""
    sizes = {name: len(labels) for name, labels in LABELS.items()} | dict.fromkeys(CHOSEN, 1)
    sizes |= {"depth": found.num_states, "other_depth": found.num_states, "stream": found.views}
    sizes |= {"connection": found.num_connections, "component": found.streams}
    sizes["expert"] = 0  # what chooses among experts shows only when it runs
    live = sum(prod(sizes[dim] for dim in CATALOGUE[name].dims) for name in LIVE)
    n = found.streams
    sums = found.num_states * 8 * n + found.num_connections * (n * n + 2 * n + 8)
    return (live + sums) * FLOAT64


def _work(found: _Shapes) -> dict[str, float]:
    """Statistics read each state twice, once with the state before; a row multiplies the sampled tokens with each other."""
    tokens, n, depths = found.sequences * found.tokens, found.streams, found.num_states
    numbers = depths * tokens * found.numbers
    # Of each number its square, its unit vector and its product with the one before, added up: about ten operations. The
    # products of the connections so far, in both orders, are two of n³ multiplications and additions a token.
    of_forward = 10.0 * numbers + 4.0 * found.num_connections * tokens * n**3
    sampled = min(TOKENS, tokens)
    products = 2.0 * depths * sampled**2 * found.width
    # Eigenvalues with and without the mean are 4/3 K³ each; CKA and angles compare all pairs of depths.
    of_row = (
        products + depths * 8.0 / 3.0 * sampled**3 + 2.0 * depths**2 * (sampled**2 + sampled * found.width)
    )
    return {
        "bytes": float(2 * numbers * found.bytes_per_number),
        "operations": of_forward,
        "operations of the row": of_row,
    }


def _seconds_by_part(work: Mapping[str, float], rates: Mapping[str, float]) -> dict[str, float]:
    """Work over the rates that were given."""
    wrong = [name for name in rates if name not in RATES or not rates[name] > 0]
    if wrong:
        raise InputError(
            f"got the rate {wrong[0]}={rates[wrong[0]]!r}; expected {' and '.join(RATES)} a second, above 0"
        )
    return {name: value / rates[rate] for name, value in work.items() if (rate := name.split()[0]) in rates}


def _named_bytes(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in parts.items())


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.2g} ms" if value < 1 else f"{value:.3g} s"
