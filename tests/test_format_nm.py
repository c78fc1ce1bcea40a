"""The n:m format: one packed form for every weight, exact both ways, and nothing else accepted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.configs import GROUP_SIZES
from sparsebert.formats import nm

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INF, NAN = float("inf"), float("nan")
PATTERNS = [(n, m) for m in GROUP_SIZES for n in range(1, m)]


@st.composite
def sparse_weights(draw):
    """A weight with at most n non-zeros a group, empty and partly filled groups among them."""
    n, m = draw(st.sampled_from(PATTERNS))
    rows, groups = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, groups * m, generator=generator)
    counts = torch.randint(0, n + 1, (rows, groups, 1), generator=generator)
    order = torch.rand(rows, groups, m, generator=generator).argsort(-1)
    weight = torch.where(order < counts, weight.view(rows, groups, m), 0.0).reshape(rows, groups * m)
    dtype = draw(st.sampled_from([*DTYPES, torch.int8]))
    return (weight * 40).clamp(-127, 127).to(dtype), n, m


def naive_pack(weight, n, m):
    """The format's definition, one group at a time."""
    bits = 2 if m <= 4 else 4
    all_values, all_positions = [], []
    for row in weight.tolist():
        values, slots = [], []
        for start in range(0, len(row), m):
            group = row[start : start + m]
            used = [i for i, w in enumerate(group) if w != 0]
            free = [i for i in range(m) if i not in used]
            kept = sorted(used + free[: n - len(used)])
            values += [group[i] for i in kept]
            slots += kept
        number = sum(slot << (bits * i) for i, slot in enumerate(slots))
        all_values.append(values)
        all_positions.append(list(number.to_bytes(-(-len(slots) * bits // 8), "little")))
    width = weight.shape[1] // m * n
    values = torch.tensor(all_values, dtype=weight.dtype).reshape(len(weight), width)
    positions = torch.tensor(all_positions, dtype=torch.uint8).reshape(len(weight), -(-width * bits // 8))
    return values, positions


@settings(max_examples=150, deadline=None)
@given(sparse_weights())
def test_pack_is_the_definition_and_unpack_its_inverse(case):
    weight, n, m = case
    values, positions = nm.pack(weight, n, m)
    expected_values, expected_positions = naive_pack(weight, n, m)
    assert torch.equal(values, expected_values)
    assert torch.equal(positions, expected_positions)
    assert torch.equal(nm.unpack(values, positions, n, m, weight.shape[1]), weight)
    nm.validate(values, positions, n, m, *weight.shape)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda x: str(x))
def test_every_pattern_round_trips(n, m, dtype):
    weight = (nm.project(torch.randn(7, 5 * m), n, m) * 20).to(dtype)
    values, positions = nm.pack(weight, n, m)
    assert values.dtype == dtype
    assert torch.equal(nm.unpack(values, positions, n, m, 5 * m), weight)


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    monkeypatch.setattr(nm, "_BLOCK", 64)
    weight = nm.project(torch.randn(37, 24), 2, 4)
    values, positions = nm.pack(weight, 2, 4)
    assert torch.equal(nm.unpack(values, positions, 2, 4, 24), weight)
    nm.validate(values, positions, 2, 4, 37, 24)


def test_keep_and_zero_conventions_differ():
    """1:4 keeps one of four; a library where n counts the zeros would keep three."""
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
    assert nm.project(weight, 1, 4).tolist() == [[0.0, -4.0, 0.0, 0.0]]
    assert nm.project(weight, 3, 4).tolist() == [[0.0, -4.0, 3.0, 2.0]]


def test_two_of_four_costs_nine_bits_a_weight():
    weight = nm.project(torch.randn(64, 768), 2, 4).half()
    packed = nm.pack(weight, 2, 4)
    assert 8 * sum(t.nbytes for t in packed) == 9 * weight.numel()


def test_nibbles_of_two_of_four():
    rows = [[0, 0, 0, 0], [5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5], [1, 2, 0, 0], [0, 0, 1, 2]]
    values, positions = nm.pack(torch.tensor(rows, dtype=torch.float32), 2, 4)
    assert [f"{p:04b}" for p in positions.flatten().tolist()] == [
        "0100",
        "0100",
        "0100",
        "1000",
        "1100",
        "0100",
        "1110",
    ]
    assert values.tolist()[4] == [0.0, 5.0]


def test_negative_zero_is_zero():
    values, positions = nm.pack(torch.tensor([[-0.0, -0.0, 3.0, -0.0]]), 2, 4)
    assert not torch.signbit(values).any()
    assert torch.equal(positions, nm.pack(torch.tensor([[0.0, 0.0, 3.0, 0.0]]), 2, 4)[1])


def test_ties_keep_the_lower_position():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    assert nm.magnitude_mask(weight, 2, 4).tolist() == [[True, True, False, False]]


@st.composite
def tied_weights(draw):
    """Few different numbers, so that most groups have ties: zeros of both signs, subnormals, infinities, NaN."""
    n, m = draw(st.sampled_from(PATTERNS))
    dtype = draw(st.sampled_from(DTYPES))
    tiny = torch.finfo(dtype).smallest_normal / 4
    numbers = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0, 1.5, INF, -INF, NAN], dtype=torch.float64)
    places = st.integers(0, len(numbers) - 1)
    rows, groups = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    chosen = draw(st.lists(places, min_size=rows * groups * m, max_size=rows * groups * m))
    return numbers[torch.tensor(chosen, dtype=torch.int64)].to(dtype).view(rows, groups * m), n, m


@settings(max_examples=300, deadline=None)
@given(tied_weights())
def test_masks_are_those_of_a_stable_sort(case):
    weight, n, m = case
    groups = weight.abs().view(len(weight), weight.shape[1] // m, m)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    expected = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, order, True).view(weight.shape)
    assert torch.equal(nm.magnitude_mask(weight, n, m), expected)
    projected = nm.project(weight, n, m)
    assert torch.equal(projected.isnan(), expected & weight.isnan())
    assert torch.equal(projected.nan_to_num(), torch.where(expected, weight, 0.0).nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda x: str(x))
def test_masks_of_a_transposed_weight_are_those_of_its_copy(n, m, dtype):
    weight = torch.randn(3 * m, 5).to(dtype).t()
    assert torch.equal(nm.magnitude_mask(weight, n, m), nm.magnitude_mask(weight.contiguous(), n, m))


def test_masks_take_no_part_in_gradients():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]], requires_grad=True)
    assert not nm.magnitude_mask(weight, 2, 4).requires_grad
    nm.project(weight, 2, 4).sum().backward()
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_projection_is_the_nearest():
    weight = torch.randn(3, 8, dtype=torch.float64)
    best = nm.project(weight, 2, 4)
    for seed in range(50):
        mask = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1) < 2
        other = torch.where(mask.reshape(3, 8), weight, 0.0)
        assert (weight - best).norm() <= (weight - other).norm()


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda x: str(x))
def test_meta_masks(n, m):
    weight = torch.empty(6, 3 * m, device="meta", dtype=torch.float16)
    mask, projected = nm.magnitude_mask(weight, n, m), nm.project(weight, n, m)
    assert (mask.shape, mask.dtype, mask.is_meta) == (weight.shape, torch.bool, True)
    assert (projected.shape, projected.dtype, projected.is_meta) == (weight.shape, torch.float16, True)


