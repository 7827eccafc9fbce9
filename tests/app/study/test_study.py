"""The study: three models equal but for the connection, trained on the same batches, saved with their history."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("hyper_connections")

from depthscope.app.cli.main import main
from depthscope.app.study import small_lm, study, training
from depthscope.app.study.corpus import split_corpus
from depthscope.app.study.learner import connection_parameters, create_learner
from depthscope.app.study.recipe import Recipe, schedule, spent_fraction
from depthscope.app.study.small_lm import CONNECTIONS, Size, build
from depthscope.diagnostics import schema
from depthscope.probes.checkpoints.load import load_checkpoint
from depthscope.probes.checkpoints.text_batch import sample_text

SIZE = Size(layers=2, width=16, heads=2)
RECIPE = Recipe(
    steps=30, batch=4, length=16, size=SIZE, learning_rate=1e-2, probed_sequences=2, probed_length=32,
    record_every=10,
)  # fmt: skip


def models(size: Size = SIZE, seed: int = 0) -> dict[str, small_lm.SmallLM]:
    return {kind: build(kind, size=size, seed=seed) for kind in CONNECTIONS}


def with_head(model: small_lm.SmallLM) -> small_lm.SmallLM:
    """The head starts at zero; to compare functions it must not."""
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


# --- the models


def test_only_the_connections_differ():
    built = models()
    shared = dict(built["residual"].named_parameters())
    for kind in ("hc", "mhc"):
        parameters = dict(built[kind].named_parameters())
        assert all(torch.equal(value, parameters[name]) for name, value in shared.items())
        own = set(parameters) - set(shared)
        assert own == set(connection_parameters(built[kind]))
        assert all(".branch." not in name for name in own)
    assert connection_parameters(built["residual"]) == {}


def test_seed_decides_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = build("hc", size=SIZE), build("hc", size=SIZE), build("hc", size=SIZE, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_fresh_hyper_connections_compute_the_residual_function_and_mhc_does_not():
    ids = torch.arange(24).reshape(2, 12)
    logits = {kind: with_head(model)(ids).logits for kind, model in models().items()}
    torch.testing.assert_close(logits["hc"], logits["residual"], atol=1e-4, rtol=1e-4)
    assert (logits["mhc"] - logits["residual"]).abs().max() > 0.01


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_causal_and_loss_by_hand(kind):
    model = with_head(build(kind, size=SIZE))
    ids = torch.arange(24).reshape(2, 12)
    changed = ids.clone()
    changed[:, 8:] = 0
    assert torch.allclose(model(ids).logits[:, :8], model(changed).logits[:, :8], atol=1e-5)
    labels = ids.masked_fill(ids > 20, -100)
    output = model(ids, labels=labels)
    chances = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(output.loss, -chances[labels[:, 1:] >= 0].mean())
    assert build(kind, size=SIZE)(ids, labels=ids).loss.item() == pytest.approx(math.log(256))


def test_rotation_keeps_norms_and_depends_on_distance_only():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 1, 8).expand(1, 1, 10, 8)
    turned = small_lm.rotated(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    products = (turned @ turned.mT)[0, 0]
    torch.testing.assert_close(products.diagonal(3), products[0, 3].expand(7), atol=1e-5, rtol=1e-5)


def test_unknown_connection():
    with pytest.raises(ValueError, match="got connection 'dense', expected one of residual, hc, mhc"):
        small_lm.connection_class("dense")


# --- training


def test_schedule():
    assert schedule(0.0, 0.1) > 0
    assert schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(1.0, 0.1) == pytest.approx(0.0)
    rates = [schedule(part, 0.1) for part in np.linspace(0.1, 1, 20)]
    assert rates == sorted(rates, reverse=True)


def test_budget_by_the_clock_and_by_steps():
    by_clock = Recipe(seconds=60)
    assert spent_fraction(by_clock, 30.0, 70) == 0.5
    assert spent_fraction(by_clock, 300.0, 7) == 7 / 21  # a slow machine trains on
    assert spent_fraction(replace(by_clock, steps=10), 30.0, 7) == 0.7


def test_split_and_entropy():
    corpus = split_corpus("ab" * 50)
    assert len(corpus.train) == 90
    assert len(corpus.held_out) == 10
    assert corpus.unigram_entropy == pytest.approx(math.log(2))


def test_only_branch_matrices_and_head_decay():
    decaying, others = create_learner("mhc", RECIPE).optimizer.param_groups
    assert len(decaying["params"]) == 4 * SIZE.layers + 1
    assert decaying["weight_decay"] > 0
    assert others["weight_decay"] == 0


def test_same_batches_same_result_as_alone():
    corpus = split_corpus(sample_text()[:20_000])
    recipe = replace(RECIPE, steps=3)
    together = [create_learner(kind, recipe) for kind in CONNECTIONS]
    alone = [create_learner(kind, recipe) for kind in CONNECTIONS]
    with training.single_threaded():
        training.train_side_by_side(together, corpus, recipe)
        for each in alone:
            training.train_side_by_side([each], corpus, recipe)
    assert [each.losses for each in together] == [each.losses for each in alone]


def test_threads_are_given_back():
    before, inside = torch.get_num_threads(), []

    def fail():
        with training.single_threaded():
            inside.append(torch.get_num_threads())
            raise KeyError("a model that breaks")

    with pytest.raises(KeyError, match="breaks"):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == before


def test_no_time():
    with pytest.raises(study.StudyError, match="got 0 s"):
        study.run_study(None, seconds=0)


# --- the whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return study.run_study(tmp_path_factory.mktemp("study"), progress=False, recipe=RECIPE)


def test_runs(saved):
    assert list(saved) == list(CONNECTIONS)
    runs = {kind: schema.open_run(path).load() for kind, path in saved.items()}
    assert {kind: run.attrs["family"] for kind, run in runs.items()} == {kind: kind for kind in CONNECTIONS}
    texts = ["".join(run["trace"]["token_text"].values.ravel()) for run in runs.values()]
    assert texts[0] == texts[1] == texts[2]
    for kind, run in runs.items():
        facts = run.attrs["training"]
        assert facts["steps"] == 30
        assert facts["final_loss"] < facts["initial_loss"] - 1
        assert facts["held_out_loss"] < math.log(256) - 1
        assert facts["initial_loss"] == pytest.approx(math.log(256))
        assert "gradient" in run["trace"]
        assert ("h_res" in run["trace"]) == (kind != "residual")
    assert runs["residual"].attrs["training"]["connection_movement"] == {}
    assert runs["hc"].attrs["training"]["connection_movement"]["static_alpha"] > 1e-3


def test_each_training_is_recorded_while_it_runs(saved):
    for kind, path in saved.items():
        training = schema.open_run(path.with_name(f"{kind}-training")).load()
        assert training.attrs["live_store"]["state"] == "finished"
        metrics = training["metrics"]
        assert metrics["step"].values.tolist() == [0, 10, 20]
        loss = training["statistics"]["loss"].values
        assert loss[0] == pytest.approx(math.log(256))
        assert loss[2] < loss[0] - 1
        assert np.isfinite(metrics["effective_rank"].sel(depth=1)).any()
        assert ("mixing_gain" in metrics) == (kind != "residual")


def test_weights_saved_with_the_runs_load_again(saved, monkeypatch):
    monkeypatch.setattr(small_lm, "build", lambda kind: build(kind, size=SIZE))
    for kind, path in saved.items():
        loaded = load_checkpoint(
            f"depthscope.app.study.small_lm:{kind}", weights=path.with_suffix(".safetensors")
        )
        assert loaded.digest == schema.open_run(path).attrs["weights_digest"]
        assert loaded.model.kind == kind


def test_a_second_study_replaces_the_first(saved, make_run, tmp_path, monkeypatch):
    schema.save_run(make_run("hc"), tmp_path / "hc.zarr.zip")
    shutil.copy(saved["hc"].with_suffix(".safetensors"), tmp_path)
    monkeypatch.setattr(study, "CONNECTIONS", ("hc",))
    again = study.run_study(tmp_path, progress=False, recipe=replace(RECIPE))
    first, second = (schema.open_run(paths["hc"]).load() for paths in (saved, again))
    assert np.array_equal(first["trace"]["residual"].values, second["trace"]["residual"].values)
    assert sorted(os.listdir(tmp_path)) == ["hc-training", "hc.zarr.zip", "hc.safetensors"]
    assert (
        schema.open_run(tmp_path / "hc-training").attrs["live_store"]["num_rows"] == 3
    )  # and not twice as many


@pytest.mark.parametrize("name", ["mhc.zarr.zip", "mhc.safetensors"])
def test_a_file_of_somebody_else_is_refused_before_the_training(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"measurements of a colleague")
    monkeypatch.setattr(study, "train_side_by_side", lambda *_, **__: pytest.fail("trained first"))
    with pytest.raises(FileExistsError, match=name):
        study.run_study(tmp_path, progress=False, recipe=RECIPE)
    assert (tmp_path / name).read_bytes() == b"measurements of a colleague"
    assert os.listdir(tmp_path) == [name]


def test_command_prints_the_runs(monkeypatch, capsys, tmp_path):
    asked = {}

    def run_study(out, *, seconds):
        asked.update(out=out, seconds=seconds)
        return {"hc": out / "hc.zarr.zip"}

    monkeypatch.setattr(study, "run_study", run_study)
    assert main(["study", "--out", str(tmp_path), "--minutes", "1.5"]) == 0
    assert asked == {"out": tmp_path, "seconds": 90.0}
    assert capsys.readouterr().out == f"{tmp_path / 'hc.zarr.zip'}\n"


def test_command_with_seeds_shares_the_time(monkeypatch, capsys, tmp_path):
    asked = []

    def run_study(out, *, seconds, seed, suffix):
        asked.append((seconds, seed, suffix))
        return {f"hc{suffix}": out / f"hc{suffix}.zarr.zip"}

    monkeypatch.setattr(study, "run_study", run_study)
    assert main(["study", "--out", str(tmp_path), "--minutes", "1", "--seeds", "2"]) == 0
    assert asked == [(30.0, 0, "-seed0"), (30.0, 1, "-seed1")]
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "hc-seed0.zarr.zip"),
        str(tmp_path / "hc-seed1.zarr.zip"),
    ]
    with pytest.raises(SystemExit, match="2"):
        main(["study", "--out", str(tmp_path), "--seeds", "0"])
    assert "0 is not positive" in capsys.readouterr().err


def test_runs_of_two_seeds_lie_side_by_side_and_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CONNECTIONS", ("residual",))
    recipe = replace(RECIPE, steps=2)
    saved = study.run_seeds(tmp_path, seeds=2, seconds=1.0, progress=False, recipe=recipe)
    assert list(saved) == ["residual-seed0", "residual-seed1"]
    assert all(
        path.name == f"{name}.zarr.zip" and path.with_suffix(".safetensors").exists()
        for name, path in saved.items()
    )
    runs = [schema.open_run(saved[f"residual-seed{seed}"]).load() for seed in (0, 1)]
    assert [run.attrs["seed"] for run in runs] == [0, 1]
    assert len({run.attrs["weights_digest"] for run in runs}) == 2


@pytest.mark.slow(one_in=5)
def test_a_short_training_is_worth_something(tmp_path):
    saved = study.run_study(
        tmp_path,
        progress=False,
        recipe=Recipe(steps=60, size=Size(layers=2), probed_sequences=2, record_every=60),
    )
    facts = [schema.open_run(path).attrs["training"] for path in saved.values()]
    held_out = [fact["held_out_loss"] for fact in facts]
    assert max(held_out) < facts[0]["unigram_entropy"] - 0.15
    assert max(held_out) - min(held_out) < 0.3
