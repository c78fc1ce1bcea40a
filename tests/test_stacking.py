"""One packed layer for several that read the same x: its numbers are theirs, and it gives each back to the bit."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsebert as sb
from packed_cases import INPUT_SCALE, KINDS, LEAD, OUT, RANK, computed_pairs, linear_of, make, pairs
from sparsebert.formats import bitmap, low_rank, nm, rows
from sparsebert.nn import MODULES, DenseLinear, Int8Linear, LowRankLinear, split, stack, stack_refusal
from sparsebert.ops import layouts, low_rank_linear, measurements, select
from sparsebert.ops.devices import Device
from sparsebert.ops.specs import SPECS, LowRankSpec, NMSpec

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FACTORED = ("low-rank", "rows", "rows-0", "factors+2:4", "factors+bitmap")
QUANTIZING = [(kind, layout) for kind, layout in pairs(*KINDS) if kind.startswith("int8") and layout != "dense"]
# What only a GPU is let to hold, in which the reference computes here too.
KERNELS = [("nm-2:4", "mma_sp"), ("nm-1:4", "mma_sp"), ("int8+2:4", "mma_sp"), ("bitmap-half", "chunked")]
HELD = [
    (kind, layout, dtype)
    for kind, layout in [*computed_pairs(*FACTORED, "int8+2:4", "nm-2:4"), *KERNELS]
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    # A float weight is held so in 16 bits alone.
    if not (layout == "mma_sp" and kind.startswith("nm") and dtype == torch.float32)
]
# How many features each part has: factors come in parts of one size.
EVEN, ODD = (OUT, OUT, OUT), (OUT, 8, 21)


def sizes_of(kind):
    return EVEN if kind in FACTORED else ODD


def module_of(made, layout="neutral", *, bias=True):
    linear = linear_of(made, bias=bias)
    module = MODULES[made.config.format].from_linear(linear, made.config, name="layer", factors=made.factors)
    if made.spec.op == "int8_linear" and made.spec.activations == "static":
        module.set_input_scale_(INPUT_SCALE)
    return module.prepare_(layout)


def parts_of(kind, layout="neutral", dtype=torch.float32, *, sizes=None, bias=True):
    """Layers of ``sizes``, each with a weight of its own; what was made first."""
    made = [make(kind, dtype, out=out, seed=seed) for seed, out in enumerate(sizes or sizes_of(kind))]
    return made, [module_of(one, layout, bias=bias) for one in made]


def same_weight(module, other):
    """Spec, neutral tensors and bias, to the bit."""
    assert type(module) is type(other) and module.spec == other.spec
    for tensor, expected in zip(module.neutral(), other.neutral(), strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert (module.bias is None) == (other.bias is None)
    assert module.bias is None or torch.equal(module.bias, other.bias)


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), [pair for pair in pairs(*KINDS) if pair not in QUANTIZING])
def test_a_stack_computes_what_its_parts_do(kind, layout, dtype):
    """Against float64 as near as the parts by themselves."""
    made, parts = parts_of(kind, layout, dtype)
    whole = stack(parts)
    assert type(whole) is type(parts[0]) and whole.layout == layout and whole.dtype == dtype
    assert whole.out_features == whole.dense_out_features == sum(sizes_of(kind))
    x = torch.randn(33, whole.in_features, dtype=torch.float64).to(dtype)
    apart = torch.cat([part(x) for part in parts], -1)
    exact = torch.cat([F.linear(x.double(), one.exact, one.bias.double()) for one in made], -1)
    unit = torch.finfo(dtype).eps * exact.abs().max()
    # Nothing is more exact than float64: there by as many roundings as there are products in a sum.
    allowed = 2 * (apart.double() - exact).abs().max() + unit * (x.shape[1] if dtype == torch.float64 else 1)
    for tokens in (33, 7, 1, 0):
        y = whole(x[:tokens])
        assert y.shape == (tokens, whole.out_features) and y.dtype == dtype and y.is_contiguous()
        assert not tokens or (y.double() - exact[:tokens]).abs().max() <= allowed
        with sb.backend("reference"):
            assert not tokens or (whole(x[:tokens]).double() - exact[:tokens]).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), QUANTIZING)
def test_a_stack_of_int8_is_its_parts_to_the_bit(kind, layout, dtype):
    _, parts = parts_of(kind, layout, dtype)
    whole = stack(parts)
    x = torch.randn(33, whole.in_features).to(dtype)
    assert whole.layout == layout and torch.equal(whole(x), torch.cat([part(x) for part in parts], -1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_a_stack_is_that_of_its_parts(kind):
    _, parts = parts_of(kind)
    whole = stack(parts)
    expected = torch.cat([part.dense_weight() for part in parts])
    assert torch.equal(whole.dense_weight(), expected)
    back = whole.to_linear()
    assert torch.equal(back.weight, expected) and torch.equal(back.bias, torch.cat([part.bias for part in parts]))


@pytest.mark.parametrize(("kind", "layout", "dtype"), HELD)
def test_each_layout_holds_a_stack_and_its_reference_multiplies_it(kind, layout, dtype):
    # The layout dense of int8 does not quantize x, all others do.
    _, parts = parts_of(kind, "dense" if layout == "dense" else "neutral", dtype)
    whole = stack(parts)
    spec, neutral, op = whole.spec, list(whole.neutral()), whole.spec.op
    known = layouts.get(op, layout)
    weight = known.from_neutral(neutral, spec, dtype)
    for tensor, held in zip(weight, layouts.tensors(spec, layout).values(), strict=True):
        assert held.shape in (None, tuple(tensor.shape))
    for tensor, expected in zip(known.to_neutral(weight, spec), neutral, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert torch.equal(known.to_dense(weight, spec, dtype), torch.cat([part.dense_weight() for part in parts]))
    x = torch.randn(9, spec.in_features).to(dtype)
    (reference,) = (c for c in select.candidates(op, layout) if c.backend == "reference")
    y = reference.run(x, weight, whole.bias, select.problem_of(spec, layout, x, "none"))
    apart = torch.cat([part(x) for part in parts], -1)
    if op == "int8_linear" and layout != "dense":
        assert torch.equal(y, apart)
    else:
        torch.testing.assert_close(y, apart, rtol=4 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_stack_has_the_activation_of_its_parts(activation):
    _, parts = parts_of("low-rank")
    for part in parts:
        part.activation = activation
    whole = stack(parts)
    x = torch.randn(5, whole.in_features)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), torch.cat([part(x) for part in parts], -1))
    assert all(part.activation == activation for part in split(whole, 3))


def test_gradients_reach_x_and_the_bias():
    _, parts = parts_of("rows", "stacked", torch.float64)
    whole = stack(parts)
    x = torch.randn(4, whole.in_features, dtype=torch.float64, requires_grad=True)
    torch.cat([part(x) for part in parts], -1).square().sum().backward()
    expected, x.grad = x.grad, None
    whole(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(whole.bias.grad, torch.cat([part.bias.grad for part in parts]))


# The ops with parts


@pytest.mark.parametrize(("kind", "layout"), computed_pairs("low-rank", "rows", "factors+2:4", "factors+bitmap"))
def test_opcheck_with_parts(kind, layout):
    _, parts = parts_of(kind, sizes=(6, 6, 6))
    whole = stack(parts)
    spec, bias = whole.spec, whole.bias.detach()
    assert spec.parts == 3
    weight = layouts.get(spec.op, layout).from_neutral(list(whole.neutral()), spec, torch.float32)
    op, kwargs = getattr(torch.ops.sparsebert, spec.op).default, {"layout": layout, **spec._asdict()}
    x = torch.randn(3, spec.in_features)
    torch.library.opcheck(op, (x, weight, bias), {**kwargs, "activation": "gelu"})
    torch.library.opcheck(op, (x.clone().requires_grad_(), weight, bias.clone().requires_grad_()), kwargs)
    unpack = getattr(torch.ops.sparsebert, f"{spec.op}_unpack").default
    torch.library.opcheck(unpack, (weight,), {**kwargs, "dtype": torch.float32})


def test_a_stack_compiles_whole():
    whole = stack(parts_of("low-rank")[1])
    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        x = torch.randn(tokens, whole.in_features)
        torch.testing.assert_close(compiled(x), whole(x))
    torch._dynamo.reset()


def test_without_parts_an_op_is_as_it_was():
    made = make("low-rank")
    x, sizes = torch.randn(3, made.spec.in_features), made.spec._asdict()
    assert sizes.pop("parts") == 1
    y = low_rank_linear(x, made.neutral, made.bias, layout="neutral", **sizes)
    assert torch.equal(y, low_rank_linear(x, made.neutral, made.bias, layout="neutral", parts=1, **sizes))
    with_parts = {name for name, spec in SPECS.items() if "parts" in spec._fields}
    assert with_parts == {"low_rank_linear", "low_rank_sparse_linear"}
    for name in with_parts:
        for op in (name, f"{name}_unpack"):
            arguments = getattr(torch.ops.sparsebert, op).default._schema.arguments
            assert [a.default_value for a in arguments if a.name == "parts"] == [1]


@pytest.mark.parametrize("parts", [0, -1, 2, 38])
def test_parts_that_no_weight_has(parts):
    spec = LowRankSpec(RANK, 45, OUT, parts)
    with pytest.raises(ValueError, match=f"low_rank: parts is {parts}, expected a number that divides out_features=37"):
        layouts.tensors(spec, "neutral")
    made = make("low-rank")
    with pytest.raises(ValueError, match=f"low_rank: parts is {parts}"):
        low_rank.validate(*made.neutral, RANK, OUT, 45, parts=parts)


def test_the_tensors_of_parts_are_checked():
    whole = stack(parts_of("low-rank")[1])
    u, v = whole.neutral()
    x, sizes = torch.randn(2, 45), whole.spec._asdict()
    with pytest.raises(ValueError, match=r"weight_v has shape \(5, 45\), expected \(15, 45\) .* at 3 of rank 5"):
        low_rank_linear(x, [u, v[:5]], None, layout="neutral", **sizes)
    with pytest.raises(ValueError, match=r"expected \(out_features, rank\) and \(3 \* rank, in_features\)"):
        low_rank.unpack(u, v[:6], 3)
    with pytest.raises(ValueError, match=r"layer: v has shape \(6, 45\), expected \(15, 45\)"):
        low_rank.validate(u, v[:6], RANK, 3 * OUT, 45, parts=3, name="layer")
    with pytest.raises(ValueError, match="layer: rank is 38, expected 1 to 37"):
        low_rank.validate(u, v, 38, 3 * OUT, 45, parts=3, name="layer")


# There and back


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), pairs(*KINDS))
def test_splitting_gives_the_parts_back(kind, layout, dtype, bias):
    _, parts = parts_of(kind, layout, dtype, bias=bias)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    whole = stack(parts)
    sizes = sizes_of(kind)
    # A way of its own, through whatever layout the whole is in.
    for counts in ([*sizes], 3) if sizes is EVEN else ([*sizes],):
        for part, expected in zip(split(whole, counts), parts, strict=True):
            same_weight(part, expected)
            assert part.layout == layout == part.requested_layout and part.dtype == dtype
            assert part.layer_entry() == expected.layer_entry()
            x = torch.randn(3, part.in_features).to(dtype)
            assert torch.equal(part(x), expected(x))
    again = split(whole, [*sizes])
    # Nothing is shared: neither with the parts nor with the whole.
    for tensor in (*whole.buffers(), *(() if whole.bias is None else (whole.bias.data,))):
        tensor.zero_()
    for part, copied, state in zip(parts, again, states, strict=True):
        assert part.layout == layout and part.state_dict().keys() == state.keys()
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, state[name])
            assert torch.equal(copied.state_dict()[name], state[name])


@settings(max_examples=60)
@given(
    st.sampled_from(["nm", "bitmap", "int8", "dense", "low_rank", "rows", "bitmap+"]),
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.integers(1, 5),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 999),
)
def test_any_sizes_there_and_back(kind, sizes, groups, density, bias, seed):
    """Odd sizes, empty rows, empty weights, parts that differ in how much they keep."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * (8 if kind == "nm" else 3)
    if kind in ("low_rank", "rows", "bitmap+"):
        sizes = [sizes[0]] * len(sizes)
    parts = []
    for out in sizes:
        linear = nn.Linear(columns, out, bias=bias)
        mask = torch.rand(out, columns, generator=generator) < density * torch.rand(1, generator=generator)
        weight, factors = linear.weight.data, {}
        config = {
            "nm": sb.NMConfig(3, 8),
            "bitmap": sb.BitmapConfig(0.5),
            "int8": sb.Int8Config(),
            "dense": sb.DenseConfig(),
            "low_rank": sb.LowRankConfig(1),
            "rows": sb.LowRankSparseConfig(1, sparse=sb.RowsConfig(float(torch.rand(1, generator=generator)))),
            "bitmap+": sb.LowRankSparseConfig(1, sparse=sb.BitmapConfig(0.5)),
        }[kind]
        if kind == "nm":
            weight = nm.project(weight * mask, 3, 8)
        elif kind == "bitmap":
            weight = weight * mask
        elif kind in ("low_rank", "rows", "bitmap+"):
            factors = {"u": torch.randn(out, 1, generator=generator), "v": torch.randn(1, columns, generator=generator)}
            if kind != "low_rank":
                kept = rows.row_count(config.sparse.ratio, out) if kind == "rows" else 0
                factors["sparse"] = rows.project(weight, kept // 2) if kind == "rows" else weight * mask
            weight = factors["u"] @ factors["v"] + factors.get("sparse", 0)
        linear.weight.data = weight
        parts.append(MODULES[config.format].from_linear(linear, config, factors=factors).prepare_())
    whole = stack(parts)
    for part, expected in zip(split(whole, sizes), parts, strict=True):
        same_weight(part, expected)
    # The whole is a valid weight of its own, by the format's checks.
    whole._validate(whole.neutral(), "whole")
    x = torch.randn(4, columns, generator=generator)
    torch.testing.assert_close(whole(x), torch.cat([part(x) for part in parts], -1), rtol=1e-5, atol=1e-5)
    if kind not in ("low_rank", "rows", "bitmap+"):
        # Two at a time, and a stack of stacks.
        again = stack([whole, parts[0]])
        same_weight(split(again, [whole.out_features, sizes[0]])[0], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_asked_for_as_the_parts_did(kind):
    _, parts = parts_of(kind, "dense")
    assert stack(parts).requested_layout == stack(parts).layout == "dense"
    parts[0].prepare_("auto")
    whole = stack(parts)
    assert whole.requested_layout == "auto" and whole.layout == copy.deepcopy(whole).prepare_("auto").layout
    for part in split(whole.prepare_("neutral"), [*sizes_of(kind)]):
        assert part.layout == part.requested_layout == "neutral"


def test_a_layout_that_the_stack_cannot_have_is_auto(monkeypatch):
    """As when a module moves to a device without it."""
    _, parts = parts_of("nm-2:4", "dense")
    monkeypatch.setattr(type(parts[0]), "layout_refusal", lambda self, layout: "no" if layout == "dense" else None)
    whole = stack(parts)
    assert whole.requested_layout == "auto" and {part.requested_layout for part in split(whole, [*ODD])} == {"auto"}


def test_whether_a_bias_trains_and_a_module_does_is_kept():
    _, parts = parts_of("nm-2:4")
    for part in parts:
        part.eval().requires_grad_(False)
    whole = stack(parts)
    assert not whole.training and not whole.bias.requires_grad and type(whole.bias) is nn.Parameter
    assert not any(part.training or part.bias.requires_grad for part in split(whole, [*ODD]))
    parts[1].train().bias.requires_grad_()
    assert stack(parts).bias.requires_grad and all(p.bias.requires_grad for p in split(stack(parts), [*ODD]))


# Columns


def with_columns(columns, *, seed=0, compact_input=False):
    generator = torch.Generator().manual_seed(seed)
    config = sb.NMConfig(2, 4, columns=0.5)
    linear = nn.Linear(64, 20)
    kept = torch.randn(20, len(columns), generator=generator)
    weight = torch.zeros(20, 64).index_copy_(1, columns.long(), nm.project(kept, 2, 4))
    linear.weight.data = weight
    cls = MODULES[config.format]
    return cls.from_linear(linear, config, columns=columns, compact_input=compact_input)


@pytest.mark.parametrize("layout", ["neutral", "dense"])
@pytest.mark.parametrize("compact_input", [False, True])
def test_columns_that_all_parts_have_are_those_of_the_stack(layout, compact_input):
    columns = torch.arange(1, 64, 2, dtype=torch.int32)
    options = {"compact_input": compact_input}
    parts = [with_columns(columns, seed=seed, **options).prepare_(layout) for seed in range(3)]
    whole = stack(parts)
    assert (whole.in_features, whole.dense_in_features) == (32 if compact_input else 64, 64)
    assert torch.equal(whole.columns, columns) and whole.compact_input == compact_input
    x = torch.randn(5, whole.in_features)
    torch.testing.assert_close(whole(x), torch.cat([part(x) for part in parts], -1))
    for part, expected in zip(split(whole, 3), parts, strict=True):
        same_weight(part, expected)
        assert torch.equal(part.columns, columns) and part.compact_input == compact_input
        assert part.columns.data_ptr() != whole.columns.data_ptr() != expected.columns.data_ptr()


# What a stack does as a module


@pytest.mark.parametrize(("kind", "layout"), pairs(*LEAD))
def test_a_stack_loads_its_own_state_and_copies(kind, layout):
    _, parts = parts_of(kind, layout, sizes=EVEN)
    whole, other = stack(parts), stack(parts[::-1])
    x = torch.randn(3, whole.in_features)
    assert not torch.equal(other(x), whole(x))
    other.load_state_dict(whole.state_dict())
    same_weight(other, whole)
    assert other.layout == layout
    assert whole.disk_bytes() == sum(t.nbytes for t in whole.state_dict().values())
    assert whole.dense_bytes() == sum(part.dense_bytes() for part in parts)
    assert torch.equal(other(x), whole(x))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("kind", "layout"), pairs(*LEAD))
def test_a_stack_is_cast_as_its_parts_are(kind, layout, dtype):
    """Weights that round to zero too, which leave the packed tensors of each."""
    _, parts = parts_of(kind, layout)
    for part in parts:
        state = {key: t.clone() for key, t in part.state_dict().items()}
        name = "sparse.values" if "sparse.values" in state else "values"
        if name in state and state[name].dtype == torch.float32:
            # Below half of the least number of fp16, or whole rows of them.
            state[name][: max(1, len(state[name]) // 3)] = 1e-30
            part.load_state_dict(state)
    whole = stack(parts).to(dtype)
    for part, expected in zip(split(whole, [*sizes_of(kind)]), [part.to(dtype) for part in parts], strict=True):
        same_weight(part, expected)
        assert part.layout == expected.layout


def test_a_stack_of_rows_refuses_a_state_that_is_none():
    """Spare rows are the lowest of their own part: that is what split gives back."""
    _, parts = parts_of("rows")
    whole = stack(parts)
    state = whole.state_dict()
    assert state["sparse.rows"].tolist() != sorted(state["sparse.rows"].tolist(), reverse=True)
    values = state["sparse.values"].clone()
    values[-1] = 0
    with pytest.raises(ValueError, match="sparse: rows has the spare .*, which is not the lowest that is free"):
        whole.load_state_dict({**state, "sparse.values": values})
    for label, tensor in (("rows", state["sparse.rows"].flip(0)), ("v", state["v"] * math.nan)):
        name = f"sparse.{label}" if label == "rows" else label
        with pytest.raises(ValueError, match=label):
            whole.load_state_dict({**state, name: tensor})


@pytest.mark.parametrize("kind", FACTORED)
def test_a_stack_of_factors_is_on_no_disk(kind):
    whole = stack(parts_of(kind)[1])
    message = re.escape(f"{type(whole).__name__}: a stack of {whole.spec.label} has no entry in a layer map, expected")
    with pytest.raises(ValueError, match=f"^{message}"):
        whole.layer_entry()
    assert whole.spec.label.startswith("3 of rank 5") and whole.spec.label in repr(whole)


def test_a_stack_has_measurements_of_its_own(tmp_path, monkeypatch):
    """And those that were written without parts are found as before."""
    monkeypatch.setenv(measurements.ENVIRONMENT_VARIABLE, str(tmp_path))
    cpu = torch.device("cpu")
    one, three = LowRankSpec(48, 768, 2304), LowRankSpec(48, 768, 2304, 3)
    for spec, layout in ((one, "neutral"), (three, "dense")):
        for name in ("neutral", "dense"):
            row = measurements.make_row(
                spec,
                name,
                128,
                torch.float32,
                cpu,
                median_us=1.0 if name == layout else 9.0,
                mad_us=0.0,
                backend="reference",
            )
            assert row.op == f"low_rank_linear {'rank 48' if spec is one else '3 of rank 48'}"
            measurements.record([row])
    for spec, layout in ((one, "neutral"), (three, "dense")):
        assert measurements.fastest_layout(spec, torch.float32, cpu).layout == layout
    assert len(measurements.load()) == 4


def test_explain_reads_a_stack():
    model = nn.ModuleDict({kind.replace(".", "_"): stack(parts_of(kind)[1]) for kind in LEAD})
    text = str(sb.explain(model))
    assert "3 of rank 5 + 12 rows" in text and "dense_linear" not in text
    assert str(sb.size_report(model))


def test_the_2_4_kernel_takes_one_product_of_factors():
    made, parts = parts_of("factors+2:4")
    whole = stack([part.half() for part in parts])
    layout = layouts.get("low_rank_sparse_linear", "mma_sp")
    reason = "needs one product of factors, not 3"
    assert layout.supports(whole.spec, torch.float16, torch.device("cpu")) == reason
    (cuda,) = (c for c in select.candidates(layout.op, "mma_sp") if c.backend == "cuda")
    problem = select.Problem("mma_sp", Device("cuda", "H200", (9, 0)), torch.float16, whole.spec, 5, "none")
    assert cuda.supports(problem) == reason
    assert NMSpec(2, 4, 52, 3 * OUT) == stack(parts_of("nm-2:4", sizes=EVEN)[1]).spec


# What is refused


def changed(kind="nm-2:4", change=lambda parts: None, **options):
    parts = parts_of(kind, **options)[1]
    return change(parts) or parts


def swap(place, kind, **options):
    """Another layer in the place of one."""

    def change(parts):
        parts[place] = parts_of(kind, **options)[1][0]

    return change


def replaced(place, make_layer):
    def change(parts):
        parts[place] = make_layer()

    return change


COLUMNS = torch.arange(1, 64, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (lambda: [], "found 0 layers, expected two or more"),
        (lambda: changed()[:1], "found 1 layer, expected two or more"),
        (lambda: changed(change=swap(1, "bitmap-half")), "part 1 is a BitmapLinear, expected NMLinear as part 0"),
        (lambda: [*changed()[:2], nn.Linear(52, 37)], "part 2 is a Linear, expected a packed layer"),
        (lambda: changed(change=lambda p: p[0].to("meta") and None), "part 0 is on meta, expected a layer with its"),
        (
            lambda: changed(change=swap(2, "nm-1:4")),
            "part 2 has n 1, expected 2 as part 0",
        ),
        (lambda: changed(change=swap(1, "nm-3:8")), "part 1 has in_features 56, expected 52 as part 0"),
        (
            lambda: changed(change=lambda p: p[1].half() and None),
            "part 1 is in torch.float16, expected torch.float32 as part 0",
        ),
        (
            lambda: [with_columns(COLUMNS), with_columns(COLUMNS - 1)],
            "part 1 has other columns than part 0, expected the same",
        ),
        (
            lambda: [with_columns(COLUMNS), with_columns(COLUMNS[:16])],
            "part 1 has columns 16, expected 32 as part 0",
        ),
        (
            lambda: [with_columns(COLUMNS), module_of_nm(64)],
            "part 1 has columns none, expected 32 as part 0",
        ),
        (
            lambda: [with_columns(COLUMNS), with_columns(COLUMNS, compact_input=True)],
            "part 1 has compact_input True, expected False as part 0",
        ),
        (
            lambda: changed(change=replaced(1, lambda: with_kept_rows("nm-2:4"))),
            "part 1 has kept_rows, 8 of 37, expected a layer with all of its outputs",
        ),
        (
            lambda: changed(change=lambda p: setattr(p[2], "activation", "gelu")),
            "part 2 has activation gelu, expected none as part 0",
        ),
        (
            lambda: changed(change=replaced(0, lambda: parts_of("nm-2:4", bias=False)[1][0])),
            "part 1 has bias True, expected False as part 0",
        ),
        (
            lambda: changed("low-rank", sizes=(OUT, OUT + 1)),
            "part 1 has out_features 38, expected 37 as part 0",
        ),
        (
            lambda: changed("low-rank", change=replaced(1, lambda: filled(LowRankLinear(45, OUT, RANK + 1)))),
            "part 1 has rank 6, expected 5 as part 0",
        ),
        (
            lambda: [*changed("factors+2:4")[:1], *changed("factors+bitmap")[:1]],
            "part 1 has in_features 45, expected 52 as part 0",
        ),
        (
            lambda: [*changed("rows")[:1], *changed("factors+bitmap")[:1]],
            "part 1 has sparse bitmap, expected rows as part 0",
        ),
        (
            lambda: [stack(changed("low-rank")), stack(changed("low-rank"))],
            "part 0 is a stack of 3 already, expected single layers",
        ),
        (
            lambda: [stack(changed("rows")), stack(changed("rows"))],
            "part 0 is a stack of 3 already, expected single layers",
        ),
        (
            lambda: [*changed("int8")[:1], *changed("int8-static")[:1]],
            "part 1 has activations static, expected dynamic as part 0",
        ),
        (
            lambda: changed("int8-static", change=lambda p: p[2].set_input_scale_(0.5)),
            "part 2 has input_scale 0.5, expected 0.02 as part 0",
        ),
        (
            lambda: changed("int8-static", change=replaced(1, lambda: uncalibrated())),
            "part 1 has no input_scale yet; call sparsebert.calibrate(model, batches) first",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(parts, reason):
    parts = parts()
    assert stack_refusal(parts).startswith(reason)
    with pytest.raises(ValueError, match=f"^stack: {re.escape(reason)}"):
        stack(parts)


def module_of_nm(columns):
    linear = nn.Linear(columns, 20)
    linear.weight.data = nm.project(linear.weight.data, 2, 4)
    return MODULES["nm"].from_linear(linear, sb.NMConfig(2, 4))


def with_kept_rows(kind):
    made = make(kind)
    kept = torch.arange(0, 32, 4, dtype=torch.int32)
    return MODULES[made.config.format].from_linear(linear_of(made), made.config, kept_rows=kept)


def uncalibrated():
    made = make("int8-static")
    return Int8Linear.from_linear(linear_of(made), made.config)


def filled(module):
    for tensor in module.buffers():
        tensor.normal_()
    return module


def test_what_fits_together_is_not_refused():
    for kind in KINDS:
        assert stack_refusal(parts_of(kind)[1]) is None


@pytest.mark.parametrize(
    ("kind", "counts", "message"),
    [
        ("nm-2:4", 2, "split: NMLinear has out_features 111, expected a multiple of 2 parts"),
        ("nm-2:4", 0, "split: NMLinear has out_features 111, expected a multiple of 0 parts"),
        (
            "nm-2:4",
            [37, 37],
            "split: NMLinear has out_features 111, expected [37, 37] to be above 0 and add up to that",
        ),
        ("dense", [111, 0], "split: DenseLinear has out_features 111, expected [111, 0] to be above 0 and add up"),
        ("dense", [112, -1], "split: DenseLinear has out_features 111, expected [112, -1] to be above 0 and add up"),
        ("dense", [], "split: DenseLinear has out_features 111, expected [] to be above 0 and add up to that"),
        (
            "low-rank",
            [37, 74],
            "split: counts are [37, 74], expected [37, 37, 37], as a weight of 3 of rank 5 is made of these",
        ),
        (
            "rows",
            [74, 37],
            "split: counts are [74, 37], expected [37, 37, 37], as a weight of 3 of rank 5 + 12 rows is made of these",
        ),
    ],
)
def test_counts_that_do_not_part_a_weight_are_refused(kind, counts, message):
    whole = stack(parts_of(kind, sizes=EVEN)[1])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        split(whole, counts)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="split: NMLinear has kept_rows, 8 of 37, expected all of its outputs"):
        split(with_kept_rows("nm-2:4"), 2)
    with pytest.raises(ValueError, match="split: DenseLinear is on meta, expected a layer with its weight"):
        split(DenseLinear(8, 6, device="meta"), 2)
    with pytest.raises(ValueError, match=re.escape("split: counts are [12, 12], expected [24]")):
        split(filled(LowRankLinear(45, 24, RANK)), 2)


def test_an_int8_layer_without_an_input_scale_stays_so():
    made = make("int8-static", out=36)
    parts = split(Int8Linear.from_linear(linear_of(made), made.config), 3)
    for part in parts:
        with pytest.raises(RuntimeError, match="static activations have no input_scale yet"):
            part(torch.randn(2, 45))
    assert all(part.has_input_scale for part in split(stack(parts_of("int8-static")[1]), [*ODD]))


# The formats


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 19), st.integers(0, 999))
def test_bitmaps_one_under_the_other_are_the_bitmap_of_all(sizes, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(out, columns, generator=generator) * (torch.rand(out, columns, generator=generator) < 0.3)
        for out in sizes
    ]
    packed = [bitmap.pack(weight) for weight in weights]
    whole = bitmap.stack(packed)
    for tensor, expected in zip(whole, bitmap.pack(torch.cat(weights)), strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    for part, expected in zip(bitmap.split(*whole, sizes), packed, strict=True):
        for tensor, own in zip(part, expected, strict=True):
            assert tensor.dtype == own.dtype and torch.equal(tensor, own)
            assert tensor.untyped_storage().nbytes() == own.untyped_storage().nbytes()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 999))
def test_rows_one_under_the_other_come_back_with_their_spares(sizes, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weights, packed = [], []
    for out in sizes:
        used = torch.rand(out, 1, generator=generator) < 0.4
        weights.append(torch.randn(out, columns, generator=generator) * used)
        least = int((weights[-1] != 0).any(1).sum())
        packed.append(rows.pack(weights[-1], least + int(torch.randint(0, out - least + 1, (), generator=generator))))
    whole = rows.stack(packed, sizes)
    assert torch.equal(rows.unpack(*whole, sum(sizes)), torch.cat(weights)) and whole[0].dtype == torch.int32
    for part, expected in zip(rows.split(*whole, sizes), packed, strict=True):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(part, expected, strict=True))
    if len(set(sizes)) == 1:
        count = len(whole[0])
        rows.validate(*whole, count, sum(sizes), columns, parts=len(sizes))
