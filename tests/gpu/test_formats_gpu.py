"""Every format in every layout on a GPU: numbers, round trips bit for bit, graph capture. Needs a CUDA device."""

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from packed_cases import KINDS, held, linear_of, make, packed
from sparsebert import ops
from sparsebert.nn import MODULES
from sparsebert.ops import layouts, select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Larger than the tests of a CPU use, and in multiples that kernels want; small ones are refused, which is tested too.
OUT = 128


def on_gpu(made, layout, dtype):
    """The tensors of ``layout`` on the GPU, or a skip with the device's reason."""
    device = torch.device("cuda")
    if reason := layouts.get(made.spec.op, layout).supports(made.spec, dtype, device):
        pytest.skip(f"{layout}: {reason}")
    neutral = [tensor.cuda() for tensor in made.neutral]
    return layouts.get(made.spec.op, layout).from_neutral(neutral, made.spec, dtype)


def call(made, layout, weight, x, bias=None):
    return getattr(ops, made.spec.op)(x, weight, bias, layout=layout, **made.spec._asdict())


def cases():
    return [(kind, layout) for kind in KINDS for layout in layouts.names(make(kind).spec.op)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), cases())
def test_numbers(kind, layout, dtype):
    """Against the reference of the neutral tensors on the CPU; int8 sums are exact, so only the last rounding differs.
    Floats: at most twice the error that torch's own op makes on this GPU with the unpacked weight."""
    made = make(kind, dtype, out=OUT)
    weight = on_gpu(made, layout, dtype)
    for tokens in (1, 7, 33, 128):
        x = torch.randn(tokens, made.spec.in_features).to(dtype)
        y = call(made, layout, weight, x.cuda(), made.bias.cuda()).cpu()
        if "int8" in kind and layout != "dense":
            reference = call(made, "neutral", list(made.neutral), x, made.bias)
            torch.testing.assert_close(y, reference, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
            continue
        exact = F.linear(x.double(), made.exact, made.bias.double())
        own = F.linear(x.cuda(), made.exact.to(dtype).cuda(), made.bias.cuda()).cpu().double()
        allowed = 2 * (own - exact).abs().max()
        if made.factors:
            # A product of factors is rounded between them; torch's own way through them is what to compare with.
            u, v = made.factors["u"].cuda(), made.factors["v"].cuda()
            chain = F.linear(F.linear(x.cuda(), v), u, made.bias.cuda())
            if "sparse" in made.factors:
                chain = chain + F.linear(x.cuda(), made.factors["sparse"].cuda())
            allowed = max(allowed, 2 * (chain.cpu().double() - exact).abs().max())
        assert (y.double() - exact).abs().max() <= allowed + 1e-12


@pytest.mark.parametrize(("kind", "layout"), cases())
def test_neutral_tensors_come_back(kind, layout):
    made = make(kind, torch.float16, out=OUT)
    weight = on_gpu(made, layout, torch.float16)
    back = layouts.get(made.spec.op, layout).to_neutral(weight, made.spec)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(back, made.neutral, strict=True))


@pytest.mark.parametrize("kind", list(KINDS))
def test_modules_move_there_and_back(kind):
    module = packed(kind, "neutral", torch.float16)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(5, module.in_features).half()
    before = module(x)
    module.prepare_("auto").cuda()
    problem = module.problem(5)
    assert select.choose(problem).backend in select.BACKENDS
    torch.testing.assert_close(module(x.cuda()).cpu(), before, rtol=2e-2, atol=2e-2)
    module.cpu()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    "kind", ["nm-2:4", "bitmap-5%", "low-rank", "rows", "int8", "int8+2:4", "int8-static", "dense"]
)
def test_can_be_captured_in_a_graph(kind):
    made = make(kind, torch.float16, out=OUT)
    linear = linear_of(made)
    module = MODULES[made.config.format].from_linear(linear, made.config, name="layer", factors=made.factors).cuda()
    if "static" in kind:
        module.set_input_scale_(0.02)
    x = torch.randn(64, made.spec.in_features, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        expected = module(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        graph.replay()
    assert torch.equal(y, expected)


def test_quantize_rows_is_that_of_the_cpu():
    for dtype in DTYPES:
        x = torch.randn(33, 257).to(dtype)
        x[3] = 0
        found, expected = ops.quantize_rows(x.cuda()), ops.quantize_rows(x)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_calibrating_on_a_gpu():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).cuda()
    sb.compress_(model, {"0": sb.Int8Config("static"), "2": sb.Int8Config("static")})
    x = torch.randn(32, 64)
    report = sb.calibrate(model, [x])
    assert report.layers[0].largest == pytest.approx(x.abs().max().item())
    assert torch.isfinite(model(x.cuda())).all()


def test_layouts_of_a_cpu_are_refused():
    made = make("int8")
    assert "is for CPUs" in layouts.get("int8_linear", "float").supports(made.spec, torch.float16, torch.device("cuda"))
    assert len(held(made, "float")) > 0
