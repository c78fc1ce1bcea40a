"""What a measurement of one linear layer is made of: its operands, its calls, and what they are judged by.

A :class:`Peer` builds, for one :class:`Case` (a shape, a token count, an activation), calls that differ only in the
copy of the weight they read, a reference in float64 computed from the *same* pruned or quantized operands, and the
bytes and operations that such an operator needs at least. So an error here is a kernel's error, never that of pruning
or quantizing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.bench.linear.shapes import Shape
from sparsebert.formats import nm

Call = Callable[[], Tensor]

# Bounds of ||y - reference|| / ||reference||: about twice what a 16-bit product of such sizes comes to, its result and
# its operands after an activation being rounded.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass
class Case:
    """One shape at one token count on one device. ``activation`` (``none`` or ``gelu``) is part of the work.
    ``copies_for`` says how many copies of so many bytes outgrow the cache. ``dry``: the device stands in for a GPU."""

    shape: Shape
    tokens: int
    device: torch.device
    generator: torch.Generator
    copies_for: Callable[[int], int]
    activation: str = "none"
    dry: bool = False

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, device=self.device, generator=self.generator)
        return (values * scale).to(dtype)

    def integers(self, *size: int) -> Tensor:
        return torch.randint(-127, 128, size, device=self.device, generator=self.generator, dtype=torch.int8)

    def operands(self, dtype: torch.dtype, *, pruned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x (tokens, in), W (out, in) and b (out) of ordinary size; ``pruned``: W keeps 2 of every 4."""
        shape = self.shape
        x = self.normal(self.tokens, shape.in_features, dtype=dtype)
        w = self.normal(shape.out_features, shape.in_features, dtype=dtype, scale=shape.in_features**-0.5)
        b = self.normal(shape.out_features, dtype=dtype)
        return x, nm.project(w, 2, 4) if pruned else w, b

    def rotate(self, weight: Tensor) -> list[Tensor]:
        """``weight`` and as many copies as outgrow the cache together with it."""
        count = self.copies_for(weight.nbytes)
        return [weight, *(weight.clone(memory_format=torch.preserve_format) for _ in range(count - 1))]

    def rotate_all(self, weight: list[Tensor]) -> list[list[Tensor]]:
        """The same for all tensors of a packed weight."""
        count = self.copies_for(max(1, sum(tensor.nbytes for tensor in weight)))
        return [weight, *([tensor.clone() for tensor in weight] for _ in range(count - 1))]

    def activate(self, y: Tensor) -> Tensor:
        """The activation as a step of its own."""
        return F.gelu(y) if self.activation == "gelu" else y

    @property
    def flops(self) -> int:
        """Multiplications and additions of the dense product, whatever is skipped."""
        return 2 * self.tokens * self.shape.out_features * self.shape.in_features

    def moved(self, weight_bytes: int, in_bytes: int, out_bytes: int, *others: Tensor) -> int:
        """Bytes of x and y at so many a number, of the weight, and of ``others``, each once."""
        shape = self.shape
        total = self.tokens * (shape.in_features * in_bytes + shape.out_features * out_bytes) + weight_bytes
        return total + sum(other.nbytes for other in others)


@dataclass
class Built:
    """Calls ready to run and what to judge them by.

    ``variants`` maps an algorithm's name to its calls, one for each copy of the weight. ``limit`` bounds
    ||y - reference|| / ||reference||; 0 asks for equality. ``operations`` are the multiplications and additions that
    the format needs, those of the dense product where it is None. ``notes`` are fields for the row. Rows of y beyond
    the tokens are padding.
    """

    variants: dict[str, list[Call]]
    reference: Callable[[], Tensor]
    weight_bytes: int
    moved_bytes: int
    limit: float
    operations: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One way to compute a linear layer.

    ``group``: ``dense`` (16- or 32-bit weights without zeros: a path that a compressed layer has to beat), ``library``
    (sparse or quantized kernels of others), ``own``. ``rate``: the ceiling that bounds its arithmetic. ``plain``:
    whether it runs without an activation, ``gelu``: the places where it runs with one. ``compiled``: builds code at
    first use, for seconds. ``needs_cuda``: torch has these kernels for CUDA only. ``row``: fields for its rows.
    """

    name: str
    group: str
    dtype: str
    epilogue: str
    build: Callable[[Case], Built]
    rate: str
    plain: bool = True
    gelu: tuple[str, ...] = ("ffn_in",)
    compiled: bool = False
    needs_cuda: bool = False
    row: dict[str, Any] = field(default_factory=dict)

    def activations(self, shape: Shape) -> tuple[str, ...]:
        """What it is measured with at ``shape``."""
        return ("none",) * self.plain + ("gelu",) * (shape.place in self.gelu)


def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in float64."""
    y = x.double() @ w.double().T
    return y if b is None else y + b.double()


def relative_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference|| in float64; NaN or an infinity anywhere gives infinity."""
    y = y.double()
    if not torch.isfinite(y).all():
        return float("inf")
    return float((y - reference).norm() / reference.norm())


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Rows of zeros up to a multiple, which the caller of a sparse library must supply."""
    short = -x.shape[0] % multiple
    return torch.cat([x, x.new_zeros(short, *x.shape[1:])]) if short else x


def spoil(call: Call) -> None:
    """Frees a spoilt block of y's size, which the allocator hands out next: what a kernel leaves unwritten shows."""
    y = call()
    shape, dtype, device = y.shape, y.dtype, y.device
    del y
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    torch.full(shape, value, dtype=dtype, device=device)
