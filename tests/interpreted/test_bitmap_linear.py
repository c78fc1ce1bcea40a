"""``bitmap_linear`` in Triton's interpreter: numbers against float64 at any density, odd sizes, every epilogue, whole
rows and chunks of them."""

from __future__ import annotations

import pytest
import torch

import sparsebert as sb
from closeness import check
from sparsebert.formats import bitmap
from sparsebert.kernels.bitmap_linear import bitmap_linear as kernel
from sparsebert.kernels.tiles import Config
from sparsebert.ops import bitmap_linear, layouts, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import BitmapSpec
from sparsebert.ops.triton.bitmap import CHUNK, CHUNKED

LAYOUTS = ["neutral", CHUNKED]


def weight_of(out_features, in_features, density, dtype=torch.float32):
    """The dense weight and its neutral tensors."""
    dense = torch.randn(out_features, in_features) * (torch.rand(out_features, in_features) < density)
    dense = dense.to(dtype)
    return dense, list(bitmap.pack(dense))


def spec_of(dense):
    return BitmapSpec(int(dense.count_nonzero()), dense.shape[1], dense.shape[0])


def held(dense, weight, layout):
    return layouts.get("bitmap_linear", layout).from_neutral(weight, spec_of(dense), dense.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_numbers_against_float64(density, dtype, layout):
    for out_features, in_features, tokens in ((100, 80, 7), (8, 300, 33), (1, 8, 1), (1, 3, 7), (8, 520, 127)):
        dense, weight = weight_of(out_features, in_features, density, dtype)
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        with sb.backend("triton"):
            y = bitmap_linear(x, held(dense, weight, layout), bias, layout=layout, **spec_of(dense)._asdict())
        check(y, x, dense, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(64, 32, 64), Config(32, 16, 128)], ids=str)
def test_every_tile_and_epilogue(activation, config):
    dense, weight = weight_of(50, 176, 0.2)
    x, bias = torch.randn(21, 176), torch.randn(50)
    check(kernel(x, *weight, bias, activation=activation, config=config), x, dense, bias, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("split_k", [1, 2, 4])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_inputs_split_among_programs(density, split_k, dtype):
    """With more programs than chunks, fewer, and a last chunk that is not whole; some rows empty."""
    for out_features, in_features, tokens in ((100, 80, 1), (1, 300, 127), (100, 520, 7), (8, 1300, 33)):
        dense, weight = weight_of(out_features, in_features, density, dtype)
        dense[out_features // 2 :: 3] = 0
        weight = list(bitmap.pack(dense))
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        config = Config(128, 128, 256, split_k)
        y = kernel(x, *held(dense, weight, CHUNKED), bias, activation="gelu", config=config, chunk=CHUNK)
        check(y, x, dense, bias, "gelu")


def test_every_split_gives_the_same():
    """Small whole numbers: sums are exact in whatever order, so that any two ways agree to the bit."""
    dense, weight = weight_of(40, 900, 0.3)
    dense.sign_()
    weight[0].sign_()
    x = torch.randint(-4, 5, (19, 900)).float()
    for config in (Config(32, 32, 64), Config(64, 32, 32, 2), Config(16, 32, 128, 4), Config(64, 16, 256, 4)):
        y = kernel(x, *held(dense, weight, CHUNKED), None, activation="none", config=config, chunk=CHUNK)
        assert torch.equal(y, x @ dense.t())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_whole_rows_of_the_bitmap_are_read(layout):
    """A bitmap in the midst of ones: its neighbours would name values that are not there."""
    dense, weight = weight_of(20, 300, 0.1)
    wide = torch.full((22, 38), 255, dtype=torch.uint8)
    wide[1:-1] = weight[1]
    values = torch.full((len(weight[0]) + 600,), torch.nan)
    values[: len(weight[0])] = weight[0]
    _, _, starts = held(dense, weight, layout)
    x = torch.randn(5, 300)
    config = Config(16, 16, 128, 1 if layout == "neutral" else 2)
    y = kernel(x, values, wide[1:-1], starts, None, activation="none", config=config, chunk=CHUNK)
    check(y, x, dense, None)


def test_empty_rows_and_no_tokens():
    dense, _ = weight_of(24, 40, 0.3)
    dense[[0, 7, 23]] = 0.0
    weight = list(bitmap.pack(dense))
    x = torch.randn(5, 40)
    check(kernel(x, *weight, None, activation="none", config=Config(16, 16, 16)), x, dense, None)
    assert kernel(x[:0], *weight, None, activation="none", config=Config(16, 16, 16)).shape == (0, 24)


def test_chunks_in_both_backends():
    dense, weight = weight_of(30, 520, 0.1)
    weight, x = held(dense, weight, CHUNKED), torch.randn(9, 520)
    for backend in ("triton", "reference"):
        with sb.backend(backend):
            y = bitmap_linear(x, weight, None, layout=CHUNKED, **spec_of(dense)._asdict())
        check(y, x, dense, None)
    assert select.choose(select.problem_of(spec_of(dense), CHUNKED, x, "none")).backend == "triton"
