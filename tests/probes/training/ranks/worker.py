"""One of several processes under torchrun: tries many things in one start, and writes what failed.

``torchrun --nproc-per-node 2 tests/probes/training/ranks/worker.py FOLDER`` writes ``RANK.json``: scenario to "" or the error.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from depthscope import diagnostics, probes
from depthscope.diagnostics.quantities.registry import ROW_FACTS
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.training.live.findings import TrainingStopped
from depthscope.probes.training.notices import ProbeWarning

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


def trained(model, steps, *, counts=None, rate=0.0, reduction="mean", store=None, data=None, **options):
    """A recorder after some steps; ``counts`` has the sequences of each process (or of the part ``data``), by step."""
    rank = dist.get_rank() if data is None else data
    alone = options.get("group") == "none"
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    options = {
        "gradients": True,
        "metrics": "live",
        "live_tokens": 256,
        "weights": True,
        "group_timeout": 20.0,
    } | options
    recorder = probes.record(model, loss_reduction=reduction, optimizer=optimizer, store=store, **options)
    # One process alone adds the tokens of a block, and its gradients, in float32.
    session = recorder._session
    session.scope = session.first.scope = replace(session.scope, exact_sums=True)
    with recorder:
        for step in range(steps):
            parts = batches(counts[step], seed=step)
            ids = torch.cat(parts) if alone else parts[rank]
            # Of no token: data parallelism still waits for its gradients.
            loss = loss_of(model, ids) if len(ids) else model(ids).sum() * 0.0
            if reduction == "global_mean" and not alone:
                loss = loss * len(ids) * len(parts) / sum(map(len, parts))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss)
    return recorder


def require_equal(together, one, *, near=(), rows=slice(None)):
    """Every statistic and metric of the run of several processes is that of one process with all the data.

    ``rows``: the steps of the one that the others have.
    """
    compared = 0
    for group, limit in (("statistics", EQUAL), ("metrics", EQUAL)):
        here, there = together[group].to_dataset(), one[group].to_dataset().isel(step=rows)
        for name in there.data_vars:
            if name in (*ROW_FACTS, "connection_parameter") and name not in here:
                continue  # of weights of which a process has a part
            assert name in here, f"{group}/{name} is missing"
            if here[name].dtype.kind not in "fi" or name in near or name == "same_sampled_tokens":
                continue
            if "attention" in name or name.startswith("sink"):
                continue
            exact = group == "statistics" or name in EXACT
            tolerance = limit if exact else NEAR
            values, expected = here[name].values.astype(float), there[name].values.astype(float)
            np.testing.assert_allclose(
                values, expected, rtol=tolerance, atol=tolerance, err_msg=f"{group}/{name}"
            )
            compared += 1
    assert compared > 15, compared


OF_GRADIENTS = ("weight_gradient_square_norm", "weight_gradient_norm")
EXACT = (
    "residual_norm",
    "gradient_norm",
    "backward_gain",
    "adjacent_cosine",
    "token_cosine",
    "stream_cosine",
    "loss",
)


def compared(make, steps, counts, *, wrap=DistributedDataParallel, near=(), store=None, **options):
    together = trained(wrap(make()), steps, counts=counts, store=store, **options)
    try:
        if dist.get_rank() == 0:
            one = trained(make(), steps, counts=counts, group="none", **options)
            assert len(together.run["statistics"].step) == steps
            require_equal(together.run, one.run, near=near)
    finally:
        dist.barrier()
    return together


# --- scenarios ---


def uneven(world, folder):
    """Uneven batches, the last process without data in some steps, losses that are means over each process's tokens."""
    counts = [[3, 1, 2, 4][:world], [*[2, 5, 1][: world - 1], 0], [*[4, 1, 1][: world - 1], 0]]
    # The gradients of the parameters are what data parallelism makes of local means: not those of the mean over all.
    recorder = compared(
        built,
        3,
        counts,
        near=OF_GRADIENTS,
        store=folder / "uneven.zarr.zip" if dist.get_rank() == 0 else None,
    )
    if dist.get_rank() == 0:
        attrs = recorder.run.attrs
        assert attrs["processes"] == world
        assert "DistributedDataParallel" in attrs["processes_chosen"]
        assert "n_r/N" in attrs["processes_loss"]
        assert list(recorder.run.trace["module"].values.astype(str))[1] == "blocks.0"
        saved = diagnostics.open_run(folder / "uneven.zarr.zip")
        assert len(saved["statistics"].step) == 3


