"""The op sweep: its peers walked at toy sizes, what a wrong or refusing one does, and the order of the work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsebert.bench import jobs
from sparsebert.bench.linear import ceilings, dense, library, never_slower, own, shapes, sweep
from sparsebert.bench.linear.cases import Built, Case, Peer, relative_error
from sparsebert.bench.linear.shapes import DRY_SHAPES, Shape
from sparsebert.bench.report import summary
from sparsebert.bench.timing import Timing

CPU = torch.device("cpu")
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
RATES = {"copy": 10.0, "matmul_fp16": 0.1, "matmul_bf16": 0.1, "matmul_int8": 0.1, "matmul_fp8": 0.1}


@pytest.fixture(autouse=True)
def one_thread():
    """Toy sizes: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(shape: Shape = DRY_SHAPES[0], tokens: int = 16, activation: str = "none") -> Case:
    return Case(shape, tokens, CPU, torch.Generator().manual_seed(0), lambda nbytes: 2, activation)


def only(monkeypatch: pytest.MonkeyPatch, *peers: Peer, **options) -> list[dict]:
    """The rows of these peers alone."""
    monkeypatch.setattr(sweep, "every_peer", lambda device, dry=False: peers)
    monkeypatch.setattr(shapes, "DRY_SHAPES", DRY_SHAPES[:1])
    options = {"dry": True, "tokens": [16], "budget_s": 0.003, "ceilings": RATES} | options
    return list(jobs.run(sweep.jobs(CPU, **options)))


def suspect(build) -> Peer:
    return Peer("suspect", "dense", "float16", "bias", build, "matmul_fp16", gelu=())


def test_every_peer_of_a_gpu_is_walked_and_right():
    """On a CPU, by torch's stand-ins and the references of the layouts: no call has a typo, and each result is held to
    float64 of the same operands."""
    listed = sweep.jobs(CPU, dry=True, tokens=[9], budget_s=0.0001, ceilings=RATES)
    listed = [job for job in listed if job.row["role"] == "dry.ffn_in" or job.row["peer"].startswith("gelu_int8")]
    rows = list(jobs.run(listed))
    assert {row["peer"] for row in rows} == {peer.name for peer in sweep.every_peer(CPU, dry=True)}
    for row in rows:
        if row["status"] == "refused":
            assert row["peer"].startswith("torchao") and not HAS_TORCHAO, row
            continue
        assert row["status"] in ("ok", "skipped"), row
        assert row["error"] <= row["error_limit"] and row["bytes"] > row["weight_bytes"] > 0
        assert 0 < row["operations"] <= 1.6 * row["flops"]
    measured = [row for row in rows if row["status"] == "ok"]
    assert all(row["copies"] > 1 and row["resident_us"] > 0 for row in measured)
    # Beside each, in turns with it, a dense linear of the same dtype.
    assert all(row["anchor_us"] > 0 for row in measured)
    assert {(row["anchor"], "bf16" in row["peer"]) for row in measured if row["group"] != "library"} == {
        *(("cublas_fp16", False), ("cublas_bf16", True))
    }
    assert {row["group"] for row in measured} == {"dense", "library", "own"}
    # Each has its roofline.
    for row in measured:
        assert row["floor_us"] == max(row["bytes_us"], row["operations_us"])
        assert row["reached"] == pytest.approx(row["floor_us"] / row["median_us"])
    formats = [row for row in measured if "format" in row]
    assert all(row["op"] and row["device"] and row["configuration"] == {} for row in formats)
    assert {row["format"] for row in formats} == set(own.FORMATS)


def test_every_peer_of_a_cpu_is_right():
    listed = sweep.jobs(CPU, models=["minilm"], tokens=[8], budget_s=0.001)
    rows = list(jobs.run(job for job in listed if job.row["role"] == "minilm.projection" and not job.row["compiled"]))
    # torch's int8 matmul has reasons of its own, such as a CPU without the instructions.
    assert {row["status"] for row in rows if row.get("backend") != "torch"} == {"ok"}
    assert {row["status"] for row in rows} <= {"ok", "refused"}
    measured = [row for row in rows if row["status"] == "ok"]
    assert {row["mode"] for row in measured} == {"cpu-wall"} and {row["reached"] for row in measured} == {None}
    assert not {"cuda", "triton"} & {row.get("backend") for row in rows}
    assert {row["peer"] for row in rows if row["group"] == "dense"} == {"torch_fp32"}


