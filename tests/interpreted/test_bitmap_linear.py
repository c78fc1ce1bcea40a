"""``bitmap_linear`` in Triton's interpreter: numbers against float64 at any density, odd sizes, every epilogue."""

from __future__ import annotations

import pytest
import torch

import sparsebert as sb
from closeness import check
from sparsebert.formats import bitmap
from sparsebert.kernels.bitmap_linear import bitmap_linear as kernel
from sparsebert.kernels.tiles import Config
from sparsebert.ops import bitmap_linear
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import BitmapSpec


def weight_of(out_features, in_features, density, dtype):
    dense = torch.randn(out_features, in_features) * (torch.rand(out_features, in_features) < density)
    dense = dense.to(dtype)
    return dense, list(bitmap.pack(dense))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_numbers_against_float64(density, dtype):
    for out_features, in_features, tokens in ((100, 77, 7), (8, 144, 33), (1, 3, 1), (72, 208, 127)):
        dense, weight = weight_of(out_features, in_features, density, dtype)
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        spec = BitmapSpec(len(weight[0]), in_features, out_features)
        with sb.backend("triton"):
            y = bitmap_linear(x, weight, bias, layout="neutral", **spec._asdict())
        check(y, x, dense, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(64, 32, 64), Config(32, 16, 128)], ids=str)
def test_every_tile_and_epilogue(activation, config):
    dense, weight = weight_of(50, 176, 0.2, torch.float32)
    x, bias = torch.randn(21, 176), torch.randn(50)
    check(kernel(x, *weight, bias, activation=activation, config=config), x, dense, bias, activation)


def test_empty_rows_and_no_tokens():
    dense, _ = weight_of(24, 40, 0.3, torch.float32)
    dense[[0, 7, 23]] = 0.0
    weight = list(bitmap.pack(dense))
    x = torch.randn(5, 40)
    check(kernel(x, *weight, None, activation="none", config=Config(16, 16, 16)), x, dense, None)
    assert kernel(x[:0], *weight, None, activation="none", config=Config(16, 16, 16)).shape == (0, 24)
