"""What does the name of a repository on the Hugging Face hub stand for? Files in the local cache, or fetched into it.

Only data is fetched: safetensors, GGUF, JSON, and the two kinds of text that tokenizers have. No code, no pickle.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from os.path import exists
from pathlib import Path

from depthscope.diagnostics.package_versions import install_command
from depthscope.probes.checkpoints.errors import CheckpointError, errors_of, first_line, printable
from depthscope.probes.checkpoints.own_files import given_path
from depthscope.probes.checkpoints.weight_files import INDEX_ENDING, read_index

HUB_NAME = re.compile(
    r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w./-]+\.gguf))?(?:@([\w./-]+))?", re.ASCII
)
OF_FILES = (".safetensors", ".gguf", ".json", ".pt", ".pth", ".bin", ".ckpt", ".nc", ".zarr", ".zip", ".h5")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
INDEX = f"model{INDEX_ENDING}"
TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")
TOKENIZER_TEXTS = ("merges.txt", "vocab.txt")
# Tokenizers that are neither JSON nor text.
OTHER_TOKENIZER = re.compile(r"(.*\.(model|tiktoken|bpe|spm))|tokenization_.*\.py")


@dataclass(frozen=True)
class HubFiles:
    """A checkpoint of the hub in the local cache."""

    path: Path
    """The folder of its files, or the GGUF file."""
    repository: str
    """Its ``organisation/name``."""
    commit: str
    """The commit that the files are of."""


def is_hub_name(spec: str) -> bool:
    """Whether a text is ``organisation/name`` of the hub and nothing on this machine.

    Examples
    --------
    >>> is_hub_name("openai-community/gpt2@main"), is_hub_name("../gpt2"), is_hub_name("model/weights.safetensors")
    (True, False, False)
    """
    found = HUB_NAME.fullmatch(spec)
    if found is None or (found[1].endswith(OF_FILES) and found[2] is None):
        return False
    # Within a folder that exists a folder is meant, whose name is not sent to anybody.
    return not exists(given_path(spec)) and not exists(Path(spec.partition("/")[0]))


def hub_files(spec: str) -> HubFiles:
    """The files of a checkpoint of the hub: those in the cache where they are complete, else fetched.

    ``spec``: ``organisation/name``, with ``/file.gguf`` for a GGUF file among several, with ``@revision`` for another one
    than main: a branch, a tag or a commit.
    Raises CheckpointError: Where huggingface_hub is not installed, there is no such repository, it may not be read, it has no
    weights that are data, or nothing is cached and the network may not be used or is not there.
    """
    parts = HUB_NAME.fullmatch(spec)
    assert parts is not None
    wanted = parts[1], parts[2], parts[3] or "main"
    with errors_of("huggingface_hub", f"'{spec}' cannot be fetched"):
        try:
            import huggingface_hub
        except ImportError:
            raise CheckpointError(
                f"no checkpoint '{spec}' on this machine; to fetch it from the Hugging Face hub: {install_command('models')}"
            ) from None
        known = _cached(*wanted)
        if known is not None:
            return known
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"'{spec}' is not in the cache ({huggingface_hub.constants.HF_HUB_CACHE}), or without its tokenizer, and "
                "HF_HUB_OFFLINE is set; unset it, or give a folder"
            )
        with bars_on_terminals_only(), _hub_errors(spec):
            return _fetched(*wanted)


def _cached(repository: str, file: str | None, revision: str) -> HubFiles | None:
    """What the cache has, where that is all that would be fetched."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    first = try_to_load_from_cache(repository, file or "config.json", revision=revision)
    if not isinstance(first, str):
        return None
    folder = Path(first).parents[(file or "").count("/")]
    if file:
        return HubFiles(Path(first), repository, folder.name)
    index = folder / INDEX
    weights = set(read_index(index).values()) if exists(index) else {"model.safetensors"}
    # Another program may have cached the model alone: without its tokenizer bytes would be read as ids.
    has_tokenizer = any(exists(folder / name) for name in TOKENIZER) or (
        try_to_load_from_cache(repository, TOKENIZER[0], revision=folder.name) is _CACHED_NO_EXIST
    )
    is_complete = has_tokenizer and all(exists(folder / name) for name in weights)
    return HubFiles(folder, repository, folder.name) if is_complete else None


