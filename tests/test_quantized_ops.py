"""The ops on int8 rows, in every layout a CPU can hold: one after the other they are what the float ops are."""

from __future__ import annotations

import pytest
import torch

import sparsebert.ops
from packed_cases import KINDS, OUT, held, make, pairs
from sparsebert.formats import int8
from sparsebert.ops import int8_linear, int8_linear_from_int8, int8_linear_to_int8, quantize_rows
from sparsebert.ops.activations import ACTIVATIONS

INT8 = [kind for kind in KINDS if kind.startswith("int8")]
QUANTIZING = pairs(*INT8, without=("dense",))
OUTPUT_SCALE = torch.tensor(0.05)


def case(kind, layout, *shape):
    """The op's arguments, and its keywords."""
    made = make(kind)
    x = 2 * torch.randn(*shape, made.spec.in_features)
    static = torch.tensor(0.02) if made.spec.activations == "static" else None
    return (*quantize_rows(x, static), held(made, layout), made.bias), {"layout": layout, **made.spec._asdict()}, x


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "layout"), QUANTIZING)
def test_from_int8_is_the_second_half_of_int8_linear(kind, layout, activation):
    for shape in ((5,), (2, 3), (0,), ()):
        (q, s, weight, bias), sizes, x = case(kind, layout, *shape)
        for b in (bias, None):
            y = int8_linear_from_int8(q, s, weight, b, dtype=torch.float32, activation=activation, **sizes)
            assert torch.equal(y, int8_linear(x, weight, b, activation=activation, **sizes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_from_int8_in_other_dtypes(dtype):
    (q, s, weight, bias), sizes, _ = case("int8", "neutral", 5)
    y = int8_linear_from_int8(q, s, weight, bias.to(dtype), dtype=dtype, **sizes)
    exact = int8_linear_from_int8(q, s, weight, bias.to(dtype).float(), dtype=torch.float32, **sizes)
    assert y.dtype == dtype and torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "layout"), QUANTIZING)
