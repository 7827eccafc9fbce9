"""A plan has the sizes of the recording that it plans, and allocates nothing."""

from __future__ import annotations

import math
import resource

import pytest
import torch
from torch import nn

from depthscope import describe, record
from depthscope.app.cli.command import FINE, USAGE
from depthscope.app.cli.main import main
from depthscope.diagnostics.schema.live_store_history import read_history
from depthscope.probes.capture_plan import CapturePlan, capture_plan
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.training.live.live import TOKENS, Live
from depthscope.probes.training.ranks.layout import layout_of
from tests.models.small_models import deepseek, llama


@pytest.mark.parametrize("make", [llama, deepseek])
def test_the_plan_has_the_bytes_of_a_recording(make, tmp_path, monkeypatch):
    model, ids = make(), torch.arange(60).reshape(4, 15) % 63 + 1
    measured = {}

    def seen(live, sums, *args, **options):
        measured["sums"] = layout_of(sums, min(TOKENS, ids.numel()))
        return compute(live, sums, *args, **options)

    compute = Live.measure
    monkeypatch.setattr(Live, "measure", seen)
    with record(model, gradients=True, metrics="live", store=tmp_path / "run") as recorder:
        model(input_ids=ids, labels=ids).loss.backward()
        recorder.step()
    # bfloat16: torch knows the shapes of some kernels in it alone.
    plan = capture_plan(make().to(torch.bfloat16).to("meta"), {"input_ids": ids}, processes=4)
    trace = recorder.run.trace.to_dataset()
    assert plan.num_states == trace.sizes["depth"]
    assert (plan.streams, plan.width) == (trace.sizes["stream"], trace.sizes["feature"])
    assert plan.stored_sequences == trace.sizes["sample"] == 1
    assert plan.raw["states"] == trace.residual.nbytes
    assert plan.raw["gradients"] == trace.gradient.nbytes
    if plan.streams > 1:
        assert plan.num_connections == trace.sizes["connection"]
        stored = ("h_res", "h_pre", "h_post", "branch_in", "branch_out")
        assert plan.raw["connections"] == sum(trace[name].nbytes for name in stored)
    layout = measured["sums"]
    exchanged = {
        "sum": sum(8 * math.prod(entry.shape) for entry in layout.sums),
        "max": sum(8 * math.prod(entry.shape) for entry in layout.maxima),
        "sampled": 4 * layout.sample_length,
    }
    assert plan.memory["sums"] == plan.collectives["sum"]
    for name, size in exchanged.items():
        assert plan.collectives[name] == pytest.approx(size, rel=0.05), name
    row = read_history(tmp_path / "run").ends[-1]
    assert plan.writer["row"] == pytest.approx(row, rel=0.3)
    assert "nothing" in plan.proof
    assert "of 4 processes a measured step" in str(plan)
    assert "in each process" in str(plan)


def test_a_time_is_that_of_the_rates_that_are_given():
    model, ids = llama().to("meta"), torch.ones(2, 11, dtype=torch.long)
    plan = capture_plan(model, {"input_ids": ids})
    assert plan.seconds == {}
    assert "time" not in str(plan)
    assert plan.work["bytes"] == 2 * 4 * 22 * 32 * 4  # four states in float32, each read twice
    given = capture_plan(model, {"input_ids": ids}, rates={"bytes": 1e9, "operations": 1e12})
    assert given.seconds["bytes"] == plan.work["bytes"] / 1e9
    assert given.seconds["operations of the row"] == plan.work["operations of the row"] / 1e12
    assert "at the rates that were given" in str(given)
    with pytest.raises(ValueError, match="expected bytes and operations"):
        capture_plan(model, {"input_ids": ids}, rates={"flops": 1.0})


def test_27_billion_parameters_are_planned_without_memory():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.DeepseekV4Config(
            num_hidden_layers=10,
            hidden_size=4096,
            n_routed_experts=128,
            moe_intermediate_size=1720,
            num_attention_heads=32,
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.empty(8, 4096, dtype=torch.long, device="meta")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = describe(model, {"input_ids": ids})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KiB
    assert isinstance(plan, CapturePlan)
    assert plan.num_parameters > 20e9
    assert (plan.num_states, plan.num_connections, plan.streams) == (21, 20, 4)
    assert grown < 500_000, grown


def test_what_cannot_be_planned_is_said(tmp_path, capsys):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Linear(4, 4)

        def forward(self, x):
            return self.weight(x) if float(x.sum()) > 0 else x

    with pytest.raises(CaptureError, match="does not run without values"):
        capture_plan(Asks().to("meta"), torch.ones(2, 3, 4))
    with pytest.raises(CaptureError, match="the model has values"):
        capture_plan(llama(), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(CaptureError, match="no blocks were found"):
        capture_plan(nn.Linear(4, 4).to("meta"), torch.ones(2, 3, 4))
    words = ["describe", "tests.app.cli.byte_model:build"]
    assert main([*words, "--plan", "--batch", "2", "--tokens", "8", "--processes", "1000"]) == FINE
    printed = capsys.readouterr().out
    assert "of 1000 processes" in printed
    assert "time" not in printed
    assert main([*words, "--plan", "--bandwidth", "1000", "--speed", "50000"]) == FINE
    assert "at the rates that were given" in capsys.readouterr().out
    assert main([*words, "--tokens", "8"]) == USAGE
    assert "add --plan" in capsys.readouterr().err
    assert main(["describe", str(tmp_path), "--plan"]) == USAGE
