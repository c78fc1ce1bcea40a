"""The build of sparsebert._C, and what came out of it: kernels without spills, a module that needs no driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

from cuda_build import (
    ROOT,
    Build,
    Kernel,
    current_build,
    demangle,
    expect,
    find_cuobjdump,
    opcode,
    read_log,
    sass,
    setup,
    what_ninja_would_do,
)

# Which instructions each kernel has to be made of. By type of x: the products, sparse and (for a low-rank part) dense.
PRODUCTS = [
    (0, ["HMMA.SP.16832.F32", "HMMA.16816.F32"]),
    (1, ["HMMA.SP.16832.F32.BF16", "HMMA.16816.F32.BF16"]),
    (2, ["IMMA.SP.16864.S8.S8"]),
]
NM24 = "nm24_linear_kernel<.*Element.{}, {}, .*Access.{}>"
EXPECTED = [
    expect(NM24.format(element, tile, access), arch, [*products, load, copy, "LDSM.16.M88.4"], absent=["LDL", "STL"])
    for arch in ("80", "90a", "120")
    for element, products in PRODUCTS
    # Weights past the L1, but where two warps read the same ones.
    for tile, load in (("[0-3]", "LDG.E.NA.128.CONSTANT"), ("[456]", "LDG.E.128.CONSTANT"))
    for access, copy in ((0, "LDGSTS.E.BYPASS.128"), (1, "LDGSTS.E"))
]
# On Hopper alone. By type of x and pattern: the products of four warps, by the tokens of a tile.
WGMMA_PRODUCTS = [
    (0, 0, ["HGMMA.64x{}x16.F32"]),
    (0, 1, ["HGMMA.SP.64x{}x32.F32", "HGMMA.64x{}x16.F32"]),
    (1, 0, ["HGMMA.64x{}x16.F32.BF16"]),
    (1, 1, ["HGMMA.SP.64x{}x32.F32.BF16", "HGMMA.64x{}x16.F32.BF16"]),
    (2, 0, ["IGMMA.64x{}x32.S8.S8"]),
    (2, 1, ["IGMMA.SP.64x{}x64.S8.S8"]),
]
# Copies of tiles, also to several blocks, y transposed on its way, and registers that change hands.
WGMMA_MOVES = ["UTMALDG.2D.MULTICAST", "UTMASTG.2D", "STSM.16.MT88.4", "USETMAXREG.TRY_ALLOC.CTAPOOL"]
WGMMA = "wgmma_linear_kernel<.*Element.{}, .*Pattern.{}, {}>"
EXPECTED += [
    expect(
        WGMMA.format(element, pattern, tile),
        "90a",
        [*(product.format(tokens) for product in products), *WGMMA_MOVES],
        absent=["LDL", "STL"],
    )
    for element, pattern, products in WGMMA_PRODUCTS
    for tile, tokens in enumerate((64, 128, 128, 256, 128))
]
# Lanes that exchange sums, and blocks that send them to each other.
WGMMA_NORM = ["LDSM.16.MT88.4", "SHFL.BFLY", "ST.E.128"]
EXPECTED += [
    expect(
        f"wgmma_layer_norm_kernel<.*Element.{element}, .*Pattern.{pattern}>",
        "90a",
        [*(product.format(64) for product in products), *WGMMA_MOVES, *WGMMA_NORM],
        absent=["LDL", "STL"],
    )
    for element, pattern, products in WGMMA_PRODUCTS
]

needs_nvcc = pytest.mark.skipif(setup.find_nvcc() is None, reason="nvcc is not installed")
needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump is not installed")

CURRENT = current_build()


def on_the_build(test: Callable) -> Callable:
    """What reads the whole build: slow where `make cuda` has not left a current one."""
    return needs_nvcc(test if CURRENT else pytest.mark.slow(pytest.mark.timeout(1800)(test)))


def environment(**settings: str) -> dict[str, str]:
    """This process's, less what decides about the build."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SPARSEBERT_CUDA")} | settings


def run_setup(*arguments: object, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**settings), capture_output=True, text=True, timeout=1800)