def test_meta_tensors_give_shapes():
    values, positions = nm.pack(torch.empty(6, 24, device="meta", dtype=torch.float16), 2, 8)
    assert (values.shape, values.dtype, values.is_meta) == ((6, 6), torch.float16, True)
    assert (positions.shape, positions.is_meta) == ((6, 3), True)
    assert nm.unpack(values, positions, 2, 8, 24).shape == (6, 24)
    nm.validate(values, positions, 2, 8, 6, 24)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 8), r"layer\.3: weight does not obey 2:4: row 0, columns 0 to 3 hold 4 non-zeros"),
        (torch.tensor([[0.0, float("nan"), 0, 0]]), r"layer\.3: weight holds nan in row 0"),
        (torch.tensor([[0.0, 0, 0, 0], [float("inf"), 0, 0, 0]]), r"layer\.3: weight holds inf in row 1"),
        (torch.zeros(2, 6), r"layer\.3: in_features is 6, not divisible by 4"),
        (torch.zeros(8), r"layer\.3: weight has 1 dimensions, expected 2"),
    ],
)
def test_pack_refuses_with_layer_and_place(weight, message):
    with pytest.raises(ValueError, match=message):
        nm.pack(weight, 2, 4, name="layer.3")


def test_pack_refuses_integers():
    with pytest.raises(TypeError, match=r"weight is torch\.int32"):
        nm.pack(torch.zeros(2, 4, dtype=torch.int32), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2, 3), (1, 32)])
def test_unknown_patterns_are_refused(n, m):
    with pytest.raises(ValueError, match="NMConfig"):
        nm.pack(torch.zeros(4, 96), n, m)


