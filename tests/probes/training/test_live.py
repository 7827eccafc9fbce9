"""Are the metrics that are computed while a training runs those of an analysis of the same tokens, and who is told of them?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from depthscope import CATALOGUE, diagnostics, probes
from depthscope.diagnostics import schema
from depthscope.probes.statistics.live_sums import draw_places
from depthscope.probes.training.live.live import LIVE, live_names

# Vectors are added in float32 over the tokens of a block; all else is float64 on the same float32 states.
EXACT = 1e-6


def train(model, ids, *, steps=2, rate=1e-2, lookup="ids", **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    options = {"gradients": True, "metrics": "live", "optimizer": optimizer} | options
    with probes.record(model, **options) as recorder:
        for _ in range(steps):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(1.0)
    return recorder


def loss_of(model, ids):
    output = model(ids)
    logits = output if isinstance(output, torch.Tensor) else output[0]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def compared(live: xr.DataArray, analysed: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Values at the labels that both have."""
    for dim in set(live.dims) & set(live.coords) & set(analysed.coords):
        labels = [label for label in analysed[dim].values.tolist() if label in live[dim].values.tolist()]
        live, analysed = live.sel({dim: labels}), analysed.sel({dim: labels})
    return live.values.astype(float), analysed.transpose(*live.dims).values.astype(float)


def require_same(history: xr.Dataset, analysis: xr.Dataset, *, missing: dict[str, str]) -> int:
    """Every defined number of a row is that of the analysis; where one is missing, the label is named in ``missing``."""
    found = 0
    for name in CATALOGUE.keys() & history.data_vars.keys() & analysis.data_vars.keys():
        live, analysed = compared(history[name], analysis[name])
        known = ~np.isnan(live)
        np.testing.assert_allclose(live[known], analysed[known], rtol=EXACT, atol=EXACT, err_msg=name)
        lost = np.isnan(live) & ~np.isnan(analysed)
        assert not lost.any() or name in missing, name
        found += int(known.sum())
    return found


OF_MEAN = dict.fromkeys(
    (
        *(
            "effective_rank",
            "participation_ratio",
            "corrected_participation_ratio",
        ),
        *("num_tokens", "relative_gradient"),
    ),
    "of the mean over streams, or of each stream alone",
) | {"token_cosine": "raw, of all tokens"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("llama", ()), ("lucidrains", ("mhc",))],
)
def test_a_row_is_what_an_analysis_gives_of_the_same_tokens(models, ids, name, arguments):
    torch.manual_seed(0)
    # As many as the batch has: the sampled tokens are those of the stored sequences.
    recorder = train(models[name](*arguments), ids, live_tokens=ids.numel(), max_sequences=8)
    run = recorder.run
    history = schema.chain_dataset(run, "metrics")
    assert history["step"].values.tolist() == [0, 1]
    last = history.isel(step=-1)
    assert require_same(last, diagnostics.analyze(run).isel(step=-1), missing=OF_MEAN) > 100
    streams = history.sizes["stream"] > 1
    expected = {metric for metric in LIVE if streams or not live_of_streams(metric)}
    if (name, *arguments) not in (("deepseek",), ("lucidrains", "mhc")):  # others make H_res of no logits
        expected -= {metric for metric in LIVE if CATALOGUE[metric].question == "logits"}
    assert expected <= set(history.data_vars)
    assert last["loss"] == 1.0
    assert last["learning_rate"] == 1e-2
    assert history["same_sampled_tokens"].values.tolist() == [1.0, 1.0]
    assert "exact over every token" in history["residual_norm"].attrs["estimator"]
    assert f"on {ids.numel()} sampled tokens" in history["effective_rank"].attrs["estimator"]
    assert not recorder.errors


def live_of_streams(metric: str) -> bool:
    return CATALOGUE[metric].axis == "connection" or "stream_cosine" in metric


def test_sampled_tokens_are_those_that_were_drawn(models, ids):
    torch.manual_seed(0)
    recorder = train(models["llama"](), ids, steps=1, live_tokens=9, max_sequences=8)
    run = recorder.run
    trace = schema.chain_dataset(run, "trace")
    places = draw_places(tuple(ids.shape), None, 9, 0).position_K.numpy()
    states = trace["residual"].values.reshape(trace.sizes["depth"], -1, 1, trace.sizes["feature"])[:, places]
    alone = trace.isel(sample=[0], token=slice(0, 9)).drop_vars(
        ["gradient", "final", "final_gradient"], errors="ignore"
    )
    alone = alone.assign(
        residual=(schema.STATE, states[:, None]), mask=(("sample", "token"), np.ones((1, 9), dtype=bool))
    ).drop_dims("connection", errors="ignore")
    analysis = diagnostics.analyze(schema.create_run(alone, attrs=run.attrs)).isel(step=0)
    row = schema.chain_dataset(run, "metrics").isel(step=0)
    for name in ("effective_rank", "participation_ratio", "cka", "angular_distance", "block_influence"):
        live, analysed = compared(row[name], analysis[name])
        np.testing.assert_allclose(live, analysed, rtol=EXACT, atol=EXACT, err_msg=name)
    whole = diagnostics.analyze(run).isel(step=0)
    np.testing.assert_allclose(*compared(row["residual_norm"], whole["residual_norm"]), rtol=EXACT)


