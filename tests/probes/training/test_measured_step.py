"""Does a measured step wait for a device, and do steps between leave torch's compiler alone?"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from depthscope import probes
from tests.models.plain_stack import Block

WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
# Each forward proves that the tensor at the place of the step before still explains what a branch reads, or the mixed streams,
# and waits for that: a wrong matrix would be worse.
PROOF = {("still_reads", "__bool__"), ("_still_explains", "__bool__")}


@contextmanager
def waits():
    """What would wait for a device while the hooks of a forward and backward run: by the function of ours, and torch's."""
    counts: Counter[tuple[str, str]] = Counter()
    originals = {name: getattr(torch.Tensor, name) for name in WAITING}

    def counting(name):
        def counted(tensor, *args, **kwargs):
            frame = sys._getframe(1)
            if "depthscope" in frame.f_code.co_filename.replace("/probes/", "/depthscope/probes/"):
                counts[frame.f_code.co_name, name] += 1
            return originals[name](tensor, *args, **kwargs)

        return counted

    try:
        for name in WAITING:
            setattr(torch.Tensor, name, counting(name))
        yield counts
    finally:
        for name in WAITING:
            if name in vars(torch._C.TensorBase):
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, originals[name])


@pytest.mark.parametrize(
    ("name", "arguments", "masked"),
    [("llama", (), False), ("deepseek", (), True), ("lucidrains", ("mhc",), False)],
)
def test_the_hooks_of_a_measured_step_wait_for_no_device(models, ids, name, arguments, masked):
    torch.manual_seed(0)
    model = models[name](*arguments)
    options = {"mask": torch.ones_like(ids).index_fill_(1, torch.tensor([0]), 0)} if masked else {}
    with probes.record(model, gradients=True, metrics="live", **options) as recorder:
        for step in range(4):
            with waits() as counts:
                output = model(ids)
                logits = output if isinstance(output, torch.Tensor) else output[0]
                logits.float().square().mean().backward()
            recorder.step()
            if (
                step < 2
            ):  # the first one looks for the structure, the second one for the place of H_pre and of the logits
                continue
            assert counts.keys() <= PROOF, counts
    assert not recorder.errors


def test_compiled_code_is_neither_compiled_again_nor_broken_by_a_recorder():
    torch.compiler.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Embedding(8, 16), *(Block(16) for _ in range(3)), torch.nn.Linear(16, 8)
    )
    model, ids = torch.compile(plain, backend=counting), torch.arange(12).reshape(2, 6) % 8
    torch._dynamo.utils.counters.clear()  # of other tests in this process
    breaks = torch._dynamo.utils.counters["graph_break"]
    numbers = []
    with probes.record(model, every=2, gradients=True, metrics="live") as recorder:
        for _ in range(6):
            model(ids).square().mean().backward()
            recorder.step()
            numbers.append((len(graphs), sum(breaks.values())))
    assert not recorder.errors
    assert recorder.run["statistics"].sizes["step"] == 3
    assert numbers == [(1, 0)] * 6  # no graph of ours, and none of the user's anew
