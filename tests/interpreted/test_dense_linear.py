"""``dense_linear`` in Triton's interpreter: numbers against float64, odd sizes, every epilogue, rows far apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from closeness import check
from sparsebert.kernels.dense_linear import dense_linear as kernel
from sparsebert.kernels.tiles import Config
from sparsebert.ops import dense_linear, layouts, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import DenseSpec

FUSED = [name for name in ACTIVATIONS if name != "none"]
# (out_features, in_features, tokens): none of them divided by a tile, fewer inputs than a step and more.
SIZES = [(100, 80, 7), (37, 45, 33), (1, 1, 1), (72, 203, 127), (130, 7, 65)]


def operands(out_features: int, in_features: int, tokens: int, dtype: torch.dtype):
    x, weight = torch.randn(tokens, in_features), torch.randn(out_features, in_features)
    return x.to(dtype), weight.to(dtype), torch.randn(out_features).to(dtype)


def through_the_op(x, weight, bias, activation="gelu", layout="neutral"):
    sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    with sb.backend("triton"):
        return dense_linear(x, [weight], bias, layout=layout, activation=activation, **sizes)


@pytest.mark.parametrize("layout", ["neutral", "dense"])
@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_numbers_against_float64(sizes, activation, layout):
    x, weight, bias = operands(*sizes, torch.float16)
    check(through_the_op(x, weight, bias, activation, layout), x, weight, bias, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("split_k", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_epilogue(activation, split_k, with_bias, dtype):
    x, weight, bias = operands(40, 221, 19, dtype)
    bias = bias if with_bias else None
    y = kernel(x, weight, bias, activation=activation, config=Config(32, 16, 32, split_k))
    check(y, x, weight, bias, activation)


@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(64, 32, 64), Config(32, 16, 128, 8)], ids=str)
def test_every_tile_gives_the_same(config):
    """Small whole numbers: sums are exact in whatever order, so that any two ways agree to the bit."""
    weight = torch.randint(-4, 5, (50, 173)).float()
    x = torch.randint(-4, 5, (21, 173)).float()
    y = kernel(x, weight, None, activation="none", config=config)
    assert torch.equal(y, x @ weight.t())


def test_every_configuration_that_may_be_chosen():
    spec = DenseSpec(203, 130)
    x, weight, bias = operands(130, 203, 37, torch.float16)
    problem = select.problem_of(spec, "neutral", x, "gelu")
    (candidate,) = (found for found in select.candidates(spec.op, "neutral") if found.backend == "triton")
    solutions = select.solutions(candidate, problem)
    assert len(solutions) > 5
    for solution in solutions:
        check(solution.run(x, [weight], bias, problem), x, weight, bias, "gelu")


def test_more_programs_than_steps_of_a_tile():
    x, weight, _ = operands(16, 32, 3, torch.float32)
    check(kernel(x, weight, None, activation="none", config=Config(16, 16, 32, 4)), x, weight, None)


def test_the_gelu_is_that_of_the_error_function():
    """The tanh form is up to 5e-4 from it; in fp32 nothing hides that."""
    weight, x = torch.eye(16), torch.linspace(-5, 5, 16 * 16).view(16, 16)
    y = kernel(x, weight, None, activation="gelu", config=Config(16, 16, 16)).double()
    exact = F.gelu(x.double())
    assert (y - exact).abs().max() < 1e-6 < (F.gelu(x.double(), approximate="tanh") - exact).abs().max()


def test_rows_that_are_far_apart():
    """x and the weight are slices of something wider, NaN beside them; x also of more dims, and transposed."""
    wide = torch.full((2, 5, 96), torch.nan).half()
    wide[..., 8:69] = torch.randn(2, 5, 61)
    x = wide[..., 8:69]
    held = torch.full((24, 80), torch.nan).half()
    held[:, 3:64] = torch.randn(24, 61)
    weight = held[:, 3:64]
    bias = torch.randn(24, 2).half()[:, 0]
    y = through_the_op(x, weight, bias)
    check(y.view(10, 24), x.reshape(10, 61), weight, bias, "gelu")
    assert torch.equal(through_the_op(x.transpose(0, 1), weight, bias), y.transpose(0, 1))
    assert torch.equal(through_the_op(x[0].t().contiguous().t(), weight.t().contiguous().t(), bias), y[0])
    assert torch.equal(through_the_op(x[1, 2], weight, bias), y[1, 2])
    assert torch.equal(through_the_op(x[:1, :1].expand(3, 4, 61), weight, bias), y[:1, :1].expand(3, 4, 24))


def test_no_tokens():
    y = through_the_op(torch.empty(0, 3, 64).half(), torch.randn(24, 64).half(), None)
    assert y.shape == (0, 3, 24) and y.dtype == torch.float16


def test_not_a_number_comes_through():
    x, weight, _ = operands(24, 64, 4, torch.float32)
    x[2, 7] = torch.nan
    for activation in ACTIVATIONS:
        y = kernel(x, weight, None, activation=activation, config=Config(16, 16, 32))
        assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any(), activation


def test_the_columns_of_a_wider_x():
    x, weight, bias = operands(24, 40, 6, torch.float16)
    columns = torch.arange(40, dtype=torch.int32) * 2
    wide = torch.full((6, 81), torch.nan).half()
    wide[:, columns.long()] = x
    sizes = {"in_features": 40, "out_features": 24, "layout": "neutral", "activation": "relu"}
    with sb.backend("triton"):
        y = torch.ops.sparsebert.dense_linear(wide, [weight], bias, columns, **sizes)
    check(y, x, weight, bias, "relu")


def test_who_serves_what():
    spec = DenseSpec(64, 24)
    for dtype, activation, reason in (
        (torch.float16, "gelu", None),
        (torch.float16, "relu", None),
        (torch.float16, "none", "nothing to fuse: torch's own linear is as good"),
        (torch.float32, "gelu", "needs float16 or bfloat16: in float32 what fusing saves is little beside the product"),
        (torch.bfloat16, "gelu", "Triton's interpreter has no bfloat16"),
        (torch.float64, "gelu", "needs float16, bfloat16, float32, not float64"),
    ):
        for layout in layouts.names(spec.op):
            x = torch.empty(3, 64, dtype=dtype)
            problem = select.problem_of(spec, layout, x, activation)
            found = {c.backend: r for c, r in select.review(problem) if c.backend != "cuda"}
            assert found == {"triton": reason, "reference": None}
            assert select.choose(problem).backend == ("triton" if reason is None else "reference")
    with sb.backend("triton"), pytest.raises(RuntimeError, match="triton: nothing to fuse"):
        select.choose(select.problem_of(spec, "neutral", torch.empty(3, 64).half(), "none"))
