"""Are streams read in every layout, held as a tensor or a list, with their matrices, labels and proof?"""

from __future__ import annotations

import pytest

from depthscope.probes.reading.read import read_model
from tests.models.designs.read_outcome import judged
from tests.models.unseen import unseen
from tests.models.unseen_truth import HELD, OPTIONS, ids, truth_of


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: " ".join(n for n, on in options.items() if on) or "plain"
)
@pytest.mark.parametrize("held", HELD)
def test_a_layout_is_read_rightly(held, options):
    model = unseen(held, **options)

    found = judged(read_model(model, ids()), truth_of(model), labels=True, rounding=1e-5)

    assert str(found) == "right"
