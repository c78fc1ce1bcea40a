"""The distributions and what is in them, the pins, and the Makefile that installs a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sparsebert

ROOT = Path(__file__).resolve().parents[1]
PROBE = "probe_of_the_packaging_test"


def run(*command: object, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def succeed(*command: object, cwd: Path, **settings: str) -> None:
    """Without the CUDA extension, whatever this machine has, unless ``settings`` ask for it."""
    result = run(*command, cwd=cwd, environment={**os.environ, "SPARSEBERT_CUDA": "0", **settings})
    if result.returncode:
        pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)


# Distributions


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The checkout's package in a fresh folder, with one more kernel and with files that must stay out."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    for pattern in ("*.md", "*.toml", "*.txt", "LICENSE", "MANIFEST.in", "setup.py"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, copy)
    for folder in ("sparsebert", "kernels", "csrc"):
        junk = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=junk)
    (copy / "kernels" / f"{PROBE}.py").write_text("VALUE = 24\n")
    for folder in ("tests", "benchmarks", "examples"):
        (copy / folder).mkdir()
        (copy / folder / "test_stray.py").touch()
    return copy


@pytest.fixture(scope="module")
def distributions(source) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it."""
    succeed(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    (wheel,) = (source / "dist").glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_wheel_contains_the_library_and_nothing_else(source, distributions):
    modules = {file.relative_to(source).as_posix() for file in (source / "sparsebert").rglob("*.py")}
    modules |= {f"sparsebert/kernels/{file.name}" for file in (source / "kernels").glob("*.py")}
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
        (entry_points,) = (name for name in info if name.endswith("/entry_points.txt"))
        assert "sparsebert = sparsebert.cli:main" in wheel.read(entry_points).decode()
    assert [name for name in info if name.endswith("/LICENSE")]
    assert f"sparsebert/kernels/{PROBE}.py" in modules
    data = {"sparsebert/py.typed", "sparsebert/kernels/README.md"}
    assert (modules | data) - names == set()
    others = names - info - modules - data
    assert {Path(name).suffix for name in others} <= {".json", ".toml"}
    assert {name.split("/")[0] for name in names - info} == {"sparsebert"}
    assert "sparsebert/ops/shipped.json" in names
    recipes = {file.relative_to(source).as_posix() for file in (source / "sparsebert" / "recipes").glob("*.toml")}
    assert "sparsebert/recipes/tasks.toml" in recipes
    assert recipes - names == set()


@pytest.mark.slow
def test_sdist_contains_what_a_build_needs_and_no_tests(source, distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "constraints.txt"}
    needed |= {file.relative_to(source).as_posix() for file in (source / "csrc").rglob("*.*")}
    assert {"csrc/README.md", "csrc/module.cpp"} <= needed
    needed |= {"kernels/README.md", f"kernels/{PROBE}.py", "sparsebert/py.typed", "sparsebert/__init__.py"}
    assert needed - names == set()
    stray = ("tests", "benchmarks", "examples", "sparsebert/kernels")
    assert [name for name in names if name.startswith(stray)] == []


@pytest.mark.slow
def test_only_with_the_cuda_extension_a_wheel_belongs_to_a_platform(source, distributions, tmp_path, run_python):
    assert distributions[1].name.endswith("-py3-none-any.whl")
    if not any(shutil.which("nvcc", path=path) for path in (None, "/usr/local/cuda/bin")):
        pytest.skip("nvcc is not installed")
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout, symlinks=True, ignore=shutil.ignore_patterns("dist", "csrc"))
    (checkout / "csrc").mkdir()
    module = "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, module) { module.doc() = __FILE__; }\n"
    (checkout / "csrc" / "module.cpp").write_text(module)
    # The wheel is made of the sdist, so this has its sources too.
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path)
    succeed(*command, cwd=checkout, SPARSEBERT_CUDA="1", SPARSEBERT_CUDA_ARCHS="80")
    (wheel,) = tmp_path.glob("*.whl")
    tag = sys.implementation.cache_tag.replace("cpython-", "cp")
    assert f"-{tag}-{tag}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        added = set(archive.namelist())
    with zipfile.ZipFile(distributions[1]) as archive:
        added -= set(archive.namelist())
    assert [Path(name).name.partition(".")[0] for name in added] == ["_C"]
    run_python("import sparsebert._C", path=(tmp_path / "site",))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel from the sdist", "sdist", "checkout"])
