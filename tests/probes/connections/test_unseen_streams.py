"""Streams that nobody has declared are never taken for plain, whatever is asserted of them."""

from __future__ import annotations

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
