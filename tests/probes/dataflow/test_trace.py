"""Is what a trace says of a forward true? Against autograd, and on axes whose meaning is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope.probes.dataflow.axes import BATCHED, layout_of, new_axes, regrouped, same_axes, stream_atom
from depthscope.probes.dataflow.linear import LinearDependence
from depthscope.probes.dataflow.operations import MOST_STREAMS
from depthscope.probes.dataflow.trace import Trace

BATCH, TOKENS, STREAMS, WIDTH = 3, 5, 4, 7


def traced(function, *inputs):
    """The trace of a function, the values of its inputs, and its output with its value."""
    trace = Trace()
    for tensor in inputs:
        trace.watch(tensor, 0)
    with trace:
        output = function(*inputs)
    assert trace.error is None
    return trace, [trace.value(tensor) for tensor in inputs], output, trace.value(output)


def mixed(x, h):
    return torch.einsum("btij,btjd->btid", h, x)


def in_a_buffer(x, h):
    out = torch.empty_like(x)
    for i in range(x.shape[2]):
        out[:, :, i] = sum(h[:, :, i, j, None] * x[:, :, j] for j in range(x.shape[2]))
    return out


def in_place(x, h):
    out = h @ x
    out[:, :, 1].mul_(0.5)
    out += x
    return out


def merged(x, h):
    flat = x.flatten(2).view(*x.shape[:2], x.shape[2], -1)
    return torch.baddbmm(flat.flatten(0, 1), h.flatten(0, 1), flat.flatten(0, 1)).view(x.shape)


def stacked(x, h):
    rows = [(h[:, :, i].unsqueeze(-1) * x).sum(2) for i in range(x.shape[2])]
    return torch.stack(rows, 2) - 0.25 * x


def gated(x, h):
    gate = h.mean((2, 3))[..., None, None].sigmoid()
    return torch.lerp(x, h @ x, gate)


@pytest.mark.parametrize("function", [mixed, in_a_buffer, in_place, merged, stacked, gated])
def test_the_operator_between_two_values_is_their_derivative_at_fixed_weights(function):
    torch.manual_seed(0)
    h = torch.rand(BATCH, TOKENS, STREAMS, STREAMS)
    embedding = torch.randn(BATCH, TOKENS, WIDTH)

    def from_embedding(given, weights):
        streams = given.unsqueeze(2).expand(-1, -1, STREAMS, -1) * 1.0
        return function(streams, weights)

    _, (value, _), _, output = traced(from_embedding, embedding, h)
    over = LinearDependence(output, [value])
    assert over.reached == (value,)
    direction = torch.randn_like(embedding)
    expected = torch.autograd.functional.jvp(lambda e: from_embedding(e, h), embedding, direction)[1]
    torch.testing.assert_close(over.apply({value.number: direction}), expected)


def test_what_a_branch_gives_is_a_source_and_the_state_is_carried_once():
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(BATCH, TOKENS, WIDTH)
    trace, (before,), _, after = traced(lambda x: 0.5 * x + layer(nn.functional.gelu(x)), x)
    over = LinearDependence(after, [before])
    assert over.scales == {before.number: 0.5}
    assert same_axes(before.axes, after.axes)
    assert [trace.depends(source, before) for source in over.sources] == [True]


def test_a_product_of_a_state_with_itself_is_no_linear_function_of_it():
    x = torch.randn(BATCH, TOKENS, WIDTH)
    _, (before,), _, after = traced(lambda x: x * (x + 1), x)
    assert not LinearDependence(after, [before]).reached


def test_axes_that_were_merged_and_split_come_back():
    axes = new_axes((BATCH, STREAMS, WIDTH))
    merged_axes = regrouped(axes, (BATCH, STREAMS * WIDTH))
    assert merged_axes is not None
    back = regrouped(merged_axes, (BATCH, STREAMS, WIDTH))
    assert back is not None
    assert same_axes(axes, back)
    assert regrouped(axes, (BATCH * STREAMS, WIDTH)) is not None
    assert regrouped(new_axes((4, 6)), (6, 4)) is None, (
        "a view that cuts across an axis has none of the old ones"
    )


def test_an_axis_that_was_cut_and_padded_again_is_no_part_of_itself():
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def cut_and_padded(x):
        return (x + nn.functional.pad(x[:, 1:], (0, 0, 0, 1))).softmax(1)

    _, (value,), _, _ = traced(cut_and_padded, x)
    assert value.axes[1][0].itself().parent is None


def test_a_convolution_and_a_linear_layer_tell_tokens_from_features():
    torch.manual_seed(0)
    channels_first = torch.randn(BATCH, WIDTH, TOKENS)
    convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    _, (value,), _, _ = traced(lambda x: x + convolution(x), channels_first)
    assert layout_of(value.axes, None) == "B D T"
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(BATCH, TOKENS, WIDTH)
    _, (value,), _, _ = traced(lambda x: x + layer(x), x)
    assert layout_of(value.axes, None) == "B T D"
    assert value.axes[0][0].has(BATCHED)


def test_copies_of_a_state_are_streams_and_heads_are_not():
    torch.manual_seed(0)
    x = torch.randn(BATCH, TOKENS, 6 * WIDTH)
    _, _, _, copies = traced(lambda x: x.unsqueeze(2).expand(-1, -1, STREAMS, -1).contiguous(), x)
    found = stream_atom(copies.axes, MOST_STREAMS)
    assert found is not None
    assert found.size == STREAMS
    assert stream_atom(new_axes((BATCH, TOKENS, WIDTH)), MOST_STREAMS) is None


def test_a_model_runs_the_same_under_a_trace():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(), torch.randn(BATCH, TOKENS, 8)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    _, _, output, _ = traced(model, x)
    assert torch.equal(output, expected)