# Whether to build, and what for


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Callable[..., None]:
    """``machine(nvcc=, gpu=, **variables)``: as setup.py is to see this one."""

    def make(nvcc: bool = False, gpu: bool = False, **variables: str) -> None:
        program = tmp_path / "toolkit" / "bin" / "nvcc"
        if nvcc:
            program.parent.mkdir(parents=True)
            program.touch(mode=0o755)
        monkeypatch.setattr(setup, "gpu_is_visible", lambda: gpu)
        for name in ("SPARSEBERT_CUDA", "SPARSEBERT_CUDA_ARCHS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"CUDA_HOME": str(tmp_path / "toolkit"), **variables}.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("nvcc", "gpu", "asked", "wanted"),
    [
        (True, True, "", True),
        (True, False, "", False),
        (False, True, "", False),
        (True, False, "1", True),
        (True, True, "0", False),
        (False, False, "0", False),
    ],
)
def test_it_is_built_where_it_can_run_or_is_asked_for(machine, nvcc, gpu, asked, wanted):
    machine(nvcc, gpu, SPARSEBERT_CUDA=asked)
    assert setup.is_wanted() is wanted


def test_without_a_word_only_the_machine_counts(machine):
    machine(nvcc=True, gpu=True)
    assert setup.is_wanted()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("", ["80", "90a", "120"]),
        ("80", ["80"]),
        ("80;90a,100f 120\t80 ;", ["80", "90a", "100f", "120"]),
    ],
)
def test_architectures_are_read(machine, given, names):
    machine(SPARSEBERT_CUDA_ARCHS=given)
    assert setup.architectures() == names


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("fast", "has 'fast'"),
        ("80;9.0", "has '9.0'"),
        ("75;80;sm_90", "has '75' and 'sm_90'"),
        ("80a", "has '80a'"),
        ("80$(x)", "has '80$(x)'"),
        (";", "has no name"),
    ],
)
def test_other_architectures_are_refused(machine, given, said):
    machine(SPARSEBERT_CUDA_ARCHS=given)
    expected = (
        f"SPARSEBERT_CUDA_ARCHS {said}, expected compute capabilities from 80 on without a dot, such as 80;90a;120"
    )
    with pytest.raises(SystemExit, match=f"^{re.escape(expected)}$"):
        setup.architectures()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"SPARSEBERT_CUDA": "yes"},
            "SPARSEBERT_CUDA is 'yes', expected 1 (build sparsebert._C), 0 (do not), or nothing (build it where nvcc "
            "and a GPU are found)",
        ),
        (
            {"SPARSEBERT_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "SPARSEBERT_CUDA=1 asks for sparsebert._C, but there is no nvcc under CUDA_HOME=/nowhere",
        ),
        (
            {"SPARSEBERT_CUDA": "1", "CUDA_HOME": "", "PATH": "/nowhere"},
            "SPARSEBERT_CUDA=1 asks for sparsebert._C, but there is no nvcc on PATH or in /usr/local/cuda",
        ),
    ],
)
def test_what_cannot_be_met_ends_setup_in_one_line(tmp_path, variables, said):
    if not variables.get("CUDA_HOME", "/nowhere") and shutil.which("nvcc", path="/usr/local/cuda/bin"):
        pytest.skip("there is a toolkit in /usr/local/cuda")
    shutil.copy(ROOT / "setup.py", tmp_path)
    result = run_setup("--name", cwd=tmp_path, **variables)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", said + "\n")


@pytest.mark.parametrize(("tool", "find"), [("ninja", setup.find_ninja), ("pybind11", setup.pybind11_headers)])
def test_a_tool_that_is_missing_is_named(monkeypatch, tool, find):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(setup.ExecError, match=f"^building sparsebert._C needs {tool}: pip install {tool}$"):
        find()


# The build, on sources of a few lines