def test_an_installed_copy_works_from_another_directory(source, distributions, kind, tmp_path, run_python):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    what = {"wheel from the sdist": distributions[1], "sdist": distributions[0], "checkout": source}[kind]
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target)
    succeed(sys.executable, "-m", "pip", "install", *options, what, cwd=elsewhere)
    code = f"""
import json, sparsebert, sparsebert.nn
from sparsebert.kernels import {PROBE} as probe
print(json.dumps([sparsebert.__file__, probe.__file__, probe.VALUE, sparsebert.__version__]))
"""
    result = run_python(code, cwd=elsewhere, path=(target,))
    package = target / "sparsebert"
    expected = [str(package / "__init__.py"), str(package / "kernels" / f"{PROBE}.py"), 24, sparsebert.__version__]
    assert json.loads(result.stdout) == expected
    (recorded,) = target.glob("sparsebert-*.dist-info")
    assert recorded.name == f"sparsebert-{sparsebert.__version__}.dist-info"


def test_the_installed_package_is_this_checkout(run_python, tmp_path):
    # What `pip install --editable .` promises, seen from another folder and without this checkout on the path.
    code = """
import importlib.util, json
if importlib.util.find_spec("sparsebert") is None:
    print("null")
else:
    import sparsebert, sparsebert.kernels
    print(json.dumps([sparsebert.__file__, *sparsebert.kernels.__path__]))
"""
    found = json.loads(run_python(code, cwd=tmp_path, path=()).stdout)
    if found is None:
        pytest.skip("sparsebert is not installed in this environment")
    resolved = {str(Path(place).resolve()) for place in found}
    assert resolved == {str(ROOT / "sparsebert" / "__init__.py"), str(ROOT / "kernels")}


# Pins


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            found[canonicalize_name(name)] = version
    return found


def declared(extras: Iterable[str]) -> list[Requirement]:
    lines = [*project()["dependencies"], *(r for e in extras for r in project()["optional-dependencies"][e])]
    return [Requirement(line) for line in lines]


def test_every_declared_requirement_has_a_pin_that_meets_it():
    pinned = pins()
    for requirement in declared(project()["optional-dependencies"]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} has no pin"
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_the_pins_are_closed_and_agree_with_each_other():
    # Walks what the commands install. Packages whose installed version is not the pinned one say nothing here.
    pinned, seen, faults = pins(), set(), []
    waiting = [("sparsebert", requirement) for requirement in declared(("demo", "dev"))]
    while waiting:
        owner, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name.startswith(("nvidia-", "cuda-")):
            continue  # named by torch to the exact version
        if name not in pinned:
            faults.append(f"{owner} needs {requirement}, which has no pin")
        elif not requirement.specifier.contains(pinned[name]):
            faults.append(f"{owner} needs {requirement}, pinned to {pinned[name]}")
        if name not in seen:
            seen.add(name)
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            if distribution.version.partition("+")[0] == pinned.get(name):
                waiting += [(name, Requirement(line)) for line in distribution.requires or ()]
    assert faults == []


def test_no_pin_asks_for_another_torch():
    assert pins()["torch"] == "2.13.0"
    assert pins()["triton"] == "3.7.1"


# Makefile

# A python that makes environments of itself, reports a version of choice, and writes down what pip and pytest were
# called with instead of calling them.
FAKE = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") test "$3" = --version || { echo "$@" >> "$FAKE_LOG"; exit "$FAKE_STATUS"; } ;;
"-c "*) exec "$FAKE_REAL" -c "import sys; sys.version_info = ($FAKE_VERSION, 0); exec(sys.argv[1])" "$2" ;;
*) echo "$@" >> "$FAKE_LOG" ;;
esac
"""


def outside_make() -> dict[str, str]:
    """The environment without what the make that runs these tests would tell another one."""
    outer = ("MAKE", "MFLAGS", "PIP_ARGS", "PYTEST_ARGS", "PYTHON", "BUDGET_S", "OUT", "DRY")
    return {key: value for key, value in os.environ.items() if not key.startswith(outer)}


@pytest.fixture
def make(tmp_path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """``make(*arguments, version=, status=)`` in a folder with the Makefile; the result and the calls it made."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    fake, log = tmp_path / "fake-python", tmp_path / "log"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def call(*arguments: str, version: str = "3, 12", status: int = 0):
        log.write_text("")
        environment = outside_make()
        environment.update(FAKE_LOG=str(log), FAKE_REAL=sys.executable, FAKE_VERSION=version, FAKE_STATUS=str(status))
        defaults = () if any(a.startswith("PYTHON=") for a in arguments) else (f"PYTHON={fake}",)
        result = run("make", *arguments, *defaults, cwd=folder, environment=environment)
        return result, log.read_text().splitlines()

    call.folder = folder
    return call


