"""What a packed layer costs on a CPU beside the dense fp32 nn.Linear, in one run: python benchmarks/module_overhead.py

The bound that the design sets: 1.1 times the time of nn.Linear plus 15 microseconds, with the default layout. Prints a
JSON line a shape; exits with 1 where the bound does not hold.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sparsebert as sb  # noqa: E402
from sparsebert.bench.environment import environment  # noqa: E402
from sparsebert.bench.timing import measure_together  # noqa: E402
from sparsebert.formats import nm  # noqa: E402
from sparsebert.nn import NMLinear  # noqa: E402

SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
TOKENS = [1, 16, 128, 512]


@torch.inference_mode()
def main() -> int:
    print(json.dumps({"environment": environment()}))
    failed = 0
    for out_features, in_features in SHAPES:
        linear = nn.Linear(in_features, out_features)
        linear.weight.copy_(nm.project(linear.weight, 2, 4))
        packed = NMLinear.from_linear(linear, sb.NMConfig(2, 4))
        modules = {"linear": linear, "packed": packed.prepare_()}
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features)
            calls = {name: partial(module, x) for name, module in modules.items()}
            times = {name: t.median_us for name, t in measure_together(calls, device="cpu", budget_s=2.0).items()}
            bound = 1.1 * times["linear"] + 15
            failed += times["packed"] > bound
            row = {
                "out_features": out_features,
                "in_features": in_features,
                "tokens": tokens,
                "layout": packed.layout,
                "linear_us": round(times["linear"], 1),
                "packed_us": round(times["packed"], 1),
                "ratio": round(times["packed"] / times["linear"], 3),
                "within_bound": times["packed"] <= bound,
            }
            print(json.dumps(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
