"""The ceilings of a GPU that decide which kernel can win where, each in a loop that holds nothing else:

    python benchmarks/peaks.py [--json FILE]

Rates of the matrix instructions, dense and 2:4, with operands in registers and in shared memory; bandwidth of the
memory, the L2 and shared memory; what a launch costs, and the gap between two kernels of which one needs the other.
README.md beside this file says what the rows mean. A table goes to stdout, JSON lines to FILE.

peaks.cu is built with nvcc for the GPU that is here. ``--dry`` builds and measures nothing and lists what there is to
measure; it needs no GPU. Exit status: 0, or 1 when a measurement failed, or 2 without a CUDA device or nvcc.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (str(ROOT), str(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

Capability = tuple[int, int]
Row = dict[str, Any]

SOURCES = (HERE / "peaks.cu", ROOT / "csrc" / "common" / "intrinsics.cuh")
LEAST: Capability = (8, 0)  # mma.sp and the shapes used
HOPPER: Capability = (9, 0)  # wgmma is an instruction of this one only
SAMPLES = 25
SAMPLE_US = 4e3
# Power, and with it the clock, settles only after a while under load.
WARM_US = 100e3
DEFAULT_CUDA = "/usr/local/cuda"
NO_NVCC = "nvcc is not found: not on PATH, nor under CUDA_HOME"
DRY = "DRY: needs CUDA; nothing was built or measured"


@dataclass(frozen=True)
class Peak:
    """One measurement. ``what`` says it to a reader; the rest is how peaks.cu is asked for it."""

    name: str
    what: str
    only: Capability | None = None
    least: Capability = LEAST

    def obstacle(self, capability: Capability) -> str:
        """Why this GPU cannot run it; empty if it can."""
        if self.only and self.only != capability:
            return f"an instruction of compute capability {_dotted(self.only)} only, this is {_dotted(capability)}"
        if capability < self.least:
            return f"needs compute capability {_dotted(self.least)}, this is {_dotted(capability)}"
        return ""


@dataclass(frozen=True)
class Loop(Peak):
    """A kernel of ``peaks.cu``, by the name of the row unless said, with ``blocks`` blocks of ``threads`` on every
    multiprocessor."""

    kernel: str = ""
    threads: int = 256
    blocks: int = 1


@dataclass(frozen=True)
class Product(Loop):
    """A matrix instruction. ``operations`` are those of one instruction, two for each multiplication and addition; a
    sparse one counts the dense product that it stands for. ``dense``: the row of its dense twin."""

    operations: int = 0
    element: str = ""
    dense: str = ""


@dataclass(frozen=True)
class Memory(Loop):
    """A transfer, counted in bytes."""


@dataclass(frozen=True)
class Launches(Peak):
    """Empty kernels, or the gap in a ``chain`` of kernels of which each needs the one before it."""

    chain: bool = False
    graph: bool = False
    dependent: bool = False


def _dotted(capability: Capability) -> str:
    return "{}.{}".format(*capability)


def _warp_products() -> list[Product]:
    found = []
    for sparse in (False, True):
        for element, k in (("fp16", 16), ("bf16", 16), ("s8", 32)):
            k = 2 * k if sparse else k
            name = f"mma_{'sp_' if sparse else ''}{element}"
            what = f"mma{'.sp' if sparse else ''} m16n8k{k} {element}, 8 warps"
            dense = f"mma_{element}" if sparse else ""
            found.append(Product(name, what, operations=2 * 16 * 8 * k, element=element, dense=dense))
    return found


def _warpgroup_products() -> list[Product]:
    # Two warpgroups reach what there is to reach. One, where its sums are as many as registers allow, tells whether a
    # kernel can spare the other; four, whether narrow products want more of them.
    found = []
    for sparse in (False, True):
        for element, k in (("bf16", 16), ("s8", 32)):
            k = 2 * k if sparse else k
            for form, a in (("ss", "shared memory"), ("rs", "registers")):
                for n, groups in ((256, 2), (256, 1), (128, 2), (64, 2), (64, 4)):
                    kernel = f"wgmma_{'sp_' if sparse else ''}{form}_{element}_n{n}"
                    shape = f"wgmma{'.sp' if sparse else ''} m64n{n}k{k} {element}"
                    many = "" if groups == 2 else f"_x{groups}"
                    found.append(
                        Product(
                            kernel + many,
                            f"{shape}, A from {a}, {groups} warpgroup{'s'[: groups - 1]}",
                            only=HOPPER,
                            kernel=kernel,
                            threads=128 * groups,
                            operations=2 * 64 * n * k,
                            element=element,
                            dense=f"wgmma_{form}_{element}_n{n}{many}" if sparse else "",
                        )
                    )
    return found


def _peaks() -> tuple[Peak, ...]:
    products = [*_warp_products(), *_warpgroup_products()]
    wide: dict[str, Any] = {"threads": 512, "blocks": 2}
    early: dict[str, Any] = {"dependent": True, "least": HOPPER}
    return (
        # Dense first: the others are compared with them.
        *sorted(products, key=lambda product: product.dense != ""),
        Memory("shared_read", "shared memory, ldmatrix.x4, 16 warps", threads=512),
        Memory("l2_read_cg", "L2, ld.global.cg of 16 bytes, 32 warps with 4 each", **wide),
        Memory("l2_read_nc", "L2, ld.global.nc past the L1, 32 warps with 4 each", **wide),
        *(Memory(f"l2_weights_{n}", f"L2, ld.global.nc past the L1, 8 warps with {n} each") for n in (2, 4, 8)),
        Memory("memory_read", "device memory, read", **wide),
        Memory("memory_copy", "device memory, read plus written", **wide),
        Launches("launch_stream", "an empty kernel, called"),
        Launches("launch_graph", "an empty kernel in a graph", graph=True),
        Launches("gap_stream", "gap to a dependent kernel, called", chain=True),
        Launches("gap_stream_pdl", "gap, called, programmatic dependent launch", chain=True, **early),
        Launches("gap_graph", "gap to a dependent kernel in a graph", chain=True, graph=True),
        Launches("gap_graph_pdl", "gap in a graph, programmatic dependent launch", chain=True, graph=True, **early),
    )


PEAKS = _peaks()


def describe(peak: Peak) -> Row:
    """The fields of a row that are known without measuring."""
    fields: Row = {"kind": "peak", "peer": peak.name, "what": peak.what}
    if isinstance(peak, Loop):
        fields |= {"threads": peak.threads, "blocks": peak.blocks}
    if isinstance(peak, Product):
        fields |= {"element": peak.element, "operations": peak.operations, "dense": peak.dense or None}
    return fields


# Building


def find_nvcc() -> str | None:
    """CUDA_HOME's nvcc, or the one on PATH, or where CUDA installs itself by default."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [*([Path(home) / "bin" / "nvcc"] if home else []), Path("nvcc"), Path(DEFAULT_CUDA) / "bin" / "nvcc"]
    return next(filter(None, (shutil.which(str(place)) for place in places)), None)


