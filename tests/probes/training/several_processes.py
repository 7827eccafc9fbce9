"""Two processes that train together: they try many things in one start, and write what failed.

``python tests/probes/training/several_processes.py FOLDER [SCENARIO …]`` writes ``RANK.json``: scenario to "" or the error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import depthscope as ds
from depthscope import CaptureError, probes

EQUAL = 1e-10
# Of numbers that come from a spectrum or an angle of float32 states, whose order differs.
NEAR = 1e-6
WIDTH, WORDS, LENGTH = 8, 16, 6


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Plain(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Streams(nn.Module):
    def __init__(self, layers=2, streams=3):
        super().__init__()
        from hyper_connections import hyper_connections

        init, self.expand, self.reduce = hyper_connections.get_init_and_expand_reduce_stream_functions(
            streams, dim=WIDTH
        )
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            init(branch=nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()))
            for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.expand(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(self.reduce(x))


def built(kind=Plain, **options):
    random.seed(0)  # from which the connections take their first stream
    torch.manual_seed(0)
    return kind(**options).double()


def batches(counts, seed=0):
    """A batch of ids for each process, with so many sequences."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(WORDS, (count, LENGTH), generator=generator) for count in counts]


def loss_of(model, ids):
    logits = model(ids)
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


class Exchanges(TorchDispatchMode):
    """Counts the operations by which processes exchange tensors."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def steps_of(model, counts, *, rank=None, rate=0.0, reduction="mean"):
    """Train some steps on the batches of this process, or on all of them; yields the loss of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step, sizes in enumerate(counts):
        parts = batches(sizes, seed=step)
        ids = torch.cat(parts) if rank is None else parts[rank]
        loss = loss_of(model, ids)
        if reduction == "global_mean" and rank is not None:
            loss = loss * len(ids) * len(parts) / sum(map(len, parts))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def recorded(model, counts, store=None, *, rank=None, rate=0.0, reduction="mean", gradients=True, **options):
    options = {"metrics": "live", "weights": True, "max_sequences": 64, **options}
    recorder = ds.record(model, gradients=gradients, loss_reduction=reduction, store=store, **options)
    # One process alone adds the tokens of a block, and its gradients, in float32.
    step = recorder._session.step
    step.scope = replace(step.scope, exact_sums=True)
    with recorder:
        for loss in steps_of(model, counts, rank=rank, rate=rate, reduction=reduction):
            recorder.step(loss)
    assert recorder.errors == [], recorder.errors
    return recorder


@contextmanager
def alone():
    """As if this were the only process: for a run of all data in one."""
    initialised, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        yield
    finally:
        dist.is_initialized = initialised


def joined_and_one(make, counts, folder, *, wrap=DistributedDataParallel, **options):
    """The joined run of all processes, and the run of one process with all the data; in the first process."""
    rank = dist.get_rank()
    recorded(wrap(make()), counts, folder, rank=rank, **options)
    dist.barrier()
    if rank:
        return None
    joined = ds.open_run(folder)
    with alone():
        one = recorded(make(), counts, **options).run
    return joined, one


def require_equal(joined, one, *, but=(), statistics=None):
    """Every sum of the joined run is that of one process with all the data, and so is what follows from them."""
    compared = 0
    here, there = joined["statistics"].to_dataset(), one["statistics"].to_dataset()
    for name in there.data_vars:
        if name in but or there[name].dtype.kind not in "fi":
            continue
        assert name in here, f"{name} is missing"
        values, expected = here[name].values, there[name].transpose(*here[name].dims).values
        if name == "unit_pair_sum":  # of steps before the last one the pairs between parts are estimated
            values, expected = values[-1], expected[-1]
        np.testing.assert_allclose(values, expected, rtol=EQUAL, atol=EQUAL, err_msg=name)
        compared += 1
    assert compared > 12, compared
    curves, expected = ds.diagnostics.training_curves(joined), ds.diagnostics.training_curves(one)
    for name in ("residual_norm", "gradient_norm", "loss"):
        np.testing.assert_allclose(curves[name], expected[name], rtol=1e-6, err_msg=name)


# --- scenarios ---


