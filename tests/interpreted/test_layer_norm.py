"""``add_layer_norm``, its rows as int8, and ``embed_layer_norm`` in Triton's interpreter, against float64; the int8 as
the definition has it, to the bit."""

from __future__ import annotations

import pytest
import torch

import sparsebert as sb
from sparsebert.formats import int8
from sparsebert.kernels.embeddings import embed_layer_norm as embed
from sparsebert.kernels.layer_norm import add_layer_norm as kernel
from sparsebert.ops import add_layer_norm, add_layer_norm_quantize, embed_layer_norm
from sparsebert.ops.triton.layer_norm import LONGEST

DTYPES = [torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 7), (5, 64), (4, 100), (2, 768), (2, 1025), (1, LONGEST)]


def parameters(features, dtype=torch.float32):
    return (1 + torch.randn(features) / 4).to(dtype), torch.randn(features).to(dtype)


def exact(x, residual, weight, bias, eps):
    """LayerNorm by its formula, in float64."""
    z = x.double() if residual is None else x.double() + residual.double()
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def close(found, expected, theirs):
    """At most twice the error of torch's op in that dtype, and the rounding of y itself."""
    allowed = 2 * (theirs.double() - expected).abs().max() + torch.finfo(found.dtype).eps * expected.abs().max()
    assert (found.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, with_residual, dtype):
    x = (3 * torch.randn(shape) + 2).to(dtype)
    residual = torch.randn(shape).to(dtype) if with_residual else None
    weight, bias = parameters(shape[1], dtype)
    y, q, scale = kernel(x, residual, weight, bias, 1e-5)
    assert y.shape == shape and y.dtype == dtype and q is None and scale is None
    with sb.backend("reference"):
        theirs = add_layer_norm(x, residual, weight, bias, 1e-5)
    close(y, exact(x, residual, weight, bias, 1e-5), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_stored_result_quantized(shape, dtype):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = parameters(shape[1], dtype)
    alone, _, _ = kernel(x, residual, weight, bias, 1e-12)
    for given in (None, torch.tensor(0.01), torch.tensor(3.0)):
        y, q, scale = kernel(x, residual, weight, bias, 1e-12, quantize=True, input_scale=given)
        assert torch.equal(y, alone)
        for found, expected in zip((q, scale), int8.quantize_rows(y, given), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_large_mean_does_not_cancel():
    """Where E[x²] - E[x]² in fp32 would have nothing left: 4096² has no room for a variance of one."""
    x = 4096 + torch.randn(4, 300)
    weight, bias = torch.ones(300), torch.zeros(300)
    y, _, _ = kernel(x, None, weight, bias, 1e-12)
    assert (y.double() - exact(x, None, weight, bias, 1e-12)).abs().max() < 1e-3


def test_the_sum_is_not_rounded_in_between():
    """2048 + 1 is no half float: added in fp16, both rows would be one, and constant."""
    x = torch.full((1, 64), 2048.0).half()
    residual = torch.tensor([0.0, 1.0]).repeat(32)[None].half()
    y, _, _ = kernel(x, residual, torch.ones(64).half(), torch.zeros(64).half(), 1e-12)
    assert torch.equal(y, torch.tensor([-1.0, 1.0]).repeat(32)[None].half())


@pytest.mark.parametrize("given", [None, 0.02])
def test_rows_that_are_not_finite_spoil_themselves_alone(given):
    given = None if given is None else torch.tensor(given)
    x, residual = torch.randn(6, 33), torch.randn(6, 33)
    weight, bias = parameters(33)
    clean = kernel(x, residual, weight, bias, 1e-5, quantize=True, input_scale=given)
    x[1, 5], x[2, 32], residual[4, 0] = torch.nan, -torch.inf, torch.inf
    y, q, scale = kernel(x, residual, weight, bias, 1e-5, quantize=True, input_scale=given)
    assert y[[1, 2, 4]].isnan().all() and scale[[1, 2, 4]].isnan().all()
    for found, expected in zip((y, q, scale), clean, strict=True):
        assert torch.equal(found[[0, 3, 5]], expected[[0, 3, 5]])


def test_a_result_too_large_for_its_dtype_shows_in_the_scale():
    """y is infinite in fp16 where the weight is large, and so is what the definition makes of it."""
    x = torch.randn(3, 40).half()
    weight, bias = torch.full((40,), 4e4), torch.zeros(40)
    y, _, scale = kernel(x, None, weight, bias, 1e-5, quantize=True)
    assert y.isinf().any() and torch.equal(scale, int8.quantize_rows(y)[1])
    _, _, scale = kernel(x, None, weight, bias, 1e-5, quantize=True, input_scale=torch.tensor(0.02))
    assert scale.isnan().all()


@pytest.mark.parametrize("given", [None, 0.02])
def test_a_bias_that_is_not_a_number_shows_in_every_scale(given):
    """One NaN among numbers, which a maximum passes over."""
    weight, bias = parameters(40)
    bias[7] = torch.nan
    given = None if given is None else torch.tensor(given)
    y, _, scale = kernel(torch.randn(3, 40), None, weight, bias, 1e-5, quantize=True, input_scale=given)
    assert y.isnan().sum() == 3 and scale.isnan().all()


def test_a_constant_row_is_the_bias():
    weight, bias = parameters(40)
    y, q, scale = kernel(torch.full((2, 40), 3.0), None, weight, bias, 1e-5, quantize=True)
    assert torch.equal(y, bias.expand(2, 40))
    y, q, scale = kernel(torch.full((2, 40), 3.0), None, weight, torch.zeros(40), 1e-5, quantize=True)
    assert not y.any() and not q.any() and torch.equal(scale, torch.ones(2))


def test_rows_that_are_further_apart_are_read_where_they_are():
    x, residual = torch.randn(5, 40), torch.randn(5, 40)
    weight, bias = parameters(40)
    expected = kernel(x, residual, weight, bias, 1e-5, quantize=True)
    # Of different strides, NaN in between.
    apart = [torch.full((5, width), torch.nan)[:, :40].copy_(t) for t, width in ((x, 64), (residual, 100))]
    for found, theirs in zip(kernel(*apart, weight, bias, 1e-5, quantize=True), expected, strict=True):
        assert torch.equal(found, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_another_dtype(dtype):
    x, (weight, bias) = torch.randn(3, 40).to(dtype), parameters(40)
    for other in (torch.float16, torch.float32):
        given = weight.to(other), bias.to(other)
        y, _, _ = kernel(x, None, *given, 1e-5)
        assert y.dtype == dtype
        expected = exact(x, None, *given, 1e-5)
        assert (y.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("quantize", [False, True])
def test_through_the_op(quantize):
    """opcheck, one graph, and x of any rank and stride, or without rows."""
    op = torch.ops.sparsebert.add_layer_norm_quantize if quantize else torch.ops.sparsebert.add_layer_norm
    weight, bias = parameters(24)
    x, residual = torch.randn(2, 3, 24), torch.randn(2, 3, 24)

    def call(x, residual):
        found = op(x, residual, weight, bias, 1e-5)
        return found if quantize else (found,)

    torch._dynamo.reset()
    with sb.backend("triton"):
        torch.library.opcheck(op.default, (x, residual, weight, bias, 1e-5))
        torch.library.opcheck(op.default, (x[:0], None, weight, bias, 1e-5))
        expected = call(x, residual)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, residual)
        strided = torch.randn(2, 24, 3).transpose(1, 2).copy_(x)
        apart = torch.full((2, 3, 50), torch.nan)[..., :24].copy_(residual)
        swapped = call(x.transpose(0, 1), residual.transpose(0, 1))
        for tensors in (compiled, call(strided, apart), [tensor.transpose(0, 1) for tensor in swapped]):
            for found, theirs in zip(tensors, expected, strict=True):
                assert torch.equal(found, theirs)
        assert all(tensor.is_contiguous() for tensor in call(strided, apart))
        assert call(x[:, :0], residual[:, :0])[0].shape == (2, 0, 24)
        assert torch.equal(call(x[1, 2], residual[1, 2])[0], expected[0][1, 2])


def tables(features, dtype=torch.float32):
    return [torch.randn(count, features).to(dtype) for count in (50, 20, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 7, 100, 768])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
def test_embeddings_against_float64(ids, features, dtype):
    words, positions, token_types = tables(features, dtype)
    weight, bias = parameters(features, dtype)
    of_words, of_positions, of_types = (torch.randint(len(table), (9,)).to(ids) for table in tables(1))
    # The last of each is there, and the first.
    of_words[:2] = torch.tensor([49, 0])
    for types, table in ((of_types, token_types), (None, None)):
        y = embed(of_words, of_positions, types, words, positions, table, weight, bias, 1e-5)
        z = words.double()[of_words] + positions.double()[of_positions]
        if types is not None:
            z += token_types.double()[types]
        with sb.backend("reference"):
            theirs = embed_layer_norm(of_words, of_positions, types, words, positions, table, weight, bias, 1e-5)
        assert y.shape == (9, features) and y.dtype == dtype
        close(y, exact(z, None, weight, bias, 1e-5), theirs)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("wrong", [-1, "end", 2**31 - 1, -(2**31), 2**40, -(2**40)])
def test_an_id_out_of_range_is_a_row_of_nan_and_reads_nothing(which, wrong):
    """Numbers far out would be read from memory that is not there."""
    given = tables(24)
    weight, bias = parameters(24)
    ids = [torch.randint(len(table), (5,)) for table in given]
    order = (0, 1, 2)

    def call():
        words, positions, token_types = given
        return embed(*(ids[i] for i in order), words, positions, token_types, weight, bias, 1e-5)

    expected = call()
    ids[which][3] = len(given[which]) if wrong == "end" else wrong
    y = call()
    assert y[3].isnan().all() and torch.equal(y[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


def test_embeddings_through_the_op():
    words, positions, token_types = tables(24)
    weight, bias = parameters(24)
    ids = torch.randint(20, (2, 5))
    types = torch.zeros(2, 5, dtype=torch.int32)
    spread = torch.arange(5).expand(2, 5)
    op = torch.ops.sparsebert.embed_layer_norm

    def call(ids, spread, types):
        return op(ids, spread, types, words, positions, token_types, weight, bias, 1e-5)

    torch._dynamo.reset()
    with sb.backend("triton"):
        torch.library.opcheck(op.default, (ids, spread, types, words, positions, token_types, weight, bias, 1e-5))
        torch.library.opcheck(op.default, (ids, spread, None, words, positions, None, weight, bias, 1e-5))
        expected = call(ids, spread, types)
        assert expected.shape == (2, 5, 24) and expected.is_contiguous()
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(ids, spread, types), expected)
        columns = ids.t().contiguous().t()
        assert torch.equal(call(columns, spread.contiguous(), types), expected)
        assert call(ids[:0], spread[:0], types[:0]).shape == (0, 5, 24)
        apart = torch.full((50, 30), torch.nan)[:, :24].copy_(words)
        across = torch.empty(24, 20).t().copy_(positions)
        assert torch.equal(op(ids, spread, types, apart, across, token_types, weight, bias, 1e-5), expected)


def test_rows_longer_than_a_program_holds_are_refused():
    x, (weight, bias) = torch.randn(1, LONGEST + 1), parameters(LONGEST + 1)
    for op in (add_layer_norm, add_layer_norm_quantize):
        with sb.backend("triton"), pytest.raises(RuntimeError, match=r"triton: needs rows of 1 to 8192 features, not"):
            op(x, None, weight, bias, 1e-5)
        op(x, None, weight, bias, 1e-5)
