"""The accuracy study's rows, claims, tables, plots and pages. All numbers here are made up."""

from __future__ import annotations

import doctest
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import report  # noqa: E402
from bench_rows import CPU_RECORD  # noqa: E402
from sparsebert.bench.report import plots as drawing  # noqa: E402
from study import claims, page, plots, statistics, tables  # noqa: E402
from study import rows as study_rows  # noqa: E402
from study.arms import ARMS, BUDGETS, FINE_TUNED  # noqa: E402
from study.rows import Study, read, studies  # noqa: E402

FULL = 1000
RATES = (3e-5, 1e-4, 3e-4)
TASKS = ("CoLA", "MRPC")
NOISE = (0.0, 0.002, -0.002)


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    """Whatever grid the budget has by now."""
    monkeypatch.setitem(BUDGETS, "short", replace(BUDGETS["short"], rates=RATES))


def row(arm="seven", metric=0.5, *, task="CoLA", sparsity=50, seed=0, lr=1e-4, **change):
    """A row of the study: a 2:4 or bitmap model whose dev and held-out metrics are alike."""
    found = {"kind": "accuracy", "environment": "e", "budget": "short", "task": task, "arm": arm}
    found |= {"sparsity": sparsity, "seed": seed, "lr": lr, "metric": "matthews", "holdout": metric, "one_class": False}
    found |= {"dev": {"matthews": metric, "accuracy": 0.9}, "format": None, "trace": [], "int8": None, "probes": None}
    sizes = {"dense_bytes": FULL, "disk_bytes": FULL * (100 - sparsity) // 100}
    found |= {"bytes": {"encoder": sizes}, "at_start": None, "before_projection": None, "budget_steps": 800}
    if sparsity and arm in ARMS:
        found["format"] = ARMS[arm].parts[-1].target(sparsity)
    found |= change
    return {"key": " ".join(str(found[name]) for name in ("task", "arm", "sparsity", "seed", "lr")), **found}


def latency(format="2:4", ratio=1.5, batch=8, length=64):
    return {"kind": "latency", "environment": "e", "format": format, "batch": batch, "length": length, "ratio": ratio}


def lines(*rows):
    every = [{"kind": "environment", "environment": "e", "record": CPU_RECORD}, *rows]
    return "".join(json.dumps(one) + "\n" for one in every)


def study(*rows):
    of = {kind: tuple(one for one in rows if one["kind"] == kind) for kind in ("accuracy", "latency")}
    return Study("short", {"e": CPU_RECORD}, of["accuracy"], of["latency"])


def runs(arm, metric, *, tasks=TASKS, sparsities=(50,), noise=NOISE, **change):
    """A row for each task, sparsity and seed; ``noise`` has what each seed adds to the metric."""
    every = itertools.product(tasks, sparsities, enumerate(noise))
    return [row(arm, metric + n, task=t, sparsity=s, seed=seed, **change) for t, s, (seed, n) in every]


def verdict(name, *rows):
    (found,) = (one for one in claims.verdicts(study(*rows)) if one.id == name)
    return found


def target(name, *rows):
    (found,) = (one for one in claims.targets(study(*rows)) if one.id == name)
    return found


# Which rows count


def test_the_rate_is_chosen_on_held_out_rows_of_the_first_seed():
    found = study(
        row(lr=3e-5, metric=0.4, holdout=0.7),
        row(lr=1e-4, metric=0.9, holdout=0.6),
        # The best of all, but not on the first seed.
        row(lr=1e-4, metric=0.9, holdout=0.9, seed=1),
        row(lr=3e-5, metric=0.3, holdout=0.1, seed=1),
        row(lr=3e-4, metric=0.8, holdout=0.8, seed=2),
    )
    assert found.selected_rate("CoLA", "seven", 50) == 3e-5
    assert {seed: one["dev"]["matthews"] for seed, one in found.of("CoLA", "seven", 50).items()} == {0: 0.4, 1: 0.3}
    assert {lr: one["holdout"] for lr, one in found.grid("CoLA", "seven", 50).items()} == {3e-5: 0.7, 1e-4: 0.6}
    # Nothing is chosen before the first seed was run.
    later = study(row("gradual", seed=0), row(seed=1))
    assert later.selected_rate("CoLA", "seven", 50) is None and later.of("CoLA", "seven", 50) == {}


def test_of_equal_rates_the_smaller_is_chosen():
    found = study(*(row(lr=lr, metric=0.5) for lr in (3e-4, 1e-4)))
    assert found.selected_rate("CoLA", "seven", 50) == 1e-4


def test_what_has_no_rate_of_its_own_counts_as_it_was_run_last():
    found = study(
        row("seven-signed", 0.9, lr=1e-4, holdout=0.9),
        row("seven-signed", 0.2, lr=3e-5, holdout=0.2),
        row("one-shot", 0.1, lr=None),
        row(FINE_TUNED, 0.6, sparsity=0, lr=3e-5),
    )
    assert found.of("CoLA", "seven-signed", 50)[0]["lr"] == found.selected_rate("CoLA", "seven-signed", 50) == 3e-5
    assert found.of("CoLA", "one-shot", 50)[0]["dev"]["matthews"] == 0.1
    assert found.of("CoLA", FINE_TUNED, 0)[0]["dev"]["matthews"] == 0.6
    assert not found.grid("CoLA", "seven-signed", 50) and not found.grid("CoLA", "one-shot", 50)


def test_the_best_arm_is_that_of_held_out_rows_and_not_of_the_dev_set():
    rows = [row("dense", 0.9, sparsity=0, holdout=0.6), row("dense-pretrained", 0.2, sparsity=0, holdout=0.7)]
    assert study(*rows).best("CoLA", ("dense", "dense-pretrained"), 0) == "dense-pretrained"
    assert study(*rows).best("CoLA", ("admm",), 50) is None


def test_a_later_line_of_the_same_key_counts(tmp_path):
    (tmp_path / "short.jsonl").write_text(
        lines(row(metric=0.1), row("snip"), latency(ratio=2.0), row(metric=0.3), latency())
    )
    (found,) = studies(tmp_path)
    assert [one["arm"] for one in found.accuracy] == ["snip", "seven"] and found.accuracy[1]["holdout"] == 0.3
    assert [one["ratio"] for one in found.latency] == [1.5]
    assert found.environments == {"e": CPU_RECORD}


def test_files_without_an_arm_are_no_study(tmp_path):
    assert studies(tmp_path / "nowhere") == []
    (tmp_path / "short.jsonl").write_text(lines(latency()))
    assert studies(tmp_path) == []
    (tmp_path / "long.jsonl").touch()
    with pytest.raises(ValueError, match=r"long.jsonl: is of no budget, expected short.jsonl or full.jsonl"):
        studies(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no row"),
        (json.dumps({"kind": "accuracy"}), "is no row"),
        (json.dumps({**row(), "kind": "speed"}), "is no row, which has an environment and a kind: environment, acc"),
        (json.dumps({"kind": "environment", "environment": "f"}), "record is None, expected dict"),
        (json.dumps({**row(), "environment": "f"}), "is of environment f, expected e"),
        (json.dumps({**row(), "budget": "full"}), "budget is 'full', expected 'short' as the file is named"),
        (json.dumps({**row(), "arm": "magic"}), "arm is 'magic', expected fine-tuned or one of dense"),
        (json.dumps({**row(), "seed": True}), "seed is True, expected int"),
        (json.dumps({**row(), "sparsity": "50"}), "sparsity is '50', expected int"),
        (json.dumps({**row(), "dev": {"f1": 0.5}}), "dev.matthews is None, expected int or float"),
        (json.dumps({**row(), "holdout": "0.5"}), "holdout is '0.5', expected int or float"),
        (json.dumps({**row(), "holdout": float("nan")}), "is no JSON"),
        (json.dumps({**row(), "bytes": 7}), "bytes.encoder.dense_bytes leads into a int, expected an object"),
        (json.dumps({**row(), "trace": [1]}), "an entry of trace is 1, expected dict"),
        (json.dumps({**row(), "int8": {"dev": {}}}), "int8.dev.matthews is None"),
        (json.dumps({**latency(), "ratio": None}), "ratio is None, expected int or float"),
    ],
)
def test_what_is_no_row_is_refused_with_file_and_line(tmp_path, line, message):
    file = tmp_path / "short.jsonl"
    file.write_text(lines(row()) + line + "\n")
    with pytest.raises(ValueError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}, line 3: ") and message in str(error.value)


