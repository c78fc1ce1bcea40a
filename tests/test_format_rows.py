"""The rows format: one packed form for every weight and count, exact both ways, and nothing else accepted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.formats import rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def row_weights(draw):
    """A weight some rows of which are zero, and a count that they leave room for."""
    out_features, in_features = draw(st.integers(0, 9)), draw(st.integers(0, 6))
    used = sorted(draw(st.sets(st.integers(0, max(0, out_features - 1)), max_size=out_features)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.zeros(out_features, in_features)
    weight[used] = torch.rand(len(used), in_features, generator=generator) - 0.5
    return weight.to(draw(st.sampled_from(DTYPES))), draw(st.integers(len(used), out_features))


def naive_pack(weight, count):
    """The format's definition, one row at a time."""
    used = [i for i, row in enumerate(weight.tolist()) if any(row)]
    free = [i for i in range(len(weight)) if i not in used]
    kept = sorted(used + free[: count - len(used)])
    return torch.tensor(kept, dtype=torch.int32), weight[kept]


@settings(max_examples=150, deadline=None)
@given(row_weights())
def test_pack_is_the_definition_and_unpack_its_inverse(case):
    weight, count = case
    packed = rows.pack(weight, count)
    for actual, expected in zip(packed, naive_pack(weight, count), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    again = rows.unpack(*packed, len(weight))
    assert again.dtype == weight.dtype and torch.equal(again, weight)
    rows.validate(*packed, count, *weight.shape)


def test_these_are_the_tensors():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-2.0, 3.0]])
    index, values = rows.pack(weight, 3)
    assert (index.dtype, index.tolist()) == (torch.int32, [0, 1, 4])
    assert values.tolist() == [[0.0, 0.0], [1.0, 0.0], [-2.0, 3.0]]
    assert rows.pack(weight, 2)[0].tolist() == [1, 4]
    assert rows.pack(weight, 4)[0].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_and_all_rows(dtype):
    for weight, count in (
        (torch.zeros(4, 3), 0),
        (torch.randn(4, 3), 4),
        (torch.zeros(4, 3), 4),
        (torch.ones(4, 0), 2),
    ):
        weight = weight.to(dtype)
        index, values = rows.pack(weight, count)
        assert index.tolist() == list(range(count)) and values.shape == (count, weight.shape[1])
        assert torch.equal(rows.unpack(index, values, 4), weight)
        rows.validate(index, values, count, *weight.shape)


def test_negative_zero_is_zero():
    index, values = rows.pack(torch.tensor([[-0.0, -0.0], [0.0, 0.0], [-0.0, 1.0]]), 2)
    assert index.tolist() == [0, 2]
    assert not torch.signbit(values).any()


def test_a_weight_that_needs_a_gradient_packs():
    weight = torch.nn.Parameter(torch.eye(3))
    index, values = rows.pack(weight, 3)
    assert not values.requires_grad and torch.equal(rows.unpack(index, values, 3), torch.eye(3))


@pytest.mark.parametrize(
    ("ratio", "out_features", "expected"),
    [(0.0, 7, 0), (1.0, 7, 7), (0.5, 7, 4), (0.5, 5, 2), (0.1, 7, 1), (0.01, 7, 0), (0.25, 768, 192), (0.5, 0, 0)],
)
def test_row_count(ratio, out_features, expected):
    assert rows.row_count(ratio, out_features) == expected


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_row_count_refuses_what_is_no_ratio(ratio):
    with pytest.raises(ValueError, match="row_count: ratio is .*, expected 0 to 1"):
        rows.row_count(ratio, 8)


def test_the_largest_rows_and_ties_go_to_the_lower():
    weight = torch.tensor([[3.0, 0.0], [0.0, 5.0], [4.0, -3.0], [-3.0, 0.0], [0.0, 0.0]])
    for count, expected in enumerate([[], [1], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]):
        index = rows.magnitude_rows(weight, count)
        assert (index.dtype, index.tolist()) == (torch.int32, expected)
        assert rows.project(weight, count).tolist() == [
            row if i in expected else [0.0, 0.0] for i, row in enumerate(weight.tolist())
        ]
    # The squares overflow 16 bits, and this difference is lost in float32.
    assert rows.magnitude_rows(torch.tensor([[300.0], [301.0]]).half(), 1).tolist() == [1]
    assert rows.magnitude_rows(torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64), 1).tolist() == [1]


def test_projection_is_the_nearest():
    weight = torch.randn(8, 3, dtype=torch.float64)
    best = rows.project(weight, 3)
    for seed in range(50):
        kept = torch.rand(8, generator=torch.Generator().manual_seed(seed)).argsort() < 3
        assert (weight - best).norm() <= (weight - torch.where(kept[:, None], weight, 0.0)).norm()
    assert torch.equal(rows.unpack(*rows.pack(best, 3), 8), best)


def test_meta_tensors_give_shapes():
    weight = torch.empty(6, 21, device="meta", dtype=torch.float16)
    index, values = rows.pack(weight, 4)
    assert (index.shape, index.dtype, index.is_meta) == ((4,), torch.int32, True)
    assert (values.shape, values.dtype, values.is_meta) == ((4, 21), torch.float16, True)
    assert rows.unpack(index, values, 6).shape == (6, 21)
    rows.validate(index, values, 4, 6, 21)
    assert rows.magnitude_rows(weight, 2).shape == (2,)
    assert rows.project(weight, 2).shape == (6, 21)


