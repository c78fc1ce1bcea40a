"""A fuzz of the loader: packed checkpoints, damaged at random, each to be refused in one line or loaded exactly.

    python benchmarks/fuzz_checkpoints.py --count 100000 --seed 0 --processes 2 --out fuzz.json
    python benchmarks/fuzz_checkpoints.py --seed 0 --case 4711      # one case again, with its traceback

A case copies a small checkpoint, damages it in one to three ways (bytes of any file; tensors and headers of safetensors
files; values of config.json and of the shard index) and calls ``sparsebert.load_pretrained``. It is

- ``refused``: ``ValueError``, ``OSError`` or an error of safetensors, of one line;
- ``loaded``: and then an oracle of its own, which shares no code with the loader, finds in the model exactly the
  tensors and the layer map of the files, and the model runs;
- ``failure``: anything else, which is another exception, a message of several lines, a crash, more than 10 s, more
  than 512 MiB of memory, or a model that is not what the files say.

Case i depends on the seed and i alone. Cases run in processes of their own, so that a crash costs one case. Exits with
1 where a case fails.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Threads would only start and stop for tensors of a few bytes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sparsebert as sb  # noqa: E402

# One checkpoint is damaged for each, and nothing else here depends on a format.
CONFIGS = [
    sb.NMConfig(2, 4),
    sb.NMConfig(1, 4),
    sb.NMConfig(2, 4, columns=0.5),
    sb.BitmapConfig(0.3),
    sb.LowRankConfig(rank=3),
    sb.LowRankSparseConfig(rank=2, sparse=sb.RowsConfig(0.2)),
    sb.LowRankSparseConfig(rank=2, sparse=sb.NMConfig(1, 4)),
    sb.LowRankSparseConfig(rank=2, sparse=sb.BitmapConfig(0.1)),
    sb.Int8Config(),
    sb.Int8Config("static"),
    sb.Int8Config("dynamic", sb.NMConfig(2, 4)),
    sb.DenseConfig(),
    {"output": sb.NMConfig(2, 4, columns=0.5)},
]

SIZES = dict(
    vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=12, pad_token_id=0,
)  # fmt: skip
SECONDS = 10
GROWTH = 512 << 20
REFUSALS = (ValueError, OSError, safetensors.SafetensorError)
OUTCOMES = ("refused", "loaded", "failure")

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SIZE = {name: dtype.itemsize for name, dtype in TORCH.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
Tensors = dict[str, tuple[str, list[int], bytes]]


# Checkpoints to damage


def make_checkpoints(folder: Path) -> list[Path]:
    """A small packed checkpoint for each of ``CONFIGS``, and the first once more in shards."""
    made = []
    for number, config in enumerate(CONFIGS):
        torch.manual_seed(number)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
        sb.compress_(model, config)
        if getattr(config, "activations", None) == "static":
            sb.calibrate(model, [torch.arange(SIZES["vocab_size"]).view(2, -1)])
        made.append(folder / str(number))
        model.save_pretrained(made[-1])
        if not number:
            made.append(folder / "sharded")
            model.save_pretrained(made[-1], max_shard_size="4KB")
    return made


def read_safetensors(data: bytes) -> Tensors:
    """Name -> dtype, shape, bytes. A parser of the fuzz's own, for files that are well formed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def header_of(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def write_safetensors(file: Path, header: dict[str, Any] | str, body: bytes, length: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


# Damage: each function changes the folder, and is one kind


