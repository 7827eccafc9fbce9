"""What does a call cost, as counts that a busy machine does not change? None may grow; `python -m tests.rules.test_counts`
writes the table anew.

Of a describe, a capture without and with gradients, and a measured step of a live recording after its first one.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import depthscope as ds
from depthscope.app.demo.small_lm import NUM_BYTES, Size, build
from tests.models.plain_stack import Block, Stack

TABLE = Path(__file__).with_name("counts.json")
ROOMS = tuple(str(Path(__file__).parents[2] / room) for room in ("probes", "diagnostics", "app"))
SPECTRA = ("svd", "svdvals", "eigh", "eigvalsh", "qr")
LOOKED_AT = 100  # operations between two looks at what is alive


class Operations(TorchDispatchMode):
    """Counts operations, and the most bytes that those made are alive with."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.most_bytes = 0, 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.count % LOOKED_AT == 0:
            self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
            self.most_bytes = max(self.most_bytes, sum(size for _, size in self._made.values()))
        return result


class Calls:
    """Which files of depthscope call which, and how often a spectrum is computed."""

    def __init__(self) -> None:
        self.arrows: set[tuple[str, str]] = set()
        self.spectra = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        self.spectra += name in SPECTRA and "linalg" in file
        if _is_ours(file) and frame.f_back is not None:
            self.arrows.add((frame.f_back.f_code.co_filename, file))

    def counts(self) -> dict[str, int]:
        ours = {(caller, file) for caller, file in self.arrows if _is_ours(caller) and caller != file}
        return {
            "files": len({file for _, file in self.arrows}),
            "arrows": len(ours),
            "spectra": self.spectra,
        }


@cache
def _is_ours(file: str) -> bool:
    return str(Path(file).resolve()).startswith(ROOMS) if file.endswith(".py") else False


@contextmanager
def counted(model: nn.Module, found: dict[str, int]) -> Iterator[None]:
    """Count what is done inside."""
    forwards: Counter[str] = Counter()
    hook = model.register_forward_hook(lambda *_: forwards.update(["forwards"]))
    operations, calls = Operations(), Calls()
    gc.collect()
    gc.disable()  # when it collects is chance
    try:
        with operations:
            sys.setprofile(calls)
            try:
                yield
            finally:
                sys.setprofile(None)
    finally:
        gc.enable()
        hook.remove()
    found |= {**forwards, "operations": operations.count, "bytes": operations.most_bytes, **calls.counts()}


def networks() -> dict[str, tuple[nn.Module, dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    ids = torch.randint(0, NUM_BYTES, (2, 16))
    tokens = {"input_ids": ids, "labels": ids}
    return {
        "plain": (build("residual", size=Size(8, 16, 2, 4)), tokens),
        "thin": (Stack(Block(8) for _ in range(64)), {"x": torch.randn(2, 8, 8)}),
        "mhc": (build("mhc", size=Size(4, 16, 2, 4)), tokens),
    }


def _loss(output: Any, batch: Any) -> torch.Tensor:
    return output.square().mean() if isinstance(output, torch.Tensor) else output.loss


VERBS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "describe": ds.describe,
    "capture": ds.capture,
    "capture with gradients": lambda model, batch: ds.capture(model, batch, gradients=True, loss=_loss),
}


def measured(name: str) -> dict[str, dict[str, int]]:
    """The counts of every verb on one network, and of a plain forward and backward of it."""
    model, batch = networks()[name]
    table: dict[str, dict[str, int]] = {"plain step": {}}

    def step() -> None:
        _loss(model(**batch), batch).backward()
        model.zero_grad()

    step()
    with counted(model, table["plain step"]):
        step()
    for verb, call in VERBS.items():
        call(model, batch)  # what is imported or remembered once
        table[verb] = {}
        with counted(model, table[verb]):
            call(model, batch)
    table["live step"] = {}
    with ds.record(model, every=1, gradients=True, metrics="live") as recorder:
        for number in range(2):
            # The first one reads the model.
            with counted(model, table["live step"]) if number else nullcontext():
                loss = _loss(model(**batch), batch)
                loss.backward()
                recorder.step(loss)
            model.zero_grad()
    return table


@pytest.mark.parametrize("name", networks())
def test_no_count_grows(name):
    allowed = json.loads(TABLE.read_text(encoding="utf-8"))[name]
    found = measured(name)
    assert found.keys() == allowed.keys()
    grown = {
        f"{verb}: {what}": (allowed[verb][what], count)
        for verb, counts in found.items()
        for what, count in counts.items()
        if count > allowed[verb].get(what, 0)
    }
    assert not grown, f"(allowed, found): {grown}; where that is wanted: python -m tests.rules.test_counts"


if __name__ == "__main__":
    TABLE.write_text(
        json.dumps({name: measured(name) for name in networks()}, indent=1) + "\n", encoding="utf-8"
    )