HEADER = "#pragma once\n#define FACTOR 2\n"
KERNEL = """
#include <part/factor.h>
__global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }
void launch(float* x) { scale<<<1, 32>>>(x); }
"""
MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
SMALL = {
    "csrc/part/factor.h": HEADER,
    "csrc/part/scale.cu": KERNEL,
    "csrc/module.cpp": MODULE,
    "sparsebert/__init__.py": "",
    "pyproject.toml": '[project]\nname = "sparsebert"\nversion = "0"\n',
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A project with the real setup.py and an extension of a few lines, in a folder whose name has to be quoted."""
    folder = tmp_path_factory.mktemp("a project")
    shutil.copy(ROOT / "setup.py", folder)
    for name, text in SMALL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def build_small(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    # Where pip builds for an editable install is no relative path.
    place = folder / "build" / "temp"
    arguments = ("build_ext", "--inplace", "--build-temp", place)
    return run_setup(*arguments, cwd=folder, **{"SPARSEBERT_CUDA": "1", "SPARSEBERT_CUDA_ARCHS": "80", **settings})


def test_nothing_is_built_where_it_is_not_wanted(small):
    result = build_small(small, SPARSEBERT_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert not list(small.rglob("*.so"))
    assert not list(small.rglob("*.o"))


@needs_nvcc
def test_a_build_does_again_what_has_changed(small, run_python):
    result = build_small(small)
    assert result.returncode == 0, result.stdout + result.stderr
    run_python("import sparsebert._C", path=(small,))
    (log,) = small.rglob("scale.cu.o.log")
    (kernel,) = read_log(log.read_text())
    assert (kernel.name, kernel.arch, kernel.faults()) == ("scale(float*)", "80", [])

    def compiled() -> list[str]:
        again = what_ninja_would_do(small / "build" / "temp" / "build.ninja", small)
        return [line.partition("nvcc ")[2] for line in again if "nvcc" in line]

    assert compiled() == []
    header = small / "csrc/part/factor.h"
    times = header.stat()
    os.utime(header, (times.st_atime, times.st_mtime + 10))
    assert compiled() == ["csrc/part/scale.cu"]
    os.utime(header, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert compiled() == []


@needs_nvcc
def test_a_warning_ends_a_build_and_is_shown(small):
    broken = small / "csrc" / "broken.cu"
    broken.write_text("__global__ void k() { int unused = 1; }\n")
    try:
        result = build_small(small)
    finally:
        broken.unlink()
    assert result.returncode == 1
    assert "csrc/broken.cu(1)" in result.stdout
    said = "error: sparsebert._C was not built (see above); SPARSEBERT_CUDA=0 installs without it"
    assert result.stderr.splitlines()[-1] == said


# What was built


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Build:
    if CURRENT is not None:
        return CURRENT
    folder = tmp_path_factory.mktemp("cuda")
    arguments = ("build_ext", "--build-temp", folder / "temp", "--build-lib", folder / "lib")
    archs = {key: value for key, value in os.environ.items() if key == "SPARSEBERT_CUDA_ARCHS"}
    result = run_setup(*arguments, cwd=ROOT, SPARSEBERT_CUDA="1", **archs)
    if result.returncode:
        pytest.fail(f"{result.stdout}\n{result.stderr}", pytrace=False)
    (module,) = (folder / "lib").glob("sparsebert/_C.*")
    return Build(module, folder / "temp")


@on_the_build
def test_no_kernel_spills_or_has_a_stack_frame(built):
    assert [fault for kernel in built.kernels() for fault in kernel.faults()] == []


@on_the_build
def test_ptxas_lets_products_run_beside_each_other(built):
    """Where it cannot see that sums are left alone, it makes each product of four warps wait for the one before."""
    assert {source: said for source, log in built.logs().items() if (said := re.findall(r"\(C75\d\d\).*", log))} == {}


@on_the_build
def test_every_kernel_is_there_for_every_architecture(built):
    for source, log in built.logs().items():
        archs: dict[str, list[str]] = {}
        for kernel in read_log(log):
            archs.setdefault(kernel.name, []).append(kernel.arch)
        wrong = {name: found for name, found in archs.items() if sorted(found) != sorted(setup.architectures())}
        assert wrong == {}, source
        assert archs or source.endswith(".cpp"), f"{source} has no kernel"


@on_the_build
def test_the_host_compiler_has_nothing_to_say_either(built):
    assert {source: log for source, log in built.logs().items() if "warning" in log} == {}


@pytest.mark.slow  # it takes a disassembly of everything
@pytest.mark.timeout(900)
@on_the_build
@needs_cuobjdump
def test_kernels_are_made_of_the_instructions_they_were_written_for(built):
    archs = {row.arch for row in EXPECTED} & set(setup.architectures())
    code = {arch: sass(built.module, arch) for arch in archs}
    assert [fault for row in EXPECTED if row.arch in archs for fault in row.faults(code[row.arch])] == []


@on_the_build
def test_the_module_brings_its_own_cudart_and_needs_no_driver(built):
    # Read and not asked of ldd, which runs what it is asked about.
    needed = subprocess.run(["readelf", "-d", built.module], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(\S+)\]", needed)
    assert {name.partition(".")[0] for name in libraries} - {"ld-linux-x86-64", "ld-linux-aarch64"} <= {
        *("libc", "libm", "libdl", "librt", "libpthread", "libgcc_s", "libstdc++")
    }


@on_the_build
def test_the_module_shares_no_symbol_with_another_cudart(built):
    # torch loads its own into the same process; a name that both export would be taken from the first.
    symbols = subprocess.run(["nm", "-D", built.module], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols
    assert re.findall(r"\S*(?:cuda|pybind11|sparsebert)\S*", symbols) == []


@on_the_build
def test_it_is_imported_without_a_gpu_and_says_what_it_is(built, run_python, tmp_path):
    shutil.copy(built.module, tmp_path)
    result = run_python("import _C; info = _C.build_info(); print(*info['archs']); print(info['cudart'])", cwd=tmp_path)
    archs, cudart = result.stdout.splitlines()
    assert archs.split() == setup.architectures()
    assert re.fullmatch(r"\d\d\.\d+", cudart)


@on_the_build
def test_what_needs_a_device_says_that_there_is_none(built, run_python, tmp_path):
    shutil.copy(built.module, tmp_path)
    # Also on a machine with one.
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    result = run_python("import _C; _C.device_count()", cwd=tmp_path, environment=hidden, check=False)
    said = r"RuntimeError: device_count: cudaGetDeviceCount failed: .+ \(cuda\w+\)"
    assert re.fullmatch(said, result.stderr.splitlines()[-1])


# Host code's errors

REFUSALS = """
#include <common/errors.h>
#include <cstdio>

// What cuda_runtime_api.h has of this.
enum Status { ok, bad };
const char* cudaGetErrorString(Status) { return "no device is detected"; }
const char* cudaGetErrorName(Status) { return "cudaErrorNoDevice"; }

int main() {
    using namespace sparsebert;
    check_cuda(ok, "op", "launch");
    try {
        check_cuda(bad, "op", "launch");
    } catch (const std::runtime_error& error) {
        std::puts(error.what());
    }
    try {
        refuse("op", "x has shape (3, 100)", "(3, 768)");
    } catch (const std::invalid_argument& error) {
        std::puts(error.what());
    }
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no host compiler is installed")
def test_host_code_refuses_in_one_line(tmp_path):
    source, program = tmp_path / "refusals.cpp", tmp_path / "refusals"
    source.write_text(REFUSALS)
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc", source, "-o", program]
    subprocess.run(command, check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        "op: launch failed: no device is detected (cudaErrorNoDevice)",
        "op: x has shape (3, 100), expected (3, 768)",
    ]


# The helpers, on kernels whose faults are known

PROBE = """
#include <common/intrinsics.cuh>
namespace sparsebert {
template <typename T>
SB_KERNEL(32) sparse(const Words4* a, Words4* out) {
    float d[4] = {};
    const Words4 x = load_global(a + thread_index());
    const uint32_t b[4] = {x.word[3], x.word[2], x.word[1], x.word[0]};
    multiply_sparse<T, 0>(d, x, b, x.word[0]);
    store_global(out + thread_index(), Words4{{__float_as_uint(d[0]), __float_as_uint(d[1]), __float_as_uint(d[2]),
                                               __float_as_uint(d[3])}});
}
template __global__ void sparse<Half>(const Words4*, Words4*);
template __global__ void sparse<BFloat16>(const Words4*, Words4*);

// 32 registers a thread and 64 values to keep.
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
    __shared__ float shared[1024];
    float kept[64];
    for (int i = 0; i < 64; i++) kept[i] = x[i * 1024 + threadIdx.x];
    shared[threadIdx.x] = kept[0];
    __syncthreads();
    for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = kept[63 - i] * shared[i];
}
}  // namespace sparsebert
"""
SPARSE = ("void sparsebert::sparse<sparsebert::BFloat16>", "void sparsebert::sparse<sparsebert::Half>")


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> tuple[Path, list[Kernel]]:
    """The object of ``PROBE`` for 90a, and what its log says."""
    folder = tmp_path_factory.mktemp("probe")
    source, made = folder / "probe.cu", folder / "probe.o"
    source.write_text(PROBE)
    flags = ("-std=c++17", "-Xptxas", "-v", "-I", ROOT / "csrc", "-arch=sm_90a")
    command = [setup.find_nvcc(), *flags, "-c", source, "-o", made]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return made, read_log(result.stdout + result.stderr)


@needs_nvcc
def test_a_log_names_the_kernels_that_spill(probe):
    kernels = probe[1]
    assert {kernel.name.partition("(")[0] for kernel in kernels} == {"sparsebert::spilling", *SPARSE}
    assert {kernel.arch for kernel in kernels} == {"90a"}
    for kernel in kernels:
        if "spilling" in kernel.name:
            assert (kernel.registers, kernel.shared) == (32, 4096)
            assert any("spills" in fault for fault in kernel.faults())
            assert any("stack frame" in fault for fault in kernel.faults())
        else:
            assert (kernel.faults(), kernel.shared) == ([], 0)


@needs_nvcc
@needs_cuobjdump
def test_instructions_are_those_of_the_kernel(probe):
    code = sass(probe[0], "90a")
    assert {name.partition("(")[0] for name in code} == {"sparsebert::spilling", *SPARSE}
    assert {opcode(line) for lines in code.values() for line in lines} >= {"EXIT", "LDG.E.128.CONSTANT"}
    assert expect("sparse<", "90a", ["HMMA.SP.16832.F32"], ["STL", "LDL"]).faults(code) == []
    assert expect("BFloat16", "90a", ["HMMA.SP.16832.F32.BF16"]).faults(code) == []
    (fault,) = expect("Half", "90a", ["HMMA.SP.16832.F32.BF16"]).faults(code)
    assert fault.startswith(SPARSE[1]) and fault.endswith("for 90a has no HMMA.SP.16832.F32.BF16")
    (fault,) = expect("spilling", "90a", [], ["STL"]).faults(code)
    assert fault == "sparsebert::spilling(float*) for 90a has STL"
    (fault,) = expect("dense<", "90a", []).faults(code)
    assert fault.startswith("no kernel for 90a is named dense<: there are ")
    (fault,) = expect("sparse<", "80", []).faults(sass(probe[0], "80"))
    assert fault == "no kernel for 80 is named sparse<: there are none"


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'
ptxas info    : Function properties for _Z1kv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
"""


def test_a_kernel_answers_for_what_it_calls():
    (kernel,) = read_log(LOG)
    assert kernel._replace(name="k") == Kernel("k", "90a", 20, 24, 4, 12, 512)
    assert len(kernel.faults()) == 2
    assert read_log("no kernel here") == []


@pytest.mark.parametrize("lost", ["Function properties for _Z1kv", "Used 20 registers"])
def test_a_log_with_lines_lost_is_no_log(lost):
    with pytest.raises(ValueError, match="does not say what _Z1kv for 90a uses"):
        read_log(LOG.replace(lost, "something else"))


def test_an_opcode_is_found_behind_its_predicate():
    assert opcode("@!P0 LDG.E.128 R4, desc[UR4][R2.64]") == "LDG.E.128"
    assert expect("k", "80", ["LDG.E"], ["LD", "HMMA"]).faults({"k": ["@!P0 LDG.E.128 R4, [R2]"]}) == []
    assert demangle([]) == []