def test_operations_are_those_that_a_format_needs():
    """(out, in) = (128, 64), 16 tokens: 262,144 operations dense."""
    rank = own.layer("low-rank:0.5", 128, 64, torch.float32, CPU).spec.rank
    wanted = {
        "2:4": 131_072,
        "1:4": 65_536,
        "int8": 262_144,
        "int8+2:4": 131_072,
        "2:4@0.5": 65_536,
        "low-rank:0.5": 2 * 16 * rank * (128 + 64),
        "bitmap:0.1": 2 * 16 * own.layer("bitmap:0.1", 128, 64, torch.float32, CPU).spec.nnz,
    }
    for format, operations in wanted.items():
        layout = "dense"
        built = own._build(case(), format, layout, "reference", torch.float32)
        assert built.operations == operations, format


@pytest.mark.parametrize(("fault", "status"), [(0.0, "ok"), (0.01, "wrong"), (float("nan"), "wrong")])
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, fault: float, status: str):
    def build(case: Case) -> Built:
        x, w, b = case.operands(torch.float16)

        def call() -> torch.Tensor:
            y = torch.nn.functional.linear(x, w, b)
            y[-1, -1] += fault * y.float().norm()
            return y

        reference = x.double() @ w.double().T + b.double()
        return Built({"": [call, call]}, lambda: reference, 1, 1, limit=2e-3)

    (row,) = only(monkeypatch, suspect(build))
    assert row["status"] == status
    assert ("median_us" in row) == (status == "ok")
    assert ("over the limit" in row.get("reason", "")) == (status == "wrong")


def test_what_a_kernel_leaves_unwritten_shows(monkeypatch: pytest.MonkeyPatch):
    def build(case: Case) -> Built:
        x, w, b = case.operands(torch.float32)
        y = torch.nn.functional.linear(x, w, b)

        def call() -> torch.Tensor:
            result = torch.empty_like(y)
            result[:-1] = y[:-1]
            return result

        return Built({"": [call]}, y.double, 1, 1, limit=1e-5)

    (row,) = only(monkeypatch, suspect(build))
    assert row["status"] == "wrong"


def test_a_variant_that_refuses_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch):
    def build(case: Case) -> Built:
        built = next(peer for peer in dense.peers(torch.float16) if peer.name == "cublas_fp16").build(case)

        def refuse() -> torch.Tensor:
            raise RuntimeError("no such algorithm\nmore")

        built.variants["other"] = [refuse, refuse]
        return built

    (row,) = only(monkeypatch, suspect(build))
    assert row["status"] == "ok" and row["algorithm"] == ""
    assert row["dropped"] == {"other": "RuntimeError: no such algorithm"}


def test_a_peer_that_is_not_installed_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    (peer,) = (peer for peer in library.peers(dry=True) if peer.name == "torchao_int8_fp16")
    (row,) = only(monkeypatch, replace(peer, gelu=()))
    assert row["status"] == "refused" and "torchao" in row["reason"] and "median_us" not in row


@pytest.mark.parametrize("name", ["compiled_fp16", "torchao_int8_bf16"])
def test_copies_of_a_weight_share_one_compiled_graph(name: str):
    """Beyond eight graphs of one function torch.compile falls back to Python, and would be timed as such."""
    if name.startswith("torchao"):
        pytest.importorskip("torchao")
    every = (*dense.peers(torch.float16, dry=True), *library.peers(dry=True))
    (peer,) = (peer for peer in every if peer.name == name)
    with torch.no_grad():
        calls = peer.build(replace(case(), copies_for=lambda nbytes: 12)).variants[""]
        calls[0]()
        with torch.compiler.set_stance("fail_on_recompile"):
            assert len([call() for call in calls]) == 12


@pytest.mark.slow
def test_torchao_where_it_is_installed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Elsewhere it is not: transformers imports it where it finds it, which takes seconds in every process."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, "--constraint", str(root / "constraints.txt"), "torchao"], check=True)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    tests = ["tests/test_bench_linear.py", "tests/test_bench_models.py"]
    wanted = "every_peer_of_a_gpu or copies_of_a_weight or torchao or dry"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", wanted, *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_what_needs_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    (peer,) = (peer for peer in library.peers() if peer.name == "cusparselt_fp16")
    (row,) = only(monkeypatch, replace(peer, gelu=()), dry=False, models=["minilm"])[:1]
    assert row["status"] == "refused" and row["reason"] == "RuntimeError: needs CUDA"


def test_many_configurations_are_sifted_before_they_are_measured(monkeypatch: pytest.MonkeyPatch):
    """On a GPU a peer of the CUDA kernel has a variant for each; here the one there is stands for twelve."""
    (found,) = (peer for peer in own.peers(torch.float16, on_gpu=True) if peer.name == "2:4/mma_sp/cuda/fp16")

    def build(case: Case) -> Built:
        built = found.build(case)
        built.variants = {f"tile={number}": built.variants[""] for number in range(12)}
        built.notes["configurations"] = {f"tile={number}": {"tile": number} for number in range(12)}
        return built

    (row,) = only(monkeypatch, replace(found, build=build, gelu=()))
    assert row["status"] == "ok" and len(row["variants_us"]) == 12 and row["algorithm"].startswith("tile=")
    assert row["configuration"] == {"tile": int(row["algorithm"].removeprefix("tile="))}
    assert row["resident_us"] > 0 and row["median_us"] == row["variants_us"][row["algorithm"]]


