"""The kernel of ``csrc/wgmma``, its source as it is, run on the CPU by ``tests/simt``; and as nvcc compiles it."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import simt_build
from closeness import check
from cuda_build import compile_for_hopper, expect, find_cuobjdump, read_log, sass
from sparsebert.formats import nm
from sparsebert.ops.activations import ACTIVATIONS

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.int8: 2}
NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}
FLOATS = [torch.float16, torch.bfloat16]
PATTERNS = ["dense", "2:4"]
FOLDER = simt_build.ROOT / "tests" / "simt"


@pytest.fixture(scope="module")
def machine():
    names = ("linear", "half", "bfloat16", "int8")
    return simt_build.build(
        "wgmma_linear", [simt_build.ROOT / "tests" / "simt" / f"wgmma_{name}.cpp" for name in names]
    )


def weight_of(out_features, in_features, dtype, pattern):
    """The dense weight, what is kept of it row by row, and where that was; some groups have fewer than two."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(out_features, in_features, generator=generator)
    if pattern == "2:4":
        dense = nm.project(dense, 2, 4) * (torch.rand(dense.shape, generator=generator) > 0.1)
    dense = (dense * 40).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else dense.to(dtype)
    return (dense, dense, None) if pattern == "dense" else (dense, *nm.pack(dense, 2, 4))


def x_of(tokens, in_features, dtype):
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(1))
    return (x * 50).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else x.to(dtype)


def linear(machine, x, values, positions, bias=None, *, tile, blocks=2, dtype=None, tiled=True, activation=0, **scales):
    """On memory that begins as NaN."""
    pattern = int(positions is not None)
    out_features, in_features = len(values), x.shape[1]
    dtype = dtype or x.dtype
    y = torch.full((len(x), out_features), 77 if dtype == torch.int8 else float("nan"), dtype=dtype)
    tensors = {"x_scale": None, "scale": None, "output_scale": None, "y_scale": None, **scales}
    at = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    machine.linear(
        ELEMENTS[x.dtype],
        pattern,
        tile,
        blocks,
        len(x),
        in_features,
        out_features,
        x.data_ptr(),
        x.stride(0),
        values.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        NUMBERS[torch.float32 if bias is None else bias.dtype],
        at["x_scale"],
        at["scale"],
        at["output_scale"],
        y.data_ptr(),
        NUMBERS[dtype],
        at["y_scale"],
        activation,
        1.0,
        tiled,
    )
    return y


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tile", range(4))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats(machine, dtype, tile, pattern):
    features, width = machine.TILES[tile]
    # The last tiles of features, tokens and inputs are cut; more stages than there is room for, and fewer.
    for tokens, in_features in ((width + 9, 64 * 9 + 16), (7, 48)):
        dense, values, positions = weight_of(features + 72, in_features, dtype, pattern)
        bias = torch.randn(features + 72).to(dtype)
        x = x_of(tokens, in_features, dtype)
        for tiled, blocks in ((True, 2), (False, 1)):
            y = linear(machine, x, values, positions, bias, tile=tile, tiled=tiled, blocks=blocks)
            check(y, x, dense, bias)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tile", range(4))
def test_int8_sums_are_exact(machine, tile, pattern):
    features, width = machine.TILES[tile]
    in_features = 128 * 5 + 32
    dense, values, positions = weight_of(features + 70, in_features, torch.int8, pattern)
    x = x_of(width + 9, in_features, torch.int8)
    scales = {"x_scale": torch.ones(len(x)), "scale": torch.ones(len(dense))}
    y = linear(machine, x, values, positions, tile=tile, dtype=torch.float32, **scales)
    assert torch.equal(y, (x.long() @ dense.long().t()).float())


def test_every_tile_is_computed_once(machine):
    """More tiles of tokens than run side by side, several of features, and blocks that take several of them each."""
    dense, values, positions = weight_of(264, 64, torch.float16, "2:4")
    x = x_of(64 * 9 + 5, 64, torch.float16)
    for blocks in (1, 4, 30):
        check(linear(machine, x, values, positions, tile=0, blocks=blocks), x, dense, None)


