"""Factored weights and what is computed with them: weighted SVD, PLATON's score, rows under one threshold."""

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from sparsebert.formats import low_rank
from sparsebert.methods.factored import factor_, parameters_of, unfactor_
from sparsebert.methods.maths import factors, thresholds

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = torch.tensor([3.0, 1.0, 0.5, 2.0, 1.0, 4.0, 0.25, 1.0], dtype=torch.float64)
COLUMNS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 1.5], dtype=torch.float64)


def weight8x6(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(8, 6)))


def weighted_error(weight, product, rows, columns):
    return float(np.linalg.norm(rows[:, None] * (weight - product) * columns))


def alternating_least_squares(weight, rank, rows, columns):
    """Another way to the same minimum: with v fixed u is a least-squares solution, and the other way round."""
    left, right = np.diag(rows), np.diag(columns)
    v = np.random.default_rng(1).normal(size=(rank, weight.shape[1]))
    for _ in range(3000):
        u = np.linalg.lstsq((v @ right).T, (weight @ right).T, rcond=None)[0].T
        v = np.linalg.lstsq(left @ u, left @ weight, rcond=None)[0]
    return u @ v


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("sides", ["rows", "columns", "both"])
def test_weighted_svd_is_the_minimum(rank, sides):
    rows = ROWS if sides != "columns" else None
    columns = COLUMNS if sides != "rows" else None
    weight = weight8x6()
    u, v = factors.weighted_svd(weight, rank, rows=rows, columns=columns)
    assert u.shape == (8, rank) and v.shape == (rank, 6)
    r = np.ones(8) if rows is None else rows.numpy()
    c = np.ones(6) if columns is None else columns.numpy()
    found = weighted_error(weight.numpy(), (u @ v).numpy(), r, c)
    other = alternating_least_squares(weight.numpy(), rank, r, c)
    assert found == pytest.approx(weighted_error(weight.numpy(), other, r, c), rel=1e-9)
    np.testing.assert_allclose((u @ v).numpy(), other, atol=1e-5)
    # What Eckart and Young say the minimum is.
    singular = np.linalg.svd(r[:, None] * weight.numpy() * c, compute_uv=False)
    assert found == pytest.approx(float(np.sqrt((singular[rank:] ** 2).sum())), rel=1e-9)
    generator = np.random.default_rng(2)
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(30):
            moved_u = u.numpy() + scale * generator.normal(size=u.shape)
            moved_v = v.numpy() + scale * generator.normal(size=v.shape)
            assert weighted_error(weight.numpy(), moved_u @ moved_v, r, c) > found


def test_unit_weights_are_the_plain_svd():
    weight = weight8x6()
    plain = low_rank.factorize(weight, 3)
    for given in (factors.weighted_svd(weight, 3), factors.weighted_svd(weight, 3, rows=torch.ones(8))):
        for ours, theirs in zip(given, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, factors.weighted_svd(weight, 3), plain))


def test_at_full_rank_the_weight_comes_back():
    weight = weight8x6()
    u, v = factors.weighted_svd(weight, 6, rows=ROWS, columns=COLUMNS)
    torch.testing.assert_close(u @ v, weight)


def test_the_scale_of_the_weights_does_not_matter_and_components_are_balanced():
    """Else a mean squared gradient of 1e-6 would make u a thousand times longer than v."""
    weight = weight8x6()
    u, v = factors.weighted_svd(weight, 3, rows=ROWS)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))
    for scale in (1e-12, 1e9):
        again = factors.weighted_svd(weight, 3, rows=ROWS * scale)
        torch.testing.assert_close(again[0], u)
        torch.testing.assert_close(again[1], v)


def test_row_weights_move_the_error_to_light_rows():
    weight = weight8x6()
    light = torch.tensor([0.01] * 4 + [1.0] * 4)
    u, v = factors.weighted_svd(weight, 3, rows=light)
    plain = low_rank.unpack(*low_rank.factorize(weight, 3))
    assert (weight - u @ v)[4:].norm() < (weight - plain)[4:].norm()
    assert (weight - u @ v)[:4].norm() > (weight - plain)[:4].norm()


