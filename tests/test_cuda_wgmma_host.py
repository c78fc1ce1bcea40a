"""The host side of ``csrc/wgmma``: what it refuses, what it chooses by its estimate, and which copies it describes."""

from __future__ import annotations

import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("setuptools")

import simt_build
from cuda_build import ROOT, setup

HALF, BFLOAT16, INT8 = range(3)
DENSE, NM24 = range(2)
SOURCES = [
    ROOT / "tests" / "simt" / "wgmma_host.cpp",
    *(ROOT / "csrc" / "wgmma" / f"{name}.cpp" for name in ("bind", "check", "choose")),
]
# No one looks there.
AT = {name: (i + 1) << 20 for i, name in enumerate(["x", "values", "positions", "t", "u", "y", "x_scale", "scale"])}


@pytest.fixture(scope="module")
def machine():
    return simt_build.build("wgmma_host", SOURCES)


def call(machine, **changes):
    """A call at 2:4 with ``changes``; ``shift``: by which addresses are off."""
    arguments = {
        **{"element": HALF, "pattern": NM24, "tokens": 100, "in_features": 768, "out_features": 768},
        **{"tile": 0, "sharing": 1, "splits": 1, "x_stride": 768, "y_number": changes.get("element", HALF)},
        **{name: AT[name] for name in ("x", "values", "positions", "y")},
        **{"device": 0, "stream": 0},
    }
    shift = changes.pop("shift", {})
    arguments |= changes
    for name, by in shift.items():
        arguments[name] = arguments.get(name, 1 << 30) + by
    machine.wgmma_linear(**arguments)


