"""The low-rank format: the best factors of a rank, in every dtype, and nothing else accepted than finite factors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.formats import low_rank

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1, 1), (1, 9), (9, 1), (6, 6), (5, 12), (12, 5), (33, 17)]


def best_error(weight, rank):
    """Eckart-Young: the Frobenius error of the best approximation is the norm of the singular values left out."""
    return np.sqrt((np.linalg.svd(weight.double().numpy(), compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_factors_of_the_rank_are_nearer(shape, dtype):
    weight = torch.randn(shape, dtype=dtype)
    # Rounding of an SVD in that dtype: a modest multiple of eps times the norm.
    slack = 50 * torch.finfo(dtype).eps * float(weight.norm())
    for rank in range(1, min(shape) + 1):
        u, v = low_rank.factorize(weight, rank)
        error = float((weight.double() - u.double() @ v.double()).norm())
        assert abs(error - best_error(weight, rank)) <= slack


def test_random_factors_are_never_nearer():
    """The same without trusting the theorem: least squares for v, given any u."""
    weight = torch.randn(8, 6, dtype=torch.float64)
    u, v = low_rank.factorize(weight, 2)
    best = (weight - u @ v).norm()
    for _ in range(100):
        other = torch.randn(8, 2, dtype=torch.float64)
        assert best <= (weight - other @ torch.linalg.lstsq(other, weight).solution).norm()


def test_these_are_the_factors():
    """A diagonal has its singular values in sight; the square roots go to both sides, the sign to v."""
    u, v = low_rank.factorize(torch.tensor([[0.0, 4.0, 0.0], [-9.0, 0.0, 0.0]]), 2)
    torch.testing.assert_close(u, torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    torch.testing.assert_close(v, torch.tensor([[-3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    assert (u @ v).shape == (2, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_have_the_dtype_and_are_contiguous_and_balanced(dtype):
    weight = torch.randn(20, 12).to(dtype)
    u, v = low_rank.factorize(weight, 5)
    assert u.dtype == v.dtype == dtype
    assert (u.shape, v.shape) == ((20, 5), (5, 12))
    assert u.is_contiguous() and v.is_contiguous()
    assert u.untyped_storage().nbytes() == u.nbytes and v.untyped_storage().nbytes() == v.nbytes
    # Rounding of the SVD, and of the factors.
    eps = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(u.double().norm(dim=0), v.double().norm(dim=1), rtol=eps, atol=eps)
    low_rank.validate(u, v, 5, 20, 12)
    dense = low_rank.unpack(u, v)
    assert dense.dtype == dtype
    # Of 16-bit factors the float32 product is rounded once.
    expected = u.double() @ v.double() if dtype == torch.float64 else (u.float() @ v.float()).to(dtype)
    assert torch.equal(dense, expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_full_rank_gives_the_weight_back_and_signs_are_settled(rows, columns, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, v = low_rank.factorize(weight, min(rows, columns))
    torch.testing.assert_close(low_rank.unpack(u, v), weight)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    # The sign is the factors' own: the negated weight has the same u.
    other, _ = low_rank.factorize(-weight, min(rows, columns))
    torch.testing.assert_close(other, u)


def test_factors_are_reproducible():
    weight = torch.randn(30, 40)
    first, second = low_rank.factorize(weight, 7), low_rank.factorize(weight.clone(), 7)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_weight_of_lower_rank_or_zero_has_finite_factors():
    for weight in (torch.zeros(4, 6), torch.ones(4, 6)):
        u, v = low_rank.factorize(weight, 3)
        low_rank.validate(u, v, 3, 4, 6)
        torch.testing.assert_close(low_rank.unpack(u, v), weight)


def test_autocast_and_gradients_do_not_touch_the_factors():
    weight = torch.nn.Parameter(torch.randn(16, 12))
    u, v = low_rank.factorize(weight, 4)
    assert not u.requires_grad and not v.requires_grad
    dense = low_rank.unpack(u, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = low_rank.unpack(torch.nn.Parameter(u), torch.nn.Parameter(v))
    assert torch.equal(again, dense) and not again.requires_grad


@pytest.mark.parametrize(
    ("ratio", "shape", "expected"),
    [
        (0.5, (768, 768), 192),
        (0.5, (3072, 768), 307),  # 307.2
        (0.001, (768, 768), 1),  # 0.384
        (1.0, (6, 6), 3),
        (5.0, (6, 6), 6),
        (0.57, (50, 100), 19),  # 18.999999999999996 in floats
        (0.5, (1, 1), 1),
        (1, (2, 9), 1),
    ],
)
def test_rank_for_ratio(ratio, shape, expected):
    assert low_rank.rank_for_ratio(ratio, *shape) == expected


@given(st.floats(1e-6, 2.0), st.integers(1, 5000), st.integers(1, 5000))
def test_the_rank_is_the_largest_that_fits(ratio, rows, columns):
    rank = low_rank.rank_for_ratio(ratio, rows, columns)
    assert 1 <= rank <= min(rows, columns)
    budget = ratio * rows * columns / (rows + columns) + 1e-6
    assert rank == 1 or rank <= budget
    assert rank == min(rows, columns) or rank + 1 > budget - 2e-6


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf")])
def test_rank_for_ratio_refuses_what_is_no_ratio(ratio):
    with pytest.raises(ValueError, match="rank_for_ratio: ratio is .*, expected a number above 0"):
        low_rank.rank_for_ratio(ratio, 4, 4)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_weight_without_entries_has_no_rank(shape):
    message = rf"weight is \({shape[0]}, {shape[1]}\), expected at least one row and one column"
    with pytest.raises(ValueError, match=f"rank_for_ratio: {message}"):
        low_rank.rank_for_ratio(0.5, *shape)
    with pytest.raises(ValueError, match=f"layer.3: {message}"):
        low_rank.factorize(torch.zeros(shape), 1, name="layer.3")
    with pytest.raises(ValueError, match=f"low_rank: {message}"):
        low_rank.validate(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]), 1, *shape)


@pytest.mark.parametrize(
    ("weight", "rank", "message"),
    [
        (torch.ones(4, 6), 0, r"layer.3: rank is 0, expected 1 to 4 for \(4, 6\)"),
        (torch.ones(4, 6), 5, r"layer.3: rank is 5, expected 1 to 4 for \(4, 6\)"),
        (torch.tensor([[0.0], [float("nan")]]), 1, "layer.3: weight holds nan in row 1, expected finite numbers"),
        (torch.tensor([[float("inf")]]).half(), 1, "layer.3: weight holds inf in row 0, expected finite numbers"),
        (torch.ones(4), 1, "layer.3: weight has 1 dimensions, expected 2"),
    ],
)
def test_factorize_refuses_with_layer_and_place(weight, rank, message):
    with pytest.raises(ValueError, match=message):
        low_rank.factorize(weight, rank, name="layer.3")


def test_factorize_refuses_integers():
    with pytest.raises(TypeError, match=r"weight is torch\.int8, expected a floating-point tensor"):
        low_rank.factorize(torch.ones(2, 2, dtype=torch.int8), 1)


def test_meta_tensors_give_shapes():
    u, v = low_rank.factorize(torch.empty(6, 24, device="meta", dtype=torch.float16), 4)
    assert (u.shape, u.dtype, u.is_meta) == ((6, 4), torch.float16, True)
    assert (v.shape, v.dtype, v.is_meta) == ((4, 24), torch.float16, True)
    dense = low_rank.unpack(u, v)
    assert (dense.shape, dense.dtype, dense.is_meta) == ((6, 24), torch.float16, True)
    low_rank.validate(u, v, 4, 6, 24)


@pytest.mark.parametrize(
    ("u", "v", "message"),
    [
        (torch.ones(4, 3), torch.ones(2, 6), r"u has shape \(4, 3\), expected \(4, 2\) for rank=2"),
        (torch.ones(8), torch.ones(2, 6), r"u has shape \(8,\), expected \(4, 2\)"),
        (torch.ones(4, 2), torch.ones(6, 2), r"v has shape \(6, 2\), expected \(2, 6\) for rank=2"),
        (torch.ones(4, 2).int(), torch.ones(2, 6), "u is int32, expected float16, bfloat16, float32, float64"),
        (torch.ones(4, 2), torch.ones(2, 6).to(torch.int8), "v is int8, expected float16, bfloat16, float32, float64"),
        (torch.ones(4, 2), torch.ones(2, 6).half(), "u is float32, v float16, expected one dtype"),
        (torch.ones(4, 2), torch.ones(2, 6, device="meta"), "u is on cpu, v on meta, expected one device"),
        (torch.full((4, 2), torch.nan), torch.ones(2, 6), "u holds nan in row 0, expected finite numbers"),
        (torch.ones(4, 2), torch.full((2, 6), -torch.inf), "v holds -inf in row 0, expected finite numbers"),
    ],
)
def test_validate_refuses(u, v, message):
    with pytest.raises(ValueError, match=f"some.layer: {message}"):
        low_rank.validate(u, v, 2, 4, 6, name="some.layer")


@pytest.mark.parametrize("rank", [-1, 0, 5, 10**20])
def test_validate_refuses_a_rank_no_weight_has(rank):
    with pytest.raises(ValueError, match=rf"low_rank: rank is {rank}, expected 1 to 4 for \(4, 6\)"):
        low_rank.validate(torch.ones(4, 5), torch.ones(5, 6), rank, 4, 6)


def test_unpack_refuses_shapes_and_dtypes():
    for u, v in (
        (torch.ones(4, 2), torch.ones(3, 6)),
        (torch.ones(4), torch.ones(4, 6)),
        (torch.ones(4, 2), torch.ones(2)),
        (torch.ones(4, 2), torch.ones(2, 6).half()),
    ):
        with pytest.raises(ValueError, match=r"unpack: u .* and v .*, expected \(out_features, rank\) and \(rank, in"):
            low_rank.unpack(u, v)
