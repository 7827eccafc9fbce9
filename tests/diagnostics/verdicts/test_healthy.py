"""No verdict warns of a healthy network: fresh stacks, connections near the identity, and what training makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xarray as xr
from hyper_connections import hyper_connections as free
from hyper_connections import manifold_constrained_hyper_connections as constrained
from torch import nn

from depthscope import diagnostics, probes
from depthscope.diagnostics import Severity
from depthscope.diagnostics.verdicts.age import age_of
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text
from tests.models.families import FAMILIES, Lucidrains, built, tilted
from tests.models.stream_models import deepseek_v4
from tests.models.verdict_models import (
    IDENTITY,
    NEAR,
    Constrained,
    captured,
    findings,
    pre_norm,
    random_logits,
    streams,
    tokens,
    trained,
)
from tests.verdicts import measuring
from tests.verdicts.networks import built as built_from
from tests.verdicts.plans import Plan

torch.set_num_threads(1)


def practised(model: nn.Module, steps: int, rate: float) -> nn.Module:
    """A model after some steps of learning to repeat."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        half = torch.randint(1, 64, (8, 8), generator=generator)
        batch = torch.cat([half, half], 1)
        output = model(batch)
        logits = getattr(output, "logits", output)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    return model.eval()


def lucidrains(connections: Any, *, layers: int = 6, steps: int = 0) -> xr.DataTree:
    """Fresh as the package makes it; or near the identity with writes that part the streams, and trained."""
    torch.manual_seed(0)
    random.seed(0)  # draws the stream that a connection reads
    model = Lucidrains(connections, layers=layers)
    if steps:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("static_alpha"):
                    parameter[:, 1:] *= 3.5
                elif name.endswith("static_beta"):
                    parameter += 1.5 * torch.randn_like(parameter)
        practised(model, steps, 3e-3)
    return captured(model.eval())


def deepseek(steps: int) -> xr.DataTree:
    torch.manual_seed(0)
    model = deepseek_v4(3)
    with torch.no_grad():
        for name, base in model.named_parameters():
            if name.endswith("_hc.base"):
                base[4:8].normal_()
                base[8:] = 4 * IDENTITY.flatten()
    return captured(practised(model, steps, 1e-3), {"input_ids": tokens()})


def fresh(name: str, package: str) -> xr.DataTree:
    """A family of the catalogue with random weights."""
    family = next(each for each in FAMILIES if (each.name, each.package) == (name, package))
    return captured(built(family), family.batch(), loss=tilted)


HEALTHY: dict[str, Callable[[], xr.DataTree]] = {
    "fresh stack of 6": lambda: captured(pre_norm(6)),
    "fresh stack of 24": lambda: captured(pre_norm(24)),
    "fresh stack of 64": lambda: captured(pre_norm(64)),
    "HC near the identity": lambda: captured(streams(NEAR)),
    "mHC near the identity": lambda: captured(streams(random_logits(0.3), make=Constrained)),
    "trained mHC": lambda: trained(4.0),
    "fresh HC of lucidrains": lambda: lucidrains(free),
    "fresh deep HC of lucidrains": lambda: lucidrains(free, layers=24),
    "trained mHC of lucidrains": lambda: lucidrains(constrained, steps=20),
    "trained deepseek_v4": lambda: deepseek(5),
    "fresh llama": lambda: fresh("llama", "transformers"),
    "fresh bert, whose branches begin near zero": lambda: fresh("bert", "transformers"),
    "fresh resnet18": lambda: fresh("resnet18", "torchvision"),
    "fresh convnext, whose branches begin at zero": lambda: fresh("convnext", "torchvision"),
    "fresh ViT, whose class token is small": lambda: vision_transformer(),
    "fresh Pre-LN with frozen first blocks": lambda: frozen(2),
}


def vision_transformer() -> xr.DataTree:
    torch.manual_seed(0)
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, num_layers=6, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # it begins at zero, and so would the gradient
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    return probes.capture(
        model.eval(),
        images,
        gradients=True,
        loss=lambda output, batch: nn.functional.cross_entropy(output, labels),
    )


