"""Does any order of faults let a probe change, stop or falsify a user's run? Seeded schedules, with and without probes.

``run_one(seed)`` draws a model and a schedule of events, runs it without and with probes, and compares.
"""

from __future__ import annotations

import copy
import gc
import random
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope import probes
from depthscope.probes.connections.coefficients import ReconstructionError
from tests.probes.session.faulty_models import MODELS, VOCABULARY, Noted
from tests.probes.session.hooks_left import alive, hooks_on_model

PROBES = Path(probes.__file__).parent
SAME = "same"
STEPS = 5
WATCHED = ("forward", "width_connection", "depth_connection")
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)
ERRORS = (*MEMORY_ERRORS, RecursionError, StopIteration, GeneratorExit, ValueError)
STOPS = (KeyboardInterrupt, SystemExit)  # which must reach the user from wherever they are raised


@dataclass
class Outcome:
    """What one seed showed: `SAME`, or the kinds of what went wrong, with what it was about."""

    seed: int
    kinds: tuple[str, ...]
    detail: str
    schedule: list[list[str]]

    @property
    def good(self) -> bool:
        """Whether the probe did no harm."""
        return self.kinds == (SAME,)


@dataclass
class Followed:
    """One recorder, and what the model noted while each of its steps was open."""

    recorder: probes.Recorder
    every: int
    begun: int
    options: dict[str, Any]
    expected: dict[int, list[dict[int, float]]] = field(default_factory=dict)
    uncertain: set[int] = field(default_factory=set)  # steps in which the notes are no measure
    closed: bool = False


