"""Where do the one reading and today's capture differ? ``python -m tests.models.reading_comparison [word] [--matrix]``.

A line a model: what each found, and the first difference between their states, labels and matrices. Who is right is told by
what is independent of both: the matrix's verdict of the capture (plain hooks), and the reading's own proof.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import xarray as xr

from depthscope import probes
from depthscope.diagnostics import schema
from depthscope.probes.reading.description import MemoryReading, NetworkReading
from depthscope.probes.reading.read import read_model
from tests.fuzz.isolation import in_child

ROUNDING = 2e-5
MOST_SEQUENCES = 4096


def called(model: torch.nn.Module, batch: Any) -> tuple[Any, Any]:
    """Today's run, or why there is none; and the reading."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        try:
            run: Any = probes.capture(model, batch, max_sequences=MOST_SEQUENCES)
        except Exception as error:
            run = f"{type(error).__name__}: {error}"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return run, read_model(model, batch)


def difference(run: Any, found: NetworkReading) -> tuple[str, str]:
    """A word and the first difference: same, today only, reading only, neither, or what differs."""
    if isinstance(run, str):
        line = f"{' '.join(run.split())[:90]}"
        return (
            ("neither", found.refused[:90])
            if found.refused
            else ("reading only", f"{summary(found)}; today {line}")
        )
    if found.refused:
        return (
            "today only",
            f"{found.refused[:110]}; today {run.attrs['family']}, {run.attrs.get('proof', '')}",
        )
    left = list(found.memories)
    for group in schema.chains(run):
        trace = schema.chain_dataset(run, "trace", group)
        whys = [(memory, _unlike(trace, memory)) for memory in left]
        fits = next((memory for memory, why in whys if not why), None)
        if fits is None:
            return (
                "differ",
                f"{group or 'chain'}: {min((why for _, why in whys), key=len, default='no memory left')} | {summary(found)}",
            )
        left.remove(fits)
    proof = next((memory.proof for memory in found.memories if not memory.is_proven), "")
    more = f" and {len(left)} more" if left else ""
    return ("same" + (", unproven" if proof else ""), proof[:110] + more)


def summary(found: NetworkReading) -> str:
    """What was read."""
    return "; ".join(
        f"{m.name} {len(m.states)} states n={m.num_streams} {m.proof[:80]}" for m in found.memories
    )


def _unlike(trace: xr.Dataset | None, memory: MemoryReading) -> str:
    assert trace is not None
    states = torch.from_numpy(trace["residual"].values)
    states = states.reshape(states.shape[0], -1, *states.shape[3:]).float()
    at, places = 0, []
    for depth, state in enumerate(states):
        label = (int(trace["layer"].values[depth]), str(trace["site"].values[depth]))
        place = next(
            (
                n
                for n in range(at, len(memory.states))
                if same(memory.states[n].value, state, memory.token_shape)
            ),
            None,
        )
        if place is None:
            return (
                f"state {depth} of {len(states)} {label} {tuple(state.shape)} is none of {len(memory.states)}"
            )
        mine = memory.states[place]
        if (mine.layer, mine.site) != label:
            return f"state {depth} is {label}, read as {(mine.layer, mine.site)}"
        at = place + 1
        places.append(place)
    return _unlike_parts(trace, memory, places)


def _unlike_parts(trace: xr.Dataset, memory: MemoryReading, places: list[int]) -> str:
    joined = {(c.depth_in, c.depth_out): c for c in memory.connections}
    for number in range(trace.sizes.get("connection", 0)):
        at = trace.isel(connection=number)
        connection = joined.get((places[int(at["depth_in"])], places[int(at["depth_out"])]))
        if connection is None:
            continue
        own: Mapping[str, torch.Tensor] = connection.parts
        if len(connection.branches) == 1:
            own = {**own, **connection.branches[0].parts}
        for name in ("h_res", "h_pre", "h_post"):
            if name in at and name in own and memory.num_streams > 1:
                value = torch.from_numpy(at[name].values).float()
                value = value.reshape(-1, *value.shape[2:])
                if not same(own[name], value, memory.token_shape):
                    return f"{name} of connection {number} differs"
    return ""


def same(mine: torch.Tensor, true: torch.Tensor, token_shape: tuple[int, ...]) -> bool:
    """Whether two arrays are the same, in either order of sequences and tokens."""
    mine = mine.float()
    if mine.shape[0] == 1:
        mine = mine.expand(true.shape[0], *mine.shape[1:])
    if mine.shape != true.shape:
        return False
    orders = [torch.arange(len(mine))]
    if len(token_shape) == 2 and len(mine) == token_shape[0] * token_shape[1]:
        orders.append(orders[0].reshape(token_shape).T.reshape(-1))
    scale = ROUNDING * max(float(true.abs().max()), 1e-6)
    return any(float((mine[order] - true).abs().max()) < scale for order in orders)


def subjects(matrix: bool, tenth: bool, word: str) -> Iterator[tuple[str, Any]]:
    """Names, and functions that give a model and a batch."""
    if matrix:
        from tests.models.matrix.cases import SEQUENCES, TOKENS, cases

        for case in cases():
            if (
                case.subjects is not None
                and word in f"{case.package}/{case.name}"
                and (case.in_tenth or not tenth)
            ):
                yield (
                    f"{case.package}/{case.name}",
                    partial(_built, case, (SEQUENCES, TOKENS)),
                )
        return
    from tests.models.families import FAMILIES, built

    for family in FAMILIES:
        if word in family.name:
            yield family.name, partial(_pair, built, family)


def _built(case: Any, sizes: tuple[int, int]) -> list[tuple[torch.nn.Module, Any]]:
    return [(subject.model, subject.make(*sizes)) for subject in case.subjects(0)]


def _pair(built: Any, family: Any) -> list[tuple[torch.nn.Module, Any]]:
    return [(built(family), family.batch())]


def compared(make: Any) -> list[tuple[str, str]]:
    """The words and lines of one case; in a process of its own."""
    from tests.models.matrix.cases import NotBuildable

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return [difference(*called(model, batch)) for model, batch in make()]
    except NotBuildable:
        return [("not buildable", "")]
    except Exception as error:
        return [("crashed", f"{type(error).__name__}: {str(error)[:200]}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--tenth", action="store_true")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    for name, make in subjects(args.matrix, args.tenth, args.word):
        ended = in_child(partial(compared, make), seconds=60)
        for word, line in ended.answer or [("crashed", "no answer: " + (ended.stderr or "")[-200:])]:
            counts[word] += 1
            if word != "same" or line:
                sys.stdout.write(f"{word:16}| {name}: {line}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{dict(counts)}\n")


if __name__ == "__main__":
    main()
