"""``sparsebert::varlen_attention``: each sequence as if it were alone, whatever lies beside it."""

from __future__ import annotations

import pytest
import torch

import sparsebert as sb
from sparsebert import ops
from sparsebert.ops import attention as module
from sparsebert.ops.devices import Device
from sparsebert.ops.select import Problem
from sparsebert.ops.specs import AttentionSpec

LENGTHS = [(5,), (1, 1, 1), (7, 1, 33, 2), (0, 4, 0, 3, 0), (128, 64)]
HEADS, SIZE = 3, 8


def case(lengths, dtype=torch.float32, *, tail=0, width=HEADS * SIZE):
    """q, k and v as slices of one projection, and the ends."""
    total = sum(lengths) + tail
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(total, 3 * width, generator=generator).to(dtype)
    return (*qkv.chunk(3, dim=1), torch.tensor((0, *lengths)).cumsum(0).int())


def exact(q, k, v, ends, heads=HEADS):
    """In float64, head by head."""
    y = torch.zeros(q.shape, dtype=torch.float64)
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        for part in range(heads):
            width = q.shape[1] // heads
            columns = slice(part * width, (part + 1) * width)
            a, b, c = (x[begin:end, columns].double() for x in (q, k, v))
            y[begin:end, columns] = torch.softmax(a @ b.T / width**0.5, dim=-1) @ c
    return y


def padded(q, k, v, ends, longest):
    return module._padded(*(x.unflatten(1, (HEADS, -1)) for x in (q, k, v)), ends, longest).reshape(q.shape)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)])
def test_every_sequence_alone(lengths, dtype, bound):
    q, k, v, ends = case(lengths, dtype)
    expected = exact(q, k, v, ends)
    y = ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=max(lengths))
    assert y.is_contiguous() and y.dtype == dtype
    assert (y.double() - expected).abs().max() <= bound
    for longest in (max(lengths), max(lengths) + 9):
        assert (padded(q, k, v, ends, longest).double() - expected).abs().max() <= bound


@pytest.mark.parametrize("run", ["op", "padded"])
def test_neighbours_do_not_matter_to_the_bit(run):
    """Other sequences may be longer, shorter, absent or not finite."""
    q, k, v, _ = case((64,))

    def alone(lengths, begin):
        if run == "op":
            return ops.varlen_attention(
                q, k, v, torch.tensor((0, *lengths)).cumsum(0).int(), heads=HEADS, max_length=40
            )
        return padded(q, k, v, torch.tensor((0, *lengths)).cumsum(0).int(), 40)

    first = alone((10, 12, 20), 10)[10:22].clone()
    for lengths in ((10, 12), (3, 7, 12, 5, 6), (10, 12, 40)):
        assert torch.equal(alone(lengths, 10)[10:22], first)
    for other in (q, k, v):
        other[:10], other[22:] = torch.nan, torch.inf
    assert torch.equal(alone((10, 12, 20), 10)[10:22], first)


def test_rows_after_the_last_sequence_change_nothing():
    q, k, v, ends = case((6, 9), tail=5)
    for x in (q, k, v):
        x[15:] = torch.nan
    expected = exact(q, k, v, ends)[:15]
    for y in (ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=9), padded(q, k, v, ends, 9)):
        assert y.shape == q.shape and (y[:15].double() - expected).abs().max() <= 1e-6


def test_no_sequence_and_no_token():
    q, k, v, ends = case(())
    assert ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=0).shape == (0, HEADS * SIZE)
    q, k, v, ends = case((0, 0))
    assert ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=0).shape == (0, HEADS * SIZE)
    assert padded(q, k, v, ends, 0).shape == (0, HEADS * SIZE)


def test_opcheck():
    q, k, v, ends = case((4, 3))
    torch.library.opcheck(
        torch.ops.sparsebert.varlen_attention.default, (q, k, v, ends), {"heads": HEADS, "max_length": 4}
    )


def test_compiled_without_a_break():
    q, k, v, ends = case((4, 3))
    run = torch.compile(
        lambda *x: ops.varlen_attention(*x, heads=HEADS, max_length=4) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(run(q, k, v, ends), ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=4) + 1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"q": torch.zeros(7)},
            ValueError,
            r"varlen_attention: q has shape \(7,\), expected \(total, heads \* d\) with heads=3",
        ),
        (
            {"heads": 5},
            ValueError,
            r"varlen_attention: q has shape \(7, 24\), expected \(total, heads \* d\) with heads=5",
        ),
        (
            {"q": torch.zeros(7, 24, dtype=torch.int32)},
            TypeError,
            r"varlen_attention: q is torch\.int32, expected a floating",
        ),
        ({"k": torch.zeros(6, 24)}, ValueError, r"varlen_attention: k has shape \(6, 24\), expected \(7, 24\) as q"),
        (
            {"v": torch.zeros(7, 24).half()},
            TypeError,
            r"varlen_attention: v is torch\.float16, expected torch\.float32 as q",
        ),
        ({"v": torch.zeros(7, 24, device="meta")}, ValueError, "varlen_attention: v is on meta, expected cpu as q"),
        (
            {"cu_seqlens": torch.zeros(3)},
            TypeError,
            r"varlen_attention: cu_seqlens is torch\.float32, expected torch\.int32",
        ),
        (
            {"cu_seqlens": torch.zeros(2, 2).int()},
            ValueError,
            r"varlen_attention: cu_seqlens has shape \(2, 2\), expected",
        ),
        ({"cu_seqlens": torch.zeros(3, device="meta").int()}, ValueError, "varlen_attention: cu_seqlens is on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, error, text):
    q, k, v, ends = case((4, 3))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": ends, "heads": HEADS, "max_length": 4} | change
    with pytest.raises(error, match=text):
        ops.varlen_attention(**arguments)


def test_a_gradient_is_refused_at_once():
    q, k, v, ends = case((4, 3))
    with pytest.raises(RuntimeError, match="varlen_attention: q requires grad, but the op has no gradient"):
        ops.varlen_attention(q.requires_grad_(), k, v, ends, heads=HEADS, max_length=4)


def test_flash_is_refused_with_the_reason():
    q, k, v, ends = case((4, 3))
    with sb.backend("torch"), pytest.raises(RuntimeError, match="needs a CUDA device, not cpu"):
        ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=4)


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "reason"),
    [
        ((8, 0), torch.float16, 64, None),
        ((9, 0), torch.bfloat16, 256, None),
        ((7, 5), torch.float16, 64, "needs compute capability 8.0, found 7.5"),
        ((9, 0), torch.float32, 64, "needs float16 or bfloat16, not float32"),
        ((9, 0), torch.float16, 20, "needs heads of a multiple of 8 up to 256 features, not 20"),
        ((9, 0), torch.float16, 264, "needs heads of a multiple of 8 up to 256 features, not 264"),
    ],
)
def test_what_flash_takes_on_a_gpu(capability, dtype, size, reason):
    device = Device("cuda", "Test GPU", capability)
    problem = Problem("neutral", device, dtype, AttentionSpec(12, size), 100, "none")
    assert module._flash_refusal(problem) == reason


def test_flash_takes_what_the_op_gives_it():
    """Its installed version, by shapes alone: no GPU is here to run it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(7, 3, 8, dtype=torch.float16, device="cuda") for _ in range(3))
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        assert module._flash(q, k, v, ends, 4).shape == (7, 3, 8)
