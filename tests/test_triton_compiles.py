"""Every Triton kernel, in every configuration it ships with, compiles for GPUs that are not here: within their shared
memory, without spills, on the tensor cores, packed weights 16 bytes at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import pytest

from aot import Compiled, compile_for
from kernel_cases import DEVICES, Case, cases, int8_cases, quantize_cases, split_cases

ARCHS = [pytest.param(arch, marks=() if arch in (80, 90) else pytest.mark.slow) for arch in DEVICES]
# How a product of 16-bit floats, and of int8, reads in SASS: wgmma on sm_90, tcgen05 on sm_100 (floats), else mma.
PRODUCTS = {90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA", "IMMA")}
LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128")


@pytest.mark.parametrize("arch", ARCHS)
def test_what_runs_without_a_measurement_compiles(arch):
    check(cases(arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", DEVICES)
def test_what_tune_may_measure_compiles(arch):
    check(cases(arch, every=True), arch)


def check(found: Iterable[Case], arch: int) -> None:
    wrong = []
    for case in found:
        found = compile_case(case, arch)
        if found.shared > DEVICES[arch].shared_bytes:
            wrong.append(f"{case.name}: {found.shared} bytes of shared memory, {DEVICES[arch].name} has fewer")
        if found.local:
            wrong.append(f"{case.name}: {found.local} bytes of local memory a thread, expected no spills")
        if case.dots is not None:
            product = PRODUCTS.get(arch, ("HMMA", "IMMA"))[case.dots == "int8"]
            if not found.count(product):
                wrong.append(f"{case.name}: no {product}")
        if case.packed and not any(found.count(load) for load in LOADS):
            wrong.append(f"{case.name}: no load of 16 bytes")
    assert not wrong, "\n".join(wrong)


def test_quantizing_divides_as_ieee_has_it_and_rounds_the_product_first():
    """What the interpreter cannot show: there every division is exact, and nothing is fused."""
    found = [*quantize_cases(), *split_cases(), *int8_cases(90, every=False)]
    for case in (case for case in found if case.options.get("enable_fp_fusion") is False):
        ptx = compile_case(case, 90).ptx
        assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx, case.name
        # An activation is made of fused products, by its own definition.
        if case.constants["ACTIVATION"] == "none":
            assert "fma.rn" not in ptx and ".ftz" not in ptx, case.name


def compile_case(case: Case, arch: int) -> Compiled:
    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(f"sparsebert.kernels.{module}"), name)
    return compile_for(kernel, case.arguments, case.constants, arch, divisible=case.divisible, **case.options)
