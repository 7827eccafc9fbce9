"""The static view: what the files tell is what the model's own modules compute where the input adds nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import hyper_connections.mHCv2 as second
import numpy as np
import pytest
import torch
from hyper_connections import hyper_connections as free
from hyper_connections import manifold_constrained_hyper_connections as constrained
from safetensors.torch import save_file
from torch import nn

from depthscope import probes
from depthscope.probes.checkpoints.weight_files import CheckpointError
from tests.models.stream_models import glm5_next, hy_v4, qwen4_exp

N = 4


def trained(model: nn.Module) -> nn.Module:
    """Random connection parameters, so that none of the maps is trivial."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(
            word in name
            for word in ("_hc", "hc_head", "altup.", "hyper_connection", "alpha", "beta", "scale")
        ):
            # strong biases, so that Sinkhorn has not converged and the order of its rounds shows
            strong = any(word in name for word in ("base", "static_alpha"))
            nn.init.normal_(parameter, std=3.0 if strong else 0.7, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """Saves a model, sharded or not, once: ``saved("deepseek", shards=True) -> (model, folder)``."""
    factories = {
        "deepseek": models["deepseek"],
        "glm5_next": partial(glm5_next, 2),
        "hy_v4": partial(hy_v4, 2, hc_magnitude=1.5),
        "qwen4_exp": partial(qwen4_exp, 2, ple_layer_ids=[1]),
    }
    made: dict[tuple[str, bool], tuple[nn.Module, Path]] = {}

    def save(name: str, *, shards: bool = False) -> tuple[nn.Module, Path]:
        if (name, shards) not in made:
            torch.manual_seed(0)
            model, folder = trained(factories[name]()), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
            made[name, shards] = model, folder
        return made[name, shards]

    return save


def streams(width: int = 64) -> torch.Tensor:
    """One token whose streams are unit vectors, so that whatever mixes them can be read off: (1, 1, n, D)."""
    return torch.eye(N, width)[None, None]


def without_dynamics(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        if name.endswith("scale") or name == "modality_router.weight":
            nn.init.zeros_(parameter)
    return module


# --- the weights are the module's own


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", ["deepseek", "glm5_next"])
def test_mhc_weights_are_those_of_the_module_without_dynamics(saved, name, shards):
    model, folder = saved(name, shards=shards)
    found = probes.describe_weights(folder)
    modules = [module for module in model.modules() if type(module).__name__.endswith("HyperConnection")]
    assert found.num_files > 1 if shards else found.num_files == 1
    assert len(found.connections) == len(modules)
    assert [(one.layer, one.branch) for one in found.connections[:4]] == [
        (0, "attn"),
        (0, "mlp"),
        (1, "attn"),
        (1, "mlp"),
    ]
    for one, module in zip(found.connections, modules, strict=True):
        scale = module.scale.tolist()
        with torch.no_grad():
            post, comb, collapsed = without_dynamics(module)(streams())
            module.scale.copy_(torch.tensor(scale))
        np.testing.assert_allclose(one.h_res, comb[0, 0].T, atol=3e-6)
        np.testing.assert_allclose(one.h_post, post[0, 0], atol=1e-6)
        np.testing.assert_allclose(one.h_pre, collapsed[0, 0, :N], atol=1e-6)
        assert list(one.gates.values()) == pytest.approx(scale)
        assert (one.family, one.streams, one.width) == ("mhc", N, 64)


def test_product_of_the_static_matrices_is_what_the_whole_model_applies(models, tmp_path):
    model = trained(models["deepseek"](layers=2))
    model.save_pretrained(tmp_path)
    found = probes.describe_weights(tmp_path)
    x, seen = torch.randn(1, 3, N, 64, generator=torch.Generator().manual_seed(2)), {}
    layers = model.model.layers
    for layer in layers:
        without_dynamics(layer.attn_hc), without_dynamics(layer.ffn_hc)
        layer.self_attn.register_forward_hook(lambda m, i, y: (torch.zeros_like(y[0]), *y[1:]))
        layer.mlp.register_forward_hook(lambda m, i, y: torch.zeros_like(y))
    layers[0].register_forward_pre_hook(lambda m, inputs: (x, *inputs[1:]))
    layers[-1].register_forward_hook(lambda m, i, y: seen.update(y=y))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    product = np.linalg.multi_dot([one.h_res for one in found.connections[::-1]])
    np.testing.assert_allclose(np.einsum("ij,btjd->btid", product, x), seen["y"].numpy(), atol=1e-5)
    assert np.abs(product - product.T).max() > 1e-3, "a transposed product would pass otherwise"
    (composite,) = found.composites
    np.testing.assert_allclose(composite.singular_values, np.linalg.svd(product)[1], atol=1e-9)
    assert composite.forward_gain == pytest.approx(product.sum(1).max())
    assert composite.backward_gain == pytest.approx(product.sum(0).max())


def test_independent_streams_use_the_configured_magnitude_and_have_a_head(saved):
    model, folder = saved("hy_v4")
    found = probes.describe_weights(folder)
    assert found.settings["hc_magnitude"] == 1.5
    assert found.assumed == ()
    modules = [module for layer in model.model.layers for module in (layer.attn_hc, layer.ffn_hc)]
    for one, module in zip(found.connections, modules, strict=True):
        with torch.no_grad():
            post, collapsed = without_dynamics(module)(streams())
        np.testing.assert_array_equal(one.h_res, np.eye(N))
        np.testing.assert_allclose(one.h_post, post[0, 0], atol=1e-6)
        np.testing.assert_allclose(one.h_pre, collapsed[0, 0, :N], atol=1e-6)
    (head,) = found.heads
    with torch.no_grad():
        read = without_dynamics(model.model.hc_head)(streams())
    np.testing.assert_allclose(head.h_pre, read[0, 0, :N], atol=1e-6)
    assert (head.h_res, head.h_post, head.branch) == (None, None, "head")


def test_what_has_no_scalar_weights_is_named_and_left_to_a_run(saved):
    found = probes.describe_weights(saved("qwen4_exp")[1])  # gates per feature
    assert found.connections == ()
    assert {one.name.split(".")[2] for one in found.unrecognised} >= {
        "attn_hyper_connection",
        "mlp_hyper_connection",
    }
    assert "run the model (describe without" in str(found)


LIBRARY = {
    "hc": lambda: free.HyperConnections(N, dim=8),
    "hc without writes": lambda: free.HyperConnections(N, dim=8, add_branch_out_to_residual=False),
    "mhc": lambda: constrained.mHC(N, dim=8),
    "mhc of proposals": lambda: constrained.mHC(N, dim=8, num_dynamic_alpha_proposals=3),
    "mhc v2": lambda: second.ManifoldConstrainedHyperConnections(N, dim=8),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_library_connections_are_those_of_the_module_without_dynamics(name, tmp_path):
    torch.manual_seed(0)
    module = trained(nn.ModuleList([LIBRARY[name]()]))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    (one,) = probes.describe_weights(tmp_path / "model.safetensors").connections
    connection = without_dynamics(module[0])
    x = torch.randn(N, 1, 8)
    given = x.transpose(0, 1)[:, None] if "v2" in name else x  # (1, 1, n, D) or ((1 n), 1, D)
    with torch.no_grad():
        branch_in, mixed, depth = connection.width_connection(given)
    np.testing.assert_allclose(one.h_res @ x.reshape(N, 8).numpy(), mixed.reshape(N, 8), atol=1e-5)
    np.testing.assert_allclose(one.h_pre @ x.reshape(N, 8).numpy(), branch_in.reshape(8), atol=1e-5)
    if name == "hc without writes":
        assert one.h_post is None
        return
    out = torch.randn_like(branch_in)
    with torch.no_grad():
        written = connection.depth_connection(out, torch.zeros_like(mixed), **depth)
    np.testing.assert_allclose(np.outer(one.h_post, out.reshape(8)), written.reshape(N, 8), atol=1e-5)
    assert (one.family, one.streams) == (name.split()[0], N)


@pytest.mark.parametrize(
    "make",
    [lambda: free.HyperConnections(N, dim=8, num_fracs=2), lambda: constrained.mHC(N, dim=8, num_fracs=2)],
)
def test_connections_of_no_row_are_named_and_not_read(make, tmp_path):
    state = make().state_dict()
    save_file(state, tmp_path / "m.safetensors")
    found = probes.describe_weights(tmp_path)
    assert (found.connections, found.composites) == ((), ())
    assert {one.name for one in found.unrecognised} >= {"static_alpha", "static_beta"}
    assert "not read     static_alpha (8, 10) F32" in str(found)


# --- names


def test_quantised_layers_norms_and_adapters_are_no_connections(tmp_path):
    look_alikes = {
        "layers.0.q.kernel": (8, 512), "layers.0.q.bias": (8,), "layers.0.q.scale": (1,),  # a head without streams
        "layers.0.k.kernel": (25, 512), "layers.0.k.bias": (25,), "layers.0.k.scale": (3,),  # 25 is no n(n + 2)
        "layers.0.v.kernel": (24, 16), "layers.0.v.bias": (24,), "layers.0.v.scale": (3,),  # as wide as the streams are many
        "layers.0.adapter.norm.weight": (64,), "layers.0.adapter.down.weight": (16, 64),
        "layers.0.adapter.up.weight": (64, 16), "layers.0.adapter.gate.weight": (4, 64),
        "layers.0.x.fn": (24, 63), "layers.0.x.base": (24,), "layers.0.x.scale": (3,),  # 63 is no n·D
    }  # fmt: skip
    save_file({name: torch.zeros(shape) for name, shape in look_alikes.items()}, tmp_path / "m.safetensors")
    found = probes.describe_weights(tmp_path)
    assert (found.connections, found.heads, found.num_read) == ((), (), 0)


def test_chains_are_multiplied_apart(tmp_path):
    tensors = {}
    for chain in ("layers.0", "layers.1", "mtp.0"):
        tensors |= {f"{chain}.hc_attn_{name}": tensor for name, tensor in projected(torch.randn(24)).items()}
    save_file(tensors, tmp_path / "m.safetensors")
    found = probes.describe_weights(tmp_path)
    assert [(one.chain, one.connections) for one in found.composites] == [("layers", 2), ("mtp", 1)]


# --- only what is needed is read


def test_a_large_file_is_read_at_the_places_that_count(tmp_path):
    """A hole of 8 GiB before the tensors of the connection."""
    hole, tensors = 1 << 33, projected(torch.zeros(24))
    entries = {"embed.weight": {"dtype": "BF16", "shape": [1 << 32], "data_offsets": [0, hole]}}
    end, data = hole, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        entries[f"layers.0.hc.{name}"] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(raw)],
        }
        end, data = end + len(raw), data + raw
    text = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + hole)
        file.write(data)
    (one,) = probes.describe_weights(tmp_path).connections
    assert one.gates["res"] == pytest.approx(0.1)


