"""Every Triton kernel, in every configuration it ships with, compiles for GPUs that are not here: within their shared
memory, without spills, on the tensor cores, packed weights 16 bytes at a time."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from aot import Compiled, compile_for
from kernel_cases import DEVICES, Case, cases, quantize_cases

ARCHS = [pytest.param(arch, marks=() if arch in (80, 90) else pytest.mark.slow) for arch in DEVICES]
# How a product of 16-bit floats, and of int8, reads in SASS: wgmma on sm_90, tcgen05 on sm_100 (floats), else mma.
PRODUCTS = {90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA", "IMMA")}
LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration_compiles(arch):
    wrong = []
    for case in cases(arch):
        found = compile_case(case, arch)
        if found.shared > DEVICES[arch].shared_bytes:
            wrong.append(f"{case.name}: {found.shared} bytes of shared memory, {DEVICES[arch].name} has fewer")
        if found.local:
            wrong.append(f"{case.name}: {found.local} bytes of local memory a thread, expected no spills")
        if case.dots is not None:
            product = PRODUCTS.get(arch, ("HMMA", "IMMA"))[case.dots == "int8"]
            if not found.count(product):
                wrong.append(f"{case.name}: no {product}")
        for pointer in case.wide:
            if 16 not in (loads := found.loaded_bytes(kernel_of(case), pointer)):
                wrong.append(f"{case.name}: {pointer} is read {loads} bytes at a time, expected 16")
        if case.packed and not any(found.count(load) for load in LOADS):
            wrong.append(f"{case.name}: no load of 16 bytes")
    assert not wrong, "\n".join(wrong)


def test_quantizing_divides_as_ieee_has_it_and_rounds_the_product_first():
    """What the interpreter cannot show: there every division is exact, and nothing is fused."""
    for case in quantize_cases():
        ptx = compile_case(case, 90).ptx
        assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx, case.name
        assert "fma.rn" not in ptx and ".ftz" not in ptx, case.name


def kernel_of(case: Case) -> Any:
    module, _, name = case.kernel.partition(":")
    return getattr(importlib.import_module(f"sparsebert.kernels.{module}"), name)


def compile_case(case: Case, arch: int) -> Compiled:
    return compile_for(kernel_of(case), case.arguments, case.constants, arch, divisible=case.divisible, **case.options)
