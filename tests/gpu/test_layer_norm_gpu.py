"""``add_layer_norm``, its rows as int8, and ``embed_layer_norm`` on a GPU: against float64, the int8 to the bit,
compiled and captured. Needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from sparsebert.formats import int8
from sparsebert.ops import add_layer_norm, add_layer_norm_quantize, embed_layer_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = 1e-12


def given(*shape, dtype):
    """x, residual, weight and bias."""
    features = shape[-1]
    tensors = (3 * torch.randn(shape) + 1, torch.randn(shape), 1 + torch.randn(features) / 4, torch.randn(features))
    return [tensor.to("cuda", dtype) for tensor in tensors]


def tables(features, dtype):
    """words, positions, token_types, weight and bias."""
    return [torch.randn(n, features).to("cuda", dtype) for n in (1000, 512, 2)] + given(1, features, dtype=dtype)[2:]


def ids(*shape, dtype=torch.int64):
    """input_ids, position_ids and token_type_ids."""
    return [torch.randint(count, shape).to("cuda", dtype) for count in (1000, 512, 2)]


def exact(z, weight, bias):
    """LayerNorm by its formula, in float64."""
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double() + bias.double()


def close(found, expected, theirs):
    """At most twice the error of torch's op in that dtype, and the rounding of y itself."""
    allowed = 2 * (theirs.double() - expected).abs().max() + torch.finfo(found.dtype).eps * expected.abs().max()
    assert (found.double() - expected).abs().max() <= allowed


@pytest.fixture(autouse=True)
def _poisoned():
    """New tensors hold NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 7, 384, 768, 1000, 1024, 8192])
def test_layer_norm_against_float64(features, dtype):
    for tokens in (1, 33, 4096 if features < 2000 else 128):
        x, residual, weight, bias = given(tokens, features, dtype=dtype)
        for other in (residual, None):
            with sb.backend("triton"):
                y = add_layer_norm(x, other, weight, bias, EPS)
            z = x if other is None else x + other
            theirs = F.layer_norm(z, (features,), weight, bias, EPS)
            close(y, exact(x.double() if other is None else x.double() + other.double(), weight, bias), theirs)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("features", [1, 7, 768, 1000, 8192])
def test_rows_are_those_of_the_cpu_to_the_bit(features, static):
    """Of the y that the kernel has stored, which is that of the op without int8."""
    for dtype in DTYPES:
        x, residual, weight, bias = given(64, features, dtype=dtype)
        x[5] = 0
        x[1, 0], residual[3, features - 1] = torch.nan, torch.inf
        scale = torch.tensor(0.02) if static else None
        with sb.backend("triton"):
            alone = add_layer_norm(x, residual, weight, bias, EPS)
            y, q, s = add_layer_norm_quantize(x, residual, weight, bias, EPS, scale if scale is None else scale.cuda())
        torch.testing.assert_close(y, alone, rtol=0, atol=0, equal_nan=True)
        rows, scales = int8.quantize_rows(y.cpu(), scale)
        torch.testing.assert_close(s.cpu(), scales, rtol=0, atol=0, equal_nan=True)
        finite = scales.isfinite()
        assert finite.logical_not().nonzero().flatten().tolist() == [1, 3]
        assert torch.equal(q.cpu()[finite], rows[finite])


@pytest.mark.parametrize("static", [False, True])
def test_a_bias_that_is_not_a_number_shows_in_every_scale(static):
    """One NaN among numbers, which a maximum passes over."""
    x, residual, weight, bias = given(5, 768, dtype=torch.float16)
    bias[7] = torch.nan
    with sb.backend("triton"):
        scale = torch.tensor(0.02, device="cuda") if static else None
        _, _, s = add_layer_norm_quantize(x, residual, weight, bias, EPS, scale)
    assert s.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_further_apart(dtype):
    x, residual, weight, bias = given(37, 768, dtype=dtype)
    apart = [
        torch.full((37, width), torch.nan, device="cuda", dtype=dtype)[:, :768].copy_(tensor)
        for tensor, width in ((x, 2304), (residual, 1001))
    ]
    with sb.backend("triton"):
        for ours, theirs in zip(
            add_layer_norm_quantize(*apart, weight, bias, EPS),
            add_layer_norm_quantize(x, residual, weight, bias, EPS),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 7, 384, 768, 1024])
def test_embeddings_against_float64(features, dtype):
    words, positions, token_types, weight, bias = tables(features, dtype)
    for kind in (torch.int64, torch.int32):
        of_words, of_positions, of_types = ids(5, 77, dtype=kind)
        for types, table in ((of_types, token_types), (None, None)):
            arguments = (of_words, of_positions, types, words, positions, table, weight, bias, EPS)
            with sb.backend("triton"):
                y = embed_layer_norm(*arguments)
            with sb.backend("reference"):
                theirs = embed_layer_norm(*arguments)
            z = words.double()[of_words] + positions.double()[of_positions]
            if types is not None:
                z += token_types.double()[types]
            close(y, exact(z, weight, bias), theirs)


@pytest.mark.parametrize("which", range(3))
def test_an_id_out_of_range_is_a_row_of_nan_and_reads_nothing(which):
    """Far out, a read would end the process; the device goes on."""
    arguments, own = tables(768, torch.float16), ids(9)
    with sb.backend("triton"):
        expected = embed_layer_norm(*own, *arguments, EPS)
        for wrong in (-1, len(arguments[which]), 2**31, 2**60, -(2**60)):
            own[which][4] = wrong
            y = embed_layer_norm(*own, *arguments, EPS)
            assert y[4].isnan().all() and torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], expected[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    ops = torch.ops.sparsebert
    x, residual, weight, bias = given(3, 40, dtype=dtype)
    with sb.backend("triton"):
        torch.library.opcheck(ops.add_layer_norm.default, (x, residual, weight, bias, EPS))
        torch.library.opcheck(ops.add_layer_norm_quantize.default, (x, None, weight, bias, EPS))
        torch.library.opcheck(ops.embed_layer_norm.default, (*ids(3), *tables(40, dtype), EPS))


@pytest.mark.parametrize("how", ["compiled", "captured"])
def test_one_after_the_other(how):
    arguments, own = tables(768, torch.float16), ids(33)
    weight, bias = arguments[-2:]

    def net(of_words, of_positions, of_types):
        x = embed_layer_norm(of_words, of_positions, of_types, *arguments, EPS)
        y, q, s = add_layer_norm_quantize(x, x.flip(0), weight, bias, EPS)
        return add_layer_norm(y, None, weight, bias, EPS), q, s

    with sb.backend("triton"):
        expected = net(*own)
        if how == "compiled":
            found = torch.compile(net, fullgraph=True)(*own)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = net(*own)
            for tensor in found:
                tensor.zero_()
            graph.replay()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
