"""n:m layouts on a GPU: numbers against float64, round trips bit for bit, graph capture. Needs a CUDA device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.nn import NMLinear
from sparsebert.ops import layouts, nm_linear, select
from sparsebert.ops.specs import NMSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16]
LAYOUTS = ["neutral", "dense", "cusparselt", "cutlass"]
ACTIVATIONS = {"none": lambda y: y, "gelu": F.gelu, "relu": torch.relu}


def held(layout, out_features, in_features, n, m, dtype, device="cuda"):
    """``(weight tensors, dense weight, kwargs)``, or a skip with the device's reason."""
    spec = NMSpec(n, m, in_features, out_features)
    if reason := layouts.get("nm_linear", layout).supports(spec, dtype, torch.device(device)):
        pytest.skip(f"{layout}: {reason}")
    dense = nm.project(torch.randn(out_features, in_features), n, m).to(device, dtype)
    weight = layouts.get("nm_linear", layout).from_neutral(list(nm.pack(dense, n, m)), spec, dtype)
    return weight, dense, {**spec._asdict(), "layout": layout}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)], ids=["2:4", "1:4", "2:8"])
def test_numbers_against_float64(layout, n, m, dtype):
    """At most twice the error of torch's dense op of the same dtype, at odd token counts."""
    weight, dense, kwargs = held(layout, 3072, 768, n, m, dtype)
    bias = torch.randn(3072, device="cuda", dtype=dtype)
    for tokens in (1, 7, 33, 127, 512):
        for b in (bias, None):
            x = torch.randn(tokens, 768, device="cuda", dtype=dtype)
            for activation, act in ACTIVATIONS.items():
                # Freed memory full of NaN: an element that a kernel leaves unwritten shows.
                poison = torch.full((tokens, 3072), float("nan"), device="cuda", dtype=dtype)
                del poison
                y = nm_linear(x, weight, b, **kwargs, activation=activation)
                exact = act(F.linear(x.double(), dense.double(), None if b is None else b.double()))
                error = (act(F.linear(x, dense, b)).double() - exact).abs().max()
                assert y.shape == exact.shape and y.is_contiguous()
                assert (y.double() - exact).abs().max() <= 2 * error + 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_weight_back_bit_for_bit(layout, dtype):
    weight, dense, _ = held(layout, 768, 3072, 2, 4, dtype)
    spec = NMSpec(2, 4, 3072, 768)
    assert torch.equal(layouts.get("nm_linear", layout).to_dense(weight, spec, weight[0].dtype), dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_dimensions_and_empty_input(layout):
    weight, dense, kwargs = held(layout, 64, 128, 2, 4, torch.float16)
    for shape in ((128,), (0, 128), (2, 0, 128), (2, 3, 128)):
        x = torch.randn(shape, device="cuda", dtype=torch.float16)
        y = nm_linear(x, weight, None, **kwargs)
        assert y.shape == (*shape[:-1], 64)
        torch.testing.assert_close(y, F.linear(x, dense), rtol=1e-2, atol=1e-2)
    x = torch.randn(2, 128, 5, device="cuda", dtype=torch.float16).transpose(1, 2)
    torch.testing.assert_close(nm_linear(x, weight, None, **kwargs), F.linear(x, dense), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    weight, _, kwargs = held(layout, 64, 128, 2, 4, torch.float16)
    x = torch.randn(8, 128, device="cuda", dtype=torch.float16)
    bias = torch.randn(64, device="cuda", dtype=torch.float16)
    torch.library.opcheck(torch.ops.sparsebert.nm_linear.default, (x, weight, bias), kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_for_the_input(layout):
    weight, dense, kwargs = held(layout, 64, 128, 2, 4, torch.float16)
    x = torch.randn(8, 128, device="cuda", dtype=torch.float16, requires_grad=True)
    nm_linear(x, weight, None, **kwargs).sum().backward()
    expected = torch.ones(8, 64, device="cuda", dtype=torch.float16) @ dense
    torch.testing.assert_close(x.grad, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captured_in_a_cuda_graph(layout):
    weight, _, kwargs = held(layout, 64, 128, 2, 4, torch.float16)
    x = torch.randn(16, 128, device="cuda", dtype=torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        nm_linear(x, weight, None, **kwargs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = nm_linear(x, weight, None, **kwargs)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, nm_linear(x, weight, None, **kwargs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_module_moves_and_saves_the_same_bytes(dtype):
    linear = nn.Linear(768, 3072).to(dtype)
    linear.weight.data = nm.project(linear.weight.data, 2, 4)
    module = NMLinear.from_linear(copy.deepcopy(linear), sb.NMConfig(2, 4)).prepare_()
    before = module.state_dict()
    module.cuda()
    assert module.device.type == "cuda"
    if module.layout in ("neutral", "cusparselt", "cutlass"):
        assert module.memory_bytes() < module.dense_bytes()
    for place in (module, module.cpu()):
        state = place.state_dict()
        assert all(torch.equal(state[name].cpu(), before[name]) for name in before)
    assert module.layout == "dense"


def test_autocast_leaves_kernel_layouts_in_their_dtype():
    for layout in LAYOUTS:
        spec = NMSpec(2, 4, 128, 64)
        if layouts.get("nm_linear", layout).supports(spec, torch.float16, torch.device("cuda")):
            continue
        weight, dense, kwargs = held(layout, 64, 128, 2, 4, torch.float16)
        x = torch.randn(8, 128, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = nm_linear(x, weight, None, **kwargs)
        expected = torch.bfloat16 if layouts.get("nm_linear", layout).castable else torch.float16
        assert y.dtype == expected
        exact = F.linear(x.double(), dense.double())
        error = (F.linear(x.to(expected), dense.to(expected)).double() - exact).abs().max()
        assert (y.double() - exact).abs().max() <= 2 * error + 1e-3


def test_explain_and_tune_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).half().cuda()
    sb.compress_(model, {"*": sb.NMConfig(2, 4)})
    assert all(layer.basis == "not measured here" for layer in sb.explain(model).layers)
    report = sb.tune(model, [128], budget_s=0.1)
    assert report.mode == "cuda-graph" and report.device == torch.cuda.get_device_name()
    for layer in sb.explain(model).layers:
        assert layer.basis.startswith("measured at 128 tokens")
        assert select.candidates("nm_linear", layer.layout)