# Statistics


def test_means_and_intervals_by_hand():
    assert statistics.mean([1.0, 2.0, 6.0]) == 3.0
    assert statistics.sd([1.0, 2.0, 6.0]) == pytest.approx(7**0.5) and statistics.sd([1.0]) is None
    found = statistics.paired({0: 3.0, 1: 5.0, 2: 10.0, 7: 99.0}, {0: 2.0, 1: 3.0, 2: 4.0, 8: 0.0})
    # The differences are those three; t of two degrees of freedom is 4.3027 in every table.
    reach = 4.3027 * (7 / 3) ** 0.5
    assert found.n == 3 and found.mean == 3.0
    assert (found.low, found.high) == (pytest.approx(3 - reach, abs=1e-3), pytest.approx(3 + reach, abs=1e-3))
    assert statistics.paired({0: 1.0}, {0: 0.25}) == (0.75, None, None, 1)
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None
    # 0.3 - 0.1 is a little less in floats, and what is nothing must not count as above it.
    assert statistics.differences({0: 0.3, 1: 0.5}, {0: 0.1}) == {0: 0.2}


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (30, 2.0423), (120, 1.9799)]
)
def test_quantiles_are_those_of_the_tables(df, t):
    assert statistics.quantile(df) == pytest.approx(t, abs=1e-4)


