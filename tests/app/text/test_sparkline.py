"""Is the small curve of a card the numbers that were judged, with their gaps, their worst one and their limit?"""

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from depthscope.app.text.sparkline import MOST_BLOCKS, MOST_POINTS, curve_blocks, curve_svg, curve_words
from depthscope.diagnostics import Finding, Severity

NAN = math.nan


def finding(profile, *, threshold=0.5, above=True, first=1, last=2, axis="depth", severity=Severity.FAIL):
    return Finding(
        "rank_collapse", severity, "", "m", 0.9, threshold, "this project", axis, first, last, "",
        above=above, profile=tuple(profile),
    )  # fmt: skip


def points_of(svg) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(str(svg)).iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]


def test_the_words_name_range_limit_side_and_gaps():
    assert curve_words(finding([0.1, NAN, 0.9])) == "depth 0–2: 0.100 to 0.900, worse above 0.5; 1 undefined"
    assert curve_words(finding([3.0, 2.0], above=False, axis="connection")) == (
        "connection 0–1: 2.00 to 3.00, worse below 0.5"
    )


@pytest.mark.parametrize("profile", [(), (1.0,), (NAN, NAN), (NAN, 2.0), (math.inf, 1.0)])
def test_a_single_number_has_no_curve(profile):
    assert (curve_words(finding(profile)), curve_blocks(finding(profile)), str(curve_svg(finding(profile)))) == (
        "", "", ""
    )  # fmt: skip


def test_blocks_rise_with_the_numbers_and_leave_gaps():
    assert curve_blocks(finding([0.0, NAN, 1.0], threshold=0.5)) == "▁·█"


def test_of_numbers_that_all_read_one_the_distance_from_one_is_drawn():
    alike = finding([1.0 - 1e-6, 1.0 - 4e-5, 1.0 - 2e-6], threshold=0.99)
    assert curve_words(alike) == "depth 0–2: 1 − x from 1e-6 to 4e-5, worse below 0.01"
    assert max(curve_blocks(alike)) == curve_blocks(alike)[1] > curve_blocks(alike)[0]
    (line,) = points_of(curve_svg(alike))
    assert min(line, key=lambda point: point[1]) == line[1]
    # What is left of a rounded 1 is no curve.
    assert curve_blocks(finding([1.0, 1.0 - 1e-16, 1.0], threshold=0.99)) == ""


def test_many_numbers_keep_their_worst_one():
    values = np.zeros(5000)
    values[3333] = 7.0
    blocks = curve_blocks(finding(values, threshold=5.0))
    assert len(blocks) == MOST_BLOCKS
    assert blocks.count("█") == 1
    (line,) = points_of(curve_svg(finding(values, threshold=5.0)))
    assert len(line) == MOST_POINTS
    assert min(y for _, y in line) < 4  # the peak is at the top
    dip = curve_blocks(finding(10 - values, threshold=5.0, above=False))
    assert dip.count("▁") == 1


def test_the_svg_goes_through_the_numbers_on_a_linear_and_on_a_logarithmic_scale():
    (line,) = points_of(curve_svg(finding([0.0, 1.0, 3.0], threshold=2.0)))
    heights = [y for _, y in line]
    assert heights[0] - heights[1] == pytest.approx((heights[0] - heights[2]) / 3, abs=0.1)
    (line,) = points_of(curve_svg(finding([1.0, 10.0, 1000.0], threshold=100.0)))
    heights = [y for _, y in line]
    assert heights[0] - heights[1] == pytest.approx((heights[0] - heights[2]) / 3, abs=0.1)
