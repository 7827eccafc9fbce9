"""How is a training by `transformers.Trainer` recorded? By a callback that ends the recorder's steps."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from depthscope.probes.training.record import record
from depthscope.probes.training.recorder import Recorder


class TransformersCallback(TrainerCallback):
    """Record the model of a `transformers.Trainer` while it trains: ``Trainer(..., callbacks=[TransformersCallback(...)])``.

    A step is one of the optimiser, with all of its micro-batches; evaluations count to none. A training that the trainer
    resumes from a checkpoint is counted from there on: give ``resume=True`` to go on in the same store. The trainer tells
    nobody the loss of a step, so that it is not stored. Several processes measure together (``group="world"``, where no
    `group` is given): all of them have the callback, and the first one has the run.

    Parameters
    ----------
    **options
        As of `depthscope.record`; ``gradients=True`` is the default here.

    Attributes
    ----------
    recorder : Recorder or None
        From the beginning of the training on; its ``run`` is the result.
    """

    def __init__(self, **options: Any) -> None:
        self._options = {"gradients": True, **options}
        self.recorder: Recorder | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to record; only the process that is the world's first writes a store."""
        options = dict(self._options)
        if not state.is_world_process_zero:
            options.pop("store", None)
        options.setdefault("first_step", state.global_step)
        if args.world_size > 1:  # the trainer wraps the model, and shows the one inside
            options.setdefault("group", "world")
            if args.average_tokens_across_devices and _takes_loss_arguments(kwargs["model"]):
                options.setdefault("loss_reduction", "global_mean")
        self.recorder = record(kwargs["model"], **options).__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End one step."""
        if self.recorder is not None:
            self.recorder.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the store. Where the training raises instead, it is finished when the interpreter ends."""
        if self.recorder is not None:
            self.recorder.close()


def _takes_loss_arguments(model: Any) -> bool:
    """Whether the trainer tells a model by how many tokens of all processes its loss is divided, as it decides itself."""
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
