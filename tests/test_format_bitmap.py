"""The bitmap format: one packed form for every weight, exact both ways, and nothing else accepted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.formats import bitmap

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def sparse_weights(draw):
    """A weight of any density, 0 and 1 among them, with empty rows and any number of columns."""
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 35))
    density = draw(st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) >= density] = 0
    weight[torch.rand(rows, generator=generator) < 0.2] = 0
    return weight.to(draw(st.sampled_from(DTYPES)))


def naive_pack(weight):
    """The format's definition, one weight at a time."""
    values, bytes_, offsets = [], [], [0]
    for row in weight.tolist():
        used = [j for j, w in enumerate(row) if w != 0]
        values += [row[j] for j in used]
        bytes_.append(list(sum(1 << j for j in used).to_bytes(-(-len(row) // 8), "little")))
        offsets.append(len(values))
    return (
        torch.tensor(values, dtype=weight.dtype),
        torch.tensor(bytes_, dtype=torch.uint8).reshape(len(weight), -(-weight.shape[1] // 8)),
        torch.tensor(offsets),
    )


def check_round_trip(weight):
    packed = bitmap.pack(weight)
    for actual, expected in zip(packed, naive_pack(weight), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    nnz = len(packed[0])
    assert tuple(tuple(t.shape) for t in packed) == bitmap.packed_shapes(*weight.shape, nnz)
    again = bitmap.unpack(*packed, weight.shape[1])
    assert again.dtype == weight.dtype and torch.equal(again, weight)
    bitmap.validate(*packed, nnz, *weight.shape)


@settings(max_examples=150, deadline=None)
@given(sparse_weights())
def test_pack_is_the_definition_and_unpack_its_inverse(weight):
    check_round_trip(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 9), (4, 0), (1, 1), (3, 7), (3, 8), (3, 9), (1, 64), (65, 1)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_odd_shapes_empty_and_full(shape, density, dtype):
    weight = torch.where(torch.rand(shape) < density, torch.rand(shape) + 0.5, 0.0)
    check_round_trip(weight.to(dtype))


@pytest.mark.parametrize("block", [1, 24, 70])
def test_blocks_of_rows_join_without_a_seam(monkeypatch, block):
    monkeypatch.setattr(bitmap, "_BLOCK", block)
    weight = torch.where(torch.rand(37, 21) < 0.4, torch.randn(37, 21), 0.0)
    check_round_trip(weight)


def test_these_are_the_bytes():
    weight = torch.tensor(
        [
            [1.0, 0, 0, 0, 0, 0, 0, 2.0, 3.0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 4.0, 5.0, 0, 0, 0, 0, 0, -6.0],
        ]
    )
    values, bits, row_offsets = bitmap.pack(weight)
    assert values.tolist() == [1, 2, 3, 4, 5, -6]
    assert bits.tolist() == [[0b1000_0001, 0b01], [0, 0], [0b0000_1100, 0b10]]
    assert row_offsets.tolist() == [0, 3, 3, 6]
    assert (bits.dtype, row_offsets.dtype) == (torch.uint8, torch.int64)


def test_one_bit_a_weight_and_the_values():
    weight = bitmap.project(torch.randn(64, 768), 64 * 768 // 4).half()
    values, bits, row_offsets = bitmap.pack(weight)
    assert 8 * (values.nbytes + bits.nbytes) == (1 + 16 / 4) * weight.numel()
    assert row_offsets.nbytes == 8 * 65


def test_negative_zero_is_zero():
    packed = bitmap.pack(torch.tensor([[-0.0, 3.0, -0.0]]))
    assert packed[0].tolist() == [3.0]
    assert not torch.signbit(bitmap.unpack(*packed, 3)).any()


def test_a_weight_that_needs_a_gradient_or_is_transposed_packs():
    weight = torch.nn.Parameter(torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 4.0]]))
    values, bits, row_offsets = bitmap.pack(weight.t())
    assert not values.requires_grad
    assert (values.tolist(), bits.tolist(), row_offsets.tolist()) == ([2, 3, 1, 4], [[0b110], [0b101]], [0, 2, 4])


@pytest.mark.parametrize(
    ("density", "shape", "expected"),
    [(0.5, (4, 6), 12), (0.0, (4, 6), 1), (1.0, (4, 6), 24), (0.1, (5, 5), 2), (0.02, (5, 5), 1), (0.7, (0, 6), 0)],
)
def test_keep_count(density, shape, expected):
    assert bitmap.keep_count(density, *shape) == expected


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
def test_keep_count_refuses_what_is_no_density(density):
    with pytest.raises(ValueError, match="keep_count: density is .*, expected 0 to 1"):
        bitmap.keep_count(density, 4, 4)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_mask_is_a_stable_sort_of_the_magnitudes(data):
    """Few different magnitudes, so that nearly every cut goes through ties."""
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, float("inf"), float("nan")])
    weight = torch.tensor(data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns)))
    weight = weight.view(rows, columns).to(data.draw(st.sampled_from(DTYPES)))
    count = data.draw(st.integers(0, rows * columns))
    magnitudes = weight.abs().flatten().nan_to_num(nan=float("inf"), posinf=float("inf")).tolist()
    order = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))[:count]
    assert bitmap.magnitude_mask(weight, count).flatten().nonzero().flatten().tolist() == sorted(order)