INTEGER = {"element": INT8, "x_scale": AT["x_scale"], "scale": AT["scale"], "y_number": 0}
LOW_RANK = {"rank": 32, "t": AT["t"], "u": AT["u"]}
AGAIN = INTEGER | {"y_number": 3, "output_scale": 1 << 24, "y_scale": 1 << 25}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"element": BFLOAT16, "pattern": DENSE, "positions": 0},
        {"tokens": 1, "x_stride": 3},
        {"out_features": 7, "bias": 2, "bias_number": 0, "residual": 16},
        {"tile": 3, "sharing": 4},
        {"tile": 1, "splits": 4},
        LOW_RANK,
        LOW_RANK | {"out_features": 2304, "parts": 3, "sharing": 2},
        *(INTEGER | {"y_number": number} for number in range(3)),
        AGAIN,
    ],
    ids=str,
)
def test_what_fits_is_run(machine, changes):
    call(machine, **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"element": 3}, "element is 3, expected 0 to 2"),
        ({"pattern": 2}, "pattern is 2, expected 0 to 1"),
        ({"tokens": 0}, "tokens is 0, expected 1 to 1073741824"),
        ({"in_features": 776}, "in_features is 776, expected a multiple of 16"),
        ({"in_features": 772, "pattern": DENSE}, "in_features is 772, expected a multiple of 8"),
        (INTEGER | {"in_features": 784}, "in_features is 784, expected a multiple of 32"),
        (INTEGER | {"in_features": 776, "pattern": DENSE}, "in_features is 776, expected a multiple of 16"),
        ({"out_features": 0}, "out_features is 0, expected 1 to 1073741824"),
        (INTEGER | LOW_RANK, "rank is 32, expected 0"),
        (LOW_RANK | {"pattern": DENSE, "positions": 0}, "rank is 32, expected 0"),
        (LOW_RANK | {"rank": 36}, "rank is 36, expected a multiple of 8"),
        (LOW_RANK | {"rank": 24, "parts": 3}, "rank is 24, expected a multiple of 16"),
        ({"parts": 0}, "parts is 0, expected 1 to 1073741824"),
        ({"parts": 5}, "out_features is 768, expected a multiple of 5"),
        ({"parts": 4}, "out_features of a part is 192, expected a multiple of 128"),
        (
            LOW_RANK | {"rank": 1 << 29, "parts": 3},
            "rank of all parts is 1610612736, expected 0 to 1073741824",
        ),
        (
            {"tokens": 1 << 30, "out_features": 4096},
            "the number of tiles is 536870912, expected 1 to 134217728",
        ),
        ({"tile": 5}, "tile is 5, expected 0 to 4"),
        ({"sharing": 3}, "sharing is 3, expected 1, 2 or 4"),
        ({"splits": 16}, "splits is 16, expected 1, 2, 4 or 8"),
        ({"sharing": 2, "splits": 2}, "sharing is 2 and splits is 2, expected 1 of one of them"),
        ({"tile": 2, "splits": 2}, "splits is 2, expected 1 for tile 2"),
        ({"in_features": 576, "splits": 4}, "splits is 4, expected a stage of inputs for each, of 9"),
        (
            {"parts": 3, "out_features": 2304, "sharing": 4},
            "the width of a cluster in features is 512, expected a divisor of a part's 768",
        ),
        ({"activation": 4}, "activation is 4, expected 0 to 3"),
        ({"y_number": 1}, "y_number is 1, expected 0"),
        ({"element": BFLOAT16, "y_number": 2}, "y_number is 2, expected 1"),
        (INTEGER | {"y_number": 4}, "y_number is 4, expected 0 to 3"),
        ({"bias_number": 3}, "bias_number is 3, expected 0 to 2"),
        (AGAIN | {"residual": 16}, "residual is given, expected none where y is not of 16 bits"),
        (INTEGER | {"residual": 16, "y_number": 2}, "residual is given, expected none where y is not of 16 bits"),
        ({"pattern": DENSE}, "positions are given, expected none of a dense weight"),
        ({"x": 0}, "x is missing, expected a tensor on the device"),
        ({"shift": {"x": 8}}, "x begins 8 bytes past a multiple of 16, expected that multiple"),
        ({"x_stride": 760}, "stride of x is 760, expected 768 to 549755813887"),
        ({"x_stride": 772}, "stride of x in bytes is 1544, expected a multiple of 16"),
        ({"values": 0}, "values is missing, expected a tensor on the device"),
        ({"shift": {"values": 2}}, "values begins 2 bytes past a multiple of 16, expected that multiple"),
        ({"positions": 0}, "positions is missing, expected a tensor on the device"),
        ({"shift": {"positions": 2}}, "positions begins 2 bytes past a multiple of 4, expected that multiple"),
        (LOW_RANK | {"t": 0}, "t is missing, expected a tensor on the device"),
        (LOW_RANK | {"shift": {"u": 8}}, "u begins 8 bytes past a multiple of 16, expected that multiple"),
        ({"shift": {"y": 2}}, "y begins 2 bytes past a multiple of 16, expected that multiple"),
        ({"shift": {"bias": 2}}, "bias begins 2 bytes past a multiple of 4, expected that multiple"),
        ({"shift": {"residual": 8}}, "residual begins 8 bytes past a multiple of 16, expected that multiple"),
        (INTEGER | {"x_scale": 0}, "x_scale is missing, expected a tensor on the device"),
        (INTEGER | {"scale": 0}, "scale is missing, expected a tensor on the device"),
        (AGAIN | {"output_scale": 0}, "output_scale is missing, expected a tensor on the device"),
        (AGAIN | {"y_scale": 0}, "y_scale is missing, expected a tensor on the device"),
    ],
    ids=str,
)
def test_a_call_that_does_not_fit(machine, changes, text):
    with pytest.raises(ValueError) as caught:
        call(machine, **changes)
    assert str(caught.value) == f"wgmma_linear: {text}"


