"""NMLinear: one layout held, neutral tensors saved, and nothing that nn.Module does breaks that."""

import copy

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.nn import NMLinear, module_from_entry


def linear_2_4(out_features=12, in_features=16, *, bias=True, n=2, m=4, dtype=torch.float32):
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    linear.weight.data = nm.project(linear.weight.data, n, m)
    return linear


def packed(linear, layout="neutral", n=2, m=4):
    return NMLinear.from_linear(copy.deepcopy(linear), sb.NMConfig(n, m), name="layer").prepare_(layout)


@pytest.mark.parametrize("layout", ["neutral", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_replaces_a_linear_exactly(layout, bias):
    linear = linear_2_4(bias=bias)
    module = packed(linear, layout)
    x = torch.randn(2, 5, 16)
    assert torch.equal(module(x), linear(x))
    assert (module.in_features, module.out_features) == (16, 12)
    back = module.to_linear()
    assert torch.equal(back.weight, linear.weight) and torch.equal(back(x), linear(x))
    assert (back.bias is None) == (not bias)


def test_one_layout_is_held_at_a_time():
    module = packed(linear_2_4(dtype=torch.float16))
    assert set(dict(module.named_buffers())) == {"values", "positions"}
    bias = 12 * 2
    assert module.memory_bytes() == module.disk_bytes() == 12 * 16 * 9 // 8 + bias
    module.prepare_("dense")
    assert set(dict(module.named_buffers())) == {"dense_dense"}
    assert module.memory_bytes() == module.dense_bytes() == 12 * 16 * 2 + bias
    assert module.disk_bytes() == 12 * 16 * 9 // 8 + bias
    module.prepare_("auto")
    assert module.layout == "dense"


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8), (1, 16)])
def test_state_dict_is_neutral_whatever_is_held(n, m):
    linear = linear_2_4(n=n, m=m)
    linear.weight.data[3] = 0
    expected = dict(zip(("values", "positions"), nm.pack(linear.weight.data, n, m), strict=True))
    for layout in ("neutral", "dense"):
        state = packed(linear, layout, n, m).state_dict()
        assert set(state) == {"values", "positions", "bias"}
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor)


def test_load_state_dict_fills_any_layout():
    source, target = packed(linear_2_4()), packed(linear_2_4(), "dense")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 16)
    assert target.layout == "dense" and torch.equal(target(x), source(x))


def test_load_state_dict_refuses_what_is_not_packed():
    source, target = packed(linear_2_4()), packed(linear_2_4(), "dense")
    state = source.state_dict()
    state["positions"] = torch.full_like(state["positions"], 255)
    before = target.dense_dense.clone()
    with pytest.raises(ValueError, match="NMLinear: positions .* do not strictly ascend"):
        target.load_state_dict(state)
    assert torch.equal(target.dense_dense, before)


@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_dtype_moves_go_through_the_neutral_format(layout):
    linear = linear_2_4()
    # Rounds to zero in float16: the slot moves to the lowest free position.
    linear.weight.data[0, :4] = torch.tensor([0.0, 0.0, 1e-9, 3.0])
    module = packed(linear, layout).half()
    assert (module.dtype, module.bias.dtype, module.layout) == (
        torch.float16,
        torch.float16,
        "auto" and module.layout,
    )
    values, positions = module.neutral()
    nm.validate(values, positions, 2, 4, 12, 16)
    assert torch.equal(module.to_linear().weight, linear.weight.half())
    assert module.layout == layout


