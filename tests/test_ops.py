"""Every op in every layout a CPU can hold: numbers against float64, and every contract of a torch op."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sparsebert as sb
import sparsebert.ops
from packed_cases import INPUT_SCALE, KINDS, LEAD, OUT, RANK, computed_pairs, held, in_features_of, make, pairs
from sparsebert.formats import int8 as int8_format
from sparsebert.ops import int8, layouts, select
from sparsebert.ops.devices import Device
from sparsebert.ops.specs import Int8Spec, LowRankSparseSpec, NMSpec

pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": torch.relu,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
TOKENS = (1, 7, 33, 127)
INT8_KINDS = [kind for kind in KINDS if kind.startswith("int8")]
FLOAT_KINDS = [kind for kind in KINDS if kind not in INT8_KINDS]
# Layouts whose arithmetic is that of floats: all but the quantizing ones.
FLOAT_PAIRS = computed_pairs(*FLOAT_KINDS) + [(kind, "dense") for kind in INT8_KINDS]
INT8_PAIRS = pairs(*INT8_KINDS, without=("dense",))
LEAD_PAIRS = computed_pairs(*LEAD)
ALL_PAIRS = computed_pairs(*KINDS)
OPS = ("nm_linear", "bitmap_linear", "low_rank_linear", "low_rank_sparse_linear", "int8_linear", "dense_linear")


def op_of(made):
    return getattr(torch.ops.sparsebert, made.spec.op).default


def run(made, layout, x, bias=None, *, weight=None, dtype=torch.float32, **options):
    function = getattr(sparsebert.ops, made.spec.op)
    weight = held(made, layout, dtype) if weight is None else weight
    return function(x, weight, bias, layout=layout, **made.spec._asdict(), **options)


def rows_of(made, count, dtype=torch.float32, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, made.spec.in_features, generator=generator, dtype=torch.float64).to(dtype)


def matrices_of(made, layout, dtype):
    """What a dense torch op would multiply x with, one chain of factors each: y is the sum of the chains."""
    if layout == "dense" or not made.factors:
        return [[layouts.get(made.spec.op, layout).to_dense(held(made, layout, dtype), made.spec, dtype)]]
    u, v = held(made, layout, dtype)[:2] if layout in ("padded", "grouped") else (made.factors["u"], made.factors["v"])
    chains = [[v, u]]
    return chains + [[made.factors["sparse"]]] if "sparse" in made.factors else chains


def through(chains, x, bias):
    total = None
    for chain in chains:
        y = x
        for place, matrix in enumerate(chain):
            last = total is None and place == len(chain) - 1
            y = F.linear(y, matrix.to(x.dtype), bias.to(x.dtype) if last and bias is not None else None)
        total = y if total is None else total + y
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), FLOAT_PAIRS)
def test_numbers_against_float64(kind, layout, dtype):
    """At most twice the error that torch makes in the same dtype when it computes the same thing (decision 14)."""
    made = make(kind, dtype)
    weight, x = held(made, layout, dtype), rows_of(made, max(TOKENS), dtype)
    chains = matrices_of(made, layout, dtype)
    for activation, bias in (
        ("none", None),
        ("none", made.bias),
        ("gelu", made.bias),
        ("gelu_tanh", None),
        ("relu", None),
    ):
        act = ACTIVATIONS[activation]
        exact = act(through(chains, x.double(), bias))
        if dtype == torch.float64:
            # Nothing is more exact to compare with, so this is the bound of dot products (Higham 2002, 3.1): k eps
            # times the sum of magnitudes, k the number of additions. No activation here has a slope beyond 1.13; its
            # own rounding is that of its value.
            steps = made.spec.in_features + 8
            magnitude = through([[m.abs() for m in chain] for chain in chains], x.abs(), made.bias.abs())
            allowed = 1.13 * steps * torch.finfo(dtype).eps * magnitude.max()
        else:
            allowed = 2 * (act(through(chains, x, bias)).double() - exact).abs().max()
        for tokens in TOKENS if activation == "none" else TOKENS[-1:]:
            y = run(made, layout, x[:tokens], bias, weight=weight, activation=activation)
            assert y.dtype == dtype and y.shape == (tokens, OUT) and y.is_contiguous()
            assert (y.double() - exact[:tokens]).abs().max() <= allowed


def int8_reference(x, made, bias, *, scales=None):
    """``(sums int64, y fp32)`` by the frozen rounding, in the order (sum * s_x) * s_w + b."""
    values, own = int8.split(made.neutral, made.spec)[0], made.neutral[-1 - (made.spec.activations == "static")]
    scales = own if scales is None else scales
    wide = x.float()
    if made.spec.activations == "static":
        s = torch.tensor(INPUT_SCALE)
        inverse = torch.div(torch.ones(()), s)
    else:
        amax = wide.abs().amax(-1, keepdim=True)
        s = torch.where(amax == 0, torch.ones(()), torch.div(amax, torch.tensor(127.0)))
        inverse = torch.where(amax == 0, torch.zeros(()), torch.div(torch.tensor(127.0), amax))
    q = torch.clamp(torch.round(wide * inverse), -127, 127).long()
    sums = q @ values.long().t()
    product = sums.float() * s * scales.float()
    return sums, product, product if bias is None else product + bias.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), INT8_PAIRS)
def test_int8_numbers_are_those_of_the_frozen_rounding(kind, layout, dtype):
    made = make(kind)
    weight, x = held(made, layout), rows_of(made, max(TOKENS), dtype)
    for bias in (None, made.bias.to(dtype)):
        _, product, expected = int8_reference(x, made, bias)
        # With a bias a fused multiply-add may save one rounding, of at most half a unit in the last place of the
        # product, and then the sum rounds once on either side; so may the last rounding, to the dtype.
        unit = torch.finfo(torch.float32).eps
        allowed = 0 if bias is None else unit * (product.abs() + expected.abs())
        for tokens in TOKENS:
            y = run(made, layout, x[:tokens], bias, weight=weight)
            assert y.dtype == dtype and y.shape == (tokens, OUT)
            if bias is None:
                assert torch.equal(y, expected[:tokens].to(dtype))
            else:
                rounding = torch.finfo(dtype).eps * expected.abs()
                assert ((y.double() - expected[:tokens].double()).abs() <= (allowed + rounding)[:tokens]).all()
        for name, act in ACTIVATIONS.items():
            assert torch.equal(run(made, layout, x, bias, weight=weight, activation=name), act(y))


@pytest.mark.parametrize(("kind", "layout"), INT8_PAIRS)
def test_int8_rounds_a_product_with_the_reciprocal(kind, layout):
    """Halfway between two integers a quotient would often be rounded to the other one."""
    made = make(kind)
    step = torch.tensor(INPUT_SCALE)
    x = (torch.arange(40 * made.spec.in_features).remainder(126).view(40, -1) + 0.5) * step
    x[:, 0] = 127 * step
    sums, _, expected = int8_reference(x, made, None)
    values = int8.split(made.neutral, made.spec)[0]
    assert not torch.equal(sums, torch.clamp(torch.round(x / step), -127, 127).long() @ values.long().t())
    assert torch.equal(run(made, layout, x), expected)


@pytest.mark.parametrize(("kind", "layout"), INT8_PAIRS)
def test_int8_sums_are_exact(kind, layout):
    """With scales of 1 the result is the sum itself, which fp32 holds here."""
    made = make(kind)
    values, _ = int8.split(made.neutral, made.spec)
    q = torch.randint(-127, 128, (33, made.spec.in_features))
    q[:, 0] = 127
    ones = [torch.ones_like(t) if t.is_floating_point() and t.dim() < 2 else t for t in made.neutral]
    exact = q @ values.long().t()
    y = run(made, layout, q.float(), weight=held(made._replace(neutral=ones), layout))
    assert torch.equal(y.long(), exact)
    assert torch.equal(int8_format.accumulate(q.to(torch.int8), values).long(), exact)
    assert torch.equal(int8._int_mm(q.to(torch.int8), values).long(), exact)


def test_quantize_rows_is_the_frozen_rounding():
    for dtype in DTYPES:
        x = torch.randn(5, 3, 45).to(dtype)
        x[1, 2] = 0
        q, scale = sparsebert.ops.quantize_rows(x)
        amax = x.float().abs().amax(-1)
        assert torch.equal(scale, torch.where(amax == 0, torch.ones(()), amax / torch.tensor(127.0)))
        inverse = torch.where(amax == 0, torch.zeros(()), torch.tensor(127.0) / amax).unsqueeze(-1)
        assert torch.equal(q, (x.float() * inverse).round().clamp(-127, 127).to(torch.int8))
        assert q.abs().amax(-1).eq(127).sum() == 14 and not q[1, 2].any()
    for x, text in ((torch.tensor(1.0), "0 dimensions"), (torch.ones(3, dtype=torch.int32), "x is torch.int32 with 1")):
        for device in ("cpu", "meta"):
            with pytest.raises((ValueError, RuntimeError), match=f"quantize_rows: x is .*{text}|{text}"):
                sparsebert.ops.quantize_rows(x.to(device))


@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_x_of_any_rank_and_stride(kind, layout):
    made = make(kind)
    weight, size = held(made, layout), made.spec.in_features
    for shape in ((size,), (0, size), (3, size), (2, 0, size), (2, 3, size), (2, 1, 4, size)):
        x = torch.randn(shape)
        y = run(made, layout, x, made.bias, weight=weight, activation="relu")
        assert y.shape == (*shape[:-1], OUT) and y.is_contiguous() and y.dtype == x.dtype
        flat = run(made, layout, x.reshape(-1, size), made.bias, weight=weight, activation="relu")
        # A product of other sizes sums in another order.
        torch.testing.assert_close(y.reshape(-1, OUT), flat)
    for x in (
        torch.randn(size, 5).t(),
        torch.randn(5, 2 * size)[:, ::2],
        torch.randn(4, 3, size).transpose(0, 1),
        torch.randn(size).expand(3, size),
    ):
        before = x.clone()
        y = run(made, layout, x, made.bias, weight=weight)
        assert not x.is_contiguous() and y.is_contiguous() and torch.equal(x, before)
        torch.testing.assert_close(y, run(made, layout, x.contiguous(), made.bias, weight=weight))


@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_layout_gives_the_neutral_tensors_and_the_weight_back(kind, layout, dtype):
    made = make(kind, dtype)
    known, weight = layouts.get(made.spec.op, layout), held(make(kind, dtype), layout, dtype)
    for tensor, (name, expected) in zip(weight, layouts.tensors(made.spec, layout).items(), strict=True):
        assert expected.shape in (None, tuple(tensor.shape)), name
        assert tensor.dtype == {"compute": dtype, "float": torch.float32}.get(expected.dtype, expected.dtype), name
    back = known.to_neutral(weight, made.spec)
    assert len(back) == len(made.neutral)
    for tensor, expected in zip(back, made.neutral, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    dense = known.to_dense(weight, made.spec, dtype)
    # Factors: their product is summed in fp32 and rounded once; all else is exact.
    magnitude = made.exact.abs() if not made.factors else (made.factors["u"].abs() @ made.factors["v"].abs()).double()
    steps = (RANK + 1) * bool(made.factors)
    allowed = steps * torch.finfo(torch.float32).eps * (magnitude + made.exact.abs())
    allowed = allowed + torch.finfo(dtype).eps / 2 * made.exact.abs() * (dtype != torch.float32 or steps == 0)
    assert ((dense.double() - made.exact).abs() <= allowed).all()
    assert made.factors or torch.equal(dense, made.exact.to(dtype))
    assert dense.dtype == dtype and all(dense.data_ptr() != t.data_ptr() for t in weight if t.numel())
    unpacked = getattr(torch.ops.sparsebert, f"{made.spec.op}_unpack")(
        weight, layout=layout, dtype=dtype, **made.spec._asdict()
    )
    assert torch.equal(unpacked, dense)


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_opcheck(kind, layout):
    made = make(kind, out=6)
    weight, kwargs = held(made, layout), {"layout": layout, **made.spec._asdict()}
    x = rows_of(made, 3)
    torch.library.opcheck(op_of(made), (x, weight, made.bias), {**kwargs, "activation": "gelu"})
    wanting = (x.view(1, 3, -1).requires_grad_(), weight, made.bias.requires_grad_())
    torch.library.opcheck(op_of(made), wanting, kwargs)
    unpack = getattr(torch.ops.sparsebert, f"{made.spec.op}_unpack").default
    torch.library.opcheck(unpack, (weight,), {**kwargs, "dtype": torch.float32})


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
@pytest.mark.parametrize("kind", ["nm-2:4", "int8"])
def test_opcheck_of_the_other_activations(kind, activation):
    made = make(kind, out=6)
    kwargs = {"layout": "neutral", **made.spec._asdict(), "activation": activation}
    torch.library.opcheck(op_of(made), (rows_of(made, 3), made.neutral, None), kwargs)


def test_opcheck_of_quantize_rows():
    for x in (torch.randn(3, 8), torch.randn(2, 3, 8).half(), torch.randn(0, 8), torch.randn(8, 3).t()):
        torch.library.opcheck(torch.ops.sparsebert.quantize_rows.default, (x,))


@pytest.mark.parametrize(("kind", "layout"), computed_pairs(*(kind for kind in LEAD if kind in FLOAT_KINDS)))
def test_gradcheck(kind, layout):
    made = make(kind, torch.float64, out=6)
    weight = held(made, layout, torch.float64)
    x = rows_of(made, 2, torch.float64).view(2, 1, -1).requires_grad_()

    def op(x, b):
        return run(made, layout, x, b, weight=weight)

    assert torch.autograd.gradcheck(op, (x, made.bias.requires_grad_()), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (x, made.bias), fast_mode=True)


@pytest.mark.parametrize(("kind", "layout"), pairs(*INT8_KINDS))
def test_the_gradient_of_int8_goes_straight_through_the_rounding(kind, layout):
    made = make(kind)
    x, bias = rows_of(made, 7).requires_grad_(), made.bias.requires_grad_()
    grad = torch.randn(7, OUT)
    run(made, layout, x, bias).backward(grad)
    assert torch.equal(x.grad, grad @ made.exact.float())
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("kind", LEAD)
def test_what_has_no_gradient_says_so(kind):
    made = make(kind)
    x = rows_of(made, 3)
    with pytest.raises(
        RuntimeError, match=f"{made.spec.op}: no gradient through the fused activation 'gelu'; apply it"
    ):
        run(made, "neutral", x.requires_grad_(), made.bias, activation="gelu")
    weight = [t.clone().requires_grad_() if t.is_floating_point() else t for t in made.neutral]
    message = rf"{made.spec.op}: weight \(layout 'neutral'\) requires grad, but packed weights are not trainable"
    with pytest.raises(RuntimeError, match=message):
        run(made, "neutral", x.detach(), made.bias, weight=weight)


def pairs_of(op):
    return [(make(kind), layout) for kind, layout in LEAD_PAIRS if make(kind).spec.op == op]


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_with_dynamic_tokens(op):
    held_pairs = [(made, layout, held(made, layout)) for made, layout in pairs_of(op)]

    def plain(x):
        return [
            run(made, layout, x[:, : made.spec.in_features] * 2, made.bias, weight=weight, activation="gelu") + 1
            for made, layout, weight in held_pairs
        ]

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        for tokens in (3, 5, 17):
            x = torch.randn(tokens, 56)
            torch.testing.assert_close(compiled(x), plain(x))
    finally:
        torch._dynamo.config.error_on_recompile = before
        torch._dynamo.reset()


@pytest.mark.parametrize("op", OPS)
def test_export_and_reload(op, tmp_path):
    held_pairs = [(made, layout, held(made, layout)) for made, layout in pairs_of(op)]

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, (made, _, weight) in enumerate(held_pairs):
                for j, tensor in enumerate((made.bias, *weight)):
                    self.register_buffer(f"t{i}_{j}", tensor)

        def forward(self, x):
            results = []
            for i, (made, layout, weight) in enumerate(held_pairs):
                bias, *tensors = [getattr(self, f"t{i}_{j}") for j in range(len(weight) + 1)]
                results.append(run(made, layout, x[:, : made.spec.in_features], bias, weight=tensors))
            return results

    layers = Layers()
    tokens = torch.export.Dim("tokens", min=1, max=1024)
    program = torch.export.export(layers, (torch.randn(4, 56),), dynamic_shapes={"x": {0: tokens}})
    torch.export.save(program, tmp_path / "layers.pt2")
    loaded = torch.export.load(tmp_path / "layers.pt2").module()
    x = torch.randn(9, 56)
    for actual, expected in zip(loaded(x), layers(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_autocast_runs_in_its_dtype(kind, layout):
    made = make(kind)
    weight, x = held(made, layout), rows_of(made, 7)
    of_x = [held_as.dtype == layouts.COMPUTE for held_as in layouts.tensors(made.spec, layout).values()]
    cast = [t.bfloat16() if compute else t for t, compute in zip(weight, of_x, strict=True)]
    expected = run(made, layout, x.bfloat16(), made.bias.bfloat16(), weight=cast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(made, layout, x, made.bias, weight=weight)
        mixed = run(made, layout, x.bfloat16(), made.bias, weight=weight)
        wide = [t.double() if compute else t for t, compute in zip(weight, of_x, strict=True)]
        exact = run(made, layout, x.double(), made.bias.double(), weight=wide)
        x.requires_grad_()
        run(made, layout, x, made.bias, weight=weight).sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected) and torch.equal(mixed, y)
    assert exact.dtype == torch.float64 and torch.equal(
        exact, run(made, layout, x.double(), made.bias.double(), weight=wide)
    )
    assert x.grad.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in weight if t.is_floating_point())


def test_a_kernel_layout_is_not_cast_under_autocast(monkeypatch):
    """Metadata packed into a float tensor must not be converted: x follows the weight instead."""
    opaque = layouts.Layout(
        "nm_linear",
        "opaque",
        tensors=lambda spec: {"blob": layouts.Held(None, layouts.COMPUTE)},
        supports=layouts.anywhere,
        from_neutral=lambda weight, spec, dtype: weight,
        to_neutral=lambda weight, spec: weight,
        to_dense=lambda weight, spec, dtype: weight[0],
        castable=False,
    )
    monkeypatch.setitem(layouts._layouts, ("nm_linear", "opaque"), opaque)
    seen = []

    def compute(x, weight, bias, problem):
        seen.append((x.dtype, weight[0].dtype, bias.dtype))
        return F.linear(x, weight[0], bias)

    candidate = select.Candidate("nm_linear", "opaque", "torch", "opaque", lambda problem: None, compute)
    monkeypatch.setitem(select._candidates, ("nm_linear", "opaque"), [candidate])
    made = make("nm-2:4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(made, "opaque", rows_of(made, 3).bfloat16(), made.bias, weight=[made.weight])
    layouts.tensors.cache_clear()
    assert seen == [(torch.float32,) * 3] and y.dtype == torch.float32


def refused(made, layout, x, weight, bias, error, message, **change):
    """The op refuses with op, tensor, expected and actual, and so does the fake: a compiled model fails when it is
    traced. (A tracer may wrap the error.)"""
    function = getattr(sparsebert.ops, made.spec.op)
    kwargs = {"layout": layout, **made.spec._asdict(), **change}
    with pytest.raises(error, match=f"^{made.spec.op}: {message}"):
        function(x, weight, bias, **kwargs)
    # A tensor that is on another device than the rest stays so.
    x, bias, *weight = (torch.empty_like(t, device="cpu" if t.is_meta else "meta") for t in (x, bias, *weight))
    with pytest.raises((error, RuntimeError), match=message):
        function(x, weight, bias, **kwargs)


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_every_tensor_of_a_weight_is_checked(kind, layout):
    made = make(kind)
    weight, x, bias = held(made, layout), rows_of(made, 3), made.bias
    names = layouts.tensors(made.spec, layout)
    listed = re.escape(", ".join(names))
    for wrong in (weight[:-1], [*weight, weight[0]]):
        message = rf"weight has {len(wrong)} tensors, expected {len(names)} \({listed}\) for layout '{layout}'"
        refused(made, layout, x, wrong, bias, ValueError, message)
    for place, (name, expected) in enumerate(names.items()):
        tensor, label = weight[place], f"weight_{re.escape(name)}"

        def with_it(other, place=place):
            return [*weight[:place], other, *weight[place + 1 :]]

        if expected.shape is not None:
            longer = torch.cat((tensor, tensor)) if tensor.dim() else tensor.view(1)
            text = (
                rf"{label} has shape {re.escape(str(tuple(longer.shape)))}, expected {re.escape(str(expected.shape))} "
                rf"for in_features={made.spec.in_features} at {re.escape(made.spec.label)}"
            )
            refused(made, layout, x, with_it(longer), bias, ValueError, text)
        if expected.dtype == layouts.COMPUTE:
            text = rf"x is torch\.float32, expected torch\.float16 as {label}"
            refused(made, layout, x, with_it(tensor.half()), bias, TypeError, text)
        elif expected.dtype == layouts.FLOAT:
            text = rf"{label} is torch\.int32, expected a floating-point tensor"
            refused(made, layout, x, with_it(tensor.int()), bias, TypeError, text)
        else:
            text = rf"{label} is torch\.int16, expected {re.escape(str(expected.dtype))}"
            refused(made, layout, x, with_it(tensor.to(torch.int16)), bias, TypeError, text)
        if place:
            text = rf"{label} is on \w+, expected \w+ as the others"
            refused(made, layout, x, with_it(tensor.to("meta")), bias, ValueError, text)


@pytest.mark.parametrize(("kind", "layout"), [(kind, "neutral") for kind in LEAD] + [("rows", "stacked")])
def test_x_bias_and_names_are_checked(kind, layout):
    made = make(kind)
    weight, x, bias = held(made, layout), rows_of(made, 3), made.bias
    size, first = made.spec.in_features, next(iter(layouts.tensors(made.spec, layout)))
    wrong_x = [
        (x[:, 1:], ValueError, rf"x has shape \(3, {size - 1}\), expected \(\.\.\., {size}\)"),
        (torch.tensor(1.0), ValueError, r"x has shape \(\), expected"),
        (x.long(), TypeError, r"x is torch\.int64, expected a floating-point tensor"),
        (x.to("meta"), ValueError, rf"x is on \w+, expected \w+ as weight_{first}"),
    ]
    for other, error, message in wrong_x:
        refused(made, layout, other, weight, bias, error, message)
    wrong_bias = [
        (bias[1:], ValueError, rf"bias has shape \({OUT - 1},\), expected \({OUT},\)"),
        (bias.view(1, -1), ValueError, rf"bias has shape \(1, {OUT}\)"),
        (bias.half(), TypeError, r"bias is torch\.float16, expected torch\.float32 as x"),
        (bias.to("meta"), ValueError, r"bias is on \w+, expected \w+ as x"),
    ]
    for other, error, message in wrong_bias:
        refused(made, layout, x, weight, other, error, message)
    text = "activation is 'swish', expected one of none, gelu, gelu_tanh, relu"
    refused(made, layout, x, weight, bias, ValueError, text, activation="swish")
    text = "layout is 'csr', expected one of neutral, dense"
    refused(made, "csr", x, weight, bias, ValueError, text)
    text = rf"x has shape \(3, {size}\), expected \(\.\.\., {size + 8}\)"
    refused(made, layout, x, weight, bias, ValueError, text, in_features=size + 8)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("rows", {"sparse": "csr"}, "low_rank_sparse_linear: sparse is 'csr', expected one of rows, nm, bitmap"),
        ("int8", {"activations": "none"}, "int8_linear: activations is 'none', expected dynamic or static"),
        ("nm-2:4", {"m": 5}, "m is 5, expected one of"),
        ("bitmap-half", {"nnz": 10**9}, "nnz is 1000000000, expected 0 to"),
    ],
)
def test_sizes_that_describe_no_weight_are_refused(kind, change, message):
    made = make(kind)
    kwargs = {**made.spec._asdict(), **change}
    for device in ("cpu", "meta"):
        with pytest.raises((ValueError, RuntimeError), match=message):
            weight = [t.to(device) for t in made.neutral]
            getattr(sparsebert.ops, made.spec.op)(rows_of(made, 3).to(device), weight, None, layout="neutral", **kwargs)


@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_the_reference_runs_everything_and_others_say_why_not(kind, layout):
    made = make(kind)
    weight, x = held(made, layout), rows_of(made, 7)
    expected = run(made, layout, x, made.bias, weight=weight)
    with sb.backend("reference"):
        y = run(made, layout, x, made.bias, weight=weight)
    torch.testing.assert_close(y, expected)
    message = f"{made.spec.op}: no forced backend serves layout '{layout}' on cpu \\(cuda: (has no kernel|needs )"
    with sb.backend("cuda"), pytest.raises(RuntimeError, match=message):
        run(made, layout, x, made.bias, weight=weight)
    assert torch.equal(run(made, layout, x, made.bias, weight=weight), expected)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend: 'rocm' is unknown, expected one of cuda"), sb.backend("rocm"):
        pass


@pytest.mark.parametrize(("kind", "layout"), [p for p in INT8_PAIRS if p[1] != "float"])
def test_torchs_int8_matmul_is_for_cpus_that_have_one(kind, layout, monkeypatch):
    made = make(kind)
    x = rows_of(made, 7)
    with sb.backend("reference"):
        expected = run(made, layout, x, made.bias)
    for capable in (False, True):
        monkeypatch.setattr(int8, "cpu_has_int8", lambda capable=capable: capable)
        select._choose.cache_clear()
        assert torch.equal(run(made, layout, x, made.bias), expected)
        problem = select.problem_of(made.spec, layout, x, "none")
        assert select.choose(problem).backend == ("torch" if capable else "reference")
        with sb.backend("torch"):
            if capable:
                assert torch.equal(run(made, layout, x, made.bias), expected)
                assert torch.equal(run(made, layout, x[:0], made.bias), expected[:0])
            else:
                with pytest.raises(
                    RuntimeError, match="torch: torch's int8 matmul is a plain loop on a CPU without VNNI"
                ):
                    run(made, layout, x, made.bias)
    select._choose.cache_clear()


def test_torchs_int8_matmul_says_what_a_gpu_needs():
    (candidate,) = (c for c in select.candidates("int8_linear", "neutral") if c.backend == "torch")
    spec = Int8Spec("dynamic", 1, 1, 100, 64)
    base = select.Problem("neutral", Device("cuda", "a GPU", (9, 0)), torch.float16, spec, 5, "none")
    assert "in multiples of 8, not 64 x 100" in candidate.supports(base)
    assert candidate.supports(base._replace(spec=spec._replace(in_features=104))) is None
    assert candidate.supports(base._replace(device=Device("xpu"))) == "needs a CPU or a CUDA device, not xpu"


def test_layouts_refuse_what_they_are_not_for():
    spec = Int8Spec("dynamic", 1, 1, 8, 8)
    supports = layouts.get("int8_linear", "unpacked").supports
    assert supports(spec, torch.float32, torch.device("cpu")) == "is the neutral layout of a weight without a pattern"
    assert (
        layouts.get("int8_linear", "float").supports(spec, torch.float32, torch.device("meta"))
        == "is for CPUs, not meta"
    )
    spec = LowRankSparseSpec(2, "nm", 2, 4, 0, 8, 8)
    supports = layouts.get("low_rank_sparse_linear", "stacked").supports
    assert supports(spec, torch.float32, torch.device("cpu")) == "needs a sparse part of rows, not nm"


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("fill", ["all 127", "random", "alternating"])
def test_the_float_layout_equals_neutral_bit_for_bit_over_slices(fill, activations):
    """5000 products of 127 * 127 are above 2**24: the sum has to be cut, and is no fp32 number."""
    columns, rows = 5000, 3
    values = {
        "all 127": torch.full((rows, columns), 127),
        "random": torch.randint(-127, 128, (rows, columns)),
        "alternating": torch.tensor([127, -127] * (columns // 2)).expand(rows, columns),
    }[fill].to(torch.int8)
    spec = Int8Spec(activations, 1, 1, columns, rows)
    neutral = [values, torch.rand(rows) + 0.5] + ([torch.tensor(0.01)] if activations == "static" else [])
    floats = layouts.get("int8_linear", "float").from_neutral(neutral, spec, torch.float32)
    assert len(floats[1]) == (5 if fill != "random" else 3) and floats[1][-1] == columns
    x = torch.cat((torch.full((1, columns), 1.27), torch.randn(6, columns), values[:1] * 0.01))
    kwargs = {"bias": torch.randn(rows), **spec._asdict()}
    with sb.backend("reference"):
        y = sparsebert.ops.int8_linear(x, floats, layout="float", **kwargs)
        assert torch.equal(y, sparsebert.ops.int8_linear(x, neutral, layout="neutral", **kwargs))
    s = torch.tensor(0.01) if activations == "static" else (x.abs().amax(-1) / torch.tensor(127.0)).unsqueeze(1)
    q, _ = int8_format.quantize_rows(x, s if activations == "static" else None)
    product = (q.long() @ values.long().t()).float() * s * neutral[1]
    # As above: a fused multiply-add may save a rounding.
    allowed = 2 * torch.finfo(torch.float32).eps * (product.abs() + kwargs["bias"].abs())
    assert ((y - (product + kwargs["bias"])).abs() <= allowed).all()


@given(
    rows=st.integers(0, 3),
    columns=st.integers(0, 2600),
    low=st.sampled_from([-127, 0, 100, 127]),
    seed=st.integers(0, 99),
)
def test_slices_are_as_long_as_exactness_allows(rows, columns, low, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, 128, (rows, columns), generator=generator).to(torch.int8)
    ends = int8.slice_ends(values)
    assert ends == sorted(set(ends)) and ends[-1] == columns and all(0 < end for end in ends[:-1])
    limit, start = 2**24 // 127, 0
    sums = values.long().abs()
    for end in ends:
        assert not rows or not columns or sums[:, start:end].sum(1).max() <= limit
        if end < columns:
            assert sums[:, start : end + 1].sum(1).max() > limit
        start = end


@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_no_result_depends_on_uninitialized_memory(kind, layout):
    """torch fills what ``empty`` gives with NaN or the largest integer under deterministic algorithms."""
    made = make(kind)
    x = rows_of(made, 7)
    expected, expected_weight = run(made, layout, x, made.bias), held(made, layout)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = make(kind)
        for tensor, clean in zip(held(poisoned, layout), expected_weight, strict=True):
            assert torch.equal(tensor, clean)
        assert torch.equal(run(poisoned, layout, x, made.bias), expected)
        assert run(poisoned, layout, x[:0], made.bias).shape == (0, OUT)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "layout"), pairs("int8", "int8-static+1:4", without=("dense",)))
def test_scales_may_come_in_any_float_dtype(kind, layout, dtype):
    made = make(kind)
    scaled = [t.to(dtype) if t.is_floating_point() else t for t in made.neutral]
    rounded = [t.float() if t.is_floating_point() else t for t in scaled]
    x = rows_of(made, 7)
    y = run(made._replace(neutral=scaled), layout, x, made.bias)
    assert y.dtype == torch.float32 and torch.equal(y, run(made._replace(neutral=rounded), layout, x, made.bias))


@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_rows_of_x_do_not_touch_each_other(kind, layout):
    made = make(kind)
    weight, x = held(made, layout), rows_of(made, 7)
    x[2] = 0
    expected = run(made, layout, x, made.bias, weight=weight)
    assert torch.equal(expected[2], made.bias)
    for poison in (float("nan"), float("inf")):
        broken = x.clone()
        broken[4, 1] = poison
        y = run(made, layout, broken, made.bias, weight=weight)
        others = [0, 1, 2, 3, 5, 6]
        assert torch.equal(y[others], expected[others])
        if "static" not in kind and in_features_of(kind) and kind != "nothing":
            assert not torch.isfinite(y[4]).all()


def test_labels_say_what_a_weight_is():
    labels = {kind: make(kind).spec.label for kind in KINDS}
    assert labels["nm-2:4"] == "2:4" and labels["low-rank"] == "rank 5"
    assert labels["rows"] == "rank 5 + 4 rows" and labels["factors+2:4"] == "rank 5 + 2:4"
    assert labels["factors+bitmap"].startswith("rank 5 + bitmap 0.0997")
    assert (labels["bitmap-nothing"], labels["int8"], labels["int8-static+1:4"]) == (
        "bitmap 0",
        "int8 dynamic",
        "int8 static 1:4",
    )
    assert NMSpec(2, 4, 8, 8).label == "2:4" and labels["dense"] == "dense"


# Columns of x


def columns_case(kind, dtype):
    """A made weight, a wider x, and the columns of it that the weight has."""
    made = make(kind, dtype)
    wide = made.spec.in_features + 24
    generator = torch.Generator().manual_seed(3)
    columns = torch.sort(torch.randperm(wide, generator=generator)[: made.spec.in_features]).values.to(torch.int32)
    return made, torch.randn(2, 5, wide, generator=generator, dtype=torch.float64).to(dtype), columns


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_columns_are_those_of_x_gathered(kind, layout):
    made, x, columns = columns_case(kind, torch.float32)
    y = run(made, layout, x, made.bias, columns=columns)
    assert torch.equal(y, run(made, layout, x.index_select(-1, columns), made.bias))
    arguments = (x, held(made, layout), made.bias, columns)
    torch.library.opcheck(op_of(made), arguments, {"layout": layout, **made.spec._asdict()})


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_gradients_go_to_the_columns(kind):
    made, x, columns = columns_case(kind, torch.float64)
    weight = held(made, "neutral", torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(made, "neutral", x, columns=columns, weight=weight), (x,))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda c: c[:-1], ValueError, r"columns has shape \(\d+,\), expected \(\d+,\)"),
        (lambda c: c.long(), TypeError, "columns is torch.int64, expected torch.int32"),
        (lambda c: c.to("meta"), ValueError, "columns is on meta, expected cpu as x"),
    ],
)
def test_columns_that_do_not_fit(change, error, text):
    made, x, columns = columns_case("nm-2:4", torch.float32)
    with pytest.raises(error, match=f"^nm_linear: {text}"):
        run(made, "neutral", x, columns=change(columns))
    with pytest.raises(ValueError, match=r"^nm_linear: x has shape \(4,\), expected \(..., \d+ or more\)"):
        run(made, "neutral", x[0, 0, :4], columns=columns)