def test_keywords_that_are_no_call_are_named(machine):
    for changes, text in (
        ({"x": "here"}, "x is 'here', expected a number"),
        ({"x": -1}, "x is -1, expected a number"),
        ({"tile": 0.5}, "tile is 0.5, expected a number"),
        ({"element": None}, "element is None, expected a number"),
        ({"splitting": 2}, "splitting is no keyword of it"),
    ):
        with pytest.raises(TypeError) as caught:
            call(machine, **changes)
        assert str(caught.value) == f"wgmma_linear: {text}"
    with pytest.raises(TypeError, match="^wgmma_linear: element is missing, expected it as a keyword$"):
        machine.wgmma_linear()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        machine.wgmma_linear(0)


# The choice


@st.composite
def problems(draw):
    """Sizes that the kernel takes, as ``wgmma_solutions`` is given them."""
    element, pattern = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    low_rank = element != INT8 and pattern == NM24 and draw(st.booleans())
    parts = draw(st.integers(1, 3))
    step = 16 // (1 if element == INT8 else 2) * (1 + pattern)
    out_features = draw(st.integers(1, 40)) * 128 * parts if parts > 1 else draw(st.integers(1, 8192))
    return {
        **{"element": element, "pattern": pattern, "tokens": draw(st.integers(1, 70000))},
        **{"in_features": step * draw(st.integers(1, 400)), "out_features": out_features},
        **{"rank": (8 if parts == 1 else 16) * draw(st.integers(1, 16)) if low_rank else 0, "parts": parts},
    }


def filled(problem):
    """What a call of ``problem`` needs besides: as ``call`` takes it."""
    needed = INTEGER if problem["element"] == INT8 else {}
    factors = {"t": AT["t"], "u": AT["u"]} if problem["rank"] else {}
    positions = AT["positions"] if problem["pattern"] == NM24 else 0
    return problem | needed | factors | {"positions": positions, "x_stride": problem["in_features"]}


@settings(max_examples=150, deadline=None)
@given(problem=problems(), sms=st.sampled_from([0, 16, 78, 114, 132]))
def test_solutions_fit_and_the_best_comes_first(machine, problem, sms):
    found = machine.wgmma_solutions(**problem, sms=sms)
    assert found and len(found) <= 12 and len({one[:-1] for one in found}) == len(found)
    clocks = [one[-1] for one in found]
    assert clocks == sorted(clocks) and clocks[0] > 0
    for tile, features, tokens, sharing, splits, _ in found:
        assert machine.TILES[tile] == (features, tokens, machine.TILES[tile][2])
        call(machine, **filled(problem), tile=tile, sharing=sharing, splits=splits)
        blocks = machine.blocks(sms)
        assert blocks % (sharing * splits) == 0
        tiles = -(-problem["out_features"] // (features * sharing)) * -(-problem["tokens"] // tokens)
        assert blocks == tiles * splits if splits > 1 else blocks <= min(tiles * sharing, sms or 132)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), more=st.integers(0, 20000))
def test_more_tokens_are_not_estimated_to_take_less(machine, problem, more):
    (*_, few), *_ = machine.wgmma_solutions(**problem, sms=132)
    (*_, many), *_ = machine.wgmma_solutions(**problem | {"tokens": problem["tokens"] + more}, sms=132)
    assert few <= many


@pytest.mark.parametrize("pattern", [DENSE, NM24])
def test_the_estimate_wastes_little(machine, pattern):
    """Few tokens take a narrow tile, and splits of many inputs; many a wide one, whose blocks share them."""
    (_, _, tokens, sharing, splits, _), *_ = machine.wgmma_solutions(HALF, pattern, 1, 3072, 768, 0, 1, 132)
    assert (tokens, sharing) == (64, 1) and splits > 1
    (_, _, tokens, sharing, splits, _), *_ = machine.wgmma_solutions(HALF, pattern, 16384, 768, 3072, 0, 1, 132)
    assert tokens >= 128 and sharing > 1 and splits == 1


def test_sizes_that_cannot_be(machine):
    with pytest.raises(ValueError, match=r"^wgmma_linear: in_features is 24, expected a multiple of 16$"):
        machine.wgmma_solutions(HALF, NM24, 1, 24, 64, 0, 1, 132)


