"""What a layer of each format costs on a CPU beside the dense fp32 nn.Linear, in one run, in turns:

    python benchmarks/format_speed.py [THREADS] > FILE.jsonl

Each format is held as a CPU holds it by default; random weights compressed in one shot, random rows. Prints a JSON line
a shape and token count: microseconds and the ratio to dense by format.
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

SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
TOKENS = [1, 16, 128, 512]
CONFIGS = [
    sb.NMConfig(2, 4),
    sb.NMConfig(2, 4, columns=0.5),
    sb.BitmapConfig(0.1),
    sb.LowRankConfig(ratio=0.5),
    sb.LowRankConfig(ratio=0.25),
    sb.LowRankSparseConfig(ratio=0.25, sparse=sb.RowsConfig(0.1)),
    sb.LowRankSparseConfig(ratio=0.25, sparse=sb.NMConfig(2, 4)),
    sb.Int8Config(),
    sb.Int8Config("static"),
    sb.Int8Config("dynamic", sb.NMConfig(2, 4)),
]


@torch.inference_mode()
def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({"environment": environment()}))
    for out_features, in_features in SHAPES:
        linear = nn.Linear(in_features, out_features)
        modules: dict[str, nn.Module] = {"linear": linear}
        layouts = {}
        for config in CONFIGS:
            model = nn.Sequential(nn.Linear(in_features, out_features))
            model[0].load_state_dict(linear.state_dict())
            sb.compress_(model, {"0": config})
            if str(config) == "int8-static":
                sb.calibrate(model, [torch.randn(128, in_features)])
            modules[str(config)], layouts[str(config)] = model[0], model[0].layout
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features)
            calls = {name: partial(module, x) for name, module in modules.items()}
            times = {name: t.median_us for name, t in measure_together(calls, device="cpu", budget_s=4.0).items()}
            row = {
                "out_features": out_features,
                "in_features": in_features,
                "tokens": tokens,
                "us": {name: round(us, 1) for name, us in times.items()},
                "ratio": {name: round(us / times["linear"], 3) for name, us in times.items() if name != "linear"},
                "layouts": layouts,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
