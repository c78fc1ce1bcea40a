"""sparsebert::nm_linear: numbers against float64, and every contract of a torch op."""

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.ops import layouts, nm_linear

ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": torch.relu,
}
LAYOUTS = ["neutral", "dense"]
OP = torch.ops.sparsebert.nm_linear.default


def make(out_features, in_features, n=2, m=4, dtype=torch.float32, layout="neutral", bias=True, seed=0):
    """``(weight tensors, bias, kwargs, dense weight)``."""
    generator = torch.Generator().manual_seed(seed)
    dense = nm.project(torch.randn(out_features, in_features, generator=generator).to(dtype), n, m)
    spec = layouts.Spec(n, m, in_features, out_features)
    b = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    kwargs = {"layout": layout, "n": n, "m": m, "in_features": in_features, "out_features": out_features}
    return layouts.get(layout).from_dense(dense, spec), b, kwargs, dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_against_float64(layout, activation, dtype):
    """At most twice the error of torch's dense op of the same dtype on the unpacked weight."""
    for tokens, (n, m), bias in (
        (1, (2, 4), True),
        (7, (1, 4), False),
        (33, (3, 8), True),
        (127, (1, 16), True),
    ):
        weight, b, kwargs, dense = make(100, 48, n, m, dtype, layout, bias)
        x = torch.randn(tokens, 48).to(dtype)
        y = nm_linear(x, weight, b, **kwargs, activation=activation)
        act = ACTIVATIONS[activation]
        exact = act(F.linear(x.double(), dense.double(), None if b is None else b.double()))
        dense_error = (act(F.linear(x, dense, b)).double() - exact).abs().max()
        assert y.dtype == dtype and y.shape == (tokens, 100)
        assert (y.double() - exact).abs().max() <= 2 * dense_error + 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 8), (2, 0, 8), (2, 3, 8), (2, 3, 4, 8)], ids=str)
