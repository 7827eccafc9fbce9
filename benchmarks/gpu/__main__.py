"""Is what is measured on a GPU equal to the CPU's, and what does it cost? ``python -m benchmarks.gpu``, at most 8 minutes.

States, gradients and matrices of one batch on the card are compared with those on the CPU, in float32, in bfloat16 and
compiled; training steps are timed with and without a recorder, plain, compiled and with CUDA graphs; synchronisations within a
measured step are counted by torch, and the peak of its memory. The page docs/gpu.md is written from that. ``--device cpu``
runs the same code without a card, and writes no page unless ``--page`` names one. It has not run on a card yet, so there is
no such page.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.capture.cases import Sizes
from benchmarks.gpu.page import markdown, text
from benchmarks.live.cases import Training, of_capture
from benchmarks.shared import tables
from benchmarks.shared.rounds import ratio

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
SECONDS = 8 * 60
SIZES = {"residual": Sizes(12, 768, 4, 512, heads=12), "mhc": Sizes(6, 384, 4, 256)}
QUICK = {"residual": Sizes(2, 32, 2, 16, heads=4), "mhc": Sizes(1, 32, 2, 16)}
# ‖device − CPU‖ / ‖CPU‖ of a variable; heuristics: the order of sums in float32, and roundings to 8 bits over all blocks.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "compiled": 1e-3}
VARIABLES = ("residual", "gradient", "h_res", "h_pre", "h_post")
RECORDED: dict[str, dict[str, Any]] = {
    "between measured steps": {"start_step": 10**9},
    'metrics="live"': {"metrics": "live"},
    'metrics="all"': {"metrics": "all"},
}
READ = 4  # measured steps until a compiled model is measured in its own code
WARM_UPS = 2


def main() -> int:
    """Measure, print the tables, and write the page."""
    arguments = parsed()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device was found (torch.cuda.is_available() is False); run it on a machine with one, or try the code by "
            "--device cpu --quick",
            file=sys.stderr,
        )
        return 2
    results = measured(arguments.device, arguments.quick, arguments.rounds)
    print(json.dumps(results, indent=1) if arguments.json else text(results))
    page = arguments.page or (PAGE if arguments.device == "cuda" and not arguments.quick else None)
    if page is not None:
        page.write_text(markdown(results))
    return 0 if all(row["is_equal"] for row in results["equality"]) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny models: only to see it run")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--page", type=Path, help=f"where the page is written (on a card {PAGE.name})")
    return parser.parse_args()


def measured(device: str, quick: bool, rounds: int, seconds: float = SECONDS) -> dict[str, Any]:
    """All results; what the time did not suffice for is named in ``left_out``."""
    from depthscope import probes

    logging.disable(logging.WARNING)
    ends = time.monotonic() + seconds
    # A product in TF32 has 10 bits, and would be compared with one of 23.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {"device": name_of(device), "equality": [], "cost": [], "left_out": []}
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # findings about untrained networks
            warnings.simplefilter("ignore")
            warnings.simplefilter(
                "error", probes.ProbeWarning
            )  # a step that was not measured must not look cheap
            for title, action, into in parts(device, quick, rounds):
                if time.monotonic() > ends:
                    results["left_out"].append(title)
                else:
                    results[into] += action()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        logging.disable(logging.NOTSET)
    return results | tables.circumstances("benchmarks.gpu", ("torch", "transformers", "hyper-connections"))


def parts(
    device: str, quick: bool, rounds: int
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]], str]]:
    """What is measured, in the order of its importance."""
    sizes = QUICK if quick else SIZES
    for case, of in sizes.items():
        for precision in ("float32", "bfloat16"):
            yield f"{case} in {precision}", partial(equality, case, of, device, precision), "equality"
        yield f"{case} compiled", partial(compiled_equality, case, of, device), "equality"
    for case, of in sizes.items():
        for mode in ("uncompiled", "compiled", "CUDA graphs"):
            if mode != "CUDA graphs" or device == "cuda":
                yield f"cost of {case}, {mode}", partial(cost, case, of, device, mode, rounds), "cost"


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def training(case: str, sizes: Sizes, device: str, precision: str = "float32") -> Training:
    """A model on a device; the same weights and batch on every one."""
    torch.manual_seed(0)
    found = of_capture(case, sizes)
    found.model.to(device, getattr(torch, precision))
    return Training(found.model, {n: x.to(device) for n, x in found.batch.items()}, found.optimizer)


def compiled(of: Training, device: str, mode: str | None = None) -> Training:
    """The same with compiled blocks; on the CPU without the compiler's kernels, which take a minute to build."""
    how = {"backend": "aot_eager"} if device == "cpu" else {"mode": mode}
    blocks = of.model.transformer.h if hasattr(of.model, "transformer") else of.model.blocks
    for block in blocks:
        block.compile(**how)
    return of


