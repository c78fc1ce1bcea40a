"""The model ladder: its work list, its inputs, and every rung on a toy model."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import sys
import weakref
from dataclasses import replace

import pytest
import torch

import sparsebert as sb
from sparsebert.bench import jobs as work_lists
from sparsebert.bench import timing
from sparsebert.bench.models import inputs, ladder, prepared, published, rungs, unpadded
from sparsebert.bench.models.encoders import SIZES, build, flops, repeat_
from sparsebert.bench.models.rungs import Weights, parse_rung, parse_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TOY = SIZES["toy"]
ON_GPU = (*rungs.FIRST, *rungs.MORE, *rungs.COMPILED)
KNOWN = {
    *("kind", "peer", "key", "model", "batch", "length", "lengths", "tokens", "padded_tokens", "dtype", "attention"),
    *("format", "execution", "unpadded", "flops", "status"),
}
JUDGED = {
    *(
        "layouts",
        "kernels",
        "model_bytes",
        "encoder_bytes",
        "disk_bytes",
        "error",
        "error_limit",
        "reference",
        "first_call_s",
    ),
    "matmul_precision",
}
TIMED = {
    *("median_us", "p20_us", "p80_us", "mad_us", "p95_us", "p99_us", "repeats", "mode"),
    *("sequences_per_s", "tokens_per_s", "peak_bytes", "anchor", "anchor_us"),
}


def rows_of(*names: str, lengths: tuple[int, ...] = (16,), **options) -> list[dict]:
    """The rows of these rungs on the toy model, as a machine without a GPU measures them."""
    options = {"models": ("toy",), "batches": (3,), "lengths": lengths, "budget_s": 0.001, **options}
    return list(work_lists.run(ladder.jobs("cpu", rungs=names, **options)))


# Inputs


@pytest.mark.parametrize(("kind", "mean", "length"), [("glue", 40, 128), ("squad", 180, 384)])
@pytest.mark.parametrize("batch", [1, 2, 8, 32, 128])
def test_lengths_have_the_stated_mean_and_are_the_same_again(kind, mean, length, batch):
    found = inputs.draw_lengths(kind, batch, length)
    inputs.draw_lengths.cache_clear()
    assert found == inputs.draw_lengths(kind, batch, length)
    assert len(found) == batch and min(found) >= 1 and max(found) <= length
    assert abs(statistics.fmean(found) - mean) <= 0.5
    if batch == 1:
        assert found == (mean,)
    if batch >= 8:
        assert len(set(found)) > 4 and list(found) != sorted(found)


def test_full_rows_and_a_kind_that_is_none():
    assert inputs.draw_lengths("full", 3, 7) == (7, 7, 7)
    assert statistics.fmean(inputs.draw_lengths("glue", 3, 16)) == pytest.approx(5, abs=0.5)
    with pytest.raises(ValueError, match="kind is 'gleu', expected one of full, glue, squad"):
        inputs.draw_lengths("gleu", 3, 16)


def test_a_batch_padded_and_packed():
    batch = inputs.make_batch((2, 4, 1), 4, 100, CPU)
    again = inputs.make_batch((2, 4, 1), 4, 100, CPU)
    assert torch.equal(batch.ids, again.ids)
    assert batch.real.sum(1).tolist() == [2, 4, 1]
    assert not batch.ids[~batch.real].any() and batch.ids[batch.real].all()
    mask = batch.padded(torch.float16)["attention_mask"]
    assert mask.shape == (3, 1, 4, 4) and mask.dtype == torch.float16
    assert torch.equal(mask[:, 0, 0] == 0, batch.real) and mask.min() == -math.inf
    packed = batch.packed()
    assert packed["input_ids"].tolist() == [batch.ids[batch.real].tolist()]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 2, 6, 7] and packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == 4
    assert set(inputs.make_batch((4, 4), 4, 100, CPU).padded(torch.float32)) == {"input_ids"}


# Models


def test_layers_are_equal_and_in_memory_of_their_own():
    model = repeat_(build(TOY, CPU, torch.float32), 3)
    layers = model.encoder.layer
    assert len(layers) == model.config.num_hidden_layers == 3
    for first, other in zip(layers[0].parameters(), layers[2].parameters(), strict=True):
        assert torch.equal(first, other) and first.data_ptr() != other.data_ptr()
    assert all(layer.attention.self.config is model.config for layer in layers)
    assert layers[0].output.dense.bias.abs().sum() > 0
    state = torch.get_rng_state()
    again = build(TOY, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


def test_flops_of_full_rows():
    # The linear layers have 12 h^2 weights, and each of two products of attention n^2 h of them.
    assert flops(SIZES["base"], (128,) * 8) == 12 * (2 * 1024 * 12 * 768**2 + 4 * 1024 * 128 * 768)
    assert flops(TOY, (3, 1)) == flops(TOY, (3,)) + flops(TOY, (1,))


@pytest.mark.parametrize("name", ["fp32", "2:4", "2:4@0.5", "int8/neutral", "int8-static/neutral", "mixed/neutral"])
def test_unpadded_equals_padded_and_each_sequence_alone(name):
    model = prepared.prepare(TOY, parse_weights(name), CPU).model
    batch = inputs.make_batch((5, 16, 1, 9), 16, TOY.vocabulary, CPU)
    padded = model(**batch.padded(torch.float32)).last_hidden_state[batch.real]
    alone = [model(batch.ids[i : i + 1, :n]).last_hidden_state[0] for i, n in enumerate(batch.lengths)]
    unpadded.register()
    model.set_attn_implementation(unpadded.NAME)
    packed = model(**batch.packed()).last_hidden_state
    assert packed.shape == (1, 31, TOY.hidden)
    # Where inputs are rounded to integers, one that moves by the last bit may move by a step.
    close = {"atol": 2e-3, "rtol": 0} if "int8" in name or "mixed" in name else {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(packed[0], padded, **close)
    torch.testing.assert_close(packed[0], torch.cat(alone), **close)


def test_unpadded_attention_refuses_what_it_would_get_wrong():
    q, ends = torch.zeros(1, 2, 3, 16), torch.tensor([0, 3], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "max_length_q": 3}
    with pytest.raises(ValueError, match="expected a batch of 1 row without an attention mask"):
        unpadded.unpadded_attention(torch.nn.Identity(), q, q, q, torch.zeros(1), **given)
    with pytest.raises(ValueError, match="scaling is 1.0"):
        unpadded.unpadded_attention(torch.nn.Identity(), q, q, q, None, scaling=1.0, **given)


# Names


@pytest.mark.parametrize("name", [*ON_GPU, *rungs.CPU, *rungs.CPU_COMPILED])
def test_names_say_what_a_rung_is(name):
    rung = parse_rung(name)
    assert rung.name == name and " " not in name
    assert rung.unpadded == ("unpadded" in name) and rung.fused == ("fused" in name)
    assert rung.refusal(torch.device("cuda")) is None
    needs_gpu = rung.way in ("graph", "runner") or rung.weights.name == "fp16"
    assert rung.refusal(CPU) == ("needs CUDA" if needs_gpu else None)


def test_the_parts_of_a_rung():
    rung = parse_rung("compiled_max_unpadded_int8+2:4/mma_sp")
    assert (rung.way, rung.execution, rung.unpadded) == ("compiled_max", "compiled", True)
    assert (rung.weights.format, rung.weights.layout) == ("int8+2:4", "mma_sp")
    assert parse_weights("mixed").format == ("query, key, value, attention_output 2:4; intermediate, output int8+2:4")
    assert parse_weights("fp16").format is None
    assert parse_weights("fp16").dtype(torch.device("cuda")) == torch.float16
    assert parse_weights("fp32").dtype(torch.device("cuda")) == torch.float32
    assert parse_weights("2:4").dtype(CPU) == torch.float32
    with pytest.raises(ValueError, match="begins with none of"):
        parse_rung("2:4")
    with pytest.raises(ValueError, match="is no format"):
        parse_rung("graph_fp8")


# The work list


def test_the_most_telling_come_first():
    keys = [job.key for job in ladder.jobs("cuda")]
    assert len(keys) == len(set(keys))
    # Nothing is built for a list: the GPU that it is for is not here.
    assert keys[:7] == [
        "bert-base 8x128 full graph_fp16",
        "bert-base 8x128 full eager_fp16",
        "bert-base 8x128 full fused_fp16",
        "bert-base 8x128 glue graph_fp16",
        "bert-base 8x128 glue eager_fp16",
        "bert-base 8x128 glue unpadded_fp16",
        "bert-base 8x128 glue fused_fp16",
    ]
    opening = [key.split() for key in keys[: keys.index("bert-large 8x128 full graph_fp16")]]
    assert {peer for *_, peer in opening} == set(rungs.FIRST)
    assert [cell for cell, _ in itertools.groupby(opening, key=lambda words: words[1] == "8x128")] == [True, False]
    assert {words[1] for words in opening} == {"8x128", "1x128", "32x128"}
    compiled = [key.rpartition(" ")[2] in rungs.COMPILED for key in keys]
    assert compiled == sorted(compiled) and any(compiled)
    assert not any("compiled" in job.key or "torchao" in job.key for job in ladder.jobs("cuda", compiled=False))


def test_every_row_has_its_dense_row_and_every_cell_is_there():
    listed = ladder.jobs("cuda")
    cell = ("model", "batch", "length", "lengths")
    dense = {tuple(job.row[name] for name in cell) for job in listed if job.row["peer"] == "graph_fp16"}
    assert {tuple(job.row[name] for name in cell) for job in listed} == dense
    kinds = {128: ("full", "glue"), 384: ("full", "squad")}
    assert dense == {
        (model, batch, length, kind)
        for model in ("bert-base", "bert-large")
        for batch in (1, 8, 32, 128)
        for length in (128, 384)
        for kind in kinds[length]
    }
    assert not any(parse_rung(job.row["peer"]).unpadded and job.row["lengths"] == "full" for job in listed)
    for job in listed:
        assert job.row["kind"] == "model" and job.key.split()[-1] == job.row["peer"]
        assert job.row["padded_tokens"] == (
            job.row["tokens"] if job.row["unpadded"] else job.row["batch"] * job.row["length"]
        )
        assert job.row["dtype"] == ("float32" if "fp32" in job.key else "float16")
    assert {job.row["attention"] for job in listed} == {"sdpa", "varlen_attn"}


def test_models_are_prepared_few_times():
    # Jobs of the same weights stand in a row: a list does not go back and forth between them.
    keys = [(job.row["model"], parse_rung(job.row["peer"]).weights) for job in ladder.jobs("cuda", compiled=False)]
    changes = sum(one != other for one, other in itertools.pairwise(keys))
    assert changes < len(keys) / 4


def test_names_that_are_none():
    with pytest.raises(ValueError, match="models: 'huge' is unknown, expected some of base, large, minilm, toy"):
        ladder.jobs("cpu", models=("huge",))
    with pytest.raises(ValueError, match="begins with none of"):
        ladder.jobs("cpu", rungs=("fast",))


# Every rung


def test_a_dry_run_walks_every_rung():
    rows = list(work_lists.run(ladder.jobs("cuda", models=("large",), dry=True)))
    assert {row["peer"] for row in rows} == set(ON_GPU)
    assert {row["model"] for row in rows} == {"bert-toy"}
    for row in rows:
        rung = parse_rung(row["peer"])
        if rung.weights.name == "torchao_int8" and not prepared.has_torchao():
            assert row["reason"] == "dry run: torchao is not installed"
            continue
        assert row["error"] <= row["error_limit"]
        assert 0 < row["encoder_bytes"] < row["model_bytes"]
        if rung.way in ("graph", "runner"):
            assert row["status"] == "skipped" and row["reason"].startswith("dry run: needs CUDA")
            assert set(row) == KNOWN | JUDGED | {"reason"}
        else:
            assert row["status"] == "ok" and row["mode"] == "cpu-wall"
            assert set(row) == KNOWN | JUDGED | TIMED
        assert bool(row["layouts"]) == bool(rung.weights.configs)
        # Query, key and value are one layer where they are fused.
        layers = (4 if rung.fused else 6) * TOY.layers * bool(row["layouts"])
        assert sum(row["layouts"].values()) == sum(row["kernels"].values()) == layers


def test_a_cpu_measures_real_sizes_in_float32():
    one, two = rows_of("eager_fp32", "eager_unpadded_fp32")[1:]
    assert set(one) == KNOWN | JUDGED | TIMED
    assert (one["mode"], one["dtype"], one["matmul_precision"], one["peak_bytes"]) == (
        *("cpu-wall", "float32", "highest"),
        None,
    )
    assert one["lengths"] == two["lengths"] == "glue"
    assert one["tokens"] == two["tokens"] == two["padded_tokens"] < one["padded_tokens"] == 48
    assert one["flops"] == two["flops"]
    assert two["attention"] == "sdpa, one sequence at a time"
    assert one["tokens_per_s"] == pytest.approx(one["tokens"] / one["median_us"] * 1e6)
    assert one["sequences_per_s"] == pytest.approx(3 / one["median_us"] * 1e6)
    default = {job.row["peer"] for job in ladder.jobs("cpu", models=("minilm",))}
    assert default == {*rungs.CPU, *rungs.CPU_COMPILED}


@pytest.mark.parametrize("name", ["int8", "int8-static", "int8+2:4", "mixed"])
def test_what_rounds_its_inputs_is_compared_with_what_does(name):
    full, short = rows_of(f"eager_{name}/neutral")
    assert full["reference"] == short["reference"] == "reference backend"
    assert full["layouts"] == {"neutral": 12} and full["error"] <= full["error_limit"] == 3e-2
    held, _ = rows_of(f"eager_{name}/dense")
    assert held["reference"] == "float32" and held["error_limit"] == 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", sorted({parse_rung(n).weights.name for n in ON_GPU} - {"fp32", "torchao_int8"}))
def test_half_precision_of_every_format(name, monkeypatch):
    # What a GPU computes in, which a CPU can as well.
    monkeypatch.setattr(Weights, "dtype", lambda self, device: torch.float16)
    weights = replace(parse_weights(name), layout="neutral")
    found = prepared.prepare(TOY, weights, CPU)
    batch = inputs.make_batch((5, 16, 1), 16, TOY.vocabulary, CPU)
    y = found.model(**batch.padded(torch.float16)).last_hidden_state
    assert y.dtype == found.dtype == torch.float16
    assert ladder.relative_error(y[batch.real], found.expected(batch)) <= found.limit
    assert found.limit == (3e-2 if "int8" in name or name == "mixed" else 2e-2)


@pytest.mark.parametrize("value", [3.0, math.nan])
@pytest.mark.parametrize("name", ["fp32", "2:4/neutral", "int8/neutral"])
def test_a_wrong_model_has_no_times(name, value, monkeypatch):
    make = prepared.prepare

    def one_weight_off(*arguments):
        found = make(*arguments)
        layer = found.model.encoder.layer[1].output.dense
        held = {"fp32": "weight", "2:4/neutral": "values", "int8/neutral": "scales"}[name]
        weight = getattr(layer, held).view(TOY.hidden, -1)
        with torch.no_grad():
            weight[0, 0] = value
        return found

    monkeypatch.setattr(prepared, "prepare", one_weight_off)
    for row in rows_of(f"eager_{name}"):
        assert row["status"] == "wrong"
        limit = row["error_limit"]
        assert row["reason"] == f"error {row['error']:.3g} is over the limit {limit:.3g}" and row["error"] > limit
        assert set(row) == KNOWN | JUDGED | {"reason"}


def test_what_cannot_run_is_refused_in_one_line(monkeypatch):
    for row in rows_of("graph_2:4", "unpadded_fp16", "eager_fp16", "compiled_fp16", lengths=(8,)):
        assert (row["status"], row["reason"]) == ("refused", "RuntimeError: needs CUDA")
    for row in rows_of("eager_2:4/mma_sp"):
        assert row["status"] == "refused"
        assert row["reason"].endswith("layout mma_sp: needs float16 or bfloat16, not float32")
    monkeypatch.setitem(sys.modules, "torchao", None)
    full, _ = rows_of("torchao_int8")
    assert (full["status"], full["reason"]) == (
        "refused",
        "Missing: torchao is not installed; pip install 'sparsebert[bench]' brings it",
    )
    (row, _) = rows_of("torchao_int8", dry=True)
    assert (row["status"], row["reason"]) == ("skipped", "dry run: torchao is not installed")


def test_one_model_is_held_at_a_time(monkeypatch):
    make, alive, made = prepared.prepare, weakref.WeakSet(), []

    def counted(*arguments):
        assert not alive
        found = make(*arguments)
        alive.update((found.model, found.reference))
        made.append(found.dtype)
        return found

    monkeypatch.setattr(prepared, "prepare", counted)
    names = ("eager_fp32", "eager_2:4", "eager_unpadded_2:4", "compiled_fp32", "eager_bitmap:0.05")
    rows = rows_of(*names, dry=True)
    assert {row["status"] for row in rows} == {"ok"}
    # fp32 twice: the compiled ones come last.
    assert len(made) == 4


def test_a_refusal_leaves_no_model_behind(monkeypatch):
    models = prepared.Models(CPU)
    first = models.get(TOY, parse_weights("fp32"))
    assert models.get(TOY, parse_weights("fp32")) is first
    held = weakref.ref(first.model)
    del first
    with pytest.raises(RuntimeError, match="mma_sp"):
        models.get(TOY, parse_weights("2:4/mma_sp"))
    assert held() is None
    assert models.get(TOY, parse_weights("2:4")).sizes["layouts"] == {"dense": 12}


@torch.no_grad()
def test_on_a_gpu_the_graph_is_judged_and_memory_counted(monkeypatch):
    # The branches that need a GPU, with stand-ins for what it does.
    calls = []
    monkeypatch.setattr(ladder, "_is_gpu", lambda device: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    monkeypatch.setattr(timing, "capture", lambda call, device: call)
    measure = timing.measure_together

    def as_asked(fns, *, graph, **options):
        calls.append(graph)
        return measure(fns, **options)

    monkeypatch.setattr(timing, "measure_together", as_asked)
    found = prepared.prepare(TOY, parse_weights("2:4"), CPU)
    found.foreign_bytes = 400
    batch = inputs.make_batch((5, 16), 16, TOY.vocabulary, CPU)
    for rung in (parse_rung("graph_2:4"), parse_rung("unpadded_2:4")):
        call = ladder._call(found, batch, rung, dry=False)
        assert ladder._judge(found, batch, rung, call)["error"] < 1e-6
        times = ladder._times(found, batch, rung, call, 0.001)
        assert times["peak_bytes"] == 600
    # Memory first and alone, then the times.
    assert calls == ["synchronize", "synchronize", "reset_peak_memory_stats", True, True] * 2
    # A replay that does nothing leaves what the buffer was filled with.
    monkeypatch.setattr(timing, "capture", lambda call, device: lambda: None)
    assert ladder._judge(found, batch, rung, call)["error"] == math.inf


def test_torchao_counts_what_it_holds():
    pytest.importorskip("torchao")
    found = prepared.prepare(TOY, parse_weights("torchao_int8"), CPU)
    dense = prepared.prepare(TOY, parse_weights("fp32"), CPU)
    weights = sum(m.weight.numel() for m in dense.model.encoder.modules() if isinstance(m, torch.nn.Linear))
    assert weights < found.sizes["encoder_bytes"] < 0.5 * dense.sizes["encoder_bytes"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_sizes_are_those_of_the_report():
    found = prepared.prepare(TOY, parse_weights("2:4/neutral"), CPU)
    report = sb.size_report(found.model)
    assert found.sizes["disk_bytes"] == report.model.disk and found.sizes["encoder_bytes"] == report.encoder.memory
    assert copy.copy(found.sizes["layouts"]) == {"neutral": 12}


def test_published_lines_are_marked_and_have_a_source():
    assert len(published.LINES) == 9
    for line in published.LINES:
        assert line.label.startswith("published: ") and line.source.startswith("https://")
        assert (line.milliseconds is None) != (line.samples_per_s is None)
