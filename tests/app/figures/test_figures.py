"""Does a figure hold the analysis' own numbers, and say in words how they were measured?"""

import numpy as np
import pytest
import xarray as xr

from depthscope.app.figures import FIGURES, Heatmap, Lines, Selection, available
from depthscope.app.figures.build.bins import visible_limits
from depthscope.app.text.latex import tex
from depthscope.diagnostics import analyze


@pytest.fixture(scope="module")
def plain(residual_run) -> xr.Dataset:
    return analyze(residual_run)


@pytest.fixture(scope="module")
def mixed(mhc_run) -> xr.Dataset:
    return analyze(mhc_run)


@pytest.fixture(scope="module")
def both(plain, mixed) -> dict[str, xr.Dataset]:
    return {"plain": plain, "mhc": mixed}


def measured(figure: Lines):
    return [line for line in figure.lines if line.role == "measured"]


def test_every_figure_can_be_drawn_from_an_mhc_run_with_every_metric(whole):
    assert list(available({"mhc": whole["mhc"]})) == list(FIGURES)


def test_every_figure_says_what_it_shows(whole):
    for name in FIGURES:
        figure = FIGURES[name].build(whole)
        assert figure.name == name
        assert figure.metric in whole["mhc"]
        assert any(character.isdigit() for character in figure.alt)
        if isinstance(figure, Lines):
            assert figure.title in figure.alt
            assert all(len(line.x) == len(line.y) for line in figure.lines)
        else:
            assert figure.z.shape == (len(figure.y), len(figure.x))


def test_effective_rank_is_the_slice_that_the_selection_names(both):
    choice = {"scope": "data", "tokens": "ordinary", "centering": "centred"}
    lines = measured(FIGURES["effective_rank"].build(both, **choice))
    assert [line.label for line in lines] == ["plain", "mhc"]
    for line in lines:
        expected = both[line.group]["effective_rank"].isel(step=-1).sel(stream="mean", **choice)
        np.testing.assert_array_equal(line.y, expected.values)
        np.testing.assert_array_equal(line.x, expected["depth"].values)


def test_the_null_and_the_standard_error_stand_beside_the_rank(plain):
    figure = FIGURES["effective_rank"].build({"plain": plain})
    line, null = figure.lines
    cell = {"scope": "sequence", "tokens": "all", "centering": "raw", "stream": "mean"}
    error = plain["effective_rank_stderr"].isel(step=-1).sel(cell).values
    # Two sequences: Student's t with one degree of freedom.
    np.testing.assert_allclose(line.upper - line.y, 12.706205 * error)
    np.testing.assert_allclose(line.y - line.lower, 12.706205 * error)
    assert "Shaded: 95 % interval over sequences (n = 2)." in figure.caption
    assert null.role == "null"
    assert set(null.y) == {
        float(plain["effective_rank_null"].sel(scope="sequence", tokens="all", centering="raw"))
    }
    assert "the baseline" in figure.caption


def test_the_caption_counts_the_tokens_behind_the_numbers(plain):
    within = FIGURES["effective_rank"].build({"plain": plain})
    pooled = FIGURES["effective_rank"].build({"plain": plain}, scope="data")
    real = int(plain["num_tokens"].sel(scope="data", tokens="all").max())
    assert f"N = {real} tokens." in pooled.caption
    assert "tokens per sequence" in within.caption
    assert pooled.caption.startswith("Over the tokens of all sequences pooled")


def test_composite_gain_shows_both_directions_with_percentiles_and_limits(mixed):
    figure = FIGURES["composite_gain"].build({"mhc": mixed})
    forward, backward = measured(figure)
    gain = mixed["composite_gain"].isel(step=-1)
    np.testing.assert_array_equal(forward.y, gain.sel(direction="forward", reduction="mean"))
    np.testing.assert_array_equal(backward.y, gain.sel(direction="backward", reduction="mean"))
    np.testing.assert_array_equal(forward.upper, gain.sel(direction="forward", reduction="p99"))
    assert [line.y[0] for line in figure.lines if line.role == "threshold"] == [1.0, 10.0, 100.0]
    assert figure.log_y


def test_cka_is_the_matrix_of_the_chosen_run_and_estimator(both):
    figure = FIGURES["cka"].build(both, run="mhc", estimator="biased")
    expected = both["mhc"]["cka"].isel(step=-1).sel(estimator="biased", tokens="all")
    assert isinstance(figure, Heatmap)
    np.testing.assert_array_equal(figure.z, expected.transpose("depth", "other_depth"))
    assert "biased estimator" in figure.caption
    assert "Independent noise" in figure.caption
    assert figure.title.endswith("mhc")


def test_the_depth_kernel_has_no_reader_of_itself_or_of_later_layers(mixed):
    figure = FIGURES["depth_kernel"].build({"mhc": mixed})
    kernel = mixed["depth_kernel"].isel(step=-1)
    assert figure.z[5, 2] == float(kernel.sel(connection=5, other_connection=2))
    assert np.isnan(figure.z[np.triu_indices_from(figure.z)]).all()


