"""``nm_linear`` in Triton's interpreter: numbers against float64, every pattern, odd sizes, every epilogue."""

from __future__ import annotations

import pytest
import torch

import sparsebert as sb
from closeness import check
from sparsebert.formats import nm
from sparsebert.kernels.nm_linear import nm_linear as kernel
from sparsebert.kernels.tiles import Config
from sparsebert.ops import nm_linear, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import NMSpec

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (3, 8), (1, 16), (7, 16)]
DTYPES = [torch.float16, torch.float32]


def weight_of(out_features: int, in_features: int, n: int, m: int, dtype: torch.dtype):
    dense = nm.project(torch.randn(out_features, in_features), n, m).to(dtype)
    return dense, nm.pack(dense, n, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda value: str(value))
def test_numbers_against_float64(n, m, dtype):
    """Through the op: in-features that no tile divides, out-features that no tile divides, odd token counts."""
    for out_features, in_features, tokens in ((100, 80, 7), (8, 144, 33), (1, 16, 1), (72, 208, 127)):
        dense, (values, positions) = weight_of(out_features, in_features, n, m, dtype)
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        spec = NMSpec(n, m, in_features, out_features)
        with sb.backend("triton"):
            y = nm_linear(x, [values, positions], bias, layout="neutral", **spec._asdict())
        check(y, x, dense, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("split_k", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_epilogue(activation, split_k, with_bias):
    dense, (values, positions) = weight_of(40, 224, 2, 4, torch.float16)
    x = torch.randn(19, 224).half()
    bias = torch.randn(40).half() if with_bias else None
    config = Config(32, 16, 32, split_k)
    y = kernel(x, values, positions, bias, n=2, m=4, activation=activation, config=config)
    check(y, x, dense, bias, activation)


@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(64, 32, 64), Config(32, 16, 128, 8)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (1, 8)], ids=str)
def test_every_tile_gives_the_same(config, n, m):
    """Small whole numbers: sums are exact in whatever order, so that any two ways agree to the bit."""
    dense = nm.project(torch.randint(-4, 5, (50, 176)).float(), n, m)
    values, positions = nm.pack(dense, n, m)
    x = torch.randint(-4, 5, (21, 176)).float()
    y = kernel(x, values, positions, None, n=n, m=m, activation="none", config=config)
    assert torch.equal(y, x @ dense.t())


def test_more_programs_than_steps_of_a_tile():
    dense, (values, positions) = weight_of(16, 32, 2, 4, torch.float32)
    x = torch.randn(3, 32)
    check(kernel(x, values, positions, None, n=2, m=4, activation="none", config=Config(16, 16, 32, 4)), x, dense, None)


def test_weights_of_zero_and_rows_that_are_far_apart():
    """A weight that is all zeros has slots at the lowest places; x is a slice of something wider, and of more dims."""
    dense = torch.zeros(24, 64)
    dense[5, 9] = 2.0
    values, positions = nm.pack(dense, 1, 4)
    wide = torch.randn(2, 5, 96)
    x = wide[..., :64]
    spec = NMSpec(1, 4, 64, 24)
    with sb.backend("triton"):
        y = nm_linear(x, [values, positions], None, layout="neutral", **spec._asdict())
        turned = nm_linear(x.transpose(0, 1), [values, positions], None, layout="neutral", **spec._asdict())
    assert torch.equal(y, x @ dense.t()) and torch.equal(turned, y.transpose(0, 1))


def test_no_tokens():
    _, (values, positions) = weight_of(24, 64, 2, 4, torch.float32)
    with sb.backend("triton"):
        y = nm_linear(
            torch.empty(0, 3, 64),
            [values, positions],
            None,
            layout="neutral",
            n=2,
            m=4,
            in_features=64,
            out_features=24,
        )
    assert y.shape == (0, 3, 24)


def test_not_a_number_comes_through():
    dense, (values, positions) = weight_of(24, 64, 2, 4, torch.float32)
    dense, values = dense.abs(), values.abs()
    x = torch.randn(4, 64)
    x[2, 7] = torch.nan
    for activation in ACTIVATIONS:
        y = kernel(x, values, positions, None, n=2, m=4, activation=activation, config=Config(16, 16, 32))
        assert y[2][dense[:, 7] != 0].isnan().all() and not y[[0, 1, 3]].isnan().any(), activation


def test_who_serves_what():
    spec = NMSpec(2, 4, 64, 24)
    for dtype, reason in (
        (torch.float32, None),
        (torch.bfloat16, "Triton's interpreter has no bfloat16"),
        (torch.float64, "needs float16, bfloat16, float32, not float64"),
    ):
        x = torch.empty(3, 64, dtype=dtype)
        found = {c.backend: r for c, r in select.review(select.problem_of(spec, "neutral", x, "none"))}
        assert found["triton"] == reason and found["reference"] is None