def damage_bytes(rng: random.Random, folder: Path) -> str:
    file = pick_file(rng, folder, "*")
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) + 1)
    if data and rng.random() < 0.5:
        # Most of a file is tensors; what is hard to read is at its start.
        at = rng.randrange(min(len(data), 400))
    kind = rng.choice(["flip", "truncate", "insert", "zeros", "delete", "append", "empty", "cut", "swap"])
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            if data:
                data[rng.choice([min(at, len(data) - 1), rng.randrange(len(data))])] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 16))
    elif kind == "zeros":
        end = min(len(data), at + rng.randint(1, 64))
        data[at:end] = bytes(end - at)
    elif kind == "append":
        data += rng.randbytes(rng.randint(1, 16))
    elif kind == "empty":
        data.clear()
    elif kind == "cut":
        del data[at : at + rng.randint(1, 64)]
    elif kind == "swap":
        data[:] = pick_file(rng, folder, "*").read_bytes()
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(data)
    return f"bytes: {kind}"


def damage_values(rng: random.Random, folder: Path) -> str:
    file, tensors = pick_tensors(rng, folder)
    name = pick_tensor(rng, folder, tensors)
    dtype, shape, data = tensors[name]
    changed = bytearray(data)
    size = SIZE[dtype]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) // size) * size
        changed[at : at + size] = extreme(rng, dtype, changed[at : at + size])
    tensors[name] = (dtype, shape, bytes(changed))
    write_safetensors(file, *header_of(tensors))
    return "tensor: values"


def extreme(rng: random.Random, dtype: str, old: bytes) -> bytes:
    if dtype in FLOATS:
        kind = TORCH[dtype]
        limits = torch.finfo(kind)
        values = [math.nan, math.inf, -math.inf, -0.0, 0.0, limits.max, limits.min, limits.smallest_normal / 4, 1.0]
        one = torch.tensor([rng.choice(values)], dtype=kind)
        return bytes(one.view(torch.uint8).tolist())
    size = len(old)
    whole = int.from_bytes(old, "little")
    top = 1 << 8 * size
    values = [0, top - 1, top // 2, top // 2 - 1, whole + 1, whole - 1, whole ^ 1 << rng.randrange(8 * size)]
    return (rng.choice([*values, rng.randrange(top)]) % top).to_bytes(size, "little")


def damage_tensors(rng: random.Random, folder: Path) -> str:
    file, tensors = pick_tensors(rng, folder)
    name = pick_tensor(rng, folder, tensors)
    dtype, shape, data = tensors[name]
    kind = rng.choice(["dtype", "shape", "drop", "rename", "duplicate", "add", "exchange"])
    if kind == "dtype":
        new = rng.choice([other for other in SIZE if other != dtype])
        same = [other for other in SIZE if other != dtype and SIZE[other] == SIZE[dtype]]
        if same and rng.random() < 0.5:
            new = rng.choice(same)
        if new in FLOATS and dtype in FLOATS and rng.random() < 0.5:
            values = torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).to(TORCH[new])
            tensors[name] = (new, shape, bytes(values.view(torch.uint8).tolist()))
        else:
            tensors[name] = (new, shape, fit(data, math.prod(shape) * SIZE[new]))
    elif kind == "shape":
        shape = list(shape)
        way = rng.randrange(5)
        if way == 0 and shape:
            at = rng.randrange(len(shape))
            shape[at] = max(0, shape[at] + rng.choice([-shape[at], -1, 1, shape[at]]))
        elif way == 1:
            shape.insert(rng.randint(0, len(shape)), 1)
        elif way == 2:
            shape = [math.prod(shape)]
        elif way == 3:
            shape.reverse()
        else:
            shape = [rng.randrange(5) for _ in range(rng.randrange(5))]
        tensors[name] = (dtype, shape, fit(data, math.prod(shape) * SIZE[dtype]))
    elif kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[new_name(rng, name, tensors)] = tensors.pop(name)
    elif kind == "duplicate":
        tensors[new_name(rng, name, tensors)] = tensors[name]
    elif kind == "add":
        tensors[rng.choice(["stray", "bert.stray", f"{name}.more", "", "a\nb"])] = ("F32", [2], bytes(8))
    else:
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    write_safetensors(file, *header_of(tensors))
    return f"tensor: {kind}"


