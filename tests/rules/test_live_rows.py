"""Is a row judged while it is measured as it is judged when it is read again? Absence is told by keys, never by values."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn import functional

from depthscope import probes
from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import judge, schema
from depthscope.diagnostics.quantities.registry import with_facts
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.diagnostics.verdicts import ABOUT_THE_RUN
from depthscope.probes.training.live.findings import findings_of
from depthscope.probes.training.live.live import Live
from tests.models.small_models import LucidrainsLM, deepseek, llama

IDS = torch.randint(1, 48, (4, 24), generator=torch.Generator().manual_seed(0))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    output = model(IDS)
    logits = output if isinstance(output, torch.Tensor) else output[0]
    return functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())


def recorded(model, folder, steps=1, **options):
    """A live store of some steps, with its recorder."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options |= {"gradients": True, "metrics": "live", "optimizer": optimizer, "store": folder}
    with probes.record(model, **options) as recorder:
        for _ in range(steps):
            loss_of(model).backward()
            recorder.step()
            optimizer.step()
            optimizer.zero_grad()
    return recorder


def shown(findings) -> list[tuple[str, str, str | None, str]]:
    """What of a finding a reader acts on."""
    return sorted(
        (finding.verdict, finding.severity.name, finding.stream or "", finding.quantity)
        for finding in findings
        if finding.verdict not in ABOUT_THE_RUN
    )


def require_same(live, folder):
    """The findings of a live row are those of the row that is read again, and in `check` none has another severity."""
    with schema.open_run(folder) as run:
        rows = {chain: schema.chain_dataset(run, "metrics", chain).load() for chain in schema.chains(run)}
        again = [
            finding
            for row in rows.values()
            for finding in judge(with_facts(row.assign_attrs({**run.attrs, **row.attrs}), run.attrs))
        ]
        found = [finding for each in read_runs({"a": run}) for finding in each.findings]
    assert shown(again) == shown(live)
    # The stored sequences show more than a row has, some of which explains what the row shows.
    known = {finding.verdict for finding in live}
    for verdict, severity, *_ in shown(live):
        explained = [f for f in found if f.verdict == verdict and f.because and f.because not in known]
        assert explained or (verdict, severity) in {(f.verdict, f.severity.name) for f in found}, verdict


def test_a_healthy_start_is_no_warning_and_stops_nothing(tmp_path):
    torch.manual_seed(0)
    recorder = recorded(LucidrainsLM("mhc").eval(), tmp_path / "run", steps=2, stop_on="warn")
    assert recorder.measured_steps == [0, 1]


# --- NaN is a value


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "run"
    return recorded(deepseek(layers=2), folder), folder


def with_nan(row, path, step):
    """The row with one of its numbers undefined."""
    dims, values, attrs = row.numbers[path]
    numbers = {**row.numbers, path: (dims, np.full_like(values, np.nan), attrs)}
    return type(row)(step, numbers, row.coords, row.not_computed)


def test_every_live_metric_as_nan_is_judged_as_it_is_later(healthy, tmp_path):
    recorder, _ = healthy
    row = recorder._live.last
    broken = [with_nan(row, path, step) for step, path in enumerate(row.numbers)]
    store = LiveStore(tmp_path / "run")
    store.save_state(recorder.run)
    for each in broken:
        store.append(each.step, each.numbers, coords=each.coords)
    store.finish()
    store.close()
    with schema.open_run(tmp_path / "run") as run:
        rows = schema.chain_dataset(run, "metrics").load()
        for path, each in zip(row.numbers, broken, strict=True):
            live = findings_of(each, recorder._live.attrs)
            again = judge(with_facts(rows.sel(step=[each.step]), run.attrs))
            assert shown(live) == shown(again), path
            name = path.removeprefix("metrics/")
            # Gains alone, beside finite states, are no matrices that are not finite.
            if name in ("residual_norm", "gradient_norm"):
                assert "not_finite" in {finding.verdict for finding in live}
    # Their states are not finite either, which tells them from matrices that were not read.
    for path in ("metrics/mixing_gain", "metrics/residual_norm"):
        row = with_nan(row, path, row.step)
    assert "not_finite" in {finding.verdict for finding in findings_of(row, recorder._live.attrs)}


def poisoned(sums, number: int) -> str | None:
    """Set one of the statistics of a step to NaN; returns which, None behind the last one."""
    places = []
    for part in [of for chain in sums for of in (chain, chain.mean_view) if of is not None]:
        places += [(part.sums, name) for name in part.sums]
        if part.live is not None:
            places += [(part.live.sums, name) for name in part.live.sums]
            places += [(part.live.values, name) for name in part.live.values]
            places += [
                (vars(part.live), name) for name in ("states", "gradient_norms", "mixes", "reads", "writes")
            ]
    if number >= len(places):
        return None
    of, name = places[number]
    for key, value in of[name].items():
        of[name][key] = torch.full_like(value, torch.nan)
    return name


def test_whatever_is_measured_as_nan_stays_in_the_row(monkeypatch):
    measured, names = [], {}
    compute = Live.measure

    def spoilt(live, sums, *args, **options):
        names[len(measured)] = poisoned(sums, len(measured) - 1) if measured else ""
        row = compute(live, sums, *args, **options)
        measured.append(row)
        return row

    monkeypatch.setattr(Live, "measure", spoilt)
    model = deepseek(layers=2)
    with probes.record(model, gradients=True, metrics="live") as recorder:
        while None not in names.values():
            loss_of(model).backward()
            recorder.step()
    complete = set(measured[-1].numbers)  # in which nothing was spoilt
    judged: set[str | None] = set()
    for number, row in enumerate(measured[1:], start=1):
        lost = complete - set(row.numbers) - {"metrics/untouched"}
        assert not lost, (names[number], lost)
        # Of several streams their mean is no evidence: it may cancel.
        if names[number] == "gradient_square_norm_sum" and names[number] not in judged:
            judged.add(names[number])
            found = {finding.verdict for finding in findings_of(row, recorder._live.attrs)}
            assert "not_finite" in found


def test_what_was_measured_as_nan_is_not_filled_from_stored_sequences(healthy):
    from depthscope.app.readings.readings import with_live

    _, folder = healthy
    with schema.open_run(folder) as run:
        live = schema.chain_dataset(run, "metrics").load()
        fresh = read_runs({"a": run})[0].analysis
    spoilt = live.copy(deep=True)
    spoilt["residual_norm"][:, 1] = np.nan
    joined = with_live(fresh, spoilt)
    assert joined["residual_norm"].isel(step=-1, depth=1).isnull().all()
    of_stored = fresh["token_cosine"].sel(scope="data", tokens="ordinary")  # which no row has
    xr.testing.assert_allclose(
        joined["token_cosine"].sel(scope="data", tokens="ordinary").isel(step=-1), of_stored.isel(step=-1)
    )


def test_a_step_that_a_scaler_skips_is_no_finding_live_or_later(tmp_path):
    model, told = llama(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    options = {"gradients": True, "metrics": "live", "scaler": scaler, "store": tmp_path / "run"}
    with probes.record(model, on_finding=lambda _, finding: told.append(finding), **options) as recorder:
        for bad in (1.0, torch.inf):
            (scaler.scale(loss_of(model)) * bad).backward()
            with (
                pytest.warns(probes.ProbeWarning, match="overflowed") if bad > 1 else contextlib.nullcontext()
            ):
                recorder.step(1.0)
    require_same(findings_of(recorder._live.last, recorder._live.attrs), tmp_path / "run")
    assert "not_finite" not in {finding.verdict for finding in told}
