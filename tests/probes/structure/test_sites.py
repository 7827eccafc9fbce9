"""Sites by the names that people know: captured as own hooks see them, covered by a table, refused if they cannot fire."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from depthscope import SiteError, probes
from depthscope.probes.structure.sites import select


def seen(model: nn.Module, batch, **paths: str) -> dict[str, np.ndarray]:
    """What hooks of the test's own see: ``name="path"`` the input of a module, ``name="path>"`` its output."""
    found: dict[str, np.ndarray] = {}
    handles = []
    modules = dict(model.named_modules())
    for name, path in paths.items():
        if path.endswith(">"):

            def after(module, args, output, name=name):
                found[name] = (output[0] if isinstance(output, tuple) else output).detach().clone().numpy()

            handles.append(modules[path[:-1]].register_forward_hook(after))
        else:

            def before(module, args, kwargs, name=name):
                found[name] = (args[0] if args else kwargs["hidden_states"]).detach().clone().numpy()

            handles.append(modules[path].register_forward_pre_hook(before, with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def table(run):
    return run["coverage"].to_dataset().to_dataframe().set_index("place_name")


LLAMA = "model.layers."


@pytest.mark.parametrize(
    ("name", "path", "depth"),
    [
        ("hook_embed", f"{LLAMA}0", 0),
        ("blocks.2.hook_resid_pre", f"{LLAMA}2", 2),
        ("hidden_states[1]", f"{LLAMA}1", 1),
        ("blocks.2.hook_resid_post", f"{LLAMA}2>", 3),
        ("blocks.1.hook_resid_mid", f"{LLAMA}1.post_attention_layernorm", 3),
    ],
)
def test_one_state_by_its_name(models, ids, name, path, depth):
    model, batch = models["llama"](), {"input_ids": ids}
    run = probes.capture(model, batch, sites=name)
    trace = run["trace"].to_dataset()
    assert list(trace.depth.values) == [depth]
    np.testing.assert_array_equal(trace.residual.values[0, ..., 0, :], seen(model, batch, x=path)["x"])
    fired = table(run)
    assert fired.expected.sum() == fired.fired.sum() == 1


def test_branches_middles_and_the_final_state_of_a_plain_model(models, text_batch):
    model = models["llama"]()
    run = probes.capture(
        model, text_batch, sites=["residual", "branch_out", "branch_in", "mid", "final"], gradients=True
    )
    trace = run["trace"].to_dataset()
    batch = {name: text_batch[name] for name in ("input_ids", "attention_mask")}
    own = seen(
        model,
        batch,
        attn=f"{LLAMA}1.self_attn>",
        mlp=f"{LLAMA}1.mlp>",
        mid=f"{LLAMA}1.post_attention_layernorm",
        norm="model.norm>",
    )
    assert list(trace.site.values) == ["embed"] + ["mid", "post"] * 3
    assert list(trace.branch.values) == ["attn", "mlp"] * 3
    real = trace.mask.values
    for name, value in (("attn", trace.branch_out[2]), ("mlp", trace.branch_out[3]), ("norm", trace.final)):
        np.testing.assert_array_equal(value.values[real], own[name][real], err_msg=name)
    np.testing.assert_array_equal(trace.residual.values[3, ..., 0, :][real], own["mid"][real])
    np.testing.assert_array_equal(trace.branch_in.values[3], trace.residual.values[3, ..., 0, :])
    assert float(trace.reconstruction_error.max()) < 1e-6
    assert "h_res" not in trace
    assert np.abs(trace.final_gradient.values).max() > 0
    held = []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_pre_hook(lambda _, args: held.append(args[0]) or args[0].retain_grad())
    model(**text_batch).loss.backward()
    np.testing.assert_allclose(
        trace.gradient.values[3, ..., 0, :], held[0].grad.numpy(), rtol=1e-5, atol=1e-9
    )
    assert run.attrs["family"] == "residual"


def test_weights_of_streams_by_their_names(models, ids):
    whole = probes.capture(models["deepseek"](), {"input_ids": ids})
    for name, variables, connections in (
        ("comb", {"h_res"}, range(6)),
        ("alpha", {"h_pre", "h_res"}, range(6)),
        ("blocks.1.mlp_hc.hook_post", {"h_post"}, [3]),
        ("blocks.2.attn_hc.hook_out", {"branch_in"}, [4]),
    ):
        run = probes.capture(models["deepseek"](), {"input_ids": ids}, sites=name)
        trace = run["trace"].to_dataset()
        assert {"h_res", "h_pre", "h_post", "branch_in", "branch_out"} & set(trace.data_vars) == variables
        assert list(trace.connection.values) == list(connections)
        for variable in variables:
            true = whole.trace[variable].sel(connection=list(connections)).values
            np.testing.assert_array_equal(trace[variable].values, true)
        assert run.attrs["reconstruction_error"] < 1e-6, "proven all the same"


def test_other_names_of_the_weights_mean_the_same():
    for names in (("h_res", "H_res", "comb", "blocks.{i}.attn_hc.hook_comb"), ("h_post", "H_post", "beta")):
        assert len({select(name).requests[0].kinds for name in names}) == 1
    assert select("blocks.{i}.attn_hc.hook_comb").requests[0].branch == "attn"
    (request,) = select("blocks.{i}.hook_attn_out").requests
    assert (request.kinds, request.blocks, request.branch) == (("branch_out",), None, "attn")
    assert select(None).requests == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hook_resid_mids", r"no site is called 'hook_resid_mids'; closest: 'hook_resid_mid'"),
        ("blocks.{7,9}.hook_resid_post", r"did not fire: the model has the blocks 0 … 2"),
        ("hidden_states[4]", r"did not fire: the model has the hidden states 0 … 3"),
        ("h_res", r"'h_res' did not fire: the model has no stream connections"),
        ([], r"expected one name or several"),
    ],
)
def test_a_site_that_cannot_fire_is_an_error(models, ids, name, message):
    with pytest.raises(probes.SiteError, match=message):
        probes.capture(models["llama"](), {"input_ids": ids}, sites=name)


