"""Which kernel runs and which layout is held: forced, measured, or a stated default."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from sparsebert.ops import layout_choice, layouts, measurements, select
from sparsebert.ops.devices import Device, describe
from sparsebert.ops.specs import (
    AttentionSpec,
    BitmapSpec,
    DenseSpec,
    LowRankSparseSpec,
    LowRankSpec,
    NMSpec,
)

SPEC = NMSpec(2, 4, 768, 3072)
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NAME = describe(CPU).name
COUNTS = (128, 2048, 4096)


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    monkeypatch.setenv(measurements.ENVIRONMENT_VARIABLE, str(tmp_path))
    return tmp_path / "measurements.json"


def problem(layout="neutral", **change):
    values = {
        "layout": layout,
        "device": Device("cpu"),
        "dtype": torch.float32,
        "spec": SPEC,
        "tokens": 128,
        "activation": "none",
    }
    return select.Problem(**(values | change))


def record(spec=SPEC, **times):
    """Rows for layouts at token counts: ``dense={128: 10.0}``."""
    measurements.record(
        measurements.make_row(spec, layout, tokens, torch.float32, CPU, median_us=us, mad_us=0.1, backend="reference")
        for layout, by_tokens in times.items()
        for tokens, us in by_tokens.items()
    )


def test_reference_serves_every_portable_layout():
    for layout in ("neutral", "dense"):
        assert select.choose(problem(layout)).backend == "reference"


def test_ops_with_the_same_numbers_are_not_taken_for_each_other():
    """A pattern and two factors in parts, a weight and heads: equal as tuples."""
    for equal in (
        (LowRankSpec(2, 4, 4, parts=4), NMSpec(2, 4, 4, 4)),
        (DenseSpec(64, 64), AttentionSpec(64, 64)),
    ):
        assert equal[0] == equal[1]
        for spec in equal:
            assert select.choose(problem(spec=spec)).candidate.op == spec.op
    assert set(layouts.tensors(LowRankSpec(2, 4, 4, parts=4), "neutral")) == {"u", "v"}
    assert "positions" in layouts.tensors(NMSpec(2, 4, 4, 4), "neutral")


def test_refusals_are_reasons():
    with pytest.raises(RuntimeError, match=r"layout 'cusparselt' on cpu \(torch: needs a CUDA device, not cpu\)"):
        select.choose(problem("cusparselt"))
    (candidate, reason), *_ = select.review(problem("cutlass"))
    assert candidate.backend == "torch" and reason == "needs a CUDA device, not cpu"


def test_hand_written_kernels_come_first(monkeypatch):
    monkeypatch.setattr(select, "_candidates", {})
    for backend, reason in (("reference", None), ("triton", None), ("cuda", "too small")):
        select.add_candidate(
            select.Candidate("nm_linear", "neutral", backend, backend, lambda p, reason=reason: reason, torch.add)
        )
    assert [c.backend for c in select.candidates("nm_linear", "neutral")] == ["cuda", "triton", "reference"]
    assert select.choose(problem()).backend == "triton"
    with select.backend("cuda"), pytest.raises(RuntimeError, match="no forced backend .*cuda: too small"):
        select.choose(problem())
    select._choose.cache_clear()


def test_environment_forces_a_backend():
    program = (
        "import torch, sparsebert as sb\n"
        "m = sb.nn.NMLinear(8, 4, 2, 4)\n"
        "m.load_state_dict(sb.nn.NMLinear.from_linear(torch.nn.Linear(8, 4).requires_grad_(False).apply("
        "lambda l: l.weight.zero_()), sb.NMConfig(2, 4)).state_dict())\n"
        "m(torch.zeros(1, 8))\n"
    )
    for value, code, text in (
        ("reference", 0, ""),
        ("triton", 1, "no forced backend serves"),
        ("x", 1, "'x'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "SPARSEBERT_BACKEND": value},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and text in done.stderr


@pytest.mark.parametrize(
    ("spec", "dtype", "text"),
    [
        (NMSpec(2, 4, 768, 768), torch.float16, "needs a CUDA device"),
        (NMSpec(2, 8, 768, 768), torch.float16, "needs a CUDA device"),
    ],
)
def test_sparse_tensor_core_layouts_refuse_a_cpu(spec, dtype, text):
    for name in ("cusparselt", "cutlass"):
        assert text in layouts.get("nm_linear", name).supports(spec, dtype, CPU)


@pytest.mark.parametrize(
    ("spec", "dtype", "capability", "text"),
    [
        (NMSpec(2, 8, 768, 768), torch.float16, (9, 0), "needs a 2:4 pattern, not 2:8"),
        (NMSpec(2, 4, 768, 768), torch.float32, (9, 0), "needs float16 or bfloat16, not float32"),
        (NMSpec(2, 4, 768, 768), torch.float16, (7, 5), "needs compute capability 8.0, found 7.5"),
        (NMSpec(2, 4, 776, 768), torch.float16, (9, 0), "in multiples of"),
    ],
)
def test_sparse_tensor_core_layouts_say_why(monkeypatch, spec, dtype, capability, text):
    from sparsebert.ops import torch_sparse

    monkeypatch.setattr(torch_sparse, "describe", lambda device: Device("cuda", "a GPU", capability))
    for name in ("cusparselt", "cutlass"):
        assert text in layouts.get("nm_linear", name).supports(spec, dtype, CUDA)


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        (LowRankSpec(5, 768, 768), "padded"),
        (LowRankSpec(48, 768, 768), "neutral"),
        (LowRankSparseSpec(48, "rows", 1, 1, 9, 768, 768), "grouped"),
        (LowRankSparseSpec(5, "nm", 2, 4, 0, 768, 768), "padded"),
        (LowRankSparseSpec(5, "bitmap", 1, 1, 9, 768, 768), "padded"),
        (LowRankSparseSpec(48, "nm", 2, 4, 0, 768, 768), "neutral"),
    ],
    ids=str,
)
def test_what_a_gpu_holds_low_rank_in(monkeypatch, spec, layout):
    """Triton's layouts where Triton runs, else those of torch."""
    from sparsebert.ops.triton import low_rank

    for capability, expected in (((9, 0), layout), ((7, 5), "stacked" if layout == "grouped" else "neutral")):
        gpu = Device("cuda", "a GPU", capability)
        monkeypatch.setattr(low_rank, "describe", lambda device, gpu=gpu: gpu)
        monkeypatch.setattr(measurements, "describe", lambda device, gpu=gpu: gpu)
        assert layout_choice.best(spec, torch.float16, CUDA) == (expected, "default", "not measured here")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (LowRankSpec(5, 768, 768), "needs a CUDA device, not cpu"),
        (LowRankSpec(48, 768, 768), "is the neutral layout of a rank that is a multiple of 16"),
        (LowRankSparseSpec(48, "nm", 2, 4, 0, 768, 768), "is the neutral layout of a rank that is a multiple of 16"),
        (LowRankSparseSpec(5, "rows", 1, 1, 9, 768, 768), "needs a sparse part of nm or bitmap, not rows"),
    ],
    ids=str,
)
def test_padded_says_why_not(spec, text):
    assert text in layouts.get(spec.op, "padded").supports(spec, torch.float16, CPU)