def test_the_kernel_for_hopper_is_measured_wherever_it_may_run():
    """From the layouts that are there, dense weights among the paths to beat; held dense, no format is run by it."""
    for dtype, short in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        found = {peer.name: peer for peer in own.peers(dtype, on_gpu=True) if "/cuda/" in peer.name}
        assert {name for name in found if "/mma_sp/" not in name} == {
            f"{place}/cuda/{short}"
            for place in (
                *("dense/neutral", "2:4/neutral", "2:4@0.5/neutral", "int8/neutral", "int8-static/neutral"),
                *("int8+2:4/neutral", "int8+2:4/unpacked"),
                *(f"low-rank:{rank}+2:4/{layout}" for rank in ("r32", "0.25") for layout in ("neutral", "padded")),
            )
        }
        assert {name for name, peer in found.items() if peer.group == "dense"} == {f"dense/neutral/cuda/{short}"}
    chained = {peer.name.rpartition("/")[0] for peer in own.CHAINED}
    for name in ("int8+2:4_rows", "int8+2:4_to_int8", "tail32+2:4"):
        assert {f"{name}/mma_sp/cuda", f"{name}/neutral/cuda"} <= chained
    assert {"int8_rows/neutral/cuda", "2:4_layer_norm/neutral/cuda", "2:4_then_layer_norm/neutral/cuda"} <= chained


def test_the_summary_holds_kernels_against_peers_that_there_are():
    names = {
        peer.name
        for dtype in (torch.float16, torch.bfloat16)
        for peer in (*dense.peers(dtype), *own.peers(dtype, on_gpu=True))
    } | {peer.name for peer in (*library.peers(), *own.CHAINED)}
    for against in (summary.MMA_SP, summary.WGMMA):
        assert {peer for _, *both in against.values() for peer in both} <= names


def gpu_items(**options) -> list[tuple[str, int, str, str]]:
    """The order on a GPU, which need not be there to be asked."""
    peers = [
        *(peer for dtype in (torch.float16, torch.bfloat16) for peer in dense.peers(dtype)),
        *library.peers(),
        *own.peers(torch.float16, on_gpu=True),
        *own.CHAINED,
    ]
    wanted = {"models": ("base", "large", "minilm"), "tokens": None, "dry": False} | options
    blocks = sweep._blocks(wanted["models"], wanted["tokens"], peers, wanted["dry"])
    return [(shape.role, count, activation, peer.name) for shape, count, activation, peer in sweep._order(blocks)]


def test_the_order_starts_with_what_tells_most():
    items = gpu_items()
    assert max(Counter(items).values()) == 1
    first = items[:42]
    assert {tokens for _, tokens, _, _ in first} == {128, 2048, 8192}
    assert {peer for *_, peer in first} == {"cublas_fp16", "cublas_fp16_fused", "cusparselt_fp16"}
    assert all(".ffn" in role and not role.startswith("minilm") for role, *_ in first)
    # Then the package's own kernels where packed weights pay by their bytes, beside dense.
    after = [item for item in items[42:] if item[1] == 32][:200]
    assert items[42 : 42 + len(after)] == after
    early = {"cublas_fp16", "2:4/mma_sp/cuda/fp16", "2:4/neutral/cuda/fp16", "2:4/neutral/triton/fp16"}
    assert early | {"dense/neutral/cuda/fp16"} <= {peer for *_, peer in after}
    # What takes seconds to compile waits for the targets' rows.
    compiled = [i for i, (*_, peer) in enumerate(items) if peer.startswith(("compiled", "torchao"))]
    assert compiled[0] > 1000


def test_in_the_end_every_peer_met_every_shape_and_count():
    items = gpu_items()
    peers = (
        "2:4/mma_sp/cuda/fp16",
        "2:4/neutral/cuda/fp16",
        "dense/neutral/cuda/fp16",
        "bitmap:0.05/chunked/triton/fp16",
    )
    for peer in ("cublas_fp16", "int_mm", *peers, "compiled_bf16"):
        found = {(role, tokens) for role, tokens, _, name in items if name == peer}
        assert found == {(shape.role, count) for shape in shapes.of(*shapes.ENCODERS) for count in shapes.TOKENS}, peer
    assert {activation for role, _, activation, _ in items if role == "base.ffn_in"} == {"none", "gelu"}
    assert {name for role, _, activation, name in items if role == "base.qkv" and activation == "gelu"} == set()
    sizes = {(shape.out_features, shape.in_features) for shape in shapes.of(*shapes.ENCODERS)}
    assert {(768, 768), (2304, 768), (3072, 768), (768, 3072), (4096, 1024), (1152, 384)} <= sizes and len(sizes) == 12


