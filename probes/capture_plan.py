"""What would a capture of this model take? Its states, bytes, time and collectives, from a forward without values."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.modules import all_parameters, module_paths
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.session.model_call import call_model
from depthscope.probes.statistics.depth_sketch import NUM_BUCKETS, NUM_HEAVY
from depthscope.probes.statistics.streamed_sums import ALL_STREAMS_BYTES

FLOAT32, FLOAT64 = 4, 8
SECONDS_OF_TRIAL = 0.05  # of each of the two rates that a time is estimated with
LIVE_TOKENS = 128  # that a live row takes of each step, by default

UNPROVEN = "by shapes alone: a forward without values proves nothing; what mixes the streams is proven when the model runs"


@dataclass(frozen=True)
class CapturePlan:
    """What a capture of a model would take; prints as a page. Bytes and seconds are estimates by the formulas named there.

    ``raw`` has bytes of what is stored of the sampled sequences, ``streamed`` of what is added up over every token, ``memory``
    the peak above the model's own, ``seconds`` of one forward's statistics on this machine, ``collectives`` the bytes of a
    measured step by process.
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
    raw: dict[str, int]
    streamed: dict[str, int]
    memory: int
    seconds: dict[str, float]
    rates: dict[str, float]
    collectives: dict[str, int]
    proof: str = UNPROVEN

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        state = f"{self.sequences} × {self.tokens} × {self.streams} × {self.width}"
        lines = [
            f"{self.model}: {self.num_parameters:.3g} parameters, {self.num_blocks} × {self.block}; planned without values",
            f"  states       {self.num_states} of sequences × tokens × streams × width = {state}",
            f"  connections  {self.num_connections} that give a matrix of {self.streams} × {self.streams} streams"
            if self.num_connections
            else "  connections  none that gives a matrix of streams",
            f"  proof        {self.proof}",
            f"  raw          {_named_bytes(self.raw)}",
            f"  streamed     {_named_bytes(self.streamed)}",
            f"  memory       {_size(self.memory)} above the model's own at the peak, without streaming: what is stored and "
            "added up, and one state in float32",
            "  time         "
            + ", ".join(f"{name} {_seconds(value)}" for name, value in self.seconds.items())
            + f" a forward, from bytes and operations at {self.rates['bytes'] / 1e9:.2g} GB/s and "
            f"{self.rates['operations'] / 1e9:.2g} GFLOP/s, as measured here",
        ]
        if self.processes > 1:
            lines.append(
                f"  collectives  of {self.processes} processes a measured step: one SUM of {_size(self.collectives['sum'])}, "
                f"one MAX of {_size(self.collectives['max'])}, {_size(self.collectives['sampled'])} of sampled tokens "
                "gathered once"
            )
        return "\n".join(lines)


def capture_plan(
    model: nn.Module, batch: Any, *, gradients: bool = False, sequences: int | None = None, processes: int = 1
) -> CapturePlan:
    """Plan a capture from one forward on the meta device.

    Parameters
    ----------
    model : Module
        On the meta device, as built under ``torch.device("meta")``.
    batch : object
        One batch, as in `probes.capture`; of its tensors the shapes count.
    gradients : bool
        Whether gradients are captured.
    sequences : int, optional
        How many are stored raw; all of the batch by default.
    processes : int
        How many measure together.

    Returns
    -------
    CapturePlan

    Raises
    ------
    CaptureError
        Where the forward does not run without values, or no blocks whose states have one shape are found in it.
    """
    found = _states_by_shape(model, batch)
    kept = found.sequences if sequences is None else sequences
    raw = _raw_bytes(found, kept, gradients=gradients)
    streamed = _streamed_bytes(found)
    rates = _measured_rates()
    one_state = found.sequences * found.tokens * found.streams * found.width * FLOAT32
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
        raw=raw,
        streamed=streamed,
        memory=sum(raw.values()) + streamed["statistics"] + one_state,
        seconds=_seconds_by_part(found, rates),
        rates=rates,
        collectives=_collective_bytes(found),
    )


def is_planned(model: nn.Module) -> bool:
    """Whether a model is on the meta device as a whole, and not offloaded: hooks bring the values of that one.

    Parameters
    ----------
    model : Module
        The model.

    Returns
    -------
    bool
    """
    parameters = all_parameters(model)
    offloaded = any(hasattr(module, "_hf_hook") for _, module in module_paths(model))
    return bool(parameters) and all(parameter.is_meta for parameter in parameters) and not offloaded


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


def _raw_bytes(found: _Shapes, kept: int, *, gradients: bool) -> dict[str, int]:
    """What a run stores of the sampled sequences, in float32."""
    tokens = kept * found.tokens
    states = found.num_states * tokens * found.numbers * FLOAT32
    raw = {"states": states}
    if gradients:
        raw["gradients"] = states
    if found.num_connections:
        n = found.streams
        of_one = n * n + 2 * n + 2 * found.width  # H_res, H_pre and H_post, the branch's input and output
        raw["connections"] = found.num_connections * tokens * of_one * FLOAT32
    return raw


def _streamed_bytes(found: _Shapes) -> dict[str, int]:
    """Sums over every token in float64, and what ``streaming=True`` adds to them."""
    moments = found.width**2 * FLOAT64
    views = 1 + (found.streams if found.streams > 1 and found.streams * moments <= ALL_STREAMS_BYTES else 0)
    return {
        # Σ x and Σ x/‖x‖ of each stream, and eight numbers of norms, cosines and gradients
        "statistics": found.num_states * (2 * found.numbers + 8 * found.streams) * FLOAT64,
        "moments with streaming": found.num_states * views * moments,
        "sketch with streaming": found.num_states * (NUM_BUCKETS + NUM_HEAVY) * found.width * FLOAT64,
    }


def _collective_bytes(found: _Shapes) -> dict[str, int]:
    """What a measured step reduces: additive sums in one flat buffer, maxima in another, sampled tokens gathered once."""
    n, connections = found.streams, found.num_connections
    of_depths = found.num_states * (found.numbers + 6 * n)  # Σ x/‖x‖, counts, norms, cosines, gradients
    of_connections = connections * (n * n + 2 * n + 6)  # coefficients, gains, ranges of logits
    return {
        "sum": (of_depths + of_connections) * FLOAT64,
        "max": (found.num_states * 2 * n + connections * 3) * FLOAT64,
        "sampled": found.num_states * LIVE_TOKENS * found.width * FLOAT32,
    }


def _seconds_by_part(found: _Shapes, rates: Mapping[str, float]) -> dict[str, float]:
    """Statistics read each state twice, once with the state before; moments multiply every token with itself."""
    tokens = found.num_states * found.sequences * found.tokens
    operations = 2 * tokens * found.width**2
    return {
        "statistics": 2 * tokens * found.numbers * found.bytes_per_number / rates["bytes"],
        "streaming": operations / rates["operations"],
    }


def _measured_rates() -> dict[str, float]:
    """Bytes that are added up, and operations of a matrix product, a second on this machine."""
    values, matrix = torch.ones(2**22), torch.ones(512, 512)
    seconds_of_sum = _seconds_of(lambda: values.square().sum())
    seconds_of_product = _seconds_of(lambda: matrix @ matrix)
    return {"bytes": values.nbytes / seconds_of_sum, "operations": 2 * 512**3 / seconds_of_product}


def _seconds_of(work: Any) -> float:
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS_OF_TRIAL or not count:
        work()
        count += 1
    return (time.perf_counter() - began) / count


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
