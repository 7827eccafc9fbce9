"""Whatever happens around a probe, the user's run is as without it, every hook leaves, and what was not measured is said."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from depthscope import jacobian, probes
from depthscope.probes.statistics.token_sums import TokenSums
from tests.probes.session.faulty_models import MODELS, VOCABULARY, Noted
from tests.probes.session.hooks_left import hooks_on_model

IDS = torch.randint(1, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))


PROBES = Path(probes.__file__).parent


def _inside_a_hook(frame: Any) -> bool:
    names = ("__call__", "_report_errors")
    while frame is not None:
        if frame.f_code.co_filename.endswith("probes/model/hooks.py") and frame.f_code.co_name in names:
            return True
        frame = frame.f_back
    return False


@contextmanager
def fault(error: type[BaseException], after: int, tripped: list[str]) -> Iterator[None]:
    """Raise an error at the n-th function that code of ours calls inside of a hook, be it ours or torch's."""
    left = after

    def profile(frame: Any, kind: str, argument: Any) -> None:
        nonlocal left
        caller = frame if kind == "c_call" else frame.f_back
        if (
            kind not in ("call", "c_call")
            or caller is None
            or not caller.f_code.co_filename.startswith(str(PROBES))
        ):
            return
        # What ends a hook is not a measurement: an error there is one of the interpreter's.
        if caller.f_code.co_name in ("__torch_function__", "outside_user_modes", "__exit__"):
            return
        if caller.f_code.co_filename.endswith("hooks.py") or not _inside_a_hook(caller):
            return
        left -= 1
        if left == 0:
            sys.setprofile(None)
            tripped.append(f"{caller.f_code.co_name}:{caller.f_lineno}")
            raise error("no memory for a probe")

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def build(name: str = "plain") -> Noted:
    torch.manual_seed(0)
    random.seed(0)
    return MODELS[name]().train()