def packed_2_4():
    generator = torch.Generator().manual_seed(0)
    return nm.pack(nm.project(torch.randn(3, 12, generator=generator), 2, 4), 2, 4)


def corrupt(values=None, positions=None):
    good_values, good_positions = packed_2_4()
    if values is not None:
        values(good_values)
    if positions is not None:
        positions(good_positions)
    return good_values, good_positions


@pytest.mark.parametrize(
    ("values", "positions", "message"),
    [
        (lambda v: v.__setitem__((1, 2), float("nan")), None, "values holds nan in row 1"),
        (None, lambda p: p.__setitem__((2, 0), 0b0000_0100), "row 2, group 1 do not strictly ascend"),
        (None, lambda p: p.__setitem__((0, 0), 0b0100_0001), "row 0, group 0 do not strictly ascend"),
        (None, lambda p: p.__setitem__((1, 1), 0b1111_0100), "spare bits set at the end of row 1"),
        (lambda v: v.__setitem__((0, 0), -0.0), None, r"holds -0\.0"),
    ],
)
def test_validate_refuses(values, positions, message):
    with pytest.raises(ValueError, match=rf"some\.layer: .*{message}"):
        nm.validate(*corrupt(values, positions), 2, 4, 3, 12, name="some.layer")


def test_validate_refuses_positions_out_of_range():
    # 1:2 has two bits a position, so 2 and 3 can be written but do not exist.
    values, positions = nm.pack(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), 1, 2)
    positions[0, 0] = 0b0010
    with pytest.raises(ValueError, match="positions has 2 in row 0, expected 0 to 1"):
        nm.validate(values, positions, 1, 2, 1, 4)


def test_validate_refuses_spare_slots_elsewhere():
    values, positions = torch.tensor([[5.0, 0.0]]), torch.tensor([[0b1000]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="spare slots of row 0, group 0"):
        nm.validate(values, positions, 2, 4, 1, 4)


@pytest.mark.parametrize(
    ("values", "positions", "message"),
    [
        (
            torch.zeros(3, 5),
            torch.zeros(3, 2, dtype=torch.uint8),
            r"values has shape \(3, 5\), expected \(3, 6\)",
        ),
        (
            torch.zeros(3, 6),
            torch.zeros(3, 1, dtype=torch.uint8),
            r"positions has shape \(3, 1\), expected \(3, 2\)",
        ),
        (torch.zeros(3, 6), torch.zeros(3, 2, dtype=torch.int8), "positions is int8, expected uint8"),
        (torch.zeros(3, 6, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.uint8), "values is int32"),
        (
            torch.zeros(3, 6),
            torch.zeros(3, 2, dtype=torch.uint8, device="meta"),
            "values is on cpu, positions on meta, expected one device",
        ),
    ],
)
def test_validate_refuses_shapes_and_dtypes(values, positions, message):
    with pytest.raises(ValueError, match=message):
        nm.validate(values, positions, 2, 4, 3, 12)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=6, max_size=6), st.lists(st.sampled_from([0.0, 1.0, -2.0]), min_size=18, max_size=18))
def test_what_validates_is_the_packed_form_of_its_weight(positions, values):
    """No bytes pass that pack would not have written: nothing to read out of bounds, nothing ambiguous."""
    values = torch.tensor(values).view(3, 6)
    positions = torch.tensor(list(positions), dtype=torch.uint8).view(3, 2)
    try:
        nm.validate(values, positions, 2, 4, 3, 12)
    except ValueError:
        return
    again = nm.pack(nm.unpack(values, positions, 2, 4, 12), 2, 4)
    assert torch.equal(again[0], values) and torch.equal(again[1], positions)


def test_int8_values_pack_to_these_bytes():
    weight = torch.tensor([[0, 127, 0, -127], [0, 0, 0, 0], [0, 0, -1, 0]], dtype=torch.int8)
    values, positions = nm.pack(weight, 2, 4)
    assert values.dtype == torch.int8
    assert values.tolist() == [[127, -127], [0, 0], [0, -1]]
    assert positions.tolist() == [[0b1101], [0b0100], [0b1000]]
    nm.validate(values, positions, 2, 4, 3, 4)
    assert torch.equal(nm.unpack(values, positions, 2, 4, 4), weight)
    assert nm.find_violation(weight, 2, 4) is None
    assert nm.find_violation(torch.ones(2, 8, dtype=torch.int8), 2, 4) == (0, 0, 4)


