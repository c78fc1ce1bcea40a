"""``FusedEncoderLayer``: a post-norm encoder layer in few ops, on tokens without padding.

    q, k, v = x W_qkvᵀ + b_qkv                   one projection
    a = softmax(q kᵀ / sqrt(d)) v                within each sequence
    h = LayerNorm(a W_oᵀ + b_o + x)
    y = LayerNorm(act(h W_1ᵀ + b_1) W_2ᵀ + b_2 + h)

Each linear layer is dense or packed, in any format. Where one quantizes its input, the op before it writes the int8
rows and their scales: the normalization for W_qkv and W_1, the activation for W_2 (or, where W_1 is int8 and W_2 has a
static scale, the product itself).

For inference: dropout is left out. Under grad torch's own differentiable functions take the place of fused ops.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebert import ops
from sparsebert.nn import projection
from sparsebert.nn.int8_linear import Int8Linear
from sparsebert.nn.packed_linear import PackedLinear
from sparsebert.ops import linear_layer_norm
from sparsebert.ops.activations import activate
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.specs import DenseSpec, Spec

PROJECTION = "query_key_value"
PARTS = ("query", "key", "value")
LINEARS = ("attention_output", "intermediate", "output")
NORMS = ("attention_norm", "output_norm")

# q, k and v, each (total, hidden), to what attention makes of them.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """``x (total, features)`` and, where the layer that reads it wants them, its int8 rows and their scales."""

    x: Tensor
    q: Tensor | None = None
    s: Tensor | None = None


# What a linear layer reads: x, or where it quantizes that its int8 rows and their scales.
Input = Tensor | tuple[Tensor, Tensor]


class Weight(NamedTuple):
    """The tensors that a linear layer holds its weight in, and what they are."""

    spec: Spec
    layout: str
    tensors: list[Tensor]


class Normalized(NamedTuple):
    """A linear layer by its path, the normalization after it, and whether what reads the result wants int8 rows, by
    which scale where it is static."""

    path: str
    linear: Any
    norm: Any
    quantize: bool
    scale: Tensor | None


class FusedEncoderLayer(nn.Module):
    """See the module. ``parts``: a linear layer for each of ``attention_output``, ``intermediate`` and ``output``, a
    ``nn.LayerNorm`` as ``attention_norm`` and ``output_norm``, and either one layer as ``query_key_value``, whose
    outputs are those of query, key and value in this order, or three as ``query``, ``key`` and ``value``.
    ``heads`` of attention; ``activation`` is one of ``ops.activations``. ``paths``: where each of these, by its name
    and with query, key and value apart, lies in the layer that this one ``stands_for``: ``state_dict()`` has the names
    and tensors of that layer.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        *,
        heads: int,
        activation: str,
        paths: Mapping[str, str],
        stands_for: nn.Module,
    ) -> None:
        super().__init__()
        names = [PROJECTION] if PROJECTION in parts else list(PARTS)
        for name in (*names, *LINEARS, *NORMS):
            self.add_module(name, parts[name])
        self.heads = heads
        self.activation = activation
        self.paths = dict(paths)
        # In a tuple it is none of the modules: what it held lies here now.
        self.stands_for = (stands_for,)
        if isinstance(self.intermediate, PackedLinear):
            # So that its kernel is chosen, and explained, with what it does.
            self.intermediate.activation = activation

    @property
    def fused_roles(self) -> tuple[str, ...]:
        """The roles of the linear layers, which are also their names."""
        return (*((PROJECTION,) if PROJECTION in self._modules else PARTS), *LINEARS)

    @property
    def reader(self) -> nn.Module | None:
        """The layer that reads what comes in, where it is one."""
        return self._modules.get(PROJECTION)

    def forward(
        self,
        rows: Rows,
        cu_seqlens: Tensor,
        max_length: int,
        *,
        attend: Attend | None = None,
        reader: nn.Module | None = None,
    ) -> Rows:
        """``rows.x (total, hidden) -> (total, hidden)``; ``cu_seqlens`` and ``max_length`` as ``ops.varlen_attention``.

        ``attend`` takes its place where attention is wanted otherwise; ``reader`` reads the result.
        """
        q, k, v = self._project(rows)
        if attend is not None:
            context = attend(q, k, v)
        else:
            context = ops.varlen_attention(q, k, v, cu_seqlens, heads=self.heads, max_length=max_length)
        layer: Any = self.attention_output
        given = _quantized(layer, Rows(context)) if _quantizes(layer) else context
        hidden = _linear_add_norm(layer, given, rows.x, self.attention_norm, self.intermediate)
        given = self._feed_in(hidden)
        return _linear_add_norm(self.output, given, hidden.x, self.output_norm, reader)

    def _project(self, rows: Rows) -> tuple[Tensor, ...]:
        if (merged := self.reader) is not None:
            return _linear(merged, rows).chunk(3, dim=-1)
        return tuple(_linear(self._modules[name], rows) for name in PARTS)

    def _feed_in(self, rows: Rows) -> Input:
        """What the output layer reads: act(h W_1ᵀ + b_1)."""
        inner: Any = self.intermediate
        outer: Any = self.output
        activation = self.activation
        if not _quantizes(outer):
            return _linear(inner, rows, activation)
        scale = outer.static_scale
        if _quantizes(inner) and scale is not None:
            return inner.to_int8(*_quantized(inner, rows), scale, activation=activation)  # type: ignore[no-any-return]
        if isinstance(inner, PackedLinear) and not _quantizes(inner):
            return ops.quantize_rows(_linear(inner, rows, activation), scale)
        return ops.quantize_rows(_linear(inner, rows), scale, activation=activation)

    # The names of the layer that it stands for

    def parts(self) -> dict[str, nn.Module]:
        """The modules by their paths in that layer, query, key and value apart."""
        found = dict(self._modules)
        if (merged := found.pop(PROJECTION, None)) is not None:
            found = {**dict(zip(PARTS, projection.split(merged), strict=True)), **found}  # type: ignore[arg-type]
        return {path: found[name] for name, path in self.paths.items()}  # type: ignore[misc]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Tensors by the names of the layer that this one stands for; those of query, key and value are copies."""
        found = OrderedDict() if destination is None else destination
        for path, module in self.parts().items():
            module.state_dict(destination=found, prefix=f"{prefix}{path}.", keep_vars=keep_vars)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        raise ValueError(
            f"{prefix.removesuffix('.') or 'FusedEncoderLayer'}: a fused layer takes no state dict; call "
            f"sparsebert.unfuse_(model), load, and fuse again"
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, activation={self.activation}"


def _linear_add_norm(layer: Any, given: Input, residual: Tensor, norm: Any, reader: Any) -> Rows:
    """LayerNorm(y + residual), y being what ``layer`` makes of ``given``; quantized as well where ``reader``, the layer
    that reads it, quantizes its input. By one op where a kernel may be there that does all of it."""
    x, s = given if isinstance(given, tuple) else (given, None)
    held = None if torch.is_autocast_enabled(residual.device.type) else held_by(layer)
    if held is not None:
        spec, layout, weight = held
        quantize = _quantizes(reader)
        if linear_layer_norm.fusable(spec, layout, residual, quantize=quantize):
            scale = reader.static_scale if quantize else None
            call = linear_layer_norm.Call(x, s, weight, layer.bias, residual, norm.weight, norm.bias, norm.eps, scale)
            return Rows(*linear_layer_norm.linear_add_layer_norm(call, spec, layout, quantize=quantize))
    y = _linear(layer, Rows(x)) if s is None else layer.from_int8(x, s, activation="none", dtype=residual.dtype)
    return _add_norm(y, residual, norm, reader)


def _add_norm(y: Tensor, residual: Tensor, norm: Any, reader: Any) -> Rows:
    parts = (norm.weight, norm.bias, norm.eps)
    if by_torch(y, residual, norm.weight, norm.bias):
        return Rows(F.layer_norm(y + residual, y.shape[-1:], *parts))
    if _quantizes(reader):
        return Rows(*ops.add_layer_norm_quantize(y, residual, *parts, reader.static_scale))
    return Rows(ops.add_layer_norm(y, residual, *parts))


def normalized(model: nn.Module) -> list[Normalized]:
    """The linear layers of the fused encoder layers in ``model`` that a residual and a normalization follow."""
    found = []
    for path, stack in model.named_modules():
        layers: list[Any] = [(n, layer) for n, layer in stack.named_children() if isinstance(layer, FusedEncoderLayer)]
        for (name, layer), after in pairwise([*layers, None]):
            reader = None if after is None else after[1].reader
            for linear, norm, reads in zip(LINEARS[::2], NORMS, (layer.intermediate, reader), strict=True):
                quantize = _quantizes(reads)
                found.append(
                    Normalized(
                        ".".join(filter(None, (path, name, linear))),
                        getattr(layer, linear),
                        getattr(layer, norm),
                        quantize,
                        reads.static_scale if quantize else None,
                    )
                )
    return found


def held_by(layer: nn.Module) -> Weight | None:
    """The weight of a layer whose call is one op of inference on all of x; None where it is none, or where a gradient
    may be wanted."""
    if torch.is_grad_enabled():
        return None
    if type(layer) is nn.Linear:
        return Weight(DenseSpec(layer.in_features, layer.out_features), NEUTRAL, [layer.weight])
    if not isinstance(layer, PackedLinear) or layer.gathers or (isinstance(layer, Int8Linear) and not layer.quantizes):
        return None
    return Weight(layer.spec, layer.layout, layer.held_tensors)


def by_torch(*tensors: Tensor | None) -> bool:
    """Whether torch's own functions have to compute: a gradient is wanted, or autocast chooses the dtypes."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return any(tensor is not None and torch.is_autocast_enabled(tensor.device.type) for tensor in tensors[:1])


def _quantizes(layer: nn.Module | None) -> bool:
    # A gradient goes through the layer's own call.
    return isinstance(layer, Int8Linear) and layer.quantizes and not torch.is_grad_enabled()


def _quantized(layer: Int8Linear, rows: Rows) -> tuple[Tensor, Tensor]:
    if rows.q is None or rows.s is None:
        return ops.quantize_rows(rows.x, layer.static_scale)
    return rows.q, rows.s


def _linear(layer: Any, rows: Rows, activation: str = "none") -> Tensor:
    """activation(x Wᵀ + b), by the int8 rows where the layer takes them; a packed layer has its activation itself."""
    if _quantizes(layer):
        return layer.from_int8(*_quantized(layer, rows), activation=activation, dtype=rows.x.dtype)
    if isinstance(layer, PackedLinear):
        y: Tensor = layer(rows.x)
        return y
    if activation == "none" or torch.is_grad_enabled():
        return activate(layer(rows.x), activation)
    # One op, so that a kernel may apply the activation as it stores.
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    return ops.dense_linear(rows.x, [layer.weight], layer.bias, layout="neutral", activation=activation, **sizes)