def test_a_checkpoint_without_one_of_its_shards_is_refused(saved, tmp_path):
    _, folder = saved("deepseek", shards=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    min(copy.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"names \d+ shards but .* is not there; complete the download"):
        probes.describe_weights(copy)


def test_transformers_is_not_imported(saved):
    _, folder = saved("deepseek")
    code = (
        f"import sys; from depthscope import probes; print(len(probes.describe_weights({str(folder)!r}).connections)); "
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"


# --- what is no checkpoint


def test_checkpoint_without_connections_says_so(tmp_path):
    save_file({"h.0.mlp.weight": torch.zeros(8, 4)}, tmp_path / "model.safetensors")
    found = probes.describe_weights(tmp_path)
    assert found.connections == ()
    assert "no stream connection in 1 tensors of 1 file" in str(found)
    assert "Looked for the dialects deepseek-v4, " in str(found)


def projected(base: torch.Tensor, scale: float = 0.1, num_scales: int = 3) -> dict[str, torch.Tensor]:
    return {"fn": torch.zeros(len(base), 64), "base": base, "scale": torch.full((num_scales,), scale)}


def checkpoint(folder: Path, *bases: torch.Tensor, scale: float = 0.1, config: str = "{}") -> Path:
    tensors = {
        f"layers.{layer}.hc.{name}": tensor
        for layer, base in enumerate(bases)
        for name, tensor in projected(base, scale).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return folder


BROKEN = torch.tensor([math.nan] + [0.0] * 23)


def configured(folder: Path, **settings: object) -> Path:
    return checkpoint(folder, torch.zeros(24), config=json.dumps(settings))


def without_values(folder: Path) -> Path:
    tensors = {f"layers.0.hc.{name}": tensor for name, tensor in projected(torch.zeros(24)).items()}
    save_file(tensors | {"layers.0.hc.scale": torch.zeros(0)}, folder / "model.safetensors")
    return folder


def torn(folder: Path) -> Path:
    save_file({"x": torch.zeros(8)}, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:20])
    return folder


def pickled(folder: Path) -> Path:
    torch.save({"x": torch.zeros(2)}, folder / "pytorch_model.bin")
    return folder


def quantised(folder: Path) -> Path:
    tensors = {name: tensor.to(torch.int8) for name, tensor in projected(torch.ones(24)).items()}
    save_file({f"hc.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def written(name: str, text: str):
    def write(folder: Path) -> Path:
        save_file({"x": torch.zeros(8)}, folder / "model-00001-of-00003.safetensors")
        (folder / name).write_text(text)
        return folder

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "contains no safetensors"),
        (lambda folder: folder / "nowhere", "no checkpoint at"),
        (torn, "torn or not a safetensors file"),
        (pickled, "of a pickle cannot be read"),
        (quantised, "stored as I8"),
        (written("notes.txt", ""), "1 of 3 shards and no index"),
        (written("model.safetensors.index.json", "{"), "not a safetensors index"),
        (written("model.safetensors.index.json", '{"weight_map": []}'), "not a safetensors index"),
        (lambda folder: written("x.gguf", "GGUF")(folder) / "x.gguf", "cannot be read as GGUF"),
        (
            lambda folder: checkpoint(folder, torch.zeros(24), BROKEN),
            r"1 of the 24 values of 'layers.1.hc.base'",
        ),
        (lambda folder: checkpoint(folder, torch.zeros(24), config="{"), r"config\.json' is not JSON"),
        *(
            (partial(configured, hc_sinkhorn_iters=rounds), "expected at most 10000")
            for rounds in (10**400, -(10**30))
        ),
        (without_values, r"'layers\.0\.hc\.scale' has no values"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(make, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        probes.describe_weights(make(tmp_path))


@pytest.mark.parametrize(
    ("make", "name"),
    [(os.mkfifo, "config.json"), (lambda path: path.symlink_to("/dev/zero"), "x.safetensors")],
)
def test_pipes_and_devices_are_not_waited_for(tmp_path, make, name):
    (checkpoint(tmp_path, torch.zeros(24)) / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is a named pipe|is a device|leads out"):
        probes.describe_weights(tmp_path / name if name[0] == "x" else tmp_path)


# --- numbers, from values known by hand


def test_zero_base_is_uniform_of_rank_one_and_has_gain_one(tmp_path):
    found = probes.describe_weights(checkpoint(tmp_path, torch.zeros(24), torch.zeros(24)))
    facts = found.connections[0].mixing
    np.testing.assert_allclose(found.connections[0].h_res, 0.25, atol=2e-6)
    np.testing.assert_allclose(facts.singular_values, [1, 0, 0, 0], atol=2e-6)
    assert found.connections[0].constraint.startswith("uniform")
    (composite,) = found.composites
    assert composite.forward_gain == pytest.approx(1, abs=1e-5)
    assert composite.effective_rank == pytest.approx(1, abs=1e-4)


def test_amplifying_products_are_told_even_beyond_floats(tmp_path):
    tensors = {}
    for layer in range(100):
        tensors[f"l.{layer}.static_alpha"] = torch.cat([torch.ones(2, 1), 1e4 * torch.eye(2)], dim=1)
        tensors[f"l.{layer}.static_beta"] = torch.ones(2)
    save_file(tensors, tmp_path / "m.safetensors")
    found = probes.describe_weights(tmp_path)
    assert found.composites[0].forward_gain == math.inf
    assert "gain forward inf" in str(found)


def test_configuration_of_another_model_is_told(tmp_path):
    found = probes.describe_weights(configured(tmp_path, text_config={"hc_mult": 8, "hc_sinkhorn_iters": 5}))
    assert any("config.json gives 8 streams" in words for words in found.warnings)
    assert found.settings["hc_sinkhorn_iters"] == 5
    assert found.assumed == ("hc_eps",)
