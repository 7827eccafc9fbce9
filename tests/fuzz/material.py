"""Which files are damaged? Runs in every format, and checkpoints of every kind, as small as they can be."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import analyze, schema
from tests.models.synthetic_run import synthetic_run

SMALL: dict[str, Any] = {"layers": 2, "samples": 2, "tokens": 6, "features": 4}


def _analysed() -> xr.DataTree:
    run = synthetic_run("hc", **SMALL)
    parts = {name: run[name].to_dataset() for name in ("trace", "statistics")}
    measured = analyze(run, metrics=["effective_rank", "residual_norm"]).assign_attrs(complete=True)
    return schema.create_run(**parts, metrics=measured, attrs={str(k): v for k, v in run.attrs.items()})


def _chains() -> xr.DataTree:
    trace = synthetic_run("residual", **SMALL)["trace"].to_dataset()
    return schema.create_run({"encoder": trace, "decoder": trace.isel(depth=slice(2))}, attrs={"note": ""})


def write_runs(folder: Path) -> list[Path]:
    """Save runs in every format, with what opening each gives."""
    paths = []
    for stem, run in {"analysed": _analysed(), "chains": _chains()}.items():
        for suffix in schema.SUFFIXES:
            path = schema.save_run(run, folder / f"{stem}{suffix}")
            with schema.open_run(path) as back:
                (folder / f"{path.name}.expected").write_bytes(pickle.dumps(contents(back.load())))
            paths.append(path)
    return paths


def contents(run: xr.DataTree) -> dict[str, Any]:
    """Everything in a run by path: dims, type and bytes of variables, and attributes."""
    found: dict[str, Any] = {}
    for node in run.subtree:
        dataset = node.to_dataset(inherit=False)
        found[node.path] = repr(sorted(dataset.attrs.items()))
        for name, variable in dataset.variables.items():
            values = np.asarray(variable.values)
            content = values.tolist() if values.dtype.kind == "O" else values.tobytes()
            found[f"{node.path}:{name}"] = (variable.dims, str(values.dtype), content, repr(variable.attrs))
    return found


def write_checkpoints(folder: Path) -> dict[Path, list[str]]:
    """Write checkpoints, each with the further words of the command that reads it."""
    import torch
    from safetensors.torch import save_file

    from tests.models.small_models import deepseek, llama, lucidrains

    model = llama()
    model.save_pretrained(folder / "folder")
    model.save_pretrained(folder / "sharded", max_shard_size="30KB")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder / "pickled")
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    deepseek(layers=2).save_pretrained(folder / "weights")
    streams = {name: value.clone() for name, value in lucidrains("mhc").state_dict().items()}
    save_file(streams, folder / "streams.safetensors")
    _write_gguf(folder / "m.gguf")
    whole, weights = ("folder", "sharded", "pickled", "m.gguf"), ("weights", "streams.safetensors")
    return {
        **{folder / name: [] for name in whole},
        **{folder / name: ["--weights-only"] for name in weights},
    }


def _write_gguf(path: Path) -> None:
    """A header of a llama and one tensor: enough to be read up to what is missing."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    number: Callable[[int], None]
    for number, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 2),
    ):
        number(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + place) for place in range(64)])
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