def learning(world, folder):
    """Steps that move the weights, with losses as transformers' Trainer makes them: the weights' numbers are equal too."""
    counts = [[3, 1, 2, 4][:world], [*[2, 5, 1][: world - 1], 0], [1] * world]
    compared(built, 3, counts, rate=0.1, reduction="global_mean")


def streams(world, folder):
    """Connections between streams."""
    counts = [[3, 1, 2, 4][:world], [*[2, 5, 1][: world - 1], 0]]
    near = (*OF_GRADIENTS, *QUANTILES)
    recorder = compared(lambda: built(Streams), 2, counts, near=near)
    if dist.get_rank() == 0:
        one = trained(built(Streams), 2, counts=counts, group="none")
        for name in ("mixing_gain", "composite_gain"):
            gains, expected = recorder.run["metrics"][name], one.run["metrics"][name]
            for reduction in ("mean", "max"):
                np.testing.assert_allclose(
                    gains.sel(reduction=reduction),
                    expected.sel(reduction=reduction),
                    rtol=EQUAL,
                    err_msg=name,
                )
            np.testing.assert_allclose(gains, expected, rtol=0.05, err_msg=name)


QUANTILES = ("mixing_gain", "composite_gain")


def sharded(world, folder):
    """`fully_shard` over all processes, with checkpointed blocks."""
    from torch.distributed.fsdp import fully_shard

    def wrap(model):
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)

    counts = [[3, 1, 2, 4][:world], [1] * world]
    recorder = compared(built, 2, counts, wrap=wrap, rate=0.1, reduction="global_mean")
    if dist.get_rank() == 0:
        assert "fully_shard" in recorder.run.attrs["processes_chosen"]
        assert list(recorder.run.trace["module"].values.astype(str))[1] == "blocks.0"


class Exchanging(Plain):
    """A model that exchanges something in its forward, as mixtures of experts do."""

    def forward(self, ids):
        total = torch.ones(1)
        dist.all_reduce(total)
        return super().forward(ids) * total.item()


