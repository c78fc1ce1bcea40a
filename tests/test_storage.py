"""The reader of a checkpoint's files: what it takes, and one line for everything that it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsebert import storage

TENSORS = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16), "empty": torch.ones(0, 4)}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in one file."""
    place = tmp_path / "model"
    place.mkdir()
    save_file(TENSORS, place / storage.WEIGHTS, metadata={"format": "pt"})
    write(place / storage.CONFIG, {"model_type": "bert"})
    return place


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in two shards."""
    place = tmp_path / "sharded"
    place.mkdir()
    save_file({"a": torch.ones(2)}, place / "one.safetensors")
    save_file({"b": torch.ones(3)}, place / "two.safetensors")
    write(place / storage.INDEX, {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    return place


def write(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def refused(message, call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert message in str(error.value) and len(str(error.value)) < 1000
    assert str(error.value).isprintable()
    return str(error.value)


def read(folder):
    return storage.read_headers(storage.weight_files(folder))


# What is right


def test_headers_tell_dtype_and_shape_and_file(folder):
    found = read(folder)
    file = folder / storage.WEIGHTS
    assert found == {
        "a.weight": storage.Stored(file, "F32", (2, 3)),
        "a.bias": storage.Stored(file, "F16", (2,)),
        "empty": storage.Stored(file, "F32", (0, 4)),
    }
    assert [tensor.bytes for tensor in found.values()] == [TENSORS[name].nbytes for name in found]


def test_shards_are_read_together_and_an_index_beside_one_file_is_not(sharded):
    assert set(read(sharded)) == {"a", "b"}
    save_file({"c": torch.ones(1)}, sharded / storage.WEIGHTS)
    assert set(read(sharded)) == {"c"}


def test_every_dtype_that_torch_saves_is_known(tmp_path):
    dtypes = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
        torch.complex64,
    )  # fmt: skip
    save_file({str(dtype): torch.zeros(3, dtype=dtype) for dtype in dtypes}, tmp_path / storage.WEIGHTS)
    assert {tensor.bytes // 3 for tensor in read(tmp_path).values()} == {1, 2, 4, 8}


def test_a_configuration_like_those_of_others_is_taken(tmp_path):
    config = {
        "id2label": {str(i): f"label {i}" for i in range(20_000)},
        "num_hidden_layers": 48,
        "depths": [3, 4, 27, 3],
        "pad_token_id": -1,
        "max_relative_positions": -1,
        "layer_norm_eps": 1e-12,
        "attn_implementation": "sdpa",
        "layer_types": ["full_attention"] * 48,
        "text_config": {"hidden_size": 768, "dtype": None},
        "quantization_config": {"layers": {"a": {"in_features": 10**12}}},
    }
    write(tmp_path / storage.CONFIG, config)
    assert storage.read_config(tmp_path) == config


def test_the_cache_of_the_hub_links_to_its_blobs(folder, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, name in enumerate((storage.CONFIG, storage.WEIGHTS)):
        (folder / name).rename(cache / "blobs" / f"hash{number}")
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"hash{number}"))
    assert storage.read_config(snapshot) and len(read(snapshot)) == 3
    # A folder may be reached by a link; and files may be links inside it.
    (tmp_path / "link").symlink_to(snapshot)
    assert storage.read_config(tmp_path / "link") and len(read(tmp_path / "link")) == 3
    (snapshot / storage.CONFIG).unlink()
    (snapshot / storage.CONFIG).symlink_to(tmp_path / "elsewhere.json")
    write(tmp_path / "elsewhere.json", "{}")
    refused("leads out of its folder", storage.read_config, snapshot)


# Places


def out_of_folder(file):
    away = file.parent.parent / "away"
    file.rename(away)
    file.symlink_to(away)


def inside_folder(file):
    file.rename(file.parent / "other")
    file.symlink_to("other")


def fifo(file):
    file.unlink()
    os.mkfifo(file)


def to_folder(file):
    file.unlink()
    file.mkdir()


def dangling(file):
    file.unlink()
    file.symlink_to("gone")


def circular(file):
    file.unlink()
    file.symlink_to(file.name)


def device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


PLACES = {
    out_of_folder: "is a link that leads out of its folder, to ",
    fifo: "is a fifo, expected a regular file",
    to_folder: "is a folder, expected a regular file",
    dangling: "cannot be opened: No such file or directory",
    circular: "cannot be opened: ",
    device: "is a link that leads out of its folder, to /dev/zero",
}


@pytest.mark.parametrize("name", [storage.CONFIG, storage.WEIGHTS, storage.INDEX, "one.safetensors"])
@pytest.mark.parametrize("change", PLACES, ids=lambda change: change.__name__)
def test_only_regular_files_of_the_folder_are_read(folder, sharded, change, name):
    place = folder if name in (storage.CONFIG, storage.WEIGHTS) else sharded
    change(place / name)
    start = time.monotonic()
    said = refused(PLACES[change], storage.read_config if name == storage.CONFIG else read, place)
    assert said.startswith(f"{place / name}: ")
    assert time.monotonic() - start < 5


def test_a_link_within_the_folder_is_followed(folder):
    inside_folder(folder / storage.WEIGHTS)
    assert len(read(folder)) == 3


def test_files_that_are_not_there(tmp_path):
    refused(f"{tmp_path}: there is no config.json", storage.read_config, tmp_path)
    refused(f"{tmp_path}: there is no model.safetensors in it; expected a checkpoint", read, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("only 'pytorch_model.bin', a pickle, which is never read", read, tmp_path)


# JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\x80\x04}.", "not readable as JSON"),
        (b"\xff\xfe{\x00}\x00", "not readable as JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b"null", "holds a JSON NoneType, expected an object"),
        (b"[" * 100_000, "nested deeper than 32"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "nested deeper than 32"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands there twice"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not readable as JSON"),
        (b" " * (9 << 20), "9437184 bytes, expected at most 8388608"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"1]}", "items, expected at most 524288"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b',"0":1}', "the key '0' stands there twice"),
    ],
    ids=range(15),
)
def test_json_that_is_refused(tmp_path, content, message):
    (tmp_path / "file.json").write_bytes(content)
    start = time.monotonic()
    assert refused(message, storage.read_json, tmp_path / "file.json").startswith(f"{tmp_path / 'file.json'}: ")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776, expected at most 2147483648"),
        ({"a": {"b": [10**30]}}, "a.b.0 is beyond 64 bits, expected at most 2147483648"),
        ({"pad_token_id": -(1 << 40)}, "pad_token_id is -1099511627776"),
        *[({key: 10_001}, f"{key} is 10001, expected at most 10000") for key in (
            "num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_hidden_groups", "inner_group_num",
            "encoder_layers", "num_decoder_layers",
        )],
        ({"depths": [2, 20_000]}, "depths.1 is 20000, expected at most 10000"),
        ({"text_config": {"num_hidden_layers": 20_000}}, "text_config.num_hidden_layers is 20000"),
        ({"chunk_size_feed_forward": {}}, "chunk_size_feed_forward is {}, expected an integer"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1, expected a number of heads"),
        ({"num_labels": 1 << 30}, "num_labels is 1073741824, expected at most 262144"),
        ({"architectures": ["x"] * 300_000}, "architectures has 300000 items, expected at most 262144"),
        ({"id2label": dict.fromkeys(map(str, range(300_000)))}, "id2label has 300000 items"),
        ('{"layer_norm_eps": 1e999}', "layer_norm_eps is inf, expected a finite number"),
        ({"configuration_files": ["config.5.0.0.json"]}, "configuration_files names other files to read instead"),
        ({"attn_implementation": "evil/attention"}, "attn_implementation names code of another repository"),
        ({"text_config": {"_attn_implementation": {"": "evil/x"}}}, "_attn_implementation names code of another"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(tmp_path, config, message):
    write(tmp_path / storage.CONFIG, config)
    assert refused(message, storage.read_config, tmp_path).startswith(f"{tmp_path / storage.CONFIG}: ")


# The index


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors", "/one.safetensors", "a/one.safetensors", "a\\one.safetensors", "..\\one.safetensors",
        "C:\\one.safetensors", "C:one.safetensors", "\\\\host\\one.safetensors", "one.safetensors\0", "\0.safetensors",
        "one.safetensors/..", "one.bin", "one.safetensors.pt", "", ".", "..", ".safetensors", "one\n.safetensors",
        "x" * 5000 + ".safetensors",
    ],
)  # fmt: skip
def test_names_of_shards_that_are_refused(sharded, name):
    write(sharded / storage.INDEX, {"weight_map": {"a": "one.safetensors", "b": name}})
    refused("expected a safetensors file of the same folder", read, sharded)


@pytest.mark.parametrize("shards", [None, [], {}, {"a": 1}, {"a": None}, {"a": ["one.safetensors"]}, "one.safetensors"])
def test_indexes_that_are_refused(sharded, shards):
    write(sharded / storage.INDEX, {"weight_map": shards})
    refused("weight_map is malformed, expected an object of tensor name: file name", read, sharded)


def test_a_shard_that_is_not_there_and_a_tensor_in_two(sharded):
    save_file({"a": torch.ones(2)}, sharded / "two.safetensors")
    said = refused("holds a, which one.safetensors holds as well", read, sharded)
    assert said.startswith(f"{sharded / 'two.safetensors'}: ")
    (sharded / "two.safetensors").unlink()
    refused("weight_map names two.safetensors, which is not there", read, sharded)


# Safetensors files


def header(length=None, body=bytes(24), **entries):
    text = json.dumps({name.replace("_", "."): entry for name, entry in entries.items()}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


GOOD = header(a=entry())
FILES = {
    "empty": (b"", "it has 0 bytes"),
    "short": (b"1234", "it has 4 bytes"),
    "garbage": (b"\xff" * 64, "its header claims 18446744073709551615 bytes, expected at most 8388608"),
    "header too large": ((9 << 20).to_bytes(8, "little") + b" " * (9 << 20), "its header claims 9437184 bytes"),
    "header truncated": (GOOD[:30], "but the file has only 30 in all"),
    "data truncated": (GOOD[:-1], "its tensors take 24 bytes, but 23 follow the header"),
    "more data": (GOOD + b"\0", "its tensors take 24 bytes, but 25 follow the header"),
    "pickle": (b"\x80\x04\x95" + b"\xff" * 60, "it is a pickle or zip file, which is never read"),
    "zip": (b"PK\x03\x04" + b"\xff" * 60, "it is a pickle or zip file, which is never read"),
    "no header": (bytes(8), "its header does not start with '{'"),
    "header is a list": ((2).to_bytes(8, "little") + b"[]", "its header does not start with '{'"),
    "header is no JSON": ((2).to_bytes(8, "little") + b"{x", "its header is not readable as JSON"),
    "header is deep": ((50_000).to_bytes(8, "little") + b'{"a":' * 10_000, "nested deeper than 32"),
    "tensor twice": (
        (lambda one: (2 * len(one) + 4).to_bytes(8, "little") + b"{" + one + b", " + one + b"}" + bytes(24))(
            b'"a": ' + json.dumps(entry()).encode()
        ),
        "the key 'a' stands there twice",
    ),
    "entry is a list": (header(a=[]), "a is described by [], expected dtype, shape and data_offsets"),
    "entry has more": (header(a=entry(x=1)), "expected dtype, shape and data_offsets"),
    "unknown dtype": (header(a_weight=entry(dtype="F4")), "a.weight is 'F4', expected one of F64"),
    "dtype is a list": (header(a=entry(dtype=[])), "a is [], expected one of F64"),
    "negative size": (header(a=entry(shape=[-2, -3])), "a has shape [-2, -3], expected a list of sizes"),
    "boolean size": (header(a=entry(shape=[True, 6])), "a has shape [True, 6]"),
    "shape is a number": (header(a=entry(shape=6)), "a has shape 6"),
    "absurd shape": (header(a=entry(shape=[1 << 40, 1 << 40])), "a has 24 bytes, expected 4835703278458516698824704"),
    "size overflows": (header(a=entry(shape=[1 << 63])), "a has shape [9223372036854775808]"),
    "too many dimensions": (header(a=entry(shape=[1] * 1000)), "a has shape [1, 1, "),
    "shape does not fit": (header(a=entry(shape=[2, 4])), "a has 24 bytes, expected 32 for F32 of shape (2, 4)"),
    "offsets backwards": (header(a=entry(data_offsets=[24, 0])), "a has -24 bytes, expected 24"),
    "offsets negative": (header(a=entry(data_offsets=[-24, 0])), "a has data_offsets [-24, 0]"),
    "one offset": (header(a=entry(data_offsets=[0])), "a has data_offsets [0], expected two positions"),
    "gap": (header(a=entry(data_offsets=[4, 28]), body=bytes(28)), "a starts at byte 4 of the data, expected 0"),
    "overlap": (
        header(a=entry(), b=entry(data_offsets=[8, 32]), body=bytes(32)),
        "b starts at byte 8 of the data, expected 24",
    ),
    "name of two lines": (header(**{"a\nb": entry()}), "'a\\nb' is no name of a tensor"),
    "endless name": (header(**{"a" * 5000: entry()}), "is no name of a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_of_tensors_that_are_refused(folder, case):
    content, message = FILES[case]
    (folder / storage.WEIGHTS).write_bytes(content)
    assert refused(message, read, folder).startswith(f"{folder / storage.WEIGHTS}: ")


def test_a_good_file_by_hand_is_taken(folder):
    (folder / storage.WEIGHTS).write_bytes(GOOD)
    assert read(folder) == {"a": storage.Stored(folder / storage.WEIGHTS, "F32", (2, 3))}


def test_memory_stays_small_whatever_a_file_claims(tmp_path):
    """The worst that 8 MiB can do: items that are cheap to write and dear to hold, up to the limit."""
    (tmp_path / storage.CONFIG).write_bytes(b'{"a": [' + b"{}," * 260_000 + b"{}]}")
    names = b",".join(b'"%d":{}' % i for i in range(260_000))
    (tmp_path / storage.WEIGHTS).write_bytes((len(names) + 2).to_bytes(8, "little") + b"{" + names + b"}")
    code = (
        "import resource, sys\n"
        "from sparsebert import storage\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak()\n"
        "for call in (storage.read_config, lambda folder: storage.read_headers(storage.weight_files(folder))):\n"
        "    try: call(sys.argv[1])\n"
        "    except ValueError as error: pass\n"
        "print(peak() - before)\n"
    )
    root = Path(storage.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200


def test_no_file_stays_open(folder):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    read(folder)
    for content, message in FILES.values():
        (folder / storage.WEIGHTS).write_bytes(content)
        refused(message, read, folder)
    assert len(os.listdir("/proc/self/fd")) == before