def test_int8_minus_128_is_refused():
    weight = torch.tensor([[0, 0, 0, 0], [0, -128, 0, 0]], dtype=torch.int8)
    with pytest.raises(ValueError, match="layer.3: weight holds -128 in row 1, expected -127 to 127"):
        nm.pack(weight, 2, 4, name="layer.3")
    values, positions = nm.pack(weight.clamp(-127), 2, 4)
    values[1, 1] = -128
    with pytest.raises(ValueError, match="some.layer: values holds -128 in row 1"):
        nm.validate(values, positions, 2, 4, 2, 4, name="some.layer")


@pytest.mark.parametrize("function", [nm.magnitude_mask, nm.project])
def test_magnitudes_are_of_floats(function):
    with pytest.raises(TypeError, match=r"weight is torch\.int8, expected a floating-point tensor"):
        function(torch.zeros(2, 4, dtype=torch.int8), 2, 4)


@pytest.mark.parametrize(
    ("in_features", "fraction", "m", "expected"),
    [
        (768, 1.0, 4, 768),
        (768, 0.5, 4, 384),
        (768, 0.3, 4, 224),  # 230.4
        (768, 0.01, 4, 4),  # 7.68: no 32 fits, so a multiple of 4
        (768, 0.001, 4, 4),  # 0.768: at least one group
        (100, 1.0, 8, 96),  # a multiple of 8 where in_features is none
        (100, 0.3, 16, 16),
        (100, 0.29, 1, 29),  # 0.29 * 100 is 28.999999999999996 in floats
        (4, 0.9, 4, 4),
    ],
)
def test_column_count(in_features, fraction, m, expected):
    assert nm.column_count(in_features, fraction, m) == expected


@given(st.integers(1, 5000), st.floats(1e-4, 1.0), st.sampled_from(GROUP_SIZES))
def test_column_count_is_a_multiple_that_fits(in_features, fraction, m):
    if in_features < m:
        with pytest.raises(ValueError, match=f"column_count: in_features is {in_features}, expected at least m = {m}"):
            nm.column_count(in_features, fraction, m)
        return
    count = nm.column_count(in_features, fraction, m)
    assert count % m == 0 and m <= count <= in_features
    assert count == m or count <= fraction * in_features + 1e-6
    if fraction * in_features >= 32:
        assert count % 32 == 0


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_column_count_refuses_what_is_no_fraction(fraction):
    with pytest.raises(ValueError, match="column_count: fraction is .*, expected above 0 and at most 1"):
        nm.column_count(768, fraction, 4)


def test_chosen_columns_have_the_largest_norms_and_ties_go_to_the_lower():
    weight = torch.tensor([[3.0, 0.0, 4.0, -3.0, 0.0], [0.0, 5.0, 3.0, 0.0, 0.0]])
    for count, expected in enumerate([[], [1], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]):
        columns = nm.choose_columns(weight, count)
        assert (columns.dtype, columns.tolist()) == (torch.int32, expected)
        nm.validate_columns(columns, count, 5)
    # The squares overflow 16 bits, and this difference is lost in float32.
    assert nm.choose_columns(torch.tensor([[300.0, 301.0]]).half(), 1).tolist() == [1]
    assert nm.choose_columns(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64), 1).tolist() == [1]
    with pytest.raises(ValueError, match="choose_columns: count is 6, expected 0 to 5"):
        nm.choose_columns(weight, 6)


def test_kept_columns_are_the_used_and_the_lowest_free():
    weight = torch.zeros(3, 6)
    weight[0, 4], weight[2, 1], weight[1, 3] = 1.0, -2.0, -0.0
    assert [nm.kept_columns(weight, count).tolist() for count in (2, 3, 4, 6)] == [
        [1, 4],
        [0, 1, 4],
        [0, 1, 2, 4],
        [0, 1, 2, 3, 4, 5],
    ]
    assert nm.kept_columns(weight, 3).dtype == torch.int32
    with pytest.raises(ValueError, match="layer.3: weight has 2 columns with a non-zero, expected at most 1"):
        nm.kept_columns(weight, 1, name="layer.3")
    with pytest.raises(ValueError, match="layer.3: count of columns is 7, expected 0 to 6"):
        nm.kept_columns(weight, 7, name="layer.3")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 40), st.data())
