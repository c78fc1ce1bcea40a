"""Saving and strict loading of packed checkpoints: safetensors + JSON, read as if they were hostile."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.utils import cached_file

from sparsebert import storage
from sparsebert.hf import quantizer
from sparsebert.hf.fusion import unfused
from sparsebert.hf.model_card import MARKER, model_card
from sparsebert.hf.quantizer import SparsebertConfig
from sparsebert.swap import QUANT_METHOD, quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Modules that a model may be built of: some hold no tensor, none holds so few that this is not enough.
_MODULES = 2000
_MODULES_PER_TENSOR = 16
_MODULES_OF_HUB = 100_000

_log = logging.getLogger(__name__)


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
    folder = _folder(path)
    config = _read_config(path, folder)
    cls = _model_class(config, path) if model_class is None else model_class
    if not callable(getattr(cls, "from_pretrained", None)):
        raise TypeError(f"load_pretrained: model_class is {cls!r}, expected a model class of transformers")
    local = os.path.isdir(path)
    modules = _check_local(folder) if local else _MODULES_OF_HUB
    failure = None
    try:
        with _no_loading_report(), _at_most(modules), quantizer.strict(path):
            model, info = cls.from_pretrained(
                path,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # Listed below with the other faults; nothing is loaded from a tensor that does not match.
                ignore_mismatched_sizes=True,
            )
        messages = [str(message) for message in info.get("error_msgs", ())]
        mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
        quantizer.refuse_misfit(
            path,
            model,
            missing=info["missing_keys"],
            unexpected=info["unexpected_keys"],
            of_another_shape=mismatched,
            not_loaded=[storage.short(_first_line(message)) for message in messages],
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not local:
            # The network's fault, not the checkpoint's.
            raise
        _log.debug("%s is refused", path, exc_info=True)
        failure = _one_line(error, path, cls)
    if failure is not None:
        # Not inside the handler: the error there holds frames, and these the model and the open files.
        raise ValueError(failure)
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
    sharding: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with unfused(model):
        # The model may have been cast or swapped since compress_ wrote the map.
        model.config.quantization_config = quantization_config(model)
        model.save_pretrained(folder, **sharding)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    card = folder / "README.md"
    if card.exists() and MARKER not in card.read_text(encoding="utf-8", errors="replace"):
        logging.getLogger(__name__).warning("%s was not written by sparsebert and is left as it is", card)
    else:
        card.write_text(model_card(model), encoding="utf-8")


def _folder(path: str) -> Path:
    """The folder that holds config.json: ``path`` itself, or the one that the hub's cache keeps of it."""
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
        raise ValueError(f"{path}: there is no such folder")
    return Path(str(cached_file(path, storage.CONFIG))).parent


def _read_config(path: str, folder: Path) -> dict[str, Any]:
    """config.json of a packed checkpoint, after everything that can be checked before transformers sees it."""
    config = storage.read_config(folder)
    file = folder / storage.CONFIG
    described = config.get("quantization_config")
    if described is None:
        raise ValueError(f"{path}: the checkpoint is dense (no quantization_config); load it with from_pretrained")
    if not isinstance(described, dict) or described.get("quant_method") != QUANT_METHOD:
        method = described.get("quant_method") if isinstance(described, dict) else described
        raise ValueError(f"{path}: quant_method is {storage.short(repr(method))}, expected {QUANT_METHOD!r}")
    try:
        # As it stands in the file: transformers drops some keys, wherever they are.
        for name, entry in SparsebertConfig(**described).layers.items():
            quantizer.unfilled(entry, name)
    except ValueError as error:
        raise ValueError(f"{file}: {storage.short(str(error), 800)}") from error
    for key, what in (
        ("transformers_weights", "another file of weights"),
        # It would change classes of transformers for every model of this process.
        ("fusion_config", "fused layers"),
    ):
        if config.get(key):
            raise ValueError(f"{file}: {key} asks for {what}, which no packed checkpoint does")
    return config


def _check_local(folder: Path) -> int:
    """Reads every header that transformers will read, and returns how many modules so many tensors can belong to."""
    tensors = storage.read_headers(storage.weight_files(folder))
    # Read by transformers as well where they are.
    if os.path.lexists(folder / "generation_config.json"):
        storage.read_json(folder / "generation_config.json")
    if os.path.lexists(folder / "adapter_config.json"):
        raise ValueError(f"{folder / 'adapter_config.json'}: asks for an adapter, which no packed checkpoint does")
    return _MODULES + _MODULES_PER_TENSOR * len(tensors)


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Inside, a model of more ``modules`` cannot be built: config.json says how many, and each takes time and memory.

    Holds for this thread alone, since torch calls the hook for every thread's modules.
    """
    thread = threading.get_ident()
    built = 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal built
        if threading.get_ident() == thread:
            built += 1
            if built > modules:
                raise ValueError(
                    f"config.json asks for more than {modules} modules, far more than the tensors of the files can fill"
                )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _one_line(error: Exception, path: str, cls: type[Any]) -> str:
    """What a refusal says, of whatever kind the error was: the files decide how transformers and torch fail."""
    text = storage.short(_first_line(str(error)), 1000)
    if not isinstance(error, ValueError):
        text = f"cannot be loaded as {cls.__name__}: {type(error).__name__}: {text}"
    return text if path in text else f"{path}: {text}"


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return "".join(char if char.isprintable() else " " for char in lines[0]) if lines else "no reason given"


def _model_class(config: dict[str, Any], path: str) -> type[Any]:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"{path}: architectures is {storage.short(repr(names))}, expected one class name; pass model_class"
        )
    try:
        cls = getattr(transformers, name)
    except (AttributeError, ImportError, RuntimeError):
        cls = None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{path}: architectures names {storage.short(repr(name))}, which is no model class of transformers "
            f"{transformers.__version__}; pass model_class"
        )
    return cls


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