def test_weights_below_the_floor_count_as_the_floor():
    weight = weight8x6()
    low = ROWS.clone()
    low[2] = 0.0
    floored = low.clone()
    floored[2] = factors.FLOOR * 4.0
    for ours, theirs in zip(
        factors.weighted_svd(weight, 2, rows=low), factors.weighted_svd(weight, 2, rows=floored), strict=True
    ):
        assert torch.equal(ours, theirs) and torch.isfinite(ours).all()


@pytest.mark.parametrize("rank", [2, 6])
def test_a_row_of_zeros_stays_one(rank):
    weight = weight8x6()
    weight[3] = 0.0
    rows = ROWS.clone()
    rows[3] = 0.0
    u, v = factors.weighted_svd(weight, rank, rows=rows)
    assert not u[3].any() and not (u @ v)[3].any()
    assert torch.isfinite(u).all() and torch.isfinite(v).all()


def test_a_weight_of_lower_rank_than_asked_for_gives_finite_factors():
    weight = torch.outer(torch.arange(1.0, 9), torch.ones(6))
    u, v = factors.weighted_svd(weight, 4, rows=ROWS)
    assert torch.isfinite(u).all() and torch.isfinite(v).all()
    torch.testing.assert_close(u @ v, weight, rtol=1e-4, atol=1e-4)


# In float32 the error of the SVD counts, which the row weights divide: their range is 16. It is hidden in 16 bits.
@pytest.mark.parametrize(("dtype", "units"), [(torch.float16, 8), (torch.bfloat16, 8), (torch.float32, 8 * 16)])
def test_factors_have_the_dtype_of_the_weight(dtype, units):
    u, v = factors.weighted_svd(weight8x6().to(dtype), 3, rows=ROWS * 1e-6)
    assert u.dtype == v.dtype == dtype
    exact = factors.weighted_svd(weight8x6().to(dtype).double(), 3, rows=ROWS)
    atol = units * torch.finfo(dtype).eps
    torch.testing.assert_close(u.double() @ v.double(), exact[0] @ exact[1], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(7), r"layer: row weights: shape \(7,\), expected \(8,\)"),
        (-torch.ones(8), "expected finite numbers, none below 0 and some above"),
        (torch.zeros(8), "some above"),
        (torch.full((8,), torch.nan), "finite"),
    ],
)
def test_bad_weights_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        factors.weighted_svd(weight8x6(), 2, rows=rows, name="layer")