def fit(data: bytes, size: int) -> bytes:
    return (data * (size // max(1, len(data)) + 1))[:size].ljust(size, b"\0")


def new_name(rng: random.Random, name: str, tensors: Tensors) -> str:
    return rng.choice(
        [
            f"{name}x", name[1:], name.removeprefix("bert."), f"bert.{name}", name.replace("weight", "gamma"),
            name.replace("LayerNorm.bias", "LayerNorm.beta"), f"module.{name}", name.upper(), name.replace("0", "1"),
            f"{name.rpartition('.')[0]}.weight", rng.choice(list(tensors)),
        ]
    )  # fmt: skip


def damage_header(rng: random.Random, folder: Path) -> str:
    file, tensors = pick_tensors(rng, folder)
    header, body = header_of(tensors)
    name = pick_tensor(rng, folder, tensors)
    entry = header[name]
    length = None
    kind = rng.choice(["offsets", "shape", "dtype", "length", "metadata", "entry", "twice", "weird", "spaces"])
    if kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] = rng.choice([0, -1, 1, 1 << 31, 1 << 63, 1 << 70, len(body), 8, 0.5])
    elif kind == "shape":
        entry["shape"] = rng.choice([[1 << 40, 1 << 40], [-1], [0], [1 << 63], [True], ["16"], None, [16.0], [[16]]])
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F8_E4M3", "F4", "U128", "", None, 7, "float32", "f32", "C64", "U16"])
    elif kind == "length":
        length = rng.choice([0, 1, 2, 8, 1 << 20, 8 << 20, (8 << 20) + 1, 1 << 40, (1 << 64) - 1, len(body)])
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([None, {}, {"format": "tf"}, {"format": 1}, [], "x", {"a": {"b": "c"}}])
    elif kind == "entry":
        header[name] = weird(rng)
    elif kind == "weird":
        change_json(rng, header)
    text = json.dumps(header)
    if kind == "twice":
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}"
    elif kind == "spaces":
        text = " " * rng.randrange(3) + text + " " * rng.randrange(9)
    write_safetensors(file, text, body, length)
    return f"header: {kind}"


def damage_config(rng: random.Random, folder: Path) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_bytes())
    layers = config["quantization_config"]["layers"]
    kind = rng.choice(["any", "any", "add", "layer", "layer", "layer", "swap", "rename", "map", "text"])
    text = None
    if kind == "any":
        change_json(rng, config)
    elif kind == "add":
        config[rng.choice(KEYS)] = weird(rng)
    elif kind == "layer":
        path = rng.choice(list(layers))
        key = rng.choice([*layers[path], "columns", "rank", "rows", "nnz", "activations", "stray"])
        old = layers[path].get(key)
        near = [old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old)] if type(old) is int else []
        layers[path][key] = rng.choice([*near, *near, weird(rng), rng.choice(["float16", "dense", "query", "F32"])])
    elif kind == "swap":
        one, other = rng.choice(list(layers)), rng.choice(list(layers))
        layers[one], layers[other] = layers[other], layers[one]
    elif kind == "rename":
        path = rng.choice(list(layers))
        others = [f"{path}x", path.removeprefix("bert."), path.replace("0", "9"), "", "bert", "classifier", "a\nb"]
        others += ["bert.embeddings.LayerNorm", "bert.pooler.dense", "..", rng.choice(list(layers)), path + "." + path]
        layers[rng.choice(others)] = layers.pop(path) if rng.random() < 0.5 else layers[path]
    elif kind == "map":
        config["quantization_config"][rng.choice(["quant_method", "format_version", "layers", "self", "x"])] = weird(
            rng
        )
    else:
        text = json.dumps(config)
        key = json.dumps(rng.choice(list(config)))
        text = rng.choice(
            [
                f"{text[:-1]}, {key}: 1}}", "[" * 5000, '{"a":' * 5000, text.replace("0", "NaN", 1), f"\ufeff{text}",
                text.replace('"', "'"), f"[{text}]", f"{text}{text}", text.replace("16", "1" * 5000, 1), "null", "{}",
                text.replace("}", ",}", 1), text.replace("0.1", "1e999"),
            ]
        )  # fmt: skip
    file.write_text(json.dumps(config) if text is None else text)
    return f"config: {kind}"


