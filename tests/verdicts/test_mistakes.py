"""Mistakes that people made are told, and their right twins are not blamed for them."""

from __future__ import annotations

import pytest
import torch

from depthscope.diagnostics import Severity
from depthscope.diagnostics.verdicts import VERDICTS
from tests.verdicts.mistakes import MISTAKES, told

torch.set_num_threads(1)

# Fresh networks, which take a second.
QUICK = (18, 24, 25, 30, 36, 45)


def test_every_mistake_of_the_list_is_planted_or_says_why_it_is_not_seen():
    assert [each.number for each in MISTAKES] == list(range(1, 50))
    for each in MISTAKES:
        assert (each.run is None) == bool(each.unseen)
        assert set(each.found_by) <= set(VERDICTS)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(each, id=each.name, marks=() if each.number in QUICK else pytest.mark.slow(more=3))
        for each in MISTAKES
        if each.run is not None
    ],
)
def test_a_mistake_is_told_and_its_right_twin_is_not_blamed(mistake):
    wrong, right = (told(mistake, each) for each in (True, False))
    assert max(each.severity for each in wrong) >= Severity.WARN
    assert not [each for each in right if each.severity > Severity.INFO]