@dataclass
class World:
    """A user's script: the model, its optimizer, and everything that it shows to the outside."""

    model: Noted
    optimizer: torch.optim.Optimizer
    probed: bool
    random: random.Random
    shown: list[Any] = field(default_factory=list)
    followed: list[Followed] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    batch: dict[str, torch.Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    loss: Callable[[torch.Tensor], torch.Tensor] = lambda output: output.square().mean()
    call: Callable[..., torch.Tensor] | None = None
    hooked: bool = False  # a hook changed a state, which then is another one than the model noted
    caught: list[Any] = field(default_factory=list)  # warnings so far
    stopped: bool = (
        False  # the user pressed a key while a hook ran: from there on the two runs differ for a good reason
    )

    def show(self, *values: Any) -> None:
        """Note what the user sees; tensors are copied."""
        self.shown += [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values]

    def uncertain(self) -> None:
        """What the model notes in this step is not what a recorder should find."""
        for each in self.followed:
            each.uncertain.add(each.recorder.position)


EVENTS: dict[str, Callable[[World], None]] = {}


def event(function: Callable[[World], None]) -> Callable[[World], None]:
    EVENTS[function.__name__] = function
    return function


# --- the batch, the loss and the backward ---


def _batch(world: World, sequences: int, tokens: int, *, padded: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(world.random.randrange(2**31))
    ids = torch.randint(1, VOCABULARY, (sequences, tokens), generator=generator)
    mask = (torch.rand(sequences, tokens, generator=generator) >= padded).long()
    world.batch = {"ids": ids, "attention_mask": mask} if padded else {"ids": ids}


@event
def another_length(world):
    _batch(world, world.random.choice([2, 4]), world.random.choice([2, 5, 9]))


@event
def some_padding(world):
    _batch(world, 3, 6, padded=0.4)


@event
def no_backward(world):
    world.backward = lambda loss: None


@event
def backward_twice(world):
    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    world.backward = twice


@event
def gradient_in_between(world):
    def penalised(loss):
        (gradient,) = torch.autograd.grad(
            loss, world.model.embed.weight, create_graph=True, allow_unused=True
        )
        (loss if gradient is None else loss + gradient.square().sum()).backward()

    world.backward = penalised


@event
def backward_in_a_thread(world):
    world.backward = lambda loss: _in_threads([loss.backward])


@event
def backward_that_raises(world):
    def raising(loss):
        loss.register_hook(_raiser(world.random.choice([ValueError, *STOPS])))
        loss.backward()

    world.backward = raising


def _raiser(error: type[BaseException]) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        raise error("the user's own")

    return hook


# --- how the model is called ---


@event
def inside_of_inference(world):
    def call(**batch):
        with torch.inference_mode():
            world.show(world.model(**batch))
        return world.model(**batch)

    world.call = call


@event
def without_a_graph(world):
    def call(**batch):
        with torch.no_grad():
            return world.model(**batch)

    world.call = call


def _in_threads(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@event
def checkpointed(world):
    if hasattr(world.model, "checkpointing"):
        world.model.checkpointing = world.random.choice([None, False, True])


@event
def accumulated(world):
    def call(**batch):
        world.model(**batch).square().mean().backward()
        return world.model(**batch)

    world.call = call


# --- in the middle of a forward ---


@event
def forward_that_raises(world):
    error = world.random.choice([*ERRORS, *STOPS])
    world.model.midway = lambda x: _raiser(error)()


@event
def hooks_cleared_inside(world):
    def midway(x):
        for module in world.model.modules():
            module._forward_hooks.clear()
            if module is not world.model:
                module._forward_pre_hooks.clear()

    world.model.midway = midway


@event
def gradients_off_inside(world):
    world.model.midway = lambda x: x.detach()


@event
def block_replaced_inside(world):
    world.model.midway = lambda x: block_replaced(world)


@event
def step_inside(world):
    def midway(x):
        for each in world.followed:
            world.uncertain()
            each.recorder.step()
            world.uncertain()

    world.model.midway = midway


@event
def close_inside(world):
    def midway(x):
        world.uncertain()
        _close_one(world)

    world.model.midway = midway


@event
def open_inside(world):
    def midway(x):
        _open(world)
        world.uncertain()

    world.model.midway = midway


@event
def capture_inside(world):
    ids = world.batch["ids"]
    world.model.midway = lambda x: _capture(world, ids)


# --- what happens to the model between steps ---


def _some(world: World) -> int:
    return world.random.randrange(len(world.model.blocks))


@event
def hooks_cleared(world):
    for module in world.model.modules():
        module._forward_hooks.clear()


@event
def hook_that_changes(world):
    block = world.model.blocks[_some(world)]
    world.hooked = True
    world.handles.append(block.register_forward_hook(lambda module, args, output: output * 1.25))
    world.uncertain()


@event
def hook_that_is_always_called(world):
    block = world.model.blocks[_some(world)]
    seen = world.shown
    block.register_forward_hook(lambda module, args, output: seen.append("always"), always_call=True)


@event
def full_backward_hook(world):
    block, seen = world.model.blocks[_some(world)], world.shown
    block.register_full_backward_hook(lambda module, given, taken: seen.append("backward"))


@event
def counting_hooks(world):
    def note(module, args, output):
        if threading.current_thread() is threading.main_thread():  # other threads meet in no order
            world.shown.append(type(module).__name__)

    for module in world.model.modules():
        module.register_forward_hook(note)


@event
def hooks_removed(world):
    while world.handles:
        world.handles.pop().remove()
    world.uncertain()


@event
def block_replaced(world):
    number = _some(world)
    world.model.blocks[number] = copy.deepcopy(world.model.blocks[number])
    for parameter in world.model.blocks[number].parameters():
        parameter.data.mul_(1.5)
    world.uncertain()


@event
def block_added(world):
    world.model.blocks.append(copy.deepcopy(world.model.blocks[-1]))
    world.optimizer.add_param_group({"params": list(world.model.blocks[-1].parameters())})


@event
def block_dropped(world):
    if len(world.model.blocks) > 3:
        del world.model.blocks[-1]


@event
def blocks_in_another_order(world):
    world.model.blocks = nn.ModuleList(reversed(world.model.blocks))


@event
def forward_patched(world):
    block = world.model.blocks[_some(world)]
    original = block.forward
    block.forward = lambda *args: original(*args)


@event
def another_precision(world):
    world.model.to(torch.float64 if world.random.random() < 0.5 else torch.float32)


@event
def evaluated(world):
    world.model.train(not world.model.training)


@event
def weights_loaded(world):
    state = {name: value.clone() for name, value in world.model.state_dict().items()}
    world.model.load_state_dict(state, assign=world.random.random() < 0.5)


# --- recorders ---


@event
def another_recorder(world):
    _open(world)


@event
def a_recorder_closes(world):
    _close_one(world)


@event
def capture_in_between(world):
    _capture(world, world.batch["ids"])


def _capture(world: World, ids: torch.Tensor) -> None:
    if not world.probed:
        return
    before, called = copy.copy(world.model.notes.forwards), copy.copy(world.model.notes.calls)
    midway, world.model.midway = world.model.midway, None
    counts = {
        m: (getattr(m, "count", 0), list(m.calls)) for m in world.model.modules() if hasattr(m, "calls")
    }
    shown = list(world.shown)
    try:
        # What torch says of a forward without gradients is of the user's own call, such as through a checkpointed block.
        with warnings.catch_warnings(record=True):
            probes.capture(world.model, ids)
    except (ValueError, RuntimeError):
        pass  # it may refuse, and says so
    finally:
        # The capture runs the model as the user would, so that the user's own counters count it.
        world.model.notes.forwards[:], world.model.notes.calls[:] = before, called
        world.model.midway = midway
        world.shown[:] = shown
        for module, (count, calls) in counts.items():
            module.calls[:] = calls
            if hasattr(module, "count"):
                module.count = count


def _open(world: World) -> None:
    every, gradients = world.random.choice([1, 1, 2]), world.random.random() < 0.5
    weights = world.random.random() < 0.3
    if not world.probed:
        return
    options = {"gradients": gradients, "weights": weights}
    recorder = probes.record(world.model, every=every, **options)
    recorder.__enter__()
    world.followed.append(Followed(recorder, every, len(world.model.notes.forwards), options))


def _close_one(world: World) -> None:
    chosen = world.random.random()
    if world.followed:
        _close(world, world.followed.pop(int(chosen * len(world.followed))))


def _close(world: World, each: Followed) -> None:
    each.closed = True
    each.recorder.close()
    each.recorder.close()  # twice is fine
    _check_rows(world, each)
    for step in set(range(0, each.recorder.position, each.every)) - {
        row.step for row in each.recorder._measured.rows
    }:
        said = [str(warning.message) for warning in world.caught]
        ranges = [re.match(r"steps (\d+) to (\d+) were not measured", each) for each in said]
        together = any(int(found[1]) <= step <= int(found[2]) for found in ranges if found)
        if not together and not any(re.search(rf"\bstep {step}\b", each) for each in said):
            world.failures.append(("silent", f"nobody said that step {step} was not measured"))


def _check_rows(world: World, each: Followed) -> None:
    """Whether the rows of a recorder are what the model noted."""
    try:
        run = each.recorder.run
    except (ValueError, RuntimeError) as error:
        if world.hooked and isinstance(error, ReconstructionError):
            return  # what a hook adds to the streams is in no connection: such a capture is refused as a whole
        if not isinstance(error, probes.CaptureError):
            world.failures.append(("run", f"{type(error).__name__}: {error}"))
        elif each.recorder._measured.rows:
            world.failures.append(("lost", str(error)))
        return
    _compare_rows(world, each, run)


def _compare_rows(world: World, each: Followed, run: Any) -> None:
    statistics = next(node for node in run["statistics"].subtree if "square_norm_sum" in node.data_vars)
    for number, step in enumerate(statistics.step.values.tolist()):
        forwards = each.expected.get(step)
        if forwards is None or step in each.uncertain:
            continue
        found = statistics.square_norm_sum.isel(step=number).sum("stream", skipna=False).values
        depths = sorted({depth for noted in forwards for depth in noted})
        wanted = np.array([sum(noted.get(depth, 0.0) for noted in forwards) for depth in depths])
        if world.hooked and found.shape != wanted.shape:
            continue
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4, equal_nan=True):
            world.failures.append(("wrong number", f"step {step}: found {found}, the model noted {wanted}"))


# --- faults in our own code ---


def _inside_a_hook(frame: Any) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith("probes/model/hooks.py") and code.co_name in (
            "__call__",
            "_report_errors",
        ):
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


@event
def fault_in_a_hook(world):
    chosen = world.random.choice([*ERRORS, *ERRORS, *STOPS])
    after = int(10 ** world.random.uniform(0, 3))
    if world.probed:
        world.uncertain()  # a stop cuts the user's forward short, and the run without a probe has none
        call = world.call or world.model.__call__
        backward = world.backward

        def faulty(function, *args, **kwargs):
            tripped: list[str] = []
            try:
                with fault(chosen, after, tripped):
                    return function(*args, **kwargs)
            except STOPS as stop:
                if not tripped or not isinstance(stop, chosen):
                    raise
                raise Stopped from stop

        world.call = partial(faulty, call)
        world.backward = partial(faulty, backward)


class Stopped(BaseException):
    """What a hook was stopped by, told from what the user's own code raises."""


# --- one schedule, once ---


def _step(world: World, names: list[str]) -> None:
    """One step of the user's loop, which goes on after errors of its own."""
    _batch(world, 3, 6)
    world.backward, world.call = torch.Tensor.backward, None
    world.loss, world.model.midway = lambda output: output.square().mean(), None
    for name in names:
        EVENTS[name](world)
    try:
        output = (world.call or world.model)(**world.batch)
        loss = world.loss(output)
        if loss.requires_grad:
            world.backward(loss)
        world.show(output, loss)
    except Stopped:
        raise
    except BaseException as error:  # the user's loop catches what it raised itself
        world.show(type(error).__name__, str(error).splitlines()[0][:80] if str(error) else "")
    world.show(*(p.grad for p in world.model.parameters()))
    if world.random.random() < 0.8:  # at times the optimizer's step is left out
        world.optimizer.step()
    world.optimizer.zero_grad()
    for each in list(world.followed):
        position = each.recorder.position
        gradients = bool(each.options.get("gradients"))
        noted = world.model.notes.forwards[each.begun :]
        # Evaluations count to no step of a training, and without a graph nothing counts to one that measures gradients.
        closest = max((forward.kind for forward in noted), default=0)
        each.expected[position] = [
            forward for forward in noted if forward.kind == closest and not (gradients and not forward.kind)
        ]
        each.recorder.step()
        each.begun = len(world.model.notes.forwards)


def schedule(seed: int) -> tuple[str, list[list[str]]]:
    """The model and the events of a seed."""
    drawn = random.Random(seed)
    name = drawn.choice(list(MODELS))
    return name, [drawn.sample(list(EVENTS), drawn.choice([0, 1, 1, 2])) for _ in range(STEPS)]


def _run(seed: int, *, probed: bool) -> World:
    torch.manual_seed(seed)
    random.seed(seed)  # lucidrains' connections draw from it
    name, steps = schedule(seed)
    model = MODELS[name]().train()
    world = World(model, torch.optim.SGD(model.parameters(), lr=1e-2), probed, random.Random(seed + 1))
    shown_warnings: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world.caught = caught
        _open(world)
        try:
            for names in steps:
                _step(world, names)
        except Stopped:
            world.stopped = True
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            crash = f"{type(error).__name__}: {error} at {Path(where.filename).name}:{where.lineno}"
            world.failures.append(("crash", crash))
        del names
        while world.followed:
            with suppress(KeyboardInterrupt, SystemExit):
                _close(world, world.followed[-1])
            world.followed.pop()
        gc.collect()
    for warning in caught:
        if not issubclass(warning.category, probes.ProbeWarning):
            shown_warnings.append(f"{warning.category.__name__}: {str(warning.message)[:100]}")
    world.show(*model.state_dict().values(), torch.get_rng_state(), [m.training for m in model.modules()])
    # A copy made while a method is watched has that method as an entry of its own, which is the class's.
    world.show(
        [[name for name in vars(m) if name not in WATCHED] for m in model.modules()],
        [getattr(m, "count", 0) for m in model.modules()],
    )
    world.show([len(m.calls) for m in model.modules() if hasattr(m, "calls")], len(model.notes.calls))
    world.show([m._forward_hooks.__len__() for m in model.modules()])
    world.show([list(m._forward_hooks_with_kwargs) for m in model.modules()], sorted(set(shown_warnings)))
    return world


def _differences(plain: World, probed: World) -> Iterator[tuple[str, str]]:
    yield from probed.failures
    if probed.stopped:
        return
    if len(plain.shown) != len(probed.shown):
        yield "changed", f"{len(plain.shown)} things were seen without a probe, {len(probed.shown)} with it"
        return
    for number, (a, b) in enumerate(zip(plain.shown, probed.shown, strict=True)):
        same = _equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        if not same:
            yield "changed", f"what was seen at {number} of {len(plain.shown)}: {a!r:.120} became {b!r:.120}"
            return


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.nan_to_num(7), b.nan_to_num(7)))


