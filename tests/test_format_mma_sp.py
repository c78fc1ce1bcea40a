"""The order of ``mma.sp``'s fragments: every bit where the PTX ISA has it, and back to the neutral form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.formats import mma_sp, nm

DTYPES = [torch.float16, torch.bfloat16, torch.int8]
# Two places of a group, lower first: the six pairs that the instruction takes.
LEGAL = {0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110}


def random_weight(n, m, out_features, in_features, dtype, seed=0, zeros=0.3):
    """Obeys n:m, some groups with fewer weights and some empty."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(out_features, in_features, generator=generator)
    dense = nm.project(dense, n, m) * (torch.rand(dense.shape, generator=generator) >= zeros)
    return (dense * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else dense.to(dtype)


def slots_of(dense):
    """Kept values and places ``(out, in / 2)`` of a 2:4 weight, one group after the other in plain Python."""
    values, places = torch.zeros(dense.shape[0], dense.shape[1] // 2, dtype=dense.dtype), []
    for row in range(dense.shape[0]):
        places.append([])
        for group in range(dense.shape[1] // 4):
            four = dense[row, 4 * group : 4 * group + 4]
            kept = [i for i in range(4) if four[i] != 0]
            kept = sorted(kept + [i for i in range(4) if i not in kept][: 2 - len(kept)])
            places[-1] += kept
            for slot, place in enumerate(kept):
                values[row, 2 * group + slot] = four[place]
    return values, places


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_and_place_lies_where_the_instruction_reads_it(dtype):
    """By the figures of the PTX ISA, element by element, over two blocks each way."""
    inputs, itemsize = mma_sp.block_inputs(dtype.itemsize), dtype.itemsize
    dense = random_weight(2, 4, 128, 2 * inputs, dtype)
    values, metadata = mma_sp.pack(*nm.pack(dense, 2, 4), 2, 4, 2 * inputs)
    kept, places = slots_of(dense)
    per_register, step_kept = 4 // itemsize, 32 // itemsize
    values = values.view(2, 2, 2, 4, 32, 4, per_register)
    for feature_block, block, step, product, lane, register, element in torch.cartesian_prod(
        *map(torch.arange, values.shape)
    ).tolist():
        g, q = lane // 4, lane % 4
        # Registers 1 and 3 hold row g + 8, registers 2 and 3 the columns further along.
        row = feature_block * 64 + product * 16 + g + (8 if register % 2 else 0)
        within = (step_kept // 2 if register >= 2 else 0) + q * per_register + element
        column = block * inputs // 2 + step * step_kept + within
        assert values[feature_block, block, step, product, lane, register, element] == kept[row, column]

    words = metadata.view(2, 2, -1, 32, 4).to(torch.int64) & 0xFFFFFFFF
    for feature_block, block, step, lane, product in torch.cartesian_prod(*map(torch.arange, words.shape)).tolist():
        word = int(words[feature_block, block, step, lane, product])
        g, q = lane // 4, lane % 4
        for i in range(16):
            if itemsize == 2:
                # Both steps share a word: lanes of q 0 and 1 are read by the first, 2 and 3 by the second.
                row = feature_block * 64 + product * 16 + g + (8 if i >= 8 else 0)
                column = block * inputs // 2 + (q // 2) * 16 + (q % 2) * 8 + i % 8
            else:
                row = feature_block * 64 + product * 16 + g + 8 * (q % 2)
                column = block * inputs // 2 + step * 32 + (q // 2) * 16 + i
            assert word >> 2 * i & 3 == places[row][column]


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(mma_sp.PATTERNS),
    dtype=st.sampled_from(DTYPES),
    out_features=st.integers(1, 140),
    fours=st.integers(1, 70),
    zeros=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(pattern, dtype, out_features, fours, zeros, seed):
    n, m = pattern
    dense = random_weight(n, m, out_features, 4 * fours, dtype, seed, zeros)
    neutral = nm.pack(dense, n, m)
    values, metadata = mma_sp.pack(*neutral, n, m, 4 * fours)
    shapes = mma_sp.packed_shapes(out_features, 4 * fours, dtype.itemsize)
    assert (values.shape, metadata.shape) == shapes and values.is_contiguous() and metadata.is_contiguous()
    back = mma_sp.unpack(values, metadata, n, m, out_features, 4 * fours)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back, neutral, strict=True))
    nibbles = metadata.view(torch.uint8)
    assert set((nibbles & 15).unique().tolist()) | set((nibbles >> 4).unique().tolist()) <= LEGAL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), mma_sp.PATTERNS)
