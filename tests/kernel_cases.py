"""Every Triton kernel with the configurations it ships with, at BERT's shapes: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# (out_features, in_features) of BERT-base's and BERT-large's layers.
SHAPES = [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096)]
TOKENS = [1, 16, 32, 128, 512, 4096, 16384]
PATTERNS = [(2, 4), (1, 4), (2, 8), (4, 8), (1, 16), (3, 4)]
# Streaming multiprocessors of a GPU with each capability: A100, L4, H200, B200, RTX 5090.
SMS = {80: 108, 89: 58, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Case:
    """``dots``: the dtype of a product of matrices on the tensor cores, or None; ``packed``: whether it reads packed
    weights."""

    name: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    dots: str | None = None
    packed: bool = False


def _sides(config: Any) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def _options(config: Any) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def cases(arch: int) -> Iterator[Case]:
    yield from nm_cases(arch)
    yield from int8_cases(arch)
    yield from bitmap_cases()
    yield from low_rank_cases()
    yield from quantize_cases()
    yield from split_cases()


def split_cases() -> Iterator[Case]:
    for scaled in (False, True):
        pointers = {"partial_ptr": "*i32" if scaled else "*fp32", "bias_ptr": "*fp16", "y_ptr": "*fp16"}
        scales = ("x_scale_ptr", "scale_ptr")
        yield Case(
            f"sum_splits{' int32' if scaled else ''}",
            "split_k:_sum_splits_kernel",
            {**pointers, **(dict.fromkeys(scales, "*fp32") if scaled else {}), "count": "i32", "out_features": "i32"},
            {
                **({} if scaled else dict.fromkeys(scales)),
                "SPLIT_K": 4,
                "SCALED": scaled,
                "STATIC": False,
                "HAS_BIAS": True,
                "ACTIVATION": "gelu",
                "BLOCK": 1024,
            },
            ("count", "out_features"),
        )


def quantize_cases() -> Iterator[Case]:
    for static in (False, True):
        for features, block in ((768, 1024), (4096, 4096), (16384, 8192)):
            yield Case(
                f"quantize_rows {'static' if static else 'dynamic'} {features}",
                "quantize_rows:_quantize_rows_kernel",
                {
                    "x_ptr": "*fp16",
                    **({"input_scale_ptr": "*fp32"} if static else {"scale_ptr": "*fp32"}),
                    "q_ptr": "*i8",
                    "features": "i32",
                    "x_stride": "i32",
                },
                {
                    **({"scale_ptr": None} if static else {"input_scale_ptr": None}),
                    "STATIC": static,
                    "BLOCK": block,
                    "BLOCKS": -(-features // block),
                },
                ("features", "x_stride"),
                {"num_warps": max(1, min(8, block // 256)), "enable_fp_fusion": False},
            )


def bitmap_cases() -> Iterator[Case]:
    from sparsebert.ops.triton import bitmap_config

    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        for config in {bitmap_config(tokens, itemsize): None for tokens in TOKENS}:
            yield Case(
                f"bitmap_linear {name} {'x'.join(map(str, config[:3]))}",
                "bitmap_linear:_bitmap_linear_kernel",
                {
                    **dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr"), f"*{name}"),
                    "bitmap_ptr": "*u8",
                    "row_offsets_ptr": "*i64",
                    **dict.fromkeys(("tokens", "in_features", "out_features", "x_stride", "row_bytes"), "i32"),
                },
                {
                    "HAS_BIAS": True,
                    "ACTIVATION": "gelu",
                    **_sides(config),
                },
                ("in_features", "out_features", "x_stride", "row_bytes"),
                _options(config),
                dots=None if name == "fp32" else name,
            )


def low_rank_cases() -> Iterator[Case]:
    """Each kind of S with every configuration in fp16, and with the first in bf16 and fp32."""
    from sparsebert.ops.triton import low_rank_config

    of_kind = {
        "none": {},
        "rows": {"order_ptr": "*i32"},
        "nm": {"places_ptr": "*u8"},
        "bitmap": {"places_ptr": "*u8", "row_offsets_ptr": "*i64"},
    }
    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        configs = list({low_rank_config(tokens, itemsize): None for tokens in TOKENS})
        for config in configs if name == "fp16" else configs[:1]:
            for kind, own in of_kind.items():
                own = own if kind == "none" else {"values_ptr": f"*{name}", **own}
                optional = ("order_ptr", "values_ptr", "places_ptr", "row_offsets_ptr")
                numbers = ("tokens", "in_features", "out_features", "rank", "x_stride", "count", "row_bytes")
                yield Case(
                    f"low_rank_sparse_linear {kind} {name} {'x'.join(map(str, config[:4]))}",
                    "low_rank_sparse_linear:_low_rank_sparse_linear_kernel",
                    {
                        **dict.fromkeys(("x_ptr", "t_ptr", "u_ptr", "bias_ptr", "y_ptr"), f"*{name}"),
                        **own,
                        **dict.fromkeys(numbers, "i32"),
                    },
                    {
                        **{pointer: None for pointer in optional if pointer not in own},
                        "SPARSE": kind,
                        "KEEP": 2,
                        "GROUP": 4,
                        "BITS": 2,
                        "HAS_BIAS": True,
                        "ACTIVATION": "gelu",
                        **_sides(config),
                        "BLOCK_R": config.block_r,
                    },
                    ("in_features", "out_features", "x_stride", "rank", "row_bytes"),
                    _options(config),
                    dots=None if name == "fp32" else name,
                    packed=kind in ("rows", "nm"),
                )


def int8_cases(arch: int) -> Iterator[Case]:
    """Each configuration once with a dense weight and once at 2:4."""
    from sparsebert.ops.triton import int8_config

    configs = {}
    for out_features, in_features in SHAPES:
        for tokens in TOKENS:
            config = int8_config(in_features, out_features, tokens, SMS[arch])
            configs.setdefault(config._replace(split_k=min(2, config.split_k)), config)
    for config in configs.values():
        for n, m in ((1, 1), (2, 4)):
            pointers = {"q_ptr": "*i8", "values_ptr": "*i8", "x_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
            numbers = ("tokens", "in_features", "out_features", "kept", "position_bytes")
            yield Case(
                f"int8_linear {'dense' if m == 1 else f'{n}:{m}'} {'x'.join(map(str, config[:4]))}",
                "int8_linear:_int8_linear_kernel",
                {
                    **pointers,
                    **({} if m == 1 else {"positions_ptr": "*u8"}),
                    "bias_ptr": "*fp16",
                    "y_ptr": "*i32" if config.split_k > 1 else "*fp16",
                    **dict.fromkeys(numbers, "i32"),
                },
                {
                    **({"positions_ptr": None} if m == 1 else {}),
                    "KEEP": n,
                    "GROUP": m,
                    "BITS": 2,
                    "STATIC": False,
                    "HAS_BIAS": True,
                    "ACTIVATION": "gelu",
                    **_sides(config),
                    "SPLIT_K": config.split_k,
                },
                ("in_features", "out_features", "kept", "position_bytes"),
                _options(config),
                dots="int8",
                packed=True,
            )


def nm_cases(arch: int) -> Iterator[Case]:
    """Each configuration once, with the pattern it is first met with, and each pattern once more with one of them."""
    from sparsebert.ops.triton import nm_config

    seen = set()
    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        # Patterns differ alike in every dtype.
        for n, m in PATTERNS if name == "fp16" else PATTERNS[:2]:
            for out_features, in_features in SHAPES:
                for tokens in TOKENS:
                    config = nm_config(n, m, in_features, out_features, tokens, itemsize, SMS[arch])
                    # More than two splits differ in nothing that is compiled but a number.
                    key = (name, config._replace(split_k=min(2, config.split_k)))
                    if (*key, None) in seen and (name, (n, m)) in seen:
                        continue
                    seen |= {(*key, None), (name, (n, m))}
                    pointers = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr"), f"*{name}")
                    numbers = ("tokens", "in_features", "out_features", "x_stride", "kept", "position_bytes")
                    yield Case(
                        f"nm_linear {n}:{m} {name} {'x'.join(map(str, config[:4]))}",
                        "nm_linear:_nm_linear_kernel",
                        {
                            **pointers,
                            "positions_ptr": "*u8",
                            "y_ptr": "*fp32" if config.split_k > 1 else f"*{name}",
                            **dict.fromkeys(numbers, "i32"),
                        },
                        {
                            "KEEP": n,
                            "GROUP": m,
                            "BITS": 2 if m <= 4 else 4,
                            "HAS_BIAS": True,
                            "ACTIVATION": "gelu",
                            **_sides(config),
                            "SPLIT_K": config.split_k,
                        },
                        ("in_features", "out_features", "x_stride", "kept", "position_bytes"),
                        _options(config),
                        # fp32 is multiplied in full, not as tf32: without tensor cores.
                        dots=None if name == "fp32" else name,
                        # Other patterns are gathered slot by slot.
                        packed=not n & (n - 1),
                    )
