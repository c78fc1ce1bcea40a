"""What a machine can do at best: copy bandwidth, matrix rates, the cost of one kernel in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsebert.bench.jobs import Job
from sparsebert.bench.linear.cases import relative_error
from sparsebert.bench.timing import measure

FP8 = torch.float8_e4m3fn
_GPU = {"fp16": torch.float16, "int8": torch.int8, "bf16": torch.bfloat16, "fp8": FP8}
_CPU = {"fp32": torch.float32}


def jobs(device: torch.device, *, dry: bool = False) -> list[Job]:
    """A job each for ``copy`` (``gbps``, bytes read and written), ``matmul_<dtype>`` (``tflops`` of a large square
    product by torch's own kernels) and, on a GPU, ``kernel_in_graph``. ``dry`` walks all of them at toy sizes."""
    on_gpu = device.type == "cuda"
    size = 64 if dry else 8192 if on_gpu else 2048
    work: dict[str, Callable[[], dict[str, Any]]] = {"copy": partial(_copy, device, dry)}
    for name, dtype in (_GPU if on_gpu or dry else _CPU).items():
        work[f"matmul_{name}"] = partial(_product, device, dry, size, dtype)
    if on_gpu or dry:
        work["kernel_in_graph"] = partial(_kernel, device, dry)
    return [
        Job(f"ceiling {name}", {"kind": "ceiling", "peer": name, "size": size}, each) for name, each in work.items()
    ]


def of(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Rates by name from the rows of these jobs: GB/s of ``copy``, TFLOP/s (or TOP/s) of the products."""
    return {
        row["peer"]: row.get("gbps") or row["tflops"]
        for row in rows
        if row["kind"] == "ceiling" and row["status"] == "ok" and ("gbps" in row or "tflops" in row)
    }


def _timed(calls: Callable[[], Any] | Sequence[Callable[[], Any]], device: torch.device, dry: bool) -> dict[str, Any]:
    budget = 0.01 if dry else 0.5
    return measure(calls, device=device, budget_s=budget, graph=device.type == "cuda").to_dict()


def _copy(device: torch.device, dry: bool) -> dict[str, Any]:
    nbytes = 1 << (16 if dry else 28)
    if device.type == "cuda":
        nbytes = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.randint(0, 256, (nbytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    result = _timed(lambda: target.copy_(source), device, dry)
    return {**result, "bytes": 2 * nbytes, "gbps": 2 * nbytes / result["median_us"] / 1e3}


def _kernel(device: torch.device, dry: bool) -> dict[str, Any]:
    tiny = torch.zeros(32, device=device)
    return _timed([lambda: tiny.add_(1.0)] * 100, device, dry)


def _product(device: torch.device, dry: bool, size: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)

    def operand() -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, (size, size), device=device, generator=generator).to(dtype)
        return torch.randn(size, size, device=device, generator=generator).to(dtype)

    def multiply() -> Tensor:
        if dtype == torch.int8:
            return torch._int_mm(a, b.t())
        if dtype == FP8:
            one = torch.ones((), device=device)
            return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return torch.mm(a, b.t())

    a, b = operand(), operand()
    error = relative_error(multiply()[:64], a[:64].double() @ b.double().T)
    result = _timed(multiply, device, dry)
    flops = 2 * size**3
    return {**result, "error": error, "flops": flops, "tflops": flops / result["median_us"] / 1e6}
