"""Hugging Face integration: the only part of the package that imports transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsebert.hf.callback import CompressionCallback as CompressionCallback
    from sparsebert.hf.checkpoint import load_pretrained as load_pretrained
    from sparsebert.hf.checkpoint import save_pretrained as save_pretrained
    from sparsebert.hf.fusion import FuseReport as FuseReport
    from sparsebert.hf.fusion import fuse_ as fuse_
    from sparsebert.hf.fusion import unfuse_ as unfuse_
    from sparsebert.hf.quantizer import SparsebertConfig as SparsebertConfig
    from sparsebert.hf.quantizer import SparsebertHfQuantizer as SparsebertHfQuantizer
    from sparsebert.hf.trainer import CompressionTrainer as CompressionTrainer
    from sparsebert.hf.trainer import CompressionTrainerMixin as CompressionTrainerMixin

# Public name -> module that defines it; loaded on first use, since the Trainer's imports take seconds.
_NAMES = {
    "CompressionCallback": "sparsebert.hf.callback",
    "CompressionTrainer": "sparsebert.hf.trainer",
    "CompressionTrainerMixin": "sparsebert.hf.trainer",
    "FuseReport": "sparsebert.hf.fusion",
    "SparsebertConfig": "sparsebert.hf.quantizer",
    "SparsebertHfQuantizer": "sparsebert.hf.quantizer",
    "fuse_": "sparsebert.hf.fusion",
    "load_pretrained": "sparsebert.hf.checkpoint",
    "save_pretrained": "sparsebert.hf.checkpoint",
    "unfuse_": "sparsebert.hf.fusion",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
