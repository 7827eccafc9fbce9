"""Laws of curves: equal to closed forms, followed by random networks that meet the assumption, refused elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.integrate import quad
from scipy.special import digamma, erf, expit

from depthscope.app.text.bibliography import bibliography, entries
from depthscope.diagnostics import CATALOGUE, analyze, schema
from depthscope.diagnostics.kernels import meanfield, mixing
from depthscope.diagnostics.kernels.rank import marchenko_pastur
from depthscope.diagnostics.theory import LAWS, cubic_collapse, mean_field_curve, null_law, overlay_laws

KEYS = set(entries(bibliography()))
MEAN_FIELD = ("residual_norm", "token_cosine", "backward_gain", "channel_squared_mean", "channel_variance")
GROWTH = ("residual_norm", "adjacent_cosine", "block_influence", "angular_distance")


def run_of(states: np.ndarray, *, sites=None, layers=None, gradient=None, **attrs) -> xr.DataTree:
    """A run of one stream from states (depth, token, feature) or (depth, sample, token, feature)."""
    count = len(states)
    residual = states[:, None, :, None] if states.ndim == 3 else states[:, :, :, None]
    coords = {
        "depth": np.arange(count),
        "layer": ("depth", np.arange(-1, count - 1) if layers is None else np.asarray(layers)),
        "site": ("depth", np.array(sites or ["embed"] + ["post"] * (count - 1), dtype=object)),
        "module": ("depth", np.array([f"m{i}" for i in range(count)], dtype=object)),
    }
    variables = {
        "residual": (schema.STATE, residual),
        "mask": (("sample", "token"), np.ones(residual.shape[1:3], bool)),
    }
    if gradient is not None:
        variables["gradient"] = (schema.STATE, gradient[:, :, :, None])
    facts = {"family": "residual", "n_streams": 1, "model": "random", **attrs}
    return schema.create_run(xr.Dataset(variables, coords), attrs=facts)


def curve_of(analysis: xr.Dataset, name: str, **labels) -> xr.DataArray:
    labels = {"stream": "mean", "tokens": "all", "scope": "data", "centering": "raw", **labels}
    array = analysis[name].isel(step=-1)
    return array.sel({dim: label for dim, label in labels.items() if dim in array.dims})


def law_of(analysis: xr.Dataset, name: str, law: str, **labels):
    (found,) = [
        overlay
        for overlay in overlay_laws(curve_of(analysis, name, **labels), analysis)
        if overlay.law.name == law
    ]
    return found


def reason_of(*args, **labels) -> str:
    found = law_of(*args, **labels)
    assert found.values is None
    return found.reason


# --- residual networks


def branches(count: int, *, width: int = 512, tokens: int = 24, seed: int = 0) -> np.ndarray:
    """Independent branches of unit length."""
    found = np.random.default_rng(seed).standard_normal((count, tokens, width))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def grown():
    return analyze(run_of(np.cumsum(branches(17), axis=0)), metrics=GROWTH)


def test_unit_branches_follow_the_kernel_and_the_measured_curves(grown):
    terms = np.arange(1, 18)
    norm = law_of(grown, "residual_norm", "pre_ln_growth").values
    np.testing.assert_allclose(norm**2, terms, rtol=0.02)
    np.testing.assert_allclose(norm, curve_of(grown, "residual_norm"), rtol=0.02)
    influence = law_of(grown, "block_influence", "pre_ln_growth").values
    assert np.isnan(influence[0])
    np.testing.assert_allclose(1 - influence[1:], np.sqrt(terms[:-1] / terms[1:]), rtol=0.01)
    np.testing.assert_allclose(influence[1:], curve_of(grown, "block_influence")[1:], atol=0.01)


def test_the_law_of_the_angle_is_that_of_the_cosine(grown):
    matrix = curve_of(grown, "angular_distance")
    steps = matrix.isel(other_depth=0, drop=True).copy()
    steps.values[1:] = matrix.values.diagonal(offset=-1)
    (found,) = overlay_laws(steps, grown)
    influence = law_of(grown, "block_influence", "pre_ln_growth").values
    np.testing.assert_allclose(np.cos(np.pi * found.values[1:]), 1 - influence[1:])
    np.testing.assert_allclose(found.values[1:], steps[1:], atol=0.01)


def test_a_block_of_two_sublayers_repeats_both():
    size = np.array([1.0, *[0.5, 2.0] * 6])[:, None, None]
    states = np.cumsum(size * branches(13), axis=0)
    run = run_of(states, sites=["embed"] + ["mid", "post"] * 6, layers=[-1, *np.arange(12) // 2])
    analysis = analyze(run, metrics=GROWTH)
    found = law_of(analysis, "residual_norm", "pre_ln_growth").values
    np.testing.assert_allclose(found**2, np.cumsum(size.ravel() ** 2), rtol=0.03)
    added = np.diff(found**2)
    np.testing.assert_allclose(added, np.tile(added[:2], 6))


def test_branches_along_the_stream_are_another_network():
    states = np.cumsum(branches(8), axis=0)
    states[4:] += 2 * states[3]
    analysis = analyze(run_of(states), metrics=GROWTH)
    added = states[4] - states[3]
    cosines = (
        (added * states[3]).sum(-1) / np.linalg.norm(added, axis=-1) / np.linalg.norm(states[3], axis=-1)
    )
    reason = reason_of(analysis, "residual_norm", "pre_ln_growth")
    assert (
        f"before depth 4 is not independent of the stream: its cosine with it is {cosines.mean():.2f}"
        in reason
    )


def test_states_of_one_length_are_post_norm():
    states = np.cumsum(np.array([1.0, *[0.05] * 6])[:, None, None] * branches(7), axis=0)
    states /= np.linalg.norm(states, axis=-1, keepdims=True)
    assert "Post-LN" in reason_of(analyze(run_of(states), metrics=GROWTH), "residual_norm", "pre_ln_growth")


def test_a_trained_or_many_streamed_run_has_no_law_of_fresh_networks(grown, hc_run):
    trained = grown.assign_coords(step=[500])
    assert "training step 500" in reason_of(trained, "residual_norm", "pre_ln_growth")
    streams = analyze(hc_run, metrics=GROWTH)
    assert "one residual stream" in reason_of(streams, "residual_norm", "pre_ln_growth")
    assert "contains no adjacent_cosine" in reason_of(
        grown.drop_vars("adjacent_cosine"), "residual_norm", "pre_ln_growth"
    )


def test_blocks_that_differ_in_their_states_are_not_repeated():
    run = run_of(np.cumsum(branches(5), axis=0), layers=[-1, 0, 0, 1, 2])
    reason = reason_of(analyze(run, metrics=GROWTH), "residual_norm", "pre_ln_growth")
    assert "differ in their number of states" in reason


# --- attention alone


def attention(depths: int, *, tokens: int = 12, width: int = 32, size: float = 0.1) -> np.ndarray:
    """States (depth, token, feature) of softmax attention without skips, MLPs and norms."""
    rng = np.random.default_rng(1)
    scoring = rng.standard_normal((width, width)) / np.sqrt(width)
    x = rng.standard_normal(width) + size * rng.standard_normal((tokens, width))
    states = [x]
    for _ in range(depths - 1):
        scores = x @ scoring @ x.T
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        x = weights / weights.sum(-1, keepdims=True) @ x
        states.append(x)
    return np.stack(states)


def test_pure_attention_falls_as_the_cube_of_its_first_step():
    analysis = analyze(run_of(attention(3), pure_attention=True), metrics=["dong_residual"])
    law, measured = (
        law_of(analysis, "dong_residual", "dong_cubic").values,
        curve_of(analysis, "dong_residual"),
    )
    np.testing.assert_allclose(law[:2], measured[:2])
    assert np.log(float(law[2])) == pytest.approx(np.log(float(measured[2])), rel=0.15)
    assert float(measured[1]) > 1e3 * float(measured[2])


def test_the_cube_is_iterated_and_leaves_float64_at_zero():
    law = cubic_collapse(0.5, 0.1, num_depths=5)
    np.testing.assert_allclose(law[1:] / law[:-1] ** 3, 0.1 / 0.5**3, rtol=1e-9)
    assert cubic_collapse(0.5, 0.1, num_depths=2000)[-1] == 0.0


def test_a_residual_network_or_one_that_does_not_collapse_has_no_cube(residual_run):
    analysis = analyze(residual_run, metrics=["dong_residual"])
    assert "pure_attention" in reason_of(analysis, "dong_residual", "dong_cubic")
    states = attention(3)[::-1]
    said = analyze(run_of(states, pure_attention=True), metrics=["dong_residual"])
    assert "does not shrink" in reason_of(said, "dong_residual", "dong_cubic")


# --- feed-forward networks

ACTIVATIONS = {
    "relu": lambda h: np.maximum(h, 0),
    "tanh": np.tanh,
    "erf": erf,
    "gelu": lambda h: 0.5 * h * (1 + erf(h / np.sqrt(2))),
    "silu": lambda h: h * expit(h),
}


def slope(activation: str, h: np.ndarray) -> np.ndarray:
    phi = ACTIVATIONS[activation]
    return (phi(h + 1e-6) - phi(h - 1e-6)) / 2e-6


def stack(activation: str, sigma_w: float, sigma_b: float, state: str, *, depths=7, width=200, networks=40):
    """States (depth, network, token, feature) of random networks, and gradients of random directions at their end."""
    rng = np.random.default_rng(3)
    common, own = rng.standard_normal((networks, 1, width)), rng.standard_normal((networks, 3, width))
    x = np.sqrt(0.6) * common + np.sqrt(0.4) * own
    weights = sigma_w / np.sqrt(width) * rng.standard_normal((depths - 1, networks, width, width))
    biases = sigma_b * rng.standard_normal((depths - 1, networks, 1, width))
    before, states = [], [x]
    for w, b in zip(weights, biases, strict=True):
        before.append(x @ w + b)
        x = ACTIVATIONS[activation](before[-1])
        states.append(before[-1] if state == "pre" else x)
    delta = rng.standard_normal(x.shape)  # with respect to the last state
    gradients = [delta]
    for layer in range(depths - 2, -1, -1):
        if state == "post":
            delta = delta * slope(activation, before[layer])
        delta = delta @ weights[layer].swapaxes(-1, -2)
        if state == "pre" and layer:
            delta = delta * slope(activation, before[layer - 1])
        gradients.append(delta)
    return np.stack(states), np.stack(gradients[::-1])


@pytest.mark.parametrize("state", ["pre", "post"])
@pytest.mark.parametrize(
    ("activation", "sigma_w", "sigma_b"),
    [
        ("relu", 2**0.5, 0.0),
        ("relu", 1.7, 0.4),
        ("tanh", 1.5, 0.3),
        ("erf", 1.0, 0.1),
        ("gelu", 1.5, 0.0),
        ("silu", 2.0, 0.2),
    ],
)
def test_a_wide_random_network_follows_the_maps(activation, sigma_w, sigma_b, state):
    states, gradients = stack(activation, sigma_w, sigma_b, state)
    network = {"activation": activation, "sigma_w": sigma_w, "sigma_b": sigma_b, "state": state}
    analysis = analyze(run_of(states, gradient=gradients, mean_field=network), metrics=MEAN_FIELD)
    for name, law, error in (
        ("residual_norm", "mean_field_length", {"rtol": 0.08}),
        ("token_cosine", "mean_field_correlation", {"atol": 0.02}),
        ("backward_gain", "mean_field_gradient", {"rtol": 0.08}),
    ):
        found = law_of(analysis, name, law, scope="sequence")
        measured = curve_of(analysis, name, scope="sequence")
        np.testing.assert_allclose(found.values, measured, err_msg=name, **error)


def test_relu_is_the_arc_cosine_kernel_and_keeps_gradients_at_sigma_w_2():
    found = mean_field_curve(3.0, 0.2, num_depths=4, activation="relu", sigma_w=2**0.5, state="post")
    c = 0.2
    for cosine in found.cosine[1:]:
        c = (np.sqrt(1 - c * c) + (np.pi - np.arccos(c)) * c) / np.pi
        assert cosine == pytest.approx(c)
    np.testing.assert_allclose(found.second_moment, 3.0)
    np.testing.assert_allclose(found.backward_gain, 1.0)
    half = mean_field_curve(3.0, 0.2, num_depths=4, activation="relu", sigma_w=1.0, state="post")
    np.testing.assert_allclose(half.backward_gain**2, 0.5 ** np.arange(3, -1, -1.0))  # χ₁ = σ_w²/2


def test_pre_and_post_are_two_views_of_one_network():
    facts = {"num_depths": 6, "activation": "tanh", "sigma_w": 1.4, "sigma_b": 0.3}
    pre, post = (mean_field_curve(0.8, 0.3, state=state, **facts) for state in ("pre", "post"))
    q, x = pre.second_moment[1:], post.second_moment
    np.testing.assert_allclose(q, 1.4**2 * x[:-1] + 0.3**2)
    np.testing.assert_allclose(pre.cosine[1:] * q, 1.4**2 * x[:-1] * post.cosine[:-1] + 0.3**2)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (None, "no attribute mean_field"),
        ({"activation": "relu"}, "sigma_w"),
        ({"activation": "cube", "sigma_w": 1.0}, "'cube'"),
        ({"activation": "relu", "sigma_w": 1.0, "state": "middle"}, "'middle'"),
    ],
)
def test_a_network_that_is_not_described_has_no_maps(network, message):
    states, _ = stack("relu", 1.4, 0.0, "pre", depths=3, width=20, networks=2)
    analysis = analyze(run_of(states, mean_field=network), metrics=MEAN_FIELD)
    assert message in reason_of(analysis, "token_cosine", "mean_field_correlation")


def test_centred_cosines_have_no_map():
    states, _ = stack("relu", 1.4, 0.0, "pre", depths=3, width=20, networks=2)
    network = {"activation": "relu", "sigma_w": 1.4}
    analysis = analyze(run_of(states, mean_field=network), metrics=MEAN_FIELD)
    reason = reason_of(analysis, "token_cosine", "mean_field_correlation", centering="centred")
    assert "centring" in reason


# --- connections

PRODUCT = (
    "composite_singular_value",
    "mixing_singular_value",
    "identity_distance",
    "doubly_stochastic_violation",
)


def product_run(matrices: np.ndarray) -> xr.DataTree:
    """A run whose connections are given, (connection, token, n, n)."""
    count, tokens, n, _ = matrices.shape
    variables = {
        "residual": (schema.STATE, np.ones((count + 1, 1, tokens, n, 2))),
        "mask": (("sample", "token"), np.ones((1, tokens), bool)),
        "h_res": (schema.TRACE["h_res"].dims, matrices[:, None]),
    }
    index = np.arange(count)
    coords = {
        "depth": np.arange(count + 1),
        "layer": ("depth", np.arange(-1, count)),
        "site": ("depth", np.array(["embed"] + ["post"] * count, dtype=object)),
        "module": ("depth", np.array(["m"] * (count + 1), dtype=object)),
        "connection": index,
        "connection_layer": ("connection", index),
        "branch": ("connection", np.array(["block"] * count, dtype=object)),
        "connection_module": ("connection", np.array(["m"] * count, dtype=object)),
        "depth_in": ("connection", index),
        "depth_out": ("connection", index + 1),
    }
    facts = {"family": "hc", "n_streams": n, "model": "random", "orientation": "destination_source"}
    return schema.create_run(xr.Dataset(variables, coords), attrs=facts)


def product_laws(matrices: np.ndarray, reduction: str = "median") -> tuple[np.ndarray, np.ndarray]:
    """Law and measured singular values, (connection, component)."""
    analysis = analyze(product_run(matrices), metrics=PRODUCT)
    values = analysis["composite_singular_value"].isel(step=0).sel(reduction=reduction)
    laws = [overlay_laws(values.isel(component=i), analysis)[0].values for i in range(matrices.shape[-1])]
    return np.stack(laws, axis=-1), values.transpose("connection", "component").values


def test_gaussian_products_grow_by_the_lyapunov_exponents_of_newman():
    n, depth, scale = 3, 24, 0.7
    matrices = scale * np.random.default_rng(0).standard_normal((depth, 400, n, n))
    law, _ = product_laws(matrices)
    assert np.isfinite(law).all()
    rates = np.log(law[-1] / law[7]) / (depth - 8)
    exact = 0.5 * (np.log(2 * scale**2) + digamma((n - np.arange(n)) / 2))
    np.testing.assert_allclose(rates, exact, atol=0.03)


def test_connections_near_the_identity_drift_as_a_random_walk_on_matrices():
    n, depth, noise = 2, 400, 0.2
    matrices = np.eye(n) + noise * np.random.default_rng(0).standard_normal((depth, 60, n, n))
    law, _ = product_laws(matrices)
    rates = np.log(law[-1] / law[99]) / (depth - 100)
    exact = 0.5 * noise**2 * (n - 2 * (np.arange(n) + 1.0))  # Itô: σ²(n − 2i)/2, to second order in σ
    np.testing.assert_allclose(rates, exact, atol=0.006)


@pytest.mark.parametrize(("middle", "depth"), [(0.0, 8), (1.0, 24)])
@pytest.mark.parametrize("reduction", ["mean", "median"])
def test_independent_connections_follow_the_law_at_every_depth(middle, depth, reduction):
    matrices = middle * np.eye(4) + 0.2 * np.random.default_rng(5).standard_normal((depth, 400, 4, 4))
    law, measured = product_laws(matrices, reduction)
    np.testing.assert_allclose(np.log(law), np.log(measured), rtol=0.06, atol=0.12)


def test_a_product_is_followed_as_far_as_float64_tells_its_values_apart():
    matrices = np.random.default_rng(5).standard_normal((40, 50, 4, 4))
    law, _ = product_laws(matrices)
    last = int(np.flatnonzero(np.isfinite(law[:, 3]))[-1])
    assert last < 39
    assert 1e-12 < law[last, 3] / law[last, 0] < 1e-9
    assert np.isfinite(law[:, 1]).all()


def test_doubly_stochastic_products_keep_one_and_lose_the_rest():
    matrices = mixing.sinkhorn(np.random.default_rng(2).standard_normal((6, 400, 4, 4)), steps=200)
    law, measured = product_laws(matrices)
    np.testing.assert_array_equal(law[:, 0], 1.0)
    np.testing.assert_allclose(np.log(law[:, 1:]), np.log(measured[:, 1:]), rtol=0.15, atol=0.05)
    assert law[-1, 1] < 0.01


def test_identities_multiply_to_nothing_random_and_extremes_have_no_law():
    still = np.broadcast_to(np.eye(4), (5, 3, 4, 4))
    analysis = analyze(product_run(still), metrics=PRODUCT)
    values = analysis["composite_singular_value"].isel(step=0, component=0)
    assert "multiple of the identity" in overlay_laws(values.sel(reduction="mean"), analysis)[0].reason
    assert "not of their max" in overlay_laws(values.sel(reduction="max"), analysis)[0].reason


def test_a_product_of_undefined_connections_has_no_law():
    matrices = np.eye(4) + 0.1 * np.random.default_rng(0).standard_normal((6, 3, 4, 4))
    matrices[3] = np.nan
    analysis = analyze(product_run(matrices), metrics=PRODUCT)
    values = analysis["composite_singular_value"].isel(step=0, component=0).sel(reduction="mean")
    assert "not defined everywhere" in overlay_laws(values, analysis)[0].reason


SINGLE = (
    "mixing_eigenvalue_modulus",
    "mixing_singular_value",
    "identity_distance",
    "doubly_stochastic_violation",
)


@pytest.mark.parametrize("name", SINGLE[:2])
@pytest.mark.parametrize("middle", [0.0, 1.0])
def test_random_connections_have_the_spectrum_of_the_law(name, middle):
    matrices = middle * np.eye(4) + 0.3 * np.random.default_rng(3).standard_normal((3, 2000, 4, 4))
    analysis = analyze(product_run(matrices), metrics=SINGLE)
    values = analysis[name].isel(step=0).sel(reduction="mean")
    for i in range(4):
        (found,) = overlay_laws(values.isel(component=i), analysis)
        np.testing.assert_allclose(found.values, values.isel(component=i), rtol=0.05, atol=0.02)


def test_eigenvalues_of_a_large_random_connection_fill_ginibres_disc():
    n, scale = 24, 0.5
    matrices = scale / n**0.5 * np.random.default_rng(0).standard_normal((2, 40, n, n))
    analysis = analyze(product_run(matrices), metrics=SINGLE)
    moduli = analysis["mixing_eigenvalue_modulus"].isel(step=0).sel(reduction="median")
    law = np.array([overlay_laws(moduli.isel(component=i), analysis)[0].values for i in range(n)])[:, 0]
    share = (np.arange(n, 0, -1.0) - 0.5) / n  # of the disc's area inside
    np.testing.assert_allclose(law, scale * share**0.5, atol=0.08)
    assert law[0] < 1.2 * scale


def test_a_doubly_stochastic_connection_keeps_what_all_streams_share():
    matrices = mixing.sinkhorn(np.random.default_rng(2).standard_normal((2, 400, 4, 4)), steps=200)
    analysis = analyze(product_run(matrices), metrics=SINGLE)
    values = analysis["mixing_singular_value"].isel(step=0).sel(reduction="mean")
    first, second = (overlay_laws(values.isel(component=i), analysis)[0].values for i in (0, 1))
    np.testing.assert_array_equal(first, 1.0)
    np.testing.assert_allclose(second, values.isel(component=1), rtol=0.15)


# --- activations


@pytest.mark.parametrize("name", meanfield.ACTIVATIONS)
def test_maps_of_an_activation_equal_adaptive_quadrature_and_its_slope(name):
    phi, slope = meanfield.ACTIVATIONS[name]
    q, sigma_w, sigma_b = 1.3, 1.2, 0.3
    normal = lambda h: np.exp(-(h**2) / (2 * q)) / np.sqrt(2 * np.pi * q)  # noqa: E731
    square, _ = quad(lambda h: float(phi(np.array(h))) ** 2 * normal(h), -12, 12, points=[0.0])
    steep, _ = quad(lambda h: float(slope(np.array(h))) ** 2 * normal(h), -12, 12, points=[0.0])
    assert meanfield.q_map(q, sigma_w, sigma_b, name) == pytest.approx(sigma_w**2 * square + sigma_b**2)
    assert meanfield.chi_1(sigma_w, sigma_b, name, q) == pytest.approx(sigma_w**2 * steep)
    points = np.array([-2.1, -0.4, 0.7, 3.0])
    np.testing.assert_allclose((phi(points + 1e-6) - phi(points - 1e-6)) / 2e-6, slope(points), atol=1e-8)


# --- declarations


def test_ranks_have_the_marchenko_pastur_law_as_their_null(residual_run):
    analysis = analyze(residual_run, metrics=["participation_ratio"])
    assert null_law("participation_ratio") is LAWS["marchenko_pastur"]
    assert null_law("dong_residual") is None
    null = analysis["participation_ratio_null"].sel(scope="data", tokens="all", centering="raw")
    count = int(residual_run["trace"]["mask"].sum())
    np.testing.assert_allclose(null, marchenko_pastur(count, 32).participation_ratio)
    assert overlay_laws(curve_of(analysis, "participation_ratio"), analysis) == []


def test_a_curve_of_one_point_has_no_law(grown):
    assert overlay_laws(curve_of(grown, "residual_norm").isel(depth=[0]), grown) == []


def test_a_slice_that_does_not_say_what_it_is_has_no_law(grown):
    later = xr.concat([grown, grown.assign_coords(step=[9])], "step")
    bare = later["residual_norm"].isel(step=0, stream=0, drop=True)
    reasons = {overlay.law.name: overlay.reason for overlay in overlay_laws(bare, later)}
    assert "does not say which step" in reasons["pre_ln_growth"]


@pytest.mark.parametrize("name", LAWS)
def test_every_law_is_declared_whole(name):
    law = LAWS[name]
    assert law.cite in KEYS
    assert set(law.metrics) <= set(CATALOGUE)
    assert law.name == name
    assert all((law.label, law.equation, law.assumption, law.metrics, law.description))
    assert law.equation.count("{") == law.equation.count("}")
