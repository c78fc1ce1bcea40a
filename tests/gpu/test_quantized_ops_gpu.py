"""The ops on int8 rows on a GPU: rounding to the bit, sums exact, chained, compiled and captured. Needs a CUDA
device."""

from __future__ import annotations

import pytest
import torch

import sparsebert as sb
from sparsebert.formats import int8, nm
from sparsebert.ops import int8_linear, int8_linear_from_int8, int8_linear_to_int8, quantize_rows
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import Int8Spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OUTPUT_SCALE = 0.05


def weight_of(out_features, in_features, n, m, layout):
    dense = torch.randn(out_features, in_features) * in_features**-0.5
    values, scales = (t.cuda() for t in int8.quantize_weight(dense if m == 1 else nm.project(dense, n, m)))
    packed = [values] if m == 1 or layout == "unpacked" else list(nm.pack(values, n, m))
    return values, [*packed, scales]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("features", [1, 7, 768, 3072, 9000])
def test_rows_are_those_of_the_cpu_to_the_bit(features, static):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = (torch.randn(64, features) * torch.logspace(-6, 4, 64)[:, None]).to(dtype)
        x[0] = 0
        scale = torch.tensor(0.02) if static else None
        with sb.backend("triton"):
            found = quantize_rows(x.cuda(), scale if scale is None else scale.cuda())
        for ours, theirs in zip(found, int8.quantize_rows(x, scale), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_are_not_finite_show(static):
    x = torch.randn(5, 768, device="cuda").half()
    x[1, 5], x[3, 700] = torch.nan, torch.inf
    with sb.backend("triton"):
        _, scale = quantize_rows(x, torch.tensor(0.02, device="cuda") if static else None)
    assert (~scale.isfinite()).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_rows_of_an_activation(activation):
    for features in (7, 3072, 9000):
        x = (3 * torch.randn(33, features, device="cuda")).half()
        for given in (None, torch.tensor(0.02, device="cuda")):
            with sb.backend("triton"):
                q, scale = quantize_rows(x, given, activation=activation)
            y = ACTIVATIONS[activation](x.double())
            torch.testing.assert_close(scale, int8.quantize_rows(y.float(), given)[1], rtol=1e-6, atol=0)
            assert (q - (y / scale[:, None]).clamp(-127, 127)).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("n", "m", "layout"), [(1, 1, "neutral"), (2, 4, "neutral"), (2, 4, "unpacked")], ids=str)
def test_int8_in_and_out(n, m, layout):
    for out_features, in_features in ((3072, 768), (768, 3072), (100, 80)):
        values, weight = weight_of(out_features, in_features, n, m, layout)
        bias = torch.randn(out_features, device="cuda").half()
        sizes = Int8Spec("dynamic", n, m, in_features, out_features)._asdict()
        output_scale = torch.tensor(OUTPUT_SCALE, device="cuda")
        for tokens in (1, 33, 512):
            x = torch.randn(tokens, in_features, device="cuda").half()
            with sb.backend("triton"):
                q, s = quantize_rows(x)
                sums = q.double() @ values.double().t() * s.double()[:, None] * weight[-1].double() + bias.double()
                for activation, act in ACTIVATIONS.items():
                    options = {"layout": layout, "activation": activation, **sizes}
                    y = int8_linear_from_int8(q, s, weight, bias, dtype=torch.float16, **options)
                    assert torch.equal(y, int8_linear(x, weight, bias, **options))
                    found, scales = int8_linear_to_int8(q, s, weight, bias, output_scale, **options)
                    assert torch.equal(scales, output_scale.expand(tokens))
                    assert (found - (act(sums) / OUTPUT_SCALE).clamp(-127, 127)).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("how", ["compiled", "captured"])
def test_a_feed_forward_net_without_floats_in_between(how):
    _, first = weight_of(3072, 768, 1, 1, "neutral")
    _, second = weight_of(768, 3072, 1, 1, "neutral")
    up, down = (Int8Spec("dynamic", 1, 1, *sizes)._asdict() for sizes in ((768, 3072), (3072, 768)))
    scale = torch.tensor(OUTPUT_SCALE, device="cuda")
    x = torch.randn(16, 768, device="cuda").half()

    def net(x):
        q, s = quantize_rows(x)
        q, s = int8_linear_to_int8(q, s, first, None, scale, layout="neutral", activation="gelu", **up)
        return int8_linear_from_int8(q, s, second, None, dtype=torch.float16, layout="neutral", **down)

    with sb.backend("triton"):
        expected = net(x)
        if how == "compiled":
            assert torch.equal(torch.compile(net, fullgraph=True)(x), expected)
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