# What copies move

SWIZZLE_BYTES = {1: 128, 2: 64}


def test_boxes_of_a_dense_weight(machine):
    shared = {"pattern": DENSE, "positions": 0, "tile": 3, "sharing": 2, "x_stride": 1024}
    call(machine, **shared)
    assert machine.boxes() == {
        "x": (AT["x"], 2, 768, 100, 2048, 64, 128, 1),
        "weight": (AT["values"], 2, 768, 768, 1536, 64, 128, 1),
        "y": (AT["y"], 2, 768, 100, 1536, 64, 64, 1),
    }
    # Rows of y that do not begin at multiples of 16 bytes are stored otherwise.
    call(machine, **shared, out_features=769)
    assert "y" not in machine.boxes()


def test_boxes_of_2_of_4_with_factors(machine):
    call(machine, **LOW_RANK, tile=2, out_features=2304, parts=3)
    assert machine.boxes() == {
        "x": (AT["x"], 2, 768, 100, 1536, 64, 128, 1),
        "weight": (AT["values"], 2, 384, 2304, 768, 32, 256, 2),
        "y": (AT["y"], 2, 2304, 100, 4608, 64, 64, 1),
        "t": (AT["t"], 2, 96, 100, 192, 32, 128, 2),
        "u": (AT["u"], 2, 32, 2304, 64, 32, 256, 2),
    }


def test_boxes_of_int8(machine):
    # One row, of which no other is a stride apart.
    call(machine, **INTEGER | {"y_number": 2}, tokens=1, x_stride=0, tile=1, sharing=4)
    assert machine.boxes() == {
        "x": (AT["x"], 1, 768, 1, 768, 128, 32, 1),
        "weight": (AT["values"], 1, 384, 768, 384, 64, 128, 2),
    }


@settings(max_examples=100, deadline=None)
@given(problem=problems(), one=st.integers(0, 11))
def test_the_hardware_takes_every_box(machine, problem, one):
    found = machine.wgmma_solutions(**problem, sms=132)
    tile, _, _, sharing, splits, _ = found[one % len(found)]
    call(machine, **filled(problem), tile=tile, sharing=sharing, splits=splits)
    for address, size, inner, outer, row_bytes, box_inner, box_outer, swizzle in machine.boxes().values():
        assert address % 16 == 0 and row_bytes % 16 == 0 and row_bytes >= inner * size and outer >= 1
        assert box_inner * size == SWIZZLE_BYTES[swizzle] and 1 <= box_outer <= 256
        # Where the pattern of the swizzle begins anew.
        assert box_outer % 8 == 0


# Tensor maps, by a driver that only counts

