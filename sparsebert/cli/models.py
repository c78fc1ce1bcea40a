"""Checkpoints as the commands take them, a folder or a model id of the hub, dense or packed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebert import storage
from sparsebert.cli.common import few
from sparsebert.swap import QUANT_METHOD

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# At least one of these belongs to every tokenizer that transformers saves.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint by its config.json, before any tensor is read. ``folder`` is None for a model of the hub."""

    name: str
    config: dict[str, Any]
    folder: Path | None

    @property
    def packing(self) -> dict[str, Any] | None:
        """The layer map and what stands beside it, or whatever else quantized the model; None where it is dense."""
        found = self.config.get("quantization_config")
        if found is None:
            return None
        if not isinstance(found, dict):
            raise ValueError(f"{self.name}: quantization_config is {type(found).__name__}, expected a JSON object")
        return found

    @property
    def packed(self) -> bool:
        """Whether sparsebert compressed it; ``ValueError`` where something else did."""
        if self.packing is None:
            return False
        if (method := self.packing.get("quant_method")) != QUANT_METHOD:
            raise ValueError(f"{self.name}: is compressed by {method!r}, expected a dense model or {QUANT_METHOD!r}")
        return True

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode. ``untrained``: its tensors that the checkpoint lacks, filled at random; ``dropped``:
    tensors of the checkpoint that it has no place for."""

    model: PreTrainedModel
    untrained: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def find_folder(name: str) -> Source:
    """The checkpoint in the folder ``name``."""
    folder = Path(name).expanduser()
    if not folder.exists():
        raise ValueError(f"{name}: there is no such folder")
    if not folder.is_dir():
        raise ValueError(f"{name}: is a file, expected the folder of a checkpoint")
    return Source(name, storage.read_config(folder), folder)


def find(name: str) -> Source:
    """The checkpoint in the folder ``name``, else the model of that id on the hub."""
    path = Path(name).expanduser()
    if path.exists() or not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", name):
        return find_folder(name)
    from transformers.utils import cached_file

    try:
        with quiet_transformers():
            file = Path(str(cached_file(name, storage.CONFIG)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}: there is no such folder, and the hub did not give it: {reason}") from None
    return Source(name, storage.read_config(file.parent), None)


def load(source: Source, *, device: torch.device, dtype: torch.dtype | None = None) -> Loaded:
    """The model of ``source``; ``dtype`` None keeps the stored one. No code of the checkpoint is run, no pickle read.

    A packed one is loaded strictly. Of a dense one the class is the one that config.json names, else ``AutoModel``.
    """
    if source.packed:
        import sparsebert

        with quiet_transformers():
            return Loaded(sparsebert.load_pretrained(_location(source), device=device, dtype=dtype))
    cls = _model_class(source.architecture)
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                _location(source),
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{source.name}: holds no safetensors file, and pickled weights are not read; load it with transformers "
            f"and save it again"
        ) from None
    untrained, dropped = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if untrained and len(untrained) == len(model.state_dict()):
        raise ValueError(f"{source.name}: no tensor of the checkpoint fits {type(model).__name__} ({few(dropped)})")
    return Loaded(model.eval().to(device), tuple(untrained), tuple(dropped))


def load_classifier(
    source: Source, *, device: torch.device, classes: Sequence[str] | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The dense model of ``source`` with a head for ``classes`` (None: regression), in float32 and eval mode, and the
    names of the head's tensors that the checkpoint has none for, which torch's generator filled.

    The head of the checkpoint is kept where it has as many outputs; ``ValueError`` where these are other classes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if source.packed:
        raise ValueError(f"{source.name}: is compressed already; start from the dense model it was made of")
    outputs = 1 if classes is None else len(classes)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(_location(source), trust_remote_code=False)
    keeps = "ForSequenceClassification" in (source.architecture or "") and config.num_labels == outputs
    if not keeps:
        config.num_labels = outputs
        if classes is not None:
            config.id2label = dict(enumerate(classes))
            config.label2id = {name: i for i, name in enumerate(classes)}
    elif classes is not None:
        own = [config.id2label[i] for i in range(outputs)]
        # Numbers fit any head; names have to be its own.
        if not set(classes) <= {*own, *map(str, range(outputs))}:
            raise ValueError(
                f"{source.name}: its head knows the labels {few(own)}, but the data has {few(sorted(classes))}; "
                f"expected the same names, or the numbers 0 to {outputs - 1}"
            )
    config.problem_type = "regression" if classes is None else "single_label_classification"
    try:
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                _location(source),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # A head for other classes is replaced.
                ignore_mismatched_sizes=True,
            )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(f"{source.name}: holds no safetensors file, and pickled weights are not read") from None
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *mismatched})
    inside = [key for key in new if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if inside:
        raise ValueError(f"{source.name}: the checkpoint lacks {few(inside)}, which is no part of a new head")
    return model.eval().to(device), tuple(new)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the model, None where there is none."""
    if source.folder is not None and not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(_location(source), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        if source.folder is None and isinstance(error, OSError):
            return None
        raise ValueError(f"{source.name}: its tokenizer cannot be loaded: {error}") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars, retries, tables of missing tensors or advice from transformers and the hub inside."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def _location(source: Source) -> str:
    return source.name if source.folder is None else os.fspath(source.folder)


def _model_class(architecture: str | None) -> Any:
    import transformers

    cls = None
    if architecture is not None and architecture.isidentifier():
        try:
            cls = getattr(transformers, architecture, None)
        except (ImportError, RuntimeError):
            cls = None
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if known else transformers.AutoModel