def test_parallel_branches_have_no_middle(ids):
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with pytest.raises(probes.SiteError, match="add all their branches at once"):
        probes.capture(model, {"input_ids": ids}, sites="mid")
    trace = probes.capture(model, {"input_ids": ids}, sites="branch_out")["trace"].to_dataset()
    assert list(trace.depth_in.values) == [0, 0, 1, 1]
    np.testing.assert_allclose(
        trace.branch_out.values[:2].sum(0),
        (trace.residual[1] - trace.residual[0]).values[..., 0, :],
        atol=1e-5,
    )


def test_a_post_norm_block_shows_its_middle_behind_a_norm(ids):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model, batch = transformers.BertForMaskedLM(config).eval(), {"input_ids": ids}
    trace = probes.capture(model, batch, sites=["mid", "branch_out"])["trace"].to_dataset()
    own = seen(
        model, batch, mid="bert.encoder.layer.1.attention.output>", dense="bert.encoder.layer.1.output.dense>"
    )
    np.testing.assert_array_equal(trace.residual.values[1, ..., 0, :], own["mid"])
    np.testing.assert_array_equal(trace.branch_out.values[3], own["dense"])
    assert np.isnan(trace.reconstruction_error.values).all(), "the sum itself is no state"


def test_every_run_has_a_coverage_table(models, ids, tmp_path):
    from depthscope import diagnostics

    run = probes.capture(models["deepseek"](), {"input_ids": ids})
    fired = table(run)
    assert (fired.fired == fired.expected).all()
    assert list(fired.index[:3]) == ["hook_embed", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"]
    assert fired.loc["blocks.0.attn.h_res", "module"] == "model.layers.0.attn_hc"
    assert fired.loc["ln_final.hook_normalized", "module"] == "model.norm (output)"
    diagnostics.save_run(run, tmp_path / "run.zarr.zip")
    again = table(diagnostics.open_run(tmp_path / "run.zarr.zip"))
    assert list(again.why) == list(fired.why)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.{0,2}.hook_resid_post", ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]),
        ("blocks.*.hook_*_out", ["hook_attn_out", "hook_mlp_out"]),
        ("hook_resid_*", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"]),
    ],
)
def test_a_pattern_is_the_names_that_it_stands_for(pattern, names):
    one, several = select(pattern).requests, select(names).requests
    asked = {
        (request.kinds, number, request.branch) for request in one for number in request.blocks or [None]
    }
    assert asked == {(of.kinds, number, of.branch) for of in several for number in of.blocks or [None]}


@pytest.mark.parametrize(
    "name", ["blocks.[048].hook_resid_post", "blocks.{3-1}.hook_resid_mid", "hook_(attn_out"]
)
def test_a_pattern_that_is_none_is_refused(name):
    with pytest.raises(SiteError, match=r"is not a number of a block|no site is called"):
        select(name)


def test_a_loop_measures_the_blocks_of_a_pattern(models, ids):
    model = models["llama"]()
    with probes.record(model, metrics="live", sites="blocks.{0,2}.hook_resid_post") as recorder:
        model(input_ids=ids, labels=ids).loss.backward()
        recorder.step()
    model.zero_grad()
    assert not recorder.errors
    assert recorder.run["trace"].sizes["depth"] == 2
    assert recorder.run["metrics"]["residual_norm"].sizes["depth"] == 2
