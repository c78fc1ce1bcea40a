"""Packed modules: one layout held, neutral tensors saved, and nothing that nn.Module does breaks that."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsebert as sb
from packed_cases import INPUT_SCALE, KINDS, LEAD, OUT, RANK, in_features_of, linear_of, make, packed, pairs
from sparsebert.formats import bitmap, nm
from sparsebert.nn import (
    MODULES,
    BitmapLinear,
    DenseLinear,
    Int8Linear,
    LowRankLinear,
    LowRankSparseLinear,
    NMLinear,
    module_from_entry,
)
from sparsebert.ops import layouts
from sparsebert.ops.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_PAIRS, LEAD_PAIRS = pairs(*KINDS), pairs(*LEAD)
STATIC = [kind for kind in KINDS if "static" in kind]
# Those that multiply x with the unpacked weight: int8 rounds x, factors come one after the other.
PLAIN = [kind for kind in KINDS if kind.startswith(("nm", "bitmap", "dense"))]


def same(a, b):
    """Equal tensors, dtypes and devices, name by name."""
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def neutral_of(kind, dtype=torch.float32, *, bias=True):
    """What a checkpoint must hold."""
    made = make(kind, dtype)
    tensors = dict(zip(layouts.tensors(made.spec, "neutral"), made.neutral, strict=True))
    return tensors | ({"bias": made.bias} if bias else {})


def close(actual, expected):
    """Up to the rounding of sums in another order."""
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_takes_the_place_of_a_linear(kind, layout, bias):
    made, module = make(kind), packed(kind, layout, bias=bias)
    assert type(module) is MODULES[made.config.format] and module.layout == layout
    assert (module.in_features, module.out_features) == (in_features_of(kind), OUT)
    assert (module.bias is None) == (not bias)
    back = module.to_linear()
    assert type(back) is nn.Linear and back.bias is module.bias and back.weight.dtype == torch.float32
    # The weight of a factored layer is a product, which is summed here in float64 and there in float32.
    close(back.weight.detach(), made.exact.float())
    if not made.factors:
        assert torch.equal(back.weight, made.exact.float())
    assert torch.equal(module.dense_weight(), back.weight)
    x = torch.randn(2, 5, in_features_of(kind))
    if kind in PLAIN or layout == "dense":
        close(module(x), back(x))
    elif made.factors:
        # Two sums instead of one.
        torch.testing.assert_close(module(x), back(x), rtol=1e-5, atol=1e-4)
    else:
        # Each of the numbers of x moves by half a step of int8 at most (static: none of them is clipped).
        x = x.clamp(-127 * INPUT_SCALE, 127 * INPUT_SCALE)
        step = INPUT_SCALE if kind in STATIC else x.abs().amax(-1, keepdim=True) / 127
        allowed = step / 2 * back.weight.abs().sum(1) * 1.001
        assert ((module(x) - back(x)).abs() <= allowed).all()
        assert not torch.equal(module(x), back(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_it_is_made_of_stays(kind):
    made = make(kind)
    linear = linear_of(made).eval()
    module = MODULES[made.config.format].from_linear(linear, made.config, name="layer", factors=made.factors)
    assert module.bias is linear.bias and torch.equal(linear.weight, made.weight) and not module.training
    for tensor in module.buffers():
        tensor.zero_()
    assert torch.equal(linear.weight, made.weight)
    assert all(torch.equal(a, b) for a, b in zip(made.factors.values(), make(kind).factors.values(), strict=True))


def bytes_by_hand(kind, layout, size):
    """``(on disk, in memory)`` without the bias, for ``size`` bytes a float."""
    made, columns = make(kind), in_features_of(kind)
    spec, weights = made.spec, OUT * columns

    def pattern(n, m):
        kept = columns * n // m
        return OUT * kept, OUT * math.ceil(kept * (2 if m <= 4 else 4) / 8)

    def bits(nnz):
        return nnz * size + OUT * math.ceil(columns / 8) + 8 * (OUT + 1)

    if kind.startswith("nm"):
        values, positions = pattern(spec.n, spec.m)
        disk = values * size + positions
        return disk, {"neutral": disk, "dense": weights * size}[layout]
    if kind.startswith("bitmap"):
        disk = bits(int((made.weight != 0).sum()))
        return disk, {"neutral": disk, "dense": weights * size}[layout]
    if kind.startswith("int8"):
        scales = 4 * OUT + 4 * (kind in STATIC)
        values, positions = pattern(spec.n, spec.m) if ":" in kind else (weights, 0)
        disk = values + positions + scales
        # One slice, and its end.
        sizes = {"neutral": disk, "unpacked": weights + scales, "float": 4 * weights + 8 + scales}
        return disk, (sizes | {"dense": weights * size + disk})[layout]
    if kind == "dense":
        return weights * size, weights * size
    disk = (OUT + columns) * RANK * size
    if kind.startswith("rows"):
        count = 4 if kind == "rows" else 0
        disk += 4 * count + count * columns * size
    elif kind == "factors+2:4":
        disk += weights // 2 * size + OUT * math.ceil(columns / 2 * 2 / 8)
    elif kind == "factors+bitmap":
        disk += bits(round(0.1 * weights))
    return disk, {"neutral": disk, "stacked": disk, "dense": disk + weights * size}[layout]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_one_layout_is_held_and_counted(kind, layout, dtype):
    size = dtype.itemsize
    module, spec = packed(kind, layout, dtype), make(kind).spec
    names = set(layouts.tensors(spec, layout))
    expected = names if layout == "neutral" else {f"{layout}_{name.replace('.', '_')}" for name in names}
    assert set(dict(module.named_buffers())) == expected
    disk, memory = bytes_by_hand(kind, layout, size)
    held = sum(t.nbytes for t in (*module.buffers(), *module.parameters()))
    assert module.memory_bytes() == held == memory + OUT * size
    saved = sum(t.nbytes for t in module.state_dict().values())
    assert module.disk_bytes() == saved == disk + OUT * size
    assert module.dense_bytes() == (OUT * in_features_of(kind) + OUT) * size
    module.prepare_("neutral")
    assert set(dict(module.named_buffers())) == set(layouts.tensors(spec, "neutral"))
    assert module.prepare_("auto").layout in layouts.names(spec.op) and module.requested_layout == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_state_dict_is_neutral_whatever_is_held(kind, layout, dtype):
    module = packed(kind, layout, dtype)
    assert same(dict(module.state_dict()), neutral_of(kind, dtype))
    for other in layouts.names(module.spec.op):
        if module.layout_refusal(other) is None:
            assert same(dict(module.prepare_(other).state_dict()), neutral_of(kind, dtype)), other


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_load_state_dict_fills_any_layout(kind, layout):
    source = packed(kind, "neutral")
    target = packed(kind, layout)
    source.bias.data += 1
    for name, tensor in source.named_buffers():
        if tensor.is_floating_point():
            tensor *= 2
        elif name == "values":
            tensor.neg_()
    given = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    target.load_state_dict(given)
    assert target.layout == layout and same(dict(target.state_dict()), given)
    x = torch.randn(3, source.in_features)
    close(target(x), source.prepare_(layout)(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", LEAD)
def test_a_state_of_another_dtype_is_cast_or_taken(kind, assign):
    """Numbers that float16 rounds to zero move slots, or leave the bitmap: copying alone would not do."""
    source, target = packed(kind, "neutral"), packed(kind, "auto", torch.float16)
    if isinstance(source, NMLinear | BitmapLinear):
        with torch.no_grad():
            source.values.flatten()[3] = 1e-12
    state = source.state_dict()
    target.load_state_dict(state, assign=assign)
    assert target.dtype == (torch.float32 if assign else torch.float16)
    target._validate(target.neutral(), "layer")
    if assign:
        assert same(dict(target.state_dict()), dict(state))
    else:
        expected = copy.deepcopy(source).half().state_dict()
        assert same(dict(target.state_dict()), dict(expected))
        if kind == "bitmap-half":
            assert target.spec.nnz == source.spec.nnz - 1 == target.layer_entry()["nnz"]
    x = torch.randn(3, source.in_features, dtype=target.dtype)
    assert torch.isfinite(target(x)).all()


def test_a_state_that_overflows_is_refused_and_names_the_layer():
    model = nn.ModuleDict({"a": packed("nm-2:4", "dense", torch.float16)})
    before = dict(model.state_dict())
    state = {
        f"a.{name}": tensor * 1e6 if tensor.is_floating_point() else tensor
        for name, tensor in packed("nm-2:4").state_dict().items()
    }
    with pytest.raises(ValueError, match="a: cast: weight holds -?inf in row 0, expected finite numbers"):
        model.load_state_dict(state)
    assert same(dict(model.state_dict()), before) and model["a"].layout == "dense"


BROKEN = {
    "nm-2:4": ("positions", lambda t: torch.zeros_like(t), r"positions \[0, 0\] of row 0, group 0 do not strictly"),
    "bitmap-half": ("row_offsets", lambda t: t + 1, "row_offsets has 1 at 0, expected 0"),
    "low-rank": ("u", lambda t: t * math.nan, "u holds nan in row 0, expected finite numbers"),
    "rows": ("sparse.rows", lambda t: t + OUT, rf"sparse: rows has \d+, expected 0 to {OUT - 1}"),
    "factors+2:4": ("sparse.values", lambda t: t * math.inf, "sparse: values holds -?(inf|nan) in row 0"),
    "factors+bitmap": ("sparse.bitmap", lambda t: t * 0, "sparse: bitmap has 0 bits set, expected nnz="),
    "int8": ("values", lambda t: t.fill_(-128), "values holds -128 in row 0, expected -127 to 127"),
    "int8-static+1:4": ("input_scale", lambda t: -t, "input_scale is -0.0.*, expected a finite number above 0"),
    "dense": ("values", lambda t: t * math.nan, "values holds nan in row 0, expected finite numbers"),
}


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_load_state_dict_refuses_before_it_overwrites(kind, layout):
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"3": packed(kind, layout)})})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: id(tensor) for name, tensor in model.named_buffers()}
    key, damage, message = BROKEN[kind]
    good = packed(kind, seed=1).state_dict()
    states = [({**good, key: damage(good[key].clone())}, message)]
    # A part of a packed weight is none, and could not be checked.
    part = {name: tensor for name, tensor in good.items() if name != key}
    if len(layouts.tensors(make(kind).spec, "neutral")) > 1:
        states.append((part, f"state dict has no encoder.3.{key}, expected all or none of "))
    states.append(({**good, key: good[key].new_zeros(2, 3, 4)}, r"shape \(2, 3, 4\), expected"))
    for state, text in states:
        with pytest.raises(ValueError, match=f"^encoder.3: {text}|^encoder.3: .*{text}"):
            model.load_state_dict({f"encoder.3.{name}": t for name, t in state.items()}, strict=False)
        assert same(dict(model.state_dict()), before) and model["encoder"]["3"].layout == layout
        assert {name: id(tensor) for name, tensor in model.named_buffers()} == buffers
    fresh = packed(kind)
    with torch.no_grad():
        fresh._tensor(key).copy_(damage(fresh._tensor(key).clone()))
    with pytest.raises(ValueError, match=f"^encoder.7: {message}|^encoder.7: .*{message}"):
        fresh.finish_loading("encoder.7")


@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_dtype_moves_there_and_back(kind, layout):
    module = packed(kind, layout)
    scales = {name: t.clone() for name, t in module.state_dict().items() if name.endswith(("scale", "scales"))}
    for dtype, move in (
        (torch.float16, lambda m: m.half()),
        (torch.float16, lambda m: m.half()),
        (torch.float32, lambda m: m.float()),
        (torch.bfloat16, lambda m: m.to(torch.bfloat16)),
        (torch.bfloat16, lambda m: nn.Sequential(m).to(torch.bfloat16).to(torch.bfloat16)[0]),
        (torch.float64, lambda m: m.double()),
        (torch.float32, lambda m: m.to(dtype=torch.float32)),
    ):
        assert move(module) is module
        assert module.dtype == module.bias.dtype == dtype and module.layout == layout
        state = module.state_dict()
        assert same({name: t for name, t in state.items() if name in scales}, scales)
        module._validate(module.neutral(), "layer")
        held = zip(module._weight(), layouts.tensors(module.spec, layout).values(), strict=True)
        assert all(t.dtype == {"compute": dtype, "float": torch.float32}.get(h.dtype, h.dtype) for t, h in held)
        if module.spec.op != "int8_linear":
            dense = packed(kind, "neutral").half()
            expected = dense.to_linear().weight if dtype == torch.float16 else None
            assert expected is None or torch.equal(module.to_linear().weight, expected)
        y = module(torch.randn(3, module.in_features, dtype=dtype))
        assert y.dtype == dtype and torch.isfinite(y).all()
    if module.spec.op == "int8_linear":
        weight = {name: t for name, t in neutral_of(kind).items() if name != "bias"}
        assert same({name: t for name, t in module.state_dict().items() if name != "bias"}, weight)


@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_what_a_cast_rounds_to_zero_moves_slots(layout):
    linear = nn.Linear(16, 12)
    linear.weight.data = nm.project(linear.weight.data, 2, 4)
    linear.weight.data[0, :4] = torch.tensor([0.0, 0.0, 1e-9, 3.0])
    module = NMLinear.from_linear(copy.deepcopy(linear), sb.NMConfig(2, 4)).prepare_(layout).half()
    nm.validate(*module.neutral(), 2, 4, 12, 16)
    assert torch.equal(module.to_linear().weight, linear.weight.half())
    module = BitmapLinear.from_linear(copy.deepcopy(linear), sb.BitmapConfig(0.5)).prepare_(layout)
    nnz = module.spec.nnz
    module.half()
    bitmap.validate(*module.neutral(), nnz - 1, 12, 16)
    assert module.spec.nnz == module.layer_entry()["nnz"] == nnz - 1
    assert torch.equal(module.to_linear().weight, linear.weight.half())
    assert torch.isfinite(module(torch.randn(2, 16).half())).all()


@pytest.mark.parametrize(
    ("kind", "layout"), pairs("nm-2:4", "bitmap-half", "low-rank", "rows", "factors+bitmap", "dense")
)
def test_a_cast_that_overflows_is_refused_and_changes_nothing(kind, layout):
    module = packed(kind, "neutral")
    with torch.no_grad():
        for tensor in module._weight() if "rows" in kind or "+" in kind else module._weight()[:1]:
            if tensor.is_floating_point():
                tensor *= 1e6
    module.prepare_(layout)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="^cast: .*(holds -?inf in row 0|beyond the range of float16)"):
        module.half()
    assert module.layout == layout and same(dict(module.state_dict()), before)
    assert torch.isfinite(module(torch.randn(2, module.in_features))).all()


@pytest.mark.parametrize("layout", ["neutral", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_module_allocates_nothing_and_takes_a_state(kind, layout):
    source = packed(kind, "neutral", torch.bfloat16)
    module = module_from_entry(source.layer_entry(), name="layer", device="meta")
    assert all(t.is_meta for t in (*module.buffers(), *module.parameters())) and module.layout == "neutral"
    assert module.layer_entry() == source.layer_entry() and type(module) is type(source)
    assert (module.disk_bytes(), module.dense_bytes()) == (source.disk_bytes(), source.dense_bytes())
    module.requested_layout = layout
    state = {name: t.half() if name.endswith("scales") else t for name, t in source.state_dict().items()}
    module.load_state_dict(state, assign=True)
    module.finish_loading("layer")
    assert module.layout == source.prepare_(layout).layout
    expected = {name: t.float() if name.endswith("scales") else t for name, t in state.items()}
    assert same(dict(module.state_dict()), expected)
    x = torch.randn(3, source.in_features, dtype=torch.bfloat16)
    if source.spec.op != "int8_linear":
        assert torch.equal(module(x), source(x))
    assert module(x).dtype == torch.bfloat16
    assert module.to("meta").layout == "neutral" and module.values.is_meta if hasattr(module, "values") else True


@pytest.mark.parametrize("kind", KINDS)
def test_to_empty_then_load(kind):
    source = packed(kind, "neutral")
    module = module_from_entry(source.layer_entry(), name="layer", device="meta").to_empty(device="cpu")
    assert module.layout == "neutral"
    module.load_state_dict(source.state_dict())
    x = torch.randn(3, source.in_features)
    assert module.layout == source.prepare_("auto").layout and torch.equal(module(x), source(x))
    held = packed(kind, "auto")
    held.to("meta")
    assert held.layout == "neutral" and held.device.type == "meta"


def entry(kind, **change):
    found = packed(kind).layer_entry()
    found |= {key: value for key, value in change.items() if value != "absent"}
    return {key: value for key, value in found.items() if change.get(key) != "absent"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *(
            (kind, {key: value}, f"{key} as {value!r}, expected int")
            for kind, key in (
                ("nm-2:4", "in_features"),
                ("nm-2:4", "out_features"),
                ("nm-2:4", "n"),
                ("nm-2:4", "m"),
                ("bitmap-half", "nnz"),
                ("low-rank", "rank"),
                ("rows", "rank"),
                ("rows", "rows"),
                ("factors+2:4", "n"),
                ("factors+bitmap", "nnz"),
                ("int8+2:4", "n"),
            )
            for value in (True, 2.0, "4", None)
        ),
        *(
            (kind, {key: "absent"}, f"{key} as None, expected")
            for kind, keys in {
                "nm-2:4": ("in_features", "out_features", "dtype", "bias", "n", "m"),
                "bitmap-half": ("nnz",),
                "low-rank": ("rank",),
                "rows": ("rank", "rows", "sparse"),
                "factors+bitmap": ("nnz",),
                "factors+2:4": ("m",),
                "int8": ("activations",),
                "int8+2:4": ("m",),
            }.items()
            for key in keys
        ),
        ("nm-2:4", {"in_features": 2**40}, f"in_features as {2**40}, expected 1 to {2**20}"),
        ("nm-2:4", {"in_features": 10**400}, "in_features as 1000"),
        ("nm-2:4", {"in_features": -4}, "in_features as -4"),
        ("nm-2:4", {"out_features": 0}, "out_features as 0"),
        ("nm-2:4", {"in_features": 18}, "divisible by 4, got 18"),
        ("nm-2:4", {"n": 4}, "n is 4, expected 1 <= n < m"),
        ("nm-2:4", {"m": 5}, "m is 5"),
        ("nm-2:4", {"n": -(2**40)}, f"n as -{2**40}"),
        ("nm-2:4", {"dtype": "int8"}, "dtype as 'int8', expected one of float16, bfloat16, float32, float64"),
        ("nm-2:4", {"dtype": 7}, "dtype as 7, expected str"),
        ("nm-2:4", {"bias": 1}, "bias as 1, expected bool"),
        (
            "nm-2:4",
            {"format": "csr"},
            "format is 'csr', expected one of nm, bitmap, low_rank, low_rank_sparse, int8, dense",
        ),
        ("nm-2:4", {"format": ["nm"]}, r"format is \['nm'\]"),
        ("nm-2:4", {"format": "absent"}, "format is None"),
        ("bitmap-half", {"nnz": -1}, "nnz as -1, expected 0 to 1665"),
        ("bitmap-half", {"nnz": 1666}, "nnz as 1666, expected 0 to 1665"),
        ("bitmap-half", {"nnz": 10**30}, "nnz as 1000"),
        ("low-rank", {"rank": 0}, "rank as 0, expected 1 to 37"),
        ("low-rank", {"rank": 38}, "rank as 38, expected 1 to 37"),
        ("rows", {"rank": 38}, "rank as 38, expected 1 to 37"),
        ("rows", {"rows": 38}, "rows as 38, expected 0 to 37"),
        ("rows", {"rows": -1}, "rows as -1"),
        ("rows", {"sparse": "csr"}, "sparse as 'csr', expected rows, nm or bitmap"),
        ("rows", {"sparse": 3}, "sparse as 3, expected rows, nm or bitmap"),
        ("rows", {"sparse": ["rows"]}, r"sparse as \['rows'\], expected rows, nm or bitmap"),
        ("factors+2:4", {"m": 3}, "m is 3"),
        ("factors+2:4", {"in_features": 54}, "divisible by 4, got 54"),
        ("factors+bitmap", {"nnz": 10**9}, "nnz as 1000000000"),
        ("int8", {"activations": "none"}, "activations as 'none', expected one of dynamic, static"),
        ("int8", {"activations": ["static"]}, r"activations as \['static'\]"),
        ("int8", {"n": 2}, "m as None, expected int"),
        ("int8", {"n": 1, "m": 1}, "m is 1"),
        ("int8+2:4", {"in_features": 54}, "divisible by 4, got 54"),
        ("nm-2:4", {"columns": 52}, "columns as 52, expected 1 to 51"),
        ("nm-2:4", {"columns": 0}, "columns as 0"),
        ("nm-2:4", {"columns": 50}, "divisible by 4, got 50"),
        ("nm-2:4", {"columns": True}, "columns as True, expected int"),
        ("nm-2:4", {"columns": None}, "columns as None, expected int"),
        ("nm-2:4", {"columns": [0, 1]}, r"columns as \[0, 1\], expected int"),
        ("nm-2:4", {"kept_rows": 37}, "kept_rows as 37, expected 1 to 36"),
        ("nm-2:4", {"kept_rows": 0}, "kept_rows as 0"),
        ("nm-2:4", {"kept_rows": False}, "kept_rows as False, expected int"),
        ("low-rank", {"kept_rows": 4}, "rank as 5, expected 1 to 4"),
        ("dense", {"kept_rows": 37}, "kept_rows as 37, expected 1 to 36"),
        ("dense", {"in_features": 2**40}, f"in_features as {2**40}, expected 1 to {2**20}"),
        ("nm-2:4", {"compact_input": True}, "compact_input as True, expected true or false, with columns"),
        ("nm-2:4", {"compact_input": 1, "columns": 48}, "compact_input as 1, expected true or false"),
    ],
)
def test_layer_map_entries_are_not_trusted(kind, change, message):
    with pytest.raises(ValueError, match=f"^a.b: .*{message}"):
        module_from_entry(entry(kind, **change), name="a.b", device="meta")


@pytest.mark.parametrize("value", [None, [], "nm", 3])
def test_a_layer_map_entry_is_an_object(value):
    with pytest.raises(ValueError, match=f"a.b: layer map entry is {type(value).__name__}, expected a JSON object"):
        module_from_entry(value, name="a.b")


def test_entries_say_what_the_format_needs():
    base = {"dtype": "float32", "bias": True, "out_features": OUT}
    expected = {
        "nm-3:8": {"format": "nm", "in_features": 56, "n": 3, "m": 8},
        "bitmap-nothing": {"format": "bitmap", "in_features": 45, "nnz": 0},
        "low-rank": {"format": "low_rank", "in_features": 45, "rank": 5},
        "rows": {"format": "low_rank_sparse", "in_features": 45, "rank": 5, "sparse": "rows", "rows": 4},
        "factors+2:4": {"format": "low_rank_sparse", "in_features": 52, "rank": 5, "sparse": "nm", "n": 2, "m": 4},
        "int8-static": {"format": "int8", "in_features": 45, "activations": "static"},
        "int8+2:4": {"format": "int8", "in_features": 52, "activations": "dynamic", "n": 2, "m": 4},
        "dense": {"format": "dense", "in_features": 45},
    }
    for kind, own in expected.items():
        assert packed(kind).layer_entry() == base | own, kind
        assert packed(kind, "auto").layer_entry() == base | own, kind


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_activation_with_and_without_grad(kind, layout, activation):
    module = packed(kind, "neutral", torch.float64).prepare_(layout)
    x = torch.randn(3, module.in_features, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        plain = module(x)
        module.activation = activation
        fused = module(x)
    functions = {"gelu": {}, "gelu_tanh": {"approximate": "tanh"}}
    act = torch.relu if activation == "relu" else lambda y: nn.functional.gelu(y, **functions[activation])
    torch.testing.assert_close(fused, act(plain))
    y = module(x)
    torch.testing.assert_close(y, fused)
    grad = torch.randn_like(y)
    y.backward(grad)
    leaf = plain.clone().requires_grad_()
    act(leaf).backward(grad)
    torch.testing.assert_close(x.grad, leaf.grad @ module.dense_weight())
    torch.testing.assert_close(module.bias.grad, leaf.grad.sum(0))
    assert f"activation={activation}" in repr(module)
    with pytest.raises(ValueError, match="NMLinear: activation is 'swish', expected one of none, gelu"):
        NMLinear(8, 4, 2, 4, activation="swish")


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_trains_inside_a_model(kind, layout):
    """Heads and biases around a packed layer train; its weight stays."""
    first = packed(kind, layout)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(OUT, 2))
    before = [t.clone() for t in first.neutral()]
    bias = first.bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = torch.randn(32, first.in_features), torch.randint(0, 2, (32,))
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(first.bias, bias)
    assert all(torch.equal(a, b) for a, b in zip(before, first.neutral(), strict=True))
    assert [name for name, _ in first.named_parameters()] == ["bias"]


def test_gradients_to_the_dense_copy_are_refused():
    module = packed("nm-2:4", "dense")
    module.dense_dense.requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights are not trainable"):
        module(torch.randn(3, 52))


def test_a_forced_backend_reaches_the_dense_layout():
    module = packed("nm-2:4", "dense")
    with sb.backend("triton"), pytest.raises(RuntimeError, match="no forced backend serves layout 'dense'"):
        module(torch.randn(3, 52))


@pytest.mark.parametrize(("activation", "through"), [("none", []), ("gelu", ["dense_linear"])])
@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_a_dense_layer_is_an_op_where_a_kernel_may_apply_its_activation(layout, activation, through):
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "sparsebert":
                found.append(function._schema.name.removeprefix("sparsebert::"))
            return function(*args, **(kwargs or {}))

    module, x, found = packed("dense", layout), torch.randn(3, 45), []
    module.activation = activation
    with torch.no_grad(), Ops():
        y = module(x)
    assert found == through
    with torch.no_grad():
        assert torch.equal(y, ACTIVATIONS[activation](F.linear(x, module.dense_weight(), module.bias)))


@pytest.mark.parametrize("kind", [kind for kind in LEAD if kind != "factors+bitmap"])
def test_compiles_whole_and_exports(kind, tmp_path):
    """Every layout at once: tracing is what takes the time."""

    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(packed(kind, layout) for _, layout in pairs(kind))

        def forward(self, x):
            return [layer(x) for layer in self.layers]

    model = Together().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 9):
        x = torch.randn(tokens, in_features_of(kind))
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()
    tokens = torch.export.Dim("tokens", min=1, max=512)
    program = torch.export.export(model, (torch.randn(4, in_features_of(kind)),), dynamic_shapes={"x": {0: tokens}})
    torch.export.save(program, tmp_path / "m.pt2")
    x = torch.randn(11, in_features_of(kind))
    for actual, expected in zip(torch.export.load(tmp_path / "m.pt2").module()(x), model(x), strict=True):
        assert torch.equal(actual, expected)


def test_inductor_compiles_a_layer():
    module = packed("nm-2:4").eval()
    x = torch.randn(4, 52)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_autocast_is_that_of_linear(kind, layout):
    module = packed(kind, layout)
    x = torch.randn(3, module.in_features)
    narrow = packed(kind, "neutral").to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        dense = module.to_linear()(x)
    assert y.dtype == torch.bfloat16
    if kind in PLAIN or layout == "dense":
        assert torch.equal(y, dense)
    elif layout != "dense":
        assert torch.equal(y, narrow.prepare_(layout)(x.bfloat16()))


@pytest.mark.parametrize(("kind", "layout"), ALL_PAIRS)
def test_deepcopy_and_share_memory_keep_the_layout(kind, layout):
    module = packed(kind, layout)
    twin = copy.deepcopy(module)
    x = torch.randn(3, module.in_features)
    expected = module(x)
    module.share_memory()
    assert all(t.is_shared() for t in module.buffers()) and not any(t.is_shared() for t in twin.buffers())
    assert (twin.layout, twin.spec, twin.requested_layout) == (layout, module.spec, layout)
    assert torch.equal(twin(x), expected) and torch.equal(module(x), expected)
    twin.bias.data.zero_()
    twin.prepare_("neutral")
    assert module.layout == layout and torch.equal(module(x), expected)


@pytest.mark.parametrize(("kind", "layout"), LEAD_PAIRS)
def test_a_replica_of_data_parallel_computes_with_its_own_tensors(kind, layout):
    """What replicate does on each GPU: buffers in their places, parameters as attributes."""
    module = packed(kind, layout)
    x = torch.randn(3, in_features_of(kind))
    expected = module(x) + 1
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = child._replicate_for_data_parallel()
    replica.bias = module.bias.detach() + 1
    close(replica(x), expected)
    assert not replica._parameters


def test_unknown_layouts_are_refused():
    module = packed("nm-2:4")
    with pytest.raises(ValueError, match="layout is 'csr', expected one of neutral, dense"):
        module.prepare_("csr")
    with pytest.raises(ValueError, match="layout 'cusparselt' is not possible for 37 x 52 here: needs a CUDA device"):
        module.prepare_("cusparselt")
    assert module.layout == "neutral"
    with pytest.raises(ValueError, match="layout 'unpacked' is not possible for 37 x 45 here: is the neutral layout"):
        packed("int8").prepare_("unpacked")
    with pytest.raises(ValueError, match="layout 'stacked' is not possible .*: needs a sparse part of rows, not nm"):
        packed("factors+2:4").prepare_("stacked")


def test_repr_says_what_it_is():
    size = "in_features=52, out_features=37, bias=True"
    expected = {
        "nm-2:4": f"NMLinear({size}, pattern=2:4, layout=neutral)",
        "bitmap-half": "BitmapLinear(in_features=45, out_features=37, bias=True, pattern=bitmap 0.5, layout=neutral)",
        "low-rank": "LowRankLinear(in_features=45, out_features=37, bias=True, pattern=rank 5, layout=neutral)",
        "int8-static+1:4": f"Int8Linear({size}, pattern=int8 static 1:4, layout=neutral)",
        "dense": "DenseLinear(in_features=45, out_features=37, bias=True, pattern=dense, layout=neutral)",
    }
    for kind, text in expected.items():
        assert repr(packed(kind)) == text
    assert repr(packed("rows")).startswith(
        "LowRankSparseLinear(\n  in_features=45, out_features=37, bias=True, pattern=rank 5 + 4 rows, layout=neutral"
    )


def test_constructors_make_unfilled_modules():
    for module in (
        NMLinear(16, 12, 2, 4, device="meta"),
        BitmapLinear(16, 12, 7, device="meta"),
        LowRankLinear(16, 12, 3, device="meta"),
        LowRankSparseLinear(16, 12, 3, "rows", count=2, device="meta"),
        Int8Linear(16, 12, activations="static", n=2, m=4, device="meta"),
        DenseLinear(16, 12, device="meta"),
    ):
        assert (module.in_features, module.out_features, module.layout) == (16, 12, "neutral")
        again = module_from_entry(module.layer_entry(), name="x", device="meta")
        assert again.spec == module.spec and set(again.state_dict()) == set(module.state_dict())
        assert {t.dtype for t in again.state_dict().values()} == {t.dtype for t in module.state_dict().values()}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nm-2:4", {"weight": torch.ones(OUT, 52)}, "weight does not obey 2:4: row 0, columns 0 to 3 hold 4 non-zeros"),
        ("int8+2:4", {"weight": torch.ones(OUT, 52)}, "weight does not obey 2:4: row 0, columns 0 to 3 hold 4"),
        ("int8", {"weight": torch.full((OUT, 45), math.nan)}, "weight holds nan in row 0"),
        ("bitmap-half", {"weight": torch.full((OUT, 45), math.inf)}, "weight holds inf in row 0"),
        ("dense", {"weight": torch.full((OUT, 45), math.inf)}, "weight holds inf in row 0"),
        ("low-rank", {"u": None}, "factor u is missing, a low-rank layer is made of its factors u and v"),
        ("low-rank", {"v": torch.ones(RANK, 44)}, r"v has shape \(5, 44\), expected \(5, 45\)"),
        ("rows", {"v": None}, "factor v is missing"),
        ("rows", {"sparse": None}, r"factor sparse is missing, expected the sparse part \(37, 45\)"),
        ("rows", {"sparse": torch.ones(3, 45)}, r"factor sparse has shape \(3, 45\), expected \(37, 45\)"),
        ("rows", {"sparse": torch.ones(OUT, 45)}, "weight has 37 rows with a non-zero, expected at most 4"),
        ("factors+2:4", {"sparse": torch.ones(OUT, 52)}, "weight does not obey 2:4"),
    ],
)
def test_from_linear_refuses_what_does_not_obey(kind, change, message):
    made = make(kind)
    linear = linear_of(made)
    linear.weight.data = change.get("weight", made.weight)
    factors = {name: t for name, t in {**made.factors, **change}.items() if t is not None and name != "weight"}
    with pytest.raises(ValueError, match=f"^a.b: {message}"):
        MODULES[made.config.format].from_linear(linear, made.config, name="a.b", factors=factors)


# Column and row compaction


def compact(layout="neutral", *, compact_input=False, kept=None, dtype=torch.float32, bias=True):
    """``(module, dense linear)``: 2:4 in 48 of 64 columns, optionally with some rows only."""
    torch.manual_seed(3)
    linear = nn.Linear(64, 20, bias=bias, dtype=dtype)
    columns = torch.randperm(64)[:48].sort().values.to(torch.int32)
    part = nm.project(linear.weight.data[:, columns.long()].contiguous(), 2, 4)
    linear.weight.data = nm.expand_columns(part, columns, 64)
    module = NMLinear.from_linear(
        linear,
        sb.NMConfig(2, 4, columns=0.75),
        name="layer",
        columns=columns,
        kept_rows=kept,
        compact_input=compact_input,
    )
    assert module.spec.in_features == 32 or torch.equal(module.columns, columns)
    return module.prepare_(layout), linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_columns_are_gathered(layout, bias):
    module, linear = compact(layout, bias=bias)
    assert (module.in_features, module.spec.in_features) == (64, 48)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(module(x), linear(x))
    with pytest.raises(ValueError, match=r"^nm_linear: x has shape \(2, 3, 60\), expected \(\.\.\., 64\)"):
        module(x[..., :60])
    # What is not read may be anything.
    poisoned = torch.full_like(x, math.nan)
    poisoned[..., module.columns.long()] = x[..., module.columns.long()]
    assert torch.equal(module(poisoned), module(x))
    assert torch.equal(module.to_linear().weight, linear.weight)
    assert module.description == "2:4 in 48 of 64 columns"
    assert module.disk_bytes() == sum(t.nbytes for t in module.state_dict().values())
    assert module.disk_bytes() == 20 * 24 * 4 + 20 * 6 + 48 * 4 + 20 * 4 * bias
    assert module.memory_bytes() == sum(t.nbytes for t in (*module.buffers(), *module.parameters()))
    assert module.dense_bytes() == 20 * 64 * 4 + 20 * 4 * bias


@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_compact_input_is_not_gathered(layout):
    module, linear = compact(layout, compact_input=True)
    assert module.in_features == 48 and module.dense_in_features == 64
    x = torch.randn(5, 64)
    torch.testing.assert_close(module(x[:, module.columns.long()]), linear(x))
    assert torch.equal(module.to_linear().weight, linear.weight) and module.to_linear().in_features == 64
    with pytest.raises(ValueError if layout == "neutral" else RuntimeError, match=r"shape"):
        module(x)


KEPT = torch.tensor([0, 3, 4, 5, 9, 11, 14, 19], dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "layout"), pairs("nm-2:4", "bitmap-half", "low-rank", "rows", "int8", "int8+2:4", "dense")
)
def test_kept_rows_are_the_rows_of_the_dense_layer(kind, layout):
    made = make(kind)
    linear, rows = linear_of(made), KEPT.long()
    options = {"name": "layer", "factors": made.factors}
    whole = MODULES[made.config.format].from_linear(copy.deepcopy(linear), made.config, **options).prepare_(layout)
    module = MODULES[made.config.format].from_linear(linear, made.config, kept_rows=KEPT, **options).prepare_(layout)
    x = torch.randn(6, whole.in_features)
    torch.testing.assert_close(module(x), whole(x)[:, rows])
    assert module.out_features == len(KEPT) and f"8 of {OUT} rows" in module.description
    back = module.to_linear()
    assert back.weight.shape == linear.weight.shape and back.bias.requires_grad
    gone = torch.ones(OUT, dtype=torch.bool)
    gone[rows] = False
    assert not back.weight[gone].any() and not back.bias[gone].any()
    torch.testing.assert_close(back.weight[rows], whole.to_linear().weight[rows])
    assert torch.equal(back.bias[rows], linear.bias[rows])
    assert module.bias.shape == (8,) and linear.bias.shape == (OUT,)
    assert module.disk_bytes() == sum(t.nbytes for t in module.state_dict().values())
    assert module.layer_entry()["kept_rows"] == 8 and module.layer_entry()["out_features"] == OUT
    again = module_from_entry(module.layer_entry(), name="layer", device="meta")
    again.load_state_dict(module.state_dict(), assign=True)
    again.finish_loading("layer")
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert torch.equal(again.prepare_(layout)(x), module(x))


def test_kept_rows_may_hold_all_rows_of_the_sparse_part():
    """A plan's ratio counts all rows; that all it kept are among those left is no violation."""
    made = make("rows")
    used = made.factors["sparse"].any(1).nonzero().flatten().to(torch.int32)
    kept = (
        torch.cat((used, torch.tensor([x for x in range(OUT) if x not in used][:2], dtype=torch.int32))).sort().values
    )
    options = {"name": "layer", "factors": made.factors, "kept_rows": kept}
    with pytest.raises(ValueError, match="rank is 5"):
        LowRankSparseLinear.from_linear(linear_of(made), made.config, **options | {"kept_rows": kept[:3]})
    module = LowRankSparseLinear.from_linear(linear_of(made), made.config, **options)
    assert module.spec.count == 4
    torch.testing.assert_close(module.to_linear().weight[kept.long()], made.exact.float()[kept.long()])