def frozen(blocks: int) -> xr.DataTree:
    model = pre_norm()
    for part in (model.embed, *model.blocks[:blocks]):
        part.requires_grad_(False)
    return captured(model)


def test_no_gradient_below_frozen_weights_is_no_failure(tmp_path):
    path = diagnostics.save_run(frozen(2), tmp_path / "frozen.zarr.zip")
    run = diagnostics.open_run(path)
    assert run["trace"]["gradient"].attrs["without_gradient"] == [0, 1, 2]
    analysis = diagnostics.analyze(run)
    assert (
        analysis["gradient_norm"].isnull().any("stream").values.ravel().tolist() == [True] * 3 + [False] * 4
    )
    assert "not_finite" not in {finding.verdict for finding in diagnostics.judge(analysis)}
    spoilt = run["trace"].to_dataset().load().copy(deep=True)
    spoilt["gradient"][5, 0, 0] = float("nan")
    found = diagnostics.judge(diagnostics.analyze(diagnostics.create_run(spoilt, attrs=run.attrs)))
    assert [(f.first, f.last) for f in found if f.verdict == "not_finite"] == [(5, 5)]


@pytest.fixture(scope="session")
def smollm2_runs(smollm2):
    """One capture of a text with labels, one of a sentence, and one of single tokens."""
    batch = encode_text(smollm2, sample_text(), sequences=2, length=24)
    ids = batch["input_ids"]
    return {
        "text": probes.capture(smollm2.model, batch | {"labels": ids}, gradients=True),
        "sentence": probes.capture(smollm2.model, {"input_ids": ids[:1, :9]}),
        "single tokens": probes.capture(smollm2.model, {"input_ids": ids[:, :8].reshape(16, 1)}),
    }


@pytest.mark.model
@pytest.mark.parametrize("text", ["text", "sentence", "single tokens"])
def test_no_false_alarm_on_smollm2(smollm2_runs, text):
    found = findings(smollm2_runs[text])
    assert not [finding for finding in found if finding.severity > Severity.INFO]
    if text == "text":
        massive = next(finding for finding in found if finding.verdict == "massive_activations")
        assert "507" in massive.sentence  # the feature of the first token's sink, see Sun et al. 2024


@pytest.mark.parametrize("family", ["residual", "mhc"])
def test_a_run_opened_from_zarr_is_judged_as_in_memory(make_run, family, tmp_path):
    """Its labels are text of another type, which numpy does not cast as it casts others."""
    run = make_run(family, layers=3)
    diagnostics.save_run(run, tmp_path / "run.zarr")
    told = [
        [
            (each.verdict, each.severity, each.sentence)
            for each in diagnostics.judge(diagnostics.analyze(one), passed=True)
        ]
        for one in (run, diagnostics.open_run(tmp_path / "run.zarr").load())
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fresh_network_of_eight_streams_is_not_called_trained(seed):
    """The weights of eight streams are vectors near 1, as trained gains of norms are."""
    plan = Plan(family="mHC", streams=8, seed=seed, start="apart")
    analysis = diagnostics.analyze(measuring.captured(built_from(plan).eval(), plan))
    assert age_of(analysis).trained is not True
    assert all(each.severity < Severity.FAIL for each in diagnostics.judge(analysis))


@pytest.mark.parametrize("length", [1, 24])
@pytest.mark.parametrize("ids", [(7, 7, 7, 7), (1, 5, 9, 20)])
def test_four_sequences_of_one_token_show_no_collapse(length, ids):
    torch.manual_seed(0)
    model = pre_norm()
    with torch.no_grad():
        model.embed.weight.add_(20.0)  # what all tokens share
    run = probes.capture(model.eval(), torch.tensor(ids)[:, None].expand(4, length))
    assert all(each.severity <= Severity.INFO for each in diagnostics.judge(diagnostics.analyze(run)))
