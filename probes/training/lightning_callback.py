"""How is a training by Lightning recorded? By a callback that ends the recorder's steps."""

from __future__ import annotations

from typing import Any

from depthscope.probes.training.record import RecordingCallback, record
from depthscope.probes.training.sinks import num_updated, with_optimizer

try:
    from lightning.pytorch import Callback
except ImportError:  # the class below raises an error when it is used
    Callback = None


class LightningCallback(RecordingCallback, Callback or object):  # type: ignore[misc]
    """Record a model while a Lightning trainer trains it: ``Trainer(callbacks=[LightningCallback("model", ...)])``.

    A step is one of the optimizer, with all of its batches; validations count to none. A training that is resumed from a
    checkpoint is counted from there on: give ``resume=True`` to go on in the same store. Of several processes each
    writes a part of the run.

    Parameters
    ----------
    module : str
        Path in the LightningModule of the module that ``training_step`` calls, such as ``"model"``; empty where it calls the
        LightningModule itself.
    **options
        As of `depthscope.record`; ``gradients=True`` and ``metrics="live"`` are the defaults here.

    Raises
    ------
    ImportError
        Where Lightning is not installed.

    Attributes
    ----------
    recorder : Recorder or None
        From the beginning of the training on; its ``run`` is the result.
    """

    def __init__(self, module: str = "", **options: Any) -> None:
        if Callback is None:
            raise ImportError("LightningCallback needs Lightning; install it with: pip install lightning")
        super().__init__(**options)
        self._module, self._global_step = module, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record."""
        options = dict(self._options)
        options.setdefault("first_step", trainer.global_step)
        self._global_step = trainer.global_step
        module = pl_module.get_submodule(self._module)
        # Of several optimizers the one that trains most of the module.
        optimizer = max(trainer.optimizers, key=lambda each: num_updated(module, each), default=None)
        options = with_optimizer(options, optimizer, getattr(trainer.precision_plugin, "scaler", None))
        self.recorder = record(module, **options).__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a step where the optimizer has made one."""
        if self.recorder is not None and trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self.recorder.step()
