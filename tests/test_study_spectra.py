"""benchmarks/study/spectra.py: ranks of matrices that are known, and the two controls."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from study import spectra  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS = ("numerical_rank", "stable_rank", "effective_rank", "rank_90")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_sparse(rows, columns, density, seed=0):
    generator = seeded(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def ranks(weight):
    """As numbers, not as parts of min(out, in)."""
    found = spectra.measure({"layer": weight})
    return [found[name] * min(weight.shape) for name in RANKS]


def orthogonal(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, generator=seeded(seed), dtype=torch.float64))[0]


def test_all_that_is_measured():
    found = spectra.measure({"layer": torch.eye(10)})
    assert set(found) == {*RANKS, "empty_rows", "empty_columns", "layers"}
    assert all(isinstance(value, float) for value in found.values())
    assert found["layers"] == 1 and found["empty_rows"] == found["empty_columns"] == 0


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-20])
def test_equal_singular_values_have_every_rank_in_full(scale):
    """But nine of ten hold 90 % of the energy, exactly."""
    assert ranks(scale * torch.eye(10)) == pytest.approx([10, 10, 10, 9])
    assert ranks(scale * orthogonal(10)) == pytest.approx([10, 10, 10, 9])
    assert ranks(scale * orthogonal(10)[:, :5]) == pytest.approx([5, 5, 5, 5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_rank_one(shape, dtype):
    weight = torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1)).to(dtype)
    assert ranks(weight) == pytest.approx([1, 1, 1, 1])


def test_ranks_worked_out_by_hand():
    """s = 3, 2, 1: |W|^2 = 14, of which 9 are too few and 13 are 93 %; p = 1/2, 1/3, 1/6."""
    left, right = orthogonal(3, 1), orthogonal(3, 2)
    entropy = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6
    expected = [3, 14 / 9, math.exp(entropy), 2]
    weight = left @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ right
    assert ranks(weight) == pytest.approx(expected)
    # Squares of these are beyond float64.
    assert ranks(weight * 1e200) == pytest.approx(expected)
    assert ranks(weight * 1e-200) == pytest.approx(expected)


@pytest.mark.parametrize(("smallest", "rank"), [(1e-5, 2), (1e-9, 1)])
def test_the_numerical_rank_does_not_count_the_rounding_of_float32(smallest, rank):
    """2 eps = 2.4e-7, of the largest."""
    assert ranks(torch.diag(torch.tensor([50.0, 50 * smallest], dtype=torch.float64)))[0] == rank


def test_a_block_among_empty_rows_and_columns():
    weight = torch.zeros(4, 9)
    weight[1:3, 3:6] = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 5.0]])
    found = spectra.measure({"layer": weight})
    assert found["numerical_rank"] == 2 / 4
    assert found["empty_rows"] == 2 / 4
    assert found["empty_columns"] == pytest.approx(6 / 9)


def test_all_zeros_have_no_rank():
    found = spectra.measure({"layer": torch.zeros(3, 5)})
    assert found == {**dict.fromkeys(RANKS, 0.0), "empty_rows": 1.0, "empty_columns": 1.0, "layers": 1.0}


def test_the_mean_counts_layers_and_not_their_sizes():
    found = spectra.measure({"a": torch.eye(2), "b": torch.zeros(30, 40), "c": torch.ones(4, 5), "d": torch.eye(8, 9)})
    assert found["layers"] == 4
    assert found["numerical_rank"] == pytest.approx((1 + 0 + 1 / 4 + 1) / 4)
    assert found["empty_rows"] == pytest.approx(1 / 4)
    assert found["empty_columns"] == pytest.approx((1 + 1 / 9) / 4)


def test_a_weight_that_requires_grad_is_measured_too():
    assert ranks(torch.nn.Parameter(torch.eye(3)))[0] == 3
    assert not spectra.shuffled(torch.nn.Parameter(torch.eye(3)), seeded()).requires_grad
    assert not spectra.truncated(torch.nn.Parameter(torch.eye(3)), 2).requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_refused_by_layer(value):
    bad = torch.tensor([[1.0, value]])
    with pytest.raises(ValueError, match=r"^measure: layer\.1: weight holds NaN or infinities$"):
        spectra.measure({"layer.0": torch.eye(2), "layer.1": bad})
    with pytest.raises(ValueError, match="^shuffled: weight: weight holds NaN or infinities$"):
        spectra.shuffled(bad, seeded())
    with pytest.raises(ValueError, match="^truncated: weight: weight holds NaN or infinities$"):
        spectra.truncated(bad, 1)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 2, 2)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match=r"^measure: layer: weight is \(.*\), expected a matrix with entries$"):
        spectra.measure({"layer": torch.ones(shape)})


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="^measure: weights is empty, expected at least one layer$"):
        spectra.measure({})


def check_margins(weight, found):
    """As many non-zeros in each row and column, and each row's own values."""
    assert found.shape == weight.shape and found.dtype == weight.dtype
    for dim in (0, 1):
        assert torch.equal((found != 0).sum(dim), (weight != 0).sum(dim))
    assert torch.equal(found.sort(1).values, weight.sort(1).values)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (31, 7), (7, 31), (3, 50), (50, 3)])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_shuffling_keeps_the_margins_and_moves_the_rest(shape, density):
    weight = random_sparse(*shape, density)
    before = weight.clone()
    found = spectra.shuffled(weight, seeded())
    check_margins(weight, found)
    assert torch.equal(weight, before)
    assert not torch.equal(found != 0, weight != 0)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    bits=st.integers(0, 2**36 - 1),
    seed=st.integers(0, 99),
    trades=st.integers(1, 3),
)
@settings(max_examples=60)
def test_shuffling_keeps_the_margins_of_small_matrices(rows, columns, bits, seed, trades):
    mask = torch.tensor([bits >> place & 1 for place in range(rows * columns)]).view(rows, columns)
    weight = mask * torch.arange(1.0, rows * columns + 1).view(rows, columns)
    check_margins(weight, spectra.shuffled(weight, seeded(seed), trades))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(5, 4),
        torch.zeros(5, 4),
        torch.eye(6),
        torch.ones(1, 4),
        torch.ones(4, 1),
        torch.tensor([[1.0, 0.0, 1.0]]),
        torch.ones(4, 6).tril(),
    ],
    ids=["full", "empty", "one a row", "one row", "one column", "one sparse row", "one way only"],
)
def test_degenerate_masks_keep_their_margins(mask):
    weight = mask * torch.randn(mask.shape, generator=seeded())
    found = spectra.shuffled(weight, seeded())
    check_margins(weight, found)
    if not torch.equal(mask, torch.eye(6)):
        # There is no other mask with these margins.
        assert torch.equal(found != 0, mask != 0)