@pytest.mark.parametrize("rank", [1, 15, 16, 17])
@pytest.mark.parametrize("sparse", [None, "rows"])
def test_padded_factors_come_back_in_memory_of_their_own(rank, sparse):
    spec = LowRankSparseSpec(rank, "rows", 1, 1, 0, 40, 24) if sparse else LowRankSpec(rank, 40, 24)
    neutral = [torch.randn(24, rank), torch.randn(rank, 40)]
    neutral += [torch.empty(0, dtype=torch.int32), torch.empty(0, 40)] if sparse else []
    held = layouts.get(spec.op, "grouped" if sparse else "padded")
    weight = held.from_neutral(neutral, spec, torch.float32)
    assert weight[0].shape[1] == len(weight[1]) == {1: 16, 15: 16, 16: 16, 17: 32}[rank]
    assert not weight[0][:, rank:].any() and not weight[1][rank:].any()
    for tensor, expected in zip(held.to_neutral(weight, spec), neutral, strict=True):
        assert torch.equal(tensor, expected) and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_cutlass_layout_gives_the_weight_back():
    """torch's conversion runs on a CPU too; the neutral tensors must come back bit for bit."""
    from sparsebert.formats import nm

    for n, m in ((2, 4), (1, 4), (1, 2)):
        spec = NMSpec(n, m, 128, 64)
        dense = nm.project(torch.randn(64, 128), n, m).half()
        dense[3] = 0
        held = layouts.get("nm_linear", "cutlass")
        neutral = list(nm.pack(dense, n, m))
        weight = held.from_neutral(neutral, spec, torch.float16)
        for tensor, expected in zip(weight, held.tensors(spec).values(), strict=True):
            assert expected.shape in (None, tuple(tensor.shape))
            assert tensor.dtype == (torch.float16 if expected.dtype == layouts.COMPUTE else expected.dtype)
        assert torch.equal(held.to_dense(weight, spec, torch.float16), dense)
        assert all(torch.equal(a, b) for a, b in zip(held.to_neutral(weight, spec), neutral, strict=True))