def one_dimensional(model):
    """A model whose scalar parameters have an axis: `fully_shard` refuses scalars."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 0:
                module._parameters[name] = nn.Parameter(parameter.detach()[None].clone())
    return model


def with_compiled_blocks(model, *, wrapper=False):
    for number, block in enumerate(model.blocks):
        if wrapper:
            model.blocks[number] = torch.compile(block, backend="aot_eager", fullgraph=True)
        else:
            block.compile(backend="aot_eager", fullgraph=True)
    return model


def in_shards(model):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def compiled_whole(model):
    return torch.compile(model, backend="aot_eager")


WAYS_TO_COMPILE = {
    "DDP(compile)": lambda model: DistributedDataParallel(compiled_whole(model)),
    "compile(DDP)": lambda model: compiled_whole(DistributedDataParallel(model)),
    "blocks, DDP": lambda model: DistributedDataParallel(with_compiled_blocks(model)),
    "blocks, shards": lambda model: in_shards(with_compiled_blocks(model)),
    "wrapped blocks, shards": lambda model: in_shards(with_compiled_blocks(model, wrapper=True)),
    "shards, wrapped blocks": lambda model: with_compiled_blocks(in_shards(model), wrapper=True),
}


def compiled_pairs(kind, ways, steps, counts, *, lost=(), **options):
    """Compiled models of several processes are measured, in their compiled code, as one uncompiled process with all data."""
    options = {"rate": 0.1, "reduction": "global_mean", "counts": counts, **options}

    def make():
        return one_dimensional(built(kind))

    for way in ways:
        torch._dynamo.reset()
        together = None

        def run(way=way):
            nonlocal together
            together = trained(WAYS_TO_COMPILE[way](make()), steps, **options)

        told = warned(run)
        # The steps that only show the places have a sentence each.
        assert ["showed where compiled code" in sentence for sentence in told] == [True] * len(lost), (
            way,
            told,
        )
        assert together._session.compiled.in_graph.plan is not None, (
            way,
            together._session.compiled.in_graph.failed,
        )
        if dist.get_rank() == 0:
            one = trained(make(), steps, group="none", **options)
            rows = [step for step in range(steps) if step not in lost]
            assert together.run["statistics"].step.values.tolist() == rows, way
            require_equal(together.run, one.run, near=(*OF_GRADIENTS, *QUANTILES, *AFTER_LOST), rows=rows)
        dist.barrier()


AFTER_LOST = ("loss_rise", "h_pre_token_count")  # of the steps before


def compiled(world, folder):
    """Compiled blocks and models under DistributedDataParallel and `fully_shard`."""
    counts = [[3, 1, 2, 2][:world]] * 3
    compiled_pairs(Plain, ("DDP(compile)", "blocks, DDP", *SHARDED), 3, counts)
    compiled_pairs(Plain, ("compile(DDP)",), 3, counts, lost=(0,))


SHARDED = ("blocks, shards", "wrapped blocks, shards", "shards, wrapped blocks")


def compiled_streams(world, folder):
    compiled_pairs(Streams, ("blocks, DDP", "blocks, shards"), 4, [[2, 1, 1, 2][:world]] * 4)


def compiled_in_shards(world, folder):
    counts = [[2, 1, 1, 3][:world]] * 4
    compiled_pairs(Plain, ("blocks, shards",), 4, counts)
    compiled_pairs(Streams, ("blocks, shards",), 4, counts)


def weights_untouched(world, folder):
    """Weights of compiled models in several processes are bit for bit those of a training without a recorder."""
    for kind, way in ((Plain, "blocks, DDP"), (Streams, "blocks, shards")):
        after = []
        for is_recorded in (False, True):
            torch._dynamo.reset()
            model = WAYS_TO_COMPILE[way](one_dimensional(built(kind)))
            if is_recorded:
                trained(model, 4, counts=[[2] * world] * 4, rate=0.1)
            else:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                before = [local_part(of).clone() for of in model.parameters()]
                for step in range(4):
                    loss_of(model, batches([2] * world, seed=step)[dist.get_rank()]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            after.append([local_part(of) for of in model.parameters()])
        assert all(map(torch.equal, *after)), (kind, way)
        assert not all(map(torch.equal, before, after[0])), "nothing was trained"


def local_part(parameter):
    return getattr(parameter, "_local_tensor", parameter).detach()


def compiled_refused(world, folder):
    """What cannot be measured in compiled code, and exchanges something in a forward, is refused; nothing waits."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))

    class Dropping(Plain):
        def __init__(self):
            super().__init__(layers=1)
            self.blocks[0].down = nn.Sequential(self.blocks[0].down, nn.Dropout(0.1))

    refused = {
        "exchange something": lambda: compiled_whole(built(Exchanging)),
        "compiled as a whole": lambda: compiled_whole(in_shards(built())),
        "draws random numbers": lambda: in_shards(with_compiled_blocks(built(Dropping))),
        "could wait for them": lambda: with_compiled_blocks(in_token_shards(built(), mesh, local=False)),
    }
    for words, make in refused.items():
        torch._dynamo.reset()
        sentences = warned(
            lambda make=make: trained(make(), 2, counts=[[1] * world] * 2, group="world", data=0)
        )
        assert [words in sentence for sentence in sentences] == [True] * 2, (words, sentences)


def warned(action):
    """The sentences of our warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught if issubclass(each.category, ProbeWarning)]


def other_model(world, folder):
    """One process has one block more: all are told what differs, and nobody waits."""
    rank = dist.get_rank()
    began = time.monotonic()
    sentences = warned(
        lambda: trained(
            built(layers=3 + (rank == 1)), 2, counts=[[1] * world] * 2, group="world", weights=False
        )
    )
    assert time.monotonic() - began < 10
    assert len(sentences) == 2, sentences
    assert "only process 1 has" in sentences[0], sentences[0]
    assert "blocks.3" in sentences[0], sentences[0]


def other_settings(world, folder):
    rank = dist.get_rank()
    told = message_of(
        CaptureError, lambda: trained(built(), 1, counts=[[1] * world], group="world", every=1 + rank)
    )
    assert "every is 1 in process 0 and 2 in process 1" in told, told


def message_of(kind, action):
    """The message of an error that has to be raised."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def failing(world, folder):
    """Our measuring fails in one process in one step: all are told why, and the next step is measured."""
    rank = dist.get_rank()
    model = built()

    def run():
        nonlocal recorder
        with probes.record(model, metrics="live", group="world", group_timeout=20.0) as recorder:
            for step in range(3):
                model(batches([2] * world, seed=step)[rank])
                if step == 1 and rank == world - 1:
                    recorder._session.report(ValueError("a hook of ours failed"))
                recorder.step()

    recorder = None
    sentences = warned(run)
    assert len(sentences) == 1, sentences
    assert f"process {world - 1} could not measure it: a hook of ours failed" in sentences[0]
    if rank == 0:
        assert recorder.run["statistics"].step.values.tolist() == [0, 2]


