"""Every instantiation of the CUDA kernels on small cases, for the tools of compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python tests/sanitize_cuda.py

A case is a tile, a type of x, rows of x that are wide or not, and one split of the inputs or two; of the float types
also one with a low-rank tail, and of narrow rows one with columns. Results are compared on the host, so that the tools
see next to nothing but these kernels. ``--list`` names the cases and needs no GPU. Exit status: 0, 1 where a result is
wrong, 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsebert.formats import mma_sp, nm
from sparsebert.ops.cuda import extension, nm24
from sparsebert.ops.cuda.nm24 import Config
from sparsebert.ops.devices import describe

DTYPES = (torch.float16, torch.bfloat16, torch.int8)
RANK = 48


class Case(NamedTuple):
    """``extra``: nothing, ``rank`` or ``columns``."""

    config: Config
    dtype: torch.dtype
    wide: bool
    extra: str = ""

    def __str__(self) -> str:
        sides = f"{self.config.features}x{self.config.tokens}, splits {self.config.splits}"
        rows = "wide" if self.wide else "narrow"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"tile {self.config.tile} ({sides}) {dtype} {rows} {self.extra}".rstrip()


def every_tile() -> list[Config]:
    """Of a GPU with one multiprocessor, the choice offers each tile without splits."""
    found = extension.load().nm24_solutions(
        element=0, tokens=1 << 16, in_features=64, out_features=1 << 12, rank=0, sms=1, shared_bytes=0
    )
    return sorted(Config(*one) for one in found)


def cases() -> Iterator[Case]:
    for tile in every_tile():
        for splits in (1, 2):
            config = tile._replace(splits=splits)
            for dtype in DTYPES:
                yield Case(config, dtype, True)
                yield Case(config, dtype, False)
                if dtype != torch.int8:
                    yield Case(config, dtype, True, "rank")
                    yield Case(config, dtype, False, "columns")


def integers(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Small whole numbers: their sums are exact in every type, in any order."""
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def run(case: Case, device: torch.device) -> bool:
    """Whether the result is right, to the bit. Tiles are cut on both sides, and the inputs within a block."""
    generator = torch.Generator().manual_seed(0)
    config, dtype = case.config, case.dtype
    tokens, out_features = config.tokens + 1, config.features + 6
    # Three stages where four warps share the inputs, the last of them cut; two splits then have two and one.
    in_features = 2 * 4 * mma_sp.block_inputs(dtype.itemsize) + (16 if case.wide else 12)
    dense = nm.project(integers(generator, torch.float32, out_features, in_features), 2, 4).to(dtype)
    values, metadata = (part.to(device) for part in mma_sp.pack(*nm.pack(dense, 2, 4), 2, 4, in_features))
    options: dict[str, Any] = {"in_features": in_features, "out_features": out_features, "config": config}
    bias = integers(generator, torch.float32, out_features)
    if case.extra == "columns":
        wide = integers(generator, dtype, tokens, in_features + 33)
        columns = torch.randperm(wide.shape[1], generator=generator)[:in_features].sort().values
        x, rows = wide, wide[:, columns]
        options["columns"] = columns.to(device, torch.int32)
    else:
        x = rows = integers(generator, dtype, tokens, in_features)
    exact = rows.double() @ dense.double().t() + bias.double()
    if case.extra == "rank":
        t, u = integers(generator, dtype, tokens, RANK), integers(generator, dtype, out_features, RANK)
        exact += t.double() @ u.double().t()
        options |= {"t": t.to(device), "u": mma_sp.pack_factor(u).to(device)}
    if dtype == torch.int8:
        ones = torch.ones(max(tokens, out_features), device=device)
        options |= {"x_scale": ones[:tokens], "scales": ones[:out_features], "dtype": torch.float32}
    else:
        residual = integers(generator, dtype, tokens, out_features)
        exact = exact.relu() + residual.double()
        options |= {"residual": residual.to(device), "activation": "relu"}
    y = nm24.linear(x.to(device), values, metadata, bias.to(device), **options)
    return torch.equal(y.cpu(), exact.to(y.dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only name the cases")
    options = parser.parse_args()
    device = torch.device("cuda")
    if options.list:
        reason = extension.missing()
    else:
        reason = extension.refusal(describe(device)) if torch.cuda.is_available() else "no CUDA device here"
    if reason:
        print(f"sanitize_cuda: {reason}", file=sys.stderr)
        return 2
    every = list(cases())
    wrong = 0
    for case in every:
        result = "listed" if options.list else "right" if run(case, device) else "WRONG"
        wrong += result == "WRONG"
        print(f"{case}: {result}", flush=True)
    print(f"{len(every)} cases, {'listed' if options.list else f'{wrong} wrong'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