def test_defaults_say_that_nothing_was_measured():
    choice = layout_choice.best(SPEC, torch.float32, CPU)
    assert choice == ("dense", "default", "not measured here")
    assert layout_choice.best(SPEC, torch.float32, torch.device("meta")).layout == "neutral"


def test_packed_is_held_where_it_does_not_lose():
    record(dense={128: 10.0, 2048: 100.0}, neutral={128: 8.0, 2048: 101.0})
    choice = layout_choice.best(SPEC, torch.float32, CPU)
    assert (choice.layout, choice.source) == ("neutral", "measured")
    assert choice.reason == "measured at 128, 2048 tokens: neutral takes 0.80, 1.01 of the time of dense"


def test_dense_is_held_where_packed_loses_at_any_count():
    record(dense={128: 10.0, 2048: 100.0}, neutral={128: 11.0, 2048: 50.0})
    choice = layout_choice.best(SPEC, torch.float32, CPU)
    assert (choice.layout, choice.source) == ("dense", "measured")
    assert "neutral takes 1.10, 0.50 of the time of dense" in choice.reason


def test_bitmaps_are_chunked_on_a_gpu_and_dense_where_chunks_lose(monkeypatch):
    from sparsebert.ops.triton import bitmap

    for module in (measurements, bitmap):
        monkeypatch.setattr(module, "describe", lambda device: Device("cuda", "a GPU", (9, 0)))
    spec = BitmapSpec(1000, 768, 3072)
    assert layout_choice.best(spec, torch.float32, CUDA) == ("chunked", "default", "not measured here")
    assert layout_choice.best(spec, torch.float64, CUDA).layout == "neutral"
    record(spec, dense={1: 10.0, 128: 10.0}, neutral={1: 9.0, 128: 9.0}, chunked={1: 4.0, 128: 9.0})
    choice = layout_choice.best(spec, torch.float32, CUDA)
    assert (choice.layout, choice.source) == ("chunked", "measured")
    record(spec, neutral={128: 30.0}, chunked={128: 20.0})
    choice = layout_choice.best(spec, torch.float32, CUDA)
    assert (choice.layout, choice.source) == ("dense", "measured")
    assert choice.reason == "measured at 1, 128 tokens: chunked takes 0.40, 2.00 of the time of dense"


def test_a_layout_measured_at_fewer_counts_does_not_qualify():
    record(dense={128: 10.0, 2048: 100.0}, neutral={128: 1.0})
    assert layout_choice.best(SPEC, torch.float32, CPU).layout == "dense"


def test_measurements_hold_for_their_key_alone():
    record(dense={128: 10.0}, neutral={128: 1.0})
    for spec, dtype in ((NMSpec(1, 4, 768, 3072), torch.float32), (NMSpec(2, 4, 768, 768), torch.float32)):
        assert layout_choice.best(spec, dtype, CPU).source == "default"
    assert layout_choice.best(SPEC, torch.float16, CPU).source == "default"


def test_newer_rows_replace_older_ones(table):
    record(dense={100: 10.0}, neutral={100: 9.0})
    record(neutral={128: 20.0})
    rows = json.loads(table.read_text())["rows"]
    assert {(r["layout"], r["tokens"], r["median_us"], r["source"]) for r in rows} == {
        ("dense", 128, 10.0, "measured"),
        ("neutral", 128, 20.0, "measured"),
    }
    assert layout_choice.best(SPEC, torch.float32, CPU).layout == "dense"


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """``ship(dense={128: 10.0}, device=...)`` puts rows into the table that comes with the package."""

    def write(device=None, backend="reference", configuration=None, **times):
        rows = [
            measurements.make_row(
                SPEC, layout, tokens, torch.float32, CPU, median_us=us, mad_us=0.1, backend=backend,
                configuration=configuration,
            )
            for layout, by_tokens in times.items()
            for tokens, us in by_tokens.items()
        ]  # fmt: skip
        rows = [replace(row, device=device or row.device, source=measurements.SHIPPED) for row in rows]
        file = tmp_path / "shipped.json"
        file.write_text(measurements.as_text(rows))
        monkeypatch.setattr(measurements, "SHIPPED_TABLE", file)
        select._choose.cache_clear()
        return file

    yield write
    select._choose.cache_clear()
    measurements._shipped.cache_clear()