def test_every_group_there_is(n, m, dtype):
    """All ways to fill four inputs, negative zeros among them."""
    groups = [
        [0.0 if not pattern >> i & 1 else (-1.0) ** i * (i + 1) for i in range(4)]
        for pattern in range(16)
        if all(bin(pattern >> start & (1 << m) - 1).count("1") <= n for start in range(0, 4, m))
    ]
    dense = torch.tensor(groups).flatten().repeat(65, 1)
    dense = dense.to(dtype) if dtype == torch.int8 else torch.where(dense == 0, -0.0, dense).to(dtype)
    values, metadata = mma_sp.pack(*nm.pack(dense, n, m), n, m, dense.shape[1])
    back = mma_sp.unpack(values, metadata, n, m, *dense.shape)
    assert torch.equal(nm.unpack(*back, n, m, dense.shape[1]), dense)
    assert not torch.signbit(values.float()[values == 0]).any()
    empty = metadata.view(torch.uint8)[-1, -1]
    assert 0b0100 in (empty & 15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_padding_adds_is_empty_groups(dtype):
    dense = random_weight(2, 4, 3, 12, dtype, zeros=0.0)
    values, metadata = mma_sp.pack(*nm.pack(dense, 2, 4), 2, 4, 12)
    full = torch.zeros(64, mma_sp.block_inputs(dtype.itemsize), dtype=dtype)
    full[:3, :12] = dense
    expected = mma_sp.pack(*nm.pack(full, 2, 4), 2, 4, full.shape[1])
    assert torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])


@pytest.mark.parametrize(("out_features", "rank"), [(64, 16), (70, 48), (1, 32)])
def test_factor(out_features, rank):
    u = torch.randn(out_features, rank).half()
    packed = mma_sp.pack_factor(u)
    assert packed.shape == (-(-out_features // 64), rank // 16, 1024)
    assert torch.equal(mma_sp.unpack_factor(packed, out_features), u)
    lanes = packed.view(-1, rank // 16, 4, 32, 4, 2)
    # Row g + 8 in registers 1 and 3, column + 8 in 2 and 3.
    for register, (row, column) in enumerate([(3, 4), (11, 4), (3, 12), (11, 12)]):
        expected = u[row, column : column + 2] if row < out_features else torch.zeros(2)
        assert torch.equal(lanes[0, 0, 0, 3 * 4 + 2, register], expected.half())


def test_meta_tensors_give_shapes():
    values, positions = nm.pack(torch.empty(70, 132, device="meta", dtype=torch.float16), 2, 4)
    packed = mma_sp.pack(values, positions, 2, 4, 132)
    assert tuple(part.shape for part in packed) == mma_sp.packed_shapes(70, 132, 2)


def test_refusals():
    with pytest.raises(ValueError, match="pattern is 2:8, expected one of 2:4, 1:4, 1:2"):
        mma_sp.pack(*nm.pack(nm.project(torch.randn(8, 16), 2, 8), 2, 8), 2, 8, 16)
    with pytest.raises(ValueError, match="in_features is 6, expected a multiple of 4"):
        mma_sp.packed_shapes(8, 6, 2)
    with pytest.raises(ValueError, match="rank is 8, expected a multiple of 16"):
        mma_sp.pack_factor(torch.randn(8, 8).half())
