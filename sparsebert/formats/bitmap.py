"""The bitmap format: any sparsity, the non-zeros and one bit a weight that says where they are.

For a weight ``(out, in)`` with ``nnz`` non-zeros the packed form is three tensors:

- ``values (nnz)``, float: the non-zeros in row-major order, and nothing else: no stored zero;
- ``bitmap uint8 (out, ceil(in / 8))``: bit j (value ``1 << j``) of byte b of a row is set where column 8*b + j is
  non-zero; a row ends at a byte, its spare bits are zero;
- ``row_offsets int64 (out + 1)``: where each row begins in ``values``; ``row_offsets[0]`` = 0, ``row_offsets[i+1]`` -
  ``row_offsets[i]`` = bits set in row i, and the last is ``nnz``.

So a weight has one packed form only, and in 16-bit at density d it costs 1 + 16 d bits a weight (and 8 bytes a row).
Rows may be empty, the whole matrix may be, and ``in`` need not be a multiple of 8.

-0.0 counts as zero (and unpacks as +0.0); NaN and infinities are refused. All functions but ``split`` also take meta
tensors, where they compute shapes alone; ``pack`` must then be told ``nnz``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sparsebert.formats.common import (
    DTYPES,
    check_count,
    check_matrix,
    check_one_device,
    check_tensor,
    pack_bits,
    refuse_non_finite,
    unpack_bits,
)

# Rows are handled in blocks of about this many weights, so that the index tensors of a big matrix stay in cache.
_BLOCK = 1 << 20


def packed_shapes(out_features: int, in_features: int, nnz: int) -> tuple[tuple[int], tuple[int, int], tuple[int]]:
    """Shapes of ``values``, ``bitmap`` and ``row_offsets``; ``ValueError`` for more non-zeros than weights."""
    if not 0 <= nnz <= out_features * in_features:
        raise ValueError(f"bitmap: nnz is {nnz}, expected 0 to {out_features} * {in_features}")
    return (nnz,), (out_features, -(-in_features // 8)), (out_features + 1,)


def keep_count(density: float, out_features: int, in_features: int) -> int:
    """``round(density * out * in)``, and at least 1 where there is a weight: how many weights to keep.

    Half a weight rounds to even. ``ValueError`` unless ``density`` is from 0 to 1.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"keep_count: density is {density}, expected 0 to 1")
    numel = out_features * in_features
    return min(max(round(density * numel), 1), numel)


def magnitude_mask(weight: Tensor, count: int) -> Tensor:
    """``True`` at the ``count`` largest |w| of the whole matrix; ties go to the lower flat index (row-major).

    So masks are reproducible. NaN counts as infinite: it stays, and ``pack`` refuses it.
    """
    check_matrix(weight, DTYPES, "magnitude_mask")
    check_count(count, weight.numel(), "magnitude_mask: count")
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    if weight.is_meta or not count:
        return mask
    # The smallest magnitude to keep splits the matrix; a stable sort would need 8 bytes of index a weight.
    magnitudes = weight.detach().abs().flatten().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    smallest = _kth_largest(magnitudes, count)
    flat = mask.view(-1)
    torch.gt(magnitudes, smallest, out=flat)
    missing = count - int(flat.sum())
    for start in range(0, len(flat), _BLOCK):
        ties = (magnitudes[start : start + _BLOCK] == smallest).nonzero().flatten()[:missing]
        flat[start : start + _BLOCK][ties] = True
        missing -= len(ties)
        if not missing:
            break
    return mask


