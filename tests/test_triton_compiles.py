"""Every Triton kernel, in every configuration it ships with, compiles for GPUs that are not here: within their shared
memory, without spills, on the tensor cores, packed weights 16 bytes at a time."""

from __future__ import annotations

import importlib
import multiprocessing
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import triton

import kernel_table
from aot import Compiled, compile_for
from kernel_cases import (
    DEVICES,
    Case,
    cases,
    few,
    int8_cases,
    layer_norm_cases,
    quantize_cases,
    split_cases,
)

# How a product of 16-bit floats, and of int8, reads in SASS: wgmma on sm_90, tcgen05 on sm_100 (floats), else mma.
PRODUCTS = {90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA", "IMMA")}
# The exceptions: by target and beginning of the case's name the most bytes that ptxas spills a thread. On sm_80, 89 and
# 100 (but for fp32) none of them is an estimate: `tune` may measure them, and takes them where they are fastest.
SPILLS = {
    (80, "nm_linear 2:4 fp16 128x16x64x2x4x5"): 8,
    (80, "nm_linear 2:4 bf16 128x16x64x2x4x5"): 8,
    (80, "int8_linear 1:16 128x128x256x2x8x3"): 80,
    (80, "bitmap_linear neutral fp16 128x32x128x1x8x5"): 8,
    (80, "bitmap_linear neutral bf16 128x32x128x1x8x5"): 8,
    (80, "bitmap_linear chunked fp16 128x32x128x2x8x5"): 16,
    (80, "bitmap_linear chunked bf16 128x32x128x2x8x5"): 16,
    (80, "low_rank_sparse_linear nm inside fp16 128x32x64x64xTrue"): 8,
    (80, "low_rank_sparse_linear nm inside fp16 128x64x128x32xTrue"): 304,
    (80, "low_rank_sparse_linear 3 of nm inside fp16 128x32x64x64xTrue"): 8,
    (89, "nm_linear 2:4 fp16 128x16x64x2x4x5"): 16,
    (89, "nm_linear 2:4 bf16 128x16x64x2x4x5"): 16,
    (89, "low_rank_sparse_linear rows inside fp16 128x32x64x64xTrue"): 8,
    (89, "low_rank_sparse_linear 3 of rows outside fp16 128x32x64x32xFalse"): 8,
    (100, "bitmap_linear chunked"): 16,
    (100, "int8_linear"): 24,
    (100, "int8_linear 1:16 128x128x256x2x8x5"): 128,
    (120, "int8_linear"): 16,
    (120, "dense_linear fp16 64x16x128x2x4x3"): 8,
    (120, "dense_linear bf16 64x16x128x2x4x3"): 8,
    (120, "low_rank_sparse_linear bitmap"): 16,
    (120, "low_rank_sparse_linear 3 of bitmap outside fp16 64x32x64x32xFalse"): 8,
    (120, "low_rank_sparse_linear 3 of rows outside fp16 128x32x64x32xFalse"): 8,
    (100, "low_rank_sparse_linear nm inside fp32"): 96,
    (100, "low_rank_sparse_linear bitmap inside fp32"): 96,
}
LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128")


@pytest.mark.parametrize("arch", [80, 90])
def test_each_kernel_compiles(arch):
    assert not faults(few(cases(arch)), arch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", DEVICES)
def test_what_runs_without_a_measurement_compiles(arch):
    assert not faults(cases(arch), arch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", DEVICES)
def test_what_tune_may_measure_compiles(arch):
    assert not faults(cases(arch, every=True), arch)


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="the table is of Triton 3.7.1")
def test_the_table_in_the_documentation_is_what_compiles():
    page = Path(__file__).resolve().parents[1] / "docs" / "triton.md"
    assert kernel_table.table() in page.read_text(encoding="utf-8")


def faults(found: Iterable[Case], arch: int) -> list[str]:
    """What is wrong with each of the cases, which are compiled side by side."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return [fault for of_case in pool.map(faults_of, found, repeat(arch), chunksize=4) for fault in of_case]


def faults_of(case: Case, arch: int) -> list[str]:
    wrong = []
    found = compile_case(case, arch)
    if found.shared > DEVICES[arch].shared_bytes:
        wrong.append(f"{case.name}: {found.shared} bytes of shared memory, {DEVICES[arch].name} has fewer")
    spills = (size for (target, name), size in SPILLS.items() if target == arch and case.name.startswith(name))
    allowed = max(spills, default=0)
    if found.local > allowed:
        wrong.append(f"{case.name}: {found.local} bytes of local memory a thread, expected at most {allowed}")
    if case.dots is not None:
        product = PRODUCTS.get(arch, ("HMMA", "IMMA"))[case.dots == "int8"]
        if not found.count(product):
            wrong.append(f"{case.name}: no {product}")
    for pointer in case.wide:
        if 16 not in (loads := found.loaded_bytes(kernel_of(case), pointer)):
            wrong.append(f"{case.name}: {pointer} is read {loads} bytes at a time, expected 16")
    if case.packed and not any(found.count(load) for load in LOADS):
        wrong.append(f"{case.name}: no load of 16 bytes")
    return wrong


def test_quantizing_divides_as_ieee_has_it_and_rounds_the_product_first():
    """What the interpreter cannot show: there every division is exact, and nothing is fused."""
    rounded = [case for case in layer_norm_cases() if case.constants["QUANTIZE"]]
    found = [*quantize_cases(), *rounded, *split_cases(), *int8_cases(90, every=False)]
    for case in (case for case in found if case.options.get("enable_fp_fusion") is False):
        ptx = compile_case(case, 90).ptx
        assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx, case.name
        # An activation is made of fused products, by its own definition.
        if case.constants.get("ACTIVATION", "none") == "none":
            assert "fma.rn" not in ptx and ".ftz" not in ptx, case.name


def test_each_kernel_waits_where_it_is_launched_before_the_one_ahead_has_ended():
    """Before anything is read or written, and it lets the next begin."""
    first = {case.kernel: case for case in cases(90) if case.dots != "fp32"}
    assert len(first) == 9
    for case in first.values():
        code = [line.strip() for line in compile_case(case, 90, pdl=True).ptx.splitlines()]
        wait = next(i for i, line in enumerate(code) if line.startswith("griddepcontrol.wait"))
        memory = [i for i, line in enumerate(code) if re.match(r"(@%p\d+ )?(ld\.global|st\.global|cp\.async)", line)]
        assert memory and wait < min(memory), case.name
        assert any(line.startswith("griddepcontrol.launch_dependents") for line in code), case.name
        assert "griddepcontrol" not in compile_case(case, 90).ptx, case.name


def kernel_of(case: Case) -> Any:
    module, _, name = case.kernel.partition(":")
    return getattr(importlib.import_module(f"sparsebert.kernels.{module}"), name)


def compile_case(case: Case, arch: int, *, pdl: bool = False) -> Compiled:
    return compile_for(
        kernel_of(case),
        case.arguments,
        {**case.constants, "PDL": pdl},
        arch,
        divisible=case.divisible,
        **case.options,
        launch_pdl=pdl,
    )