def test_alt_text_names_the_lowest_point():
    x = np.arange(4)
    data = xr.Dataset(
        {"participation_ratio": ("depth", [9.0, 4.0, 1.5, 3.0])},
        coords={
            "depth": x,
            "layer": ("depth", [-1, 0, 1, 2]),
            "site": ("depth", ["embed", "post", "post", "post"]),
        },
    )
    figure = FIGURES["participation_ratio"].build({"a": data})
    assert "lowest 1.50 at depth 2 (after block 1)" in figure.alt
    assert "highest 9.00 at depth 0 (embedding)" in figure.alt


def test_an_undefined_number_is_a_gap_and_not_a_zero():
    data = xr.Dataset({"participation_ratio": ("depth", [2.0, np.nan, 3.0])}, coords={"depth": [0, 1, 2]})
    (line,) = measured(FIGURES["participation_ratio"].build({"a": data}))
    assert np.isnan(line.y[1])


def test_a_step_can_be_chosen():
    data = xr.Dataset(
        {"gradient_norm": (("step", "depth", "stream"), [[[1.0], [2.0]], [[3.0], [4.0]]])},
        coords={"step": [0, 100], "depth": [0, 1], "stream": ["mean"]},
    )
    (first,) = measured(FIGURES["gradient_norm"].build({"a": data}, step=0))
    (last,) = measured(FIGURES["gradient_norm"].build({"a": data}))
    assert first.y.tolist() == [1.0, 2.0]
    assert last.y.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("choice", "message"), [({"scop": "data"}, "no selection 'scop'"), ({"scope": "batch"}, "sequence, data")]
)
def test_an_unknown_selection_is_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        Selection.of(choice)


def test_a_heat_map_of_a_run_that_cannot_feed_it_is_refused(both):
    with pytest.raises(ValueError, match="'plain' has no depth_kernel; mhc can feed depth_kernel"):
        FIGURES["depth_kernel"].build(both, run="plain")


# --- bands, errors, words


def test_the_cosine_with_the_depth_before_has_a_band_of_tokens(whole):
    figure = FIGURES["adjacent_cosine"].build({"plain": whole["plain"]})
    (line,) = measured(figure)
    band = whole["plain"]["adjacent_cosine_band"].isel(step=-1).sel(stream="mean")
    np.testing.assert_array_equal(line.lower, band.sel(quantile=0.05))
    np.testing.assert_array_equal(line.upper, band.sel(quantile=0.95))
    assert "Shaded: 5 to 95 % of the tokens." in figure.caption
    error = whole["plain"]["adjacent_cosine_stderr"].isel(step=-1).sel(stream="mean")
    np.testing.assert_allclose(line.error, 3.182446 * error)  # four sequences: Student's t
    assert "Whiskers: 95 % interval over sequences (n =" in figure.caption


def test_latex_can_set_every_sign_of_a_figure(whole):
    for name in FIGURES:
        figure = FIGURES[name].build(whole, **({"scope": "data"} if "scope" in FIGURES[name].uses else {}))
        labels = [line.label for line in figure.lines] if isinstance(figure, Lines) else [figure.z_label]
        written = tex(" ".join([figure.title, figure.caption, figure.x_label, figure.y_label, *labels]))
        assert not [sign for sign in written if ord(sign) > 255]


# --- spectra


def test_a_spectrum_is_the_analysis_at_the_chosen_depths(whole):
    figure = FIGURES["spectrum"].build({"plain": whole["plain"]}, scope="data", depths=(0, 3, 99))
    lines = measured(figure)
    assert [line.label for line in lines] == ["depth 0", "depth 3"]
    cell = {"scope": "data", "tokens": "all", "centering": "raw"}
    values = whole["plain"]["singular_value"].isel(step=-1).sel(cell)
    np.testing.assert_array_equal(lines[1].y, values.isel(depth=3))
    np.testing.assert_array_equal(lines[1].x, values["order"])
    noise = whole["plain"]["singular_value_null"].sel(cell).isel(depth=3)
    nulls = [line for line in figure.lines if line.role == "null"]
    np.testing.assert_array_equal(nulls[1].y, noise)
    assert figure.log_x
    assert figure.log_y
    assert figure.sources == ("marchenko1967distribution",)


def test_what_float32_cannot_tell_from_zero_is_not_drawn():
    sigma = np.array([[1e3, 1.0, 1e-9, 0.0]])
    data = xr.Dataset({"singular_value": (("depth", "order"), sigma)}, {"depth": [0], "order": [1, 2, 3, 4]})
    (line,) = measured(FIGURES["spectrum"].build({"a": data}))
    np.testing.assert_array_equal(np.isnan(line.y), [False, False, True, True])


def test_an_axis_does_not_blow_rounding_up():
    assert visible_limits(1.0, 1.5) == (1.0, 1.5)
    low, high = visible_limits(1.0, 1.0 + 1e-7)
    assert low < 0.96 < 1.04 < high