def test_leading_dimensions(shape, layout):
    weight, b, kwargs, dense = make(5, 8, layout=layout)
    x = torch.randn(shape)
    y = nm_linear(x, weight, b, **kwargs, activation="relu")
    assert y.shape == (*shape[:-1], 5) and y.is_contiguous()
    assert torch.equal(y, torch.relu(F.linear(x, dense, b)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous_input(layout):
    weight, b, kwargs, dense = make(6, 8, layout=layout)
    for x in (torch.randn(8, 5).t(), torch.randn(5, 16)[:, ::2], torch.randn(4, 3, 8).transpose(0, 1)):
        assert not x.is_contiguous()
        y = nm_linear(x, weight, b, **kwargs)
        assert y.is_contiguous()
        torch.testing.assert_close(y, F.linear(x, dense, b))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(layout, activation):
    weight, b, kwargs, _ = make(6, 8, layout=layout)
    x = torch.randn(3, 8)
    torch.library.opcheck(OP, (x, weight, b), {**kwargs, "activation": activation})
    if activation == "none":
        torch.library.opcheck(OP, (x.requires_grad_(), weight, b.requires_grad_()), kwargs)
        torch.library.opcheck(OP, (torch.randn(2, 3, 8, requires_grad=True), weight, None), kwargs)
        torch.library.opcheck(torch.ops.sparsebert.nm_unpack.default, (weight,), kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    weight, b, kwargs, _ = make(6, 8, dtype=torch.float64, layout=layout)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def op(x, b):
        return nm_linear(x, weight, b, **kwargs)

    assert torch.autograd.gradcheck(op, (x, b.requires_grad_()))
    assert torch.autograd.gradgradcheck(op, (x, b))


def test_packed_weights_have_no_gradient():
    weight, b, kwargs, _ = make(6, 8)
    with pytest.raises(RuntimeError, match=r"nm_linear: weight .* packed weights are not trainable"):
        nm_linear(torch.randn(3, 8), [weight[0].requires_grad_(), weight[1]], b, **kwargs)


def test_fused_activation_has_no_gradient():
    weight, b, kwargs, _ = make(6, 8)
    with pytest.raises(RuntimeError, match="no gradient through the fused activation 'gelu'"):
        nm_linear(torch.randn(3, 8, requires_grad=True), weight, b, **kwargs, activation="gelu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole_with_dynamic_tokens(layout):
    weight, b, kwargs, _ = make(6, 8, layout=layout)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x):
        return nm_linear(x * 2, weight, b, **kwargs, activation="gelu") + 1

    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        for tokens in (3, 5, 17):
            x = torch.randn(tokens, 8)
            torch.testing.assert_close(compiled(x), nm_linear(x * 2, weight, b, **kwargs, activation="gelu") + 1)
    finally:
        torch._dynamo.config.error_on_recompile = before
        torch._dynamo.reset()


def test_autocast_runs_in_its_dtype():
    for layout in LAYOUTS:
        weight, b, kwargs, dense = make(6, 8, layout=layout)
        x = torch.randn(3, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = nm_linear(x, weight, b, **kwargs), F.linear(x, dense, b)
            mixed = nm_linear(x.bfloat16(), weight, b, **kwargs)
            exact = nm_linear(x.double(), [w.double() if w.is_floating_point() else w for w in weight], None, **kwargs)
        assert y.dtype == torch.bfloat16 and torch.equal(y, expected) and torch.equal(mixed, y)
        assert exact.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(3, 8, requires_grad=True)
        nm_linear(x, weight, b, **kwargs).sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_kernel_layout_is_not_cast_under_autocast(monkeypatch):
    """Metadata packed into a float tensor must not be converted: x follows the weight instead."""
    seen = []

    def check(weight, spec):
        seen.append([w.dtype for w in weight])

    opaque = layouts.Layout(
        "opaque",
        tensors=("blob",),
        castable=False,
        supports=lambda *_: None,
        check=check,
        from_dense=lambda dense, spec: [dense],
        to_dense=lambda weight, spec: weight[0],
    )
    monkeypatch.setitem(layouts._layouts, "opaque", opaque)
    weight, b, kwargs, dense = make(6, 8)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="no backend serves layout"),
    ):
        nm_linear(torch.randn(3, 8).bfloat16(), [dense], b, **{**kwargs, "layout": "opaque"})
    assert seen == [[torch.float32]]


GOOD = {"layout": "neutral", "n": 2, "m": 4, "in_features": 8, "out_features": 6}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 9)}, ValueError, r"x has shape \(3, 9\), expected \(\.\.\., 8\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), expected"),
        (
            {"x": torch.randn(3, 8).half()},
            TypeError,
            r"x is torch\.float16, expected torch\.float32 as weight_values",
        ),
        ({"bias": torch.randn(5)}, ValueError, r"bias has shape \(5,\), expected \(6,\)"),
        ({"bias": torch.randn(6).half()}, TypeError, r"bias is torch\.float16"),
        (
            {"values": torch.randn(6, 5)},
            ValueError,
            r"weight_values has shape \(6, 5\), expected \(6, 4\) for in_features=8 at 2:4",
        ),
        (
            {"positions": torch.zeros(6, 2, dtype=torch.uint8)},
            ValueError,
            r"weight_positions has shape \(6, 2\)",
        ),
        ({"positions": torch.zeros(6, 1, dtype=torch.int8)}, TypeError, r"weight_positions is torch\.int8"),
        ({"activation": "swish"}, ValueError, "activation is 'swish', expected one of none, gelu"),
        ({"layout": "csr"}, ValueError, "layout is 'csr', expected one of neutral, dense"),
        ({"layout": "dense"}, ValueError, r"weight has 2 tensors, expected 1 \(dense\) for layout 'dense'"),
        ({"in_features": 10}, ValueError, r"x has shape"),
    ],
)
def test_errors_name_op_tensor_expected_and_actual(change, error, message):
    weight, b, _, _ = make(6, 8)
    x = change.get("x", torch.randn(3, 8))
    tensors = [change.get("values", weight[0]), change.get("positions", weight[1])]
    kwargs = {**GOOD, **{k: v for k, v in change.items() if k in (*GOOD, "activation")}}
    with pytest.raises(error, match=f"nm_linear: .*{message}"):
        nm_linear(x, tensors, change.get("bias", b), **kwargs)
    # The fake refuses as well, so that a compiled model fails when it is traced. (A tracer may wrap the error.)
    fake = [t.to("meta") for t in (x, *tensors, change.get("bias", b))]
    with pytest.raises((error, RuntimeError), match=message):
        nm_linear(fake[0], fake[1:3], fake[3], **kwargs)


def test_backend_can_be_forced():
    weight, b, kwargs, dense = make(6, 8)
    x = torch.randn(3, 8)
    with sb.backend("reference"):
        assert torch.equal(nm_linear(x, weight, b, **kwargs), F.linear(x, dense, b))
    with (
        sb.backend("cuda"),
        pytest.raises(RuntimeError, match="no forced backend serves layout 'neutral' on cpu"),
    ):
        nm_linear(x, weight, b, **kwargs)
    nm_linear(x, weight, b, **kwargs)
    with (
        pytest.raises(ValueError, match="backend: 'rocm' is unknown, expected one of cuda"),
        sb.backend("rocm"),
    ):
        pass


def test_export_and_reload(tmp_path):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            (values, positions), b, self.kwargs, _ = make(6, 8)
            self.register_buffer("values", values)
            self.register_buffer("positions", positions)
            self.register_buffer("b", b)

        def forward(self, x):
            return nm_linear(x, [self.values, self.positions], self.b, **self.kwargs)

    layer = Layer()
    tokens = torch.export.Dim("tokens", min=1, max=1024)
    program = torch.export.export(layer, (torch.randn(4, 8),), dynamic_shapes={"x": {0: tokens}})
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(9, 8)
    assert torch.equal(loaded(x), layer(x))
