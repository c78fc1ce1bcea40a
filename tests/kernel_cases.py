"""Every Triton kernel with the configurations it ships with, at BERT's shapes: what is compiled ahead of time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any

import torch

from sparsebert.ops.devices import Device
from sparsebert.ops.select import Problem, candidates
from sparsebert.ops.specs import BitmapSpec, DenseSpec, Int8Spec, LowRankSparseSpec, LowRankSpec, NMSpec, Spec

# (out_features, in_features) of BERT-base's and BERT-large's layers.
SHAPES = [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096)]
TOKENS = [1, 16, 32, 128, 512, 4096, 16384]
PATTERNS = [(2, 4), (1, 4), (2, 8), (4, 8), (1, 16), (7, 16)]
MORE_PATTERNS = [(1, 2), (3, 4), (1, 8), (7, 8), (15, 16)]
# Those whose values are read as they lie; of others each slot is read by itself.
BY_PERMUTING = [(2, 4), (1, 4), (2, 8), (4, 8)]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# (dtype, rank, tokens) that the low-rank kernel is compiled for.
LOW_RANKS = [
    ("fp16", 48, TOKENS),
    ("fp16", 16, (1, 512)),
    ("fp16", 128, (512,)),
    ("bf16", 48, (1,)),
    ("fp32", 48, (1,)),
]
# Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications), and streaming multiprocessors of one GPU with each: A100, L4, H200, B200, RTX 5090.
DEVICES = {
    80: Device("cuda", "A100", (8, 0), 108, 163 << 10),
    89: Device("cuda", "L4", (8, 9), 58, 99 << 10),
    90: Device("cuda", "H200", (9, 0), 132, 227 << 10),
    100: Device("cuda", "B200", (10, 0), 148, 227 << 10),
    120: Device("cuda", "RTX 5090", (12, 0), 170, 99 << 10),
}


@dataclass(frozen=True)
class Case:
    """``dots``: the dtype of a product of matrices on the tensor cores, or None; ``packed``: whether it reads packed
    weights; ``wide``: pointers that are all read 16 bytes at a time."""

    name: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    dots: str | None = None
    packed: bool = False
    wide: tuple[str, ...] = ()


def _sides(config: Any) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def _options(config: Any) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def configured(
    spec: Spec, arch: int, tokens: int, dtype: torch.dtype, every: bool, layout: str = "neutral"
) -> list[Any]:
    """The estimate of Triton's kernel, or ``every`` configuration that ``tune`` may try, one of those that differ in
    nothing that is compiled but numbers: of splits, and of steps in flight, of which the most need the most."""
    problem = Problem(layout, DEVICES[arch], dtype, spec, tokens, "gelu")
    (kernel,) = (found for found in candidates(spec.op, layout) if found.backend == "triton")
    assert kernel.configurations is not None
    found = [_few_splits(config) for config in kernel.configurations(problem)]
    if not every:
        return found[:1]
    return list(
        {config._replace(num_stages=0): config for config in sorted(found, key=lambda c: c.num_stages)}.values()
    )


def _few_splits(config: Any) -> Any:
    return config._replace(split_k=2) if getattr(config, "split_k", 1) > 2 else config


def cases(arch: int, every: bool = False) -> Iterator[Case]:
    yield from nm_cases(arch, every)
    yield from int8_cases(arch, every)
    yield from bitmap_cases(arch, every)
    yield from low_rank_cases(arch, every)
    yield from dense_cases(arch, every)
    yield from quantize_cases()
    yield from layer_norm_cases()
    yield from embedding_cases()
    yield from split_cases()


def few(found: Iterable[Case]) -> list[Case]:
    """Of each kernel and kind of weight, in fp16 where it takes floats, the first and the last: few and many tokens."""
    of_kind: dict[str, list[Case]] = {}
    for case in found:
        if case.dots in (None, "fp16", "int8") and not re.search("(bf16|fp32) ", case.name):
            of_kind.setdefault(case.name.rpartition(" ")[0], []).append(case)
    return [case for several in of_kind.values() for case in (several[0], *several[1:][-1:])]


def split_cases() -> Iterator[Case]:
    for kind in ("fp32", "int32", "int32 to int8"):
        scaled, again = kind != "fp32", kind == "int32 to int8"
        scales = {"x_scale_ptr": "*fp32", "scale_ptr": "*fp32"} if scaled else {}
        output = {"output_scale_ptr": "*fp32", "y_scale_ptr": "*fp32"} if again else {}
        yield Case(
            f"sum_splits {kind}",
            "split_k:_sum_splits_kernel",
            {
                "partial_ptr": "*i32" if scaled else "*fp32",
                "bias_ptr": "*fp16",
                "y_ptr": "*i8" if again else "*fp16",
                **scales,
                **output,
                "count": "i32",
                "out_features": "i32",
            },
            {
                **dict.fromkeys({"x_scale_ptr", "scale_ptr"} - scales.keys()),
                **dict.fromkeys({"output_scale_ptr", "y_scale_ptr"} - output.keys()),
                "SPLIT_K": 4,
                "SCALED": scaled,
                "HAS_BIAS": True,
                "ACTIVATION": "none" if again else "gelu",
                "BLOCK": 1024,
            },
            ("count", "out_features"),
            {"enable_fp_fusion": not again},
        )


def quantize_cases() -> Iterator[Case]:
    for static in (False, True):
        for features, block, activation in ((768, 1024, "none"), (4096, 4096, "gelu"), (16384, 8192, "none")):
            yield Case(
                f"quantize_rows {'static' if static else 'dynamic'} {features} {activation}",
                "quantize_rows:_quantize_rows_kernel",
                {
                    "x_ptr": "*fp16",
                    "scale_ptr": "*fp32",
                    **({"input_scale_ptr": "*fp32"} if static else {}),
                    "q_ptr": "*i8",
                    "features": "i32",
                    "x_stride": "i32",
                },
                {
                    **({} if static else {"input_scale_ptr": None}),
                    "STATIC": static,
                    "ACTIVATION": activation,
                    "BLOCK": block,
                    "BLOCKS": -(-features // block),
                },
                ("features", "x_stride"),
                _of_a_row(block),
            )


def layer_norm_cases() -> Iterator[Case]:
    """Each result, with a residual and without, in fp16, and one of them in the others; of the width of BERT-base, and
    of the most that a program holds."""
    pointers = ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr")
    kinds = [("fp16", result, residual) for result, residual in product(("float", "dynamic", "static"), (False, True))]
    for name, result, residual in (*kinds, ("bf16", "dynamic", True), ("fp32", "dynamic", True)):
        quantize, static = result != "float", result == "static"
        given = {
            **dict.fromkeys((*pointers, "residual_ptr") if residual else pointers, f"*{name}"),
            **({"q_ptr": "*i8", "scale_ptr": "*fp32"} if quantize else {}),
            **({"input_scale_ptr": "*fp32"} if static else {}),
        }
        for features, block in ((768, 1024), (8192, 8192)):
            yield Case(
                f"add_layer_norm {result} {'residual ' if residual else ''}{name} {features}",
                "layer_norm:_add_layer_norm_kernel",
                {**given, **dict.fromkeys(("features", "x_stride", "residual_stride"), "i32"), "eps": "fp32"},
                {
                    **dict.fromkeys({"residual_ptr", "input_scale_ptr", "q_ptr", "scale_ptr"} - given.keys()),
                    "HAS_RESIDUAL": residual,
                    "QUANTIZE": quantize,
                    "STATIC": static,
                    "BLOCK": block,
                },
                ("features", "x_stride", "residual_stride"),
                _of_a_row(block),
                wide=("x_ptr", "residual_ptr") if residual else ("x_ptr",),
            )


def embedding_cases() -> Iterator[Case]:
    """With token types and without, ids of either width, and each dtype once."""
    tables = {"words": "input_ids", "positions": "position_ids", "token_types": "token_type_ids"}
    kinds = [("fp16", token_types, ids) for token_types, ids in product((False, True), ("i64", "i32"))]
    for name, token_types, ids in (*kinds, ("bf16", True, "i64"), ("fp32", True, "i64")):
        held = [table for table in tables if token_types or table != "token_types"]
        given = {
            **{f"{tables[table]}_ptr": f"*{ids}" for table in held},
            **dict.fromkeys([f"{table}_ptr" for table in (*held, "weight", "bias", "y")], f"*{name}"),
        }
        strides = tuple(f"{table}_stride" for table in tables)
        entries = [f"{table.removesuffix('s')}_entries" for table in tables]
        for features, block in ((768, 1024), (8192, 8192)):
            yield Case(
                f"embed_layer_norm {'types ' if token_types else ''}{ids} {name} {features}",
                "embeddings:_embed_layer_norm_kernel",
                {**given, **dict.fromkeys((*entries, *strides, "features"), "i32"), "eps": "fp32"},
                {
                    **dict.fromkeys({"token_type_ids_ptr", "token_types_ptr"} - given.keys()),
                    "HAS_TOKEN_TYPES": token_types,
                    "BLOCK": block,
                },
                ("features", *strides),
                _of_a_row(block),
            )


def _of_a_row(block: int) -> dict[str, Any]:
    return {"num_warps": max(1, min(8, block // 256)), "enable_fp_fusion": False}


def _over(tokens: Iterable[int], found: Callable[[int], list[Any]]) -> list[Any]:
    """The configurations of all token counts, each once."""
    return list(dict.fromkeys(config for count in tokens for config in found(count)))


def bitmap_cases(arch: int, every: bool) -> Iterator[Case]:
    """Each configuration with row offsets, and with starts of chunks."""
    spec = BitmapSpec(200_000, 4096, 1024)
    for (name, dtype), layout in product(DTYPES.items(), ("neutral", "chunked")):
        found = [configured(spec, arch, tokens, dtype, every, layout) for tokens in TOKENS]
        for config in dict.fromkeys(chain.from_iterable(found)):
            yield Case(
                f"bitmap_linear {layout} {name} {'x'.join(map(str, config))}",
                "bitmap_linear:_bitmap_linear_kernel",
                {
                    **dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr"), f"*{name}"),
                    "y_ptr": "*fp32" if config.split_k > 1 else f"*{name}",
                    "bitmap_ptr": "*u8",
                    "starts_ptr": "*i64" if layout == "neutral" else "*i32",
                    **dict.fromkeys(("tokens", "in_features", "out_features", "x_stride", "row_bytes"), "i32"),
                    **({"chunks": "i32"} if layout == "chunked" else {}),
                },
                {
                    **({"chunks": 1, "CHUNK": 0} if layout == "neutral" else {"CHUNK": 256}),
                    "HAS_BIAS": True,
                    "ACTIVATION": "gelu",
                    **_sides(config),
                    "SPLIT_K": config.split_k,
                },
                ("in_features", "out_features", "x_stride", "row_bytes"),
                _options(config),
                dots=None if name == "fp32" else name,
            )


def low_rank_cases(arch: int, every: bool) -> Iterator[Case]:
    """Each kind of S, t computed inside and outside: at every number of tokens in fp16, at one in bf16, in fp32 and of
    other ranks."""
    kinds = {
        "none": ((), {}),
        "rows": ((1, 1, 600), {"order_ptr": "*i32"}),
        "nm": ((2, 4, 0), {"places_ptr": "*u8"}),
        "bitmap": ((1, 1, 200_000), {"places_ptr": "*u8", "row_offsets_ptr": "*i64"}),
    }
    pointers = ("x_ptr", "u_ptr", "v_ptr", "t_ptr", "order_ptr", "values_ptr", "places_ptr", "row_offsets_ptr")
    numbers = ("tokens", "in_features", "out_features", "rank", "x_stride", "count", "row_bytes")
    seen = set()
    # Query, key and value in one.
    factors = [*((*one, 1) for one in LOW_RANKS), ("fp16", 48, TOKENS, 3)]
    for (kind, (sizes, own)), (name, rank, counts, parts) in product(kinds.items(), factors):
        dtype = DTYPES[name]
        out_features = 4096 if parts == 1 else 3072
        spec: Any = LowRankSpec(rank, 1024, out_features, parts)
        if kind != "none":
            spec = LowRankSparseSpec(rank, kind, *sizes, 1024, out_features, parts)
            own = {"values_ptr": f"*{name}", **own}
        layout = "grouped" if kind == "rows" else "neutral"
        for config in _over(
            counts,
            lambda tokens, spec=spec, dtype=dtype, layout=layout: _of_either_choice(
                configured(spec, arch, tokens, dtype, True, layout), every
            ),
        ):
            if (kind, name, config, parts) in seen:
                continue
            seen.add((kind, name, config, parts))
            given = {
                **dict.fromkeys(("x_ptr", "u_ptr", "v_ptr", "bias_ptr", "y_ptr"), f"*{name}"),
                **({} if config.inside else {"t_ptr": f"*{name}"}),
                **own,
            }
            factors = ("u_ptr", "v_ptr") if config.inside else ("u_ptr",)
            yield Case(
                f"low_rank_sparse_linear {'' if parts == 1 else f'{parts} of '}{kind} "
                f"{'inside' if config.inside else 'outside'} {name} "
                f"{'x'.join(map(str, config))}",
                "low_rank_sparse_linear:_low_rank_sparse_linear_kernel",
                {**given, **dict.fromkeys(numbers, "i32")},
                {
                    **{pointer: None for pointer in pointers if pointer not in given},
                    "INSIDE": config.inside,
                    "PARTS": parts,
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
                # Of fp32 at n:m each slot is read by itself.
                wide=(*factors, "values_ptr") if kind == "rows" or (kind, name) == ("nm", "fp16") else factors,
            )


def _of_either_choice(configs: list[Any], every: bool) -> list[Any]:
    """The best with t inside, where there is one, and the best without, or all."""
    return configs if every else list({config.inside: config for config in reversed(configs)}.values())


def dense_cases(arch: int, every: bool) -> Iterator[Case]:
    """Each configuration once in each dtype of 16 bits, from few tokens to many; in fp32 the kernel is not offered."""
    specs = [DenseSpec(in_features, out_features) for out_features, in_features in SHAPES]
    for name in ("fp16", "bf16"):
        found = [configured(spec, arch, tokens, DTYPES[name], every) for tokens, spec in product(TOKENS, specs)]
        for config in dict.fromkeys(chain.from_iterable(found)):
            yield Case(
                f"dense_linear {name} {'x'.join(map(str, config))}",
                "dense_linear:_dense_linear_kernel",
                {
                    **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), f"*{name}"),
                    "y_ptr": "*fp32" if config.split_k > 1 else f"*{name}",
                    **dict.fromkeys(("tokens", "in_features", "out_features", "x_stride", "weight_stride"), "i32"),
                },
                {"HAS_BIAS": True, "ACTIVATION": "gelu", **_sides(config), "SPLIT_K": config.split_k},
                ("in_features", "out_features", "x_stride", "weight_stride"),
                _options(config),
                dots=name,
                wide=("x_ptrs", "weight_ptrs"),
            )


def int8_cases(arch: int, every: bool) -> Iterator[Case]:
    """Each configuration once with a dense weight and once at 2:4, other patterns with the first and the last; and one
    without splits once more with an int8 result."""
    for n, m in [(1, 1), *PATTERNS, *MORE_PATTERNS] if every else [(1, 1), (2, 4), (7, 16)]:
        specs = [Int8Spec("dynamic", n, m, in_features, out_features) for out_features, in_features in SHAPES]
        found = [configured(spec, arch, tokens, torch.float16, every) for spec, tokens in product(specs, TOKENS)]
        configs = list(dict.fromkeys(chain.from_iterable(found)))
        if (n, m) not in ((1, 1), (2, 4)):
            configs = [configs[0], configs[-1]]
        whole = [config for config in configs if config.split_k == 1][:1] if m in (1, 4) and n < 3 else []
        for config, again in [*((config, False) for config in configs), *((config, True) for config in whole)]:
            pointers = {"q_ptr": "*i8", "values_ptr": "*i8", "x_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
            output = {"output_scale_ptr": "*fp32", "y_scale_ptr": "*fp32"}
            numbers = ("tokens", "in_features", "out_features", "kept", "position_bytes")
            kind = f"{'dense' if m == 1 else f'{n}:{m}'}{' to int8' if again else ''}"
            yield Case(
                f"int8_linear {kind} {'x'.join(map(str, config))}",
                "int8_linear:_int8_linear_kernel",
                {
                    **pointers,
                    **({} if m == 1 else {"positions_ptr": "*u8"}),
                    "bias_ptr": "*fp16",
                    "y_ptr": "*i8" if again else "*i32" if config.split_k > 1 else "*fp16",
                    **(output if again else {}),
                    **dict.fromkeys(numbers, "i32"),
                },
                {
                    **({"positions_ptr": None} if m == 1 else {}),
                    **({} if again else dict.fromkeys(output)),
                    "KEEP": n,
                    "GROUP": m,
                    "BITS": 2 if m <= 4 else 4,
                    "HAS_BIAS": True,
                    "ACTIVATION": "none" if again else "gelu",
                    **_sides(config),
                    "SPLIT_K": config.split_k,
                },
                ("in_features", "out_features", "kept", "position_bytes"),
                _options(config) | ({"enable_fp_fusion": False} if again else {}),
                dots="int8",
                packed=(n, m) in BY_PERMUTING or m == 1,
            )


def nm_cases(arch: int, every: bool) -> Iterator[Case]:
    """Each configuration once, with the pattern it is first met with, and each pattern once more with one of them."""
    seen = set()
    for name, dtype in DTYPES.items():
        # Patterns differ alike in every dtype.
        for (n, m), (out_features, in_features), tokens in product(
            PATTERNS + MORE_PATTERNS * every if name == "fp16" else PATTERNS[:2], SHAPES, TOKENS
        ):
            for config in configured(NMSpec(n, m, in_features, out_features), arch, tokens, dtype, every):
                if {(name, config), (name, n, m)} <= seen:
                    continue
                seen |= {(name, config), (name, n, m)}
                pointers = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr"), f"*{name}")
                numbers = ("tokens", "in_features", "out_features", "x_stride", "kept", "position_bytes")
                yield Case(
                    f"nm_linear {n}:{m} {name} {'x'.join(map(str, config))}",
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
                    packed=(n, m) in BY_PERMUTING and name != "fp32",
                )