def _fetched(repository: str, file: str | None, revision: str) -> HubFiles:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    info = HfApi().model_info(repository, revision=revision)
    commit, present = str(info.sha), [sibling.rfilename for sibling in info.siblings or ()]
    names = _chosen(repository, file, present)
    for name in names:
        last = Path(hf_hub_download(repository, name, revision=commit))
    if not any(name in present for name in TOKENIZER):
        with suppress(EntryNotFoundError):  # the cache notes that there is none
            hf_hub_download(repository, TOKENIZER[0], revision=commit)
    if revision != commit:
        hf_hub_download(repository, names[0], revision=revision)  # the cache notes the commit of a branch
    return HubFiles(last if last.suffix == ".gguf" else last.parent, repository, commit)


def _chosen(repository: str, file: str | None, present: Sequence[str]) -> list[str]:
    """Which files of a repository are fetched, the weights last: where they are cached, everything is."""
    top = [name for name in present if "/" not in name]
    if file is not None:
        if file not in present:
            raise CheckpointError(f"no {file} in '{repository}'; it has {_listed(present)}")
        return [file]
    weights = [name for name in top if WEIGHTS.fullmatch(name)]
    if "config.json" not in top or not weights:
        return [_only_gguf(repository, present)]
    others = [name for name in top if OTHER_TOKENIZER.fullmatch(name)]
    if others and not any(name in top for name in TOKENIZER):
        raise CheckpointError(
            f"the tokenizer of '{repository}' is neither JSON nor text ({_listed(others)}), and is not "
            "fetched; save it with AutoTokenizer, whose tokenizer.json is read, next to the model, and give that folder"
        )
    # Of a file and shards the file: transformers opens that.
    weights = ["model.safetensors"] if "model.safetensors" in weights else sorted(weights)
    small = {name for name in top if name in TOKENIZER_TEXTS or name.endswith(".json")}
    small -= {name for name in small if name.endswith(".index.json") and name != INDEX}
    return ["config.json", *sorted(small - {"config.json"}), *weights]


def _only_gguf(repository: str, present: Sequence[str]) -> str:
    found = [name for name in present if name.endswith(".gguf")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"'{repository}' has {len(found)} GGUF files; name one, such as {repository}/{found[0]}"
        )
    raise CheckpointError(
        f"'{repository}' has no model.safetensors or .gguf; it has {_listed(present)}. Weights in other files can contain "
        "code and are not fetched: convert them to safetensors, or download the folder yourself and give that"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return printable(", ".join(names[:6]), 300) + more if names else "no files"


@contextmanager
def _hub_errors(spec: str) -> Iterator[None]:
    """Errors of the hub as sentences that say what to do."""
    from huggingface_hub import constants, errors

    where = f"'{spec}' at {constants.ENDPOINT}"
    try:
        yield
    except CheckpointError:
        raise
    except errors.HfHubHTTPError as error:
        # It says whether the repository, the revision or the access to it is missing.
        said = printable(" ".join(str(error).split()), 500)
        raise CheckpointError(
            f"{where} could not be fetched ({said}), and no folder has this name here; correct the name, or log in with "
            "`hf auth login`"
        ) from error
    except Exception as error:  # of the network or the disk
        raise CheckpointError(
            f"{where} could not be fetched ({first_line(error)}), and its files are not all in the cache; "
            "try again with a network, or give a folder"
        ) from error


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Show the progress bars of other libraries on a terminal, and keep them out of log files."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):  # where tqdm writes
        yield