@pytest.mark.parametrize(
    ("weight", "count", "message"),
    [
        (torch.eye(4), 3, "layer.3: weight has 4 rows with a non-zero, expected at most 3"),
        (torch.eye(4), 5, "layer.3: count of rows is 5, expected 0 to 4"),
        (torch.eye(4), -1, "layer.3: count of rows is -1, expected 0 to 4"),
        (torch.tensor([[0.0], [float("nan")]]), 2, "layer.3: weight holds nan in row 1, expected finite numbers"),
        (torch.tensor([[float("-inf")], [0.0]]), 2, "layer.3: weight holds -inf in row 0, expected finite numbers"),
        (torch.zeros(4), 1, "layer.3: weight has 1 dimensions, expected 2"),
    ],
)
def test_pack_refuses_with_layer_and_place(weight, count, message):
    with pytest.raises(ValueError, match=message):
        rows.pack(weight, count, name="layer.3")


def test_integers_and_counts_out_of_range_are_refused():
    with pytest.raises(TypeError, match=r"weight is torch\.int8, expected a floating-point tensor"):
        rows.pack(torch.zeros(2, 4, dtype=torch.int8), 1)
    with pytest.raises(ValueError, match="magnitude_rows: count is 3, expected 0 to 2"):
        rows.project(torch.ones(2, 4), 3)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 2, 5]), "rows is int64, expected int32"),
        (int32(0, 2), r"rows has shape \(2,\), expected \(3,\)"),
        (int32(0, 2, 5)[None], r"rows has shape \(1, 3\), expected \(3,\)"),
        (int32(0, 2, 2), "rows has 2 after 2 at 2, expected strictly ascending"),
        (int32(3, 2, 5), "rows has 2 after 3 at 1, expected strictly ascending"),
        (int32(-1, 2, 5), "rows has -1, expected 0 to 7"),
        (int32(0, 2, 8), "rows has 8, expected 0 to 7"),
        (int32(-(2**31), 0, 2**31 - 1), "rows has -2147483648, expected 0 to 7"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), "rows is on meta, values on cpu, expected one device"),
    ],
)
def test_validate_refuses_rows(index, message):
    with pytest.raises(ValueError, match=f"some.layer: {message}"):
        rows.validate(index, torch.ones(3, 2), 3, 8, 2, name="some.layer")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3, 1), r"values has shape \(3, 1\), expected \(3, 2\) for 3 rows"),
        (torch.ones(6), r"values has shape \(6,\), expected \(3, 2\)"),
        (torch.ones(3, 2, dtype=torch.int8), "values is int8, expected float16, bfloat16, float32, float64"),
        (torch.tensor([[1.0, 1], [1, float("nan")], [1, 1]]), "values holds nan in row 1, expected finite numbers"),
        (torch.tensor([[1.0, 1], [1, 1], [float("inf"), 1]]), "values holds inf in row 2, expected finite numbers"),
        (torch.tensor([[1.0, 1], [1, -0.0], [1, 1]]), r"values holds -0\.0 in row 1, expected \+0\.0"),
        (torch.tensor([[0.0, 0], [0, 0], [1, 1]]), "rows has the spare 2, which is not the lowest that is free"),
        (torch.tensor([[1.0, 0], [0, 1], [0, 0]]), "rows has the spare 5, which is not the lowest that is free"),
    ],
)
def test_validate_refuses_values(values, message):
    rows.validate(int32(0, 2, 5), torch.tensor([[0.0, 0], [1, 0], [0, 1]]), 3, 8, 2)
    with pytest.raises(ValueError, match=f"some.layer: {message}"):
        rows.validate(int32(0, 2, 5), values, 3, 8, 2, name="some.layer")


def test_validate_refuses_more_rows_than_there_are():
    with pytest.raises(ValueError, match="rows: rows: count is 3, expected 0 to 2"):
        rows.validate(int32(0, 1, 2), torch.ones(3, 2), 3, 2, 2)


def test_unpack_refuses_shapes():
    for index, values, out_features in (
        (int32(0, 1), torch.ones(3, 2), 8),
        (int32(0, 1, 2), torch.ones(3), 8),
        (int32(0, 1, 2)[None], torch.ones(3, 2), 8),
        (int32(0, 1, 2), torch.ones(3, 2), 2),
    ):
        with pytest.raises(ValueError, match=r"unpack: rows .* expected \(k,\) and \(k, in_features\) with k at most"):
            rows.unpack(index, values, out_features)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-1, 5), min_size=3, max_size=3, unique=True).flatmap(
        lambda index: st.sampled_from([index, sorted(index)])
    ),
    st.lists(st.sampled_from([0.0, 0.0, -0.0, 1.0, -2.0]), min_size=6, max_size=6),
)
def test_what_validates_is_the_packed_form_of_its_weight(index, values):
    """No bytes pass that pack would not have written: nothing to write out of bounds, nothing ambiguous."""
    packed = (int32(*index), torch.tensor(values).view(3, 2))
    try:
        rows.validate(*packed, 3, 5, 2)
    except ValueError:
        return
    again = rows.pack(rows.unpack(*packed, 5), 3)
    assert torch.equal(again[0], packed[0]) and torch.equal(again[1], packed[1])
    assert not torch.signbit(packed[1][packed[1] == 0]).any()