@pytest.mark.parametrize("count", [0, 1, 60, 119, 120])
def test_ties_are_broken_across_blocks(monkeypatch, count):
    monkeypatch.setattr(bitmap, "_BLOCK", 7)
    mask = bitmap.magnitude_mask(torch.ones(10, 12), count).flatten()
    assert mask.tolist() == [i < count for i in range(120)]


def test_the_other_way_to_find_the_cut_is_the_same(monkeypatch):
    weight = torch.randn(9, 11).half()
    expected = bitmap.magnitude_mask(weight, 40)
    monkeypatch.setattr(bitmap, "_kth_largest", lambda magnitudes, k: torch.sort(magnitudes).values[-k])
    assert torch.equal(bitmap.magnitude_mask(weight, 40), expected)


def test_projection_is_the_nearest():
    weight = torch.randn(3, 8, dtype=torch.float64)
    best = bitmap.project(weight, 7)
    assert int((best != 0).sum()) == 7
    for seed in range(50):
        order = torch.rand(24, generator=torch.Generator().manual_seed(seed)).argsort()
        other = torch.where(order.view(3, 8) < 7, weight, 0.0)
        assert (weight - best).norm() <= (weight - other).norm()
    assert torch.equal(bitmap.project(best, 7), best)


def test_projection_of_a_parameter_passes_the_gradient_of_what_is_kept():
    weight = torch.tensor([[1.0, -3.0, 2.0]], requires_grad=True)
    bitmap.project(weight, 2).sum().backward()
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0]]


def test_meta_tensors_give_shapes():
    weight = torch.empty(6, 21, device="meta", dtype=torch.float16)
    packed = bitmap.pack(weight, nnz=40)
    assert [tuple(t.shape) for t in packed] == [(40,), (6, 3), (7,)]
    assert [t.dtype for t in packed] == [torch.float16, torch.uint8, torch.int64]
    assert all(t.is_meta for t in packed)
    assert bitmap.unpack(*packed, 21).shape == (6, 21)
    bitmap.validate(*packed, 40, 6, 21)
    assert bitmap.magnitude_mask(weight, 5).is_meta
    assert bitmap.project(weight, 5).dtype == torch.float16
    with pytest.raises(ValueError, match="layer.3: a meta weight does not say how many non-zeros it has, expected nnz"):
        bitmap.pack(weight, name="layer.3")
    with pytest.raises(ValueError, match=r"bitmap: nnz is 127, expected 0 to 6 \* 21"):
        bitmap.pack(weight, nnz=127)
    with pytest.raises(ValueError, match=r"bitmap: values has shape \(40,\), expected \(39,\)"):
        bitmap.validate(*packed, 39, 6, 21)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[0.0, float("nan"), 0, 0]]), r"layer\.3: weight holds nan in row 0, expected finite"),
        (torch.tensor([[0.0, 0], [float("-inf"), 0]]), r"layer\.3: weight holds -inf in row 1, expected finite"),
        (torch.zeros(8), r"layer\.3: weight has 1 dimensions, expected 2"),
    ],
)
def test_pack_refuses_with_layer_and_place(weight, message):
    with pytest.raises(ValueError, match=message):
        bitmap.pack(weight, name="layer.3")


