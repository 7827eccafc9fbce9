"""What a configuration may not name: files elsewhere, adapters, kernels of the hub, the network."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.foreign_references import check_references, offline


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "own.model").touch()
    (tmp_path / "secret.model").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").touch()
    return folder


def write(folder: Path, name: str, **content) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("target", ["secret.model", "other"])
def test_paths_of_other_files_are_refused(folder, name, target):
    write(folder, name, sp_model_kwargs={"files": ["x", str(folder.parent / target)]})
    with pytest.raises(CheckpointError, match=r"'files' names .* not in the checkpoint's folder"):
        check_references(folder)
    write(folder, name, mecab_option=f"-q -r {folder.parent / target}")
    with pytest.raises(CheckpointError, match="'mecab_option' names"):
        check_references(folder)


def test_relative_paths_and_devices_are_refused(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for path in ("./secret.model", "../" + folder.parent.name + "/secret.model", "/dev/zero"):
        write(folder, "tokenizer_config.json", vocab=path)
        with pytest.raises(CheckpointError, match="'vocab' names"):
            check_references(folder)


def test_what_public_checkpoints_contain_is_let_through(folder):
    write(
        folder,
        "tokenizer_config.json",
        name_or_path=str(folder.parent / "other"),
        special_tokens_map_file=str(folder.parent / "secret.model"),
        unk_token="/",
        extra=["</s>", "/n/o/where", str(folder / "own.model"), "org/name", "\0/x", "a/" * 3000],
        chat_template=f"{{{{ '{folder.parent / 'secret.model'}' }}}}",
    )
    write(folder, "config.json", _name_or_path=str(folder.parent / "other"), attn_implementation="sdpa")
    check_references(folder)
    write(folder, "tokenizer_config.json", vocab_file=str(folder.parent / "secret.model"))
    with pytest.raises(CheckpointError, match="'vocab_file' names"):
        check_references(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_refused(folder, key):
    write(folder, "config.json", text_config={key: "kernels-community/flash-attn@v1"})
    with pytest.raises(CheckpointError, match=f"'{key}' is .* code from the hub"):
        check_references(folder)


def test_adapters_are_refused(folder):
    write(folder, "adapter_config.json", base_model_name_or_path="org/name")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        check_references(folder)


def test_no_network_while_loading_and_all_of_it_afterwards():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with offline():
            with pytest.raises(CheckpointError, match="network"):
                socket.create_connection(server.getsockname(), timeout=1)
            with pytest.raises(CheckpointError, match="network"):
                socket.getaddrinfo("localhost", 80)
        socket.create_connection(server.getsockname(), timeout=1).close()
