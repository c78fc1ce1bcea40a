"""The package map and the build of the CUDA extension; everything else is in pyproject.toml.

``kernels/`` stands at the top of the repository but is installed as ``sparsebert.kernels``; a checkout sees it
there through the link ``sparsebert/kernels``. It has no ``__init__.py``: a top-level package of that name would
shadow Hugging Face's. So no search for packages finds it.

``sparsebert._C`` is built from every source under ``csrc/``, by nvcc and without torch, where nvcc and a GPU are found.
``SPARSEBERT_CUDA=1`` builds it without looking for a GPU, ``SPARSEBERT_CUDA=0`` never does. ``SPARSEBERT_CUDA_ARCHS``
names the compute capabilities that it holds code for.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

# 80 also serves 86 and 89; the others serve nothing but themselves.
DEFAULT_ARCHS = "80;90a;120"


def find_nvcc() -> str | None:
    """``CUDA_HOME`` decides where it is set; else PATH, then the folder that the toolkit installs to."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def gpu_is_visible() -> bool:
    """By the device nodes of Linux and WSL, for which neither a driver's library nor torch is needed."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def is_wanted() -> bool:
    asked = os.environ.get("SPARSEBERT_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(
            f"SPARSEBERT_CUDA is {asked!r}, expected 1 (build sparsebert._C), 0 (do not), or nothing (build it where "
            "nvcc and a GPU are found)"
        )
    if asked == "1" and find_nvcc() is None:
        place = f"under CUDA_HOME={home}" if (home := os.environ.get("CUDA_HOME")) else "on PATH or in /usr/local/cuda"
        sys.exit(f"SPARSEBERT_CUDA=1 asks for sparsebert._C, but there is no nvcc {place}")
    return asked == "1" or (asked == "" and find_nvcc() is not None and gpu_is_visible())


def architectures() -> list[str]:
    given = os.environ.get("SPARSEBERT_CUDA_ARCHS", "").strip() or DEFAULT_ARCHS
    names = list(dict.fromkeys(name for name in re.split(r"[;,\s]+", given) if name))
    # The kernels' instructions begin at 8.0; code that is bound to one architecture (a, f) exists from 9.0 on.
    wrong = [name for name in names if not re.fullmatch(r"8\d|9\da?|1\d\d[af]?", name)]
    if wrong or not names:
        sys.exit(
            f"SPARSEBERT_CUDA_ARCHS has {' and '.join(map(repr, wrong)) or 'no name'}, expected compute capabilities "
            f"from 80 on without a dot, such as {DEFAULT_ARCHS}"
        )
    return names


def find_ninja() -> list[str]:
    # What pip installed comes first: its environment need not be activated, and another version would start over.
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if program := shutil.which("ninja"):
        return [program]
    raise ExecError("building sparsebert._C needs ninja: pip install ninja")


def pybind11_headers() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:
        raise ExecError("building sparsebert._C needs pybind11: pip install pybind11") from None
    return pybind11.get_include()


def in_command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


def in_ninja(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def recipe(archs: list[str], sources: list[str], folder: Path, target: Path) -> str:
    """The text of build.ninja. What ptxas says of an object's kernels stays beside it, as ``.log``."""
    flags = [
        *("-std=c++17", "-O3", "-DNDEBUG", "-Werror", "all-warnings", "-Xptxas", "-v"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
        *("-I", "csrc", "-isystem", pybind11_headers(), "-isystem", sysconfig.get_path("include")),
        "-DSPARSEBERT_CUDA_ARCHS=" + ";".join(archs),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
        # One source keeps as many cores busy as it has targets, so that the longest one does not hold up the rest.
        *("--threads", str(len(archs))),
    ]
    nvcc = in_command(find_nvcc())
    objects = [in_ninja(folder / f"{source}.o") for source in sources]
    lines = [
        f"builddir = {in_ninja(folder)}",
        "rule compile",
        f"  command = {nvcc} {in_command(*flags)} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
        "{ cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        # Static, so that it is not torch's cudart that decides, and nothing has to be there when this is imported.
        f"  command = {nvcc} -shared -cudart static -o $out $in",
        "  description = link $out",
        *(f"build {made}: compile {in_ninja(source)}" for made, source in zip(objects, sources, strict=True)),
        f"build {in_ninja(target)}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    def build_extension(self, extension: Extension) -> None:
        folder, target = Path(self.build_temp), Path(self.get_ext_fullpath(extension.name))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "build.ninja"
        file.write_text(recipe(architectures(), extension.sources, folder, target), encoding="utf-8")
        jobs = ["-j", str(self.parallel)] if self.parallel else []
        if subprocess.run([*find_ninja(), "-f", str(file), *jobs]).returncode:
            raise ExecError("sparsebert._C was not built (see above); SPARSEBERT_CUDA=0 installs without it")


def sources(root: Path = Path()) -> list[str]:
    files = (path for path in (root / "csrc").rglob("*") if path.suffix in (".cu", ".cpp"))
    return sorted(path.relative_to(root).as_posix() for path in files)


def extensions() -> list[Extension]:
    if not is_wanted():
        return []
    architectures()  # a wrong name is refused before anything is done
    return [Extension("sparsebert._C", sources())]


# Tests read the functions above.
if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["sparsebert", "sparsebert.*"]), "sparsebert.kernels"],
        package_dir={"sparsebert.kernels": "kernels"},
        package_data={
            "sparsebert": ["py.typed", "recipes/*.toml"],
            "sparsebert.kernels": ["*.md"],
            "sparsebert.ops": ["*.json"],
        },
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
    )
