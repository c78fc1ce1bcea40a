"""Prints the table of ``docs/triton.md``: what Triton makes of each kernel's estimate for sm_90.

``python tests/kernel_table.py`` from the repository's root; a test compares the page with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))

from kernel_cases import Case, cases

ARCH = 90
HEADER = (
    "| kernel | features x tokens x inputs | warps, steps in flight | W, bytes a tile | x, bytes a tile "
    "| instructions a step | a weight | registers | shared memory |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
# Beginnings of the names of cases -> bits of memory for an element of W, where it has a fixed number.
KERNELS = {
    "nm_linear 2:4 fp16": 9,
    "nm_linear 1:4 fp16": 4.5,
    "nm_linear 2:8 fp16": 5,
    "nm_linear 4:8 fp16": 10,
    "nm_linear 1:16 fp16": 1.25,
    "int8_linear dense": 8,
    "int8_linear 2:4": 5,
    "bitmap_linear chunked fp16": None,
    "low_rank_sparse_linear none outside fp16": None,
    "low_rank_sparse_linear rows outside fp16": 16,
    "dense_linear fp16": 16,
}


def rows() -> Iterator[str]:
    """For each kernel its first estimate, for one token, and its last, for many."""
    found: dict[str, list[Case]] = {}
    for case in cases(ARCH):
        for name in KERNELS:
            if case.name.startswith(name) and "to int8" not in case.name:
                found.setdefault(name, []).append(case)
    for name, several in found.items():
        for case in dict.fromkeys((several[0].name, several[-1].name)):
            yield row(name, next(c for c in several if c.name == case))


def row(name: str, case: Case) -> str:
    from test_triton_compiles import PRODUCTS, compile_case

    compiled = compile_case(case, ARCH)
    sizes: dict[str, Any] = case.constants
    m, n, k = (sizes[f"BLOCK_{side}"] for side in "MNK")
    warps, stages = case.options["num_warps"], case.options["num_stages"]
    step = len(compiled.loop(PRODUCTS[ARCH][case.dots == "int8"]))
    bits = KERNELS[name]
    weight = "-" if bits is None else f"{m * k * bits / 8:,.0f}"
    return (
        f"| `{name.removesuffix(' fp16')}` | {m} x {n} x {k} | {warps}, {stages} | {weight} "
        f"| {n * k * (1 if case.dots == 'int8' else 2):,} | {step:,} | {step * 32 * warps / (m * k):.1f} "
        f"| {compiled.registers} | {compiled.shared:,} |"
    )


def table() -> str:
    return "\n".join([HEADER, *rows()])


if __name__ == "__main__":
    print(table())