def run_one(seed: int) -> Outcome:
    """Run one schedule without and with probes, and compare all that the user sees.

    Parameters
    ----------
    seed : int
        Draws the model, the events and their order.

    Returns
    -------
    Outcome
        Of kind ``same``, or of the kinds: ``changed`` (the user's numbers), ``crash``, ``wrong number`` (a row is not what
        the model noted), ``lost`` and ``run`` (rows that cannot be had), ``hooks`` (left on the model or alive), ``kept``
        (activations alive), ``copies``.
    """
    _, steps = schedule(seed)
    before = len(alive())
    plain = _run(seed, probed=False)
    probed = _run(seed, probed=True)
    found = list(_differences(plain, probed))
    probed.model.zero_grad()
    left = hooks_on_model(probed.model)
    if left:
        found.append(("hooks", f"{left} on the model"))
    states = probed.model.notes.states
    probed.backward, probed.loss, probed.call, probed.handles = torch.Tensor.backward, lambda x: x, None, []
    gc.collect()
    living = len(alive()) - before
    if living > 0:
        found.append(("hooks", f"{living} alive"))
    kept = sum(state() is not None for state in states)
    if kept:
        found.append(("kept", f"{kept} states are alive"))
    kinds = tuple(sorted({kind for kind, _ in found})) or (SAME,)
    return Outcome(seed, kinds, "; ".join(f"{kind}: {about}" for kind, about in found), steps)