def other_step(world, folder):
    rank = dist.get_rank()
    model = built()

    def run():
        with probes.record(model, group="world", every=2, group_timeout=20.0) as recorder:
            if rank == 1:
                recorder.position = 2
            model(batches([2] * world)[rank])
            recorder.step()

    (sentence,) = warned(run)
    assert "process 1 is at step 2" in sentence, sentence


def missing(world, folder):
    """One process calls step() once less: the others go on after the timeout, and measure nothing more."""
    rank = dist.get_rank()
    model = built()

    def run():
        with probes.record(model, group="world", group_timeout=1.5) as recorder:
            for step in range(3 if rank != world - 1 else 1):
                model(batches([2] * world, seed=step)[rank])
                recorder.step()

    began = time.monotonic()
    sentences = warned(run)
    assert time.monotonic() - began < 10
    if rank != world - 1:
        (sentence,) = sentences
        assert "recorder.step() equally often" in sentence
    dist.barrier()


def alone(world, folder):
    """Only the first process records, as is often written: it waits once, says so, and trains on."""
    rank = dist.get_rank()
    if rank == 0:
        model = built()

        def run():
            with probes.record(model, group="world", group_timeout=1.0) as recorder:
                model(batches([2])[0])
                recorder.step()

        (sentence,) = warned(run)
        assert "every process has to open the recorder" in sentence
    dist.barrier()


def unknown(world, folder):
    told = message_of(ValueError, lambda: probes.record(built()))
    assert "group='world'" in told
    assert "group='none'" in told


def stopping(world, folder):
    """A severe finding of the first process stops all of them at the same step."""
    rank = dist.get_rank()
    model = built()
    with torch.no_grad():
        model.blocks[1].down.weight.fill_(float("inf"))  # no state after it is finite
    ended = None
    with probes.record(
        DistributedDataParallel(model), gradients=True, metrics="live", stop_on="warn", group_timeout=20.0
    ) as recorder:
        try:
            for step in range(4):
                loss_of(model, batches([2] * world, seed=step)[rank]).backward()
                recorder.step(1.0)
        except TrainingStopped as stopped:
            ended = step, len(stopped.findings) > 0
    assert ended == (1, rank == 0), ended


def empty_first(world, folder):
    """The process that writes has no data at first: said, and measured from its first batch on; later steps without are."""
    rank = dist.get_rank()
    model = built()
    counts = [[0] + [2] * (world - 1), [2] * world, [0] + [2] * (world - 1)]

    def run():
        nonlocal recorder
        with probes.record(model, metrics="live", group="world", group_timeout=20.0) as recorder:
            for step in range(3):
                model(batches(counts[step], seed=step)[rank])
                recorder.step()

    recorder = None
    sentences = warned(run)
    (sentence,) = sentences
    assert "which writes, has had no data yet" in sentence
    if rank == 0:
        assert recorder.run["statistics"].step.values.tolist() == [1, 2]
        tokens = recorder.run["statistics"]["token_count"].values.tolist()
        assert tokens == [2 * world * LENGTH, 2 * (world - 1) * LENGTH]


def in_token_shards(model, mesh, *, local=True):
    """A model whose states have a part of the tokens in each process of a mesh, as plain tensors or as DTensors."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    given = {"output_layouts": Shard(1), "use_local_output": local}
    plan = {"embed": RowwiseParallel(input_layouts=Replicate(), **given)}
    for at in range(len(model.blocks)):
        plan[f"blocks.{at}.norm"] = SequenceParallel()
        plan[f"blocks.{at}.up"] = ColwiseParallel(input_layouts=Shard(1))
        plan[f"blocks.{at}.down"] = RowwiseParallel(**given)
    plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def parts_of_sequences(world, folder):
    """Tokens that are spread over processes are measured as those of one process, padding left out, sequences whole."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))

    def is_real(arguments):
        ids = arguments["ids"]
        return ids % 5 > 0

    for local, mask in ((True, None), (False, is_real)):
        options = {"mask": mask, "max_sequences": 2, "rate": 0.1, "data": 0, "counts": [[3], [2]]}
        wrapped = in_token_shards(built(), mesh, local=local)
        together = trained(wrapped, 2, group="world", **options)
        if dist.get_rank() == 0:
            one = trained(built(), 2, group="none", **options)
            require_equal(together.run, one.run, near=OF_GRADIENTS)
            assert set(together.run.trace.data_vars) == set(one.run.trace.data_vars)
            for name, expected in one.run.trace.data_vars.items():
                np.testing.assert_allclose(
                    together.run.trace[name], expected, rtol=NEAR, atol=NEAR, err_msg=name
                )
    told = message_of(ValueError, lambda: probes.record(in_token_shards(built(), mesh)))
    assert "group='world'" in told, told
    model = in_token_shards(built(), mesh)
    model.blocks[1].register_forward_hook(lambda module, args, output: output.cumsum(1))
    sentences = warned(lambda: trained(model, 1, group="world", data=0, counts=[[2]]))
    assert "was not proven" in sentences[0], sentences


