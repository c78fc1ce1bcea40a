"""Hopper's barriers, copies and products in the machine that runs kernels on the CPU, and as nvcc compiles them."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("setuptools")

import simt_build
from cuda_build import Kernel, compile_for_hopper, expect, find_cuobjdump, read_log, sass
from test_simt_harness import LEGAL, metadata_of_16_bits, metadata_of_int8, scattered, to_fragments_a

FOLDER = Path(__file__).parent / "simt"


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    return simt_build.build("hopper_cases", [FOLDER / "hopper_cases.cpp"])


def matrix(rows: int, columns: int, stride: int) -> torch.Tensor:
    """Elements of 16 bits, rows ``stride`` apart; no two of them are equal in small ones."""
    memory = torch.arange(rows * stride).to(torch.int16).reshape(rows, stride)
    return memory[:, :columns]


def copied(cases: ModuleType, name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    stride = (columns + 7) // 8 * 8
    x, y = matrix(rows, columns, stride), torch.zeros(rows, stride, dtype=torch.int16)[:, :columns]
    cases.copy(name, x.data_ptr(), y.data_ptr(), rows, columns, 2 * stride)
    return x, y


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (112, 128), (40, 100), (1, 1)])
def test_tiles_are_loaded_and_stored(cases: ModuleType, rows: int, columns: int) -> None:
    x, y = copied(cases, "none", rows, columns)
    assert torch.equal(x, y)


@pytest.mark.parametrize("bytes_", [32, 4096, 96 << 10])
def test_packed_bytes_are_loaded(cases: ModuleType, bytes_: int) -> None:
    x = torch.randint(-(2**31), 2**31, (bytes_ // 4,), dtype=torch.int32)
    y = torch.zeros_like(x)
    cases.packed(x.data_ptr(), y.data_ptr(), bytes_)
    assert torch.equal(x, y)


# By swizzle: which 16 bytes of a row lie at each place, for 8 rows. Written down, where the machine has a formula.
PATTERNS = {
    0: [[0, 1, 2, 3, 4, 5]] * 8,
    32: [[0, 1], [0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0]],
    64: [[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 3, 2], [1, 0, 3, 2]]
    + [[2, 3, 0, 1], [2, 3, 0, 1], [3, 2, 1, 0], [3, 2, 1, 0]],
    128: [[place ^ row for place in range(8)] for row in range(8)],
}


@pytest.mark.parametrize(("inner", "outer"), [(0, 0), (8, 3), (-5, -2), (50, 19), (200, 0)])
@pytest.mark.parametrize("swizzle", PATTERNS)
def test_a_box_lies_in_shared_memory_as_swizzled(cases: ModuleType, swizzle: int, inner: int, outer: int) -> None:
    """Chunks of 16 bytes change places within a row; what is outside of the matrix is zeros."""
    width = 8 * len(PATTERNS[swizzle][0])
    x = matrix(21, 60, 64)
    got = torch.empty(16, width, dtype=torch.int16)
    cases.dump(x.data_ptr(), got.data_ptr(), 21, 60, 128, width, 16, swizzle, inner, outer)
    padded = torch.zeros(300, 600, dtype=torch.int16)
    padded[100:121, 100:160] = x
    box = padded[100 + outer :, 100 + inner :][:16, :width]
    order = torch.tensor(PATTERNS[swizzle]).repeat(2, 1)[:, :, None].expand(-1, -1, 8)
    assert torch.equal(got, box.reshape(16, -1, 8).gather(1, order).reshape(16, -1))


def test_matrices_are_stored_transposed(cases: ModuleType) -> None:
    x = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    y = torch.zeros_like(x)
    cases.transposed(x.data_ptr(), y.data_ptr())
    assert torch.equal(y, x.transpose(1, 2))


# The kernel that copies tiles, with one mistake each, and the beginning of a line that says so.
WRONG_COPIES = {
    "no_init_fence": r"proxy: .*, thread 64: load_tile uses the barrier at shared 6144, which thread 0",
    "no_sync_after_init": r"race: .* thread 1: wait_barrier uses the barrier at shared 6144, which thread 0",
    "no_wait_for_tile": r"copy under way: .*, thread 0: load_shared touches shared 0, to which thread 64 copies",
    "wrong_parity": r"copy under way: .*, thread 0: load_shared touches shared 0, to which thread 64 copies and",
    "no_wait_for_readers": r"copy under way: .*, thread 64: load_tile touches shared 0, to which thread 64 copies",
    "arrival_of_each_lane": r"too many arrivals: .*, thread 2: arrive at the barrier at shared 6160 in phase 0,",
    "arrival_missing": r"deadlock: .*, threads 0 to 63 are at wait_barrier for phase 1 of the barrier at shared 6144, "
    r"which has had 0 of 1 arrivals; thread 64 is at wait_barrier for phase 0 of the barrier at shared 6160, "
    r"which has had 1 of 2 arrivals; threads 65 to 95 are at exit$",
    "arrival_before_reading": r"copy under way: .*, thread 0: load_shared touches shared 0, to which thread 64",
    "arrival_without_sync_warp": r"race: .*, thread 64: load_tile writes shared 16, which thread 1 read at the",
    "more_bytes_expected": r"wrong bytes: .* phase 0 of the barrier at shared 6144 expects 2064 bytes, and 2048",
    "less_bytes_expected": r"wrong bytes: .* phase 0 of the barrier at shared 6144 expects 2032 bytes, and 2048",
    "no_bytes_expected": r"wrong bytes: .* phase 1 of the barrier at shared 6144 expects 0 bytes, and 2048 are",
    "tile_of_nobody": r"pending copies: .* at exit, not waited for at the barrier at shared 6152: 1",
    "no_proxy_fence": r"proxy: .*, thread 0: store_tile reads shared 4096, which thread 0 wrote without",
    "proxy_fence_by_reader": r"proxy: .*, thread 0: store_tile reads shared 4112, which thread 1 wrote without",
    "no_sync_before_store": r"uninitialized: .*, thread 0: store_tile reads shared 4608, which no thread has",
    "no_wait_for_store": r"read under way: .*, thread 0: store_shared writes shared 4096, which ",
    "store_not_waited_for": r"pending stores: .*, thread 0: at exit, not waited for: 1",
    "store_not_committed": r"read under way: .*, thread 0: store_shared writes shared 4096, which ",
    "named_barrier_too_wide": r"deadlock: .*, threads 0 to 63 are at sync_named 1, which has had 64 of 96",
    "named_barriers_differ": r"named barrier: .*, thread 32: sync_named 1 of 96 threads, where thread 0 said",
    "named_barrier_too_narrow": r"named barrier: .*, sync_named 1 of 32 threads, at which 64 have arrived",
}


@pytest.mark.parametrize("name", WRONG_COPIES)
def test_a_mistake_of_the_copy_is_reported(cases: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?m)^{WRONG_COPIES[name]}") as caught:
        copied(cases, name, 112, 128)
    assert len(str(caught.value).splitlines()) <= 11


def run_case(cases: ModuleType, name: str) -> None:
    x = matrix(32, 64, 64).contiguous()
    cases.case(name, x.data_ptr())


RIGHT = [
    *("loads", "loads_plain", "loads_bytes", "arrivals_complete_a_phase", "fenced_below_a_tile"),
    "lanes_apart_at_a_barrier",
]


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(cases: ModuleType, name: str) -> None:
    run_case(cases, name)


MISTAKES = {
    "tile_misaligned": r"misaligned: .*, thread 0: load_tile at shared 64 must be at a multiple of 128",
    "swizzled_tile_misaligned": r"misaligned: .*, thread 0: load_tile at shared 512 must be at a multiple of",
    "tile_outside_of_shared": r"out of range: .*, thread 0: load_tile of 2048 bytes at shared 5120, of 4112",
    "tile_over_a_barrier": r"barrier: .*, thread 0: load_tile touches shared 2048, which belongs to a barrier",
    "box_too_large": r"tensor map: .*: load_tile: an extent of the box is 257, expected 1 to 256",
    "box_wider_than_swizzle": r"tensor map: .*: load_tile: a row of the box in bytes is 256, expected 128, which",
    "stride_misaligned": r"tensor map: .*: load_tile: the stride in bytes is 136, expected a multiple of 16 that",
    "base_misaligned": r"tensor map: .*: load_tile: the base modulo 16 is 8, expected 0",
    "map_outside_of_matrix": r"out of range: .*: load_tile of 128 bytes at x \+ 8192, of 4096 bytes",
    "bytes_odd": r"tensor map: .*: load_bytes: 24 bytes from an address that is 0 modulo 16, expected multiples",
    "bytes_to_misaligned": r"misaligned: .*: load_bytes at shared 8 must be at a multiple of 16",
    "bytes_from_misaligned": r"tensor map: .*: load_bytes: 32 bytes from an address that is 8 modulo 16, expected",
    "barrier_misaligned": r"misaligned: .*, thread 0: init_barrier at shared 4 must be at a multiple of 8",
    "barrier_twice": r"barrier: .*, thread 0: init_barrier at shared 4096, where a barrier is in use from 4096",
    "barriers_overlap": r"barrier: .*, thread 0: init_barrier at shared 4092, where a barrier is in use from",
    "barrier_of_nobody": r"barrier: .*, thread 0: init_barrier with 0 arrivals, expected 1 to 1048575",
    "no_barrier": r"barrier: .*, thread 0: arrive at shared 0, where there is none",
    "barrier_overwritten": r"barrier: .*, thread 0: store_shared touches shared 4096, which belongs to a",
    "too_many_bytes": r"barrier: .*: arrive_expect expects 1048576 bytes, and 0 before, of at most 1048575",
    "strange_parity": r"barrier: .*, thread 0: wait_barrier for parity 2, expected 0 or 1",
    "never_ends": r"deadlock: block \(0, 0\), threads 0 to 15 are at exit; threads 16 to 63 are at wait_barrier "
    r"for phase 0 of the barrier at shared 4096, which has had 0 of 1 arrivals$",
    "arrival_too_early": r"race: .*, thread 63: load_shared reads shared 0, which thread 0 wrote at the same",
    "overwritten_by_the_next": r"copy under way: .*, thread 32: load_shared touches shared 512, to which thread 0",
    "unfenced_below_a_tile": r"proxy: .*, thread 0: load_tile writes shared 0, which thread 0 wrote without",
    "store_to_input": r"read only: .*, thread 0: store_tile writes x \+ 0",
    "named_zero": r"named barrier: .*, thread 0: sync_named 0 of 64 threads, expected 1 to 15 and whole warps of",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported(cases: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?m)^{MISTAKES[name]}") as caught:
        run_case(cases, name)
    assert len(str(caught.value).splitlines()) <= 11


# Products of four warps

DTYPES = {"Half": torch.float16, "BFloat16": torch.bfloat16, "int8_t": torch.int8}
LANES = torch.arange(128)
WARP, G, Q = LANES // 32, LANES % 32 // 4, LANES % 4


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8) if dtype == torch.int8 else torch.randn(shape).to(dtype)


def to_sums(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` of [64, n] as [n / 2, 128]: the sums of each lane, written as indices where the machine has loops."""
    i = torch.arange(matrix.shape[1] // 2)[:, None]
    return matrix[16 * WARP + G + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * Q + i % 2].contiguous()


def by_steps(rows: torch.Tensor, steps: int) -> list[list[torch.Tensor]]:
    """What each warp has of each step: ``rows`` of [64, ...] in pieces of 16 rows and equal columns."""
    return [[part.contiguous() for part in step.split(16)] for step in rows.chunk(steps, 1)]


class TileProduct:
    """Operands of ``Products`` in hopper_kernels.cuh, and what comes of them."""

    def __init__(self, dtype: torch.dtype, n: int, sparse: bool, selector: int = 0, stages: int = 3) -> None:
        k = stages * 128 // dtype.itemsize
        steps = stages * (2 if sparse else 4)
        self.stages = stages
        self.a = numbers(dtype, 64, k // 2 if sparse else k)
        self.b = numbers(dtype, n, k)
        self.sums = to_sums(torch.randint(-1000, 1000, (64, n), dtype=torch.int32))
        if dtype != torch.int8:
            self.sums = self.sums.float() / 100
        self.fragments = torch.stack(
            [torch.cat([to_fragments_a(part) for part in step]) for step in by_steps(self.a, steps)]
        )
        self.dense = self.a.double()
        self.metadata = torch.zeros(steps, 128, dtype=torch.int32)
        if sparse:
            nibbles = torch.tensor(LEGAL)[torch.randint(6, (64, k // 4))]
            self.dense = torch.cat(
                [scattered(a, places) for a, places in zip(self.a.split(16), nibbles.split(16), strict=True)]
            )
            words = [
                [
                    metadata_of_int8(part) if dtype == torch.int8 else metadata_of_16_bits(part, selector)
                    for part in step
                ]
                for step in by_steps(nibbles, steps)
            ]
            self.metadata = torch.stack([torch.cat(step) for step in words]).to(torch.int32).contiguous()

    def run(self, cases: ModuleType, name: str, add: bool = False) -> torch.Tensor:
        got = self.sums.clone()
        tensors = (self.a, self.b, self.fragments, self.metadata, got)
        cases.multiply(name, *(tensor.data_ptr() for tensor in tensors), self.stages, add)
        return got

    def check(self, got: torch.Tensor, add: bool) -> None:
        before = self.sums.double() if add else torch.zeros_like(self.sums).double()
        expected = before + to_sums(self.dense @ self.b.double().t())
        if got.dtype == torch.int32:
            assert torch.equal(got.double(), expected)
            return
        # Each product rounds its sums to float once.
        size = before.abs() + to_sums(self.dense.abs() @ self.b.double().abs().t())
        assert ((got - expected).abs() <= 12 * 2**-24 * size).all()


PRODUCTS = [
    *(
        f"{element}_{n}_{form}_{source}_0"
        for element, n in [
            *[("Half", 8), ("Half", 64), ("Half", 256), ("BFloat16", 128)],
            *[("int8_t", 16), ("int8_t", 32), ("int8_t", 128)],
        ]
        for form in ("dense", "sparse")
        for source in ("shared", "fragments")
    ),
    *("Half_64_sparse_shared_1", "BFloat16_64_sparse_fragments_1"),
]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(cases: ModuleType, name: str) -> None:
    element, n, form, _, selector = name.rsplit("_", 4)
    product = TileProduct(DTYPES[element], int(n), form == "sparse", int(selector))
    for add in (False, True):
        product.check(product.run(cases, name, add), add)


def test_a_product_without_a_swizzle(cases: ModuleType) -> None:
    a, b = torch.randn(64, 16).half(), torch.randn(8, 16).half()
    got = torch.empty(4, 128)
    cases.plain_product(a.data_ptr(), b.data_ptr(), got.data_ptr())
    torch.testing.assert_close(got, to_sums(a.double() @ b.double().t()).float(), rtol=2**-23, atol=0)


def test_what_is_rewritten_is_fenced(cases: ModuleType) -> None:
    product = TileProduct(torch.float16, 16, False)
    product.check(product.run(cases, "rewritten"), False)


def test_sums_are_no_numbers_before_they_are_waited_for(cases: ModuleType) -> None:
    got = TileProduct(torch.float16, 16, False).run(cases, "sums_read_early")
    assert got[0].isnan().all() and not got[1:].isnan().any()


# By name: is A sparse, and what is said.
SLIPS = {
    "no_start": (False, r"registers: .*, thread 0: multiply_tile without start_products since the last"),
    "sums_written_early": (
        True,
        r"registers: .*, thread 0: multiply_sparse_tile: sums were written by thread 0 before wait_products",
    ),
    "sums_written_after_start": (
        False,
        r"registers: .*, thread 0: multiply_tile: sums were written by thread 0 after start_products",
    ),
    "fragments_written_early": (
        True,
        r"registers: .*, thread 0: multiply_sparse_tile: A's registers were written by thread 0 before",
    ),
    "stage_released_early": (
        False,
        r"read under way: .*, thread 128: load_tile writes shared 0, which a store or product that is not waited",
    ),
    "tile_waited_for_by_three_warps": (
        True,
        r"race: .*, thread 0: multiply_sparse_tile reads shared \d+, which a bulk copy for the barrier at shared",
    ),
    "three_warps": (
        False,
        r"deadlock: .*, threads 0 to 95 are at start_products; threads 96 to 127 are at exit; thread 128 is at",
    ),
    "descriptors_differ": (
        False,
        r"divergence: .* multiply_tile has another descriptor, or adds otherwise, in thread 32",
    ),
    "descriptor_across_rows": (
        True,
        r"descriptor: .*: multiply_sparse_tile of B: it begins at shared 96 and takes 64 bytes of rows of 128",
    ),
    "descriptor_between_rows": (
        False,
        r"descriptor: .*: multiply_tile of B: it begins at shared 128, expected within the first 128 of 1024",
    ),
    "stride_odd": (False, r"descriptor: .*: multiply_tile of B: its stride is 512, expected a multiple of"),
    "not_committed": (False, r"pending products: .* at exit, not waited for: 12"),
    "not_waited_for": (False, r"pending products: .* at exit, not waited for: 8"),
    "rewritten_without_fence": (
        False,
        r"proxy: .*, thread 0: multiply_tile reads shared 0, which thread 0 wrote without fence_async_proxy",
    ),
    "rewritten_without_barrier": (
        False,
        r"race: .*, thread 0: multiply_tile reads shared 0, which thread 0 wrote at the same time",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_mistake_of_a_product_is_reported(cases: ModuleType, name: str) -> None:
    sparse, said = SLIPS[name]
    # As many stages as there is room for, where none is ever free again.
    product = TileProduct(torch.float16, 16, sparse, stages=2 if name == "not_waited_for" else 3)
    with pytest.raises(RuntimeError, match=rf"(?m)^{said}") as caught:
        product.run(cases, name)
    assert len(str(caught.value).splitlines()) <= 11


def test_metadata_of_a_product_is_checked(cases: ModuleType) -> None:
    product = TileProduct(torch.float16, 64, True)
    product.metadata.zero_()
    with pytest.raises(
        RuntimeError, match=r"(?m)^metadata: .* nibble 0 for row 0, k from 0: its indices 0 and 0 do no"
    ):
        product.run(cases, "Half_64_sparse_shared_0")


# Clusters


def exchanged(cases: ModuleType, name: str, clusters: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(-(2**31), 2**31, (clusters, blocks, 64), dtype=torch.int32)
    y = torch.zeros(clusters, blocks, 2, 64, dtype=torch.int32)
    cases.exchange(name, x.data_ptr(), y.data_ptr(), clusters, blocks)
    return x, y


@pytest.mark.parametrize(("clusters", "blocks"), [(1, 1), (3, 2), (1, 4), (1, 8)])
def test_blocks_of_a_cluster_reach_each_other(cases: ModuleType, clusters: int, blocks: int) -> None:
    x, y = exchanged(cases, "none", clusters, blocks)
    assert torch.equal(y[:, :, 0], x.flip(2))
    neighbour = x.roll(-1, 1).view(clusters, blocks, 16, 4)
    expected = (neighbour[..., 0].long() + neighbour[..., 3]).to(torch.int32)
    assert torch.equal(y[:, :, 1], expected.repeat_interleave(4, 2))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_what_is_handed_over_is_seen(cases: ModuleType, blocks: int) -> None:
    x, y = exchanged(cases, "handover", 2, blocks)
    assert torch.equal(y.flatten()[: x.numel()].view(x.shape), x.flip(2))


def test_clusters_that_no_gpu_has_are_refused(cases: ModuleType) -> None:
    with pytest.raises(ValueError, match="no grid of 9 blocks along x runs in clusters of 9"):
        exchanged(cases, "none", 1, 9)


EXCHANGES = {
    "no_first_barrier": r"cluster: block \(0, 0\), thread 0: store_remote at block 1 before a barrier of the",
    "no_middle_barrier": r"uninitialized: block \(1, 0\), thread 63: load_shared reads shared 0, which no thread",
    "no_last_barrier": r"cluster: block \(\d, 0\), .*(which has ended|may still use its shared memory)",
    "no_wait": r"cluster: block \(1, 0\), thread \d+: arrive_cluster a second time without wait_cluster",
    "wait_for_block_only": r"race: .*: load_shared reads shared \d+, which thread \d+ of block \d of the cluster wrote",
    "only_released": r"race: .*: load_shared reads shared \d+, which thread \d+ of block \d of the cluster wrote at",
    "no_init_fence": r"proxy: .*: arrive_remote uses the barrier at shared 256, which thread 0 of block \d of the",
    "rank_outside": r"out of range: block \(1, 0\), thread 63: store_remote at block 2 of a cluster of 2",
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_mistake_between_blocks_is_reported(cases: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?m)^{EXCHANGES[name]}") as caught:
        exchanged(cases, name, 1, 2)
    assert len(str(caught.value).splitlines()) <= 11


def multicast(cases: ModuleType, name: str, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = matrix(16 * tiles, 64, 64).contiguous()
    y = torch.zeros(2, *x.shape, dtype=torch.int16)
    cases.multicast(name, x.data_ptr(), y.data_ptr(), tiles)
    return x, y


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_a_tile_arrives_in_all_blocks(cases: ModuleType, tiles: int) -> None:
    x, y = multicast(cases, "none", tiles)
    assert torch.equal(y, x.expand(2, -1, -1))


MULTICASTS = {
    "tile_of_one_block": r"wrong bytes: .* phase 0 of the barrier at shared 4096 expects 2048 bytes, and 1024 are",
    "no_remote_release": r"deadlock: .*thread 64 is at wait_barrier for phase 0 of the barrier at shared 4112, "
    r"which has had 2 of 4 arrivals",
    "no_wait_for_readers": r"too many arrivals: .*, thread 64: arrive_expect at the barrier at shared 4096 in",
    "no_last_barrier": r"cluster: block \(\d, 0\), .*(which has ended|may still use its shared memory)",
}


@pytest.mark.parametrize("name", MULTICASTS)
def test_a_mistake_of_a_multicast_is_reported(cases: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?m)^{MULTICASTS[name]}") as caught:
        multicast(cases, name, 5)
    assert len(str(caught.value).splitlines()) <= 11


# What nvcc makes of it


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The object of the same kernels for sm_90a, and what nvcc and ptxas said."""
    return compile_for_hopper(FOLDER / "hopper_probe.cu", tmp_path_factory.mktemp("hopper"))


def test_ptxas_has_nothing_to_advise(probe: tuple[Path, str]) -> None:
    """Such as that it waits for each product by itself (C7510 and others)."""
    assert re.findall(r"\(C\d+\).*", probe[1]) == []
    kernels: list[Kernel] = read_log(probe[1])
    assert kernels and [fault for kernel in kernels for fault in kernel.faults()] == []


# A barrier's instructions are SYNCS, a multiplication of floats HGMMA and of int8 IGMMA.
BARRIER = ["SYNCS.EXCH.64", "SYNCS.ARRIVE.TRANS64", "SYNCS.PHASECHK.TRANS64.TRYWAIT"]
TOGETHER = ["WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE", "UTMALDG.2D", *BARRIER]
EXPECTED = [
    expect(
        "tile_copy",
        "90a",
        [*BARRIER, "UTMALDG.2D", "UTMASTG.2D", "UTMACMDFLUSH", "UTMACCTL.PF", "FENCE.VIEW.ASYNC", "ACQBULK", "PREEXIT"],
    ),
    expect("packed_copy", "90a", [*BARRIER, "UBLKCP", "USETMAXREG.TRY_ALLOC.CTAPOOL", "USETMAXREG.DEALLOC.CTAPOOL"]),
    expect("transposed", "90a", ["LDSM.16.M88.4", "STSM.16.MT88.4"]),
    expect(
        "multicast",
        "90a",
        [*BARRIER, "UTMALDG.2D.MULTICAST", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS.ARRIVE.TRANS64.RED"],
    ),
    expect("exchange", "90a", ["UCGABAR_ARV", "UCGABAR_WAIT"]),
    expect("handover", "90a", ["SYNCS.ARRIVE.TRANS64.RED", "SYNCS.PHASECHK.TRANS64.TRYWAIT"]),
    *(
        expect(f"Products<sparsebert::{element}, {n}, {sparse}, ", "90a", [*TOGETHER, opcode.format(n)], ["LDL", "STL"])
        for element, sparse, opcode in [
            ("Half", "false", "HGMMA.64x{}x16.F32"),
            ("Half", "true", "HGMMA.SP.64x{}x32.F32"),
            ("BFloat16", "false", "HGMMA.64x{}x16.F32.BF16"),
            ("BFloat16", "true", "HGMMA.SP.64x{}x32.F32.BF16"),
        ]
        for n in (64, 256)
    ),
    *(
        expect(f"Products<signed char, {n}, {sparse}, ", "90a", [*TOGETHER, opcode.format(n)], ["LDL", "STL"])
        for sparse, opcode in [("false", "IGMMA.64x{}x32.S8.S8"), ("true", "IGMMA.SP.64x{}x64.S8.S8")]
        for n in (64, 256)
    ),
    *(expect(f"Half, {n}, true, false", "90a", [f"HGMMA.SP.64x{n}x32.F32"]) for n in (8, 16, 32, 128)),
]


@pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump is not installed")
def test_kernels_are_made_of_hoppers_instructions(probe: tuple[Path, str]) -> None:
    code = sass(probe[0], "90a")
    assert [fault for row in EXPECTED for fault in row.faults(code)] == []


@pytest.mark.parametrize("header", ["hopper.cuh", "products.cuh"])
def test_the_header_for_the_cpu_has_all_that_the_one_for_the_gpu_has(header: str) -> None:
    cpu, gpu = ((folder / "common" / header).read_text() for folder in simt_build.FOLDERS)
    names = set(re.findall(r"(?m)^(?:SB_DEVICE .*?|#define )(\w+)(?:<\w+>)?\(", gpu)) - set(
        re.findall(r"#undef (\w+)", gpu)
    )
    assert names >= {"hopper.cuh": {"load_tile", "arrive_remote"}, "products.cuh": {"multiply_sparse_tile"}}[header]
    assert not [name for name in sorted(names) if not re.search(rf"\b{name}\(", cpu)]
