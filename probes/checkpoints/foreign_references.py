"""Does a configuration lead elsewhere? To another folder, an adapter, code of the hub or the network: refused."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.own_files import exists, read_json

# What transformers reads next to the weights. A tokenizer.json is a program of the tokenizers library, without paths.
CONFIGURATIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# Where save_pretrained notes where files were, as in most public checkpoints; transformers never opens them.
NOTES = frozenset({"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"})
# Text of any kind, which may look like a path
TEXTS = frozenset({"chat_template"})
LONGEST_PATH = 4096
NETWORK_EVENTS = frozenset({"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"})


def check_references(folder: Path) -> None:
    """Refuse a transformers folder whose configurations name what is elsewhere.

    Raises CheckpointError: For an adapter, an attention kernel from the hub, or the path of a file that is not the
    folder's.
    """
    if exists(folder / "adapter_config.json"):
        raise CheckpointError(
            f"'{folder}' contains a PEFT adapter (adapter_config.json), which names another model; merge them with "
            "merge_and_unload() and save the result"
        )
    for name in CONFIGURATIONS:
        file = folder / name
        if not exists(file):
            continue
        for key, text in _texts(read_json(file, "configuration of transformers")):
            _check_text(folder, file, key, text)


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every text of nested lists and dictionaries with its key, or that of the list."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((str(name), each) for name, each in value.items())
        elif isinstance(value, list):
            waiting.extend((key, each) for each in value)
        elif isinstance(value, str):
            yield key, value


def _check_text(folder: Path, file: Path, key: str, text: str) -> None:
    if key.endswith("_implementation") and any(sign in text for sign in "/:@"):
        raise CheckpointError(
            f"'{file}': '{key}' is {ascii(text)[:80]}, code from the hub; no code of a checkpoint is run: remove the entry"
        )
    if key in NOTES or key in TEXTS or len(text) > LONGEST_PATH:
        return
    # by its words too, since some tokenizers take the options of a program
    for word in {text, *text.split()}:
        if _names_other_file(folder, word):
            raise CheckpointError(
                f"'{file}': '{key}' names {ascii(word)[:80]}, which is not in the checkpoint's folder; only files of the "
                "folder are read: copy it there or remove the entry"
            )


def _names_other_file(folder: Path, word: str) -> bool:
    # a single name is looked for in the folder, if at all; "/" alone and the like are tokens
    if not any(sign in word for sign in "/\\") or "\0" in word:
        return False
    path = Path(word)
    try:
        # A folder counts where a model could be loaded from it.
        if not path.exists() or (path.is_dir() and not (path / "config.json").exists()):
            return False
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # no name that a file can have
        return False


# --- the network

_loading = threading.local()
_installed = threading.Lock()


@contextmanager
def offline() -> Iterator[None]:
    """Refuse connections to a network from this thread, as long as a checkpoint is loaded.

    ``local_files_only`` asks the same of transformers, but not to every library that an architecture or a tokenizer calls.
    """
    if _installed.acquire(blocking=False):  # once: an audit hook stays for the life of the process
        sys.addaudithook(_refuse_network)
    before = getattr(_loading, "active", False)
    _loading.active = True
    try:
        yield
    finally:
        _loading.active = before


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in NETWORK_EVENTS or not getattr(_loading, "active", False):
        return
    # An address of the internet is a tuple; a text is a socket of this machine.
    if event == "socket.connect" and not isinstance(arguments[1], tuple):
        return
    raise CheckpointError(
        "the checkpoint wants something from the network; nothing is fetched: complete the download"
    )