def command(nvcc: str, capability: Capability, target: Path) -> list[str]:
    """How ``peaks.cu`` becomes ``target``, for one kind of GPU. cudart is linked in, so nothing of CUDA's has to be
    found when it is loaded, and a machine without a GPU can load it."""
    hopper = capability == HOPPER
    number = "{}{}".format(*capability)
    architecture = f"{number}a" if hopper else number
    return [
        *(nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"),
        *("-I", str(ROOT / "csrc"), "-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
        *(f"-DPEAKS_CAPABILITY={number}", *(["-DPEAKS_WGMMA"] if hopper else [])),
        *(str(SOURCES[0]), "-o", str(target)),
    ]


def build(nvcc: str, capability: Capability, folder: Path, limit_s: float | None = None) -> Path:
    """The library for GPUs of one compute capability, built into ``folder`` unless it is there already. Raises
    ``RuntimeError`` with the compiler's first error, or ``TimeoutError``."""
    content = b"".join(source.read_bytes() for source in SOURCES)
    content += " ".join(command(nvcc, capability, Path("peaks.so"))).encode()
    target = folder / f"peaks-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole: a compiler that is stopped leaves half a file.
    partial = target.with_suffix(f".{os.getpid()}.so")
    try:
        done = subprocess.run(command(nvcc, capability, partial), capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"nvcc did not finish in {limit_s:.0f} s") from None
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
        raise RuntimeError(f"nvcc failed with status {done.returncode}: {first}")
    partial.replace(target)
    return target


# Measuring


@dataclass(frozen=True)
class Found:
    """``us`` of each sample. In a sample one multiprocessor does ``amount`` in ``cycles`` of its clock; of launches,
    ``amount`` is how many."""

    us: list[float]
    amount: float
    cycles: float


class Library:
    """``peaks.cu``, built and loaded, for one device. Every call that fails raises ``RuntimeError``."""

    def __init__(self, path: Path, device: int = 0) -> None:
        self._load(path)
        count = ctypes.c_int()
        self._call("peaks_device", ctypes.c_int(device), ctypes.byref(count))
        self.multiprocessors = count.value

    def _load(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.peaks_error.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self.library, name)(*arguments):
            raise RuntimeError(self.library.peaks_error().decode(errors="replace"))

    def measure(self, peak: Peak, samples: int = SAMPLES) -> Found:
        us, amount, cycles = (ctypes.c_double * samples)(), ctypes.c_double(), ctypes.c_double()
        if isinstance(peak, Launches):
            choices = map(ctypes.c_int, (peak.chain, peak.graph, peak.dependent, samples))
            self._call("peaks_launches", *choices, us, ctypes.byref(amount))
        elif isinstance(peak, Loop):
            sizes = map(ctypes.c_int, (peak.threads, peak.blocks, samples))
            times = map(ctypes.c_double, (SAMPLE_US, WARM_US))
            out = (us, ctypes.byref(amount), ctypes.byref(cycles))
            self._call("peaks_loop", (peak.kernel or peak.name).encode(), *sizes, *times, *out)
        return Found(list(us), amount.value, cycles.value)


class Bench:
    """Turns what was found into rows. ``summarize`` is ``sparsebert.bench.timing.Timing.from_samples``."""

    def __init__(self, library: Library, capability: Capability, summarize: Callable[[list[float], str], Any]) -> None:
        self.library = library
        self.capability = capability
        self.summarize = summarize
        self.tflops: dict[str, float] = {}
        self.failed: list[str] = []

    def row(self, peak: Peak) -> Row:
        """What ``describe`` leaves open; ``skipped`` where the GPU lacks the instruction."""
        if obstacle := peak.obstacle(self.capability):
            return {"status": "skipped", "reason": obstacle}
        try:
            found = self.library.measure(peak)
        except RuntimeError:
            self.failed.append(peak.name)
            raise
        if isinstance(peak, Launches):
            each = [us / found.amount for us in found.us]
            return {"status": "ok", **self.summarize(each, "cuda-graph" if peak.graph else "cuda-events").to_dict()}
        timing = self.summarize(found.us, "cuda-events").to_dict()
        total = found.amount * self.library.multiprocessors
        # The cycles are those of the last sample, so they go with its time.
        fields: Row = {"status": "ok", **timing, "mhz": found.cycles / found.us[-1]}
        if isinstance(peak, Product):
            return fields | self._rates(peak, total / timing["median_us"], found)
        return fields | {
            "bytes": total,
            "gbps": total / timing["median_us"] / 1e3,
            "bytes_per_cycle": found.amount / found.cycles,
        }

    def _rates(self, peak: Product, instructions_per_us: float, found: Found) -> Row:
        self.tflops[peak.name] = tflops = instructions_per_us * peak.operations / 1e6
        same = [p for p in PEAKS if isinstance(p, Product) and not p.dense and _bits(p) == _bits(peak)]
        best = max((self.tflops[p.name] for p in same if p.name in self.tflops), default=None)
        twin = self.tflops.get(peak.dense)
        return {
            "cycles": found.cycles / found.amount,
            "tflops": tflops,
            "of_dense": tflops / twin if twin else None,
            "of_best_dense": tflops / best if best else None,
        }


def _bits(product: Product) -> int:
    return 8 if product.element == "s8" else 16


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows, a JSON object a line")
    parser.add_argument("--dry", action="store_true", help="list the measurements: no GPU, no build, no numbers")
    parser.add_argument("--build", metavar="FOLDER", type=Path, help="keep the built library here for the next run")
    options = parser.parse_args(arguments)

    import torch

    from sparsebert.bench.environment import environment
    from sparsebert.bench.report import summary
    from sparsebert.bench.timing import Timing

    capability = LEAST
    nvcc = find_nvcc()
    if not options.dry:
        if not torch.cuda.is_available():
            return _refuse("no CUDA device here; --dry lists the measurements without one")
        capability = torch.cuda.get_device_capability()
        if capability < LEAST:
            return _refuse(f"this GPU has compute capability {_dotted(capability)}, expected at least {_dotted(LEAST)}")
        if nvcc is None:
            return _refuse(f"{NO_NVCC}; --dry lists the measurements without it")

    record = environment("cpu" if options.dry else torch.device("cuda", torch.cuda.current_device()))
    identity = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
    shared: Row = {"dry": options.dry, "environment": identity}
    rows: list[Row] = [{"kind": "environment", **shared, "record": record}]
    if options.dry:
        rows += ({**describe(peak), **shared, "status": "skipped", "reason": DRY} for peak in PEAKS)
    else:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            try:
                path = build(str(nvcc), capability, options.build or Path(temporary))
                library = Library(path, torch.cuda.current_device())
            except (RuntimeError, OSError) as error:
                print(f"peaks: {error}", file=sys.stderr)
                return 1
        print(f"peaks: built and loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        bench = Bench(library, capability, Timing.from_samples)
        rows += ({**describe(peak), **shared, **_attempt(bench, peak)} for peak in PEAKS)
    if options.json:
        options.json.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    print(summary.peaks(rows))
    return int(any(row.get("status") == "refused" for row in rows))


def _attempt(bench: Bench, peak: Peak) -> Row:
    try:
        return bench.row(peak)
    except RuntimeError as error:
        print(f"peaks: {peak.name}: {error}", file=sys.stderr)
        return {"status": "refused", "reason": str(error)}


def _refuse(reason: str) -> int:
    print(f"peaks: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