def train(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    loss = model(ids).square().mean()
    loss.backward()
    return loss


def norms(recorder: probes.Recorder) -> np.ndarray:
    """Square norms of the states, step by depth."""
    found = [node for node in recorder.run["statistics"].subtree if "square_norm_sum" in node.data_vars]
    return found[0].square_norm_sum.sum("stream", skipna=False).values


def noted(model: Noted, *forwards: int) -> np.ndarray:
    """The same as the model itself noted it in some forwards."""
    return np.sum([list(model.notes.forwards[number].values()) for number in forwards], 0)


def states_alive(model: Noted) -> int:
    gc.collect()
    return sum(state() is not None for state in model.notes.states)


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects_are_searched():
    """Searching all objects for hooks takes long where libraries made many; none of these is a hook."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# --- several probes ---


def test_two_recorders_on_one_model_close_in_any_order():
    model = build("mhc")
    before = [list(vars(module)) for module in model.modules()]
    recorders = [probes.record(model, gradients=True), probes.record(model, weights=True)]
    for recorder in recorders:
        recorder.__enter__()
    for _ in range(3):
        train(model)
        for recorder in recorders:
            recorder.step()
    recorders[0].close()
    train(model)
    recorders[1].step()
    recorders[1].close()
    for recorder in recorders:
        assert recorder.errors == []
        np.testing.assert_allclose(norms(recorder)[:3], [noted(model, n) for n in range(3)], rtol=1e-5)
    assert [list(vars(module)) for module in model.modules()] == before
    assert (hooks_on_model(model), states_alive(model)) == (0, 0)


def test_a_capture_and_a_jacobian_do_not_count_in_a_recorder():
    model = build("hc").eval()
    with probes.record(model, gradients=True) as recorder:
        train(model)
        probes.capture(model, IDS, gradients=True, loss=lambda output, batch: output.square().mean())
        jacobian(model, IDS)
        recorder.step()
    assert recorder.errors == []
    np.testing.assert_allclose(norms(recorder)[0], noted(model, 0), rtol=1e-5)


def test_a_capture_between_forward_and_backward_spoils_no_graph():
    """In training a batch norm writes its buffers, and its backward refuses buffers that were written since."""
    model, twin = build(), build()
    torch.manual_seed(1)
    train(twin)
    torch.manual_seed(1)
    loss = model(IDS).square().mean()
    probes.capture(model, IDS)
    loss.backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(mine.grad, its.grad) for mine, its in pairs)


# --- transformations and modes of torch ---


def _functional(model: nn.Module) -> torch.Tensor:
    def loss(values):
        return torch.func.functional_call(model, values, (IDS,)).square().mean()

    gradients = torch.func.grad(loss)(dict(model.named_parameters()))
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_functional, "torch.func"),
        (lambda model: torch.jit.trace(model, IDS, check_trace=False)(IDS), "traced"),
    ],
    ids=["grad", "trace"],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*not a plain:UserWarning")
def test_a_transformed_call_is_as_without_and_is_said(call, reason):
    model = build().eval()
    expected = call(model)
    with probes.record(model) as recorder:
        assert torch.equal(call(model), expected)
        with pytest.warns(probes.ProbeWarning, match=f"step 0 was not measured: .*{reason}"):
            recorder.step()
        model(IDS)
        recorder.step()
    assert norms(recorder).shape == (1, 5)


class Counting(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_modes_of_the_user_do_not_see_the_probe():
    counts = []
    for probed in (False, True):
        model = build("mhc")
        with ExitStack() as stack:
            recorder = stack.enter_context(probes.record(model, gradients=True)) if probed else None
            for _ in range(2):
                with FlopCounterMode(display=False) as flops, Counting() as functions:
                    train(model)
                counts.append((flops.get_total_flops(), functions.count))
                if recorder is not None:
                    recorder.step()
                    assert recorder.errors == []
    assert counts[:2] == counts[2:]


# --- threads ---


def test_forwards_and_backwards_in_threads_add_up():
    model, count = build().eval(), 8
    batches = [IDS.roll(number, 1) for number in range(count)]
    expected = [model(ids) for ids in batches]
    model.notes.forwards.clear()
    with probes.record(model, gradients=True, max_sequences=3 * count) as recorder:
        train(model)
        recorder.step()
        model.zero_grad()
        found: dict[int, torch.Tensor] = {}
        started = threading.Barrier(count)

        def one(number: int) -> None:
            started.wait(timeout=30)
            found[number] = model(batches[number])
            torch.autograd.grad(found[number].square().mean(), model.embed.weight)

        threads = [threading.Thread(target=partial(one, number)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        recorder.step()
    assert recorder.errors == []
    assert all(torch.equal(found[number], expected[number]) for number in range(count))
    np.testing.assert_allclose(norms(recorder)[1], noted(model, *range(1, count + 1)), rtol=1e-5)


def test_a_step_in_another_thread_says_which_forward_it_cut_short():
    model = build()
    with probes.record(model) as recorder:
        model(IDS)
        recorder.step()
        model(IDS)

        def step_elsewhere(x):
            thread = threading.Thread(target=recorder.step)
            thread.start()
            thread.join()

        model.midway = step_elsewhere
        with pytest.warns(probes.ProbeWarning, match="1 forward had not ended when step 1 did"):
            model(IDS)
        model(IDS)
        recorder.step()
    np.testing.assert_allclose(norms(recorder), [noted(model, n) for n in (0, 1, 3)], rtol=1e-5)


# --- processes and copies ---


def test_a_child_process_neither_writes_nor_warns(tmp_path):
    """A child that raises leaves the parent's block on its way out; only the parent's exit may save the run."""
    store = tmp_path / "run.zarr.zip"
    model = build()
    with probes.record(model, store=store, gradients=True) as recorder:
        train(model)
        recorder.step()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with recorder:  # the parent's block, which the child leaves by its own exit
                    model(IDS)
                    recorder.step()
                    sys.exit(3)
            except SystemExit:
                recorder.close()
                code = 0 if not store.exists() and hooks_on_model(model) == 0 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not store.exists()
        train(model)
        recorder.step()
    assert store.exists()
    assert recorder.run.statistics.step.values.tolist() == [0, 1]


def test_a_recorder_in_an_object_of_the_users_can_be_copied():
    with probes.record(build(), gradients=True) as recorder:
        for twin in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
            with twin:
                twin.step()
            assert twin.errors == []


# --- the model changes ---


def test_a_layer_that_comes_or_goes_is_said_and_what_was_measured_stays():
    model = build()
    with probes.record(model) as recorder:
        model(IDS)
        recorder.step()
        model.blocks.append(copy.deepcopy(model.blocks[-1]))
        model(IDS)
        with pytest.warns(probes.ProbeWarning, match="step 1 was not measured: .*within the step"):
            recorder.step()
        model(IDS)
        with pytest.warns(probes.ProbeWarning, match="step 2 was not measured: .*other depths"):
            recorder.step()
        del model.blocks[-1]
        model(IDS)
        with pytest.warns(probes.ProbeWarning, match="step 3 was not measured"):
            recorder.step()
        model(IDS)
        recorder.step()
    np.testing.assert_allclose(norms(recorder), [noted(model, 0), noted(model, 4)], rtol=1e-5)
    assert (hooks_on_model(model), states_alive(model)) == (0, 0)


def test_a_forward_that_runs_its_blocks_otherwise_is_refused():
    model = build()
    with probes.record(model) as recorder:
        model(IDS)
        recorder.step()
        model.run = lambda block, x: block(block(x))
        model(IDS)
        with pytest.warns(probes.ProbeWarning, match="ran 2 times in a forward"):
            recorder.step()
        del model.run
        ordered = list(model.blocks)
        swapped = {ordered[0]: ordered[1], ordered[1]: ordered[0]}
        model.run = lambda block, x: swapped.get(block, block)(x)
        model(IDS)
        with pytest.warns(probes.ProbeWarning, match="in another order"):
            recorder.step()
    assert recorder.run.statistics.step.values.tolist() == [0]


def test_weights_that_take_the_place_of_others_are_not_pooled_with_them():
    """Neither a loader that assigns, nor one that sets .data, raises a version counter."""
    model = build().eval()
    with torch.no_grad(), probes.record(model) as recorder:
        model(IDS)
        recorder.step()
        state = {name: value + 1 for name, value in model.state_dict().items() if value.is_floating_point()}
        model.load_state_dict(state, assign=True, strict=False)
        model(IDS)
        recorder.step()
        for parameter in model.parameters():
            parameter.data = parameter.data - 1
        model(IDS)
        recorder.step()
    assert recorder.run.trace.sizes["sample"] == 3


# --- errors ---


@pytest.mark.parametrize(
    ("error", "name"), [(MemoryError, "plain"), (RecursionError, "hc"), (GeneratorExit, "mhc")]
)
def test_an_error_anywhere_in_a_hook_stays_inside_and_the_next_step_measures(name, error):
    """The first one falls into the forward that shows the structure: with a call missing there is one block less."""
    twin = build(name)
    expected = [train(twin).detach() for _ in range(6)]
    model = build(name)
    with probes.record(model, gradients=True) as recorder:
        tripped: list[str] = []
        for step, after in enumerate((200, None, 60, None, 300, None)):
            with ExitStack() as stack:
                if after is not None:
                    stack.enter_context(fault(error, after, tripped))
                assert torch.equal(train(model), expected[step])
            missing = step // 2 + 1 == len(tripped) and after is not None
            if missing:
                with pytest.warns(probes.ProbeWarning, match=f"step {step} was not measured"):
                    recorder.step()
            else:
                recorder.step()
    assert len(tripped) == 3
    assert all(e.__traceback__ is None for e in recorder.errors), "a traceback holds the user's tensors"
    np.testing.assert_allclose(norms(recorder), [noted(model, n) for n in (1, 3, 5)], rtol=1e-5)
    assert (hooks_on_model(model), states_alive(model)) == (0, 0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_stops_a_program_reaches_the_user_from_a_hook(stop):
    model = build()
    with probes.record(model, gradients=True) as recorder:
        train(model)
        recorder.step()
        with pytest.raises(stop), fault(stop, 40, []):
            train(model)
        with pytest.warns(probes.ProbeWarning, match="interrupted the measurement"):
            recorder.step()
        train(model)
        recorder.step()
    assert recorder.run.statistics.step.values.tolist() == [0, 2]


def test_the_users_own_signal_handler_may_raise_while_a_hook_runs(monkeypatch):
    class TooLate(Exception):
        pass

    def ring(number, frame):
        raise TooLate("the user's own")

    original = TokenSums.add_state

    def add_state(self, *args):
        signal.raise_signal(signal.SIGUSR1)
        return original(self, *args)

    before = signal.signal(signal.SIGUSR1, ring)
    monkeypatch.setattr(TokenSums, "add_state", add_state)
    model = build()
    try:
        with probes.record(model) as recorder:
            model.eval()
            with pytest.raises(TooLate, match="the user's own"):
                model(IDS)
            with pytest.warns(probes.ProbeWarning, match="a signal handler raised TooLate"):
                recorder.step()
    finally:
        signal.signal(signal.SIGUSR1, before)


# --- the end ---


def test_a_recorder_that_nobody_closes_leaves_with_its_last_reference(tmp_path):
    model = build()
    recorder = probes.record(model, store=tmp_path / "run.zarr.zip", gradients=True)
    recorder.__enter__()
    train(model)
    recorder.step()
    gone = weakref.ref(recorder)
    with pytest.warns(probes.ProbeWarning, match="never closed"):
        del recorder
    assert gone() is None
    assert hooks_on_model(model) == 0
    assert (tmp_path / "run.zarr.zip").exists(), "what was captured is not lost"


def test_a_warning_that_is_an_error_ends_no_loop_and_an_open_recorder_is_saved_at_the_end(tmp_path):
    """As under python -W error, in a process of its own: the sentence is printed, and the user's error is the last word."""
    script = f"""
import torch, depthscope as ds
from tests.probes.session.faulty_models import Plain
model, trained = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)), Plain()
def suspended():
    with ds.record(trained, store={str(tmp_path / "run.zarr.zip")!r}) as recorder:
        while True:
            yield trained(torch.ones(2, 4, dtype=torch.long))
            recorder.step()
running = suspended()  # in its block for ever
next(running), next(running)
with ds.record(model) as recorder:
    recorder.step()
    print('the loop goes on')
    try:
        raise KeyError('of the user')
    finally:
        recorder.step()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "the loop goes on\n"
    assert done.stderr.count("was not measured: the model was not called") == 2
    assert done.stderr.rstrip().endswith("KeyError: 'of the user'")
    assert "During handling" not in done.stderr
    assert (tmp_path / "run.zarr.zip").exists()


def test_a_recorder_is_not_opened_inside_itself():
    recorder = probes.record(build())
    with recorder, pytest.raises(probes.CaptureError, match="open already"), recorder:
        pass


# --- batches ---


@pytest.mark.parametrize(
    "batch",
    [{"ids": IDS, "attention_mask": torch.zeros_like(IDS)}, {"ids": IDS[:0]}, {"ids": IDS[:, :0]}],
    ids=["padding", "no sequence", "no token"],
)
def test_a_batch_without_tokens_is_said_and_counts_for_nothing(batch):
    model = build().eval()
    with torch.no_grad(), probes.record(model, max_sequences=2) as recorder:
        for step, each in enumerate((batch, {"ids": IDS}, batch, {"ids": IDS})):
            model(**each)
            if step % 2:
                recorder.step()
            else:
                with pytest.warns(probes.ProbeWarning, match=f"step {step} was not measured"):
                    recorder.step()
        model(IDS)
        model(**batch)
        recorder.step()
    statistics = next(n for n in recorder.run["statistics"].subtree if "token_count" in n.data_vars)
    assert statistics.step.values.tolist() == [1, 3, 4]
    assert statistics.token_count.values.tolist() == [IDS.numel()] * 3
