"""Has a run one colour everywhere, and are two of ten never the same?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from depthscope.app.drawing.matplotlib import curves
from depthscope.app.drawing.plotly import to_plotly
from depthscope.app.figures import FIGURES
from depthscope.app.figures.palette import RUN_COLOURS
from depthscope.app.figures.run_colours import analyses_of, colour_places
from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import save_run


@pytest.fixture(scope="module")
def readings(tmp_path_factory, make_run):
    folder = tmp_path_factory.mktemp("runs")
    run = make_run("residual", layers=2)
    (reading,) = read_runs({"x": run})
    found = []
    for number in range(12):
        path = folder / f"run{number:02}.nc"
        if number:
            path.touch()
        else:
            save_run(run, path)
        found.append(replace(reading, name=f"run{number:02}", path=str(path)))
    return found


def test_the_place_in_the_folder_is_the_colour_whatever_else_is_chosen(readings):
    assert colour_places(readings[:10]) == {f"run{number:02}": number for number in range(10)}
    assert colour_places([readings[7], readings[2]]) == {"run07": 7, "run02": 2}


def test_ten_runs_have_ten_colours_and_keep_those_that_they_have(readings):
    chosen = readings[2:12]
    places = colour_places(chosen)
    assert sorted(places.values()) == list(range(10))
    # One less, or one more: the others stay.
    assert colour_places(chosen[1:], places) == {name: places[name] for name in list(places)[1:]}
    assert (
        colour_places([readings[0], *chosen[:5]], places).items()
        >= {name: places[name] for name in list(places)[:5]}.items()
    )


def test_screen_and_paper_draw_a_run_in_the_same_colour(readings):
    chosen = [readings[4], readings[9]]
    figure = FIGURES["residual_norm"].build(analyses_of(chosen))
    drawn = to_plotly(figure)
    on_screen = {trace.name: trace.line.color for trace in drawn.data if trace.name in ("run04", "run09")}
    on_paper = {
        line.group: curves._looks(figure, figure.lines)[id(line)]["color"]
        for line in figure.lines
        if line.role == "measured"
    }
    assert on_screen == on_paper == {"run04": RUN_COLOURS[4], "run09": RUN_COLOURS[9]}
    alone = to_plotly(FIGURES["residual_norm"].build(analyses_of(chosen[1:])))
    assert alone.data[0].line.color == RUN_COLOURS[9]


def luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("colour", RUN_COLOURS)
def test_every_colour_is_seen_on_white_and_on_the_dark_page(colour):
    assert 1.05 / (luminance(colour) + 0.05) >= 3
    assert (luminance(colour) + 0.05) / (luminance("#12161C") + 0.05) >= 3
