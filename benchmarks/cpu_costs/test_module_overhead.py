"""What a packed module adds to the op that it calls, where Python is all that counts, and to nn.Linear on real
sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsebert as sb
from sparsebert import ops
from sparsebert.formats import nm
from sparsebert.nn import MODULES, NMLinear, PackedLinear
from sparsebert.ops import layouts

CONFIGS = {
    "NMLinear 2:4": sb.NMConfig(2, 4),
    "NMLinear 2:4, half of the columns": sb.NMConfig(2, 4, columns=0.5),
    "BitmapLinear": sb.BitmapConfig(0.25),
    "LowRankLinear": sb.LowRankConfig(rank=8),
    "LowRankSparseLinear, rows": sb.LowRankSparseConfig(rank=8, sparse=sb.RowsConfig(0.1)),
    "LowRankSparseLinear, 2:4": sb.LowRankSparseConfig(rank=8, sparse=sb.NMConfig(2, 4)),
    "Int8Linear": sb.Int8Config(),
    "Int8Linear, static": sb.Int8Config("static"),
    "Int8Linear 2:4": sb.Int8Config("dynamic", sb.NMConfig(2, 4)),
    "DenseLinear": sb.DenseConfig(),
}
# So small that Python takes longer than the arithmetic.
FEATURES = 64
BOUND_US = 15.0

SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
TOKENS = [1, 16, 128]


def module_of(name: str) -> PackedLinear:
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    sb.compress_(model, {"0": CONFIGS[name]})
    if "static" in name:
        sb.calibrate(model, [torch.randn(8, FEATURES)])
    return model[0]


def held_layouts() -> list[tuple[str, str]]:
    """Every layout of every module that this machine's CPU can hold."""
    modules = {name: module_of(name) for name in CONFIGS}
    return [
        (name, layout)
        for name, module in modules.items()
        for layout in layouts.names(module.spec.op)
        if module.layout_refusal(layout) is None
    ]


def bare_calls(module: PackedLinear, x: Tensor) -> dict[str, Callable[[], object]]:
    """``op``: the module's op on the same tensors, and ``linear``: torch's on them, where that is what it calls."""
    weight, columns = module._weight(), module.columns
    keywords = {"layout": module.layout, **module.spec._asdict()}
    if columns is not None:
        keywords["columns"] = columns
    calls = {"op": partial(getattr(ops, module.spec.op), x, weight, module.bias, **keywords)}
    if module.layout in module.plain_layouts:
        gather = (lambda: x) if columns is None else (lambda: x.index_select(-1, columns))
        calls["linear"] = lambda: F.linear(gather(), weight[0], module.bias)
    return calls


def test_every_class_is_here():
    assert {type(module_of(name)) for name in CONFIGS} == set(MODULES.values())


@pytest.mark.benchmark(group="module overhead", max_time=0.1)
@pytest.mark.parametrize(("name", "layout"), held_layouts())
@torch.inference_mode()
def test_overhead_of_a_call(name, layout, benchmark, above, bounded):
    module = module_of(name).prepare_(layout)
    x = torch.randn(1, FEATURES)
    bare = bare_calls(module, x)
    us = {call: above(partial(module, x), run, 1.5 / len(bare)) for call, run in bare.items()}
    benchmark(module, x)
    text = f"{name}, {layout}: a call above {' and '.join(bare)}"
    bounded(us, {"name": text, "value": max(us.values()), "at_most": BOUND_US, "unit": "us"})


@pytest.mark.benchmark(group="2:4 beside nn.Linear", max_time=0.1)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@torch.inference_mode()
def test_overhead_on_real_sizes(out_features, in_features, tokens, benchmark, in_turns, bounded):
    linear = nn.Linear(in_features, out_features)
    linear.weight.copy_(nm.project(linear.weight, 2, 4))
    packed = NMLinear.from_linear(linear, sb.NMConfig(2, 4)).prepare_()
    x = torch.randn(tokens, in_features)
    us = in_turns({"packed": partial(packed, x), "linear": partial(linear, x)}, 1.5)
    benchmark(packed, x)
    name = f"NMLinear 2:4, {out_features} x {in_features}, {tokens} tokens: over 1.1 nn.Linear + {BOUND_US:g} us"
    bounded(us, {"name": name, "value": us["packed"] / (1.1 * us["linear"] + BOUND_US), "at_most": 1})
