"""Does the graph of causes show every effect once, under its cause?"""

import pytest

from depthscope.app.text.cards import card_of, cards_text, cause_lines
from depthscope.diagnostics import Finding, Severity


def finding(verdict, because="", *, severity=Severity.INFO, first=3, stream=None):
    return Finding(
        verdict, severity, "A sentence.", "effective_rank", 1.0, 0.0, "this project", "depth", first, first, "",
        stream=stream, because=because,
    )  # fmt: skip


TREE = [
    finding("undefined_state", severity=Severity.FAIL),
    finding("rank_collapse", "undefined_state", first=5),
    finding("vanishing_gradient", "rank_collapse", first=7),
    finding("idle_layer", "undefined_state"),
    finding("common_vector", severity=Severity.WARN),
]


def test_effects_are_below_their_causes_and_findings_alone_are_left_out():
    assert cause_lines(TREE) == [
        "undefined state, depth 3",
        "  └ rank collapse, depth 5",
        "    └ vanishing gradient, depth 7",
        "  └ idle layer, depth 3",
    ]
    assert cards_text(map(card_of, TREE)).endswith("idle layer, depth 3")


def test_nothing_is_drawn_where_nothing_follows():
    alone = [finding("idle_layer", "rank_collapse"), finding("common_vector")]  # its cause is not among them
    assert cause_lines(alone) == []
    assert "follows from what" not in cards_text(map(card_of, alone))


@pytest.mark.parametrize("order", [1, -1])
def test_a_circle_ends(order):
    circle = [finding("a", "b"), finding("b", "a"), finding("c", "c")][::order]
    lines = cause_lines(circle)
    assert len(lines) == 2
    assert {line.strip(" └").partition(",")[0] for line in lines} == {"a", "b"}
