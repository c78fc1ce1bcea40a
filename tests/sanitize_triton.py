"""Every Triton kernel on a small case, for the tools of compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python tests/sanitize_triton.py

A case is a format by its Triton kernel, in a layout and an odd number of tokens, held to float64. ``--dry`` runs the
references of the same layouts on a CPU. Exit status: 0, 1 where a result is wrong, 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import sys

import torch

from sparsebert.bench.linear import own, sweep
from sparsebert.bench.linear.cases import Case
from sparsebert.bench.linear.shapes import DRY_SHAPES

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
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, by the references")
    dry = parser.parse_args().dry
    if not dry and not torch.cuda.is_available():
        print("sanitize_triton: no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry else "cuda")
    every = {peer.name: peer for peer in (*own.peers(torch.float16, on_gpu=True), *own.CHAINED)}
    wrong = 0
    for name in CASES:
        generator = torch.Generator(device).manual_seed(0)
        case = Case(DRY_SHAPES[0], 37, device, generator, lambda nbytes: 1, "gelu", dry)
        with torch.no_grad():
            found = sweep.judge(every[name].build(case), case)
        wrong += found["status"] != "ok"
        print(f"{name}: {found['status']}, error {found['error']:.3g}", flush=True)
    print(f"{len(CASES)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