def damage_index(rng: random.Random, folder: Path) -> str:
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return damage_config(rng, folder)
    index = json.loads(file.read_bytes())
    names = index["weight_map"]
    kind = rng.choice(["any", "move", "drop", "path", "rename"])
    name = rng.choice(list(names))
    if kind == "any":
        change_json(rng, index)
    elif kind == "move":
        names[name] = rng.choice(list(names.values()))
    elif kind == "drop":
        gone = names[name]
        index["weight_map"] = {key: shard for key, shard in names.items() if shard != gone and key != name}
    elif kind == "path":
        shard = names[name]
        tricks = [f"../{shard}", f"./{shard}", f"/tmp/{shard}", f"a\\{shard}", f"{shard}\0", f"C:{shard}", "x", "", "."]
        names[name] = rng.choice([*tricks, f"{shard}.bin", "config.json", "a" * 5000 + ".safetensors", shard.upper()])
    else:
        names[f"{name}x"] = names.pop(name)
    file.write_text(json.dumps(index))
    return f"index: {kind}"


KEYS = (
    "num_hidden_layers", "num_labels", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings",
    "type_vocab_size", "num_attention_heads", "id2label", "label2id", "dtype", "torch_dtype", "architectures",
    "model_type", "auto_map", "attn_implementation", "_attn_implementation", "transformers_weights", "fusion_config",
    "configuration_files", "tie_word_embeddings", "is_decoder", "add_cross_attention", "is_encoder_decoder",
    "return_dict", "output_attentions", "output_hidden_states", "problem_type", "chunk_size_feed_forward",
    "layer_norm_eps", "hidden_act", "pad_token_id", "initializer_range", "classifier_dropout", "use_cache",
    "position_embedding_type", "pruned_heads", "sub_configs", "text_config", "name_or_path", "_name_or_path", "self",
    "transformers_version", "quantization_config", "kernel_config", "tp_plan", "_commit_hash", "task_specific_params",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "generation_config", "base_model_tp_plan", "layer_types",
)  # fmt: skip


def weird(rng: random.Random) -> Any:
    deep: Any = 1
    for _ in range(rng.choice([3, 100])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice(
        [
            None, True, False, 0, 1, 2, 3, 4, 7, 17, -1, 1000, 10_001, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 31) + 1,
            1 << 63, 10**30, -(1 << 40), 0.5, 2.0, 1e300, -0.0, math.nan, math.inf, "", "x", "16", "../x", "a/b",
            "a\nb", "float16", "bfloat16", "int8", "relu", "BertModel", "BertForMaskedLM", "roberta", "a" * 5000, [],
            [1], [[]], ["x"] * 3, list(range(2000)), {}, {"a": 1}, {"0": "x", "1": "y", "2": "z"}, {"": None}, deep,
        ]
    )  # fmt: skip


def change_json(rng: random.Random, data: dict[str, Any]) -> None:
    """One value of the tree is deleted, replaced, renamed or copied to another place."""
    places: list[tuple[Any, Any]] = []
    todo: list[Any] = [data]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            places += [(value, key) for key in value]
            todo += value.values()
        elif isinstance(value, list):
            places += [(value, key) for key in range(len(value))]
            todo += value
    holder, key = rng.choice(places)
    way = rng.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice([f"{key}x", "", key[1:], rng.choice(KEYS)])] = holder.pop(key)
    elif way == 2:
        other, where = rng.choice(places)
        # A copy, since a tree that holds itself cannot be written.
        holder[key] = json.loads(json.dumps(other[where]))
    else:
        holder[key] = weird(rng)