def test_pack_names_the_row_of_a_later_block(monkeypatch):
    monkeypatch.setattr(bitmap, "_BLOCK", 8)
    weight = torch.zeros(9, 4)
    weight[7, 1] = float("nan")
    with pytest.raises(ValueError, match="weight holds nan in row 7"):
        bitmap.pack(weight)


def test_pack_refuses_integers_and_a_wrong_nnz():
    with pytest.raises(TypeError, match=r"weight is torch\.int8, expected a floating-point tensor"):
        bitmap.pack(torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="layer.3: weight has 2 non-zeros, expected nnz=3"):
        bitmap.pack(torch.eye(2), name="layer.3", nnz=3)
    assert len(bitmap.pack(torch.eye(2), nnz=2)[0]) == 2


@pytest.mark.parametrize("count", [-1, 9])
def test_the_mask_refuses_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=f"magnitude_mask: count is {count}, expected 0 to 8"):
        bitmap.magnitude_mask(torch.ones(2, 4), count)


def packed_3_10():
    """Rows of 3, 0 and 4 non-zeros."""
    weight = torch.zeros(3, 10)
    weight[0, [0, 7, 8]] = torch.tensor([1.0, 2.0, 3.0])
    weight[2, [1, 2, 3, 9]] = torch.tensor([4.0, 5.0, 6.0, 7.0])
    return list(bitmap.pack(weight))


@pytest.mark.parametrize(
    ("which", "place", "value", "message"),
    [
        (0, 4, float("nan"), "values holds nan at 4, expected finite numbers that are not 0"),
        (0, 6, float("inf"), "values holds inf at 6, expected finite"),
        (0, 0, 0.0, "values holds 0.0 at 0, expected finite numbers that are not 0"),
        (0, 3, -0.0, "values holds -0.0 at 3, expected finite numbers that are not 0"),
        (1, (1, 1), 0b100, "bitmap has spare bits set at the end of row 1, expected zeros"),
        (1, (2, 1), 0b1000_0010, "bitmap has spare bits set at the end of row 2, expected zeros"),
        (1, (1, 0), 1, "bitmap has 8 bits set, expected nnz=7"),
        (1, (0, 0), 0, "bitmap has 5 bits set, expected nnz=7"),
        (2, 0, 1, "row_offsets has 1 at 0, expected 0, the bits set in bitmap before row 0"),
        (2, 1, 2, "row_offsets has 2 at 1, expected 3, the bits set in bitmap before row 1"),
        (2, 2, 2, "row_offsets has 2 at 2, expected 3"),  # decreases
        (2, 1, -1, "row_offsets has -1 at 1, expected 3"),
        (2, 3, 8, "row_offsets has 8 at 3, expected 7"),
        (2, 3, 2**63 - 1, "row_offsets has 9223372036854775807 at 3, expected 7"),
        (2, 2, -(2**63), "row_offsets has -9223372036854775808 at 2, expected 3"),
    ],
)
def test_validate_refuses(which, place, value, message):
    packed = packed_3_10()
    bitmap.validate(*packed, 7, 3, 10)
    packed[which][place] = value
    with pytest.raises(ValueError, match=f"some.layer: {message}"):
        bitmap.validate(*packed, 7, 3, 10, name="some.layer")


def test_validate_refuses_bits_moved_to_another_row():
    values, bits, row_offsets = packed_3_10()
    with pytest.raises(ValueError, match="row_offsets has 3 at 1, expected 0"):
        bitmap.validate(values, bits[[1, 0, 2]], row_offsets, 7, 3, 10)


def test_validate_refuses_in_a_later_block(monkeypatch):
    monkeypatch.setattr(bitmap, "_BLOCK", 2)
    values, bits, row_offsets = packed_3_10()
    bitmap.validate(values, bits, row_offsets, 7, 3, 10)
    values[5] = 0
    with pytest.raises(ValueError, match="values holds 0.0 at 5"):
        bitmap.validate(values, bits, row_offsets, 7, 3, 10)
    bits[2, 1] |= 0b1000
    with pytest.raises(ValueError, match="spare bits set at the end of row 2"):
        bitmap.validate(values, bits, row_offsets, 7, 3, 10)