def test_quantiles_are_those_of_scipy():
    distribution = pytest.importorskip("scipy.stats").t
    for df in (*range(1, 40), 100, 1001):
        for level in (0.5, 0.95, 0.999):
            assert statistics.quantile(df, level) == pytest.approx(distribution.ppf((1 + level) / 2, df), rel=1e-9)


# Claims

# What is claimed, from the best arm to the worst, and at which sparsities.
ORDERS = {
    "A1": (("admm", "magnitude"), (50, 75)),
    "A3": (("admm-srste", "admm"), (50, 75)),
    "L4": (("lpaf", "lpaf-plain"), (50, 75)),
    "LS1": (("losparse", "losparse-rows", "svd"), (50, 75)),
    "LS2": (("losparse", "losparse-random", "losparse-random-residual"), (75,)),
    "S1": (("seven", "taylor", "platon"), (50, 75)),
    "S2": (("seven", "movement"), (90,)),
    "S3": (("seven", "seven-summed"), (50, 75)),
    "S4": (("seven-signed", "seven"), (50, 75)),
    "SB1": (("knowledge", "gradual", "magnitude-bitmap"), (75, 95)),
    "SB2": (("knowledge", "knowledge-finetuned"), (75, 95)),
    "SB3": (("knowledge", "one-layer"), (95,)),
    "SB4": (("knowledge", "knowledge-no-hidden", "knowledge-no-attention", "knowledge-no-logits"), (75, 95)),
}


def ranked(name, step, noise=NOISE):
    """Rows of a claim's arms, each ``step`` below the one before; seeds differ alike for all but the first arm."""
    arms, sparsities = ORDERS[name]
    found = []
    for i, arm in enumerate(arms):
        of = runs(arm, 0.6 - i * step, sparsities=sparsities, noise=NOISE if i else noise)
        found += [{**one, "at_start": one["holdout"] - 0.1} for one in of]
    return found


@pytest.mark.parametrize("name", ORDERS)
def test_a_claim_is_judged_by_its_pairs(name):
    assert verdict(name, *ranked(name, 0.05)).outcome == "supported"
    assert verdict(name, *ranked(name, -0.05)).outcome == "refuted"
    # Seeds disagree: the interval has 0 in it.
    assert verdict(name, *ranked(name, 0.01, noise=(0.2, -0.2, 0.0))).outcome == "undecided"
    # A single pair has no interval.
    one = [found for found in ranked(name, 0.05, noise=(0.0,)) if found["task"] == "CoLA" and found["seed"] == 0]
    one = [found for found in one if found["sparsity"] == ORDERS[name][1][0]]
    assert verdict(name, *one).outcome == "undecided"
    alone = [found for found in ranked(name, 0.05) if found["arm"] == ORDERS[name][0][0]]
    missing = verdict(name, *alone)
    assert missing.outcome == "not measured" and "not measured" in missing.figures


def test_every_claim_is_judged_somewhere_here():
    assert {claim.id for claim in claims.CLAIMS} == {*ORDERS, "A2", "L1", "L2", "L3", "LS3"}
    known = {FINE_TUNED, *ARMS}
    assert all(set(part.arms) <= known for claim in claims.CLAIMS for part in claim.parts)
    empty = claims.verdicts(study())
    assert {found.outcome for found in empty} == {"not measured"}
    assert {found.outcome for found in claims.targets(study())} == {"not measured"}


def test_one_refuted_comparison_refutes_and_one_not_measured_leaves_undecided():
    rows = [*runs("seven", 0.5), *runs("taylor", 0.4)]
    assert verdict("S1", *rows).outcome == "undecided"
    assert verdict("S1", *rows, *runs("platon", 0.6)).outcome == "refuted"
    assert verdict("S1", *rows, *runs("platon", 0.45)).outcome == "supported"


def test_three_quarters_of_the_tasks_have_to_agree():
    tasks = ("a", "b", "c", "d")

    def judged(*below):
        rows = [one for task in tasks for one in runs("seven", 0.5, tasks=(task,))]
        for task in tasks:
            # A little worse on some tasks, and so much better on the others that the mean is clear.
            rows += runs("seven-summed", 0.501 if task in below else 0.45, tasks=(task,))
        return verdict("S3", *rows)

    assert judged("a").outcome == "supported" and "above 0 on 3 of 4 tasks" in judged("a").figures
    assert judged("a", "b").outcome == "undecided"