DAMAGE: list[tuple[int, Callable[[random.Random, Path], str]]] = [
    (3, damage_bytes), (3, damage_values), (4, damage_tensors), (2, damage_header), (6, damage_config),
    (1, damage_index),
]  # fmt: skip


def pick_file(rng: random.Random, folder: Path, pattern: str) -> Path:
    return rng.choice(sorted(folder.glob(pattern)))


def pick_tensors(rng: random.Random, folder: Path) -> tuple[Path, Tensors]:
    file = pick_file(rng, folder, "*.safetensors")
    return file, read_safetensors(file.read_bytes())


def pick_tensor(rng: random.Random, folder: Path, tensors: Tensors) -> str:
    """Rather one of a packed layer, of which there are few."""
    layers = json.loads((folder / "config.json").read_bytes())["quantization_config"]["layers"]
    packed = [name for name in tensors if any(name.startswith(f"{path}.") for path in layers)]
    name = rng.choice(packed if packed and rng.random() < 0.7 else list(tensors))
    return name if tensors[name][2] else rng.choice([other for other in tensors if tensors[other][2]])


# A case and its verdict


class Silent(Exception):
    """A model was loaded that is not what the files say."""


def run_case(seed: int, number: int, checkpoints: list[Path], scratch: Path) -> dict[str, Any]:
    """Outcome, kinds of damage, and for a failure why."""
    rng = random.Random(f"{seed}/{number}")
    folder = scratch / f"case{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    base = rng.choice(checkpoints)
    shutil.copytree(base, folder)
    kinds = []
    for _ in range(rng.randint(1, 3)):
        damage = rng.choices([damage for _, damage in DAMAGE], [weight for weight, _ in DAMAGE])[0]
        try:
            kinds.append(damage(rng, folder))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, OverflowError, RecursionError):
            # Damaged before in a way that leaves nothing for this one to work on.
            kinds.append("nothing")
    row: dict[str, Any] = {"case": number, "base": base.name, "kinds": kinds, "outcome": "failure"}
    start = peak_memory(reset=True)
    try:
        model = sb.load_pretrained(folder)
    except REFUSALS as error:
        row["message"] = str(error)
        if "\n" in str(error) or not str(error).strip() or len(str(error)) > 2000:
            row["why"] = "the message is not one line"
            row["traceback"] = traceback.format_exc()
        else:
            row["outcome"] = "refused"
    except Exception as error:
        row["why"] = f"{type(error).__name__}: {error}"[:500]
        row["traceback"] = traceback.format_exc()
    else:
        try:
            check_loaded(model, folder)
            row["outcome"] = "loaded"
        except Exception as error:
            row["why"] = f"loaded, but {type(error).__name__}: {error}"[:500]
            row["traceback"] = traceback.format_exc()
    if (growth := peak_memory() - start) > GROWTH:
        row.update(outcome="failure", why=f"took {growth >> 20} MiB of memory", traceback="")
    return row