def test_rows_of_x_may_be_apart(machine):
    dense, values, positions = weight_of(64, 128, torch.bfloat16, "2:4")
    x = x_of(9, 192, torch.bfloat16)[:, :128]
    check(linear(machine, x, values, positions, tile=0), x, dense, None)


@pytest.mark.parametrize(("number", "name"), list(enumerate(["none", "gelu", "gelu_tanh", "relu"])))
def test_activations(machine, number, name):
    _, values, positions = weight_of(64, 64, torch.float16, "2:4")
    x = x_of(5, 64, torch.float16)
    plain = linear(machine, x, values, positions, tile=0, dtype=torch.float32, tiled=False)
    y = linear(machine, x, values, positions, tile=0, dtype=torch.float32, tiled=False, activation=number)
    expected = plain if name == "none" else ACTIVATIONS[name](plain)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
def test_int8_results(machine, dtype):
    """Two roundings to float, and one to int8 by a scale, to the bit."""
    dense, values, positions = weight_of(72, 160, torch.int8, "2:4")
    x = x_of(11, 160, torch.int8)
    x_scale, scale, bias = torch.rand(11) / 50, torch.rand(72) / 50, torch.randn(72)
    out = torch.tensor(0.05)
    more = {"output_scale": out, "y_scale": torch.empty(11)} if dtype == torch.int8 else {}
    y = linear(machine, x, values, positions, bias, tile=0, dtype=dtype, x_scale=x_scale, scale=scale, **more)
    sums = (x.long() @ dense.long().t()).float()
    expected = sums * x_scale[:, None] * scale + bias
    if dtype == torch.int8:
        expected = (expected * (1 / out)).round().clamp(-127, 127)
        assert torch.equal(more["y_scale"], out.expand(11))
    assert torch.equal(y, expected.to(dtype))


def test_sizes_together(machine):
    """What is cut where, in all combinations, of the smallest tile."""
    for tokens, out_features, in_features in itertools.product((1, 64, 65), (8, 128, 136), (16, 64, 80)):
        dense, values, positions = weight_of(out_features, in_features, torch.float16, "2:4")
        x = x_of(tokens, in_features, torch.float16)
        check(linear(machine, x, values, positions, tile=0), x, dense, None)


@pytest.mark.slow
@pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump is not installed")
def test_what_nvcc_makes_of_it(tmp_path):
    """No spills, no waits that ptxas put in, and in each of two copies of the loop the products of one stage."""
    made, log = compile_for_hopper(FOLDER / "wgmma_probe.cu", tmp_path)
    assert re.findall(r"\(C\d+\).*", log) == []
    kernels = read_log(log)
    assert len(kernels) == 3 and [fault for kernel in kernels for fault in kernel.faults()] == []
    code = sass(made, "90a")
    moves = ["UTMALDG.2D", "UTMASTG.2D", "STSM.16.MT88.4", "USETMAXREG.TRY_ALLOC.CTAPOOL"]
    products = {
        r"Element\)1, \(sparsebert::wgmma::Pattern\)0": ("HGMMA.64x256x16.F32.BF16", 2 * 4),
        r"Element\)1, \(sparsebert::wgmma::Pattern\)1": ("HGMMA.SP.64x256x32.F32.BF16", 2 * 2),
        r"Element\)2, \(sparsebert::wgmma::Pattern\)1": ("IGMMA.SP.64x128x64.S8.S8", 2 * 2 * 2),
    }
    for kernel, (opcode, count) in products.items():
        assert expect(kernel, "90a", [opcode, *moves], ["LDL", "STL"]).faults(code) == []
        found = [line for name, lines in code.items() if re.search(kernel, name) for line in lines]
        assert sum(opcode in line for line in found) == count, kernel
        # One wait a stage that leaves the products of that stage running, and one for the end.
        assert sum("WARPGROUP.DEPBAR" in line for line in found) == 3, kernel
