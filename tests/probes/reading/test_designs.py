"""Is every design read rightly, with its labels, gates and proof? What is not is named here, and nothing is wrong."""

from __future__ import annotations

import pytest

from tests.models.designs.catalogue import DESIGNS
from tests.models.designs.design import Design
from tests.models.designs.read_outcome import read_outcome

# Nothing is added to what it was computed from, or what is carried is not the state.
NO_RESIDUAL_NETWORK = {
    "feed-forward chain", "skip through a linear map", "the state is rolled over tokens",
    "the state's features in reverse", "the mean over tokens is carried", "half of the features are carried",
    "attention without a skip", "recurrent layers without a skip",
}  # fmt: skip


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_a_design_is_read_rightly_or_said_not_to_be(design: Design):
    found = read_outcome(design)

    if design.name in NO_RESIDUAL_NETWORK:
        assert found.word == "refused"
    else:
        assert str(found) == "right"
