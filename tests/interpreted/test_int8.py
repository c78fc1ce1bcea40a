"""``quantize_rows`` and ``int8_linear`` in Triton's interpreter: rounding and sums equal to the definition's."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch

import sparsebert as sb
from sparsebert.formats import int8, nm
from sparsebert.kernels.int8_linear import int8_linear as kernel
from sparsebert.kernels.quantize_rows import LONGEST
from sparsebert.kernels.quantize_rows import quantize_rows as quantize
from sparsebert.kernels.tiles import Config
from sparsebert.ops import int8_linear, int8_linear_from_int8, int8_linear_to_int8, quantize_rows, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import Int8Spec

DTYPES = [torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (4, 100), (2, 3000), (2, LONGEST + 5)], ids=str)
def test_rounding_is_the_definition(shape, dtype):
    x = torch.randn(shape).to(dtype)
    x[0] = 0.0
    q, scale = quantize(x)
    expected, scales = int8.quantize_rows(x)
    assert torch.equal(q, expected) and torch.equal(scale, scales)
    for given in (0.01, 3.0):
        for found, exact in zip(
            quantize(x, torch.tensor(given)), int8.quantize_rows(x, torch.tensor(given)), strict=True
        ):
            assert torch.equal(found, exact)


def test_rows_of_extreme_sizes():
    """Zero, below the bound, at it, ordinary, next to the largest float; ties go to the even number."""
    tiny = int8.TINY
    x = torch.tensor(
        [[0.0] * 4, [tiny / 2] * 4, [tiny, -tiny, 0, tiny / 2], [127.0, 0.5, 1.5, -2.5], [3e38, 1, -3e38, 0]]
    )
    q, scale = quantize(x)
    expected, scales = int8.quantize_rows(x)
    assert torch.equal(q, expected) and torch.equal(scale, scales)
    assert q[3].tolist() == [127, 0, 2, -2]


def test_not_a_number_and_infinity_show_in_the_scale_of_their_row_alone():
    x = torch.randn(4, 33)
    x[1, 5], x[2, 32] = torch.nan, -torch.inf
    q, scale = quantize(x)
    assert scale[1].isnan() and not scale[2].isfinite()
    expected, scales = int8.quantize_rows(x)
    for row in (0, 3):
        assert torch.equal(q[row], expected[row]) and scale[row] == scales[row]


def test_static_rows_that_are_not_finite_show_in_their_scale_alone():
    x = torch.randn(4, 33)
    x[1, 5], x[2, 32] = torch.nan, -torch.inf
    given = torch.tensor(0.02)
    q, scale = quantize(x, given)
    expected, scales = int8.quantize_rows(x, given)
    assert scale.isnan().tolist() == scales.isnan().tolist() == [False, True, True, False]
    assert torch.equal(q[[0, 3]], expected[[0, 3]]) and torch.equal(scale[[0, 3]], given.expand(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize("features", [7, 300, LONGEST + 5])
def test_rows_of_an_activation(features, activation, dtype):
    """Quantized as the activation is in fp32: one step at most where the last bit of fp32 tips a tie."""
    x = (3 * torch.randn(3, features)).to(dtype)
    for given in (None, torch.tensor(0.02)):
        with sb.backend("triton"):
            q, scale = quantize_rows(x, given, activation=activation)
        y = ACTIVATIONS[activation](x.double())
        _, scales = int8.quantize_rows(y.float(), given)
        torch.testing.assert_close(scale, scales, rtol=4e-7, atol=0)
        off = (q - (y / scale[:, None]).clamp(-127, 127)).abs()
        assert off.max() <= 0.5 + 1e-4


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_nothing_to_quantize(shape):
    q, scale = quantize(torch.empty(shape))
    assert q.shape == shape and q.dtype == torch.int8 and scale.tolist() == [1.0] * shape[0]


def weight_of(out_features, in_features, n=1, m=1):
    dense = torch.randn(out_features, in_features)
    values, scales = int8.quantize_weight(dense if m == 1 else nm.project(dense, n, m))
    return values, ([values] if m == 1 else list(nm.pack(values, n, m))), scales


@pytest.mark.parametrize("split_k", [1, 4])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 4), (1, 8), (3, 4)], ids=str)
def test_sums_are_exact(n, m, split_k):
    """With scales of one the result is the integer, in fp32: equal to int64."""
    values, packed, _ = weight_of(40, 208, n, m)
    q = torch.randint(-127, 128, (19, 208), dtype=torch.int8)
    one = torch.ones(40)
    y = kernel(
        q,
        torch.ones(19),
        packed[0],
        packed[1] if m > 1 else None,
        one,
        None,
        n=n,
        m=m,
        activation="none",
        dtype=torch.float32,
        config=Config(32, 16, 64, split_k),
    )
    assert torch.equal(y.long(), q.long() @ values.long().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(("n", "m", "layout"), [(1, 1, "neutral"), (2, 4, "neutral"), (2, 4, "unpacked")], ids=str)
def test_through_the_op(n, m, layout, activations, dtype):
    """At most twice the error of the reference backend, both against float64 from the same integers."""
    for out_features, in_features, tokens in ((100, 80, 7), (8, 144, 33), (1, 16, 1), (72, 208, 127)):
        values, packed, scales = weight_of(out_features, in_features, n, m)
        weight = [*(packed if layout == "neutral" else [values]), scales]
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        if activations == "static":
            weight.append(torch.tensor(0.02))
        q, x_scale = int8.quantize_rows(x, weight[-1] if activations == "static" else None)
        sums = (q.long() @ values.long().t()).double() * x_scale[:, None].double() * scales.double()
        sizes = Int8Spec(activations, n, m, in_features, out_features)._asdict()
        # All of these at one size, and one at the others: the interpreter is slow.
        options = list(product(ACTIVATIONS, (bias, None))) if tokens == 7 else [("gelu", bias)]
        for activation, b in options:
            exact = ACTIVATIONS[activation](sums if b is None else sums + b.double())
            found = {}
            for backend in ("triton", "reference"):
                with sb.backend(backend):
                    found[backend] = int8_linear(x, weight, b, layout=layout, activation=activation, **sizes)
                assert found[backend].shape == exact.shape and found[backend].dtype == dtype
            ours, theirs = ((y.double() - exact).abs().max() for y in found.values())
            assert ours <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max(), activation


@pytest.mark.parametrize("split_k", [1, 4])
@pytest.mark.parametrize(("n", "m", "layout"), [(1, 1, "neutral"), (2, 4, "neutral"), (2, 4, "unpacked")], ids=str)
def test_int8_rows_in_and_out(n, m, layout, split_k, monkeypatch):
    """From int8: what ``int8_linear`` makes of the same rows. To int8: the nearest step of that, in fp32."""
    (kernel,) = (c for c in select.candidates("int8_linear", layout) if c.backend == "triton")
    fixed = dataclasses.replace(kernel, configurations=lambda problem: [Config(32, 16, 64, split_k)])
    monkeypatch.setitem(select._candidates, ("int8_linear", layout), [fixed])
    select._choose.cache_clear()
    values, packed, scales = weight_of(40, 208, n, m)
    weight = [*(packed if layout == "neutral" else [values]), scales]
    sizes = Int8Spec("dynamic", n, m, 208, 40)._asdict()
    x, bias, output_scale = torch.randn(3, 7, 208), torch.randn(40), torch.tensor(0.05)
    q, s = int8.quantize_rows(x)
    with sb.backend("triton"):
        for activation in ("none", "gelu"):
            options = {"layout": layout, "activation": activation, **sizes}
            y = int8_linear_from_int8(q, s, weight, bias, dtype=torch.float32, **options)
            assert torch.equal(y, int8_linear(x, weight, bias, **options))
            found, found_scales = int8_linear_to_int8(q, s, weight, bias, output_scale, **options)
            assert found.dtype == torch.int8 and torch.equal(found_scales, output_scale.expand(3, 7))
            exact = (q.long() @ values.long().t()).double() * s[..., None].double() * scales.double() + bias.double()
            off = (found - (ACTIVATIONS[activation](exact) / output_scale.double()).clamp(-127, 127)).abs()
            assert off.max() <= 0.5 + 1e-4
        s[1, 2] = torch.nan
        _, found_scales = int8_linear_to_int8(q, s, weight, None, output_scale, **{**options, "activation": "none"})
        assert found_scales.isnan().nonzero().tolist() == [[1, 2]]
    select._choose.cache_clear()


def test_a_bad_row_spoils_itself_alone():
    _, packed, scales = weight_of(24, 64)
    x = torch.randn(5, 64)
    x[3, 1] = torch.nan
    sizes = Int8Spec("dynamic", 1, 1, 64, 24)._asdict()
    with sb.backend("triton"):
        y = int8_linear(x, [*packed, scales], None, layout="neutral", **sizes)
    assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()
