"""Every Triton kernel on a small case, for the tools of compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python tests/sanitize_triton.py

A case is a format by its Triton kernel, in a layout, or a kernel that has no weight, at an odd number of tokens, held
to float64. ``--dry`` runs the references of the same on a CPU. Exit status: 0, 1 where a result is wrong, 2 where
nothing can run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import sparsebert as sb
from sparsebert import ops
from sparsebert.bench.linear import dense, own, sweep
from sparsebert.bench.linear.cases import LIMITS, Built, Case
from sparsebert.bench.linear.shapes import DRY_SHAPES
from sparsebert.formats import int8

# One of each kernel, and of each way in which one reads its weight.
CASES = (
    "2:4/neutral/triton/fp16",
    "2:8/neutral/triton/fp16",
    "2:4@0.5/neutral/triton/fp16",
    "bitmap:0.05/chunked/triton/fp16",
    "int8/neutral/triton/fp16",
    "int8+2:4/neutral/triton/fp16",
    "int8_to_int8/neutral/triton/fp16",
    "low-rank:0.25/neutral/triton/fp16",
    "low-rank:0.05+rows:0.15/grouped/triton/fp16",
    "low-rank:r32+2:4/neutral/triton/fp16",
    "low-rank:0.05+bitmap:0.05/padded/triton/fp16",
    "dense/neutral/triton/fp16",
)
EPS = 1e-12
# Of what int8 rows stand for beside what they were made from: half a step of about 127 / 3 in the largest.
INT8_LIMIT = 2e-2


def _normalized(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm by its formula, in float64."""
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double() + bias.double()


def _built(case: Case, call: Callable[[], Tensor], reference: Callable[[], Tensor], limit: float) -> Built:
    def forced() -> Tensor:
        with sb.backend("reference" if case.dry else "triton"):
            return call()

    return Built({"": [forced]}, reference, weight_bytes=0, moved_bytes=0, limit=limit)


def _layer_norm(case: Case, *, quantize: bool, residual: bool) -> Built:
    features = case.shape.in_features
    x, other = (case.normal(case.tokens, features, dtype=torch.float16) for _ in range(2))
    weight, bias = (case.normal(features, dtype=torch.float16) for _ in range(2))
    given = other if residual else None

    def call() -> Tensor:
        if not quantize:
            return ops.add_layer_norm(x, given, weight, bias, EPS)
        _, q, s = ops.add_layer_norm_quantize(x, given, weight, bias, EPS)
        return int8.dequantize(q, s)

    z = x.double() + other.double() if residual else x.double()
    return _built(case, call, lambda: _normalized(z, weight, bias), INT8_LIMIT if quantize else LIMITS[torch.float16])


def _embeddings(case: Case) -> Built:
    entries, features = (50, 20, 2), case.shape.in_features
    tables = [case.normal(count, features, dtype=torch.float16) for count in entries]
    weight, bias = (case.normal(features, dtype=torch.float16) for _ in range(2))
    ids = [
        torch.randint(count, (case.tokens,), device=case.device, generator=case.generator, dtype=torch.int32)
        for count in entries
    ]

    def reference() -> Tensor:
        first, *others = (table.double()[chosen.long()] for table, chosen in zip(tables, ids, strict=True))
        return _normalized(first + others[0] + others[1], weight, bias)

    call = partial(ops.embed_layer_norm, *ids, *tables, weight, bias, EPS)
    return _built(case, call, reference, LIMITS[torch.float16])


# Those without a weight to unpack.
OF_ROWS: dict[str, Callable[[Case], Built]] = {
    "add_layer_norm/triton/fp16": partial(_layer_norm, quantize=False, residual=False),
    "add_layer_norm_quantize/triton/fp16": partial(_layer_norm, quantize=True, residual=True),
    "embed_layer_norm/triton/fp16": _embeddings,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, by the references")
    dry = parser.parse_args().dry
    if not dry and not torch.cuda.is_available():
        print("sanitize_triton: no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry else "cuda")
    peers = (*dense.peers(torch.float16), *own.peers(torch.float16, on_gpu=True), *own.CHAINED)
    every = {peer.name: peer.build for peer in peers}
    builds = {name: every[name] for name in CASES} | OF_ROWS
    wrong = 0
    for name, build in builds.items():
        generator = torch.Generator(device).manual_seed(0)
        case = Case(DRY_SHAPES[0], 37, device, generator, lambda nbytes: 1, "gelu", dry)
        with torch.no_grad():
            found = sweep.judge(build(case), case)
        wrong += found["status"] != "ok"
        print(f"{name}: {found['status']}, error {found['error']:.3g}", flush=True)
    print(f"{len(builds)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
