"""No verdict warns of a healthy network: fresh stacks, connections near the identity, and what training makes of them."""

from __future__ import annotations

import pytest
import torch
import xarray as xr

from depthscope import diagnostics, probes
from depthscope.diagnostics import Severity
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text
from tests.models.stream_models import deepseek_v4
from tests.models.verdict_models import (
    NEAR,
    Constrained,
    captured,
    findings,
    pre_norm,
    random_logits,
    streams,
    tokens,
)

torch.set_num_threads(1)


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


@pytest.mark.parametrize(
    "build",
    [lambda: pre_norm(24), lambda: streams(NEAR), lambda: streams(random_logits(0.3), make=Constrained)],
    ids=["stack", "HC near the identity", "mHC near the identity"],
)
def test_no_verdict_warns_of_a_fresh_network(build):
    found = findings(captured(build()))
    assert not [each for each in found if each.severity > Severity.INFO]


def test_a_fresh_deepseek_mixes_uniformly():
    torch.manual_seed(0)
    found = findings(captured(deepseek_v4(3).eval(), {"input_ids": tokens()}))
    # Its streams become equal, which is normal of weights as they were drawn: said, and no warning.
    assert {finding.severity for finding in found} == {Severity.INFO}
    assert "stream_collapse" in {finding.verdict for finding in found}


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


def test_a_run_opened_from_zarr_is_judged_as_in_memory(make_run, tmp_path):
    """Its labels are text of another type, which numpy does not cast as it casts others."""
    run = make_run("mhc", layers=3)
    diagnostics.save_run(run, tmp_path / "run.zarr")
    told = [
        [
            (each.verdict, each.severity, each.sentence)
            for each in diagnostics.judge(diagnostics.analyze(one), passed=True)
        ]
        for one in (run, diagnostics.open_run(tmp_path / "run.zarr").load())
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize(("length", "ids"), [(1, (1, 5, 9, 20)), (24, (7, 7, 7, 7))])
def test_four_sequences_of_one_token_show_no_collapse(length, ids):
    torch.manual_seed(0)
    model = pre_norm()
    with torch.no_grad():
        model.embed.weight.add_(20.0)  # what all tokens share
    run = probes.capture(model.eval(), torch.tensor(ids)[:, None].expand(4, length))
    assert all(each.severity <= Severity.INFO for each in diagnostics.judge(diagnostics.analyze(run)))
