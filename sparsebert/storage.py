"""A checkpoint's files, read as if they were hostile: JSON, the shard index and safetensors headers, but no tensor.

Whatever is refused is refused with one ``ValueError`` line that names the file. Only regular files of bounded size are
opened, so nothing here hangs or takes memory in proportion to what a file claims. Knows the standard library alone, so
that the command line can look at a checkpoint without loading transformers.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# BERT-large with every layer packed has a config.json of about 100 kB; a safetensors header takes about 100 bytes a
# tensor.
MAX_JSON_BYTES = 8 << 20
MAX_HEADER_BYTES = 8 << 20
# A parsed `[]` takes twenty times its text, so that bytes alone bound no memory.
_MAX_ITEMS = 1 << 19
_MAX_DEPTH = 32
_MAX_INTEGER = 1 << 31
# Extreme classification has so many labels; BERT has none of the other lists.
_MAX_LENGTH = 1 << 18
_MAX_LAYERS = 10_000
_MAX_NAME = 512

# Bytes of one element, by dtype as safetensors writes it.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip

# Every module of a layer is built before a tensor is looked at, so their number must not be the file's to choose.
_LAYER_COUNTS = re.compile(
    r"((num|n)_)?([a-z]+_)*(layers?|blocks?|depths?|stages?)|num_hidden_groups|inner_group_num|block_(sizes|repeats)"
)
# transformers takes anything here, and fails when the model runs.
_INTEGERS = ("chunk_size_feed_forward",)
_LABEL_COUNTS = ("num_labels", "_num_labels")
# transformers reads such a name as a repository whose code it downloads and runs.
_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


@dataclass(frozen=True)
class Stored:
    """One tensor by its entry in the header of ``file``; ``dtype`` as safetensors writes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in ``file``.

    ``ValueError`` for a file that is no regular one of its folder (see ``check_file``) or too large, text that is not
    strict JSON (NaN, an object with the same key twice), nesting without end, and anything but an object.
    """
    file = Path(file)
    with _open(file) as handle:
        text = handle.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        size = os.path.getsize(file)
        raise ValueError(f"{file}: {size} bytes, expected at most {MAX_JSON_BYTES}")
    return _parse(text, file, "not readable as JSON")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json in ``folder``, a dense model's or a packed one's.

    ``ValueError`` as ``read_json``; and where a number is beyond any model (integers over 2**31, more than 10,000
    layers, lists of hundreds of thousands), where it names code of another repository, or other files to read instead.
    The layer map is not looked at.
    """
    file = Path(folder) / CONFIG
    if not os.path.lexists(file):
        raise ValueError(f"{folder}: there is no {CONFIG}")
    config = read_json(file)
    for path, value in _walk(config):
        key = str(path[-1]) if path else ""
        if isinstance(value, dict | list) and len(value) > _MAX_LENGTH:
            raise ValueError(f"{file}: {_dotted(path)} has {len(value)} items, expected at most {_MAX_LENGTH}")
        # The numbers of the layer map are checked where its layers are built, which can say what they are.
        if type(value) is int and path[0] != "quantization_config":
            _check_number(file, path, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{file}: {_dotted(path)} is {value}, expected a finite number")
        if key in _INTEGERS and type(value) is not int:
            raise ValueError(f"{file}: {_dotted(path)} is {short(repr(value))}, expected an integer")
        if key in _CODE and "/" in json.dumps(value):
            raise ValueError(f"{file}: {key} names code of another repository ({short(repr(value))}), which is refused")
    if config.get("configuration_files"):
        # transformers would go on to one of those, and nobody would have checked it.
        raise ValueError(f"{file}: configuration_files names other files to read instead, which is refused")
    return config


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of the checkpoint in ``folder``: the only one, or the shards that the index names.

    ``ValueError`` where there is none, where the index names anything but files of the same folder, and for a file that
    ``check_file`` refuses.
    """
    folder = Path(folder)
    # Beside an unsharded file an index is a leftover that nobody reads.
    if os.path.lexists(folder / WEIGHTS):
        check_file(folder / WEIGHTS)
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not os.path.lexists(index):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        found = f", only {short(repr(pickles[0]))}, a pickle, which is never read" if pickles else ""
        raise ValueError(f"{folder}: there is no {WEIGHTS} in it{found}; expected a checkpoint of safetensors files")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: weight_map is malformed, expected an object of tensor name: file name")
    files = []
    for name in sorted(set(shards.values())):
        if not _is_shard_name(name):
            raise ValueError(f"{index}: names {short(repr(name))}, expected a safetensors file of the same folder")
        if not os.path.lexists(folder / name):
            raise ValueError(f"{index}: weight_map names {name}, which is not there")
        check_file(folder / name)
        files.append(folder / name)
    return files


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, Stored]:
    """Tensor name -> what the headers say of it, over all ``files``.

    ``ValueError`` naming the file, and the tensor where it is about one, unless each file is exactly what a safetensors
    file must be: a header of at most 8 MiB whose tensors fill the rest of the file without gap or overlap, no name
    twice, in one file or in two.
    """
    tensors: dict[str, Stored] = {}
    for file in map(Path, files):
        for name, stored in _read_header(file).items():
            if name in tensors:
                raise ValueError(f"{file}: holds {name}, which {tensors[name].file.name} holds as well")
            tensors[name] = stored
    return tensors


def check_file(file: str | os.PathLike[str]) -> None:
    """``ValueError`` unless ``file`` is a regular file of its folder.

    A symbolic link may not lead out of the folder, but for the one way the hub's cache does it:
    ``snapshots/<revision>/x -> ../../blobs/<hash>``.
    """
    file = Path(file)
    try:
        real = Path(os.path.realpath(file, strict=True))
        kind = os.stat(real).st_mode
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be opened: {_reason(error)}") from None
    folder = Path(os.path.realpath(file.parent))
    if not real.is_relative_to(folder) and not _is_blob(real, folder):
        raise ValueError(f"{file}: is a link that leads out of its folder, to {real}, which is refused")
    if not stat.S_ISREG(kind):
        found = "folder" if stat.S_ISDIR(kind) else "fifo" if stat.S_ISFIFO(kind) else "device or socket"
        raise ValueError(f"{file}: is a {found}, expected a regular file")


def is_name(text: object) -> bool:
    """Whether this can be the name of a tensor or module: printable, and short enough for an error message."""
    return isinstance(text, str) and 0 < len(text) <= _MAX_NAME and text.isprintable()


def short(text: str, limit: int = 120) -> str:
    """A text of the file, cut to fit an error message."""
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _read_header(file: Path) -> dict[str, Stored]:
    wrong = "not a readable safetensors file"
    with _open(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise ValueError(f"{file}: {wrong}: it has {size} bytes")
        if length > MAX_HEADER_BYTES:
            if start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
                raise ValueError(f"{file}: {wrong}: it is a pickle or zip file, which is never read")
            raise ValueError(f"{file}: {wrong}: its header claims {length} bytes, expected at most {MAX_HEADER_BYTES}")
        text = handle.read(length)
    if len(text) < length:
        raise ValueError(f"{file}: {wrong}: its header claims {length} bytes, but the file has only {size} in all")
    if text[:1] != b"{":
        raise ValueError(f"{file}: {wrong}: its header does not start with '{{'")
    header = _parse(text, file, f"{wrong}: its header is not readable as JSON")
    header.pop("__metadata__", None)
    tensors: dict[str, Stored] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not is_name(name):
            raise ValueError(f"{file}: {wrong}: {short(repr(name))} is no name of a tensor")
        tensors[name], (begin, end) = _entry(file, name, entry)
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise ValueError(f"{file}: {wrong}: {name} starts at byte {begin} of the data, expected {at}")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"{file}: {wrong}: its tensors take {at} bytes, but {size - 8 - length} follow the header")
    return tensors


def _entry(file: Path, name: str, entry: Any) -> tuple[Stored, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{file}: {name} is described by {short(repr(entry))}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{file}: {name} is {short(repr(dtype))}, expected one of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(size) for size in shape):
        raise ValueError(f"{file}: {name} has shape {short(repr(shape))}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ValueError(f"{file}: {name} has data_offsets {short(repr(offsets))}, expected two positions in the file")
    stored = Stored(file, dtype, tuple(shape))
    if offsets[1] - offsets[0] != stored.bytes:
        raise ValueError(
            f"{file}: {name} has {offsets[1] - offsets[0]} bytes, expected {stored.bytes} for {dtype} of shape "
            f"{stored.shape}"
        )
    return stored, (offsets[0], offsets[1])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _open(file: Path) -> Any:
    """A file object of a regular file. Opening never waits, whatever ``file`` has become since it was checked."""
    check_file(file)
    try:
        number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ValueError(f"{file}: cannot be opened: {_reason(error)}") from None
    return os.fdopen(number, "rb")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _is_blob(real: Path, folder: Path) -> bool:
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots":
            return real.parent == place.parent.parent / "blobs"
    return False


def _is_shard_name(name: str) -> bool:
    # The separators of every system: the file was made on one, and is read on another.
    return is_name(name) and name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\:")


def _parse(text: bytes, file: Path, wrong: str) -> dict[str, Any]:
    items = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if items > _MAX_ITEMS:
        raise ValueError(f"{file}: {wrong}: about {items} items, expected at most {_MAX_ITEMS}")
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{file}: {wrong}: nested deeper than {_MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {wrong}: {short(str(error))}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: holds a JSON {type(data).__name__}, expected an object")
    for path, _ in _walk(data):
        if len(path) > _MAX_DEPTH:
            raise ValueError(f"{file}: {wrong}: nested deeper than {_MAX_DEPTH}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {short(repr(name))} stands there twice")
        found[name] = value
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _walk(data: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value with its path, without recursion, and no deeper than one level past the limit."""
    yield (), data
    todo: list[tuple[tuple[str | int, ...], Iterator[tuple[str | int, Any]]]] = [((), _inside(data))]
    while todo:
        path, rest = todo[-1]
        for key, value in rest:
            yield (*path, key), value
            if isinstance(value, dict | list) and len(path) < _MAX_DEPTH:
                todo.append(((*path, key), _inside(value)))
                break
        else:
            todo.pop()


def _inside(value: dict[str, Any] | list[Any]) -> Iterator[tuple[str | int, Any]]:
    return iter(value.items()) if isinstance(value, dict) else iter(enumerate(value))


def _check_number(file: Path, path: tuple[str | int, ...], value: int) -> None:
    # A list of depths is a number of layers for each stage.
    key = str(next((key for key in reversed(path) if isinstance(key, str)), ""))
    bound = _MAX_LENGTH if key in _LABEL_COUNTS else _MAX_LAYERS if _LAYER_COUNTS.fullmatch(key) else _MAX_INTEGER
    if value < 0 and key.endswith("heads"):
        # It divides the hidden size, so that a model can be built of it that then fails when it runs.
        raise ValueError(f"{file}: {_dotted(path)} is {value}, expected a number of heads")
    if abs(value) > bound:
        shown = value if abs(value) < 1 << 64 else "beyond 64 bits"
        raise ValueError(f"{file}: {_dotted(path)} is {shown}, expected at most {bound}")


def _dotted(path: tuple[str | int, ...]) -> str:
    return short(repr(".".join(map(str, path)))[1:-1]) or "the whole"
