"""Seeded damage to checkpoints: `BASES` build whole ones, `MUTATORS` damage a copy in place and say what must come of it.

A mutator is ``(folder, rng) -> argv | None``: it damages ``folder`` (what its base built there) and returns the command
line where it differs from the base's. ``expect`` is "refused" (must exit 2 with one line), or "any" (refused or accepted).
"""

# Functions with a number of variants are tables in the form of branches.
# ruff: noqa: C901

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all day long " * 30


@dataclass(frozen=True)
class Mutator:
    name: str
    base: str
    expect: str
    damage: Callable[[Path, random.Random], list[str] | None]


MUTATORS: list[Mutator] = []


def mutator(base: str, expect: str = "refused", variants: int = 1):
    """Register ``damage(folder, rng)``, or ``damage(folder, rng, variant)`` for several variants."""

    def register(function):
        for variant in range(variants):
            damage = function if variants == 1 else (lambda folder, rng, v=variant: function(folder, rng, v))
            MUTATORS.append(
                Mutator(f"{function.__name__}{'' if variants == 1 else f'/{variant}'}", base, expect, damage)
            )
        return function

    return register


# --- whole checkpoints


def _llama():
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _tokenizer(folder: Path) -> None:
    import tokenizers
    import transformers

    vocab = {"[UNK]": 0, **{chr(97 + i): i + 1 for i in range(26)}, " ": 27}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="[UNK]").save_pretrained(folder)


def base_folder(folder: Path) -> list[str]:
    _llama().save_pretrained(folder / "m")
    _tokenizer(folder / "m")
    return ["describe", "m"]


def base_sharded(folder: Path) -> list[str]:
    _llama().save_pretrained(folder / "m", max_shard_size="30KB")
    return ["describe", "m"]


def base_bin(folder: Path) -> list[str]:
    import torch

    model = _llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder / "m")
    torch.save(model.state_dict(), folder / "m" / "pytorch_model.bin")
    return ["describe", "m"]


def base_bin_sharded(folder: Path) -> list[str]:
    import torch

    model = _llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder / "m")
    names = list(model.state_dict())
    half = len(names) // 2
    weight_map = {}
    for i, part in enumerate((names[:half], names[half:])):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: model.state_dict()[name] for name in part}, folder / "m" / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "m" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return ["describe", "m"]


def base_weights_only(folder: Path) -> list[str]:
    from tests.models.small_models import deepseek

    deepseek(layers=2).save_pretrained(folder / "m")
    return ["describe", "m", "--weights-only"]


def base_weights_only_sharded(folder: Path) -> list[str]:
    from tests.models.small_models import deepseek

    deepseek(layers=2).save_pretrained(folder / "m", max_shard_size="60KB")
    return ["describe", "m", "--weights-only"]


def base_gemma3n_weights(folder: Path) -> list[str]:
    from tests.models.stream_models import gemma3n

    gemma3n(2, altup_active_idx=1).save_pretrained(folder / "m")
    return ["describe", "m", "--weights-only"]


def base_lucidrains_weights(folder: Path) -> list[str]:
    from safetensors.torch import save_file

    from tests.models.small_models import lucidrains

    save_file({k: v.clone() for k, v in lucidrains("mhc").state_dict().items()}, folder / "m.safetensors")
    return ["describe", "m.safetensors", "--weights-only"]


FACTORY = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16); self.up = nn.Linear(16, 32); self.down = nn.Linear(32, 16)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 16); self.head = nn.Linear(16, 256)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks: x = block(x)
        return self.head(x)
def make():
    torch.manual_seed(0)
    return Net()