@pytest.mark.parametrize(
    ("which", "tensor", "message"),
    [
        (0, torch.ones(6), r"values has shape \(6,\), expected \(7,\) for nnz=7"),
        (0, torch.ones(7, 1), r"values has shape \(7, 1\), expected \(7,\)"),
        (0, torch.ones(7, dtype=torch.int32), "values is int32, expected float16, bfloat16, float32, float64"),
        (1, torch.zeros(3, 1, dtype=torch.uint8), r"bitmap has shape \(3, 1\), expected \(3, 2\) for in_features=10"),
        (1, torch.zeros(6, dtype=torch.uint8), r"bitmap has shape \(6,\), expected \(3, 2\)"),
        (1, torch.zeros(3, 2, dtype=torch.bool), "bitmap is bool, expected uint8"),
        (1, torch.zeros(3, 2, dtype=torch.uint8, device="meta"), "values is on cpu, bitmap on meta, expected one"),
        (2, torch.zeros(3, dtype=torch.int64), r"row_offsets has shape \(3,\), expected \(4,\)"),
        (2, torch.zeros(4, dtype=torch.int32), "row_offsets is int32, expected int64"),
        (2, torch.zeros(4, dtype=torch.int64, device="meta"), "values is on cpu, row_offsets on meta, expected one"),
    ],
)
def test_validate_refuses_shapes_dtypes_and_devices(which, tensor, message):
    packed = packed_3_10()
    packed[which] = tensor
    with pytest.raises(ValueError, match=f"bitmap: {message}"):
        bitmap.validate(*packed, 7, 3, 10)


@pytest.mark.parametrize("nnz", [-1, 31, 10**30])
def test_validate_refuses_a_count_no_matrix_has(nnz):
    with pytest.raises(ValueError, match=rf"bitmap: nnz is {nnz}, expected 0 to 3 \* 10"):
        bitmap.validate(*packed_3_10(), nnz, 3, 10)


def test_unpack_refuses_shapes():
    values, bits, row_offsets = packed_3_10()
    for packed in (
        (values, bits, row_offsets[1:]),
        (values, bits[:, :1], row_offsets),
        (values, bits[0], row_offsets),
        (values[None], bits, row_offsets),
        (values, torch.tensor(0, dtype=torch.uint8), row_offsets),
    ):
        with pytest.raises(ValueError, match=r"unpack: values .* expected .* for in_features=10|nnz is 7, expected"):
            bitmap.unpack(*packed, 10)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=4, max_size=4), st.lists(st.integers(-1, 4), min_size=3, max_size=3), st.data())
def test_what_validates_is_the_packed_form_of_its_weight(bits, offsets, data):
    """No bytes pass that pack would not have written: nothing to read out of bounds, nothing ambiguous."""
    bits = torch.from_numpy(np.frombuffer(bits, dtype=np.uint8).copy()).view(2, 2)
    if data.draw(st.booleans()):
        bits &= torch.tensor([0xFF, 0b1], dtype=torch.uint8)
    counts = [sum(byte.bit_count() for byte in row) for row in bits.tolist()]
    if data.draw(st.booleans()):
        offsets = [0, counts[0], sum(counts)]
    nnz = data.draw(st.sampled_from([sum(counts), max(0, offsets[-1])]))
    numbers = st.sampled_from([1.0, -2.0, 0.5]) if data.draw(st.booleans()) else st.sampled_from([1.0, 0.0, -0.0])
    values = torch.tensor(data.draw(st.lists(numbers, min_size=nnz, max_size=nnz)))
    packed = (values, bits, torch.tensor(offsets))
    try:
        bitmap.validate(*packed, nnz, 2, 9)
    except ValueError:
        return
    again = bitmap.pack(bitmap.unpack(*packed, 9))
    for actual, expected in zip(again, packed, strict=True):
        assert torch.equal(actual, expected)


@settings(max_examples=60)
@given(sparse_weights())
def test_unpacking_without_blocks_is_the_same(weight):
    """The way of other devices than a CPU, which must not wait for a number of theirs."""
    values, _, _ = bitmap.pack(weight)
    assert torch.equal(bitmap._gather(weight != 0, values), torch.where(weight == 0, 0.0, weight))