def test_to_int8_is_that_quantized_from_fp32(kind, layout, activation):
    for shape in ((5,), (2, 3), (0,), ()):
        (q, s, weight, bias), sizes, _ = case(kind, layout, *shape)
        found = int8_linear_to_int8(q, s, weight, bias, OUTPUT_SCALE, activation=activation, **sizes)
        y = int8_linear_from_int8(q, s, weight, bias, dtype=torch.float32, activation=activation, **sizes)
        for ours, expected in zip(found, int8.quantize_rows(y, OUTPUT_SCALE), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", INT8)
def test_a_dense_layout_takes_what_the_integers_stand_for(kind):
    (q, s, weight, bias), sizes, _ = case(kind, "dense", 5)
    y = int8_linear_from_int8(q, s, weight, bias, dtype=torch.float32, **sizes)
    assert torch.equal(y, torch.nn.functional.linear(int8.dequantize(q, s), weight[0], bias))
    found, scales = int8_linear_to_int8(q, s, weight, bias, OUTPUT_SCALE, **sizes)
    assert torch.equal(found, int8.quantize_rows(y, OUTPUT_SCALE)[0]) and torch.equal(scales, OUTPUT_SCALE.expand(5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_of_an_activation_are_quantized_from_fp32(activation):
    x = torch.randn(4, 33).half()
    y = ACTIVATIONS[activation](x.float())
    for static in (None, OUTPUT_SCALE):
        for ours, expected in zip(
            quantize_rows(x, static, activation=activation), int8.quantize_rows(y, static), strict=True
        ):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (0,)])
def test_nothing_to_quantize(shape):
    for static in (None, OUTPUT_SCALE):
        q, s = quantize_rows(torch.empty(shape), static)
        assert q.shape == shape and q.dtype == torch.int8 and s.shape == shape[:-1]


def test_what_is_not_finite_stays_so_from_layer_to_layer():
    """Through a feed-forward net of two static layers: the row is NaN at its end, and no other is touched."""
    (_, _, weight, bias), sizes, x = case("int8-static", "neutral", 6)
    clean = None
    for bad in (None, torch.nan, torch.inf):
        rows = x.clone()
        if bad is not None:
            rows[2, 1] = bad
        q, s = quantize_rows(rows, torch.tensor(0.02))
        q, s = int8_linear_to_int8(q, s, weight, bias, OUTPUT_SCALE, activation="gelu", **sizes)
        back = {**sizes, "in_features": OUT, "out_features": sizes["in_features"]}
        second = [weight[0].t().contiguous(), torch.ones(sizes["in_features"]), weight[-1]]
        y = int8_linear_from_int8(q, s, second, None, dtype=torch.float32, **back)
        if bad is None:
            clean = y
            assert y.isfinite().all()
        else:
            assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_errors_name_op_tensor_expected_and_actual():
    (q, s, weight, bias), sizes, _ = case("int8", "neutral", 5)
    width = sizes["in_features"]
    wrong = [
        ({"q": q.to(torch.uint8)}, TypeError, r"q is torch\.uint8, expected torch\.int8, symmetric: without a zero"),
        ({"q": q.float()}, TypeError, r"q is torch\.float32, expected torch\.int8"),
        ({"q": q[:, 1:]}, ValueError, rf"q has shape \(5, {width - 1}\), expected \(\.\.\., {width}\)"),
        ({"s": s[:4]}, ValueError, r"s has shape \(4,\), expected \(5,\)"),
        (
            {"s": torch.stack((s, s), 1)},
            ValueError,
            r"s has shape \(5, 2\), expected \(5,\), symmetric: without a zero",
        ),
        ({"s": s.int()}, TypeError, r"s is torch\.int32, expected a floating-point tensor"),
        ({"weight": weight[:1]}, ValueError, r"weight has 1 tensors, expected 2 \(values, scales\)"),
        ({"bias": bias[1:]}, ValueError, rf"bias has shape \({OUT - 1},\), expected \({OUT},\)"),
        ({"bias": bias.int()}, TypeError, r"bias is torch\.int32, expected a floating-point tensor"),
    ]
    for change, error, message in wrong:
        given = {"q": q, "s": s, "weight": weight, "bias": bias} | change
        for name, more, options in (
            ("int8_linear_from_int8", (), {"dtype": torch.float32}),
            ("int8_linear_to_int8", (OUTPUT_SCALE,), {}),
        ):
            with pytest.raises(error, match=f"^{name}: {message}"):
                getattr(sparsebert.ops, name)(*given.values(), *more, **options, **sizes)
    with pytest.raises(ValueError, match=r"^int8_linear_to_int8: output_scale has shape \(1,\), expected \(\)"):
        int8_linear_to_int8(q, s, weight, bias, torch.ones(1), **sizes)
    with pytest.raises(ValueError, match=r"^quantize_rows: x is torch\.uint8 with 2 dimensions, expected floats"):
        quantize_rows(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^quantize_rows: input_scale has shape \(2,\), expected \(\), symmetric"):
        quantize_rows(torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="^quantize_rows: activation is 'swish', expected one of none, gelu"):
        quantize_rows(torch.zeros(2, 2), activation="swish")


@pytest.mark.parametrize("kind", INT8)
def test_opcheck(kind):
    (q, s, weight, bias), sizes, _ = case(kind, "neutral", 3)
    ops = torch.ops.sparsebert
    torch.library.opcheck(ops.int8_linear_from_int8.default, (q, s, weight, bias), {"dtype": torch.float16, **sizes})
    torch.library.opcheck(ops.int8_linear_to_int8.default, (q, s, weight, None, OUTPUT_SCALE), sizes)
    torch.library.opcheck(ops.quantize_rows.default, (torch.randn(3, 8), OUTPUT_SCALE), {"activation": "gelu"})


def test_a_compiled_feed_forward_net_is_one_graph():
    (q, s, weight, bias), sizes, _ = case("int8", "neutral", 4)

    def net(q, s):
        q, s = int8_linear_to_int8(q, s, weight, bias, OUTPUT_SCALE, activation="gelu", **sizes)
        return quantize_rows(int8.dequantize(q, s), activation="relu")

    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(q, s), net(q, s), strict=True):
        assert torch.equal(ours, expected)
