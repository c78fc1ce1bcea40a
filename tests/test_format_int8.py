"""The int8 format: the frozen rounding to the bit, exact accumulation, and nothing accepted that is no such weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.formats import int8

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
TINY = 2.0**-118
BELOW_TINY = float(np.nextafter(np.float32(TINY), np.float32(0)))


def naive_quantize(x):
    """The definition in numpy's float32, whose division is IEEE's and whose rint rounds half to even."""
    x = x.float().numpy()
    amax = np.abs(x).max(-1)
    with np.errstate(all="ignore"):
        inv = np.where(amax < np.float32(TINY), np.float32(0), np.float32(127) / amax)
        scale = np.where(amax < np.float32(TINY), np.float32(1), amax / np.float32(127))
    q = np.clip(np.rint(x * inv[..., None]), -127, 127).astype(np.int8)
    return torch.from_numpy(q), torch.from_numpy(np.asarray(scale))


def test_these_are_the_bytes():
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], [0, 0, 0, 0, 0, 0, 0, 0]])
    q, scale = int8.quantize_rows(x)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert q.tolist() == [[127, -127, 0, 2, 2, 0, -2, 126], [0] * 8]
    assert scale.tolist() == [1.0, 1.0]
    values, scales = int8.quantize_weight(torch.tensor([[2.0, -1.0, 0.01], [-0.5, 0.0, 0.25]]))
    assert values.tolist() == [[127, -64, 1], [-127, 0, 64]]  # -63.5 and 63.5 go to the even neighbour
    assert torch.equal(scales, torch.from_numpy(np.array([2.0, 0.5], dtype=np.float32) / np.float32(127)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 33), (3, 4, 17), (2, 0, 8), (0, 3), (2, 3, 2, 5)], ids=str)
def test_rows_of_any_shape_and_dtype(shape, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    before = x.clone()
    q, scale = int8.quantize_rows(x)
    assert (q.shape, scale.shape) == (x.shape, x.shape[:-1])
    expected_q, expected_scale = naive_quantize(x)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
    assert torch.equal(x, before)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    st.sampled_from(DTYPES),
)
def test_the_rounding_is_the_definition_for_every_number(numbers, dtype):
    """Subnormal, tiny and the largest numbers among them."""
    x = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    if not torch.isfinite(x).all():
        return
    q, scale = int8.quantize_rows(x)
    expected_q, expected_scale = naive_quantize(x)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
    assert int(q.abs().max()) in (0, 127)
    assert 2.0**-125 <= float(scale) < 2.0**122


def test_divisions_are_ieee_and_no_products_with_a_reciprocal():
    amax = torch.rand(20000) * 8 + 0.01
    scale, inv = int8.scale_of(amax)
    assert np.array_equal(scale.numpy(), amax.numpy() / np.float32(127))
    assert np.array_equal(inv.numpy(), np.float32(127) / amax.numpy())
    # These numbers do tell the two apart.
    assert not torch.equal(scale, amax * torch.tensor(1 / 127))
    assert not torch.equal(inv, amax.reciprocal() * 127)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_scales_have_the_shape_of_amax(shape, dtype):
    scale, inv = int8.scale_of(torch.ones(shape, dtype=dtype))
    assert scale.shape == inv.shape == shape
    assert scale.dtype == inv.dtype == torch.float32


def test_rows_too_small_for_a_normal_scale_are_zero():
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-126, BELOW_TINY, TINY])
    scale, inv = int8.scale_of(amax)
    assert scale[:4].tolist() == [1.0] * 4 and inv[:4].tolist() == [0.0] * 4
    assert float(scale[4]) >= torch.finfo(torch.float32).tiny and torch.isfinite(inv).all()
    q, _ = int8.quantize_rows(torch.stack([amax, -amax / 2], dim=1))
    assert q.tolist() == [[0, 0]] * 4 + [[127, -64]]
    # Without the bound this quotient would overflow, and 0 * inf is NaN.
    assert torch.isinf(127 / amax[:3]).all()


def test_flushing_subnormal_numbers_changes_nothing():
    subnormal = 2.0**-126 - 2.0**-149
    # The largest subnormal number in the smallest row that is not zero, and rows on both sides of the bound.
    x = torch.tensor([[TINY, subnormal, -subnormal], [BELOW_TINY, subnormal, 0], [subnormal, 0, 0], [1.5e-36, 1, 2]])
    q, scale = int8.quantize_rows(x)
    assert q.tolist() == [[127, 0, 0], [0, 0, 0], [0, 0, 0], [0, 64, 127]]
    low = torch.tensor(int8.INPUT_SCALES[0])
    static = int8.quantize_rows(torch.tensor([subnormal, 2.0**-124]), low)[0]
    assert static.tolist() == [0, 2]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        again, again_scale = int8.quantize_rows(x)
        again_static = int8.quantize_rows(torch.tensor([subnormal, 2.0**-124]), low)[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(again, q) and torch.equal(again_scale, scale) and torch.equal(again_static, static)


def test_the_largest_numbers_stay_in_range():
    top = torch.finfo(torch.float32).max
    q, scale = int8.quantize_rows(torch.tensor([top, -top, top / 127]))
    assert q.tolist() == [127, -127, 1] and torch.isfinite(scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_says_so_and_touches_no_other(bad, dtype):
    x = torch.randn(4, 9).to(dtype)
    q, scale = int8.quantize_rows(x)
    x[2, 5] = bad
    again, again_scale = int8.quantize_rows(x)
    others = [0, 1, 3]
    assert torch.equal(again[others], q[others]) and torch.equal(again_scale[others], scale[others])
    assert not torch.isfinite(again_scale[2])


def test_rows_without_features():
    q, scale = int8.quantize_rows(torch.ones(3, 0, dtype=torch.float16))
    assert (q.shape, q.dtype, scale.tolist(), scale.dtype) == ((3, 0), torch.int8, [1.0] * 3, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_parameters_give_plain_row_major_values(dtype):
    x = torch.nn.Parameter(torch.randn(6, 4).to(dtype))
    for view in (x.t(), x[::2, 1:], x[:1].expand(3, 4)):
        q, scale = int8.quantize_rows(view)
        expected_q, expected_scale = naive_quantize(view.detach())
        assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
        assert q.is_contiguous() and not scale.requires_grad
        assert int8.quantize_rows(view, torch.tensor(0.1))[0].is_contiguous()


def test_static_is_the_product_with_the_reciprocal():
    scale = torch.tensor(0.1)
    x = torch.randn(4, 50) * 8
    expected = np.clip(np.rint(x.numpy() * (np.float32(1) / np.float32(0.1))), -127, 127)
    q, scales = int8.quantize_rows(x, scale)
    assert q.dtype == torch.int8 and np.array_equal(q.numpy(), expected)
    assert torch.equal(scales, scale.expand(4))
    q, scales = int8.quantize_rows(torch.tensor([500.0, -500.0]), scale)
    assert q.tolist() == [127, -127] and torch.equal(scales, scale)
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert int8.quantize_rows(halves, torch.tensor(1.0))[0].tolist() == [0, 2, 2, 0, -2]
    for dtype in DTYPES:
        exact = torch.tensor(0.25, dtype=dtype)
        assert int8.quantize_rows(torch.tensor([1.0], dtype=dtype), exact)[0].tolist() == [4]
    q, scales = int8.quantize_rows(torch.ones(2, 0), scale)
    assert q.shape == (2, 0) and torch.equal(scales, scale.expand(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_static_rows_that_are_not_finite_show_in_their_scale(dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    x[0, 1, 2], x[2, 3, 4], x[1, 0, 0] = torch.nan, torch.inf, -torch.inf
    _, scales = int8.quantize_rows(x, torch.tensor(0.1))
    assert scales.isnan().nonzero().tolist() == [[0, 1], [1, 0], [2, 3]]
    assert (scales[~scales.isnan()] == torch.tensor(0.1)).all()


def test_static_refuses_scales_of_other_shapes_and_dtypes():
    with pytest.raises(ValueError, match=r"quantize_rows: input_scale has shape \(1,\), expected \(\)"):
        int8.quantize_rows(torch.ones(2), torch.ones(1))
    with pytest.raises(ValueError, match="quantize_rows: input_scale is int64, expected float16, bfloat16"):
        int8.quantize_rows(torch.ones(2), torch.tensor(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_comes_back_within_half_a_step(dtype):
    weight = torch.randn(9, 31).to(dtype)
    weight[4] = 0
    values, scales = int8.quantize_weight(weight)
    int8.validate(values, scales, 9, 31)
    assert (values[4] == 0).all() and scales[4] == 1
    assert (values.int().abs().amax(-1)[[0, 1, 2, 3, 5, 6, 7, 8]] == 127).all()
    dense = int8.dequantize(values, scales)
    assert dense.dtype == torch.float32
    # Half a step, and the rounding of fp32.
    assert ((dense.double() - weight.double()).abs() <= scales[:, None].double() * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_rounds_the_fp32_product(dtype):
    values = torch.randint(-127, 128, (5, 40)).to(torch.int8)
    scales = torch.rand(5)
    expected = torch.from_numpy(values.numpy().astype(np.float32) * scales.numpy()[:, None]).to(dtype)
    dense = int8.dequantize(values, scales, dtype)
    assert dense.dtype == dtype and torch.equal(dense, expected)
    again = int8.dequantize(values, scales.to(dtype))
    assert torch.equal(again, values.float() * scales.to(dtype).float()[:, None])
    assert int8.dequantize(values[0], scales[0]).shape == (40,)


def test_dequantize_refuses_shapes():
    for values, scales in ((torch.zeros(3, 4), torch.ones(4)), (torch.zeros(3, 4), torch.ones(3, 1))):
        with pytest.raises(
            ValueError, match=r"dequantize: values \(3, 4\) and scales .*, expected \(\.\.\., features\)"
        ):
            int8.dequantize(values.to(torch.int8), scales)
    with pytest.raises(ValueError, match=r"dequantize: values \(\) and scales \(\)"):
        int8.dequantize(torch.tensor(1, dtype=torch.int8), torch.tensor(1.0))


def test_meta_tensors_give_shapes():
    for dtype in DTYPES:
        x = torch.empty(2, 6, 24, device="meta", dtype=dtype)
        q, scale = int8.quantize_rows(x)
        assert (q.shape, q.dtype, q.is_meta) == ((2, 6, 24), torch.int8, True)
        assert (scale.shape, scale.dtype, scale.is_meta) == ((2, 6), torch.float32, True)
        input_scale = torch.empty((), device="meta")
        q, scale = int8.quantize_rows(x, input_scale)
        assert (q.shape, q.dtype, scale.shape, scale.is_meta) == ((2, 6, 24), torch.int8, (2, 6), True)
        int8.validate_input_scale(input_scale)
        values, scales = int8.quantize_weight(x[0])
        int8.validate(values, scales, 6, 24)
        assert int8.dequantize(values, scales, torch.float16).shape == (6, 24)
        total = int8.accumulate(q, values)
        assert (total.shape, total.dtype, total.is_meta) == ((2, 6, 6), torch.int32, True)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[0.0], [float("nan")]]), "layer.3: weight holds nan in row 1, expected finite numbers"),
        (torch.tensor([[float("-inf")]]), "layer.3: weight holds -inf in row 0, expected finite numbers"),
        (torch.tensor([[1e300]], dtype=torch.float64), "layer.3: weight as float32 holds inf in row 0"),
        (torch.zeros(8), "layer.3: weight has 1 dimensions, expected 2"),
    ],
)
def test_quantize_weight_refuses_with_layer_and_place(weight, message):
    with pytest.raises(ValueError, match=message):
        int8.quantize_weight(weight, name="layer.3")


def test_integers_and_scalars_are_refused():
    integers = torch.zeros(2, 4, dtype=torch.int8)
    for call, label in (
        (lambda: int8.quantize_weight(integers), "weight: weight"),
        (lambda: int8.quantize_rows(integers), "quantize_rows: x"),
        (lambda: int8.scale_of(integers), "scale_of: amax"),
    ):
        with pytest.raises(TypeError, match=rf"{label} is torch\.int8, expected a floating-point tensor"):
            call()
    with pytest.raises(ValueError, match="quantize_rows: x has 0 dimensions, expected at least 1"):
        int8.quantize_rows(torch.tensor(1.0))


def int8_ones(*shape):
    return torch.ones(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (int8_ones(3, 4), torch.ones(3), r"values has shape \(3, 4\), expected \(3, 5\)"),
        (int8_ones(15), torch.ones(3), r"values has shape \(15,\), expected \(3, 5\)"),
        (int8_ones(3, 5).to(torch.uint8), torch.ones(3), "values is uint8, expected int8"),
        (int8_ones(3, 5), torch.ones(4), r"scales has shape \(4,\), expected \(3,\)"),
        (int8_ones(3, 5), torch.ones(3, 1), r"scales has shape \(3, 1\), expected \(3,\)"),
        (int8_ones(3, 5), torch.tensor(1.0), r"scales has shape \(\), expected \(3,\)"),
        (int8_ones(3, 5), torch.ones(3).int(), "scales is int32, expected float16, bfloat16, float32, float64"),
        (int8_ones(3, 5), torch.ones(3, device="meta"), "values is on cpu, scales on meta, expected one device"),
        (int8_ones(3, 5), torch.tensor([1, torch.nan, 1]), "scales holds nan at 1, expected finite float32 above 0"),
        (int8_ones(3, 5), torch.tensor([1, 1, torch.inf]), "scales holds inf at 2, expected finite float32 above 0"),
        (int8_ones(3, 5), torch.tensor([0.0, 1, 1]), r"scales holds 0\.0 at 0, expected finite float32 above 0"),
        (int8_ones(3, 5), torch.tensor([1, -0.5, 1]), r"scales holds -0\.5 at 1, expected finite float32 above 0"),
        (
            int8_ones(3, 5),
            torch.tensor([1e300, 1, 1], dtype=torch.float64),
            "scales holds 1e.300 at 0, expected finite",
        ),
        (int8_ones(3, 5), torch.tensor([1e-300, 1, 1], dtype=torch.float64), "scales holds 1e-300 at 0, expected"),
        (int8_ones(3, 5).index_fill_(0, torch.tensor(1), -128), torch.ones(3), "values holds -128 in row 1, expected"),
    ],
)
def test_validate_refuses(values, scales, message):
    with pytest.raises(ValueError, match=f"some.layer: {message}"):
        int8.validate(values, scales, 3, 5, name="some.layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_validate_takes_scales_of_any_float_dtype_and_empty_weights(dtype):
    int8.validate(int8_ones(3, 5), torch.full((3,), 0.01, dtype=dtype), 3, 5)
    int8.validate(int8_ones(0, 5), torch.ones(0, dtype=dtype), 0, 5)
    int8.validate(int8_ones(3, 0), torch.ones(3, dtype=dtype), 3, 0)
    int8.validate_input_scale(torch.tensor(0.01, dtype=dtype))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 2.0**-126, 2.0**126])
def test_input_scales_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="some.layer: input_scale is .*, expected a finite number above 0"):
        int8.validate_input_scale(torch.tensor(value), name="some.layer")


def test_input_scales_of_other_shapes_and_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"int8: input_scale has shape \(1,\), expected \(\)"):
        int8.validate_input_scale(torch.ones(1))
    with pytest.raises(ValueError, match="int8: input_scale is int32, expected float16, bfloat16, float32, float64"):
        int8.validate_input_scale(torch.tensor(1, dtype=torch.int32))
    for bound in int8.INPUT_SCALES:
        int8.validate_input_scale(torch.tensor(bound))


@pytest.mark.parametrize("in_features", [1, 2, 7, 1023, 1024, 1025, 1040, 2047, 2048, 3073, 5000])
def test_accumulation_is_exact_at_its_worst(in_features):
    """All products of one sign and odd, so that sums are as large as can be, and no rounding goes unseen."""
    ones = torch.ones(2, in_features, dtype=torch.int8)
    for a, b in ((127, 127), (127, -127), (-128, -128), (-128, 127), (125, 127)):
        q, values = ones * a, ones * b
        q[1, ::3] -= 1 if a > 0 else -1
        expected = q.long() @ values.long().t()
        total = int8.accumulate(q, values)
        assert total.dtype == torch.int32 and torch.equal(total.long(), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 2**31), st.sampled_from([(), (3,), (2, 2), (0,), (1, 4)]))
def test_accumulation_equals_integers(in_features, seed, leading):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (*leading, in_features), generator=generator).to(torch.int8)
    values = torch.randint(-127, 128, (5, in_features), generator=generator).to(torch.int8)
    total = int8.accumulate(q, values)
    assert total.shape == (*leading, 5)
    assert torch.equal(total.long(), q.long() @ values.long().t())


def test_accumulation_is_exact_where_float_products_are_made_fast():
    q, values = (torch.randint(-127, 128, (6, 1500)).to(torch.int8) for _ in range(2))
    expected = q.long() @ values.long().t()
    precision = torch.get_float32_matmul_precision()
    try:
        for fast in ("high", "medium"):
            torch.set_float32_matmul_precision(fast)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(int8.accumulate(q, values).long(), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_accumulation_of_the_most_features_fits_int32():
    row = torch.full((1, (1 << 17) - 1), -128, dtype=torch.int8)
    assert int(int8.accumulate(row, row)) == ((1 << 17) - 1) * 2**14
    with pytest.raises(ValueError, match="accumulate: in_features is 131072, expected at most 131071"):
        int8.accumulate(torch.ones(1, 1 << 17, dtype=torch.int8), torch.ones(1, 1 << 17, dtype=torch.int8))


def test_accumulation_refuses_shapes_and_dtypes():
    for q, values in (
        (int8_ones(2, 3), int8_ones(2, 4)),
        (int8_ones(2, 3), int8_ones(3)),
        (int8_ones(), int8_ones(1, 1)),
    ):
        with pytest.raises(
            ValueError, match=r"accumulate: q \(.*\) and values \(.*\), expected \(\.\.\., in_features\)"
        ):
            int8.accumulate(q, values)
    with pytest.raises(TypeError, match="accumulate: q is float32, expected int8"):
        int8.accumulate(torch.ones(2, 3), int8_ones(2, 3))
    with pytest.raises(TypeError, match="accumulate: values is uint8, expected int8"):
        int8.accumulate(int8_ones(2, 3), int8_ones(2, 3).to(torch.uint8))