def test_micro_batches_add_up_and_another_shape_is_told(models, ids):
    torch.manual_seed(0)
    model = models["deepseek"]()
    whole = train(model, ids, steps=1, rate=0.0, gradients=False, live_tokens=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probes.record(model, metrics="live", optimizer=optimizer, live_tokens=8) as parts:
        for each in ids:
            model(each[None])
        parts.step()
        model(ids)
        parts.step()
    one, other = (schema.chain_dataset(of.run, "metrics").isel(step=0) for of in (whole, parts))
    for name in (
        "residual_norm",
        "token_cosine",
        "stream_cosine",
        "mixing_gain",
        "composite_gain",
        "read_share",
    ):
        np.testing.assert_allclose(one[name], other[name], rtol=EXACT, atol=EXACT, err_msg=name)
    history = schema.chain_dataset(parts.run, "metrics")
    assert history["same_sampled_tokens"].values.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": "effective_rnk"}, "effective_rank"),
        ({"metrics": ["dong_residual"]}, "whole sequences|stored sequences"),
        ({"metrics": None, "stop_on": "fail"}, "metrics='live'"),
        ({"metrics": "live", "stop_on": "error"}, "'warn', 'fail'"),
        ({"metrics": "live", "on_finding": 3}, "a function of the step"),
        ({"metrics": "live", "live_tokens": 2}, "4 or more"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_loop(models, options, words):
    with pytest.raises(ValueError, match=words):
        probes.record(models["llama"](), **options)


def test_live_and_all_are_names_of_the_catalogue():
    assert set(LIVE) <= set(CATALOGUE)
    assert set(LIVE) < set(live_names("all")) <= set(CATALOGUE)


def exploding(models):
    """A model one of whose blocks multiplies the state by 1e5."""
    model = models["llama"]()
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(300.0)
    return model


def test_a_finding_is_told_once_and_stops_the_training_after_the_step(models, ids, capsys, tmp_path):
    torch.manual_seed(0)
    told = []
    model = exploding(models)
    train(
        model, ids, steps=3, rate=0.0, on_finding=lambda step, finding: told.append((step, finding.verdict))
    )
    assert told
    assert {step for step, _ in told} == {0}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("depthscope: step")]
    assert lines
    assert len(lines) == len(set(lines))
    assert all(line.startswith("depthscope: step 0: ") for line in lines)
    steps = []

    def until_it_stops():
        with probes.record(model, metrics="live", stop_on="warn", store=tmp_path / "a.zarr.zip") as recorder:
            for step in range(5):
                model(ids)
                steps.append(step)
                recorder.step()

    with pytest.raises(probes.TrainingStopped) as stopped:
        until_it_stops()
    assert steps == [0]
    assert stopped.value.step == 0
    assert stopped.value.findings
    stored = diagnostics.open_run(tmp_path / "a.zarr.zip")
    assert schema.chain_dataset(stored, "metrics")["step"].values.tolist() == [0]
    kept = [(each["step"], diagnostics.Finding.from_dict(each)) for each in stored.attrs[schema.FINDINGS]]
    assert {step for step, _ in kept} == {0}
    assert set(stopped.value.findings) <= {finding for _, finding in kept}
    # A step that only the end of the block ends has nothing left to stop.
    with (
        pytest.warns(probes.ProbeWarning, match="stop_on ends a training for, and the training had ended"),
        probes.record(model, metrics="live", stop_on="warn"),
    ):
        model(ids)


def test_a_callback_or_a_sink_that_fails_never_ends_the_training(models, ids):
    rows = []

    def broken(*_):
        raise RuntimeError("no connection")

    torch.manual_seed(0)
    with pytest.warns(probes.ProbeWarning, match="no connection"):
        recorder = train(
            exploding(models),
            ids,
            steps=3,
            rate=0.0,
            sinks=[broken, lambda *row: rows.append(row)],
            on_finding=broken,
        )
    assert [step for step, _ in rows] == [0, 1, 2]
    assert len(recorder.run["metrics"]["step"]) == 3


def test_padding_and_states_that_are_not_finite(models, text_batch):
    torch.manual_seed(0)
    model = models["deepseek"]()
    with probes.record(model, gradients=True, metrics="live", live_tokens=33, max_sequences=8) as recorder:
        model(**text_batch).loss.backward()
        recorder.step()
    row = schema.chain_dataset(recorder.run, "metrics").isel(step=0)
    require_same(row, diagnostics.analyze(recorder.run).isel(step=0), missing=OF_MEAN)
    assert (
        row["num_tokens"].sel(tokens="all", stream="mean") == text_batch["attention_mask"].sum().item()
    ).all()
    with torch.no_grad():
        model.model.layers[1].mlp.shared_experts.down_proj.weight[0, 0] = torch.nan
    told = []
    with probes.record(
        model, metrics="live", on_finding=lambda _, finding: told.append(finding.verdict)
    ) as broken:
        model(**text_batch)
        broken.step()
    assert told[0] == "not_finite"
    row = schema.chain_dataset(broken.run, "metrics").isel(step=0)
    for name in ("residual_norm", "effective_rank"):
        pooled = row[name].sel(stream="mean").isel(scope=0, tokens=0, centering=0, missing_dims="ignore")
        assert pooled.isnull().values.tolist() == [False] * 4 + [True] * 3