@pytest.mark.parametrize("compact_input", [False, True])
@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_columns_and_rows_survive_a_checkpoint(layout, compact_input, tmp_path):
    module, linear = compact(layout, compact_input=compact_input, kept=KEPT)
    state = module.state_dict()
    assert set(state) == {"values", "positions", "columns", "kept_rows", "bias"}
    found = module.layer_entry()
    assert (found["columns"], found["kept_rows"], found.get("compact_input", False)) == (48, 8, compact_input)
    assert (found["in_features"], found["out_features"]) == (64, 20)
    again = module_from_entry(found, name="layer", device="meta")
    again.load_state_dict(state, assign=True)
    again.finish_loading("layer")
    x = torch.randn(5, 64)
    given = x[:, module.columns.long()] if compact_input else x
    torch.testing.assert_close(again(given), linear(x)[:, KEPT.long()])
    twin = copy.deepcopy(module).half()
    assert twin.columns.dtype == twin.kept_rows.dtype == torch.int32 and twin.layout == layout
    for name, damage, message in (
        ("columns", lambda t: t.flip(0), "columns has .* expected strictly ascending"),
        ("columns", lambda t: t + 64, "columns has .*, expected 0 to 63"),
        ("columns", lambda t: t.long(), "columns is int64, expected int32"),
        ("columns", lambda t: t[1:], r"columns has shape \(47,\), expected \(48,\)"),
        ("kept_rows", lambda t: t - 1, "kept_rows has -1, expected 0 to 19"),
        ("kept_rows", lambda t: t.float(), "kept_rows is float32, expected int32"),
    ):
        before = {key: t.clone() for key, t in module.state_dict().items()}
        with pytest.raises(ValueError, match=f"^NMLinear: {message}"):
            module.load_state_dict({**state, name: damage(state[name])})
        assert same(dict(module.state_dict()), before) and module.layout == layout
    fresh = module_from_entry(found, name="layer").requires_grad_(False)
    fresh.load_state_dict(state)
    fresh.prepare_("neutral").columns.copy_(state["columns"].flip(0))
    with pytest.raises(ValueError, match="^layer: columns has"):
        fresh.finish_loading("layer")