@pytest.mark.parametrize("version", ["3, 11", "3, 12", "3, 13"])
def test_make_test_installs_once_and_then_only_tests(make, version):
    result, calls = make("test", version=version)
    assert result.returncode == 0, result.stderr
    tools, package, *tests = calls
    assert tools.endswith("--constraint constraints.txt setuptools wheel ninja pybind11")
    assert package.endswith("--constraint constraints.txt --no-build-isolation --editable .[demo,dev]")
    # Triton's interpreter needs processes of its own.
    parallel = "-n auto --maxprocesses 4 --dist loadfile"
    assert tests == [
        f"-m pytest -q {parallel} -m not gpu and not slow --ignore tests/interpreted",
        f"-m pytest -q {parallel} tests/interpreted",
    ]
    result, calls = make("test", version=version)
    assert calls == tests


def test_make_cuda_asks_for_the_build(make):
    result, calls = make("cuda")
    assert result.returncode == 0, result.stderr
    assert calls[2:] == ["setup.py build_ext --inplace"]
    assert "SPARSEBERT_CUDA=1 " in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "setup.py"])
def test_make_installs_again_when_requirements_change(make, changed):
    make("install")
    later = (make.folder / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(make.folder / changed, (later, later))
    _, calls = make("install")
    assert len(calls) == 2


def test_make_tries_again_after_a_failed_install(make):
    result, calls = make("test", status=1)
    assert result.returncode != 0
    assert len(calls) == 1
    assert not (make.folder / ".venv" / ".installed").exists()
    result, calls = make("test")
    assert result.returncode == 0
    assert len(calls) == 4


def test_a_failed_update_forgets_the_earlier_success(make):
    make("install")
    later = (make.folder / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(make.folder / "pyproject.toml", (later, later))
    make("install", status=1)
    assert not (make.folder / ".venv" / ".installed").exists()


def test_make_hands_pip_arguments_to_every_install(make):
    _, calls = make("install", "PIP_ARGS=--index-url https://mirror.example/simple --no-cache-dir")
    assert len(calls) == 2
    assert all("--index-url https://mirror.example/simple --no-cache-dir" in call for call in calls)


@pytest.mark.parametrize("version", ["2, 7", "3, 10", "3, 14"])
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_refuses_other_pythons_in_one_line(make, version, target):
    result, calls = make(target, version=version)
    assert result.returncode != 0
    said, _makes_own = result.stderr.strip().splitlines()
    assert "needs Python 3.11, 3.12 or 3.13" in said
    assert f"is {version.replace(', ', '.')}" in said
    assert calls == []
    assert not (make.folder / ".venv").exists()


def test_make_without_a_python_says_so_in_one_line(make):
    result, _ = make("test", "PYTHON=no-such-python")
    said, _makes_own = result.stderr.strip().splitlines()
    assert said.startswith("no no-such-python here")


@pytest.mark.parametrize("through", ["command line", "environment"])
def test_gpu_check_gets_its_settings_and_needs_no_environment(make, through):
    (make.folder / "benchmarks").mkdir()
    (make.folder / "benchmarks" / "gpu_check.py").write_text(
        "import os\nprint([os.environ.get(name) for name in ('BUDGET_S', 'OUT', 'DRY')])\n"
    )
    settings = ("BUDGET_S=90", "OUT=here", "DRY=1")
    python = f"PYTHON={sys.executable}"
    if through == "command line":
        result, _ = make("gpu-check", python, *settings)
    else:
        environment = outside_make() | dict(setting.split("=") for setting in settings)
        result = run("make", "gpu-check", python, cwd=make.folder, environment=environment)
    assert result.stdout.splitlines()[-1] == "['90', 'here', '1']"
    assert not (make.folder / ".venv").exists()