def test_the_figures_say_points_pairs_interval_and_what_collapsed():
    rows = [*runs("admm", 0.60, noise=(0.0, 0.0)), *runs("magnitude", 0.58, noise=(0.0, 0.002))]
    rows[0]["one_class"] = True
    found = verdict("A1", *rows)
    # Differences of 2.0 and 1.8 points, each twice: sd 0.1155, and 3.1824 of that over 2.
    assert "admm - magnitude: +1.90 [1.72, 2.08], 4 pairs, above 0 on 2 of 2 tasks: supported" in found.figures
    assert found.figures.endswith("(one class: 1 and 0 runs)")
    assert found.command == (
        "python benchmarks/accuracy.py run --data GLUE --arms admm,magnitude --tasks CoLA,MRPC --seeds 0,1 "
        "--rows again/short.jsonl"
    )
    # In order: rates are chosen on the first.
    assert "--seeds 2,10 " in verdict("A1", row(seed=10), row(seed=2)).command
    # With the arm that the rate comes from.
    assert "--arms seven,seven-summed" in verdict("S3", *rows).command
    assert "--arms gradual,gradual-ranks,movement,movement-ranks" in verdict("L1", *rows).command


def admm_trace(*parts):
    """``out_of_pattern`` at the end of each round, seen twice as between two rounds."""
    return [{"step": i, "round": i // 2, "out_of_pattern": parts[i // 2], "primal": 0.1} for i in range(2 * len(parts))]


def admm_rows(trace, lost, one_shot=0.4):
    return [
        *runs("admm", 0.5, trace=trace),
        *(
            {**one, "before_projection": one["dev"]["matthews"] + lost, "dev": {"matthews": one["dev"]["matthews"]}}
            for one in runs("admm-pull", 0.5)
        ),
        *runs("one-shot", one_shot, lr=None),
        *runs(FINE_TUNED, 0.6, sparsities=(0,)),
    ]


def test_admm_has_to_fall_every_round_and_to_lose_little_at_the_end():
    falling = admm_trace(0.3, 0.2, 0.1)
    found = verdict("A2", *admm_rows(falling, 0.05))
    assert found.outcome == "supported"
    assert "falls in 12 of 12 steps from round to round of 6 runs" in found.figures
    assert "loses 5.00 points, one-shot pruning 20.00, 6 runs" in found.figures
    # A third of 20 points is 6.67.
    assert verdict("A2", *admm_rows(falling, 0.07)).outcome == "refuted"
    assert verdict("A2", *admm_rows(admm_trace(0.3, 0.2, 0.2), 0.05)).outcome == "refuted"
    # Pruning alone loses nothing, or one half is missing.
    assert verdict("A2", *admm_rows(falling, 0.05, one_shot=0.7)).outcome == "undecided"
    assert verdict("A2", *runs("admm", 0.5, trace=falling)).outcome == "undecided"
    assert verdict("A2", *runs("admm", 0.5)).outcome == "not measured"


def test_srste_says_how_much_of_the_mask_flips():
    trace = [{"step": 0, "sparsity": 0.5}, {"step": 1, "flipped": 0.02}, {"step": 2, "flipped": 0.04}]
    rows = [*runs("admm-srste", 0.5, trace=trace), *runs("admm", 0.5)]
    assert "of the mask 3 % flips" in verdict("A3", *rows).figures


def probes(rank, shuffled=None, lost=0.1, metric=0.5, **change):
    spectra = {name: rank for name in (*tables.RANKS, "empty_rows", "empty_columns")} | {"layers": 6} | change
    control = spectra | dict.fromkeys(tables.RANKS, rank if shuffled is None else shuffled)
    return {"spectra": spectra, "shuffled": control, "truncated": {"0.5": metric - lost, "0.25": metric - 2 * lost}}


def probed(arm, rank, shuffled=None, lost=0.1, sparsities=(80, 90, 95), **change):
    every = itertools.product(TASKS, sparsities, enumerate(NOISE))
    return [
        row(arm, task=t, sparsity=s, seed=seed, probes=probes(rank + n, shuffled and shuffled - n, lost + n, **change))
        for t, s, (seed, n) in every
    ]


def test_ranks_are_lower_only_if_stable_effective_and_rank_90_are():
    gradual, movement = probed("gradual-ranks", 0.8), probed("movement-ranks", 0.6)
    assert verdict("L1", *gradual, *movement).outcome == "supported"
    assert verdict("L1", *gradual, *probed("movement-ranks", 0.9)).outcome == "refuted"
    # Both differ alike from seed to seed; a difference without spread is one that is nothing.
    assert verdict("L1", *gradual, *probed("movement-ranks", 0.8)).outcome == "undecided"
    assert verdict("L1", *movement).outcome == "not measured"
    # The numerical rank is shown and does not count.
    found = verdict("L1", *gradual, *probed("movement-ranks", 0.6, numerical_rank=1.0))
    assert found.outcome == "supported"
    assert "in numerical rank: -20.00" in found.figures and "in stable rank: +20.00" in found.figures
    assert verdict("L1", *gradual, *probed("movement-ranks", 0.6, rank_90=1.0)).outcome == "refuted"


def test_the_rank_is_more_than_empty_rows_where_shuffling_raises_it():
    found = verdict("L2", *probed("movement-ranks", 0.5, shuffled=0.7), *probed("gradual-ranks", 0.8))
    assert found.outcome == "supported" and "as trained -30.00" in found.figures and "shuffled -10.0" in found.figures
    assert verdict("L2", *probed("movement-ranks", 0.5, shuffled=0.4)).outcome == "refuted"
    assert verdict("L2", *probed("movement-ranks", 0.5)).outcome == "undecided"
    assert verdict("L2", *probed("gradual-ranks", 0.5, shuffled=0.7)).outcome == "not measured"


def test_truncation_is_held_against_gradual_and_dense():
    def judged(movement, gradual, dense):
        rows = [*probed("movement-ranks", 0.5, lost=movement), *probed("gradual-ranks", 0.5, lost=gradual)]
        return verdict("L3", *rows, *probed("dense", 1.0, lost=dense, sparsities=(0,)))

    found = judged(0.1, 0.2, 0.3)
    assert found.outcome == "supported" and found.figures.count("supported") == 4
    # Each pair has the dense model of its task and seed beside it: 3 sparsities, 2 tasks and 3 seeds.
    assert "dense - movement-ranks in what truncation to 0.5 loses: +20.00 [20.00, 20.00], 18 pairs" in found.figures
    assert judged(0.1, 0.2, 0.05).outcome == judged(0.2, 0.1, 0.3).outcome == "refuted"
    assert judged(0.1, 0.1, 0.2).outcome == "undecided"
    assert verdict("L3", *probed("movement-ranks", 0.5)).outcome == "not measured"


def test_lpaf_has_to_begin_better_too():
    def judged(lpaf, plain):
        return verdict("L4", *runs("lpaf", 0.5, at_start=lpaf), *runs("lpaf-plain", 0.4, at_start=plain)).outcome

    assert judged(0.3, 0.2) == "supported"
    assert judged(0.2, 0.3) == "refuted"
    assert judged(0.3, None) == "undecided"


@pytest.mark.parametrize(
    ("gaps", "outcome"),
    [((0.01, 0.05, 0.2), "supported"), ((0.2, 0.05, 0.01), "refuted"), ((0.1, 0.9, 0.1), "undecided")],
)
def test_the_gap_of_the_low_rank_part_is_that_of_the_outer_sparsities(gaps, outcome):
    rows = []
    for sparsity, gap in zip((50, 75, 90), gaps, strict=True):
        noise = (0.0, 0.004, -0.004) if sparsity == 90 else NOISE
        rows += [*runs("losparse", 0.5 + gap, sparsities=(sparsity,), noise=noise)]
        rows += [*runs("losparse-rows", 0.5, sparsities=(sparsity,), noise=NOISE)]
    found = verdict("LS3", *rows)
    assert found.outcome == outcome and "6 pairs" in found.figures
    assert verdict("LS3", *(one for one in rows if one["sparsity"] == 50)).outcome == "not measured"


# Targets


def test_the_2_4_target_is_that_of_the_arms_that_held_out_rows_choose():
    dense = runs("dense", 0.6, sparsities=(0,))
    # On held-out rows the distilled one is better, on the dev set worse.
    worse = [{**one, "holdout": 0.9} for one in runs("admm+kd", 0.58)]
    rows = [*dense, *runs("admm", 0.599), *worse]
    assert target("T1", *rows).outcome == "missed" and "admm+kd on CoLA" in target("T1", *rows).figures
    assert target("T1", *dense, *runs("admm", 0.595)).outcome == "reached"
    assert target("T1", *runs("admm", 0.595)).outcome == "not measured"
    # Dense is what is better on held-out rows, whichever way it was trained.
    other = runs("dense-pretrained", 0.61, sparsities=(0,))
    assert target("T1", *dense, *other, *runs("admm", 0.595)).outcome == "missed"


def test_the_5_per_cent_target_needs_both_tasks():
    def rows(sst2, mrpc):
        found = [one for t in ("SST-2", "MRPC") for one in runs("dense", 0.9, tasks=(t,), sparsities=(0,))]
        found += runs("knowledge", sst2, tasks=("SST-2",), sparsities=(95,))
        return found + (runs("knowledge", mrpc, tasks=("MRPC",), sparsities=(95,)) if mrpc else [])

    assert target("T2", *rows(0.88, 0.9)).outcome == "reached"
    assert target("T2", *rows(0.88, 0.87)).outcome == target("T2", *rows(0.87, None)).outcome == "missed"
    assert target("T2", *rows(0.88, None)).outcome == "not measured"


def test_targets_of_methods_beside_their_baselines():
    svd = runs("svd", 0.5, sparsities=(50, 75))
    both = [runs(name, 0.53, sparsities=(50, 75)) for name in ("losparse", "lpaf")]
    assert target("T3", *svd, *both[0], *both[1]).outcome == "reached"
    assert target("T3", *svd, *both[0]).outcome == "not measured"
    assert target("T3", *svd, *both[0], *runs("lpaf", 0.51)).outcome == "missed"
    gradual = runs("gradual", 0.5, sparsities=(75,))
    outcomes = [target("T4", *gradual, *runs("seven", x, sparsities=(75,))).outcome for x in (0.51, 0.5, 0.49)]
    assert outcomes == ["reached", "missed", "missed"]


# Tables


def cells(table, *names):
    """Those columns of every line."""
    return [tuple(line[table.titles.index(name)] for name in names) for line in table.lines]


def whole():
    """A study with something in every table and plot."""
    found = [*runs(FINE_TUNED, 0.58, sparsities=(0,)), *runs("dense", 0.6, sparsities=(0,))]
    found += runs("one-shot", 0.2, sparsities=(50, 75), lr=None)
    for arm in ("magnitude", "admm"):
        found += runs(arm, 0.5, sparsities=(50, 75))
    for one in found[-12:]:
        # ADMM is above magnitude by 2 points and 1 point, in turns.
        one["dev"]["matthews"] += 0.02 - 0.01 * (one["seed"] % 2)
        sizes = {"encoder": {"dense_bytes": FULL, "disk_bytes": 150}}
        one["int8"] = {"dev": {"matthews": one["dev"]["matthews"] - 0.01}, "bytes": sizes}
    found += [row("admm", 0.4, task=task, lr=lr, holdout=0.1) for task in TASKS for lr in (3e-5, 3e-4)]
    found += [*runs("knowledge", 0.3, sparsities=(95,)), *runs("one-layer", 0.35, sparsities=(95,), format="dense")]
    found += [
        *runs("seven", 0.5),
        *runs("seven-signed", 0.51),
        *runs("admm+kd", 0.53),
        *runs("svd", 0.0, one_class=True),
    ]
    found += [*probed("gradual-ranks", 0.8), *probed("movement-ranks", 0.6, shuffled=0.7)]
    return [
        *found,
        latency(),
        latency("bitmap:0.5", 0.98),
        latency("2:4", 1.1, batch=1, length=32),
        latency("int8+2:4", 1.3),
    ]


def test_the_main_table_has_every_arm_with_what_it_is_held_against():
    table = tables.main(study(*whole()), "CoLA")
    found = {(line[0], line[3]): dict(zip(table.titles, line, strict=True)) for line in table.lines}
    admm = found["admm", "50 %"]
    assert admm["teacher"] == "-" and admm["format"] == "2:4" and admm["seeds"] == "3"
    assert (admm["Matthews correlation"], admm["sd"]) == ("51.7", "0.4")
    # 2, 1 and 2 points: their mean is 1.67, their sd 0.577, and 4.3027 of that over the root of 3 is 1.43.
    assert (admm["baseline"], admm["over baseline"]) == ("magnitude", "+1.67 [0.23, 3.10]")
    assert admm["over dense"].startswith("-8.33 [") and admm["encoder on disk"] == "50.0 %"
    assert (admm["time at 1 x 32"], admm["time at 8 x 64"]) == ("1.10", "1.50")
    assert found["admm (1 of 3 rates)", "75 %"]["time at 8 x 64"] == "-"
    assert found["admm+kd (1 of 3 rates)", "50 %"]["teacher"] == "added by us"
    assert found["knowledge (1 of 3 rates)", "95 %"]["teacher"] == "the paper's"
    # Of another baseline, which was not run.
    assert found["admm+kd (1 of 3 rates)", "50 %"]["over baseline"] == "-"
    assert found["svd (1 of 3 rates)", "50 %"]["Matthews correlation"] == "0.0 (one class)"
    assert found["dense (1 of 3 rates)", "0 %"]["over dense"] == "-"
    assert found["dense (1 of 3 rates)", "0 %"]["time at 8 x 64"] == "1.00"
    # By sparsity, the best first.
    order = [(int(line[3].split()[0]), -float(line[4].split()[0])) for line in table.lines]
    assert order == sorted(order) and len(table.lines) == len(found) == 20


def test_the_student_of_one_layer_is_smaller_and_was_not_timed():
    sizes = {"encoder": {"dense_bytes": FULL, "disk_bytes": 170}}
    table = tables.main(study(row("one-layer", sparsity=95, format="dense", bytes=sizes), latency("dense")), "CoLA")
    assert cells(table, "encoder on disk", "time at 8 x 64") == [("17.0 %", "-")]


def test_pairs_are_counted_where_they_are_fewer_than_seeds():
    table = tables.main(study(*runs("admm", 0.5, tasks=("CoLA",)), row("magnitude", 0.4)), "CoLA")
    assert cells(table, "over baseline")[0] == ("+10.00 (1 pair)",)
    table = tables.main(study(row("admm", 0.5, one_class=True), row("admm", 0.5, seed=1)), "CoLA")
    assert table.lines[0][4] == "50.0 (one class: 1 of 2)"


def test_readme_shows_no_ablations():
    table = tables.brief(study(*whole()), "CoLA")
    names = {line[0].partition(" (")[0] for line in table.lines}
    shown = {FINE_TUNED, "dense", "one-shot", "magnitude", "admm", "admm+kd", "knowledge", "one-layer", "seven", "svd"}
    assert names == shown
    found = {line[:2]: line[2:] for line in table.lines}
    assert found["admm", "50 %"][:2] == ("51.7 ± 0.4 (3)", "magnitude")


def test_rates_are_listed_with_the_chosen_one_bold():
    table = tables.rates(study(*whole()), "CoLA")
    found = {line[:2]: line[2:] for line in table.lines}
    assert table.titles[2:] == ("3e-05", "0.0001", "0.0003")
    assert found["admm", "50 %"] == ("10.0", "**50.0**", "10.0")
    assert found["seven", "50 %"] == ("-", "**50.0**", "-")
    assert ("seven-signed", "50 %") not in found and ("one-shot", "50 %") not in found


def test_spectra_and_truncation_have_their_controls():
    found = study(*whole())
    spectra = tables.spectra(found, "CoLA")
    assert cells(spectra, "arm", "sparsity", "weights", "seeds", "stable rank")[:4] == [
        ("gradual-ranks", "80 %", "as trained", "3", "80.0 %"),
        ("gradual-ranks", "80 %", "mask shuffled", "3", "80.0 %"),
        ("movement-ranks", "80 %", "as trained", "3", "60.0 %"),
        ("movement-ranks", "80 %", "mask shuffled", "3", "70.0 %"),
    ]
    truncated = tables.truncated(found, "CoLA")
    assert truncated.titles == ("arm", "sparsity", "as trained", "low-rank:0.5", "low-rank:0.25")
    assert ("gradual-ranks", "80 %", "50.0", "40.0", "30.0") in truncated.lines
    assert not tables.spectra(study(row()), "CoLA").lines and not tables.truncated(study(row()), "CoLA").lines


def test_int8_stands_beside_its_own_floats():
    table = tables.int8(study(*whole()), "CoLA")
    assert len(table.lines) == 2 and "admm (best by held-out rows)" in cells(table, "arm")[0]
    assert table.lines[0][1:] == ("2:4", "3", "51.7", "50.7", "-1.00 [-1.00, -1.00]", "50.0 %", "15.0 %", "-", "1.30")


# Plots


def test_the_front_is_what_nothing_beats():
    def point(x, metric):
        entry = tables.Entry("seven", 50, {0: row(metric=metric)}, None, None, None, x, {}, "")
        return plots.Point(entry, x)

    points = [point(3, 0.5), point(1, 0.2), point(2, 0.6), point(1, 0.4), point(4, 0.7)]
    assert [(one.x, one.entry.mean) for one in plots.front(points)] == [(1, 0.4), (2, 0.6), (4, 0.7)]
    assert [plots.family(text) for text in ("2:4", "bitmap:0.5", "low-rank:0.5", "low-rank:0.05+rows:0.45", "-")] == [
        *("nm", "bitmap", "low_rank", "low_rank_sparse", "dense")
    ]


def test_plots_are_drawn_the_same_to_the_byte(tmp_path):
    pytest.importorskip("matplotlib")
    found = plots.of(study(*whole()))
    assert [plot.name for plot in found] == ["short-size", "short-latency", "short-ranks"]
    for plot in found:
        svg, png = drawing.save(plot, tmp_path / "a")
        assert png.stat().st_size > 5000
    (again,) = (plot for plot in plots.of(study(*whole())) if plot.name == "short-ranks")
    drawing.save(again, tmp_path / "b")
    assert (tmp_path / "b" / svg.name).read_bytes() == svg.read_bytes()
    # Without times and ranks there is nothing to draw of them.
    assert [plot.name for plot in plots.of(study(row()))] == ["short-size"]
    assert plots.of(study(row(bytes=None))) == []


# Pages


@pytest.fixture
def repository(tmp_path) -> Path:
    sections = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("accuracy", "performance"))
    (tmp_path / "README.md").write_text(f"# Title\n\n{sections}After\n")
    (tmp_path / "sparsebert" / "ops").mkdir(parents=True)
    (tmp_path / "benchmarks" / "data" / "accuracy").mkdir(parents=True)
    return tmp_path


def data(root):
    return root / "benchmarks" / "data" / "accuracy" / "short.jsonl"


def test_without_data_it_says_that_no_study_was_run(repository):
    data(repository).parent.rmdir()
    assert report.main(["accuracy"], repository) == 0
    text = (repository / "README.md").read_text()
    assert f"<!-- accuracy -->\n{page.NO_STUDY}<!-- /accuracy -->" in text and "No GPU figures" not in text
    assert not (repository / "docs").exists() and not (repository / "sparsebert" / "ops" / "shipped.json").exists()
    # A page of rows that are gone comes from nothing.
    (repository / "docs").mkdir()
    (repository / "docs" / "accuracy.md").touch()
    assert report.check(repository, ["accuracy"]) == [f"{repository / 'docs' / 'accuracy.md'}: comes from no run"]


def test_the_study_makes_readme_page_and_plots_and_any_change_is_found(repository, capsys):
    pytest.importorskip("matplotlib")
    data(repository).write_text(lines(*whole()))
    assert report.main([], repository) == 0
    assert "texts and 3 plots written" in capsys.readouterr().out
    text = (repository / "README.md").read_text()
    section = page.section(studies(data(repository).parent))
    assert f"<!-- accuracy -->\n{section}<!-- /accuracy -->" in text and text.endswith("After\n")
    assert "### Budget short" in section
    assert "| admm (1 of 3 rates) | 75 % | 51.7 ± 0.4 (3) | magnitude | +1.67 [0.23, 3.10] |" in section
    assert "Of 18 claims of papers " in section and "](docs/accuracy.md)" in section
    files = {f"short-{name}.{kind}" for name in ("size", "latency", "ranks") for kind in ("svg", "png")}
    assert {file.name for file in (repository / "docs" / "accuracy").iterdir()} == files
    for part in ([], ["accuracy"], ["performance"]):
        assert report.main([*part, "--check"], repository) == 0

    def faults(*arguments):
        capsys.readouterr()
        assert report.main([*arguments, "--check"], repository) == 1
        return [Path(line.partition(":")[0]).name for line in capsys.readouterr().err.splitlines()]

    good = (repository / "README.md").read_text()
    (repository / "README.md").write_text(good.replace("51.7", "61.7"))
    assert faults("accuracy") == faults() == ["README.md"]
    assert report.main(["performance", "--check"], repository) == 0
    (repository / "README.md").write_text(good)
    before = data(repository).read_text()
    data(repository).write_text(before.replace('"matthews": 0.52', '"matthews": 0.53'))
    assert sorted(faults("accuracy")) == ["README.md", "accuracy.md"]
    data(repository).write_text(before)
    (repository / "docs" / "accuracy" / "short-size.png").unlink()
    (repository / "docs" / "accuracy" / "long-size.png").touch()
    assert faults("accuracy") == ["short-size.png", "long-size.png"]


def test_a_line_that_is_none_is_an_error_of_the_report(repository, capsys):
    data(repository).write_text(lines(row()) + "{\n")
    assert report.main(["accuracy", "--check"], repository) == 1
    assert "short.jsonl, line 3: is no JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["accuracy", "--keep", "rows.jsonl"], repository)
    assert "--keep takes runs of performance" in capsys.readouterr().err


def test_the_page_has_every_table_and_its_example_works(tmp_path):
    found = study(*whole())
    text = page.markdown([found])
    for title in ("Claims", "Targets", "CoLA", "MRPC: learning rates", "MRPC: ranks", "CoLA: truncation"):
        assert f"# {title}\n" in text
    assert "CoLA: int8 on top\n" in text and "## Arms\n" in text
    assert "| e | CPU: Test CPU (2 threads) | 0123456 | 2020-01-02 | torch 2.0 |" in text
    assert (
        "| `python benchmarks/accuracy.py run --data GLUE --arms admm,magnitude --tasks CoLA,MRPC --seeds 0,1,2" in text
    )
    assert "Dense is `dense`. Optimizer steps of each trained arm, with those of its start: 800." in text
    total, shown = len(found.accuracy), sum(len(found.of(t, *p)) for t in TASKS for p in found.arms(t))
    assert total - shown == 4
    assert f"{total} runs, of which {shown} are in the tables; the other 4 are of learning rates" in text.replace(
        "\n", " "
    )
    # As the other pages of docs: no long lines, images beside it, and an example that gives what it shows.
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert "](accuracy/short-size.svg)" in text
    (tmp_path / "accuracy.md").write_text(text, encoding="utf-8")
    assert doctest.testfile(str(tmp_path / "accuracy.md"), module_relative=False, encoding="utf-8") == (0, 2)
    assert page.markdown([study(*whole())]) == text
    assert "other predictions" not in text
    assert "again, 1 of them give other predictions" in page.markdown([study(row(reload_agrees=False))])


def test_any_part_of_a_study_makes_a_page(tmp_path):
    pytest.importorskip("matplotlib")
    for one in [*whole()[::7], row(format=None, bytes=None, trace=None, holdout=None), row("seven-signed", lr=None)]:
        if one["kind"] == "accuracy":
            found = study(one)
            assert page.markdown([found]).startswith("# Accuracy\n") and page.section([found])
            assert len(tables.main(found, one["task"]).lines) == 1
    for plot in plots.of(study(row(probes=probes(0.5), arm="gradual-ranks", sparsity=80))):
        assert drawing.save(plot, tmp_path)


def test_a_row_that_was_not_chosen_yet_is_in_no_table():
    found = study(row("gradual", seed=0), row(seed=1, task="MRPC"))
    assert not tables.main(found, "MRPC").lines and "1 runs" not in page.section([found])
    assert study_rows.at({"a": {"b": 1}}, "a.b") == 1 and study_rows.at({"a": None}, "a.b") is None
