"""Every instantiation of the wgmma kernel on small cases, for the tools of compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python tests/sanitize_wgmma.py

A case is a tile, a type of x, a pattern, and a block by itself or two of a cluster, that share tokens or divide the
inputs; also with rows of y that do not begin at multiples of 16 bytes, of 2:4 floats with a low-rank part, of int8 with
an int8 result. Of the kernel that normalizes a case is a number of features, a type of x, a pattern, and whether rows
are quantized. Results are compared on the host, so that the tools see next to nothing but these kernels. ``--list``
names the cases and needs no GPU. Exit status: 0, 1 where a result is wrong, 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from sanitize_cuda import DTYPES, integers
from sparsebert.formats import int8, nm
from sparsebert.ops.cuda import extension, wgmma
from sparsebert.ops.cuda.wgmma import Config
from sparsebert.ops.cuda.wgmma_layer_norm import linear_add_layer_norm
from sparsebert.ops.devices import describe
from sparsebert.ops.select import Problem
from sparsebert.ops.specs import NMSpec

PATTERNS = ("dense", "2:4")
RANK = 40


class Case(NamedTuple):
    """``extra``: nothing, ``ragged``, ``rank`` or ``again``."""

    config: Config
    dtype: torch.dtype
    pattern: str
    extra: str = ""

    def __str__(self) -> str:
        tile, features, tokens, sharing, splits = self.config
        dtype = str(self.dtype).removeprefix("torch.")
        cluster = f"sharing {sharing}, splits {splits}"
        return f"tile {tile} ({features}x{tokens}, {cluster}) {dtype} {self.pattern} {self.extra}".rstrip()


def offered(in_features: int, out_features: int) -> list[Config]:
    """All solutions of a problem of two parts, which is so small that there are few."""
    sizes = {"element": 0, "pattern": 1, "tokens": 1, "in_features": in_features, "out_features": out_features}
    found = extension.load().wgmma_solutions(**sizes, rank=0, parts=2, sms=1)
    return sorted(Config(*config) for *config, _ in found)


def every_tile() -> list[Config]:
    return [config for config in offered(64, 512) if config.sharing == 1]


def cases() -> Iterator[Case]:
    dividing = [config for config in offered(128, 256) if config.splits == 2]
    for tile in every_tile():
        for config in (tile, tile._replace(sharing=2), *(one for one in dividing if one.tile == tile.tile)):
            for dtype in DTYPES:
                for pattern in PATTERNS:
                    yield Case(config, dtype, pattern)
                    yield Case(config, dtype, pattern, "again" if dtype == torch.int8 else "ragged")
                if dtype != torch.int8:
                    yield Case(config, dtype, "2:4", "rank")


def run(case: Case, device: torch.device) -> bool:
    """Whether the result is right, to the bit. Tiles are cut on both sides, and the inputs within a stage."""
    generator = torch.Generator().manual_seed(0)
    config, dtype = case.config, case.dtype
    tokens, out_features = config.tokens + 1, config.features + (8 if case.extra != "ragged" else 6)
    # More stages than any tile has room for: each is used again.
    in_features = 9 * 128 // dtype.itemsize + 32
    dense = integers(generator, torch.float32, out_features, in_features)
    dense = (nm.project(dense, 2, 4) if case.pattern == "2:4" else dense).to(dtype)
    values, positions = nm.pack(dense, 2, 4) if case.pattern == "2:4" else (dense, None)
    x, bias = integers(generator, dtype, tokens, in_features), integers(generator, torch.float32, out_features)
    options: dict[str, Any] = {"config": config, "activation": "relu"}
    exact = x.double() @ dense.double().t() + bias.double()
    if case.extra == "rank":
        t, u = integers(generator, dtype, tokens, RANK), integers(generator, dtype, out_features, RANK)
        exact += t.double() @ u.double().t()
        options |= {"t": t.to(device), "u": u.to(device)}
    exact = exact.relu()
    if dtype == torch.int8:
        ones = torch.ones(max(tokens, out_features), device=device)
        options |= {"x_scale": ones[:tokens], "scales": ones[:out_features], "dtype": torch.float16}
    if case.extra == "again":
        options |= {"output_scale": torch.tensor(8.0, device=device), "y_scale": torch.empty(tokens, device=device)}
        exact = (exact / 8).round().clamp(-127, 127).to(torch.int8)
    else:
        residual = integers(generator, torch.float16 if dtype == torch.int8 else dtype, tokens, out_features)
        exact += residual.double()
        options["residual"] = residual.to(device)
    positions = None if positions is None else positions.to(device)
    y = wgmma.linear(x.to(device), values.to(device), positions, bias.to(device), **options)
    return torch.equal(y.cpu(), exact.to(y.dtype))


class NormCase(NamedTuple):
    """``quantized``: not, by ``dynamic`` scales or by a ``static`` one."""

    features: int
    dtype: torch.dtype
    pattern: str
    quantized: str = ""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"layer norm of {self.features} {dtype} {self.pattern} {self.quantized}".rstrip()


def norm_cases() -> Iterator[NormCase]:
    """Clusters of three blocks, which each load all tokens, and of four, which load them together."""
    for features in (384, 512):
        for dtype in DTYPES:
            for pattern in PATTERNS:
                for quantized in ("", "dynamic", "static"):
                    yield NormCase(features, dtype, pattern, quantized)


def run_norm(case: NormCase, device: torch.device) -> bool:
    """Whether y is right but for its rounding, and its rows as int8 are those of what was written."""
    generator = torch.Generator().manual_seed(0)
    # A second tile of tokens, which is cut; stages that are used again.
    tokens, in_features = 65, 9 * 128 // case.dtype.itemsize + 32
    dense = integers(generator, torch.float32, case.features, in_features)
    dense = (nm.project(dense, 2, 4) if case.pattern == "2:4" else dense).to(case.dtype)
    values, positions = nm.pack(dense, 2, 4) if case.pattern == "2:4" else (dense, None)
    x, bias = integers(generator, case.dtype, tokens, in_features), integers(generator, torch.float32, case.features)
    y_dtype = torch.float16 if case.dtype == torch.int8 else case.dtype
    residual = integers(generator, y_dtype, tokens, case.features)
    gamma, beta = (torch.rand(case.features, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"quantize": bool(case.quantized)}
    if case.quantized == "static":
        options["input_scale"] = torch.tensor(0.02, device=device)
    if case.dtype == torch.int8:
        ones = torch.ones(max(tokens, case.features), device=device)
        options |= {"x_scale": ones[:tokens], "scales": ones[: case.features], "dtype": y_dtype}
    z = x.double() @ dense.double().t() + bias.double() + residual.double()
    exact = torch.nn.functional.layer_norm(z, z.shape[-1:], gamma.double(), beta.double(), 1e-12)
    tensors = (x, values, positions, bias, residual, gamma, beta)
    moved = (None if tensor is None else tensor.to(device) for tensor in tensors)
    y, q, scale = (None if one is None else one.cpu() for one in linear_add_layer_norm(*moved, 1e-12, **options))
    error = (y.double() - exact).abs().max()
    if not error <= torch.finfo(y_dtype).eps * exact.abs().max():
        return False
    if not case.quantized:
        return q is None
    expected = int8.quantize_rows(y, torch.tensor(0.02) if case.quantized == "static" else None)
    return torch.equal(q, expected[0]) and torch.equal(scale, expected[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only name the cases")
    options = parser.parse_args()
    device = torch.device("cuda")
    if options.list:
        reason = wgmma.missing()
    else:
        reason = refusal(device) if torch.cuda.is_available() else "no CUDA device here"
    if reason:
        print(f"sanitize_wgmma: {reason}", file=sys.stderr)
        return 2
    every: list[Case | NormCase] = [*cases(), *norm_cases()]
    wrong = 0
    for case in every:
        right = options.list or (run if isinstance(case, Case) else run_norm)(case, device)
        result = "listed" if options.list else "right" if right else "WRONG"
        wrong += not right
        print(f"{case}: {result}", flush=True)
    print(f"{len(every)} cases, {'listed' if options.list else f'{wrong} wrong'}")
    return 1 if wrong else 0


def refusal(device: torch.device) -> str | None:
    """None, or why ``device`` runs none of the cases."""
    return wgmma.refusal(Problem("neutral", describe(device), torch.float16, NMSpec(2, 4, 64, 64), 1, "none"))


if __name__ == "__main__":
    sys.exit(main())
