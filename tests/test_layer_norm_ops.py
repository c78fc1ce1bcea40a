"""``add_layer_norm``, ``add_layer_norm_quantize`` and ``embed_layer_norm`` by their references: the formulas in
float64, the contracts of an op, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from sparsebert.formats import int8
from sparsebert.ops import add_layer_norm, add_layer_norm_quantize, embed_layer_norm

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCALE = torch.tensor(0.02)


def given(*shape, dtype=torch.float32):
    """x, residual, weight and bias."""
    features = shape[-1]
    tensors = (3 * torch.randn(shape) + 1, torch.randn(shape), 1 + torch.randn(features) / 4, torch.randn(features))
    return [tensor.to(dtype) for tensor in tensors]


def exact(x, residual, weight, bias, eps):
    z = x.double() if residual is None else x.double() + residual.double()
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def tables(features=24, dtype=torch.float32):
    """words, positions, token_types, weight and bias."""
    return [torch.randn(count, features).to(dtype) for count in (50, 20, 2)] + given(1, features, dtype=dtype)[2:]


def ids(*shape, dtype=torch.int64):
    """input_ids, position_ids and token_type_ids."""
    return [torch.randint(count, shape).to(dtype) for count in (50, 20, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 33), (2, 3, 768)], ids=str)
def test_layer_norm_against_float64(shape, with_residual, dtype):
    x, residual, weight, bias = given(*shape, dtype=dtype)
    residual = residual if with_residual else None
    y = add_layer_norm(x, residual, weight, bias, 1e-5)
    expected = exact(x, residual, weight, bias, 1e-5)
    assert y.shape == shape and y.dtype == dtype and y.is_contiguous()
    # One rounding of y, and those of the arithmetic in fp32, or in float64 itself.
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 50
    allowed = torch.finfo(dtype).eps / 2 * expected.abs() + arithmetic * expected.abs().max()
    assert ((y.double() - expected).abs() <= allowed).all()


def test_in_fp32_it_is_torchs_own():
    x, residual, weight, bias = given(4, 5, 64)
    assert torch.equal(
        add_layer_norm(x, residual, weight, bias, 1e-12), F.layer_norm(x + residual, (64,), weight, bias, 1e-12)
    )
    assert torch.equal(add_layer_norm(x, None, weight, bias, 1e-12), F.layer_norm(x, (64,), weight, bias, 1e-12))


def test_a_sum_of_16_bits_is_not_rounded_in_between():
    """2048 + 1 is no half float: added in fp16, both rows would be one, and constant."""
    x = torch.full((1, 64), 2048.0).half()
    residual = torch.tensor([0.0, 1.0]).repeat(32)[None].half()
    y = add_layer_norm(x, residual, torch.ones(64).half(), torch.zeros(64).half(), 1e-12)
    assert torch.equal(y, torch.tensor([-1.0, 1.0]).repeat(32)[None].half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_are_those_of_the_stored_result_quantized(dtype):
    x, residual, weight, bias = given(3, 5, 45, dtype=dtype)
    x[0, 1, 3], x[2, 2, 0] = torch.nan, torch.inf
    for scale in (None, SCALE):
        y, q, s = add_layer_norm_quantize(x, residual, weight, bias, 1e-5, scale)
        rows, scales = int8.quantize_rows(y, scale)
        torch.testing.assert_close(y, add_layer_norm(x, residual, weight, bias, 1e-5), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(s, scales, rtol=0, atol=0, equal_nan=True)
        assert (~s.isfinite()).nonzero().tolist() == [[0, 1], [2, 2]]
        assert q.dtype == torch.int8 and torch.equal(q[s.isfinite()], rows[s.isfinite()])
        assert y[~s.isfinite()].isnan().all() and y[s.isfinite()].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_may_have_another_dtype(dtype):
    x, residual, weight, bias = given(5, 33)
    for other in DTYPES:
        y = add_layer_norm(x.to(dtype), residual.to(dtype), weight.to(other), bias.to(other), 1e-5)
        expected = exact(x.to(dtype), residual.to(dtype), weight.to(other), bias.to(other), 1e-5)
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() <= max(1e-5, torch.finfo(dtype).eps) * expected.abs().max()


def test_x_of_any_stride():
    x, residual, weight, bias = given(4, 3, 24)
    expected = add_layer_norm_quantize(x, residual, weight, bias, 1e-5)
    strided = torch.empty(4, 24, 3).transpose(1, 2).copy_(x)
    apart = torch.full((4, 3, 50), torch.nan)[..., :24].copy_(residual)
    found = add_layer_norm_quantize(strided, apart, weight, bias, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_contiguous() and torch.equal(ours, theirs)
    assert torch.equal(strided, x) and torch.equal(apart, residual)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0,)], ids=str)
def test_nothing_to_normalize(shape):
    x, residual, weight, bias = given(*shape)
    assert add_layer_norm(x, residual, weight, bias, 1e-5).shape == shape
    for scale in (None, SCALE):
        y, q, s = add_layer_norm_quantize(x, residual, weight, bias, 1e-5, scale)
        assert y.shape == q.shape == shape and s.shape == shape[:-1] and q.dtype == torch.int8
    empty = [part.new_empty(0, dtype=torch.int64) for part in (x, x, x)]
    assert embed_layer_norm(*empty, *tables(), 1e-5).shape == (0, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (9,), (2, 5)], ids=str)
def test_embeddings_against_float64(shape, dtype):
    words, positions, token_types, weight, bias = tables(33, dtype)
    for kind in (torch.int64, torch.int32):
        of_words, of_positions, of_types = ids(*shape, dtype=kind)
        for types, table in ((of_types, token_types), (None, None)):
            y = embed_layer_norm(of_words, of_positions, types, words, positions, table, weight, bias, 1e-5)
            z = words.double()[of_words] + positions.double()[of_positions]
            if types is not None:
                z = z + token_types.double()[types]
            expected = exact(z, None, weight, bias, 1e-5)
            assert y.shape == (*shape, 33) and y.dtype == dtype and y.is_contiguous()
            arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 50
            allowed = torch.finfo(dtype).eps / 2 * expected.abs() + arithmetic * expected.abs().max()
            assert ((y.double() - expected).abs() <= allowed).all()


def test_embeddings_in_fp32_are_those_of_transformers():
    from transformers.models.bert.modeling_bert import BertConfig, BertEmbeddings

    config = BertConfig(vocab_size=50, hidden_size=24, max_position_embeddings=20, num_attention_heads=2)
    model = BertEmbeddings(config).eval()
    with torch.no_grad():
        of_words, _, of_types = ids(3, 7)
        spread = torch.arange(7).expand(3, 7)
        tensors = [layer.weight for layer in (model.word_embeddings, model.position_embeddings)]
        found = embed_layer_norm(
            of_words,
            spread,
            of_types,
            *tensors,
            model.token_type_embeddings.weight,
            model.LayerNorm.weight,
            model.LayerNorm.bias,
            config.layer_norm_eps,
        )
        assert torch.equal(found, model(of_words, of_types))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_out_of_range_raises_on_a_cpu(which, wrong):
    given = ids(4)
    given[which][2] = wrong
    with pytest.raises(IndexError, match="index out of range"):
        embed_layer_norm(*given, *tables(), 1e-5)


WRONG_NORMS = [
    ({"x": torch.tensor(1.0)}, ValueError, r"x has 0 dimensions, expected at least 1 \(\.\.\., features\)"),
    ({"x": torch.ones(2, 8, dtype=torch.int32)}, TypeError, r"x is torch\.int32, expected a floating-point tensor"),
    ({"x": torch.ones(2, 8, dtype=torch.float8_e4m3fn)}, TypeError, r"x is torch\.float8_e4m3fn, expected a floating"),
    ({"residual": torch.ones(8)}, ValueError, r"residual has shape \(8,\), expected \(2, 8\) as x"),
    ({"residual": torch.ones(2, 8).half()}, TypeError, r"residual is torch\.float16, expected torch\.float32 as x"),
    ({"residual": torch.ones(2, 8, device="meta")}, ValueError, r"residual is on meta, expected cpu as x"),
    ({"weight": torch.ones(1)}, ValueError, r"weight has shape \(1,\), expected \(8,\) as x"),
    ({"bias": torch.ones(1, 8)}, ValueError, r"bias has shape \(1, 8\), expected \(8,\) as x"),
    ({"bias": torch.ones(8).int()}, TypeError, r"bias is torch\.int32, expected a floating-point tensor of 16, 32 or"),
    ({"weight": torch.ones(8, device="meta")}, ValueError, r"weight is on meta, expected cpu as x"),
    ({"eps": -1e-5}, ValueError, r"eps is -1e-05, expected a number of at least 0"),
    ({"eps": float("nan")}, ValueError, r"eps is nan, expected a number of at least 0"),
]
WRONG_EMBEDDINGS = [
    ({"token_types": None}, ValueError, "token_type_ids comes without token_types, expected both or neither"),
    ({"token_type_ids": None}, ValueError, "token_types comes without token_type_ids, expected both or neither"),
    ({"words": torch.ones(24)}, ValueError, r"words has shape \(24,\), expected \(entries, features\)"),
    ({"words": torch.ones(5, 24).int()}, TypeError, r"words is torch\.int32, expected a floating-point tensor"),
    ({"positions": torch.ones(5, 23)}, ValueError, r"positions has shape \(5, 23\), expected \(entries, 24\)"),
    ({"token_types": torch.ones(24)}, ValueError, r"token_types has shape \(24,\), expected \(entries, 24\)"),
    ({"positions": torch.ones(5, 24).half()}, TypeError, r"positions is torch\.float16, expected torch\.float32 as"),
    ({"positions": torch.ones(5, 24, device="meta")}, ValueError, "positions is on meta, expected cpu as words"),
    ({"position_ids": torch.zeros(4).long()}, ValueError, r"position_ids has shape \(4,\), expected \(3,\) as input_"),
    ({"input_ids": torch.zeros(3).byte()}, TypeError, r"input_ids is torch\.uint8, expected torch\.int64 or torch\.in"),
    ({"token_type_ids": torch.zeros(3)}, TypeError, r"token_type_ids is torch\.float32, expected torch\.int64"),
    ({"input_ids": torch.zeros(3, device="meta").long()}, ValueError, "input_ids is on meta, expected cpu as words"),
    ({"weight": torch.ones(23)}, ValueError, r"weight has shape \(23,\), expected \(24,\) as words"),
    ({"eps": -1.0}, ValueError, r"eps is -1\.0, expected a number of at least 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_NORMS)
def test_what_a_layer_norm_refuses(change, error, message):
    names = ("x", "residual", "weight", "bias", "eps")
    arguments = dict(zip(names, (*given(2, 8), 1e-5), strict=True)) | change
    for op in (add_layer_norm, add_layer_norm_quantize):
        with pytest.raises(error, match=f"^{op.__name__}: {message}"):
            op(**arguments)


def test_a_scale_that_does_not_fit_is_refused():
    arguments = (*given(2, 8), 1e-5)
    for scale, error, message in (
        (torch.ones(1), ValueError, r"input_scale has shape \(1,\), expected \(\)"),
        (torch.tensor(1), TypeError, r"input_scale is torch\.int64, expected a floating-point tensor"),
        (torch.tensor(1.0, device="meta"), ValueError, "input_scale is on meta, expected cpu as the others"),
    ):
        with pytest.raises(error, match=f"^add_layer_norm_quantize: {message}"):
            add_layer_norm_quantize(*arguments, scale)


@pytest.mark.parametrize(("change", "error", "message"), WRONG_EMBEDDINGS)
def test_what_embeddings_refuse(change, error, message):
    names = ("input_ids", "position_ids", "token_type_ids", "words", "positions", "token_types", "weight", "bias")
    arguments = dict(zip((*names, "eps"), (*ids(3), *tables(), 1e-5), strict=True)) | change
    with pytest.raises(error, match=f"^embed_layer_norm: {message}"):
        embed_layer_norm(**arguments)


def test_the_fakes_refuse_alike():
    x, residual, weight, bias = (tensor.to("meta") for tensor in given(2, 8))
    for op in (add_layer_norm, add_layer_norm_quantize):
        with pytest.raises(ValueError, match=rf"^{op.__name__}: weight has shape \(7,\), expected \(8,\) as x"):
            op(x, residual, weight[1:], bias, 1e-5)
    with pytest.raises(ValueError, match=r"^embed_layer_norm: positions has shape \(20, 23\), expected"):
        words, positions, *others = (tensor.to("meta") for tensor in tables())
        embed_layer_norm(*(tensor.to("meta") for tensor in ids(3)), words, positions[:, 1:], *others, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_opcheck(dtype):
    ops = torch.ops.sparsebert
    for shape in ((3, 8), (0, 8), (2, 3, 8)):
        x, residual, weight, bias = given(*shape, dtype=dtype)
        for other in (residual, None):
            torch.library.opcheck(ops.add_layer_norm.default, (x, other, weight, bias, 1e-5))
            for scale in (None, SCALE):
                torch.library.opcheck(ops.add_layer_norm_quantize.default, (x, other, weight, bias, 1e-5, scale))
    strided = torch.randn(8, 3).to(dtype).t()
    torch.library.opcheck(ops.add_layer_norm.default, (strided, None, *given(8, dtype=dtype)[2:], 1e-5))
    words, positions, token_types, weight, bias = tables(dtype=dtype)
    of_words, of_positions, of_types = ids(2, 5)
    for types, table in ((of_types, token_types), (None, None)):
        arguments = (of_words, of_positions, types, words, positions, table, weight, bias, 1e-5)
        torch.library.opcheck(ops.embed_layer_norm.default, arguments)


def test_compiled_they_are_one_graph_for_any_number_of_tokens():
    words, positions, token_types, weight, bias = tables()

    def net(of_words, of_positions, of_types):
        x = embed_layer_norm(of_words, of_positions, of_types, words, positions, token_types, weight, bias, 1e-12)
        y, q, s = add_layer_norm_quantize(x, x.flip(0), weight, bias, 1e-12, SCALE)
        return add_layer_norm(int8.dequantize(q, s), y, weight, bias, 1e-12)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counted = torch.compile(net, fullgraph=True, backend=backend, dynamic=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 33):
        arguments = ids(tokens)
        assert torch.equal(counted(*arguments), net(*arguments))
        assert torch.equal(compiled(*arguments), net(*arguments))
    assert len(graphs) == 1


def test_where_a_gradient_is_asked_for_they_say_so():
    x, residual, weight, bias = given(2, 8)
    asked = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    for name, tensor in asked.items():
        wanting = asked | {name: tensor.clone().requires_grad_(), "eps": 1e-5}
        for op in (add_layer_norm, add_layer_norm_quantize):
            with pytest.raises(RuntimeError, match=f"^{op.__name__}: {name} requires grad, but the op has no gradient"):
                op(**wanting)
            with torch.no_grad():
                op(**wanting)
            with torch.inference_mode():
                op(**wanting)
    words = torch.nn.Parameter(tables()[0])
    with pytest.raises(RuntimeError, match="^embed_layer_norm: words requires grad, but the op has no gradient"):
        embed_layer_norm(*ids(3), words, *tables()[1:], 1e-5)
    with torch.no_grad():
        assert not embed_layer_norm(*ids(3), words, *tables()[1:], 1e-5).requires_grad


def test_a_gradient_is_refused_before_anything_is_computed():
    """By name in torch.ops too, with keywords, and where a graph is traced."""
    x, residual, weight, bias = given(2, 8)
    weight.requires_grad_()
    op = torch.ops.sparsebert.add_layer_norm
    # No backend could serve this call.
    with sb.backend("cuda"), pytest.raises(RuntimeError, match="^add_layer_norm: weight requires grad"):
        op(x=x, residual=residual, weight=weight, bias=bias, eps=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x, residual, weight, bias, 1e-5), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="add_layer_norm: weight requires grad"):
        compiled(x)


def test_a_forced_backend_that_cannot_says_so():
    with sb.backend("triton"):
        with pytest.raises(RuntimeError, match="^add_layer_norm: no forced backend .*triton: needs a CUDA device, not"):
            add_layer_norm(*given(2, 8), 1e-5)
        with pytest.raises(RuntimeError, match="^embed_layer_norm: no forced backend .*triton: needs a CUDA device"):
            embed_layer_norm(*ids(3), *tables(), 1e-5)


def test_a_forced_backend_without_such_a_kernel_leaves_them_as_they_are():
    """It is that of the linear layers beside them."""
    with sb.backend("cuda"):
        rows, embedded = add_layer_norm(*given(2, 8), 1e-5), embed_layer_norm(*ids(3), *tables(), 1e-5)
    assert torch.isfinite(rows).all() and torch.isfinite(embedded).all()


def test_they_are_there_in_a_fresh_process(run_python):
    """Registered by ``import sparsebert`` alone, which does not import Triton."""
    found = run_python(
        "import sys, torch, sparsebert\n"
        "ops = torch.ops.sparsebert\n"
        "y, q, s = ops.add_layer_norm_quantize(torch.ones(2, 8), None, torch.ones(8), torch.zeros(8), 1e-5)\n"
        "print(y.sum().item(), q.abs().sum().item(), s.tolist(), 'triton' in sys.modules)\n"
    )
    assert found.stdout.split() == ["0.0", "0", "[1.0,", "1.0]", "False"]
