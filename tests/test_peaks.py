"""benchmarks/peaks.py without a GPU: what is compiled is what is meant to be measured, and what is said of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import peaks  # noqa: E402
from sparsebert.bench.report import summary  # noqa: E402

PRODUCTS = [peak for peak in peaks.PEAKS if isinstance(peak, peaks.Product)]
LOOPS = [peak for peak in peaks.PEAKS if isinstance(peak, peaks.Loop)]


@dataclass(frozen=True)
class Kernel:
    """``lines`` of its SASS; ``loops``, innermost only, as lines. ``local``: bytes of stack and spills."""

    lines: list[str]
    loops: list[list[str]]
    local: int


@dataclass(frozen=True)
class Built:
    capability: tuple[int, int]
    library: Path
    kernels: dict[str, Kernel]


def opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].rstrip(";")


def kernels(sass: str, usage: str) -> Iterator[tuple[str, Kernel]]:
    used = dict(re.findall(r"Function (\w+):\n(.*)", usage))
    for section in re.split(r"(?m)^\s*\.section\s+\.text\.", sass)[1:]:
        name = section.split(",")[0]
        lines: list[str] = []
        labels: dict[str, int] = {}
        loops: list[tuple[int, int]] = []
        for text in section.splitlines():
            if label := re.match(r"(\.L_x_\d+):", text):
                labels[label[1]] = len(lines)
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", text):
                lines.append(found[1].strip())
                target = re.search(r"BRA.*(\.L_x_\d+)", found[1])
                if target and target[1] in labels and labels[target[1]] < len(lines) - 1:
                    loops.append((labels[target[1]], len(lines)))
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        numbers = dict(re.findall(r"(\w+):(\d+)", used[name]))
        yield name, Kernel(lines, [lines[a:b] for a, b in inner], int(numbers["STACK"]) + int(numbers["LOCAL"]))


def disassembled(library: Path, folder: Path) -> dict[str, Kernel]:
    triton = pytest.importorskip("triton", reason="triton carries the disassembler")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def output(*command: str | Path) -> str:
        done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, cwd=folder)
        return done.stdout

    output(tools / "cuobjdump", "-xelf", "all", library)
    found: dict[str, Kernel] = {}
    for cubin in folder.glob("*.cubin"):
        found |= kernels(output(tools / "nvdisasm", "-c", cubin), output(tools / "cuobjdump", "-res-usage", cubin))
    return found


@pytest.fixture(scope="module", params=[(8, 0), pytest.param((9, 0), marks=pytest.mark.slow)], ids=["sm_80", "sm_90a"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    nvcc = peaks.find_nvcc()
    if nvcc is None:
        pytest.skip(peaks.NO_NVCC)
    folder = tmp_path_factory.mktemp("peaks")
    library = peaks.build(nvcc, request.param, folder)
    return Built(request.param, library, disassembled(library, folder))


def expected_opcode(product: peaks.Product) -> str:
    """What SASS calls the instruction that the table names."""
    sparse, shape = re.match(r"\S+?(\.sp)? m(\S+) ", product.what).groups()
    m, n, k = re.match(r"(\d+)n(\d+)k(\d+)", shape).groups()
    shape = f"{m}x{n}x{k}" if product.only else f"{m}{n}{k}"
    types = {"fp16": "F32", "bf16": "F32.BF16", "s8": "S8.S8"}[product.element]
    unit = ("IG" if product.element == "s8" else "HG") if product.only else ("I" if product.element == "s8" else "H")
    return f"{unit}MMA{'.SP' if sparse else ''}.{shape}.{types}"


def test_each_loop_holds_its_instruction_and_nothing_that_waits_for_memory(built: Built):
    measured = [product for product in PRODUCTS if not product.obstacle(built.capability)]
    assert len(measured) == (46 if built.capability == (9, 0) else 6)
    for product in measured:
        kernel = built.kernels[product.kernel or product.name]
        expected = expected_opcode(product)
        (loop,) = [loop for loop in kernel.loops if any("MMA" in line for line in loop)]
        found = [line for line in loop if "MMA" in opcode(line)]
        assert {opcode(line) for line in found} == {expected}, product.name
        assert len(found) == (16 if product.only else 32), product.name
        # The clock is read right before and after, with a barrier each.
        kept = [line for line in kernel.lines if "SR_CLOCK" in line or "BAR.SYNC" in line or line in found]
        ends = [re.search("BAR|CLOCK", line)[0] for line in (*kept[:2], *kept[-2:])]
        assert ends == ["BAR", "CLOCK", "BAR", "CLOCK"] and kept[2:-2] == found, product.name
        # Nothing else of weight: no loads, no stores, no moves of operands, one wait of a warpgroup for the chain.
        rest = [opcode(line).split(".")[0] for line in loop if "MMA" not in opcode(line)]
        light = {"UIADD3", "UMOV", "USHF", "ULOP3", "ISETP", "UISETP", "PLOP3", "NOP", "BRA", "WARPGROUP", "IADD3"}
        assert set(rest) <= light, product.name
        assert len([name for name in rest if name != "NOP"]) <= 14, product.name
        if product.only:
            # A from registers or not is what the row says.
            assert all(("R" in line.split(",")[1].split()[0][:1]) == ("_rs_" in product.name) for line in found)
            assert sum("ARRIVE" in line for line in loop) == sum("DEPBAR" in line for line in loop) == 1


def test_nothing_spills(built: Built):
    assert {name: kernel.local for name, kernel in built.kernels.items() if kernel.local} == {}


def test_memory_loops_load_16_bytes_by_the_path_they_name(built: Built):
    for name, count, past_l1 in (
        *(("l2_read_cg", 4, False), ("l2_read_nc", 4, True), ("memory_read", 4, True), ("memory_copy", 4, True)),
        *((f"l2_weights_{n}", n, True) for n in (2, 4, 8)),
    ):
        (loop,) = [loop for loop in built.kernels[name].loops if any("LDG" in line for line in loop)]
        loads = [opcode(line) for line in loop if "LDG" in line]
        stores = [opcode(line) for line in loop if "STG" in line]
        assert len(loads) == count and all(".128" in load for load in loads), name
        assert all(("CONSTANT" in load and ".NA" in load) == past_l1 for load in loads), name
        assert past_l1 or all("STRONG.GPU" in load for load in loads)
        assert len(stores) == (4 if name == "memory_copy" else 0) and all(".128" in store for store in stores)
        # All of them are under way before the first is waited for.
        first_use = next(i for i, line in enumerate(loop) if "LOP3" in line or "STG" in line)
        assert all("LDG" not in line for line in loop[first_use:]), name
    (loop,) = [loop for loop in built.kernels["shared_read"].loops if any("LDSM" in line for line in loop)]
    assert [opcode(line) for line in loop].count("LDSM.16.M88.4") == 8
    assert not any(opcode(line).startswith(("LDS.", "STS", "LDG", "LDL", "STL")) for line in loop)


def test_only_hopper_waits_for_the_kernel_before(built: Built):
    opcodes = [opcode(line) for line in built.kernels["chain_link"].lines]
    assert [name for name in opcodes if name in ("ACQBULK", "PREEXIT")] == (
        ["ACQBULK", "PREEXIT"] if built.capability == (9, 0) else []
    )


def test_the_library_knows_every_loop_and_names_what_fails(built: Built):
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(RuntimeError, match=r"^cudaSetDevice\(device\): \w"):
        peaks.Library(built.library)
    library = object.__new__(peaks.Library)
    peaks.Library._load(library, built.library)
    for loop in LOOPS:
        known = not loop.obstacle(built.capability)
        with pytest.raises(RuntimeError, match="^cuda" if known else f"no loop named {loop.kernel or loop.name}"):
            library.measure(loop)
    with pytest.raises(RuntimeError, match="^cuda"):
        library.measure(peaks.PEAKS[-1])


# What needs no compiler


def test_names_are_distinct_and_every_sparse_product_has_its_dense_twin():
    names = [peak.name for peak in peaks.PEAKS]
    assert len(set(names)) == len(names) == 60
    by_name = {product.name: product for product in PRODUCTS}
    for product in PRODUCTS:
        m, n, k = map(int, re.search(r" m(\d+)n(\d+)k(\d+) ", product.what).groups())
        assert product.operations == 2 * m * n * k
        assert (".sp " in product.what) == bool(product.dense)
        if product.dense:
            twin = by_name[product.dense]
            assert (twin.element, twin.threads, twin.dense) == (product.element, product.threads, "")
            # Twice the operations in one instruction is all that 2:4 offers.
            assert product.operations == 2 * twin.operations
            assert names.index(twin.name) < names.index(product.name)


class Scripted:
    """A library that has measured already."""

    multiprocessors = 100

    def __init__(self, found: dict[str, peaks.Found]) -> None:
        self.found = found

    def measure(self, peak: peaks.Peak) -> peaks.Found:
        if peak.name not in self.found:
            raise RuntimeError("wgmma_ss_bf16_n64: no")
        return self.found[peak.name]


def bench(found: dict[str, peaks.Found], capability: tuple[int, int] = (9, 0)) -> peaks.Bench:
    from sparsebert.bench.timing import Timing

    return peaks.Bench(Scripted(found), capability, Timing.from_samples)


def by_name(name: str) -> peaks.Peak:
    return next(peak for peak in peaks.PEAKS if peak.name == name)


def test_rates_ratios_and_clocks_are_those_of_what_was_counted():
    us = [1010.0, 1000.0, 1000.0]
    # 1000 instructions in 128000 cycles, 1000 us; the sparse ones take an eighth longer.
    mine = bench(
        {
            "wgmma_ss_bf16_n256": peaks.Found(us, 1000, 128_000),
            "wgmma_rs_bf16_n256": peaks.Found([900.0] * 3, 1000, 128_000),
            "wgmma_sp_ss_bf16_n256": peaks.Found([1125.0] * 3, 1000, 144_000),
            "memory_read": peaks.Found(us, 4e6, 128_000),
            "gap_graph": peaks.Found([63.0, 126.0, 63.0], 63, 0),
        }
    )
    dense = mine.row(by_name("wgmma_ss_bf16_n256"))
    assert dense["cycles"] == 128 and dense["mhz"] == 128 and dense["of_dense"] is None
    assert dense["tflops"] == pytest.approx(100 * 1000 * 2 * 64 * 256 * 16 / 1000e-6 / 1e12)
    assert (dense["median_us"], dense["repeats"], dense["mode"]) == (1000, 3, "cuda-events")
    mine.row(by_name("wgmma_rs_bf16_n256"))
    sparse = mine.row(by_name("wgmma_sp_ss_bf16_n256"))
    assert sparse["cycles"] == 144
    assert sparse["of_dense"] == pytest.approx(2 / 1.125)
    assert sparse["of_best_dense"] == pytest.approx(2 / 1.25)
    read = mine.row(by_name("memory_read"))
    assert read["bytes"] == 4e8 and read["gbps"] == pytest.approx(400) and read["bytes_per_cycle"] == 31.25
    gap = mine.row(by_name("gap_graph"))
    assert (gap["median_us"], gap["mode"]) == (1, "cuda-graph") and "mhz" not in gap

    with pytest.raises(RuntimeError, match="wgmma_ss_bf16_n64"):
        mine.row(by_name("wgmma_ss_bf16_n64"))
    assert mine.failed == ["wgmma_ss_bf16_n64"]

    rows = [{**peaks.describe(by_name("wgmma_sp_ss_bf16_n256")), "dry": False, **sparse}]
    line = summary.peaks(rows).splitlines()[-1]
    assert line.startswith("| wgmma.sp m64n256k32 bf16, A from shared memory, 2 warpgroups | ")
    assert line.endswith(" T/s | 144 | 128 | 1.78x | 1.60x |")


@pytest.mark.parametrize(
    ("capability", "name", "reason"),
    [
        ((8, 0), "wgmma_ss_s8_n128", "an instruction of compute capability 9.0 only, this is 8.0"),
        ((10, 0), "wgmma_sp_rs_s8_n128", "an instruction of compute capability 9.0 only, this is 10.0"),
        ((8, 9), "gap_graph_pdl", "needs compute capability 9.0, this is 8.9"),
    ],
)
def test_what_a_gpu_lacks_is_skipped_with_the_reason(capability, name, reason):
    assert bench({}, capability).row(by_name(name)) == {"status": "skipped", "reason": reason}


def test_a_dry_run_lists_everything_and_invents_no_number(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert peaks.main(["--dry", "--json", str(tmp_path / "rows.jsonl")]) == 0
    first, *rows = map(json.loads, (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["kind"] == "environment" and "torch" in first["record"]
    assert [row["peer"] for row in rows] == [peak.name for peak in peaks.PEAKS]
    known = {"kind", "peer", "what", "threads", "blocks", "element", "operations", "dense"}
    for row in rows:
        assert row.keys() <= known | {"dry", "environment", "status", "reason"}
        assert row["dry"] and row["environment"] == first["environment"]
        assert (row["status"], row["reason"]) == ("skipped", peaks.DRY)
    assert capsys.readouterr().out.count("| - | - | - | - | - |") == len(rows)


def test_without_a_gpu_or_a_compiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peaks.main([]) == 2
    assert capsys.readouterr() == ("", "peaks: no CUDA device here; --dry lists the measurements without one\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert peaks.main([]) == 2
    assert capsys.readouterr().err == "peaks: this GPU has compute capability 7.5, expected at least 8.0\n"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(peaks, "find_nvcc", lambda: None)
    assert peaks.main([]) == 2
    assert capsys.readouterr().err == f"peaks: {peaks.NO_NVCC}; --dry lists the measurements without it\n"


def test_nvcc_is_that_of_cuda_home_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(peaks, "DEFAULT_CUDA", str(tmp_path / "default"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert peaks.find_nvcc() is None
    for place in (tmp_path / "default" / "bin", tmp_path / "path", tmp_path / "home" / "bin"):
        place.mkdir(parents=True)
        (place / "nvcc").touch(mode=0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert peaks.find_nvcc() == str(place / "nvcc")


def compiler(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_build_that_fails_says_why_and_one_that_is_there_is_kept(tmp_path: Path):
    failing = compiler(tmp_path / "a", "print('peaks.cu(3): error: no such thing', file=sys.stderr); sys.exit(2)")
    with pytest.raises(RuntimeError, match=r"^nvcc failed with status 2: peaks.cu\(3\): error: no such thing$"):
        peaks.build(failing, (9, 0), tmp_path / "out")
    slow = compiler(tmp_path / "b", "time.sleep(60)")
    with pytest.raises(TimeoutError, match="^nvcc did not finish in 1 s$"):
        peaks.build(slow, (9, 0), tmp_path / "out", limit_s=1)
    good = compiler(tmp_path / "c", "open(sys.argv[-1], 'w').write(' '.join(sys.argv))")
    path = peaks.build(good, (9, 0), tmp_path / "out")
    assert "arch=compute_90a,code=sm_90a" in path.read_text() and "-DPEAKS_WGMMA" in path.read_text()
    written = path.stat().st_mtime_ns
    assert peaks.build(good, (9, 0), tmp_path / "out") == path and path.stat().st_mtime_ns == written
    other = peaks.build(good, (8, 6), tmp_path / "out")
    assert other != path and "code=sm_86" in other.read_text() and "WGMMA" not in other.read_text()
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.fixture
def context(tmp_path: Path) -> gpu_check.Context:
    import torch

    settings = gpu_check.Settings(out=tmp_path, dry=False, budget_s=60.0)
    journal = gpu_check.Journal(settings, tmp_path, started=0.0)
    return gpu_check.Context(settings, journal, until=float("inf"), device=torch.device("cuda", 0))


def test_the_step_is_skipped_without_a_compiler(context: gpu_check.Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peaks, "find_nvcc", lambda: None)
    assert gpu_check.peaks_step(context) == gpu_check.Outcome("skipped", peaks.NO_NVCC)


def test_the_step_measures_what_the_gpu_has_and_names_what_failed(
    context: gpu_check.Context, monkeypatch: pytest.MonkeyPatch
):
    import torch

    found = {peak.name: peaks.Found([1000.0] * 3, 1000, 1e6) for peak in peaks.PEAKS if peak.name != "mma_s8"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(peaks, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(peaks, "build", lambda *_: Path("peaks.so"))
    monkeypatch.setattr(peaks, "Library", lambda *_: Scripted(found))
    assert gpu_check.peaks_step(context) == gpu_check.Outcome("failed", "not measured: mma_s8")
    rows = [json.loads(line) for line in context.journal.rows_path.read_text().splitlines()]
    status = {row["peer"]: row["status"] for row in rows}
    assert status.pop("mma_s8") == "refused"
    lacking = {peak.name for peak in peaks.PEAKS if peak.obstacle((8, 0))}
    assert {name for name, value in status.items() if value == "skipped"} == lacking
    assert {value for name, value in status.items() if name not in lacking} == {"ok"}
    assert "| mma m16n8k16 bf16, 8 warps |" in summary.peaks(rows) and "wgmma" not in summary.peaks(rows)

    context.until = 0.0
    assert gpu_check.peaks_step(context) == gpu_check.Outcome("partial", "out of time before mma_fp16")

    def slow(*_: object) -> Path:
        raise TimeoutError("nvcc did not finish in 9 s")

    monkeypatch.setattr(peaks, "build", slow)
    assert gpu_check.peaks_step(context) == gpu_check.Outcome("partial", "nvcc did not finish in 9 s")
