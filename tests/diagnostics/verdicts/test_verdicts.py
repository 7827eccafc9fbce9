"""Every verdict finds the failure that a run was built to show, says where, and stays silent on healthy runs."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.app.text.bibliography import bibliography, entries
from depthscope.app.text.cards import explanation
from depthscope.diagnostics import Severity, schema
from depthscope.diagnostics.analysis.training_curves import OF_LOSSES
from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.diagnostics.verdicts.declaration import FACTS, number
from tests.diagnostics.state_runs import FEATURES, SAMPLES, TOKENS, run_of, walk

UNIFORM = np.full((4, 4), 0.25)


@pytest.fixture(scope="module")
def mixed(make_run):
    """A factory of runs with given matrices, weights and attributes."""

    def build(matrices=None, *, reads=None, writes=None, family="hc", layers=6, **attrs):
        layers = layers if matrices is None else len(matrices) // 2
        run = make_run(family, layers=layers, samples=SAMPLES, tokens=TOKENS, features=FEATURES)
        trace = run["trace"].to_dataset().load()
        for name, given in (("h_res", matrices), ("h_pre", reads), ("h_post", writes)):
            if given is not None:
                trace[name].values[:] = np.asarray(given)[:, None, None]
        return schema.create_run(trace, attrs=dict(run.attrs) | attrs)

    return build


def findings(run, *, trained=False, **options):
    """Findings by verdict of a network that is fresh, or one that is trained and has no labels."""
    analysis = diagnostics.analyze(run)
    if isinstance(analysis, xr.Dataset):
        analysis = analysis.assign_coords(step=[1000]) if trained else analysis.assign_attrs(untouched=True)
    by_name: dict[str, list] = {}
    for finding in diagnostics.judge(analysis, **options):
        by_name.setdefault(finding.verdict, []).append(finding)
    return by_name


def tried(analysis):
    """The analysis of a trained network, with a result of the experiment on all layers that are one representation."""
    result = {"verdict": "same_representation", "first": 0, "last": 10**6, "depths": [1, 1]}
    task = {"loss": 1.0, "constant": 3.0, "guessing": 3.0}
    return analysis.assign_attrs(task=task, consequences=[{**result, "loss": 1.0, "loss_change": 0.0}])


# --- forward and backward --------------------------------------------------------------------------------------


def test_gain_explosion(mixed):
    # 1.3⁹ is the first above 10: connection 8, counted from 0.
    (warned,) = findings(mixed([1.3 * np.eye(4)] * 12))["gain_explosion"]
    assert (warned.severity, warned.axis, warned.first, warned.last) == (Severity.WARN, "connection", 8, 11)
    assert warned.value == pytest.approx(1.3**12, rel=1e-5)
    failed = findings(mixed([2.0 * np.eye(4)] * 12))["gain_explosion"][0]
    assert (failed.severity, failed.threshold) == (Severity.FAIL, 100.0)
    source = VERDICTS["gain_explosion"].limits.source
    assert failed.sentence == (
        "The forward gain of the mixing from the embedding on (p99 over tokens) is 4096 at connection 11 "
        f"(mlp of block 5), limit 100 ({source}); it is above 10 from connection 3 to connection 11. Also: the backward "
        "gain of the mixing from the embedding on (p99 over tokens) is 4096 at connection 11 (mlp of block 5), limit 100 "
        f"({source}); it is above 10 from connection 3 to connection 11."
    )


@pytest.mark.parametrize(
    ("left", "severity"), [(0.3, Severity.PASS), (0.05, Severity.WARN), (0.005, Severity.FAIL)]
)
def test_free_matrices_may_fade_as_free_matrices_do(mixed, left, severity):
    fading = np.stack([np.diag([1.0, 1.0, 1.0, left ** (1 / 12)])] * 12)
    assert {f.severity for f in findings(mixed(fading), passed=True)["attenuation"]} == {severity}


def test_gradients_whose_mean_over_streams_cancels_do_not_vanish(make_run):
    run = make_run("mhc", gradients=True)
    trace = run["trace"].to_dataset().load()
    signs = xr.DataArray([1.0, -1.0, 0.5, -0.5], dims="stream")
    trace["gradient"] = trace["gradient"] * 0.0 + signs
    found = findings(schema.create_run(trace, attrs=run.attrs))
    assert not {"vanishing_gradient", "exploding_gradient"} & set(found)


def test_gradients_that_follow_the_states_do_not_explode():
    """What is large gets a small gradient where each block normalises its input: their product stays."""
    sizes = (10.0 ** np.arange(9)).reshape(-1, 1, 1, 1)
    states, gradient = (
        np.random.default_rng(seed).standard_normal((9, SAMPLES, TOKENS, FEATURES)) for seed in (0, 1)
    )
    found = findings(run_of(states * sizes, gradient / sizes), passed=True)["exploding_gradient"][0]
    assert found.severity is Severity.PASS
    assert found.value == pytest.approx(1.0, rel=0.1)


def test_a_final_norm_is_neither_gradient_loss_nor_idle():
    states = walk(8)
    states = np.concatenate([states, states[-1:] / 100])
    gradient = np.random.default_rng(1).standard_normal(states.shape)
    gradient[-1] *= 100
    assert set(findings(run_of(states, gradient, sites=["embed", *["post"] * 8, "final"]))) <= {
        "small_sample"
    }


def test_sums_that_cancel_are_no_attenuation(mixed):
    turned = np.array([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5  # orthogonal: nothing fades, and a row adds to 0
    assert "attenuation" not in findings(mixed([np.kron(np.eye(2), turned)] + [np.eye(4)] * 11), passed=True)


def test_what_is_not_a_number_is_one_finding_that_begins_at_its_first_place():
    states, gradient = walk(8), walk(8, seed=1)
    states[5:, 1, 3, 2] = np.inf
    gradient[:2, 0, 0, 0] = np.nan
    (found,) = findings(run_of(states, gradient))["not_finite"]
    assert (found.severity, found.first, found.last) == (Severity.FAIL, 5, 8)
    assert "after block 4 (depth 5)" in found.sentence
    assert "Also: the number of tokens whose gradient is not finite" in found.sentence


# --- representation --------------------------------------------------------------------------------------------


def test_the_median_of_states_after_a_relu_is_that_of_what_is_not_zero():
    states = np.abs(0.3 * walk(8)) * (np.random.default_rng(0).random((9, SAMPLES, TOKENS, FEATURES)) < 0.3)
    assert "massive_activations" not in findings(run_of(200.0 * states))


def test_differences_that_grow_while_all_sums_are_one(mixed):
    unit = np.ones(4) / 2
    growing = np.stack([np.outer(unit, unit) + 1.5 * (np.eye(4) - np.outer(unit, unit))] * 12)
    (found,) = findings(mixed(growing))["gain_explosion"]
    assert found.severity == Severity.FAIL
    assert found.value == pytest.approx(1.5**12, rel=1e-4)
    assert (found.first, found.last) == (5, 11)
    assert "The spectral norm of the mixing from the embedding on, which also sees" in found.sentence


def test_one_token_that_a_connection_amplifies(make_run):
    run = make_run("hc", layers=4, samples=4, tokens=64, features=8)
    trace = run["trace"].to_dataset().load()
    trace["h_res"].values[:] = np.eye(4)
    trace["h_res"].values[3, 2, 17] *= 400.0
    (found,) = findings(schema.create_run(trace, attrs=run.attrs))["gain_explosion"]
    assert (found.severity, found.first, found.last) == (Severity.FAIL, 3, 7)
    assert found.value == pytest.approx(400.0)
    assert "It is that of sequence 2, position 17; the median over tokens is 1." in found.sentence


def test_a_fading_that_spares_the_differences_is_no_collapse(mixed):
    found = findings(mixed([0.85 * (0.95 * np.eye(4) + 0.05 * UNIFORM)] * 24))
    assert "stream_collapse" not in found
    assert "stream_collapse" in findings(mixed([1.2 * (0.7 * np.eye(4) + 0.3 * UNIFORM)] * 24))


def test_stages_are_judged_on_one_scale(make_run):
    stages = {}
    for stage, (width, size) in enumerate([(8, 1.0), (16, 300.0), (32, 90000.0)]):
        states = size * np.random.default_rng(stage).standard_normal((4, SAMPLES, TOKENS, width))
        stages[f"stage{stage}"] = run_of(states)["trace"].to_dataset()
    run = schema.create_run(stages, attrs={"family": "residual", "n_streams": 1})
    (found,) = findings(run)["exploding_state"]
    assert (found.chain, found.severity) == ("stage2", Severity.WARN)
    assert found.value == pytest.approx(90000.0, rel=0.2)


@pytest.mark.parametrize(
    ("layers", "branch", "severity"), [(16, 0.005, Severity.FAIL), (16, 1.0, Severity.PASS)]
)
def test_one_representation_in_all_layers(layers, branch, severity):
    analysis = tried(diagnostics.analyze(run_of(walk(layers, branch=branch))))
    (found,) = [e for e in diagnostics.judge(analysis, passed=True) if e.verdict == "same_representation"]
    assert found.severity == severity
    if severity:
        assert (found.axis, found.first, found.last) == ("depth", 0, layers)
        assert "from end to end they turn by 1.1" in found.sentence  # arctan(0.005 √16) in degrees
        assert "independent branches of the size of the first state turn them by 76°" in found.sentence


def test_one_representation_from_a_block_on():
    states = walk(12)
    states[5:] = states[4] + 0.001 * (states[5:] - states[4])
    (found,) = findings(run_of(states), trained=True)["same_representation"]
    # Nothing was tried, and there are no labels: it is suspected.
    assert (found.severity, found.first, found.last) == (Severity.WARN, 4, 12)
    assert found.settled == "not settled"
    assert found.sentence.startswith(
        "8 of 12 layers in a row hold one representation: every two states from depth 4 to depth 12"
    )


def test_streams_that_are_hardly_read_or_written_are_named(mixed):
    reads, writes = np.tile([1.0, 1.0, 1e-4, 1e-2], (12, 1)), np.tile([0.0, 1.0, 1.0, 1.0], (12, 1))
    told = findings(mixed(reads=reads, writes=writes))["unused_stream"]
    assert {f.stream for f in told} == {"0", "2", "3"}
    assert "write weight of stream 0" in next(f.sentence for f in told if f.stream == "0")
    assert [f.severity for f in told] == [Severity.WARN] * 3
    assert "unused_stream" not in findings(mixed(reads=np.eye(4)[np.arange(12) % 4]))  # they take turns


@pytest.mark.parametrize(("length", "sinks", "severity"), [(12, 2, "INFO"), (12, 3, "WARN")])
def test_one_or_two_sinks_in_a_short_sequence_are_a_note_and_more_are_not(length, sinks, severity):
    states = 0.3 * walk(8)[:, :, :length]
    states[3:, :, :sinks, 7] = 24000.0
    (massive,) = findings(run_of(states))["massive_activations"]
    assert massive.severity == Severity[severity]
    assert massive.value == pytest.approx(sinks / length)


def test_a_share_below_rounding_is_nothing():
    assert number(3.08e-33) == "nothing (below rounding)"
    assert number(0.0) == "0"


# --- rules for all ---------------------------------------------------------------------------------------------


def test_every_verdict_is_declared_whole():
    keys = set(entries(bibliography()))
    for name, each in VERDICTS.items():
        assert each.name == name
        assert each.title.endswith(".")
        assert len(each.advice) > 40
        assert each.limits.levels
        assert each.limits.source in keys | {"depthscope's default"}
        known = {*diagnostics.CATALOGUE, *OF_LOSSES}
        assert each.metric.removesuffix("_null") in known
        assert each.judges
        assert each.range
        assert each.judged.endswith(each.limits.words)
        assert set(each.follows_from) <= set(VERDICTS) - {name}
        for need in (*each.needs, *each.wants):
            assert need in FACTS or need.removesuffix("_null") in known


def test_a_finding_names_its_chain(make_run):
    part = make_run("residual", layers=2)["trace"].to_dataset()
    broken = part.copy(deep=True)
    broken["residual"].values[1, 0, 0, 0, 0] = np.nan
    run = schema.create_run(
        {"encoder": part, "decoder": broken}, attrs={"family": "residual", "n_streams": 1}
    )
    failed = [f for f in diagnostics.judge(diagnostics.analyze(run)) if f.severity == Severity.FAIL]
    assert [f.chain for f in failed] == ["decoder"]
    assert failed[0].sentence.endswith("This is chain decoder.")


def test_what_is_said_of_the_run_is_said_once(make_run):
    part = make_run("residual", layers=2)["trace"].to_dataset()
    remark = {
        "kind": "stale_statistics",
        "sentence": "Two norms are as they were made",
        "value": 2.0,
        "sure": True,
    }
    attrs = {"family": "residual", "n_streams": 1, "remarks": [remark]}
    found = diagnostics.judge(
        diagnostics.analyze(schema.create_run({"encoder": part, "decoder": part}, attrs=attrs))
    )
    (stale,) = [each for each in found if each.verdict == "stale_statistics"]
    assert stale.sentence.endswith("These are chains encoder, decoder.")


# --- what decides, on numbers alone


@pytest.mark.parametrize(("apart", "severity"), [(1e-2, "PASS"), (1e-4, "INFO"), (1e-13, "WARN")])
def test_streams_that_training_has_parted_are_no_more_than_a_note(apart, severity):
    cosine = xr.DataArray(1.0 - np.array([0.5, 0.5, apart, apart]), dims="depth")
    (found,) = VERDICTS["copied_streams"].findings(xr.Dataset({"stream_cosine": cosine}))
    assert found.severity.name == severity


def test_what_is_no_analysis_is_refused(mhc_run):
    trace = mhc_run["trace"].to_dataset()
    wrong = {
        "a run": mhc_run,
        "a NoneType": None,
        "a dataset without any metric": xr.Dataset(),
        "a dataset without any metric;": trace.assign_coords(step=3),
        "a dataset without any metric at encoder": xr.DataTree.from_dict({"/encoder": trace}),
    }
    for said, came in wrong.items():
        with pytest.raises(ValueError, match=rf"got {said}.*judge\(ds\.analyze\(run\)\)"):
            diagnostics.judge(came)


def test_streams_that_change_while_their_mean_stays_are_no_single_representation():
    mean = walk(8, branch=0.001)[..., None, :]
    apart = walk(8, seed=3)[..., None, :]
    still = run_of(np.concatenate([mean, mean], axis=3))
    moving = run_of(np.concatenate([mean + apart, mean - apart], axis=3))
    (found,) = findings(still, trained=True)["same_representation"]
    assert (found.severity, found.first, found.last) == (Severity.WARN, 0, 8)
    assert "stream" not in found.sentence
    assert findings(moving, passed=True)["same_representation"][0].severity is Severity.PASS
    # One that moves a little is alike enough, and said.
    apart[1:] = apart[:1] + 0.1 * (apart[1:] - apart[:1])
    (found,) = findings(run_of(np.concatenate([mean + apart, mean - apart], axis=3)), trained=True)[
        "same_representation"
    ]
    assert "; of the least similar stream 0.96" in found.sentence


def test_a_large_feature_does_not_make_layers_the_same():
    states = walk(8)
    states[..., 0] = 300 * np.random.default_rng(5).standard_normal(states.shape[1:3])
    alike = diagnostics.analyze(run_of(states))["cka"].sel(estimator="unbiased", tokens="ordinary")
    assert float(alike.min()) > 0.99
    assert findings(run_of(states), passed=True)["same_representation"][0].severity is Severity.PASS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rank_collapse", "max(Dong residual, 3 (erank − 1) / (erank of noise − 1))"),
        ("copied_streams", "INFO above 0.999, WARN above 1 − 1e-12"),
        ("exploding_state", "rms ‖x_l‖ / rms ‖x_0‖ (0 or more): WARN above 10000"),
    ],
)
def test_the_explanation_of_a_verdict_is_of_the_number_that_it_judges(name, words):
    """«effective_rank: WARN below 0.15» is no limit of the effective rank, which is never below 1."""
    text = " ".join(explanation(name).split())
    assert words in text
    assert f"Limits of {VERDICTS[name].metric}" not in text


def test_matrices_that_were_not_read_are_absent_and_those_that_were_are_judged(make_run):
    """A live row of a step whose connections were not seen has no gains, and states that are all finite."""
    run = make_run("mhc", layers=4)
    analysis = diagnostics.analyze(run, metrics=["mixing_gain", "residual_norm"])

    def is_finite(mixing_gain):
        given = analysis.assign(mixing_gain=mixing_gain.drop_attrs())
        found = [each for each in diagnostics.judge(given, passed=True) if each.verdict == "not_finite"]
        return [each.severity for each in found] == [Severity.PASS] and "state is" in found[0].sentence

    assert is_finite(analysis["mixing_gain"] * np.nan)
    some = analysis["mixing_gain"].copy(deep=True)
    some[..., 3:, :] = np.nan
    assert is_finite(some)
    trace = run["trace"].to_dataset().load().copy(deep=True)
    trace["h_res"].values[2, 0, 1] = np.nan
    broken = diagnostics.analyze(schema.create_run(trace, attrs=run.attrs))
    (found,) = [each for each in diagnostics.judge(broken) if each.verdict == "not_finite"]
    assert (found.severity, found.first, found.last, found.value) == (Severity.FAIL, 2, 2, 1.0)
