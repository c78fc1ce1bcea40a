"""The machine that runs kernels on the CPU: it computes what the hardware does, and lets no mistake pass."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import simt_build

# As in harness_cases.cpp.
BLOCKS, STEPS, THREADS = 3, 8, 64
LEGAL = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110]


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    return simt_build.build("harness_cases", [Path(__file__).parent / "simt" / "harness_cases.cpp"])


class Run:
    """One case, in the given order of the blocks: 0 is forward, -1 reversed, and others seed a shuffle."""

    def __init__(self, cases: ModuleType, name: str, order: int = 0) -> None:
        words = BLOCKS * STEPS * THREADS
        self.x = torch.randint(-(2**31), 2**31, (words, 4), dtype=torch.int32)
        self.y = torch.zeros_like(self.x)
        self.scratch = torch.zeros_like(self.x)
        self.counters = torch.zeros(2, dtype=torch.int32)
        buffers = (t.data_ptr() for t in (self.x, self.y, self.scratch, self.counters))
        self.unwritten = cases.run(name, *buffers, order)


@pytest.mark.parametrize("order", [0, -1, 1, 2])
@pytest.mark.parametrize("name", ["copy", "copy_bytes", "pipelined_copy", "legal_nibbles"])
def test_what_is_right_passes(cases: ModuleType, name: str, order: int) -> None:
    run = Run(cases, name, order)
    assert run.unwritten == -1
    assert torch.equal(run.y, run.x)


def places(cases: ModuleType, grid: tuple[int, int], threads: int, order: int = 0) -> torch.Tensor:
    """Block x, block y and thread, in the order in which they ran."""
    place = torch.empty(grid[0] * grid[1], threads, 3, dtype=torch.int32)
    cases.places(place.data_ptr(), *grid, threads, 4, order)
    return place


def test_the_blocks_and_threads_of_a_grid(cases: ModuleType) -> None:
    forward = places(cases, (3, 2), 1024)
    expected = torch.tensor([[x, y, thread] for y in range(2) for x in range(3) for thread in range(1024)])
    assert torch.equal(forward.view(-1, 3), expected.int())
    assert torch.equal(places(cases, (3, 2), 1024, -1), forward.flip(0))
    shuffled = [places(cases, (3, 2), 32, seed)[:, 0, :2].tolist() for seed in range(1, 5)]
    assert shuffled[0] != shuffled[1] and places(cases, (3, 2), 32, 1)[:, 0, :2].tolist() == shuffled[0]
    for blocks in shuffled:
        assert sorted(blocks) == sorted(forward[:, 0, :2].tolist())


@pytest.mark.parametrize("threads", [0, 48, 1056])
def test_blocks_that_no_gpu_has_are_refused(cases: ModuleType, threads: int) -> None:
    with pytest.raises(ValueError, match=f"no block has {threads} threads and 4 bytes of shared memory"):
        places(cases, (1, 1), threads)


def test_a_reduction_through_shared_memory(cases: ModuleType) -> None:
    run = Run(cases, "reduction")
    expected = run.x.reshape(BLOCKS, -1).sum(1).to(torch.int32)
    assert torch.equal(run.scratch.flatten()[:BLOCKS], expected)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_copy_fills_up_with_zeros(cases: ModuleType, size: int) -> None:
    run = Run(cases, f"partial_copy<{size}>")
    rows = run.x.view(torch.uint8)[:THREADS].clone()
    for thread, row in enumerate(rows):
        row[thread % (size + 1) :] = 0
    assert torch.equal(run.scratch.view(torch.uint8)[: BLOCKS * THREADS], rows.repeat(BLOCKS, 1))


@pytest.mark.parametrize("order", [0, -1, 1, 2])
def test_the_last_block_to_arrive_sees_the_others(cases: ModuleType, order: int) -> None:
    run = Run(cases, "split", order)
    expected = run.x.reshape(BLOCKS, STEPS, THREADS, 4)[:, 0].sum(0).to(torch.int32)
    assert torch.equal(run.scratch[BLOCKS * THREADS :][:THREADS], expected)
    assert run.counters[0] == 0


def test_one_fence_after_a_barrier_serves_the_block(cases: ModuleType) -> None:
    run = Run(cases, "split_with_one_fence")
    expected = run.x.reshape(BLOCKS, STEPS, THREADS, 4)[:, 0]
    assert torch.equal(run.scratch[BLOCKS * THREADS :][: BLOCKS * THREADS].view(BLOCKS, THREADS, 4), expected)


# Each with the beginning of a line that says so.
MISTAKES = {
    "missing_wait": r"copy under way: block \(0, 0\), thread 0: load_shared touches shared 512, to which thread 32 ",
    "weak_wait": r"copy under way: .* load_shared touches shared 512, to which thread 32 copies and has not waited",
    "missing_sync_after_wait": r"race: .*, thread 32: copy_async writes shared 512, which thread 0 read since the ",
    "missing_sync_before_copy": r"race: .*, thread 32: copy_async writes shared 512, which thread 0 read since barrier",
    "pending_copies": r"pending copies: block \(0, 0\), thread 0: at exit, not waited for: 1",
    "uncommitted_copies": r"pending copies: .* thread 0: at exit, not waited for: 1",
    "copy_to_misaligned": r"misaligned: .* copy_async at shared 8 must be at a multiple of 16",
    "copy_from_misaligned": r"misaligned: .* copy_async reads an address that must be at a multiple of 16",
    "copy_from_outside": r"out of range: .*, thread 1: copy_async of 16 bytes at x \+ 24576, of 24576 bytes",
    "copy_too_much": r"out of range: .* copy_async of 8 bytes with 12 of them valid",
    "uninitialized_shared": r"uninitialized: .*, thread 0: load_shared reads shared 0, which no thread has written",
    "shared_of_another_block": r"uninitialized: block \(1, 0\), thread 0: load_shared reads shared 0, ",
    "race_read": r"race: .*, thread 32: load_shared reads shared 0, which thread 0 wrote since the start",
    "race_write": r"race: .*, thread 1: store_shared writes shared 0, which thread 0 wrote since the start",
    "race_write_after_read": r"race: .*, thread 32: store_shared writes shared 512, which thread 0 read since barrier",
    "shared_read_outside": r"out of range: .* load_shared of 16 bytes at shared 3072, of 3072 bytes",
    "shared_write_outside": r"out of range: .* store_shared of 1 bytes at shared -1, of 3072 bytes",
    "shared_misaligned": r"misaligned: .* store_shared at shared 8 must be at a multiple of 16",
    "global_read_outside": r"out of range: .* load_global of 16 bytes at x \+ 24576, of 24576 bytes",
    "global_write_outside": r"out of range: .* store_global of 16 bytes at \w+ [+-] \d+, of \d+ bytes",
    "global_misaligned": r"misaligned: .* load_weight at x \+ 8 must be at a multiple of 16",
    "global_uninitialized": r"uninitialized: .* load_global reads scratch \+ 0",
    "write_input": r"read only: .* store_global writes x \+ 0",
    "race_global": r"race: .*, thread 1: store_global writes scratch \+ 0, which thread 0 of this block wrote",
    "race_global_read": r"race: .*, thread 32: load_from_l2 reads scratch \+ 0, which thread 0 of this block wrote",
    "output_written_twice": r"written twice: block \(1, 0\), thread 0: store_global writes y \+ 0, which thread 0 of",
    "loads_own_output": r"not coherent: .* load_global reads y \+ 0, which thread 0 of this block wrote",
    "loads_before_another_writes": r"read by another block: block \(1, 0\), thread 0: store_global writes counters",
    "split_without_fence": r"not fenced: block \(2, 0\), thread 0: load_from_l2 reads scratch \+ 0, which thread 0 of ",
    "split_with_late_fence": r"not fenced: block \(2, 0\), thread 0: load_from_l2 reads scratch \+ 0, which thread 0 ",
    "split_not_coherent": r"not coherent: block \(2, 0\), thread 0: load_global reads scratch \+ 0, which thread 0 of ",
    "divergent_collective": r"divergence: .*, thread 32 is at load_matrices and thread 40 at multiply_dense<Half>",
    "collective_without_all": r"divergence: .*, thread 0 is at load_matrices and thread 3 at exit, since barrier 1",
    "collective_against_barrier": r"divergence: .*, thread 0 is at load_matrices and thread 16 at sync_block, since",
    "barrier_without_all": r"barrier: .*, thread 0 is at sync_block and thread 32 at exit, since the start",
    "matrices_misaligned": r"misaligned: .*, thread 0: load_matrices at shared 8 must be at a multiple of 16",
    "matrices_race": r"race: .*, thread 0: load_matrices reads shared 16, which thread 1 wrote since the start",
    "illegal_nibble": r"metadata: .*, thread 2: multiply_sparse with nibble 6 for row 8, k from 4: its indices 2 and 1",
    "zero_nibble": r"metadata: .*, thread 2: multiply_sparse with nibble 0 for row 0, k from 0: its indices 0 and 0",
    "throws": r"exception: block \(0, 0\), thread 0: this kernel throws",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported(cases: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?m)^{MISTAKES[name]}") as caught:
        Run(cases, name)
    assert len(str(caught.value).splitlines()) <= 11


def test_another_order_finds_the_same_mistake(cases: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"^not coherent: block \(0, 0\), thread 0: load_global reads counters \+ 4"):
        Run(cases, "loads_before_another_writes", -1)


def test_what_is_not_written_can_be_asked_for(cases: ModuleType) -> None:
    assert Run(cases, "unwritten_output").unwritten == 7 * 16


def test_a_machine_that_failed_does_not_disturb_the_next(cases: ModuleType) -> None:
    for name in ("divergent_collective", "missing_wait", "barrier_without_all"):
        with pytest.raises(RuntimeError):
            Run(cases, name)
        test_what_is_right_passes(cases, "pipelined_copy", 0)


# The maps between lanes and matrix elements, written down a second time: as indices, where the machine has loops.
LANE = torch.arange(32)
G, Q = LANE // 4, LANE % 4


def to_fragments_a(a: torch.Tensor) -> torch.Tensor:
    """The 16 rows of ``a``, 32 bytes each, as 32 lanes of 16 bytes."""
    words = a.contiguous().view(torch.int32)  # [16, 8]
    return torch.stack([words[G, Q], words[G + 8, Q], words[G, Q + 4], words[G + 8, Q + 4]], 1).contiguous()


def to_fragments_b(b: torch.Tensor) -> torch.Tensor:
    """``b`` of [k, 8]: lanes hold words of its transpose."""
    words = b.t().contiguous().view(torch.int32)  # [8, k / 2 or k / 4]
    return torch.stack([words[G, 4 * j + Q] for j in range(words.shape[1] // 4)], 1).contiguous()


def to_fragments_d(d: torch.Tensor) -> torch.Tensor:
    return torch.stack([d[G, 2 * Q], d[G, 2 * Q + 1], d[G + 8, 2 * Q], d[G + 8, 2 * Q + 1]], 1).contiguous()


def words_of(nibbles: torch.Tensor) -> torch.Tensor:
    """The last dimension, 8 nibbles, as words: the first are the lowest bits."""
    return (nibbles.to(torch.int64) << 4 * torch.arange(8)).sum(-1).to(torch.int32)


def metadata_of_16_bits(nibbles: torch.Tensor, selector: int) -> torch.Tensor:
    """``nibbles`` of [16, 8], in the lanes that ``selector`` reads; the others hold what is illegal."""
    k = 4 * (Q % 2)[:, None] + torch.arange(4)
    words = words_of(torch.cat([nibbles[G[:, None], k], nibbles[G[:, None] + 8, k]], 1))
    return torch.where(Q // 2 == selector, words, 0)


def metadata_of_int8(nibbles: torch.Tensor) -> torch.Tensor:
    return words_of(nibbles[(G + 8 * (Q % 2))[:, None], 8 * (Q // 2)[:, None] + torch.arange(8)])


def scattered(kept: torch.Tensor, nibbles: torch.Tensor) -> torch.Tensor:
    """``kept`` of [16, k / 2] where ``nibbles`` of [16, k / 4] say that it lies in [16, k]."""
    where = torch.stack([nibbles & 3, nibbles >> 2], 2)  # [16, k / 4, 2]
    dense = torch.zeros(16, nibbles.shape[1], 4, dtype=torch.float64)
    return dense.scatter_(2, where, kept.double().view(where.shape)).view(16, -1)


def patterns(groups: int) -> list[torch.Tensor]:
    """Every legal nibble in every place, and some at random."""
    legal = torch.tensor(LEGAL)
    places = torch.arange(16)[:, None] + 5 * torch.arange(groups)
    every = [legal[(places + first) % 6] for first in range(6)]
    return every + [legal[torch.randint(6, (16, groups))] for _ in range(20)]


def multiplied(
    cases: ModuleType, name: str, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, metadata: torch.Tensor
) -> torch.Tensor:
    """``d + a b`` in fragments, as the machine has it."""
    fragments = [to_fragments_a(a), to_fragments_b(b), metadata.to(torch.int32), to_fragments_d(d)]
    cases.product(name, *(fragment.data_ptr() for fragment in fragments), 1)
    return fragments[-1]


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_products_of_16_bits(cases: ModuleType, dtype: torch.dtype, selector: int) -> None:
    name = f"sparse_{str(dtype).removeprefix('torch.')}_{selector}"
    for nibbles in patterns(8):
        a, b = torch.randn(16, 16).to(dtype), torch.randn(32, 8).to(dtype)
        d = torch.randn(16, 8)
        expected = d.double() + scattered(a, nibbles) @ b.double()
        got = multiplied(cases, name, a, b, d, metadata_of_16_bits(nibbles, selector))
        torch.testing.assert_close(got, to_fragments_d(expected.float()), rtol=2**-23, atol=0)


def test_sparse_products_of_int8(cases: ModuleType) -> None:
    for nibbles in patterns(16):
        a = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
        b = torch.randint(-128, 128, (64, 8), dtype=torch.int8)
        d = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)
        expected = d + (scattered(a, nibbles) @ b.double()).to(torch.int32)
        assert torch.equal(
            multiplied(cases, "sparse_int8", a, b, d, metadata_of_int8(nibbles)), to_fragments_d(expected)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_products(cases: ModuleType, dtype: torch.dtype) -> None:
    name = f"dense_{str(dtype).removeprefix('torch.')}"
    for _ in range(10):
        a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
        d = torch.randn(16, 8)
        expected = d.double() + a.double() @ b.double()
        got = multiplied(cases, name, a, b, d, torch.zeros(32))
        torch.testing.assert_close(got, to_fragments_d(expected.float()), rtol=2**-23, atol=0)


def test_matrices_are_loaded_as_the_fragments_of_a(cases: ModuleType) -> None:
    """Rows 0-7 and 8-15 of the left half, then of the right half: then they are the fragments of a 16 x 16 A."""
    a = torch.randint(-(2**31), 2**31, (16, 8), dtype=torch.int32)
    rows = torch.cat([a[:, :4], a[:, 4:]]).contiguous()  # [32, 4]
    unused, d = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 4, dtype=torch.int32)
    cases.product("matrices", rows.data_ptr(), unused.data_ptr(), unused.data_ptr(), d.data_ptr(), 1)
    assert torch.equal(d, to_fragments_a(a))


def test_lanes_exchange_words(cases: ModuleType) -> None:
    words, unused = torch.randint(-(2**31), 2**31, (32, 4), dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    for bits in range(32):
        d = torch.zeros_like(words)
        cases.product("shuffled", words.data_ptr(), words.data_ptr(), unused.data_ptr(), d.data_ptr(), bits)
        assert torch.equal(d, words[LANE ^ bits])
    with pytest.raises(RuntimeError, match="thread 0: shuffle_xor by 32, expected 0 to 31"):
        cases.product("shuffled", words.data_ptr(), words.data_ptr(), unused.data_ptr(), d.data_ptr(), 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_are_rounded_as_torch_does(cases: ModuleType, dtype: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.int16).view(dtype).float()
    # Between two neighbours, at the middle, and next to the middle.
    between = (every[1:].double() + every[:-1].double()).div(2).float()
    nearby = [between, *(torch.nextafter(between, torch.tensor(limit)) for limit in (-torch.inf, torch.inf))]
    anything = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([every, *nearby, anything])
    bits, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    convert = getattr(cases, f"round_trip_{str(dtype).removeprefix('torch.')}")
    convert(x.data_ptr(), bits.data_ptr(), back.data_ptr(), len(x))
    number = ~x.isnan()
    assert torch.equal(bits[number].view(torch.int16), x[number].to(dtype).view(torch.int16))
    assert (bits[~number].view(torch.int16) == 0x7FFF).all()
    assert torch.equal(back[number], x[number].to(dtype).float())
    assert back[~number].isnan().all()


def test_the_header_for_the_cpu_has_all_that_the_one_for_the_gpu_has() -> None:
    cpu, gpu = ((folder / "common" / "intrinsics.cuh").read_text() for folder in simt_build.FOLDERS)
    names = set(re.findall(r"(?m)^(?:SB_DEVICE .*?|#define )(\w+)(?:<\w+>)?\(", gpu))
    assert {"SB_KERNEL", "load_matrices", "load_global", "multiply_sparse"} <= names
    assert not [name for name in sorted(names) if not re.search(rf"\b{name}\(", cpu)]


def test_a_compiler_error_is_shown(tmp_path: Path) -> None:
    (tmp_path / "wrong.cpp").write_text("int f() { return nothing; }")
    with pytest.raises(RuntimeError, match="nothing.*was not declared"):
        simt_build.build("wrong", [tmp_path / "wrong.cpp"])