# --- equality ---


def difference(here: Any, there: Any) -> float:
    """‖here − there‖ / ‖there‖, and infinite where one is NaN and the other is not."""
    one, other = (torch.as_tensor(of.values).double() for of in (here, there))
    if not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    one, other = one.nan_to_num(), other.nan_to_num()
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other).clamp_min(1e-30))


def equality(case: str, sizes: Sizes, device: str, precision: str) -> list[dict[str, Any]]:
    """How far raw states, gradients and matrices on a device are from those of the CPU, in one precision."""
    from depthscope import probes

    def run(on: str, kind: str) -> Any:
        of = training(case, sizes, on, kind)
        return probes.capture(of.model, of.batch, gradients=True, max_sequences=sizes.batch).trace

    here, there = run(device, precision), run("cpu", precision)
    found = {name: difference(here[name], there[name]) for name in VARIABLES if name in there}
    return [row(case, precision, found, TOLERANCES[precision])]


def compiled_equality(case: str, sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """The same of the sums over every token that a compiled model hands out, after the steps that are read uncompiled."""
    from depthscope import probes

    def run(on: str, compiles: bool) -> Any:
        of = training(case, sizes, on)
        of = compiled(of, on) if compiles else of
        with probes.record(of.model, gradients=True) as recorder:
            for _ in range(READ + 1):
                recorder.step(of.step())
        return recorder.run.statistics

    here, there = run(device, True), run("cpu", False)
    names = ("norm_sum", "square_norm_sum", "gradient_square_norm_sum", "h_res_sum", "h_post_sum")
    found = {n: difference(here[n].isel(step=-1), there[n].isel(step=-1)) for n in names if n in there}
    return [row(case, "compiled", found, TOLERANCES["compiled"])]


def row(case: str, how: str, found: dict[str, float], limit: float) -> dict[str, Any]:
    is_equal = bool(found) and max(found.values()) <= limit
    return {"case": case, "how": how, "errors": found, "limit": limit, "is_equal": is_equal}


# --- cost ---


def cost(case: str, sizes: Sizes, device: str, mode: str, rounds: int) -> list[dict[str, Any]]:
    """Times of recorded steps relative to plain ones, in turn with these; memory and synchronisations of each."""
    from depthscope import probes

    of = training(case, sizes, device)
    if mode != "uncompiled":
        of = compiled(of, device, "reduce-overhead" if mode == "CUDA graphs" else None)
    ways: dict[str, Any] = {"plain": None}
    ways |= {way: probes.record(of.model, gradients=True, **options) for way, options in RECORDED.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rows: dict[str, dict[str, Any]] = {way: {} for way in ways}
    for number in range(READ + WARM_UPS + rounds):
        for way, recorder in ways.items():
            # One recorder at a time: its hooks are on from here to the end of its step.
            with recorder or nullcontext(), counted(device) as syncs:
                took, peak = step(of, recorder, device, syncs)
            if number >= READ + WARM_UPS:
                seconds[way].append(took)
                rows[way] = {"mib": peak, "syncs": [syncs["in_step"], syncs["at_end"]]}
    return [
        {"case": case, "mode": mode, "way": way, **ratio(seconds[way], seconds["plain"]), **rows[way]}
        for way in ways
    ]


def step(of: Training, recorder: Any, device: str, syncs: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds of a step, and the peak of its memory in MiB above the model's."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        floor = torch.cuda.memory_allocated()
    started = time.perf_counter()
    loss = of.step()
    syncs["ended"] = True
    if recorder is not None:
        recorder.step(loss)
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    return took, (torch.cuda.max_memory_allocated() - floor) / 2**20 if device == "cuda" else None


@contextmanager
def counted(device: str) -> Iterator[dict[str, Any]]:
    """Synchronisations that torch notes, before the end of a step and at it; None where there is no device to wait for."""
    found: dict[str, Any] = {"ended": False, "in_step": None, "at_end": None}
    if device != "cuda":
        yield found
        return
    found |= {"in_step": 0, "at_end": 0}
    shown = warnings.showwarning

    def note(message: Any, *rest: Any, **more: Any) -> None:
        if "synchroniz" in str(message):
            found["at_end" if found["ended"] else "in_step"] += 1
        else:
            shown(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchroniz.*")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    sys.exit(main())