def uneven(world, folder):
    """Uneven batches, losses that are means over each process's tokens, weights that move."""
    counts = [[3, 1, 2, 4][:world], [2, 5, 1, 1][:world], [1, 1, 3, 2][:world]]
    found = joined_and_one(built, counts, folder / "uneven")
    if found is None:
        return
    joined, one = found
    # The gradients of the parameters are what data parallelism makes of local means: not those of the mean over all.
    require_equal(joined, one, but=("weight_gradient_square_norm",))
    states = {tuple(np.round(row.ravel()[:8], 9)) for row in one.trace["residual"].values[1]}
    assert {tuple(np.round(row.ravel()[:8], 9)) for row in joined.trace["residual"].values[1]} == states
    assert joined.trace.sizes["sample"] == sum(counts[-1])
    facts = joined.attrs["parts"]
    assert facts["number"] == world
    assert "n_r/N" in facts["how"]
    ranks = joined["metrics"]["effective_rank"]
    assert ranks.attrs["estimator"].startswith(f"mean over {world} parts, of each on ")
    assert np.isfinite(joined["metrics"]["effective_rank_stderr"].values).any()
    assert "residual_norm" not in joined["metrics"]  # it follows from sums
    parts = [ds.open_run(folder / "uneven" / f"part-{number:05d}") for number in range(world)]
    mean = np.mean([part["metrics"]["effective_rank"].values for part in parts], axis=0)
    np.testing.assert_allclose(ranks.values, mean)


def sharded(world, folder):
    """`fully_shard` over all processes."""
    counts = [[3, 1, 2, 4][:world], [1] * world]
    options = {"wrap": in_shards, "rate": 0.1, "reduction": "global_mean", "metrics": None}
    found = joined_and_one(lambda: built(layers=2), counts, folder / "sharded", **options)
    if found is not None:
        require_equal(*found)


def streams(world, folder):
    """Connections between streams."""
    counts = [[3, 2, 2, 4][:world], [2, 5, 2, 3][:world]]
    found = joined_and_one(lambda: built(Streams), counts, folder / "streams", weights=False, metrics=None)
    if found is not None:
        require_equal(*found, but=("h_pre_token_count", "h_pre_sum", "connection_parameter"))


def untouched(world, folder):
    """Losses and weights are bit for bit those without a recorder, and no collective is ours, however often each measures."""
    rank, counts = dist.get_rank(), [[2] * world] * 2
    with Exchanges() as exchanges:
        dist.all_reduce(torch.ones(1))
    assert exchanges.count, "a collective of ours would not be counted"
    for name, wrap, live in (("DDP", DistributedDataParallel, "live"), ("shards", in_shards, None)):
        found = []
        for is_recorded in (False, True):
            model = wrap(built(layers=2))
            options = {"every": 1 + (rank > 0), "store": folder / f"untouched {name}", "gradients": True}
            recorder = (
                ds.record(model, weights=True, metrics=live, **options) if is_recorded else nullcontext()
            )
            with Exchanges() as exchanges, recorder:
                losses = []
                for loss in steps_of(model, counts, rank=rank, rate=0.1):
                    losses.append(loss)
                    if is_recorded:
                        recorder.step(loss)
            found.append((losses + [local_part(of) for of in model.parameters()], exchanges.count))
        assert recorder.errors == [], (name, recorder.errors)
        assert len(recorder.measured_steps) == (1 if rank else 2), name
        (plain, without), (probed, with_recorder) = found
        assert all(map(torch.equal, plain, probed)), name
        assert without == with_recorder, (name, without, with_recorder)


