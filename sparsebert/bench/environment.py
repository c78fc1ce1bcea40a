"""Where a number was taken: the record that goes beside every measurement."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["device_label", "environment"]

UNKNOWN = "unknown"
PACKAGE = Path(__file__).resolve().parents[1]


def environment(device: torch.device | str | None = None) -> dict[str, object]:
    """What a reader needs to judge a measurement: when it was taken (``measured``, UTC), software versions, the
    processor, the GPU if there is one, the commit of this package, and what its kernels were built from. Every
    value is JSON-able; what cannot be found is ``None`` (versions, GPU fields, sources) or ``"unknown"`` (commit,
    date).

    ``date`` is that of the commit. ``triton_sources`` and ``cuda_sources`` are hashes of the kernels' files, the
    latter ``None`` in an installed package, which has no ``csrc``: rows of the same hash are of the same kernels,
    whatever else a commit changed.

    ``device`` selects the GPU described and defaults to the current one; a CPU device leaves the GPU fields
    ``None`` even where a GPU is present. ``SPARSEBERT_COMMIT`` and ``SPARSEBERT_DATE`` stand in for a git
    checkout where there is none; ``dirty`` says whether the checkout had uncommitted changes (``None``: not
    known).
    """
    commit, date, dirty = _commit()
    record: dict[str, object] = {
        "sparsebert": _package_version(),
        "commit": commit,
        "date": date,
        "dirty": dirty,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "triton_sources": _digest(PACKAGE / "kernels", (".py",)),
        "cuda_sources": _digest(PACKAGE.parent / "csrc", (".cu", ".cuh", ".h", ".cpp")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
    }
    record.update(_gpu(_gpu_of(device)))
    return record


def device_label(device: torch.device | str) -> str:
    """A device as a reader would name it: ``"CPU: Intel Xeon ... (2 threads)"`` or ``"NVIDIA H200"``."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU: {_cpu_model()} ({threads} thread{'' if threads == 1 else 's'})"
    return str(device)


def _gpu_of(device: torch.device | str | None) -> torch.device | None:
    if device is not None:
        device = torch.device(device)
        return device if device.type == "cuda" else None
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _gpu(device: torch.device | None) -> dict[str, object]:
    names = ("gpu", "sm_count", "capability", "l2_bytes", "gpu_memory_bytes", "cuda", "driver", "cusparselt")
    record: dict[str, object] = dict.fromkeys(names)
    record["cuda"] = torch.version.cuda
    if device is None:
        return record
    properties = torch.cuda.get_device_properties(device)
    record["gpu"] = properties.name
    record["sm_count"] = properties.multi_processor_count
    record["capability"] = f"{properties.major}.{properties.minor}"
    record["l2_bytes"] = properties.L2_cache_size
    record["gpu_memory_bytes"] = properties.total_memory
    record["driver"] = _driver()
    record["cusparselt"] = torch.backends.cusparselt.version()
    return record


def _driver() -> str | None:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


def _commit() -> tuple[str, str, bool | None]:
    """Commit, date and whether the checkout was dirty, from the environment or else from git."""
    commit = os.environ.get("SPARSEBERT_COMMIT", "")
    date = os.environ.get("SPARSEBERT_DATE", "")
    if commit:
        return commit, date or UNKNOWN, None
    root = Path(__file__).resolve().parents[2]
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    # An installed copy may sit in a virtual environment inside somebody else's checkout: that commit is not
    # ours.
    if not top or Path(top).resolve() != root:
        return UNKNOWN, date or UNKNOWN, None
    found = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if not found:
        return UNKNOWN, date or UNKNOWN, None
    date = date or _output("git", "-C", str(root), "show", "-s", "--format=%cI", "HEAD") or UNKNOWN
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return found, date, None if changes is None else bool(changes)


def _digest(folder: Path, suffixes: tuple[str, ...]) -> str | None:
    """SHA-256 (its first 16 digits) of the names and texts of all files under ``folder`` with these suffixes."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in suffixes)
    if not files:
        return None
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _output(*command: str) -> str | None:
    """What a program prints, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    # Read from the installed metadata: importing triton or transformers only to learn this would cost
    # seconds.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package_version() -> str | None:
    try:
        from sparsebert import __version__
    except Exception:  # this file also serves alone, to record where the package itself would not import
        return _version("sparsebert")
    return str(__version__)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or UNKNOWN