def test_golden_fisher_row_weights():
    found = factors.fisher_row_weights(torch.tensor([0.25 - 1e-5, 0.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.5, 1e-5**0.5])


def factored(dtype=torch.float64, bias=True, sparse=True, requires_grad=True):
    linear = nn.Linear(6, 8, bias=bias, dtype=dtype)
    linear.weight.requires_grad_(requires_grad)
    weight = linear.weight.detach().clone()
    u, v = low_rank.factorize(weight, 2)
    parts = {"u": u, "v": v} | ({"sparse": weight - u @ v} if sparse else {})
    factor_(linear, {name: part.clone() for name, part in parts.items()})
    return linear, weight, parts


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factored_forward_and_gradients_are_those_of_the_formula(dtype, with_sparse, bias):
    linear, _, parts = factored(dtype, bias=bias, sparse=with_sparse)
    leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
    x, twin = (torch.randn(3, 5, 6, dtype=dtype).requires_grad_() for _ in range(2))
    twin.data.copy_(x.data)
    ours = linear(x)
    theirs = (twin @ leaves["v"].t()) @ leaves["u"].t() + (linear.bias.detach() if bias else 0)
    if with_sparse:
        theirs = theirs + twin @ leaves["sparse"].t()
    torch.testing.assert_close(ours, theirs)
    out = torch.randn_like(ours)
    ours.backward(out)
    theirs.backward(out)
    found = parameters_of(linear)
    assert list(found) == ["u", "v", "sparse"][: 2 + with_sparse]
    for name, reference in leaves.items():
        torch.testing.assert_close(found[name].grad, reference.grad)
    torch.testing.assert_close(x.grad, twin.grad)
    if with_sparse:
        # dL/dS is dL/dW, the sum over tokens of dL/dy xᵀ.
        torch.testing.assert_close(found["sparse"].grad, torch.einsum("bto,bti->oi", out, x.detach()))
    if bias:
        torch.testing.assert_close(linear.bias.grad, out.sum((0, 1)))


def test_without_s_no_matrix_of_the_size_of_the_weight_is_made():
    """That is why training factors is cheaper than training the weight."""
    linear, _, _ = factored(torch.float32, sparse=False)

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        seen: ClassVar[set] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.seen |= {tuple(t.shape) for t in (result if isinstance(result, tuple) else (result,)) if t is not None}
            return result

    with Shapes() as shapes:
        linear(torch.randn(5, 6)).sum().backward()
    assert (5, 8) in shapes.seen and not shapes.seen & {(8, 6), (6, 8)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_unfactor_gives_a_linear_layer_back(bias, sparse, grad):
    linear, _, parts = factored(bias=bias, sparse=sparse)
    with torch.no_grad():
        parameters_of(linear)["u"].mul_(2)
    x = torch.randn(4, 6, dtype=torch.float64)
    y = linear(x)
    with torch.set_grad_enabled(grad):
        found = unfactor_(linear)
    assert type(linear) is nn.Linear and isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad
    assert list(linear.state_dict()) == list(nn.Linear(6, 8, bias=bias).state_dict())
    assert [n for n, _ in linear.named_parameters()] == [n for n, _ in nn.Linear(6, 8, bias=bias).named_parameters()]
    assert not list(linear.buffers()) and not list(linear.children())
    assert list(found) == list(parts) and torch.equal(found["u"], 2 * parts["u"])
    torch.testing.assert_close(linear(x), y)


def test_what_was_frozen_stays_frozen():
    linear, _, _ = factored(requires_grad=False)
    assert not any(p.requires_grad for p in parameters_of(linear).values())
    unfactor_(linear)
    assert not linear.weight.requires_grad and linear.bias.requires_grad


def test_factored_layers_can_be_copied():
    linear, weight, _ = factored()
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        parameters_of(twin)["u"].zero_()
    torch.testing.assert_close(linear.weight, weight)
    assert not torch.equal(twin.weight, linear.weight)
    unfactor_(twin)
    torch.testing.assert_close(linear.weight, weight)
    assert type(twin) is nn.Linear and type(linear) is not nn.Linear


def test_factored_state_loads_into_another_factored_layer():
    first, second = factored()[0], factored()[0]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight, second.weight)


def test_a_factored_weight_cannot_be_assigned():
    linear, _, _ = factored()
    with pytest.raises(RuntimeError, match="cannot be assigned"):
        linear.weight = torch.zeros(8, 6, dtype=torch.float64)


def test_under_autocast_the_weight_is_made_in_full_precision():
    """With S, as near as a dense weight: rounded once, where the layer casts it."""
    linear, weight, _ = factored(torch.float32)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear.weight.dtype == torch.float32
        y = linear(x)
        dense = nn.functional.linear(x, weight, linear.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense, rtol=2**-7, atol=2**-7)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters_of(linear).values())


def test_rows_under_one_threshold():
    """Rows of 4 entries: 5, 1, 3; rows of 2: 4, 3. In order: 5 (4 entries), 4 (6), 3 (10), 3 (12), 1 (16)."""
    scores = {"a": torch.tensor([5.0, 1.0, 3.0]), "b": torch.tensor([4.0, 3.0])}
    lengths = {"a": 4, "b": 2}
    expected = {
        0: ([0, 0, 0], [0, 0]),
        1: ([1, 0, 0], [0, 0]),
        4: ([1, 0, 0], [0, 0]),
        5: ([1, 0, 0], [1, 0]),
        7: ([1, 0, 1], [1, 0]),  # the tie at 3 goes to the earlier tensor
        11: ([1, 0, 1], [1, 1]),
        12: ([1, 0, 1], [1, 1]),
        16: ([1, 1, 1], [1, 1]),
    }
    for count, masks in expected.items():
        found = thresholds.largest_rows_overall(scores, lengths, count)
        assert tuple(found[name].int().tolist() for name in "ab") == masks, count
    for count in (-1, 17):
        with pytest.raises(ValueError, match=f"count is {count}, expected 0 to 16"):
            thresholds.largest_rows_overall(scores, lengths, count)
