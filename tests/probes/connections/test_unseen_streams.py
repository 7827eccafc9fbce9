"""Streams that nobody has declared are never taken for plain, whatever is asserted of them."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import probes
from tests.models.designs.layouts import unseen
from tests.models.designs.parts import STREAMS, tokens


def test_naming_the_blocks_does_not_make_streams_plain():
    run = probes.capture(unseen("b t (n d)"), tokens(0), layers="blocks.{i}")
    assert (run.attrs["proof"], run.attrs["n_streams"]) == ("proven", STREAMS)


def test_streams_are_not_called_plain():
    with pytest.raises(probes.LayoutError, match="names no streams"):
        probes.capture(unseen("b t (n d)"), tokens(0), layout="B T D")


def test_of_more_sequences_than_are_stored_the_matrices_are_theirs_and_the_gains_those_of_all():
    model, batch = unseen("b t n d", dynamic=True), tokens(1)
    every, some = (probes.capture(model, batch, max_sequences=number) for number in (3, 2))
    kept = some.trace["sample"].values
    assert len(kept) == 2
    for name in ("residual", "h_res", "h_post"):
        np.testing.assert_allclose(
            some.trace[name].values, every.trace[name].values.take(kept, axis=1), atol=1e-6, err_msg=name
        )
    np.testing.assert_allclose(some.statistics.gain_sum.values, every.statistics.gain_sum.values, rtol=1e-5)
