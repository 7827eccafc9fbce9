"""How is a training by `transformers.Trainer` recorded? By a callback that ends the recorder's steps."""

from __future__ import annotations

import inspect
from functools import cache, wraps
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from depthscope.probes.training.record import RecordingCallback, record
from depthscope.probes.training.sinks import with_optimizer


class TransformersCallback(RecordingCallback, TrainerCallback):
    """Record the model of a `transformers.Trainer` while it trains: ``Trainer(..., callbacks=[TransformersCallback(...)])``.

    A step is one of the optimizer, with all of its micro-batches; evaluations count to none. A training that the trainer
    resumes from a checkpoint is counted from there on: give ``resume=True`` to go on in the same store. Loss, learning rate
    and gradient scaler are found. Where ``trainer.train()`` raises, the store is finished all the same. Of several
    processes each writes a part of the run.

    Parameters
    ----------
    **options
        As of `depthscope.record`; ``gradients=True`` and ``metrics="live"`` are the defaults here.

    Attributes
    ----------
    recorder : Recorder or None
        From the beginning of the training on; its ``run`` is the result.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _tell_when_training_raises()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to record."""
        options = dict(self._options)
        if self.recorder is not None and self.recorder.is_open:
            # The trainer begins once more by itself, with smaller batches, where memory did not suffice.
            self.recorder.close()
            options["resume"] = "store" in options
        options.setdefault("first_step", state.global_step)
        is_global = args.world_size > 1 and args.average_tokens_across_devices
        if is_global and _takes_loss_arguments(kwargs["model"]):
            options.setdefault("loss_reduction", "global_mean")
        optimizer = kwargs.get("optimizer")
        options = with_optimizer(options, optimizer, getattr(optimizer, "scaler", None))
        self.recorder = record(kwargs["model"], **options).__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End one step."""
        if self.recorder is not None:
            self.recorder.step()


@cache
def _tell_when_training_raises() -> None:
    """Let `Trainer.train` call `on_exception` of our callbacks when it raises, of which it informs no callback."""
    train = Trainer.train

    @wraps(train)
    def new_train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        except BaseException as error:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TransformersCallback):
                    callback.on_exception(error)
            raise

    Trainer.train = new_train


def _takes_loss_arguments(model: Any) -> bool:
    """Whether the trainer tells a model by how many tokens of all processes its loss is divided, as it decides itself."""
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
