"""From rows to tables, plots, pages and the table that selection ships with. All numbers here are made up."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench_rows import CPU_RECORD, IN, OUT, RECORD, linear, model, own, run_file
from sparsebert.bench import records
from sparsebert.bench.report import aims, choices, compare, page, plots, summary, tables
from sparsebert.ops import measurements

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path):
    """A program that is no module of a package."""
    found = importlib.util.spec_from_file_location(f"the_{path.stem}_program", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look for it
    found.loader.exec_module(module)
    return module


study = load(ROOT / "benchmarks" / "report.py")

CEILINGS = [
    {"kind": "ceiling", "peer": "copy", "status": "ok", "median_us": 1000.0, "gbps": 4000.0},
    {"kind": "ceiling", "peer": "matmul_fp16", "status": "ok", "median_us": 1400.0, "tflops": 800.0},
]


@dataclass(frozen=True)
class Line:
    label: str = "published: Some engine 1.0"
    model: str = "bert-base"
    hardware: str = "Other GPU"
    precision: str | None = "int8"
    batch: int | None = 8
    length: int | None = 128
    milliseconds: float | None = 0.5
    samples_per_s: float | None = None
    source: str = "https://example.com/figures"


def run(rows, record=RECORD, *, dry=False, path="run.jsonl"):
    return records.Run(Path(path), record, tuple({"dry": dry, **row} for row in rows))


def point(*rows):
    (found,) = compare.points(rows)
    return found


# Ratios


def test_the_best_dense_path_is_the_fastest_that_is_right():
    rows = [
        linear("cublas_fp16", 128, 12.0),
        linear("compiled_fp16", 128, 10.0),
        linear("suspect_fp16", 128, 1.0, status="wrong"),
        # Others are of another dtype or activation, or are no dense path at all.
        linear("cublas_bf16", 512, 5.0, dtype="bfloat16"),
        own(128, 8.0),
        own(128, 4.0, backend="triton", status="wrong"),
        own(128, 9.0, backend="triton", layout="neutral"),
        own(128, 2.0, layout="dense", backend="torch"),
    ]
    found = {(p.problem.dtype, p.tokens): p for p in compare.points(rows)}
    here = found["fp16", 128]
    assert here.dense["peer"] == "compiled_fp16"
    assert here.formats["2:4"].speed_up == pytest.approx(10 / 8)
    assert (here.formats["2:4"].text, here.formats["2:4"].row["backend"]) == ("faster", "cuda")
    assert found["bf16", 512].dense["peer"] == "cublas_bf16" and not found["bf16", 512].formats


def test_each_dtype_and_activation_has_its_own_dense_path():
    rows = [
        linear("cublas_fp16", 128, 10.0),
        linear("cublas_bf16", 128, 6.0, dtype="bfloat16"),
        linear("cublas_fp16_gelu_fused", 128, 11.0, activation="gelu"),
        own(128, 5.0),
        own(128, 3.0, weight_dtype="bfloat16", dtype="bfloat16"),
        own(128, 22.0, activation="gelu"),
        # int8 made of fp16 weights is held against fp16, a library's int8 stands beside both.
        own(128, 2.0, format="int8", dtype="int8"),
        linear("torchao_int8", 128, 4.0, group="library", dtype="int8"),
    ]
    found = {(p.problem.dtype, p.problem.activation): p for p in compare.points(rows)}
    ratios = {key: {name: o.speed_up for name, o in p.formats.items()} for key, p in found.items()}
    assert ratios == {
        ("fp16", "none"): {"2:4": 2.0, "int8": 5.0},
        ("bf16", "none"): {"2:4": 2.0},
        ("fp16", "gelu"): {"2:4": 0.5},
    }
    assert found["fp16", "none"].library["torchao_int8"].speed_up == 2.5
    assert found["bf16", "none"].library["torchao_int8"].speed_up == 1.5


@pytest.mark.parametrize(
    ("us", "mad", "verdict"),
    [
        (97.9, 0.0, "faster"),
        (98.0, 0.0, "equal"),
        (102.0, 0.0, "equal"),
        (102.1, 0.0, "slower"),
        # 3 MAD of 2 us are 6.
        (94.0, 2.0, "equal"),
        (93.9, 2.0, "faster"),
        (106.1, 2.0, "slower"),
    ],
)
def test_a_win_is_more_than_the_margin(us, mad, verdict):
    assert point(linear("cublas_fp16", 128, 100.0, mad_us=mad), own(128, us)).formats["2:4"].text == verdict


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([linear("cublas_fp16", 128, 10.0), own(128, None)], "refused"),
        ([linear("cublas_fp16", 128, 10.0), own(128, 1.0, status="wrong")], "wrong"),
        ([linear("cublas_fp16", 128, None), own(128, 5.0)], "no dense path"),
        ([linear("cublas_fp16", 128, 10.0), own(128, 5.0, mode="cuda-events")], "timed otherwise"),
    ],
)
def test_what_has_no_number_says_why(rows, text):
    outcome = point(*rows).formats["2:4"]
    assert (outcome.text, outcome.speed_up) == (text, None)


def test_parts_of_layers_compare_with_none_and_ship_nothing():
    part = linear("int8_to_int8/neutral/triton/fp16", 128, 1.0, group="own", dtype="int8 -> int8")
    found = point(linear("cublas_fp16", 128, 10.0), part, linear("old", 128, 1.0, group=None))
    assert not found.formats and not found.library and found.dense["peer"] == "cublas_fp16"
    assert shipped([part]) == []


def test_the_fastest_format_by_hand():
    rows = [linear("cublas_fp16", 128, 10.0), linear("cublas_fp16", 512, 10.0), own(128, 8.0), own(512, None)]
    rows += [own(128, 4.0, format="int8", layout="neutral", backend="triton")]
    assert tables.fastest(rows).lines == [
        ("base.ffn_in 3072 x 768", "128", "cublas_fp16", "10", "int8", "neutral, triton", "2.50x"),
        ("base.ffn_in 3072 x 768", "512", "cublas_fp16", "10", "-", "-", "-"),
    ]


def test_the_op_table_by_hand():
    rows = [
        linear("cublas_fp16", 512, 20.0),
        linear("cublas_fp16", 128, 10.0),
        linear("cusparselt_fp16", 128, 8.0, group="library"),
        linear("cusparselt_fp16", 512, 1.0, group="library", status="wrong"),
        own(128, 5.0),
        own(512, 16.0, backend="triton"),
        own(512, None, format="int8"),
        linear("cublas_fp16", 128, 9.0, role="base.ffn_in2", out_features=8),
    ]
    table = tables.ops(rows)
    assert table.titles == ("layer", "tokens", "best dense path", "us", "2:4", "int8", "cusparselt_fp16")
    assert table.lines == [
        ("base.ffn_in 3072 x 768", "128", "cublas_fp16", "10", "2.00x cuda", "-", "1.25x"),
        ("base.ffn_in 3072 x 768", "512", "cublas_fp16", "20", "1.25x triton", "refused", "wrong"),
        ("base.ffn_in2 8 x 768", "128", "cublas_fp16", "9", "-", "-", "-"),
    ]
    assert table.markdown().splitlines()[2].startswith("| base.ffn_in 3072 x 768 | 128 | cublas_fp16 | 10 | 2.00x cuda")
    assert tables.ops([]).markdown() == ""
    assert tables.Table(("a",), [("x|y",)]).markdown().splitlines()[-1] == "| x/y |"


# Break-even

COUNTS = (1, 16, 128, 512)


def sweep(*times, counts=COUNTS, **change):
    """2:4 beside a dense path of 100 us; None was not measured, a text is a status."""
    rows = [linear("cublas_fp16", tokens, 100.0) for tokens in counts]
    for tokens, us in zip(counts, times, strict=True):
        if isinstance(us, str):
            rows.append(own(tokens, 1.0, status=us, **change))
        elif us is not None:
            rows.append(own(tokens, us, **change))
    return rows


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ((50, 50, 50, 50), "from 1 up"),
        ((200, 200, 50, 50), "from 128 up"),
        ((50, 50, 50, 200), "from 1 to 128"),
        ((200, 200, 200, 50), "at 512"),
        ((200, 50, 200, 200), "at 16"),
        ((50, 200, 50, 50), "at 1, from 128 up"),
        ((50, 50, 200, 50), "from 1 to 16, at 512"),
        ((200, 100, 99, 101), "never"),
        # Equal is no win: it ends a stretch.
        ((50, 99, 50, 50), "at 1, from 128 up"),
        # A hole and a refusal do too; only the hole is an open question.
        ((50, None, 50, 50), "at 1, from 128 up (not measured at 16)"),
        ((None, 200, 200, None), "never (not measured at 1, 512)"),
        (("refused", 50, 50, 50), "from 16 up"),
        ((50, "wrong", 200, 200), "at 1"),
        (("refused",) * 4, "refused"),
    ],
)
def test_break_even_ranges(times, text):
    (entry,) = compare.break_even(compare.points(sweep(*times)))
    assert str(entry) == text


def test_a_small_ratio_is_not_shown_as_zero():
    assert [tables.ratio(value) for value in (12.345, 1.0, 0.1, 0.0456, 0.004)] == [
        "12.35",
        "1.00",
        "0.10",
        "0.046",
        "0.004",
    ]


def test_break_even_of_what_was_not_measured():
    elsewhere = [linear("cublas_fp16", 128, 100.0, out_features=8), own(128, 50.0, out_features=8, format="int8")]
    table = tables.break_even([*sweep(50, 50, 50, 50), *elsewhere])
    assert table.titles == ("layer", "counts measured", "2:4", "int8")
    assert table.lines == [
        ("base.ffn_in 8 x 768", "128 to 128", "not measured", "at 128"),
        ("base.ffn_in 3072 x 768", "1 to 512", "from 1 up", "not measured"),
    ]


# Rooflines, ladders, tuned plans


def test_the_roofline_table_by_hand():
    rows = [own(tokens, 10.0, reached=share) for tokens, share in ((1, 0.25), (16, 0.5), (128, 0.75))]
    rows += [own(512, None, reached=0.9), linear("cublas_fp16", 1, 10.0, reached=None)]
    assert tables.roofline(rows).lines == [
        ("2:4/mma_sp/cuda/fp16", "own", "3", "25 %", "50 %", "75 %", "base.ffn_in at 128 tokens")
    ]


def test_the_ladder_by_hand():
    rows = [
        model("eager_fp32", 8000.0, dtype="float32"),
        model("graph_fp16", 2000.0),
        model("torchao_int8", 1500.0, format="int8 (torchao)"),
        model("2:4", 1000.0, format="2:4", p95_us=None),
        model("int8", 9.0, format="int8", status="wrong"),
        model("graph_fp16", 3000.0, batch=1, key="b"),
    ]
    far = Line(precision=None, batch=None, length=None, milliseconds=None, samples_per_s=4000.0)
    table = tables.ladder(rows, [Line(), far, Line(model="bert-huge")])
    lines = {
        (line[1], line[2].partition(":")[0] if "published" in line[2] else line[2]): line[3:] for line in table.lines
    }
    # 8 sequences in 2 ms, 1024 tokens in 1 ms.
    assert lines["8 x 128, full", "graph_fp16"] == ("2", "4", "6", "4000", "512000", "300", "200", "best dense")
    assert lines["8 x 128, full", "2:4"] == ("1", "-", "3", "8000", "1024000", "300", "200", "2.00x")
    # The fastest rung is quantized, so it is no dense one.
    assert lines["8 x 128, full", "torchao_int8"][-1] == "1.33x"
    assert lines["8 x 128, full", "eager_fp32"][-1] == "0.25x"
    assert lines["8 x 128, full", "int8"] == ("wrong", *["-"] * 7)
    assert lines["1 x 128, full", "graph_fp16"][-1] == "best dense"
    assert lines["8 x 128", "published"] == ("0.5", *["-"] * 7)
    assert lines["not said", "published"][3:] == ("4000", *["-"] * 4)
    near, unknown = (line[2] for line in table.lines if line[2].startswith("published"))
    assert near == "published: Some engine 1.0, int8, on Other GPU, not measured here: https://example.com/figures"
    assert unknown.startswith("published: Some engine 1.0, on Other GPU, not")
    assert not any(line[0] == "bert-huge" for line in table.lines)


def checked(status, us=10.0, **change):
    row = {"kind": "never_slower", "peer": "2:4", "format": "2:4", "layout": "mma_sp", "role": "base.ffn_in"}
    row |= {"out_features": OUT, "in_features": IN, "tokens": 128, "median_us": us, "dense_us": 10.0}
    row |= {"dense_mad_us": 0.0, "dtype": "float16"}
    return {**row, "dense_peer": "cublas_fp16", "status": status, **change}


def test_layers_that_are_slower_are_listed():
    assert tables.never_slower([]) == ""
    assert tables.never_slower([checked("skipped")] * 3) == "None of 3 layers of tuned plans could be checked."
    assert tables.never_slower([checked("ok"), checked("ok")]).startswith("2 layers of tuned plans checked: none")
    text = tables.never_slower([checked("ok"), checked("failed", 12.0), checked("error", reason="x")])
    head, _, failure = text.splitlines()
    assert head.startswith("Of 2 layers of tuned plans these are slower") and head.endswith("1 could not be measured.")
    assert failure == (
        "- 2:4, base.ffn_in 3072 x 768 at 128 tokens: held as mma_sp 12 us, cublas_fp16 10 us (1.20 of its time)"
    )


def test_the_best_dense_path_of_the_run_is_what_counts():
    """The compiled linear takes 0.9 of the time of the anchor: a layer at 9.5 us is slower, where dense took 10."""
    anchor = {"anchor": "cublas_fp16", "anchor_us": 20.0}
    sweep = [linear("cublas_fp16", 128, 20.0, **anchor), linear("compiled_fp16", 128, 18.0, **anchor)]
    rows = [checked("ok", 9.5), checked("ok", 9.1), checked("ok", 9.5, tokens=512), checked("skipped")]
    slow, margin, elsewhere, skipped = compare.never_slower([*sweep, *rows])
    assert (slow["status"], slow["dense_peer"], slow["dense_us"]) == ("failed", "compiled_fp16", pytest.approx(9.0))
    # 2 % of 9 us is equal; at 512 tokens the sweep knows nothing; what was not timed stays so.
    assert margin["status"] == "ok" and elsewhere == rows[2] and skipped == rows[3]
    assert "compiled_fp16 9 us (1.06 of its time)" in tables.never_slower([*sweep, rows[0]])
    # A sweep whose best path is the anchor changes nothing.
    assert compare.never_slower([*sweep[:1], rows[0]]) == [rows[0]]


# Pages


def test_a_page_has_the_newest_run_of_each_kind_and_never_two_in_one_table():
    later = {**RECORD, "measured": "2020-02-01T00:00:00+00:00", "commit": "fedcba9876"}
    first = run([linear("cublas_fp16", 128, 10.0), own(128, 5.0), checked("ok")])
    second = run([linear("cublas_fp16", 128, 10.0), own(128, 8.0)], later)
    (device,) = page.devices([second, first])
    assert (device.label, device.slug, device.on_gpu) == ("Test GPU", "test-gpu", True)
    text = page.markdown(device)
    assert text.startswith("## Test GPU\n")
    layers, slower = text.partition("### Never slower")[::2]
    assert "1.25x cuda" in layers and "2.00x" not in layers
    assert "Measured 2020-02-01 at commit fedcba9 (torch 2.0, driver 1.2)." in layers
    assert "Measured 2020-01-02 at commit 0123456" in slower
    assert "### Models" not in text and "![" not in text


def test_neither_a_cpu_nor_a_dry_run_stands_under_the_name_of_a_gpu():
    rows = [linear("cublas_fp16", 128, 10.0), own(128, 5.0)]
    on_cpu = [{**row, "mode": "cpu-wall"} for row in rows]
    runs = [run(on_cpu, CPU_RECORD), run(rows, dry=True), run(rows)]
    devices = page.devices(runs)
    assert [device.label for device in devices] == ["Test GPU", "CPU: Test CPU (2 threads)", records.DRY_LABEL]
    assert [device.on_gpu for device in devices] == [True, False, False]
    gpu, cpu, dry = (page.markdown(device) for device in devices)
    assert page.CPU_NOTE in cpu and "Test GPU" not in cpu
    assert page.DRY_NOTE in dry and "Test GPU" not in dry
    assert page.CPU_NOTE not in gpu and page.DRY_NOTE not in gpu
    with pytest.raises(ValueError, match="rows timed on a CPU"):
        page.devices([run(on_cpu)])


def test_what_slows_the_machine_down_is_no_slower_kernel():
    """The same kernel twice, the second time on a machine at half of its speed; the anchors beside them say so."""
    slow = {"anchor": "cublas_fp16", "anchor_us": 20.0}
    rows = [
        linear("cublas_fp16", 128, 10.0, anchor="cublas_fp16", anchor_us=10.0),
        linear("compiled_fp16", 128, 9.0, anchor="cublas_fp16", anchor_us=10.0),
        own(128, 12.0, mad_us=0.3, **slow),
    ]
    (found,) = compare.points(rows)
    outcome = found.formats["2:4"]
    # 12 us beside 20 is 6 beside 10, the median of the anchor's three times.
    assert outcome.row["median_us"] == pytest.approx(6.0) and outcome.row["mad_us"] == pytest.approx(0.15)
    assert outcome.text == "faster" and outcome.speed_up == pytest.approx(1.5)
    assert found.dense["peer"] == "compiled_fp16" and found.dense["median_us"] == 9.0
    # Anchors of another dtype, or of another way of timing, are of something else.
    other = own(128, 12.0, anchor="cublas_bf16", anchor_us=20.0)
    assert [row["median_us"] for row in compare.steadied([*rows[:2], other])] == [10.0, 9.0, 12.0]
    # Whole models likewise, their tails and rates too: at 1.5 of the speed and at half of it.
    fast, slow = (
        model("eager_fp32", us, anchor="eager_fp32", anchor_us=beside)
        for us, beside in ((100.0, 100.0), (400.0, 300.0))
    )
    first, second = compare.steadied([fast, slow])
    assert (first["median_us"], second["median_us"]) == pytest.approx((200.0, 400 * 200 / 300))
    assert (first["p99_us"], first["tokens_per_s"]) == pytest.approx((600.0, fast["tokens_per_s"] / 2))


def test_the_summary_of_a_gpu_check():
    rows = [
        {"kind": "environment", "record": RECORD},
        {"kind": "step", "step": "linear", "status": "partial", "seconds": 9.0, "reason": "out of | time"},
        *CEILINGS,
        linear("cublas_fp16", 2048, 15.0, reached=0.8),
        own(2048, 10.0),
        linear("cutlass_fp16", 2048, None, group="library"),
        linear("cublas_fp16", 64, 5.0),
        linear("cusparselt_fp16", 64, 3.0, group="library"),
        own(64, 2.0),
        own(64, 1.0, layout="neutral"),
        model("graph_fp16", 1234.0),
        checked("ok"),
    ]
    text = summary.summary([{"dry": False, **row} for row in rows])
    assert text.startswith("# GPU check: Test GPU\n\ncommit 0123456789abcdef, ")
    assert "| linear | partial | 9.0 | out of / time |" in text
    assert "| matmul_fp16 | 1400 | 800 T/s |" in text and "| copy | 1000 | 4000 GB/s |" in text
    assert "| base.ffn_in 3072 x 768 | 2048 | cublas_fp16 | 15 | 1.50x cuda | refused |" in text
    assert "| cublas_fp16 | dense | 1 | 80 % | 80 % | 80 % |" in text
    # At 64 tokens the sweep is not listed; what the kernel is held against is: 3 us over 2.
    assert "| base.ffn_in 3072 x 768 | 64 |" not in text
    assert "| base.ffn_in | 64 | 1.50x | - | - | - |" in text
    assert "| base.ffn_in | 64 | - | 3.00x | - | - | - | - | - |" in text
    assert "| bert-base | 8 x 128, full | graph_fp16 | 1.23 |" in text
    assert "| cutlass_fp16 | refused | 1 | not on this GPU |" in text
    assert "1 layer of tuned plans checked: none" in text


def test_the_aims_of_the_fused_encoder_by_hand():
    alone = {"batch": 1, "length": 128}
    many = {"batch": 32, "lengths": "glue"}
    squad = {"model": "bert-large", "length": 384, "lengths": "squad"}
    rows = [
        model("compiled_fp16", 650.0, **alone),
        model("fused_fp16", 500.0, **alone),
        # The faster of two compiled ones, and of the formats.
        model("compiled_fp16", 4000.0, **many),
        model("compiled_max_fp16", 3000.0, **many),
        model("fused_fp16", 2000.0, **many),
        model("fused_int8", 1500.0, format="int8", **many),
        model("fused_int8+2:4/mma_sp", 1000.0, format="int8+2:4", **many),
        # Wrong: no number counts.
        model("fused_mixed", 10.0, format="mixed", **{**many, "status": "wrong"}),
        model("fused_fp16", 8000.0, batch=32, sequences_per_s=4000.0, **squad),
        model("fused_int8", 9000.0, batch=128, sequences_per_s=9102.0 * 1.5, **squad),
        model("graph_fp16", 9000.0, batch=128, sequences_per_s=1e6, **squad),
    ]
    assert [line[2:3] + line[4:] for line in aims.table(rows).lines] == [
        ("fused_fp16", "1.30x", "1.3x", "met"),
        ("fused_fp16", "1.50x", "2x", "missed"),
        ("fused_int8+2:4/mma_sp", "2.00x", "1.5x", "met"),
        ("fused_int8", "1.50x", "1x", "met"),
    ]
    assert not aims.table(rows[:1]).lines
    text = summary.summary([{"dry": False, **row} for row in ({"kind": "environment", "record": RECORD}, *rows)])
    assert "## The fused encoder" in text


def test_the_summary_names_no_gpu_above_other_figures():
    def head(record, **change):
        rows = [{"kind": "environment", "record": record}, linear("cublas_fp16", 128, 10.0)]
        return summary.summary([{"dry": False, **row, **change} for row in rows]).partition("\n## ")[0]

    assert head(RECORD).startswith("# GPU check: Test GPU\n")
    assert "Test GPU" not in head(RECORD, dry=True) and page.DRY_NOTE in head(RECORD, dry=True)
    assert head(CPU_RECORD).startswith("# GPU check: CPU: Test CPU (2 threads)\n") and page.CPU_NOTE in head(CPU_RECORD)
    with pytest.raises(ValueError, match="mode cpu-wall"):
        head(RECORD, mode="cpu-wall")
    assert summary.summary([{"dry": False, **linear("cublas_fp16", 1, 1.0)}]).startswith("# GPU check: device not rec")


# Plots


def test_plots_are_the_same_to_the_byte_and_white(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rows = [*sweep(50, 99, None, "refused"), *sweep(200, 50, 50, 50, format="int8"), *CEILINGS]
    rows += [model("graph_fp16", 2000.0), model("2:4", 1000.0, format="2:4")]
    found = plots.of("test-gpu", "Test GPU", rows, [Line()])
    names = ["test-gpu-speed-up", "test-gpu-break-even", "test-gpu-roofline", "test-gpu-ladder"]
    assert [plot.name for plot in found] == names
    for plot in found:
        svg, png = plots.save(plot, tmp_path / "a")
        assert b"<dc:date>" not in svg.read_bytes() and png.stat().st_size > 5000
        assert image.imread(png)[0, 0, :3].tolist() == [1, 1, 1]
    # Another dtype has figures of its own.
    more = [linear("cublas_bf16", 128, 9.0, dtype="bfloat16"), own(128, 3.0, weight_dtype="bfloat16", dtype="bfloat16")]
    names += ["test-gpu-speed-up-none-bf16", "test-gpu-break-even-none-bf16"]
    assert sorted(names) == sorted(plot.name for plot in plots.of("test-gpu", "Test GPU", [*rows, *more]))
    again = plots.of("test-gpu", "Test GPU", rows, [Line()])[0]
    svg, _ = plots.save(again, tmp_path / "b")
    assert svg.read_bytes() == (tmp_path / "a" / svg.name).read_bytes()


def test_what_has_no_numbers_is_not_drawn():
    assert plots.of("x", "X", [linear("cublas_fp16", 128, 10.0), own(128, None)]) == []
    assert [plot.name for plot in plots.of("x", "X", [*CEILINGS, linear("cublas_fp16", 128, 10.0)])] == ["x-roofline"]


def test_the_heat_map_says_each_number_and_leaves_the_rest_empty():
    pytest.importorskip("matplotlib")
    figure = plots.speed_ups(compare.points(sweep(50, 80, None, "refused")), "title")
    (panel,) = (axes for axes in figure.axes if axes.get_title() == "2:4")
    assert [text.get_text() for text in panel.texts] == ["2.00", "1.25", "refused"]
    (image,) = panel.get_images()
    assert image.get_array().mask.tolist() == [[False, False, True, True]]
    # 1.0x is in the middle of the colours.
    assert image.norm(0.0) == 0.5


# What selection ships with


def shipped(rows, record=RECORD, **change):
    return choices.measured_rows([run(rows, record, **change)])


def test_the_fastest_backend_of_each_layout_is_shipped():
    rows = [
        own(100, 7.0, layout="dense", backend="torch", configuration={}, mad_us=0.5),
        own(100, 5.0, configuration={"tile": 5}),
        own(100, 6.0, backend="triton"),
        own(100, 1.0, backend="reference", status="wrong"),
        own(100, 4.0, layout="neutral", backend="triton", mode="cuda-events"),
        linear("cublas_fp16", 100, 1.0),
    ]
    dense, packed = shipped(rows)
    size = (OUT, IN, 128, "float16")
    key = ("Test GPU", "nm_linear 2:4")
    assert dense == measurements.Row(*key, "dense", *size, 7.0, 0.5, "torch", measurements.SHIPPED, {})
    assert packed == measurements.Row(*key, "mma_sp", *size, 5.0, 0.0, "cuda", measurements.SHIPPED, {"tile": 5})


def test_rows_of_one_weight_are_of_one_run_activation_and_count():
    later = {**RECORD, "measured": "2020-02-01T00:00:00+00:00"}
    old = run([own(128, 1.0), own(128, 9.0, layout="dense"), own(128, 3.0, format="1:4")])
    new = run([own(128, 5.0)], later)
    found = choices.measured_rows([new, old])
    assert [(row.op, row.layout, row.median_us) for row in found] == [
        ("nm_linear 1:4", "mma_sp", 3.0),
        ("nm_linear 2:4", "mma_sp", 5.0),
    ]
    gelu = [own(128, 1.0, activation="gelu"), own(128, 2.0, layout="dense", activation="gelu")]
    assert [row.median_us for row in shipped([*gelu, own(128, 5.0)])] == [5.0]
    assert [row.median_us for row in shipped(gelu)] == [2.0, 1.0]
    # 100 and 128 tokens share a bucket: only times at the larger count compare.
    mixed = shipped([own(100, 1.0, layout="dense"), own(128, 9.0), own(256, 3.0)])
    assert [(row.layout, row.tokens, row.median_us) for row in mixed] == [("mma_sp", 128, 9.0), ("mma_sp", 256, 3.0)]


def test_only_gpus_give_rows_and_only_under_their_own_name():
    rows = [own(128, 5.0)]
    assert shipped(rows, CPU_RECORD) == [] == shipped(rows, dry=True)
    with pytest.raises(ValueError, match="is of Test GPU, the run of Other GPU"):
        shipped(rows, {**RECORD, "gpu": "Other GPU"})


def test_a_weight_of_fewer_columns_is_shipped_by_its_own_sizes():
    (row,) = shipped([own(128, 5.0, format="2:4@0.5", op="nm_linear 2:4", op_in_features=IN // 2)])
    assert (row.out_features, row.in_features) == (OUT, IN // 2)


def test_selection_reads_what_is_shipped(tmp_path, monkeypatch):
    import torch

    from sparsebert.ops.devices import Device
    from sparsebert.ops.specs import NMSpec

    rows = [own(128, 10.0, layout="dense"), own(128, 5.0)]
    file = tmp_path / "shipped.json"
    file.write_text(measurements.as_text(choices.measured_rows([records.read(run_file(tmp_path / "r.jsonl", rows))])))
    monkeypatch.setattr(measurements, "SHIPPED_TABLE", file)
    monkeypatch.setattr(measurements, "describe", lambda device: Device("cuda", "Test GPU"))
    found = measurements.fastest_layout(NMSpec(2, 4, IN, OUT), torch.float16, torch.device("cuda"))
    assert found == ("mma_sp", "measured (shipped) at 128 tokens: mma_sp takes 0.50 of the time of dense")


# What the repository says


@pytest.fixture
def repository(tmp_path) -> Path:
    sections = "<!-- performance -->\nold\n<!-- /performance -->\nAfter\n<!-- accuracy -->\n<!-- /accuracy -->\n"
    (tmp_path / "README.md").write_text(f"# Title\n\nBefore\n{sections}")
    (tmp_path / "sparsebert" / "ops").mkdir(parents=True)
    return tmp_path


def keep(root, rows, record=RECORD):
    return records.keep(run_file(root / "rows.jsonl", rows, record), root / study.DATA)


def test_the_repository_says_what_its_data_give(root):
    assert study.check(root) == []


def test_without_gpu_runs_no_number_is_shown(repository):
    keep(repository, [linear("cublas_fp16", 128, 10.0, mode="cpu-wall"), own(128, 5.0, mode="cpu-wall")], CPU_RECORD)
    # Studies with rows of another form are no runs.
    (repository / study.DATA / "cpu-test-cpu-2-threads" / "2020-01-02-0123456-format-speed.jsonl").write_text("{}")
    study.write(repository)
    text = (repository / "README.md").read_text()
    performance = f"<!-- performance -->\n{study.NO_FIGURES}\n<!-- /performance -->"
    accuracy = "<!-- accuracy -->\nNo accuracy study was run yet, so no figures are shown.\n<!-- /accuracy -->"
    assert text == f"# Title\n\nBefore\n{performance}\nAfter\n{accuracy}\n"
    assert not (repository / study.PAGES).exists()
    assert (repository / study.SHIPPED).read_text() == measurements.as_text([])
    assert study.check(repository) == []


def test_gpu_runs_make_the_section_its_plots_and_the_shipped_table(repository, capsys):
    pytest.importorskip("matplotlib")
    rows = [linear("cublas_fp16", 128, 10.0), own(128, 5.0), own(128, 9.0, layout="dense"), checked("ok")]
    run_file(repository / "rows.jsonl", rows)
    assert study.main(["--keep", str(repository / "rows.jsonl")], repository) == 0
    text = (repository / "README.md").read_text()
    assert text.startswith("# Title\n\nBefore\n<!-- performance -->\nMade from") and text.endswith(
        "\n<!-- /accuracy -->\n"
    )
    assert "\n<!-- /performance -->\nAfter\n<!-- accuracy -->\n" in text
    assert "### Test GPU" in text and "| base.ffn_in 3072 x 768 | 128 to 128 | at 128 |" in text
    assert "Measured 2020-01-02 at commit 0123456" in text and "2.00x cuda" not in text and "old" not in text
    assert "1 layer of tuned plans checked" in text
    images = {line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert images == {"docs/performance/test-gpu-speed-up.svg", "docs/performance/test-gpu-break-even.svg"}
    whole = (repository / study.PAGES / "test-gpu.md").read_text()
    assert whole.startswith("# Test GPU\n") and "2.00x cuda" in whole and "(test-gpu-speed-up.svg)" in whole
    names = {"test-gpu.md", *(f"test-gpu-{n}.{k}" for n in ("speed-up", "break-even") for k in ("svg", "png"))}
    assert {file.name for file in (repository / study.PAGES).iterdir()} == names
    table = (repository / study.SHIPPED).read_text()
    assert table.count('"device": "Test GPU"') == 2
    assert study.main(["--check"], repository) == 0

    # Whatever is changed by hand is found.
    (repository / "README.md").write_text(text.replace("at 128 |", "at 1 |"))
    (repository / study.SHIPPED).write_text(table.replace("5.0", "4.0"))
    (repository / study.PAGES / "test-gpu-speed-up.png").unlink()
    (repository / study.PAGES / "other-gpu.md").touch()
    capsys.readouterr()
    assert study.main(["--check"], repository) == 1
    faults = capsys.readouterr().err.splitlines()
    assert len(faults) == 4
    for end in ("speed-up.png: is not there", "other-gpu.md: comes from no run"):
        assert any(line.endswith(end) for line in faults)
    study.write(repository)
    assert study.check(repository) == [] and (repository / "README.md").read_text() == text


def test_a_run_out_of_place_and_a_dry_run_are_refused(repository, capsys):
    file = keep(repository, [own(128, 5.0)])
    other = file.parent.parent / "other-gpu"
    file.parent.rename(other)
    with pytest.raises(ValueError, match="by its record it belongs to .*test-gpu"):
        study.check(repository)
    run_file(repository / "dry.jsonl", [own(128, 5.0)], dry=True)
    assert study.main(["--keep", str(repository / "dry.jsonl")], repository) == 1
    assert "is a dry run" in capsys.readouterr().err


def test_a_readme_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="once each"):
        study.with_section("no marks", "performance", "text")