def peak_memory(reset: bool = False) -> int:
    """Peak resident bytes of this process, after ``reset`` those of now, where the system can."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def check_loaded(model: Any, folder: Path) -> None:
    """The oracle: ``Silent`` unless the model holds exactly the tensors and the layer map of the files, and runs."""
    files = [folder / "model.safetensors"]
    if not files[0].exists():
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        files = [folder / name for name in set(index["weight_map"].values())]
    stored: Tensors = {}
    for file in files:
        stored.update(read_safetensors(file.read_bytes()))
    layers = json.loads((folder / "config.json").read_bytes())["quantization_config"]["layers"]
    loaded = model.config.quantization_config.layers
    if (want := comparable(layers)) != (have := comparable(loaded)):
        raise Silent(f"layer map {have}, expected {want}")
    state = model.state_dict()
    own = {own_name(name, state): tensor for name, tensor in stored.items()}
    if own.keys() != state.keys() or len(own) != len(stored):
        raise Silent(f"tensors differ: {sorted(own.keys() ^ state.keys())}")
    again: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for name, (dtype, shape, data) in own.items():
        want_tensor, have_tensor = as_tensor(dtype, shape, data), state[name]
        packed = any(name.startswith(f"{path}.") for path in loaded)
        if packed and dtype in FLOATS and want_tensor.dtype != have_tensor.dtype:
            # A cast may round weights to zero, and so move what is stored beside them: compared as it was written.
            again[want_tensor.dtype] = {}
    for dtype in again:
        again[dtype] = sb.load_pretrained(folder, dtype=dtype).state_dict()
    for name, (dtype, shape, data) in own.items():
        tensor = as_tensor(dtype, shape, data)
        casts = [state, *again.values()]
        if not any(same(tensor, cast[name]) for cast in casts):
            if dtype not in FLOATS or not any(same(tensor.to(cast[name].dtype), cast[name]) for cast in casts):
                raise Silent(f"{name} is not what the file holds")
    rows = state["bert.embeddings.word_embeddings.weight" if "classifier.weight" in state else next(iter(state))].shape[
        0
    ]
    with torch.inference_mode():
        # What config.json asks to be given out besides is no part of the model.
        plain = dict(output_hidden_states=False, output_attentions=False, return_dict=True)
        # Tokens go through the feed-forward net in chunks of this many, and have to be a multiple of it.
        chunk = getattr(model.config, "chunk_size_feed_forward", 0)
        if chunk > SIZES["max_position_embeddings"]:
            return
        got = model(torch.arange(chunk if chunk > 0 else 6)[None] % rows, **plain)[0]
    if "classifier.weight" in state and tuple(got.shape) != (1, state["classifier.weight"].shape[0]):
        raise Silent(f"the output has shape {tuple(got.shape)}")


def comparable(layers: dict[str, Any]) -> dict[str, Any]:
    """What the map says, but for the prefix of the base model, and the dtype: there the tensors count."""
    return {
        path.removeprefix("bert."): {key: value for key, value in entry.items() if key != "dtype" and value is not None}
        for path, entry in layers.items()
    }


def own_name(name: str, state: dict[str, Any]) -> str:
    """transformers knows tensors by older names, and with or without the prefix of the base model."""
    now = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return next((x for x in (name, now, f"bert.{now}", now.removeprefix("bert.")) if x in state), name)


def as_tensor(dtype: str, shape: list[int], data: bytes) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=TORCH[dtype]) if data else torch.empty(0, dtype=TORCH[dtype])
    return flat.reshape(shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other)))


# Processes


def quiet() -> None:
    """Nothing on the screen but what this program writes, and one thread."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def work(pipe: Connection, seed: int, checkpoints: list[Path], scratch: Path) -> None:
    """A worker: takes case numbers, says that it starts one, and answers with its row."""
    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # An absurd allocation is to fail here, not to take the machine down.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if _LINUX else 0
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), size + (4 << 30)))
    # The first load imports the model's module, which is no growth of a case's own.
    for checkpoint in checkpoints:
        sb.load_pretrained(checkpoint)
    pipe.send_bytes(b"null")
    while (number := json.loads(pipe.recv_bytes())) is not None:
        pipe.send_bytes(json.dumps(run_case(seed, number, checkpoints, scratch)).encode())


_LINUX = sys.platform == "linux"


