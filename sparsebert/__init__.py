"""Compressed BERT inference: packed formats, kernels, training methods and drop-in modules.

``import sparsebert as sb`` registers the package's torch ops and the transformers quantizer plug-in; it imports torch,
but neither transformers nor triton. Everything else is loaded when its name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsebert import _transformers_hook, ops

if TYPE_CHECKING:
    from sparsebert import formats as formats
    from sparsebert import hf as hf
    from sparsebert import methods as methods
    from sparsebert import nn as nn
    from sparsebert.calibration import calibrate as calibrate
    from sparsebert.configs import BitmapConfig as BitmapConfig
    from sparsebert.configs import DenseConfig as DenseConfig
    from sparsebert.configs import Int8Config as Int8Config
    from sparsebert.configs import LowRankConfig as LowRankConfig
    from sparsebert.configs import LowRankSparseConfig as LowRankSparseConfig
    from sparsebert.configs import NMConfig as NMConfig
    from sparsebert.configs import RowsConfig as RowsConfig
    from sparsebert.hf.checkpoint import load_pretrained as load_pretrained
    from sparsebert.hf.checkpoint import save_pretrained as save_pretrained
    from sparsebert.hf.fusion import fuse_ as fuse_
    from sparsebert.hf.fusion import unfuse_ as unfuse_
    from sparsebert.nn.int8_linear import quantizing as quantizing
    from sparsebert.ops.select import backend as backend
    from sparsebert.plan import CompressionPlan as CompressionPlan
    from sparsebert.report import explain as explain
    from sparsebert.report import size_report as size_report
    from sparsebert.runner import Runner as Runner
    from sparsebert.swap import compress_ as compress_
    from sparsebert.swap import decompress_ as decompress_
    from sparsebert.swap import prepare_ as prepare_
    from sparsebert.tuning import tune as tune

__version__ = "0.1.0"

# Public name -> module that defines it.
_NAMES = {
    "BitmapConfig": "sparsebert.configs",
    "DenseConfig": "sparsebert.configs",
    "Int8Config": "sparsebert.configs",
    "LowRankConfig": "sparsebert.configs",
    "LowRankSparseConfig": "sparsebert.configs",
    "NMConfig": "sparsebert.configs",
    "RowsConfig": "sparsebert.configs",
    "Runner": "sparsebert.runner",
    "calibrate": "sparsebert.calibration",
    "CompressionPlan": "sparsebert.plan",
    "backend": "sparsebert.ops.select",
    "compress_": "sparsebert.swap",
    "decompress_": "sparsebert.swap",
    "prepare_": "sparsebert.swap",
    "quantizing": "sparsebert.nn.int8_linear",
    "size_report": "sparsebert.report",
    "explain": "sparsebert.report",
    "tune": "sparsebert.tuning",
    "fuse_": "sparsebert.hf.fusion",
    "unfuse_": "sparsebert.hf.fusion",
    "load_pretrained": "sparsebert.hf.checkpoint",
    "save_pretrained": "sparsebert.hf.checkpoint",
}
_SUBMODULES = ("formats", "hf", "methods", "nn", "ops")

__all__ = ["__version__", *_NAMES, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


ops.register()
_transformers_hook.install()