def test_shipped_rows_decide_where_nothing_was_measured_here(ship):
    ship(dense={128: 10.0}, neutral={128: 8.0})
    choice = layout_choice.best(SPEC, torch.float32, CPU)
    assert choice == (
        "neutral",
        "measured",
        "measured (shipped) at 128 tokens: neutral takes 0.80 of the time of dense",
    )
    assert measurements.load() == [] and len(measurements.shipped()) == 2


def test_a_weight_measured_here_is_chosen_for_by_that_alone(ship):
    ship(dense={128: 10.0, 2048: 10.0}, neutral={128: 1.0, 2048: 1.0})
    record(dense={128: 10.0}, neutral={128: 20.0})
    choice = layout_choice.best(SPEC, torch.float32, CPU)
    assert choice.layout == "dense"
    assert choice.reason == "measured at 128 tokens: neutral takes 2.00 of the time of dense"
    # A kernel compares with no other table's row: at 2048 tokens nothing was measured here.
    found = {t: measurements.of(SPEC, "neutral", torch.float32, Device("cpu", NAME), t) for t in COUNTS}
    assert {t: row and (row.median_us, row.source) for t, row in found.items()} == {
        128: (20.0, "measured"),
        2048: (1.0, "measured (shipped)"),
        4096: None,
    }
    # And what is recorded later does not take the shipped rows along.
    assert len(measurements.load()) == 2


def test_shipped_rows_of_another_device_are_never_used(ship):
    ship(device="Test GPU", dense={128: 10.0}, neutral={128: 1.0})
    assert layout_choice.best(SPEC, torch.float32, CPU).source == "default"
    assert measurements.of(SPEC, "neutral", torch.float32, Device("cuda", "Other GPU"), 128) is None
    assert measurements.of(SPEC, "neutral", torch.float32, Device("cuda", "Test GPU"), 128).median_us == 1.0


def test_a_configuration_says_whether_it_was_measured_here(ship):
    class Configuration(NamedTuple):
        tile: int

    def both(problem):
        return [Configuration(1), Configuration(2)]

    candidate = select.Candidate("nm_linear", "neutral", "triton", "a kernel", lambda p: None, None, both)
    ship(backend="triton", configuration={"tile": 2}, neutral={128: 1.0})
    (row,) = measurements.shipped()
    assert select.solutions(candidate, problem(), row)[0].description == "a kernel; tile 2: measured (shipped)"
    assert select.solutions(candidate, problem())[0].description == "a kernel; tile 1: estimated"


@pytest.mark.parametrize("text", ["", '{"version": 99, "rows": []}', '{"version": 1, "rows": [{"a": 1}]}'])
def test_a_broken_shipped_table_is_an_error_that_names_the_file(ship, text):
    ship().write_text(text)
    for read in (measurements.shipped, lambda: layout_choice.best(SPEC, torch.float32, CPU)):
        with pytest.raises(ValueError, match=r"shipped\.json: not a table of measurements .* install sparsebert again"):
            read()


def test_the_shipped_table_is_read_once(ship, monkeypatch):
    ship(dense={128: 10.0})
    measurements.shipped()
    monkeypatch.setattr(measurements, "_read", None)
    assert measurements.rows_for(SPEC, torch.float32, CPU)


def test_the_table_that_is_shipped_is_read_and_holds_gpus_alone(root, monkeypatch):
    monkeypatch.setattr(measurements, "SHIPPED_TABLE", root / "sparsebert" / "ops" / "shipped.json")
    assert all(row.source == measurements.SHIPPED and row.device[:4] != "cpu " for row in measurements.shipped())


@pytest.mark.parametrize("text", ["", "{", '{"version": 99, "rows": []}', '{"version": 1, "rows": [{"a": 1}]}'])
def test_a_broken_table_is_an_error_that_names_the_file(table, text):
    table.write_text(text)
    with pytest.raises(ValueError, match=r"measurements\.json: not a table of measurements"):
        measurements.load()


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (2, 2), (3, 4), (128, 128), (129, 256)])
def test_token_buckets(tokens, bucket):
    assert measurements.token_bucket(tokens) == bucket


def test_a_call_is_judged_by_the_capability_of_its_own_device():
    """Not by the current device: machines hold GPUs of several kinds."""
    (candidate,) = select.candidates("nm_linear", "cutlass")

    def refusal(*capability):
        device = Device("cuda", "a GPU", capability)
        return candidate.supports(problem("cutlass", device=device, dtype=torch.float16))

    assert refusal(8, 6) is None
    assert "8.x, found 9.0" in refusal(9, 0)
    assert "found 7.5" in refusal(7, 5)
