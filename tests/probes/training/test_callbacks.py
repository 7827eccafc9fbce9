"""Callbacks of frameworks: one row for each step of the optimizer, evaluations left out, resumed trainings continued."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from depthscope.diagnostics import schema
from depthscope.probes import training
from depthscope.probes.training import lightning_callback


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 64, (9,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def trainer(
    model, folder, steps: int, **options
) -> tuple[transformers.Trainer, training.TransformersCallback]:
    # Importing it imports the trainer, which takes a second: not while tests are collected.
    callback = training.TransformersCallback(store=folder / "run", resume=True, **options)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    built = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(8),
        eval_dataset=examples(3),
        callbacks=[callback],
    )
    return built, callback


@pytest.mark.filterwarnings("ignore")  # the trainer's own
def test_a_trainer_is_recorded_and_resumed(models, tmp_path):
    first, callback = trainer(models["llama"](), tmp_path, 1)
    first.train()
    assert callback.recorder is not None
    assert callback.recorder.errors == []
    second, _ = trainer(models["llama"](), tmp_path, 2)
    second.train(resume_from_checkpoint=True)
    with schema.open_run(tmp_path / "run") as run:
        statistics = run.statistics.to_dataset().load()
        assert run.attrs[schema.RESUMED_AT] == [1]
        assert run.attrs[schema.LIVE]["state"] == "finished"
    assert statistics.step.values.tolist() == [0, 1]
    # Two batches of two sequences; the evaluations after each step have three.
    assert statistics.sequence_count.values.tolist() == [4.0] * 2
    assert statistics.token_count.values.tolist() == [36.0] * 2
    assert np.isfinite(statistics.gradient_square_norm_sum.values).all()
    assert (statistics.gradient_square_norm_sum.values > 0).all()
    logged = {each["step"] - 1: each for each in second.state.log_history if "loss" in each}
    with schema.open_run(tmp_path / "run") as run:
        rows = schema.chain_dataset(run, "metrics").load()  # measured by default
    assert sorted(logged) == [0, 1]
    for step, row in logged.items():
        assert float(rows["loss"].sel(step=step)) == pytest.approx(row["loss"], abs=1e-4)
        assert float(rows["learning_rate"].sel(step=step)) == pytest.approx(row["learning_rate"])


def test_without_lightning_its_callback_says_how_to_get_it():
    if lightning_callback.Callback is not None:
        pytest.skip("Lightning is installed")
    with pytest.raises(ImportError, match="pip install lightning"):
        lightning_callback.LightningCallback("model")
