"""What nvcc and ptxas made of the CUDA kernels: registers and spills by the build's logs, instructions by its files.

A kernel's author adds rows to ``EXPECTED`` in tests/test_cuda_build.py; the rest follows from what is built.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_setup(file: Path = ROOT / "setup.py") -> ModuleType:
    """setup.py as a module, which runs nothing."""
    spec = importlib.util.spec_from_file_location("sparsebert_setup", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


# Tools


def find_cuobjdump() -> str | None:
    """On PATH, beside nvcc, or the one that triton brings."""
    places = [Path(nvcc).resolve().parent] if (nvcc := setup.find_nvcc()) else []
    if (triton := importlib.util.find_spec("triton")) is not None:
        places += [Path(folder) / "backends" / "nvidia" / "bin" for folder in triton.submodule_search_locations or ()]
    found = (shutil.which("cuobjdump", path=str(place)) for place in places)
    return shutil.which("cuobjdump") or next(filter(None, found), None)


def demangle(names: Sequence[str]) -> list[str]:
    """Names as in the source; as they are where no tool is there to ask."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    return subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


# Builds


class Build(NamedTuple):
    """The built module, and the folder with its objects and their logs."""

    module: Path
    folder: Path

    def logs(self) -> dict[str, str]:
        """What nvcc and ptxas said of each source."""
        sources = setup.sources(ROOT)
        return {source: (self.folder / f"{source}.o.log").read_text(encoding="utf-8") for source in sources}

    def kernels(self) -> list[Kernel]:
        return [kernel for log in self.logs().values() for kernel in read_log(log)]


def current_build() -> Build | None:
    """What ``make cuda`` left, where another one would do nothing."""
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder, library = Path("build") / f"temp.{platform}", Path("build") / f"lib.{platform}" / "sparsebert"
    target = library / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    file = ROOT / folder / "build.ninja"
    if setup.find_nvcc() is None or not file.exists():
        return None
    if file.read_text(encoding="utf-8") != setup.recipe(setup.architectures(), setup.sources(ROOT), folder, target):
        return None
    return None if what_ninja_would_do(folder / "build.ninja", ROOT) else Build(ROOT / target, ROOT / folder)


def what_ninja_would_do(file: Path, project: Path) -> list[str]:
    command = [*setup.find_ninja(), "-f", str(file), "-n"]
    said = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    return [line for line in said.splitlines() if "no work to do" not in line]


# What ptxas -v says


class Kernel(NamedTuple):
    """A kernel for one architecture. Bytes are a thread's, with those of the functions that it calls; ``shared`` is the
    block's, without what a launch adds."""

    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    def faults(self) -> list[str]:
        """What no kernel may do: put anything of its own in memory, or use more registers than there are."""
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} bytes and loads {self.spill_loads}")
        if self.stack:
            found.append(f"has a stack frame of {self.stack} bytes")
        if self.registers > 255:
            found.append(f"uses {self.registers} registers")
        return [f"{self.name} for {self.arch} {what}" for what in found]


PROPERTIES = re.compile(
    r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)


def read_log(text: str) -> list[Kernel]:
    """The kernels of one object's log, names demangled."""
    _, *parts = re.split(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", text)
    kernels = []
    for name, arch, said in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        functions = PROPERTIES.findall(said)
        registers = re.search(r"Used (\d+) registers", said)
        # nvcc runs a ptxas for each architecture at once; a line among those of another kernel must not pass unseen.
        if name not in [function for function, *_ in functions] or registers is None:
            raise ValueError(f"the log does not say what {name} for {arch} uses: {said}")
        shared = re.search(r"(\d+) bytes smem", said)
        stack, stores, loads = (sum(int(function[i]) for function in functions) for i in (1, 2, 3))
        kernels.append(Kernel(name, arch, int(registers[1]), stack, stores, loads, int(shared[1]) if shared else 0))
    names = demangle([kernel.name for kernel in kernels])
    return [kernel._replace(name=name) for kernel, name in zip(kernels, names, strict=True)]


# SASS


def sass(file: Path, arch: str) -> dict[str, list[str]]:
    """The instructions of each kernel for ``arch`` (as in SPARSEBERT_CUDA_ARCHS) in an object, module or cubin."""
    tool = find_cuobjdump()
    assert tool is not None
    command = [tool, "-sass", "-arch", f"sm_{arch}", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"Function : (\S+)", text)
    instructions = (re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;", code) for code in parts[1::2])
    return dict(zip(demangle(parts[::2]), instructions, strict=True))


def opcode(instruction: str) -> str:
    """``@!P0 LDG.E R1, [R2]`` is ``LDG.E``."""
    return re.sub(r"^@\S+\s+", "", instruction).split()[0]


class Expectation(NamedTuple):
    kernel: str
    arch: str
    opcodes: tuple[str, ...]
    absent: tuple[str, ...]

    def faults(self, code: Mapping[str, list[str]]) -> list[str]:
        """What is wrong with ``sass(file, arch)``."""
        named = [name for name in code if re.search(self.kernel, name)]
        if not named:
            return [f"no kernel for {self.arch} is named {self.kernel}: there are {', '.join(code) or 'none'}"]
        found = []
        for name in named:
            used = {opcode(instruction) for instruction in code[name]}
            found += [f"{name} for {self.arch} has no {o}" for o in self.opcodes if not _has(used, o)]
            found += [f"{name} for {self.arch} has {o}" for o in self.absent if _has(used, o)]
        return found


def _has(used: Iterable[str], wanted: str) -> bool:
    return any(f"{opcode}.".startswith(f"{wanted}.") for opcode in used)


def expect(kernel: str, arch: str, opcodes: Sequence[str], absent: Sequence[str] = ()) -> Expectation:
    """Each kernel whose demangled name has the pattern ``kernel`` has all of ``opcodes`` and none of ``absent``. They
    may leave out what follows a dot: HMMA.SP.16832 is also HMMA.SP.16832.F32."""
    return Expectation(kernel, arch, tuple(opcodes), tuple(absent))


def compile_for_hopper(source: Path, folder: Path) -> tuple[Path, str]:
    """The object of ``source`` for sm_90a in ``folder``, and what nvcc and ptxas said, whose warnings are errors. Skips
    the test where there is no nvcc."""
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    made = folder / f"{source.stem}.o"
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Werror", "all-warnings", "-Xptxas", "-v", "-I", ROOT / "csrc"]
    command = [nvcc, *flags, "-gencode=arch=compute_90a,code=sm_90a", "-c", source, "-o", made]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return made, result.stdout