"""


def base_factory(folder: Path) -> list[str]:
    (folder / "mymodel.py").write_text(FACTORY)
    return ["describe", "mymodel:make"]


def base_factory_pt(folder: Path) -> list[str]:
    import torch

    base_factory(folder)
    scope: dict = {}
    exec(FACTORY, scope)
    torch.save(scope["make"]().state_dict(), folder / "w.pt")
    return ["describe", "mymodel:make", "--weights", "w.pt"]


def base_factory_st(folder: Path) -> list[str]:
    from safetensors.torch import save_file

    base_factory(folder)
    scope: dict = {}
    exec(FACTORY, scope)
    save_file(scope["make"]().state_dict(), folder / "w.safetensors")
    return ["describe", "mymodel:make", "--weights", "w.safetensors"]


def base_gguf(folder: Path) -> list[str]:
    """A tiny llama as GGUF, written with the gguf package."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    tokens = [chr(33 + i) for i in range(61)] + ['!"', "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 62 + [3, 3])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(62)
    writer.add_eos_token_id(63)
    rng = np.random.default_rng(0)

    def add(name, *shape):
        writer.add_tensor(name, (rng.standard_normal(shape) * 0.1).astype(np.float32))

    add("token_embd.weight", 64, 32)
    add("output_norm.weight", 32)
    add("output.weight", 64, 32)
    for i in range(2):
        add(f"blk.{i}.attn_q.weight", 32, 32)
        add(f"blk.{i}.attn_k.weight", 16, 32)
        add(f"blk.{i}.attn_v.weight", 16, 32)
        add(f"blk.{i}.attn_output.weight", 32, 32)
        add(f"blk.{i}.attn_norm.weight", 32)
        add(f"blk.{i}.ffn_norm.weight", 32)
        add(f"blk.{i}.ffn_gate.weight", 48, 32)
        add(f"blk.{i}.ffn_up.weight", 48, 32)
        add(f"blk.{i}.ffn_down.weight", 32, 48)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["describe", "m.gguf"]


BASES: dict[str, Callable[[Path], list[str]]] = {
    name.removeprefix("base_"): value for name, value in list(globals().items()) if name.startswith("base_")
}

# --- what the damage is made of

ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    10**30,
    -(10**18),
    float("nan"),
    float("inf"),
    [[[]]],
    "10000000",
    [None],
    "\x00",
]


