"""Builds the modules that run kernels on the CPU: their sources against ``tests/simt`` in place of the hardware."""

from __future__ import annotations

import getpass
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In the order in which headers are looked for: common/intrinsics.cuh is in both.
FOLDERS = (ROOT / "tests" / "simt", ROOT / "csrc")
# Hidden, so that modules do not share each other's inline variables.
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas"),
)


def build(name: str, sources: Sequence[Path]) -> ModuleType:
    """The module that ``PYBIND11_MODULE(name, m)`` in one of ``sources`` defines.

    It is built once for each state of the sources, and of the headers in ``tests/simt`` and ``csrc``. Without a
    compiler, the tests that call this are skipped.
    """
    pybind11 = pytest.importorskip("pybind11", reason="the bindings of the kernels that run on the CPU need pybind11")
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++, to run kernels on the CPU", allow_module_level=True)
    includes = [*FOLDERS, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [compiler, *FLAGS, *(f"-I{folder}" for folder in includes)]
    library = _cache() / f"{name}-{_digest(command, compiler, sources)}.so"
    if not library.exists():
        _compile(command, sources, library)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sparsebert-simt-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}, which modules are loaded from, belongs to someone else")
    return folder


def _digest(command: Sequence[str], compiler: str, sources: Sequence[Path]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((sys.version, version, command)).encode())
    headers = {file for folder in FOLDERS for file in folder.rglob("*") if file.suffix in (".hpp", ".h", ".cuh")}
    for file in sorted(headers | set(sources)):
        content = file.read_bytes()
        digest.update(f"{file} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _compile(command: Sequence[str], sources: Sequence[Path], library: Path) -> None:
    """The sources side by side; then the library, of which others see the whole or nothing."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        list(pool.map(lambda pair: _run([*command, "-c", pair[0], "-o", pair[1]]), zip(sources, objects, strict=True)))
        made = Path(folder) / library.name
        _run([command[0], "-shared", *objects, "-o", made])
        os.replace(made, library)


def _run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