STUB = r"""
#include <common/tensor_maps.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <cstdio>
#include <stdexcept>

cudaError_t status = cudaErrorInsufficientDriver;
cudaDriverEntryPointQueryResult query = cudaDriverEntryPointSymbolNotFound;
CUresult answer = CUDA_SUCCESS;
int encoded = 0;

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* extents,
                const cuuint64_t* row_bytes, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    ++encoded;
    const cuuint64_t said[] = {type, rank, (cuuint64_t)address, extents[0], extents[1], row_bytes[0], box[0], box[1],
                               steps[0], steps[1], swizzle, fill};
    for (int i = 0; i < 12; ++i) map->opaque[i] = said[i];
    return answer;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *found = (void*)&encode;
    *result = query;
    return status;
}
const char* cudaGetErrorString(cudaError_t) { return "no driver"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInsufficientDriver"; }

using sparsebert::Box;
using sparsebert::Swizzle;

CUtensorMap map_of(const Box& box) {
    try {
        return sparsebert::tensor_map_of("op", box);
    } catch (const std::runtime_error& error) {
        std::puts(error.what());
        return {};
    }
}

int main() {
    const Box box{1 << 20, 2, 768, 100, 1536, 64, 128, Swizzle::bytes128};
    map_of(box);
    status = cudaSuccess;
    map_of(box);
    query = cudaDriverEntryPointSuccess;
    answer = CUDA_ERROR_INVALID_VALUE;
    map_of(box);
    answer = CUDA_SUCCESS;
    // What failed is not kept; what is the same in all is made once.
    for (int i = 0; i < 3; ++i) map_of(box);
    std::printf("%d\n", encoded);
    const CUtensorMap map = map_of(box);
    for (int i = 0; i < 12; ++i) std::printf("%llu ", (unsigned long long)map.opaque[i]);
    std::puts("");
    Box other = box;
    other.element_bytes = 1;
    other.swizzle = Swizzle::bytes64;
    const CUtensorMap bytes = map_of(other);
    std::printf("%llu %llu\n", (unsigned long long)bytes.opaque[0], (unsigned long long)bytes.opaque[10]);
    // As many as are kept, and one more: all are made anew.
    encoded = 0;
    for (int i = 0; i < 4096; ++i) {
        other.address = (2 << 20) + 16 * i;
        map_of(other);
    }
    map_of(box);
    std::printf("%d\n", encoded);
}
"""


@pytest.mark.skipif(setup.find_nvcc() is None, reason="nvcc is not installed")
def test_a_tensor_map_is_made_once(tmp_path):
    source, program = tmp_path / "stub.cpp", tmp_path / "stub"
    source.write_text(STUB)
    maps = ROOT / "csrc" / "common" / "tensor_maps.cpp"
    flags = ["-std=c++17", "-Xcompiler", "-Wall", "-I", ROOT / "csrc", "-cudart", "none"]
    subprocess.run([setup.find_nvcc(), *flags, source, maps, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    uint8, uint16, swizzle_64, swizzle_128 = 0, 1, 2, 3
    described = [uint16, 2, 1 << 20, 768, 100, 1536, 64, 128, 1, 1, swizzle_128, 0]
    assert said == [
        "op: looking for cuTensorMapEncodeTiled failed: no driver (cudaErrorInsufficientDriver)",
        "op: the driver has no cuTensorMapEncodeTiled, which CUDA 12 brought",
        "op: cuTensorMapEncodeTiled failed with 1 for 100 x 768 elements of 2 bytes, rows 1536 bytes apart, in boxes "
        "of 128 x 64",
        "2",
        " ".join(map(str, described)) + " ",
        f"{uint8} {swizzle_64}",
        "4097",
    ]


# What the documentation says of it

TABLE = re.compile(r"^\| (base|large)\.(out|ffn_in|ffn_out), (bf16|int8) \|([\d. |]+)\|$", re.MULTILINE)
SHAPES = {"base": (768, 3072), "large": (1024, 4096)}


def test_the_docs_show_what_is_estimated(machine):
    """The time of 2:4 over that of the dense twin, each the best of its solutions."""
    found = TABLE.findall((ROOT / "docs" / "cuda.md").read_text(encoding="utf-8"))
    assert len(found) == 12
    for model, role, dtype, numbers in found:
        hidden, inner = SHAPES[model]
        out_features, in_features = {"out": (hidden, hidden), "ffn_in": (inner, hidden), "ffn_out": (hidden, inner)}[
            role
        ]
        for tokens, shown in zip((64, 512, 2048, 8192, 65536), numbers.split("|"), strict=True):
            sizes = {"tokens": tokens, "in_features": in_features, "out_features": out_features}
            dense, sparse = (
                machine.wgmma_solutions(
                    element=INT8 if dtype == "int8" else BFLOAT16, pattern=pattern, **sizes, rank=0, parts=1, sms=132
                )[0][-1]
                for pattern in (DENSE, NM24)
            )
            assert shown.strip() == f"{sparse / dense:.2f}", (model, role, dtype, tokens)
