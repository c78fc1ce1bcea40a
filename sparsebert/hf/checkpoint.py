"""Saving and strict loading of packed checkpoints: safetensors + JSON, read as if they were hostile."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.utils import cached_file

from sparsebert.hf import quantizer
from sparsebert.hf.model_card import MARKER, model_card
from sparsebert.hf.quantizer import SparsebertConfig
from sparsebert.swap import QUANT_METHOD, quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# config.json of BERT-large with every layer packed takes about 40 kB, a shard index about as much.
_MAX_JSON_BYTES = 8 << 20
_SHOWN = 5


def load_pretrained(
    path: str | os.PathLike[str],
    model_class: type[Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> PreTrainedModel:
    """The packed model saved at ``path`` (a folder, or a model id of the hub), in eval mode on ``device``.

    ``model_class`` is a model class or Auto class of transformers, by default the one config.json names under
    ``architectures``; no code of the checkpoint is ever run. ``dtype`` None keeps the stored one. Strict, unlike
    ``from_pretrained``: ``ValueError`` where config.json or the layer map is not one this version reads, the checkpoint
    is dense, or any tensor is missing, left over, or of another shape, dtype or content than the map says.
    """
    path = os.fspath(path)
    # The import hook cannot act where it was transformers' own start that imported sparsebert.
    quantizer.register()
    config = _read_config(path)
    cls = _model_class(config, path) if model_class is None else model_class
    if not callable(getattr(cls, "from_pretrained", None)):
        raise TypeError(f"load_pretrained: model_class is {cls!r}, expected a model class of transformers")
    if os.path.isdir(path):
        _check_index(Path(path))
    with _no_loading_report():
        model, info = cls.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # So that they are listed below with the other faults; nothing is loaded from a tensor that does not match.
            ignore_mismatched_sizes=True,
        )
    faults = [
        f"{len(names)} {kind} ({_few(names)})"
        for kind, names in (
            ("missing", info["missing_keys"]),
            ("unexpected", info["unexpected_keys"]),
            ("of another shape", [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]),
        )
        if names
    ]
    faults += [str(message).strip().splitlines()[-1] for message in info.get("error_msgs", ())]
    if faults:
        raise ValueError(f"{path}: the tensors do not fit {type(model).__name__}: {'; '.join(faults)}")
    model.eval()
    return model if device is None else model.to(device)


def save_pretrained(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Stock ``model.save_pretrained`` of a packed model, with a model card (README.md) and the tokenizer's files.

    A README.md that this function did not write is left alone, with a warning. ``ValueError`` where nothing is packed.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained: {folder} is a file, expected a folder")
    # The model may have been cast or swapped since compress_ wrote the map.
    model.config.quantization_config = quantization_config(model)
    sharding: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **sharding)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    card = folder / "README.md"
    if card.exists() and MARKER not in card.read_text(encoding="utf-8", errors="replace"):
        logging.getLogger(__name__).warning("%s was not written by sparsebert and is left as it is", card)
    else:
        card.write_text(model_card(model), encoding="utf-8")


def _read_config(path: str) -> dict[str, Any]:
    """config.json of a packed checkpoint, after everything that can be checked before transformers sees it."""
    if os.path.isdir(path):
        file = os.path.join(path, "config.json")
        if not os.path.isfile(file):
            raise ValueError(f"{path}: there is no config.json")
    elif os.path.exists(path) or os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
        raise ValueError(f"{path}: there is no such folder")
    else:
        file = str(cached_file(path, "config.json"))
    config = _read_json(file)
    described = config.get("quantization_config")
    if described is None:
        raise ValueError(f"{path}: the checkpoint is dense (no quantization_config); load it with from_pretrained")
    if not isinstance(described, dict) or described.get("quant_method") != QUANT_METHOD:
        method = described.get("quant_method") if isinstance(described, dict) else described
        raise ValueError(f"{path}: quant_method is {method!r}, expected {QUANT_METHOD!r}")
    try:
        SparsebertConfig(**described)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        # transformers reads such a name as a repository whose code it downloads and runs.
        if "/" in json.dumps(config.get(key)):
            raise ValueError(f"{file}: {key} names code of another repository ({config[key]!r}), which is refused")
    return config


def _read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    size = os.path.getsize(file)
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{file}: {size} bytes, expected at most {_MAX_JSON_BYTES}")
    try:
        data = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file}: holds a JSON {type(data).__name__}, expected an object")
    return data


def _model_class(config: dict[str, Any], path: str) -> type[Any]:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{path}: architectures is {names!r}, expected one class name; pass model_class")
    try:
        cls = getattr(transformers, name)
    except (AttributeError, ImportError, RuntimeError):
        cls = None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{path}: architectures names {name!r}, which is no model class of transformers "
            f"{transformers.__version__}; pass model_class"
        )
    return cls


def _check_index(folder: Path) -> None:
    """A shard index may name files of its own folder only."""
    index = folder / "model.safetensors.index.json"
    # Beside an unsharded file an index is a leftover that nobody reads.
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: weight_map is malformed, expected an object of tensor name: file name")
    for name in set(shards.values()):
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map names {name!r}, expected a safetensors file of the same folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: weight_map names {name}, which is not there")


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Holds back transformers' table of missing and unexpected tensors: here they end in one error."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