def test_columns_round_trip_and_nothing_else_passes(rows, in_features, data):
    """Every column set of the right size passes the first check; the second leaves one of them a weight."""
    used = data.draw(st.sets(st.integers(0, in_features - 1)))
    count = data.draw(st.integers(len(used), in_features))
    dtype = data.draw(st.sampled_from([*DTYPES, torch.int8]))
    weight = torch.zeros(rows, in_features, dtype=dtype)
    weight[:, sorted(used)] = 3
    columns = nm.kept_columns(weight, count)
    kept = weight[:, columns]
    nm.validate_columns(columns, count, in_features, weight=kept)
    assert torch.equal(nm.expand_columns(kept, columns, in_features), weight)
    other = torch.tensor(sorted(data.draw(st.permutations(range(in_features)))[:count]), dtype=torch.int32)
    nm.validate_columns(other, count, in_features)
    kept = weight[:, other]
    try:
        nm.validate_columns(other, count, in_features, weight=kept)
    except ValueError as error:
        assert "which is not the lowest that is free" in str(error)
        return
    assert torch.equal(nm.kept_columns(nm.expand_columns(kept, other, in_features), count), other)


def test_columns_compose_with_the_pattern():
    weight = torch.zeros(4, 20)
    weight[:, [1, 2, 9, 15]] = torch.randn(4, 4)
    columns = nm.kept_columns(weight, 8)
    assert columns.tolist() == [0, 1, 2, 3, 4, 5, 9, 15]
    packed = nm.pack(weight[:, columns], 2, 4)
    assert torch.equal(nm.expand_columns(nm.unpack(*packed, 2, 4, 8), columns, 20), weight)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (torch.tensor([0, 2, 5], dtype=torch.int64), "columns is int64, expected int32"),
        (torch.tensor([0, 2], dtype=torch.int32), r"columns has shape \(2,\), expected \(3,\)"),
        (torch.tensor([[0, 2, 5]], dtype=torch.int32), r"columns has shape \(1, 3\), expected \(3,\)"),
        (torch.tensor([0, 2, 2], dtype=torch.int32), "columns has 2 after 2 at 2, expected strictly ascending"),
        (torch.tensor([3, 2, 5], dtype=torch.int32), "columns has 2 after 3 at 1, expected strictly ascending"),
        (torch.tensor([-1, 2, 5], dtype=torch.int32), "columns has -1, expected 0 to 7"),
        (torch.tensor([0, 2, 8], dtype=torch.int32), "columns has 8, expected 0 to 7"),
        (torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32), "columns has -2147483648, expected 0 to 7"),
    ],
)
def test_validate_columns_refuses(columns, message):
    with pytest.raises(ValueError, match=f"some.layer: {message}"):
        nm.validate_columns(columns, 3, 8, name="some.layer")


def test_validate_columns_refuses_sizes_and_spare_columns_elsewhere():
    columns = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="nm: columns: count is 3, expected 0 to 2"):
        nm.validate_columns(columns, 3, 2)
    with pytest.raises(ValueError, match=r"nm: weight has shape \(4, 2\), expected \(out_features, 3\)"):
        nm.validate_columns(columns, 3, 8, weight=torch.ones(4, 2))
    with pytest.raises(ValueError, match="nm: columns is on cpu, weight on meta, expected one device"):
        nm.validate_columns(columns, 3, 8, weight=torch.ones(4, 3, device="meta"))
    nm.validate_columns(columns, 3, 8, weight=torch.tensor([[0.0, 1.0, 1.0]]))
    with pytest.raises(ValueError, match="nm: columns has the spare 5, which is not the lowest that is free"):
        nm.validate_columns(columns, 3, 8, weight=torch.tensor([[1.0, 1.0, -0.0]]))


def test_expand_columns_refuses_shapes():
    columns = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expand_columns: columns has shape \(2,\), expected \(3,\)"):
        nm.expand_columns(torch.ones(1, 3), columns, 8)
    with pytest.raises(ValueError, match="expand_columns: count of columns is 2, expected 0 to 1"):
        nm.expand_columns(torch.ones(1, 2), columns, 1)
    with pytest.raises(ValueError, match="expand_columns: columns is int64, expected int32"):
        nm.expand_columns(torch.ones(1, 2), columns.long(), 8)


def test_columns_of_meta_tensors():
    weight = torch.empty(6, 24, device="meta", dtype=torch.float16)
    for columns in (nm.choose_columns(weight, 8), nm.kept_columns(weight, 8)):
        assert (columns.shape, columns.dtype, columns.is_meta) == ((8,), torch.int32, True)
        kept = torch.empty(6, 8, device="meta")
        assert nm.expand_columns(kept, columns, 24).shape == (6, 24)
        nm.validate_columns(columns, 8, 24, weight=kept)