def test_compaction_compiles_whole_and_exports():
    module, _ = compact("neutral")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 64)
    torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


# Static int8


def uncalibrated(layout="neutral"):
    made = make("int8-static")
    return Int8Linear.from_linear(linear_of(made), made.config, name="layer").prepare_(layout)


@pytest.mark.parametrize("layout", ["neutral", "dense", "float"])
def test_static_int8_needs_an_input_scale(layout):
    module = uncalibrated(layout)
    x = torch.randn(3, 45)
    message = re.escape(
        "Int8Linear (37 x 45): static activations have no input_scale yet; "
        "call sparsebert.calibrate(model, batches) first"
    )
    for copied in (
        module,
        copy.deepcopy(module),
        copy.deepcopy(module).half().float(),
        Int8Linear(45, OUT, activations="static"),
    ):
        with pytest.raises(RuntimeError, match=message):
            copied(x)
    message = r"encoder.3: static activations have no input_scale yet; call sparsebert.calibrate.* before saving"
    with pytest.raises(ValueError, match=message):
        nn.ModuleDict({"encoder": nn.ModuleDict({"3": module})}).state_dict()
    module.set_input_scale_(INPUT_SCALE)
    state = {**module.state_dict(), "input_scale": torch.zeros(())}
    with pytest.raises(ValueError, match="Int8Linear: input_scale is 0.0, expected a finite number"):
        packed("int8-static").load_state_dict(state)
    assert torch.equal(module(x), packed("int8-static", layout)(x))
    assert module.state_dict()["input_scale"].item() == pytest.approx(INPUT_SCALE)
    other = uncalibrated(layout)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_input_scales_that_cannot_be_are_refused():
    for value in (0.0, -1.0, math.nan, math.inf, 1e-38):
        module = uncalibrated()
        with pytest.raises(ValueError, match="Int8Linear: input_scale is .*, expected a finite number above 0"):
            module.set_input_scale_(value)
        assert not module.has_input_scale and module.input_scale == 0
    with pytest.raises(ValueError, match="Int8Linear: activations are dynamic, expected a static layer"):
        packed("int8").set_input_scale_(0.1)