def test_meta_module_allocates_nothing_and_takes_a_state():
    entry = packed(linear_2_4(dtype=torch.bfloat16)).layer_entry()
    module = module_from_entry(entry, name="layer", device="meta")
    assert all(t.is_meta for t in (*module.buffers(), *module.parameters()))
    source = packed(linear_2_4(dtype=torch.bfloat16))
    module.load_state_dict(source.state_dict(), assign=True)
    module.finish_loading("layer")
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert torch.equal(module(x), source(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 2**40}, "in_features as 1099511627776"),
        ({"in_features": -4}, "in_features as -4"),
        ({"in_features": True}, "in_features as True, expected int"),
        ({"in_features": 18}, "divisible by 4, got 18"),
        ({"n": 4}, "n is 4, expected 1 <= n < m"),
        ({"m": 5}, "m is 5"),
        ({"dtype": "int8"}, "dtype as 'int8'"),
        ({"dtype": None}, "dtype as None, expected str"),
        ({"bias": 1}, "bias as 1, expected bool"),
        ({"format": "csr"}, "format is 'csr'"),
    ],
)
def test_layer_map_entries_are_not_trusted(change, message):
    entry = packed(linear_2_4()).layer_entry() | change
    with pytest.raises(ValueError, match=f"a.b: .*{message}"):
        module_from_entry(entry, name="a.b", device="meta")


def test_finish_loading_names_the_layer():
    module = packed(linear_2_4())
    module.positions.fill_(255)
    with pytest.raises(ValueError, match="encoder.3: positions"):
        module.finish_loading("encoder.3")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_activation_with_and_without_grad(activation, layout):
    linear = linear_2_4(dtype=torch.float64)
    module = packed(linear, layout)
    module.activation = activation
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(module(x), expected)
    assert torch.autograd.gradcheck(module, (x,))
    module(x).sum().backward()
    assert module.bias.grad is not None


@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_trains_inside_a_model(layout):
    """Heads and biases around a packed layer train; its weight stays."""
    model = nn.Sequential(packed(linear_2_4(), layout), nn.ReLU(), nn.Linear(12, 2))
    before = [t.clone() for t in model[0].neutral()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(32, 16), torch.randint(0, 2, (32,))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].neutral(), strict=True))


def test_gradients_to_the_dense_copy_are_refused():
    module = packed(linear_2_4(), "dense")
    module.dense_dense.requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights are not trainable"):
        module(torch.randn(3, 16))


def test_a_forced_backend_reaches_the_dense_layout():
    module = packed(linear_2_4(), "dense")
    with sb.backend("triton"), pytest.raises(RuntimeError, match="no forced backend serves layout 'dense'"):
        module(torch.randn(3, 16))


@pytest.mark.parametrize("layout", ["neutral", "dense"])
def test_compiles_whole_and_exports(layout, tmp_path):
    module = packed(linear_2_4(), layout).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (2, 9):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()
    tokens = torch.export.Dim("tokens", min=1, max=512)
    program = torch.export.export(module, (torch.randn(4, 16),), dynamic_shapes={"x": {0: tokens}})
    torch.export.save(program, tmp_path / "m.pt2")
    x = torch.randn(11, 16)
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), module(x))


def test_autocast_is_that_of_linear():
    linear = linear_2_4()
    x = torch.randn(3, 16)
    for layout in ("neutral", "dense"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(packed(linear, layout)(x), linear(x))


def test_deepcopy_and_share_memory_keep_the_layout():
    module = packed(linear_2_4(), "dense")
    twin = copy.deepcopy(module)
    module.share_memory()
    assert module.dense_dense.is_shared() and not twin.dense_dense.is_shared()
    x = torch.randn(3, 16)
    assert torch.equal(twin(x), module(x))


def test_unknown_layouts_are_refused():
    module = packed(linear_2_4())
    with pytest.raises(ValueError, match="layout is 'csr', expected one of neutral, dense"):
        module.prepare_("csr")
    with pytest.raises(ValueError, match="layout 'cusparselt' is not possible for 12 x 16 here: needs a CUDA device"):
        module.prepare_("cusparselt")
    assert module.layout == "neutral"


def test_repr_says_what_it_is():
    text = repr(packed(linear_2_4()))
    assert text == "NMLinear(in_features=16, out_features=12, bias=True, pattern=2:4, layout=neutral)"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (2, 8)])
def test_to_empty_then_load(n, m):
    source = packed(linear_2_4(n=n, m=m), "neutral", n, m)
    module = NMLinear(16, 12, n, m, device="meta").to_empty(device="cpu")
    assert module.layout == "neutral"
    module.load_state_dict(source.state_dict())
    x = torch.randn(3, 16)
    assert module.layout == "dense" and torch.equal(module(x), source(x))
    assert module.to("meta").layout == "neutral"