def odd(rng):
    return rng.choice(ODD)


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def set_random_key(value, rng):
    """Set a random place in nested JSON to something odd."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        value[key] = odd(rng)
        return key


def noise(path: Path, rng, flips=8, region=1.0) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(flips):
        data[rng.randrange(max(1, int(len(data) * region)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def write_safetensors(path: Path, header, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def special(path: Path, kind: int) -> None:
    if path.exists() or path.is_symlink():
        path.unlink()
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        server = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)
        server.close()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to("/proc/self/environ")
    elif kind == 5:
        path.symlink_to(path.name)  # a link to itself
    elif kind == 6:
        path.symlink_to("/dev/stdin")


# --- config.json

HUGE = [
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "head_dim",
    "num_key_value_heads",
]


@mutator("folder", variants=21)
def config_huge(folder, rng, v):
    edit(folder / "m/config.json", **{HUGE[v % 7]: [10**7, 10**12, 10**5][v // 7]})


@mutator("folder", "any", variants=3)  # a number of positions builds nothing
def config_positions(folder, rng, v):
    edit(folder / "m/config.json", max_position_embeddings=[10**7, 10**12, 10**5][v])


@mutator("folder", "any", variants=40)
def config_odd_value(folder, rng, v):
    config = json.loads((folder / "m/config.json").read_text())
    set_random_key(config, rng)
    (folder / "m/config.json").write_text(json.dumps(config))


@mutator("folder", variants=14)
def config_architectures(folder, rng, v):
    names = (
        [1, 2],
        ["PreTrainedModel"],
        ["AutoModel"],
        ["logging"],
        ["pipeline"],
        ["LlamaConfig"],
        ["LlamaTokenizer"],
        "LlamaForCausalLM",
        [None],
        {"a": 1},
        ["GenerationMixin"],
        5,
        ["LlamaPreTrainedModel", 3],
        ["Trainer"],
    )
    edit(folder / "m/config.json", architectures=names[v])


@mutator("folder", variants=11)
def config_layer_lists(folder, rng, v):
    change = (
        {"layer_types": ["full_attention"] * 10**6},
        {"layer_types": 5},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": -2},
        {"num_hidden_layers": float("nan")},
        {"num_hidden_layers": 2.5},
        {"num_hidden_layers": [2]},
        {"num_attention_heads": 0},
        {"hidden_size": 0},
        {"hidden_act": "exec"},
        {"rope_parameters": {"rope_type": "nonsense"}},
    )[v]
    edit(folder / "m/config.json", **change)


@mutator("folder", variants=7)
def config_text(folder, rng, v):
    (folder / "m/config.json").write_bytes(
        (b"", b"[]", b"null", b'{"a":' * 100000, b"[" * 10**6, b"\xff\xfe\x00", b'{"model_type": "llama", ')[
            v
        ]
    )


@mutator("folder", "any", variants=6)
def config_bytes(folder, rng, v):
    noise(folder / "m/config.json", rng, 3)


@mutator("folder", variants=6)
def config_special(folder, rng, v):
    special(folder / "m/config.json", v)


@mutator("folder", "any", variants=6)
def config_auto_map(folder, rng, v):
    (folder / "m/evil.py").write_text("import os; os.mkdir('canary')\nclass M: pass\n")
    edit(
        folder / "m/config.json",
        **(
            {"auto_map": {"AutoConfig": "evil.M", "AutoModelForCausalLM": "evil.M"}},
            {"auto_map": {"AutoConfig": "evil.M"}, "model_type": "evil"},
            {"auto_map": {"AutoConfig": "other/repo--evil.M"}, "model_type": "evil"},
            {"auto_map": 5},
            {"auto_map": ["evil.M"]},
            {"custom_pipelines": {"a": {"impl": "evil.M"}}, "model_type": ""},
        )[v],
    )


@mutator("folder", "any", variants=8)
def config_quantization(folder, rng, v):
    edit(
        folder / "m/config.json",
        quantization_config=(
            {"quant_method": "gptq", "bits": 4},
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quant_method": "nothing"},
            5,
            {},
            {"quant_method": "mxfp4"},
            {"quant_method": "fp8"},
            {"quant_method": "awq", "bits": 4},
        )[v],
    )


@mutator("folder", variants=3)
def config_outside_weights(folder, rng, v):
    outside = folder / "outside.safetensors"
    shutil.move(folder / "m/model.safetensors", outside)
    if v == 2:
        (folder / "m/link.safetensors").symlink_to(outside)
    edit(
        folder / "m/config.json",
        transformers_weights=("../outside.safetensors", str(outside), "link.safetensors")[v],
    )


@mutator("folder", "any", variants=3)
def config_attention(folder, rng, v):
    edit(
        folder / "m/config.json",
        **(
            {"attn_implementation": "kernels-community/flash-attn"},
            {"_attn_implementation": "kernels-community/x"},
            {"experts_implementation": "a/b"},
        )[v],
    )


@mutator("folder", variants=4)
def adapter(folder, rng, v):
    base = (str(folder / "elsewhere"), "../elsewhere", "some/repo", 5)[v]
    (folder / "m/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
    )


@mutator("folder", "any", variants=3)
def generation_config(folder, rng, v):
    path = folder / "m/generation_config.json"
    if v == 2:
        special(path, 0)
    else:
        path.write_text(("[1, 2]", '{"max_length": {"a": 1}, "eos_token_id": "x"}')[v])


# --- any number of any architecture


def _tiny(name):
    import torch
    import transformers as t

    torch.manual_seed(0)
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    if name == "bert":
        return t.BertModel(
            t.BertConfig(
                vocab_size=300,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=48,
                max_position_embeddings=64,
            )
        )
    if name == "distilbert":
        return t.DistilBertModel(
            t.DistilBertConfig(
                vocab_size=300,
                dim=32,
                n_layers=2,
                n_heads=2,
                hidden_dim=48,
                sinusoidal_pos_embds=True,
                max_position_embeddings=64,
            )
        )
    if name == "mixtral":
        return t.MixtralForCausalLM(
            t.MixtralConfig(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=4,
            )
        )
    if name == "mamba2":
        return t.Mamba2ForCausalLM(
            t.Mamba2Config(
                vocab_size=300,
                hidden_size=32,
                num_heads=8,
                head_dim=8,
                state_size=8,
                n_groups=2,
                num_hidden_layers=2,
            )
        )
    if name == "gemma3":
        return t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
            )
        )
    if name == "t5":
        return t.T5EncoderModel(
            t.T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
        )
    from tests.models.small_models import deepseek

    return deepseek(layers=2)


ARCHITECTURES = ("gpt2", "bert", "distilbert", "mixtral", "mamba2", "gemma3", "t5", "deepseek")
for _name in ARCHITECTURES:

    def _base(folder, name=_name):
        _tiny(name).save_pretrained(folder / "m")
        return ["describe", "m"]

    BASES[_name] = _base

NUMBERS = (10**7, 10**12, 999_999, 1e18, -3, 0, 3 * 10**5)


def _numbers_of(config, path=()):
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _numbers_of(value, (*path, key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, key)


def number(folder, rng, v):
    """One number of the configuration, wherever it is, becomes huge, negative or zero."""
    file = folder / "m/config.json"
    config = json.loads(file.read_text())
    *path, last = rng.choice(list(_numbers_of(config)))
    place = config
    for key in path:
        place = place[key]
    place[last] = NUMBERS[v % len(NUMBERS)]
    file.write_text(json.dumps(config))


for _name in ARCHITECTURES:
    mutator(_name, "any", variants=28)(number)
    for _m in MUTATORS[-28:]:
        object.__setattr__(_m, "name", f"number_{_name}/{_m.name.split('/')[1]}")


# --- tokenizers


@mutator("folder", "any", variants=16)
def tokenizer_odd(folder, rng, v):
    path = folder / "m" / ("tokenizer.json", "tokenizer_config.json")[v % 2]
    content = json.loads(path.read_text())
    set_random_key(content, rng)
    path.write_text(json.dumps(content))


@mutator("folder", "any", variants=8)
def tokenizer_class(folder, rng, v):
    edit(
        folder / "m/tokenizer_config.json",
        tokenizer_class=(
            "NoSuch",
            "AutoModel",
            5,
            ["a"],
            "LlamaTokenizer",
            "BertTokenizer",
            "T5Tokenizer",
            "BertJapaneseTokenizer",
        )[v],
    )


@mutator("folder", "any", variants=5)
def tokenizer_text(folder, rng, v):
    (folder / "m" / ("tokenizer.json", "tokenizer_config.json")[v % 2]).write_bytes(
        (b"", b"[" * 10**5, b"[]", b"\xff\xfe", b"null")[v]
    )


@mutator("folder", variants=8)
def tokenizer_special(folder, rng, v):
    special(
        folder
        / "m"
        / ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")[v % 4],
        (0, 2)[v // 4],
    )


@mutator("folder", "any", variants=4)
def tokenizer_paths(folder, rng, v):
    (folder / "secret.model").write_text("secret")
    edit(
        folder / "m/tokenizer_config.json",
        **(
            {"vocab_file": str(folder / "secret.model")},
            {"tokenizer_file": "/dev/zero"},
            {
                "sp_model_kwargs": {"model_file": str(folder / "secret.model")},
                "tokenizer_class": "BarthezTokenizer",
            },
            {"auto_map": {"AutoTokenizer": ["evil.M", None]}},
        )[v],
    )
    (folder / "m/evil.py").write_text("import os; os.mkdir('canary')\nclass M: pass\n")


# --- safetensors


def _damage_header(path, rng, v):
    header, data = header_of(path)
    names = [name for name in header if name != "__metadata__"]
    one = header[rng.choice(names)]
    length = None
    if v == 0:
        length = 20 << 30
    elif v == 1:
        length = 2**63 - 1
    elif v == 2:
        one["data_offsets"] = [0, 10**12]
    elif v == 3:
        one["data_offsets"], one["shape"] = [len(data) - 4, 40 * 10**9], [10**10]
    elif v == 4:
        one["shape"] = [-1, 5]
    elif v == 5:
        one["shape"] = [True, True]
    elif v == 6:
        one["shape"] = [1e30]
    elif v == 7:
        one["shape"] = ["2", "3"]
    elif v == 8:
        one["shape"] = [[2], [3]]
    elif v == 9:
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    elif v == 10:
        one["dtype"] = odd(rng)
    elif v == 11:
        one["data_offsets"] = odd(rng)
    elif v == 12:
        header = b"[" * 50000
    elif v == 13:
        header = b'{"a":' * 50000
    elif v == 14:
        text = json.dumps(header)
        header = (text[:-1] + "," + json.dumps({names[0]: header[names[0]]})[1:]).encode()
    elif v == 15:
        header[names[0]] = odd(rng)
    elif v == 16:
        header = []
    elif v == 17:
        header = b"\xff" * 100
    elif v == 18:
        one["data_offsets"] = one["data_offsets"][::-1]
    elif v == 19:
        one["shape"] = [2**62, 2**62]
    elif v == 20:
        one["shape"] = [0] * 10**5
    elif v == 21:
        header["__metadata__"] = odd(rng)
    elif v == 22:
        one["data_offsets"] = [float(x) for x in one["data_offsets"]]
    elif v == 23:
        one["data_offsets"] = [-4, one["data_offsets"][1]]
    write_safetensors(path, header, data, length)


@mutator("folder", variants=24)
def header(folder, rng, v):
    _damage_header(folder / "m/model.safetensors", rng, v)


@mutator("weights_only", variants=24)
def header_weights_only(folder, rng, v):
    _damage_header(folder / "m/model.safetensors", rng, v)


@mutator("factory_st", variants=24)
def header_of_weights(folder, rng, v):
    _damage_header(folder / "w.safetensors", rng, v)


@mutator("weights_only", "any", variants=12)
def header_noise(folder, rng, v):
    path = folder / "m/model.safetensors"
    noise(path, rng, 4, 0.02)


def _consistent(path, rng):
    """Headers that fit their bytes, of tensors that are not what they were: other shapes, types, names."""
    header, data = header_of(path)
    names = [name for name in header if name != "__metadata__"]
    likely = [
        name for name in names if any(word in name for word in ("hc", "altup", "alpha", "beta", "scale"))
    ] or names
    for _ in range(3):
        name = rng.choice(likely)
        if name not in header:
            continue
        one = header[name]
        size = 1
        for n in one["shape"]:
            size *= n
        kind = rng.randrange(8)
        if kind == 0:
            one["shape"] = one["shape"][::-1]
        elif kind == 1:
            one["shape"] = [size]
        elif kind == 2:
            one["shape"] = [1, size, 1]
        elif kind == 3:
            one["shape"], one["data_offsets"] = [0, *one["shape"][1:]], [one["data_offsets"][0]] * 2
        elif kind == 4:
            one["dtype"] = rng.choice(["I32", "U32", "F32"])
        elif kind == 5:
            one["dtype"], one["shape"] = (
                "F16",
                [*one["shape"][:-1], 2 * one["shape"][-1]] if one["shape"] else [2],
            )
        elif kind == 6:
            header[name + rng.choice(["x", ".weight", ".0", ""])] = header.pop(name)
        else:
            del header[name]
    write_safetensors(path, header, data)


@mutator("weights_only", "any", variants=30)
def header_consistent(folder, rng, v):
    _consistent(folder / "m/model.safetensors", rng)


@mutator("gemma3n_weights", "any", variants=15)
def header_consistent_altup(folder, rng, v):
    _consistent(folder / "m/model.safetensors", rng)


@mutator("lucidrains_weights", "any", variants=20)
def header_consistent_lucidrains(folder, rng, v):
    _consistent(folder / "m.safetensors", rng)


@mutator("weights_only", "any", variants=14)
def weights_only_config_odd(folder, rng, v):
    config = json.loads((folder / "m/config.json").read_text())
    for key in ("hc_mult", "hc_eps", "hc_sinkhorn_iters", "model_type"):
        if rng.random() < 0.6:
            config[key] = odd(rng)
    (folder / "m/config.json").write_text(json.dumps(config))


@mutator("weights_only", variants=1)
def values_broken(folder, rng):
    header, data = header_of(folder / "m/model.safetensors")
    write_safetensors(folder / "m/model.safetensors", header, b"\xff" * len(data))


@mutator("folder", "any", variants=8)
def torn(folder, rng, v):
    path = folder / "m/model.safetensors"
    os.truncate(path, rng.randrange(path.stat().st_size))


@mutator("folder", variants=7)
def weights_special(folder, rng, v):
    special(folder / "m/model.safetensors", v)


@mutator("weights_only", variants=5)
def weights_only_special(folder, rng, v):
    special(folder / "m/model.safetensors", v)


@mutator("weights_only", variants=4)
def weights_only_config(folder, rng, v):
    path = folder / "m/config.json"
    if v == 0:
        special(path, 0)
    elif v == 1:
        path.write_text("[" * 10**5)
    elif v == 2:
        edit(path, hc_mult=10**400 if rng.random() < 0.5 else 10**30, hc_sinkhorn_iters=10**9)
    else:
        edit(path, hc_sinkhorn_iters=10**9, hc_eps=-1.0)


# --- indexes


def _damage_index(index: Path, rng, v, folder):
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    first, suffix = shards[0], Path(shards[0]).suffix

    def rename(new):
        content["weight_map"] = {k: new if f == first else f for k, f in content["weight_map"].items()}

    outside = folder / f"outside{suffix}"
    if v < 6:
        shutil.move(index.parent / first, outside)
    if v == 0:
        rename(f"../outside{suffix}")
    elif v == 1:
        rename(str(outside))
    elif v == 2:
        (index.parent / first).symlink_to(outside)
    elif v == 3:
        (index.parent / first).symlink_to(f"../outside{suffix}")
    elif v == 4:
        (index.parent / "sub").symlink_to(folder)
        rename(f"sub/outside{suffix}")
    elif v == 5:
        rename(f"./../m/../outside{suffix}")
    elif v == 6:
        rename("a\x00b" + suffix)
    elif v == 7:
        rename(odd(rng))
    elif v == 8:
        content["weight_map"] = odd(rng)
    elif v == 9:
        content = odd(rng)
    elif v == 10:
        index.write_bytes(b"[" * 10**6)
        return
    elif v == 11:
        index.write_bytes(bytes(rng.randrange(256) for _ in range(500)))
        return
    elif v == 12:
        rename("x" * 5000 + suffix)
    elif v == 13:
        special(index, 0)
        return
    elif v == 14:
        special(index.parent / first, 0)
    elif v == 15:
        special(index, 2)
        return
    elif v == 16:
        rename("C:\\Windows\\x" + suffix)
    elif v == 17:
        special(index.parent / first, 3)
    index.write_text(json.dumps(content))


@mutator("sharded", variants=18)
def index(folder, rng, v):
    _damage_index(folder / "m/model.safetensors.index.json", rng, v, folder)


@mutator("bin_sharded", variants=18)
def bin_index(folder, rng, v):
    _damage_index(folder / "m/pytorch_model.bin.index.json", rng, v, folder)


@mutator("weights_only_sharded", variants=18)
def index_weights_only(folder, rng, v):
    _damage_index(folder / "m/model.safetensors.index.json", rng, v, folder)


# --- pickles


class Evil:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def _damage_pickle(path: Path, rng, v):
    import torch

    if v == 0:
        torch.save({"a": Evil()}, path)
    elif v == 1:
        path.write_bytes(pickle.dumps({"a": Evil()}))
    elif v == 2:
        torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=False)
    elif v == 3:  # a compressed zip that declares a great deal
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("archive/data.pkl", pickle.dumps({}))
            with bomb.open("archive/data/0", "w", force_zip64=True) as entry:
                for _ in range(1024):
                    entry.write(bytes(1 << 20))
            bomb.writestr("archive/version", "3\n")
    elif v == 4:  # a small file whose entries are compressed
        source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for name in source.namelist():
                bomb.writestr(name, bytes(1 << 28) if name.endswith("data.pkl") else source.read(name))
    elif v == 5:  # a storage of 16 GiB in the legacy format
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(7777)}, buffer, _use_new_zipfile_serialization=False)
        path.write_bytes(
            buffer.getvalue()
            .replace(struct.pack("<H", 7777), struct.pack("<H", 7777))
            .replace(b"M" + struct.pack("<H", 7777), b"J" + struct.pack("<i", 2**31 - 1))
        )
    elif v == 6:
        os.truncate(path, path.stat().st_size // 2)
    elif v == 7:
        path.write_bytes(bytes(rng.randrange(256) for _ in range(3000)))
    elif v == 8:
        special(path, 0)
    elif v == 9:
        special(path, 2)
    elif v == 10:
        torch.save([1, 2], path)
    elif v == 11:
        torch.save({1: torch.zeros(2), (2, 3): torch.zeros(1)}, path)
    elif v == 12:
        path.write_bytes(b"\x80\x02" + b"(" * 10**6 + b".")
    elif v == 13:  # an expanded tensor: one number that is 10¹² elements
        torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)
    elif v == 14:
        deep: list = []
        for _ in range(150):
            deep = [deep]
        torch.save({"a": deep}, path)
    elif v == 15:  # tuples of tuples as a key: hashed 2⁴⁰ times
        path.write_bytes(
            b"\x80\x02"
            + b"}"
            + b")"
            + b"".join(b"q%c0h%c\x86" % (i + 1, i + 1) for i in ())
            + _nested_key(36)
            + b"K\x01s."
        )
    elif v == 16:
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    elif v == 17:
        path.write_bytes(b"")


def _nested_key(depth: int) -> bytes:
    # each step: memoise the tuple, get it again, and make a pair of both
    return b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


@mutator("bin", variants=18)
def pickled_folder(folder, rng, v):
    _damage_pickle(folder / "m/pytorch_model.bin", rng, v)


@mutator("factory_pt", variants=18)
def pickled_weights(folder, rng, v):
    _damage_pickle(folder / "w.pt", rng, v)


@mutator("factory_pt", "any", variants=10)
def pickle_noise(folder, rng, v):
    noise(folder / "w.pt", rng, 6)


@mutator("bin", "any", variants=8)
def bin_noise(folder, rng, v):
    noise(folder / "m/pytorch_model.bin", rng, 6, (0.1, 1.0)[v % 2])


# --- GGUF


@mutator("gguf", variants=14)
def gguf_header(folder, rng, v):
    path = folder / "m.gguf"
    data = bytearray(path.read_bytes())
    if v == 0:
        data[8:16] = struct.pack("<Q", 10**12)  # tensors
    elif v == 1:
        data[16:24] = struct.pack("<Q", 10**12)  # keys
    elif v == 2:
        data[24:32] = struct.pack("<Q", 2**62)  # length of the first key
    elif v == 3:
        at = data.find(b"tokenizer.ggml.tokens") + 21
        data[at + 8 : at + 16] = struct.pack("<Q", 10**11)  # array length
    elif v == 4:
        at = data.find(b"llama.block_count") + 17
        data[at + 4 : at + 8] = struct.pack("<I", 10**7)
    elif v == 5:
        at = data.find(b"llama.embedding_length") + 22
        data[at + 4 : at + 8] = struct.pack("<I", 2**31)
    elif v == 6:
        at = data.find(b"token_embd.weight") + 17
        data[at + 4 : at + 12] = struct.pack("<Q", 2**40)  # a dimension
    elif v == 7:
        at = data.find(b"token_embd.weight") + 17
        data[at : at + 4] = struct.pack("<I", 10**9)  # number of dimensions
    elif v == 8:
        data[4:8] = struct.pack("<I", 77)
    elif v == 9:
        del data[len(data) // 2 :]
    elif v == 10:
        del data[100:]
    elif v == 11:
        data[:] = bytes(rng.randrange(256) for _ in range(2000))
    elif v == 12:
        path.unlink()
        special(path, 0)
        return
    elif v == 13:
        at = data.find(b"llama.vocab_size") + 16
        data[at + 4 : at + 8] = struct.pack("<I", 2**31)
    path.write_bytes(data)


@mutator("gguf", "any", variants=12)
def gguf_noise(folder, rng, v):
    noise(folder / "m.gguf", rng, 5, 0.15)


# --- factories

BROKEN = [
    "def make(): return 1 / 0",
    "def make(:\n  pass",
    "import not_there_at_all",
    "import sys\ndef make(): sys.exit(3)",
    "raise SystemExit('bye')",
    "def make(): return make()",
    "def make(): raise MemoryError",
    "def make(): raise GeneratorExit",
    "def make(): assert False, 'sizes'",
    "from mymodel import nothing",
    "class E(Exception):\n    def __str__(self): raise ValueError('no words')\ndef make(): raise E()",
    "def make(): return None",
    "def make(): raise KeyError(('a', 1))",
    "x = [\n",
    "\tdef make(): pass",
    "import os\ndef make(): open('nowhere.txt')",
    "def make(): raise RuntimeError('a\\nb\\nc' * 1000)",
    "def make():\n    print('hello')\n    raise BaseException('odd')",
    "make = 5",
    "def make(a): pass",
    "import torch\ndef make(): return torch.nn.Linear(-5, 3)",
    "def make(): raise StopIteration",
    "raise ImportError('old version')",
    "def make(): raise BrokenPipeError",
    "def make():\n    raise OSError(2, 'No such file', 'x.bin')",
]


@mutator("factory", variants=len(BROKEN))
def factory(folder, rng, v):
    (folder / "mymodel.py").write_text(BROKEN[v])


FORWARDS = [
    "raise ValueError('my own')",
    "return 1 / 0",
    "return self.head(input_ids)",
    "import sys; sys.exit(1)",
    "return None.x",
    "raise KeyError(3)",
    "return self.forward(input_ids)",
    "raise MemoryError",
    "return undefined_name",
    "raise NotImplementedError",
    "raise StopIteration",
    "assert False",
]


@mutator("factory", "any", variants=9)
def odd_model(folder, rng, v):
    extra = (
        "    @property\n    def config(self): raise KeyError('c')",
        "    def state_dict(self, *a, **k): raise KeyError('s')",
        "    def parameters(self, *a): raise TypeError('p')",
        "    def eval(self): import sys; sys.exit(0)",
        "    def to(self, *a, **k): raise LookupError('t')",
        "    forward = 5",
        "    def named_modules(self, *a, **k): return 1 / 0",
        "    def __getattr__(self, name): raise RuntimeError(name)",
        "    @property\n    def training(self): raise KeyError('x')",
    )[v]
    (folder / "mymodel.py").write_text(FACTORY.replace("def make():", extra + "\ndef make():"))


@mutator("factory", variants=3)
def without_data(folder, rng, v):
    change = (
        "return Net().to('meta')",
        "m = Net(); m.extra = nn.LazyLinear(3); return m",
        "m = Net(); m.head.weight = None; return m",
    )[v]
    (folder / "mymodel.py").write_text(FACTORY.replace("return Net()", change))


@mutator("factory", variants=len(FORWARDS))
def forward(folder, rng, v):
    text = FACTORY.replace("x = self.embed(input_ids)", FORWARDS[v] + "\n        x = self.embed(input_ids)")
    (folder / "mymodel.py").write_text(text)


@mutator("factory", variants=6)
def factory_name(folder, rng, v):
    return [
        "describe",
        ("mymodel:", ":make", "mymodel:nothing", "my-model:make", "mymodel:make.x.y", "mymodel..a:make")[v],
    ]


# --- the spec itself and --text


@mutator("folder", variants=6)
def spec(folder, rng, v):
    special(folder / "x.gguf" if v % 2 else folder / "x", (0, 1, 2)[v // 2])
    return ["describe", "x.gguf" if v % 2 else "x"]


@mutator("folder", variants=5)
def spec_text(folder, rng, v):
    return ["describe", ("", "\x00", "x" * 5000, "m\x00", "/dev/zero")[v]]


@mutator("folder", variants=6)
def probe_text(folder, rng, v):
    special(folder / "t.txt", v)
    return ["probe", "m", "--text", "t.txt", "--out", "r.nc", "--no-gradients"]


@mutator("weights_only", variants=4)
def weights_only_spec(folder, rng, v):
    special(folder / "x.safetensors", v)
    return ["describe", "x.safetensors", "--weights-only"]


@mutator("factory_pt", variants=5)
def weights_spec(folder, rng, v):
    special(folder / "w.pt", v)


@mutator("folder", "accepted")
def hub_cache_layout(folder, rng):
    repository = folder / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/r1").mkdir(parents=True)
    for i, path in enumerate(sorted((folder / "m").iterdir())):
        shutil.move(path, repository / "blobs" / f"{i}")
        (repository / "snapshots/r1" / path.name).symlink_to(f"../../blobs/{i}")
    return ["describe", "models--a--b/snapshots/r1"]


@mutator("folder", "accepted")
def undamaged(folder, rng):
    return None


for _name in (
    "sharded",
    "bin",
    "bin_sharded",
    "weights_only",
    "weights_only_sharded",
    "factory",
    "factory_pt",
    "factory_st",
    "gguf",
):
    MUTATORS.append(Mutator(f"undamaged_{_name}", _name, "accepted", lambda folder, rng: None))