def same_data(world, folder):
    """Tensor parallelism: every process sees all data, which count once; the shards of the weights are added."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))
    plan = {}
    for at in range(3):
        plan |= {f"blocks.{at}.up": ColwiseParallel(), f"blocks.{at}.down": RowwiseParallel()}

    model = parallelize_module(built(), mesh, plan)
    counts = [[3], [2]]
    recorded(model, counts, folder / "same", rank=0, metrics=None)
    dist.barrier()
    if dist.get_rank() == 0:
        joined = ds.open_run(folder / "same")
        with alone():
            one = recorded(built(), counts, rank=0, metrics=None).run
        require_equal(joined, one, but=("weight_update_square_norm",))
        assert joined.attrs["parts"]["same_data"] == [f"part-{number:05d}" for number in range(1, world)]
        assert joined.trace.sizes["sample"] == 2


def ended(world, folder):
    """A process that died is named, and so is one whose part is not there; the others are shown."""
    rank = dist.get_rank()
    counts = [[2] * world] * (2 if rank == world - 1 else 4)
    recorded(built(), counts, folder / "ended", rank=rank, metrics=None)
    dist.barrier()
    if rank == 0:
        joined = ds.open_run(folder / "ended")
        assert joined["statistics"].step.values.tolist() == [0, 1, 2, 3]
        tokens = joined["statistics"]["token_count"].values.tolist()
        assert tokens == [2 * world * LENGTH] * 2 + [2 * (world - 1) * LENGTH] * 2
        assert joined.attrs["parts"]["last_step"] == {f"part-{world - 1:05d}": 1}
        assert f"part-{world - 1:05d} ended with step 1" in joined.attrs["parts"]["sentence"]
        (folder / "ended" / f"part-{world - 1:05d}").rename(folder / "moved away")
        assert ds.open_run(folder / "ended").attrs["parts"]["missing"] == [world - 1]


def resumed(world, folder):
    """An attempt goes on after the last step that all parts have."""
    rank = dist.get_rank()
    recorded(built(), [[2] * world] * (3 - (rank == 0)), folder / "resumed", rank=rank, metrics=None)
    dist.barrier()
    with ds.record(built(), store=folder / "resumed", resume=True) as recorder:
        assert recorder.position == 2
    dist.barrier()


def refused(world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    with pytest.raises(ValueError, match="would leave the others waiting"):
        ds.record(built(), metrics="live", stop_on="warn")
    with pytest.raises(ValueError, match="expected the name of a folder"):
        ds.record(built(), store=folder / "run.zarr")
    mesh = init_device_mesh("cpu", (world,))
    ids = batches([2])[0]
    for ask in (ds.record, lambda model: probes.capture(model, ids)):
        with pytest.raises(CaptureError, match="sequence parallelism at"):
            ask(in_token_shards(built(), mesh))
    sharded = context_parallel(mesh, buffers=[torch.zeros(2, 4 * world)], buffer_seq_dims=[1])
    with sharded, pytest.raises(CaptureError, match="context parallelism"):
        probes.capture(built(), ids)


class Stage(nn.Module):
    """One of two stages of a model of four blocks."""

    def __init__(self, number):
        super().__init__()
        whole = built(layers=4)
        self.embed = whole.embed if number == 0 else nn.Identity()
        self.blocks = nn.ModuleDict({str(at): whole.blocks[at] for at in (0, 1, 2, 3) if at // 2 == number})
        self.head = whole.head if number == 1 else nn.Identity()

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


def pipeline(world, folder):
    """Micro-batches of a schedule are one step; its first look at the shapes, on memory without data, is none."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank = dist.get_rank()
    model, ids = Stage(rank), batches([4])[0]

    def loss_of_part(logits, target):
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    schedule = ScheduleGPipe(
        PipelineStage(model, rank, world, torch.device("cpu")), 2, loss_fn=loss_of_part, scale_grads=False
    )
    options = {"gradients": True, "max_sequences": 4}
    with ds.record(model, stage=(rank, world), store=folder / "stages", **options) as recorder:
        schedule.step(*((ids,) if rank == 0 else ()), **({"target": ids} if rank == 1 else {}))
        recorder.step()
    dist.barrier()
    if rank == 0:
        joined, one = ds.open_run(folder / "stages"), built(layers=4)
        with alone(), ds.record(one, **options) as recorder:
            for part in ids.chunk(2):
                loss_of(one, part).backward()
            recorder.step()
        for name in ("token_count", "norm_sum", "gradient_square_norm_sum"):
            np.testing.assert_allclose(joined.statistics[name], recorder.run.statistics[name], rtol=NEAR)
        np.testing.assert_allclose(joined.trace["residual"], recorder.run.trace["residual"], rtol=NEAR)
        assert joined.trace.layer.values.tolist() == recorder.run.trace.layer.values.tolist()


def in_token_shards(model, mesh):
    """A model whose states have a part of the tokens in each process of a mesh."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))}
    for at in range(len(model.blocks)):
        plan[f"blocks.{at}.norm"] = SequenceParallel()
        plan[f"blocks.{at}.up"] = ColwiseParallel(input_layouts=Shard(1))
        plan[f"blocks.{at}.down"] = RowwiseParallel(output_layouts=Shard(1))
    plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def local_part(parameter):
    return getattr(parameter, "_local_tensor", parameter).detach()


def in_shards(model):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


SCENARIOS = (
    uneven,
    streams,
    sharded,
    untouched,
    same_data,
    ended,
    resumed,
    refused,
    pipeline,
)


def main(folder: Path, world: int = 2) -> None:
    rank = int(os.fork() == 0)  # after the imports, which take longest
    meeting = f"file://{folder}/meeting"
    timeout = timedelta(seconds=240)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world, timeout=timeout)
    wanted = sys.argv[2:]
    results = {}
    for scenario in SCENARIOS:
        if wanted and scenario.__name__ not in wanted:
            continue
        try:
            scenario(world, folder)
            results[scenario.__name__] = ""
        except (Exception, pytest.fail.Exception):
            results[scenario.__name__] = traceback.format_exc()
            sys.stderr.write(results[scenario.__name__])
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    time.sleep(0.5)  # gloo closes connections that others may still read from
    if rank == 0:
        assert os.wait()[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