def parts_and_shards(world, folder):
    """The same with `fully_shard` over the other axis of processes, whose batches are uneven."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))

    def wrapped():
        model = in_token_shards(built(), mesh["tp"])
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    told = message_of(ValueError, lambda: probes.record(wrapped()))
    assert "would not measure" in told, told
    counts = [[3, 1], [1, 4]]
    data = mesh["dp"].get_local_rank()
    together = trained(wrapped(), 2, group="world", counts=counts, data=data, max_sequences=2)
    if dist.get_rank() == 0:
        one = trained(built(), 2, group="none", counts=counts, max_sequences=2)
        require_equal(together.run, one.run, near=OF_GRADIENTS)
        assert together.run.trace["residual"].sizes["token"] == LENGTH


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
    store = folder / f"stage{rank}.zarr.zip"
    with probes.record(
        model, gradients=True, stage=(rank, world), group="none", max_sequences=4, store=store
    ) as recorder:
        schedule.step(*((ids,) if rank == 0 else ()), **({"target": ids} if rank == 1 else {}))
        recorder.step()
    dist.barrier()
    if rank == 0:
        joined = probes.merge_runs(
            [diagnostics.open_run(folder / f"stage{number}.zarr.zip") for number in range(2)]
        )
        one = built(layers=4)
        with probes.record(one, gradients=True, group="none", max_sequences=4) as recorder:
            for part in ids.chunk(2):
                loss_of(one, part).backward()
            recorder.step()
        for name in ("token_count", "norm_sum", "gradient_square_norm_sum"):
            np.testing.assert_allclose(joined.statistics[name], recorder.run.statistics[name], rtol=NEAR)
        np.testing.assert_allclose(joined.trace["residual"], recorder.run.trace["residual"], rtol=NEAR)


def token_shards(world, folder):
    """Tokens that sequence or context parallelism spreads over processes are refused, also where they are plain tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world,))
    ids = batches([2])[0]

    def refused(model, words):
        told = message_of(CaptureError, lambda: probes.capture(model, ids))
        assert words in told, told

    refused(in_token_shards(built(), mesh), "sequence parallelism")
    given = PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
    )
    refused(parallelize_module(built(), mesh, {"blocks.1": given}), "blocks.1")
    with context_parallel(mesh, buffers=[torch.zeros(2, 4 * world)], buffer_seq_dims=[1]):
        refused(built(), "context parallelism")
    # Tensor parallelism alone leaves whole states in every process.
    plan = {}
    for at in range(3):
        plan |= {f"blocks.{at}.up": ColwiseParallel(), f"blocks.{at}.down": RowwiseParallel()}
    run, one = probes.capture(parallelize_module(built(), mesh, plan), ids), probes.capture(built(), ids)
    np.testing.assert_allclose(run.trace["residual"], one.trace["residual"], rtol=1e-6)


SCENARIOS = {
    2: (
        uneven,
        streams,
        sharded,
        other_model,
        other_settings,
        failing,
        other_step,
        missing,
        alone,
        unknown,
        stopping,
        token_shards,
        parts_of_sequences,
        compiled,
        compiled_streams,
        weights_untouched,
        compiled_refused,
        pipeline,
    ),
    4: (uneven, learning, empty_first, parts_and_shards, compiled_in_shards),  # what more than two can show
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    wanted = sys.argv[2:]
    results = {}
    for scenario in SCENARIOS[world]:
        if wanted and scenario.__name__ not in wanted:
            continue
        try:
            scenario(world, folder)
            results[scenario.__name__] = ""
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    time.sleep(0.5)  # gloo closes connections that others may still read from


if __name__ == "__main__":
    main(Path(sys.argv[1]))