def test_the_same_seed_gives_the_same_places():
    weight = random_sparse(20, 30, 0.3)
    first, again, other = (spectra.shuffled(weight, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_values_are_reordered_even_where_no_place_can_change():
    weight = torch.arange(1.0, 201.0).view(2, 100)
    found = spectra.shuffled(weight, seeded())
    check_margins(weight, found)
    assert (found == weight).sum() < 20


def test_every_mask_with_the_margins_is_as_likely():
    """Rows and columns of 2, 1, 1: the first row has the columns 12, 13 or 23; the other two then share what is left in
    2, 2 and 1 ways. Of 1000 draws 200 are due to each, with a deviation of 12.6: four of them are allowed."""
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    generator = seeded()
    found = Counter(tuple(spectra.shuffled(weight, generator).flatten().tolist()) for _ in range(1000))
    assert len(found) == 5
    assert all(abs(count - 200) < 51 for count in found.values()), found


def test_blocks_leave_no_trace():
    """12 blocks of 16 x 16 on the diagonal: a mask that forgot them has 1 / 12 of its entries inside. Ten rounds leave
    2^-10 of the rest, far below the deviation of a random mask, sqrt(11 / 12^2 / 3072) = 0.5 %."""
    mask = torch.block_diag(*[torch.ones(16, 16)] * 12)
    inside = (spectra.shuffled(mask, seeded()) * mask).sum() / mask.sum()
    assert abs(inside - 1 / 12) < 0.02


@pytest.mark.parametrize("trades", [0, -1])
def test_no_trades_are_refused(trades):
    with pytest.raises(ValueError, match=f"^shuffled: trades is {trades}, expected 1 or more$"):
        spectra.shuffled(torch.eye(2), seeded(), trades)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_truncated_equals_numpy(shape, rank):
    weight = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    left, singular, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    singular[rank:] = 0
    expected = torch.from_numpy(left * singular @ right)
    torch.testing.assert_close(spectra.truncated(weight, rank), expected)
    for dtype in (torch.float32, torch.bfloat16):
        found = spectra.truncated(weight.to(dtype), rank)
        assert found.dtype == dtype
        # One rounding of the weight and one of the result; the rank-r part moves by a few times the former.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_truncated_has_the_rank():
    weight = torch.randn(12, 20, generator=seeded())
    assert ranks(spectra.truncated(weight, 4))[0] == 4
    torch.testing.assert_close(spectra.truncated(weight, 12), weight)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank):
    with pytest.raises(ValueError, match=rf"^truncated: rank is {rank}, expected 0 to 3 for \(3, 5\)$"):
        spectra.truncated(torch.ones(3, 5), rank)