class Worker:
    """A process with the case it is at; started anew after each crash."""

    def __init__(self, seed: int, checkpoints: list[Path], scratch: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, seed, checkpoints, scratch), daemon=True)
        self.process.start()
        theirs.close()
        self.case: int | None = None
        self.since = time.monotonic()

    def give(self, number: int | None) -> None:
        self.case, self.since = number, time.monotonic()
        self.pipe.send_bytes(json.dumps(number).encode())

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(seed: int, numbers: Iterator[int], processes: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The row of every case, in the order in which they are done."""
    (folder / "made").mkdir()
    checkpoints = make_checkpoints(folder / "made")
    new = lambda: Worker(seed, checkpoints, folder)  # noqa: E731
    workers = [new() for _ in range(processes)]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers], timeout=0.5)
            for place, worker in reversed(list(enumerate(workers))):
                # A new process imports torch first.
                limit = SECONDS if worker.case is not None else 120
                row, gone = None, None
                if worker.pipe in ready:
                    try:
                        row = json.loads(worker.pipe.recv_bytes())
                    except (EOFError, OSError):
                        worker.process.join(5)
                        gone = f"the process died with exit code {worker.process.exitcode}"
                elif time.monotonic() - worker.since > limit:
                    gone = f"not done after {limit} s"
                else:
                    continue
                if gone is not None:
                    if worker.case is None:
                        raise RuntimeError(f"a worker did not start: {gone}")
                    yield {"case": worker.case, "kinds": [], "outcome": "failure", "why": gone, "traceback": ""}
                    worker.end()
                    workers[place] = new()
                    continue
                if row is not None:
                    yield row
                if (number := next(numbers, None)) is None:
                    worker.give(None)
                    worker.process.join(10)
                    worker.end()
                    del workers[place]
                else:
                    worker.give(number)
    finally:
        for worker in workers:
            worker.end()


def summarize(rows: Iterator[dict[str, Any]], count: int, started: float) -> dict[str, Any]:
    outcomes, kinds = Counter[str](), dict[str, Counter[str]]()
    messages = Counter[str]()
    failures = []
    shown = time.monotonic()
    for done, row in enumerate(rows, 1):
        outcomes[row["outcome"]] += 1
        for kind in set(row["kinds"]):
            kinds.setdefault(kind, Counter())[row["outcome"]] += 1
        if row["outcome"] == "failure":
            failures.append(row)
            print(f"\ncase {row['case']}: {row['why']}", file=sys.stderr)
        elif "cannot be loaded as" in row.get("message", ""):
            # Refused by transformers' failing, not by a check of the loader.
            messages["refused by an error of transformers or torch"] += 1
        if time.monotonic() - shown > 1 or done == count:
            shown = time.monotonic()
            rate = done / (shown - started)
            left = (count - done) / rate
            text = f"{done}/{count} cases, {len(failures)} failures, {rate:.0f} a second, {left:.0f} s left"
            print(f"\r{text:<79}", end="\n" if done == count else "", file=sys.stderr, flush=True)
    return {
        "cases": sum(outcomes.values()),
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
        "by_kind": {kind: {name: kinds[kind][name] for name in OUTCOMES} for kind in sorted(kinds)},
        **messages,
        "failures": failures,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="number of cases (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first case's number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the summary")
    parser.add_argument("--case", type=int, help="run this case alone, in this process, and keep its folder")
    options = parser.parse_args(arguments)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    if options.case is not None:
        quiet()
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        checkpoints = make_checkpoints(folder)
        row = run_case(options.seed, options.case, checkpoints, folder)
        print(json.dumps({key: value for key, value in row.items() if key != "traceback"}, indent=2))
        print(row.get("traceback", ""), f"the checkpoint: {folder}", sep="\n")
        return row["outcome"] == "failure"
    started = time.monotonic()
    quiet()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as name:
        numbers = iter(range(options.first, options.first + options.count))
        result = summarize(run(options.seed, numbers, options.processes, Path(name)), options.count, started)
    seconds = time.monotonic() - started
    result = {
        "command": f"python benchmarks/fuzz_checkpoints.py {' '.join(arguments or sys.argv[1:])}",
        "seed": options.seed,
        "configs": [repr(config) for config in CONFIGS],
        "seconds": round(seconds, 1),
        "cases_per_second": round(options.count / seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "sparsebert": sb.__version__,
        },
        **result,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key not in ("failures", "by_kind")}, indent=2))
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
