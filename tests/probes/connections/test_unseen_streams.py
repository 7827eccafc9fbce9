"""Streams that nobody has declared, mixed by plain functions: refused with the override to give, never taken for plain."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from depthscope import probes
from tests.models.families import tilted
from tests.models.unseen import BATCH, STREAMS, TOKENS, Unseen, opened, unseen


def told(message: str) -> dict:
    """The override that a refusal names."""
    layout = re.search(r"layout='([^']+)'", message)
    streams = re.search(r"streams=(\d+)", message)
    layers = re.search(r"layers='([^']+)'", message)
    found = {
        "layout": layout and layout[1],
        "streams": streams and int(streams[1]),
        "layers": layers and layers[1],
    }
    return {name: value for name, value in found.items() if value}


def states_of(model: Unseen, ids) -> np.ndarray:
    """What the blocks take and give, by hooks of our own, as (depth, batch, token, stream, feature)."""
    seen = []
    hooks = [block.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for block in model.blocks]
    hooks.append(model.blocks[-1].register_forward_hook(lambda m, args, output: seen.append(output)))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return np.stack([opened(state, model.held).detach().numpy() for state in seen])


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))


MERGED = ["b t (n d)", "b t (d n)", "b (n t) d", "b (t n) d"]
APART = ["(b n) t d", "(n b) t d", "n b t d", "b t n d", "b n t d", "t b n d"]


@pytest.mark.slow(but=4, more=3)
@pytest.mark.parametrize(
    "options", [{}, {"inlined": True}, {"dynamic": True}], ids=["plain", "inlined", "dynamic"]
)
@pytest.mark.parametrize("held", MERGED + APART)
def test_copied_streams_are_read_with_proof_or_refused_with_an_override_that_works(tokens, held, options):
    model = unseen(held, **options)
    try:
        run = probes.capture(model, tokens)
    except probes.LayoutError as refusal:
        advice = told(str(refusal))
        run = probes.capture(model, tokens, **advice)
        assert run.attrs["family"] == "unknown"
    else:
        assert run.attrs["proof"] == "proven"
        assert run.attrs["n_streams"] == STREAMS
    np.testing.assert_array_equal(between_blocks(run), states_of(model, tokens))


def between_blocks(run):
    """The states before, between and after the blocks."""
    sites = run.trace["site"].values
    return run.trace.residual.values[[site != "mid" for site in sites]]


@pytest.mark.slow(but=2, more=2)
@pytest.mark.parametrize(
    "options", [{}, {"inlined": True}, {"dynamic": True}], ids=["plain", "inlined", "dynamic"]
)
@pytest.mark.parametrize("held", MERGED + APART)
def test_streams_that_start_apart_are_never_taken_for_one(tokens, held, options):
    model = unseen(held, apart=True, **options)
    try:
        run = probes.capture(model, tokens)
    except probes.LayoutError:
        pass  # refused: the answer of the user is tried below
    else:
        assert (run.attrs["proof"], run.attrs["n_streams"]) == ("proven", STREAMS)
        np.testing.assert_array_equal(between_blocks(run), states_of(model, tokens))
    run = probes.capture(model, tokens, layout=held.upper(), streams=STREAMS)
    np.testing.assert_array_equal(between_blocks(run), states_of(model, tokens))


def test_naming_the_blocks_does_not_make_streams_plain(tokens):
    run = probes.capture(unseen("b t (n d)"), tokens, layers="blocks.{i}")
    assert (run.attrs["proof"], run.attrs["n_streams"]) == ("proven", STREAMS)


def test_streams_are_not_called_plain(tokens):
    with pytest.raises(probes.LayoutError, match="names no streams"):
        probes.capture(unseen("b t (n d)"), tokens, layout="B T D")


@pytest.mark.parametrize("held", ["tuple", "list"])
def test_streams_handed_on_one_by_one_are_one_state(tokens, held):
    model = unseen(held)
    run = probes.capture(model, tokens, gradients=True, loss=tilted)
    assert (run.attrs["proof"], run.attrs["n_streams"]) == ("proven", STREAMS)
    np.testing.assert_allclose(between_blocks(run), states_of(model, tokens), rtol=1e-5, atol=1e-6)
    assert np.isfinite(run.trace.gradient.values).all()
