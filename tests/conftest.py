"""What every test gets: no network, nobody's settings, a fixed seed, and fresh processes on demand."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_cache = tempfile.TemporaryDirectory(prefix="sparsebert-tests-")
# Before anything reads them: a forced backend or this machine's measurements must not decide what is tested,
# and a test that needs the hub has to fail here too, not only on a machine without a network.
os.environ.pop("SPARSEBERT_BACKEND", None)
os.environ.update(
    SPARSEBERT_CACHE=_cache.name,
    HF_HUB_OFFLINE="1",
    HF_HOME=os.path.join(_cache.name, "hub"),
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
import torch  # noqa: E402

try:
    import hypothesis
except ModuleNotFoundError:  # machines that only run the GPU tests
    pass
else:
    # A failure has to come back on the next run, and a busy machine is no failure.
    hypothesis.settings.register_profile("sparsebert", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("sparsebert")

ROOT = Path(__file__).resolve().parents[1]

RunPython = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_unconfigure() -> None:
    _cache.cleanup()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _nothing_shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nor may the measurements that come with the package decide, on a GPU that they are of."""
    try:
        from sparsebert.ops import measurements
    except ImportError:  # what the tests of that say better
        yield
        return
    before, empty = measurements.SHIPPED_TABLE, tmp_path_factory.mktemp("shipped") / "shipped.json"
    empty.write_text(measurements.as_text([]))
    measurements.SHIPPED_TABLE = empty
    yield
    measurements.SHIPPED_TABLE = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files of many tests with tiny matrices: a second thread gains nothing there, and where cores are shared it
    spins while it waits, which takes several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """``run_python(code, *arguments, cwd=, environment=, path=, check=)`` in a fresh interpreter.

    By default in an empty folder, with the sparsebert that this process tests (``path`` puts other folders
    before what is installed). A failing process fails the test with its output, unless ``check`` is False.
    """
    return _runner(tmp_path)


@pytest.fixture(scope="module")
def run_python_once(tmp_path_factory: pytest.TempPathFactory) -> RunPython:
    """``run_python`` for fixtures that a whole module shares."""
    return _runner(tmp_path_factory.mktemp("cwd"))


def _runner(folder: Path) -> RunPython:
    def run(
        code: str,
        *arguments: str,
        cwd: Path = folder,
        environment: Mapping[str, str] | None = None,
        path: tuple[Path, ...] = (ROOT,),
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if check and result.returncode:
            pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
        return result

    return run
