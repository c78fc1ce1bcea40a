"""Triton as a backend of the ops, in its interpreter: each op passes ``opcheck``, compiles into one graph, and takes x
of any rank and stride and no rows at all."""

from __future__ import annotations

import pytest
import torch

import sparsebert as sb
from packed_cases import KINDS, held, make
from sparsebert.ops import layouts, select

# Dense, Triton has no kernel for fp32.
DTYPES = {"dense": torch.float16}
# A kind of every structure, in each layout that has a kernel of Triton.
PAIRS = [
    (kind, layout)
    for kind in (
        "nm-2:4",
        "nm-3:8",
        "bitmap-5%",
        "low-rank",
        "rows",
        "factors+2:4",
        "factors+bitmap",
        "int8",
        "int8-static+1:4",
        "dense",
    )
    for layout in layouts.names(make(kind).spec.op)
    if any(c.backend == "triton" for c in select.candidates(make(kind).spec.op, layout))
]


def made_for(kind):
    return make(kind, DTYPES.get(kind, torch.float32))


def serves(made, layout):
    """Whether Triton runs this layout of this weight here, which its interpreter does."""
    dtype = made.bias.dtype
    if layouts.get(made.spec.op, layout).supports(made.spec, dtype, torch.device("cpu")) is not None:
        return False
    problem = select.problem_of(made.spec, layout, torch.empty(3, made.spec.in_features, dtype=dtype), "gelu")
    return any(c.backend == "triton" and reason is None for c, reason in select.review(problem))


@pytest.mark.parametrize(("kind", "layout"), [pair for pair in PAIRS if serves(made_for(pair[0]), pair[1])])
def test_contracts(kind, layout):
    made, dtype = made_for(kind), DTYPES.get(kind, torch.float32)
    op = getattr(torch.ops.sparsebert, made.spec.op)
    weight, sizes = held(made, layout, dtype), {"layout": layout, **made.spec._asdict(), "activation": "gelu"}
    x = torch.randn(5, made.spec.in_features).to(dtype)
    torch._dynamo.reset()
    with sb.backend("triton"):
        torch.library.opcheck(op.default, (x, weight, made.bias), sizes)
        expected = op(x, weight, made.bias, **sizes)

        def call(x):
            return op(x, weight, made.bias, **sizes)

        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), expected)
        assert call(x[:0]).shape == (0, made.spec.out_features)
        # Not to the bit: t = x vᵀ is torch's, whose order of sums depends on strides.
        torch.testing.assert_close(call(x[0]), expected[0])
        strided = torch.empty(made.spec.in_features, 5, dtype=dtype).t().copy_(x)
        apart = torch.full((5, 2 * made.spec.in_features), torch.nan, dtype=dtype)[:, : made.spec.in_features].copy_(x)
        for view in (strided, apart, x.view(5, 1, -1)):
            torch.testing.assert_close(call(view).view(expected.shape), expected)


def test_every_op_has_a_kernel():
    served = {made_for(kind).spec.op for kind, layout in PAIRS if serves(made_for(kind), layout)}
    assert served == {make(kind).spec.op for kind in KINDS}