def project(weight: Tensor, count: int) -> Tensor:
    """The nearest weight (Frobenius) with ``count`` non-zeros at most: all but the largest |w| become 0."""
    return torch.where(magnitude_mask(weight, count), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def pack(weight: Tensor, *, name: str = "weight", nnz: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``weight (out, in)`` -> ``(values, bitmap, row_offsets)``; ``unpack`` gives it back exactly.

    ``name`` is the layer's path, for the error a weight with NaN or infinities is refused with. A meta weight cannot
    say how many non-zeros it has: there ``nnz`` must, elsewhere it need not, and must agree if it does.
    """
    check_matrix(weight, DTYPES, name)
    weight = weight.detach()
    (out_features, in_features), device = weight.shape, weight.device
    if weight.is_meta:
        if nnz is None:
            raise ValueError(f"{name}: a meta weight does not say how many non-zeros it has, expected nnz")
        shapes = packed_shapes(out_features, in_features, nnz)
        dtypes = (weight.dtype, torch.uint8, torch.int64)
        values, bitmap, row_offsets = (
            torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return values, bitmap, row_offsets
    bitmap = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int64, device=device)
    parts = [weight.new_empty(0)]
    for block in _row_blocks(out_features, in_features):
        part = weight[block]
        refuse_non_finite(part, f"{name}: weight", block.start)
        mask = part != 0
        parts.append(part[mask])
        bitmap[block] = pack_bits(mask.view(torch.uint8), 1)
        row_offsets[1:][block] = mask.sum(-1)
    values = torch.cat(parts)
    if nnz is not None and nnz != len(values):
        raise ValueError(f"{name}: weight has {len(values)} non-zeros, expected nnz={nnz}")
    return values, bitmap, row_offsets.cumsum(0)


def unpack(values: Tensor, bitmap: Tensor, row_offsets: Tensor, in_features: int) -> Tensor:
    """``(values, bitmap, row_offsets)`` -> the dense weight ``(out, in_features)``, +0.0 where no bit is set.

    Trusts its input (see ``validate``) except for shapes.
    """
    out_features, nnz = (bitmap.shape[0] if bitmap.dim() else 0), values.numel()
    actual = (tuple(values.shape), tuple(bitmap.shape), tuple(row_offsets.shape))
    expected = packed_shapes(out_features, in_features, nnz)
    if actual != expected:
        raise ValueError(
            f"unpack: values {actual[0]}, bitmap {actual[1]} and row_offsets {actual[2]}, expected {expected[0]}, "
            f"{expected[1]} and {expected[2]} for in_features={in_features}"
        )
    if values.is_meta:
        return torch.empty(out_features, in_features, dtype=values.dtype, device=values.device)
    if values.device.type != "cpu":
        return _gather(unpack_bits(bitmap, 1, in_features).bool(), values)
    dense = torch.zeros(out_features, in_features, dtype=values.dtype, device=values.device)
    blocks = list(_row_blocks(out_features, in_features))
    ends = row_offsets[[block.stop for block in blocks]].tolist() if blocks else []
    for block, start, end in zip(blocks, [0, *ends], ends, strict=False):
        mask = unpack_bits(bitmap[block], 1, in_features).bool()
        dense[block].masked_scatter_(mask, values[start:end])
    return dense


def stack(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The packed form of weights of as many columns, one under the other, of their packed forms; ``split`` gives these
    back."""
    values, bitmaps, row_offsets = zip(*parts, strict=True)
    begin = row_offsets[0][:1]
    offsets = [begin]
    for own in row_offsets:
        offsets.append(own[1:] + begin)
        begin = begin + own[-1:]
    return torch.cat(values), torch.cat(bitmaps), torch.cat(offsets)


def split(
    values: Tensor, bitmap: Tensor, row_offsets: Tensor, out_features: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The packed forms of the next ``out_features`` rows each, all together those of the weight; new tensors."""
    rows = list(accumulate(out_features, initial=0))
    places = row_offsets[rows].tolist()
    return [
        (values[begin:end].clone(), bitmap[first:last].clone(), row_offsets[first : last + 1] - begin)
        for (first, last), (begin, end) in zip(pairwise(rows), pairwise(places), strict=True)
    ]


def validate(
    values: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    nnz: int,
    out_features: int,
    in_features: int,
    *,
    name: str = "bitmap",
) -> None:
    """``ValueError`` naming ``name``, the tensor, expected and actual unless this is the packed form of some weight.

    Checked: shapes, dtypes, one device, spare bits zero, ``nnz`` bits set, offsets that count them, finite non-zero
    values. What passes cannot make a kernel read out of bounds. Offsets are compared and never computed with.
    """
    expected_values, expected_bitmap, expected_offsets = packed_shapes(out_features, in_features, nnz)
    check_tensor(values, expected_values, DTYPES, f"{name}: values", f" for nnz={nnz}")
    check_tensor(bitmap, expected_bitmap, (torch.uint8,), f"{name}: bitmap", f" for in_features={in_features}")
    check_tensor(row_offsets, expected_offsets, (torch.int64,), f"{name}: row_offsets")
    check_one_device(name, values=values, bitmap=bitmap, row_offsets=row_offsets)
    if values.is_meta:
        return
    offsets = torch.zeros_like(row_offsets)
    for block in _row_blocks(out_features, in_features):
        if in_features % 8 and len(bad := (bitmap[block, -1] >> in_features % 8).nonzero()):
            row = block.start + int(bad[0, 0])
            raise ValueError(f"{name}: bitmap has spare bits set at the end of row {row}, expected zeros")
        offsets[1:][block] = unpack_bits(bitmap[block], 1, in_features).sum(-1)
    offsets = offsets.cumsum(0)
    if int(offsets[-1]) != nnz:
        raise ValueError(f"{name}: bitmap has {int(offsets[-1])} bits set, expected nnz={nnz}")
    if not torch.equal(row_offsets, offsets):
        place = int((row_offsets != offsets).nonzero()[0, 0])
        raise ValueError(
            f"{name}: row_offsets has {int(row_offsets[place])} at {place}, expected {int(offsets[place])}, the bits "
            f"set in bitmap before row {place}"
        )
    for start in range(0, nnz, _BLOCK):
        part = values[start : start + _BLOCK]
        if len(bad := (torch.isfinite(part) & (part != 0)).logical_not().nonzero()):
            place = start + int(bad[0, 0])
            raise ValueError(
                f"{name}: values holds {float(values[place])} at {place}, expected finite numbers that are not 0"
            )


def _gather(mask: Tensor, values: Tensor) -> Tensor:
    """``values`` in row-major order where ``mask`` is True, +0.0 elsewhere.

    Without asking the device for a number, so that a CUDA graph can capture it; takes 8 bytes of index a weight.
    """
    if not values.numel():
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    places = mask.flatten().cumsum(0).sub_(1).clamp_(min=0).view(mask.shape)
    return torch.where(mask, values[places], torch.zeros((), dtype=values.dtype, device=values.device))


def _row_blocks(out_features: int, in_features: int) -> Iterator[slice]:
    """Slices of rows, about ``_BLOCK`` weights each."""
    rows = max(1, _BLOCK // max(1, in_features))
    for start in range(0, out_features, rows):
        yield slice(start, min(start + rows, out_features))


def _kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    """The k-th largest of a 1-d tensor, as a 0-d tensor."""
    if magnitudes.device.type == "cpu":
        return torch.kthvalue(magnitudes, len(magnitudes) + 1 - k).values
    # On CUDA kthvalue works with one block, and is refused under use_deterministic_algorithms.
    return torch.sort(magnitudes).values[-k]
