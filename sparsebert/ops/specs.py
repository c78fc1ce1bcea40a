"""What an op is told about a weight besides its tensors: the pattern and the sizes, one named tuple an op.

The fields are the op's keyword arguments, in order, with their defaults; ``op`` is its name and ``label`` how tables
and messages call the pattern. ``SPECS`` has all that are linear layers, by op.
"""

from __future__ import annotations

from typing import NamedTuple


class NMSpec(NamedTuple):
    """An n:m weight: n of every m along ``in_features``."""

    n: int
    m: int
    in_features: int
    out_features: int

    @property
    def op(self) -> str:
        return "nm_linear"

    @property
    def label(self) -> str:
        return f"{self.n}:{self.m}"


class BitmapSpec(NamedTuple):
    """An unstructured sparse weight with ``nnz`` non-zeros."""

    nnz: int
    in_features: int
    out_features: int

    @property
    def op(self) -> str:
        return "bitmap_linear"

    @property
    def label(self) -> str:
        return f"bitmap {self.nnz / max(1, self.in_features * self.out_features):.3g}"


class LowRankSpec(NamedTuple):
    """A product of two factors; or ``parts`` of them of one size, one under the other (``formats.low_rank``)."""

    rank: int
    in_features: int
    out_features: int
    parts: int = 1

    @property
    def op(self) -> str:
        return "low_rank_linear"

    @property
    def label(self) -> str:
        return _rank_label(self.rank, self.parts)


class LowRankSparseSpec(NamedTuple):
    """A product of two factors plus a sparse part.

    ``sparse`` is ``rows``, ``nm`` or ``bitmap``. ``n`` and ``m`` are those of ``nm`` (1 and 1 else); ``count`` is the
    number of rows or of non-zeros (0 for ``nm``). ``parts``: of the factors, as in ``LowRankSpec``; S is one.
    """

    rank: int
    sparse: str
    n: int
    m: int
    count: int  # type: ignore[assignment]  # hides a method of tuples that nothing here needs
    in_features: int
    out_features: int
    parts: int = 1

    @property
    def op(self) -> str:
        return "low_rank_sparse_linear"

    @property
    def label(self) -> str:
        factors = _rank_label(self.rank, self.parts)
        if self.sparse == "nm":
            return f"{factors} + {self.n}:{self.m}"
        if self.sparse == "rows":
            return f"{factors} + {self.count} rows"
        return f"{factors} + bitmap {self.count / max(1, self.in_features * self.out_features):.3g}"


class Int8Spec(NamedTuple):
    """An int8 weight. ``activations`` is ``dynamic`` or ``static``; ``n`` and ``m`` its pattern, 1 and 1 for none."""

    activations: str
    n: int
    m: int
    in_features: int
    out_features: int

    @property
    def op(self) -> str:
        return "int8_linear"

    @property
    def label(self) -> str:
        return f"int8 {self.activations}" + ("" if self.m == 1 else f" {self.n}:{self.m}")


class DenseSpec(NamedTuple):
    """A dense weight."""

    in_features: int
    out_features: int

    @property
    def op(self) -> str:
        return "dense_linear"

    @property
    def label(self) -> str:
        return "dense"


class AddLayerNormSpec(NamedTuple):
    """A linear layer, and what follows it: a residual is added, and rows are normalized; ``quantize``: as int8 too."""

    linear: Spec
    quantize: bool

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @property
    def op(self) -> str:
        return add_layer_norm_op(self.linear.op, quantize=self.quantize)

    @property
    def label(self) -> str:
        return self.linear.label


class RowsSpec(NamedTuple):
    """No weight: rows of ``in_features`` numbers, for the op of that name."""

    op: str
    in_features: int

    @property
    def out_features(self) -> int:
        return self.in_features

    @property
    def label(self) -> str:
        return ""


class AttentionSpec(NamedTuple):
    """No weight: ``heads`` of ``head_size`` features each."""

    heads: int
    head_size: int

    @property
    def in_features(self) -> int:
        return self.heads * self.head_size

    @property
    def out_features(self) -> int:
        return self.heads * self.head_size

    @property
    def op(self) -> str:
        return "varlen_attention"

    @property
    def label(self) -> str:
        return f"{self.heads} heads of {self.head_size}"


def add_layer_norm_op(op: str, *, quantize: bool) -> str:
    """The name of the op that is ``op`` and what follows it."""
    return f"{op}_add_layer_norm" + ("_quantize" if quantize else "")


def _rank_label(rank: int, parts: int) -> str:
    return f"rank {rank}" if parts == 1 else f"{parts} of rank {rank}"


Spec = NMSpec | BitmapSpec | LowRankSpec | LowRankSparseSpec | Int8Spec | DenseSpec | RowsSpec | AttentionSpec
SPECS: dict[str, type[Spec]] = {
    "nm_linear": NMSpec,
    "bitmap_linear": BitmapSpec,
    "low_rank_linear": LowRankSpec,
    "low_rank_sparse_linear": LowRankSparseSpec,
    "int8_linear": Int8Spec,
    "dense_linear": DenseSpec,
}
