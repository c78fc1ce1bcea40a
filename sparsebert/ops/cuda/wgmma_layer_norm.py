"""The wgmma kernel that adds a residual and normalizes in its epilogue (``csrc/wgmma/layer_norm.cuh``): what it can
run, and one call.

It has run on no GPU yet, so it waits until it is measured or forced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.ops.cuda import calls, extension, wgmma
from sparsebert.ops.cuda.calls import address
from sparsebert.ops.cuda.wgmma import copyable, whole
from sparsebert.ops.select import Problem

# Of features: a block of a cluster has so many of each row, and a cluster eight blocks at most.
MULTIPLE, MOST = 128, 1024


def refusal(problem: Problem) -> str | None:
    """None, or why the kernel cannot run ``problem``, whose spec is an ``AddLayerNormSpec``."""
    linear = problem._replace(spec=problem.spec.linear)
    if linear.out_features % MULTIPLE or linear.out_features > MOST:
        return f"needs out_features in multiples of {MULTIPLE} up to {MOST}, not {linear.out_features}"
    if getattr(linear.spec, "parts", 1) > 1 and problem.layout in wgmma.AS_STORED:
        return f"needs factors in one part, not {linear.spec.parts}"
    # y, unlike that of an int8 product alone, has 16 bits.
    return calls.unserved(problem.dtype, integer=False) or wgmma.refusal(linear)


def waits(problem: Problem) -> str:
    """Why the kernel does not run unmeasured."""
    return wgmma.WAITS.format("")


def linear_add_layer_norm(
    x: Tensor,
    values: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    *,
    t: Tensor | None = None,
    u: Tensor | None = None,
    alpha: float = 1.0,
    x_scale: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    quantize: bool = False,
    input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = LayerNorm(alpha (x Wᵀ + t uᵀ) + b + residual), ``(tokens, out)`` in ``dtype`` (that of x), by ``gamma``,
    ``beta (out)`` and ``eps``; where ``quantize`` is set also ``q int8 (tokens, out)`` and ``scale fp32 (tokens)`` of
    y as it is stored, by ``input_scale fp32 ()`` if given: ``formats.int8`` to the bit. What is normalized is not
    rounded before.

    ``x``, ``values``, ``positions``, ``t``, ``u``, ``x_scale`` and ``scales`` as in ``wgmma.linear``, with t in one
    part; ``residual (tokens, out)`` in ``dtype``, fp16 or bf16. out is a multiple of 128 up to 1024. A row that is not
    finite before it is normalized is NaN in y. ``ValueError`` where something does not fit.

    On the current stream of x's device; may be captured in a CUDA graph.
    """
    tokens, out_features = len(x), len(values)
    y = x.new_empty((tokens, out_features), dtype=dtype or x.dtype)
    q = x.new_empty((tokens, out_features), dtype=torch.int8) if quantize else None
    q_scale = x.new_empty(tokens, dtype=torch.float32) if quantize else None
    if not tokens:
        return y, q, q_scale
    # Copies live until the call is launched; after that the stream's order keeps them.
    x, values, bias = copyable(x), whole(values), None if bias is None else bias.contiguous()
    positions, t, u, residual = (None if one is None else whole(one) for one in (positions, t, u, residual))
    gamma, beta = _parameter(gamma), _parameter(beta)
    tensors = {"t": t, "u": u, "bias": bias, "residual": residual, "x_scale": x_scale, "scales": scales}
    extension.load().wgmma_layer_norm(
        **wgmma.product(x, values, positions, y, alpha=alpha, **tensors),
        gamma=gamma.data_ptr(),
        gamma_number=calls.NUMBERS[gamma.dtype],
        beta=beta.data_ptr(),
        beta_number=calls.NUMBERS[beta.dtype],
        eps=eps,
        q=address(q),
        q_scale=address(q_scale),
        input_scale=address(input_scale),
    )
    return y, q, q_scale


def _parameter(tensor: Tensor) -> Tensor:
    """In a type that the kernel reads: all floats but float64."""
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()