def test_some_models_counts_and_peers_can_be_asked_for():
    listed = sweep.jobs(CPU, models=["minilm"], tokens=[3], peers=["torch_*", "2:4/*"])
    assert {job.row["tokens"] for job in listed} == {3} and {job.row["model"] for job in listed} == {"minilm"}
    assert {job.row["peer"] for job in listed} == {
        *("torch_fp32", "torch_fp32_fused", "2:4/neutral/reference/fp32", "2:4/dense/reference/fp32")
    }
    with pytest.raises(ValueError, match="no peer matches cublas_fp61; there are 1:4/dense"):
        sweep.jobs(CPU, peers=["cublas_fp61"])
    with pytest.raises(ValueError, match="model is 'huge', expected one of base, large, minilm"):
        sweep.jobs(CPU, models=["huge"])


def test_rooflines_by_hand():
    row = {"bytes": 8_000_000, "operations": 4_000_000_000, "median_us": 20.0}
    found = sweep.roofline(row, "matmul_fp16", {"copy": 4000.0, "matmul_fp16": 800.0})
    assert found == {"bytes_us": 2.0, "operations_us": 5.0, "floor_us": 5.0, "reached": 0.25}
    found = sweep.roofline(row, "matmul_fp8", {"copy": 4000.0})
    assert found == {"bytes_us": 2.0, "operations_us": None, "floor_us": None, "reached": None}


def test_ceilings_become_rates():
    rows = list(jobs.run(ceilings.jobs(CPU, dry=True)))
    assert {row["status"] for row in rows} == {"ok"}
    names = {f"matmul_{name}" for name in ("fp16", "bf16", "int8", "fp8")}
    assert set(ceilings.of(rows)) == {"copy", *names}
    assert all(row["error"] < 1e-2 for row in rows if row["peer"] in names)
    assert {job.row["peer"] for job in ceilings.jobs(CPU)} == {"copy", "matmul_fp32"}


def timing(median: float, mad: float) -> Timing:
    return Timing(median, median, median, mad, 9, "cuda-graph")


@pytest.mark.parametrize(
    ("own_us", "dense_us", "mad_us", "status", "margin"),
    [
        (10.2, 10.0, 0.0, "ok", 0.2),  # 2 % is equal
        (10.3, 10.0, 0.0, "failed", 0.2),
        (10.29, 10.0, 0.1, "ok", 0.3),  # three deviations are
        (10.4, 10.0, 0.1, "failed", 0.3),
        (5.0, 10.0, 0.1, "ok", 0.3),
    ],
)
def test_slower_is_beyond_two_percent_and_three_deviations(own_us, dense_us, mad_us, status, margin):
    found = never_slower.verdict(timing(own_us, 1.0), timing(dense_us, mad_us))
    assert found["status"] == status and found["margin_us"] == pytest.approx(margin)
    assert found["ratio"] == own_us / dense_us and ("reason" in found) == (status == "failed")


def test_tuned_layers_are_compared_with_dense(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    listed = never_slower.jobs(CPU, formats=["2:4", "low-rank:0.25"], dry=True, budget_s=0.002)
    rows = list(jobs.run(listed))
    assert len(rows) == 2 * 2 * len(shapes.DRY_TOKENS) and {row["status"] for row in rows} == {"skipped"}
    for row in rows:
        assert row["dense_peer"] == "linear" and row["ratio"] == pytest.approx(row["median_us"] / row["dense_us"])
        assert row["layout"] in ("dense", "neutral") and row["backend"] == "reference"
    assert (tmp_path / "measurements.json").is_file()


def test_nan_is_an_infinite_error():
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.float64)) == float("inf")


def test_every_name_the_peers_use_exists_and_a_missing_one_is_found(monkeypatch: pytest.MonkeyPatch):
    assert library.missing_names() == []
    monkeypatch.setitem(library.OPERATORS, "aten::_int_mm", ("self", "mat3"))
    monkeypatch.setitem(library.OPERATORS, "aten::_no_such_mm", ("self",))
    monkeypatch.setattr(library, "ATTRIBUTES", ("torch.cuda.CUDAGrap",))
    assert library.missing_names() == [
        "aten::_int_mm: no argument named mat3",
        "aten::_no_such_mm: no such operator",
        "torch.cuda.CUDAGrap: no such name",
    ]
