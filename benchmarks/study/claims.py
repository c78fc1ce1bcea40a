"""What the papers claim, as comparisons of arms, and what the study's rows say to each.

A pair is a task, a seed and a sparsity that both sides have. A comparison is *supported* where the 95 % interval of the
mean difference over all pairs lies above 0 and the mean is above 0 on at least three quarters of the tasks, *refuted*
where the same holds below 0, else *undecided*. A claim is refuted if one of its comparisons is, and supported if all
are. Differences are in points, a hundredth of the metric or of the full rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from study.arms import ARMS, BUDGETS, DISTILLED, FINE_TUNED
from study.rows import Row, Study, at, dev
from study.statistics import Difference, difference, differences, mean, paired

SUPPORTED, REFUTED, UNDECIDED, NOT_MEASURED = "supported", "refuted", "undecided", "not measured"
REACHED, MISSED = "reached", "missed"
# On how many of the tasks the mean has to have the sign of the whole.
AGREEING = 0.75
_FIVE_PER_CENT_TASKS = ("SST-2", "MRPC")
# What ADMM's last projection may lose, of what pruning alone loses: our threshold, the paper has none.
MOST_OF_ONE_SHOT = 1 / 3
# The low-rank ratios that weights are truncated to.
TRUNCATED = ("0.5", "0.25")
RANKS_AT = (80, 90, 95)
RANKS = {
    "numerical_rank": "numerical rank",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "rank_90": "rank of 90 % of the energy",
}


class Unit(NamedTuple):
    task: str
    seed: int
    sparsity: int


class Value(NamedTuple):
    """A number of a row, None where the row has none."""

    name: str
    of: Callable[[Row], float | None]


class Finding(NamedTuple):
    outcome: str
    text: str


class Verdict(NamedTuple):
    """``command`` measures again what ``figures`` come from."""

    id: str
    statement: str
    outcome: str
    figures: str
    command: str


@dataclass(frozen=True)
class Part:
    """One of the things that have to hold, and the arms that it needs; without ``counts`` it is only shown."""

    arms: tuple[str, ...]
    judge: Callable[[Study], Finding]
    counts: bool = True


@dataclass(frozen=True)
class Claim:
    """``more``: figures that decide nothing."""

    id: str
    statement: str
    parts: tuple[Part, ...]
    more: Callable[[Study], str] | None = None


def verdicts(study: Study) -> list[Verdict]:
    return [_verdict(claim, study) for claim in CLAIMS]


def targets(study: Study) -> list[Verdict]:
    """What we set out to reach; a mean alone decides."""
    found = []
    for name, statement, arms, judge, tasks in TARGETS:
        finding = judge(study)
        found.append(Verdict(name, statement, finding.outcome, finding.text, command(study, arms, tasks)))
    return found


def command(study: Study, arms: Iterable[str], tasks: Collection[str] = ()) -> str:
    """On ``tasks``, or those that there are. Also runs the arms whose learning rates these take. Rows go to a file of
    their own: what is done is not done again."""
    needed = [other for arm in arms for other in (ARMS[arm].tuned_as, arm) if other]
    named = {
        "--data": ["GLUE"],
        "--budget": [study.budget] if study.budget != next(iter(BUDGETS)) else [],
        "--arms": list(dict.fromkeys(needed)),
        "--tasks": list(tasks) or study.tasks,
        "--seeds": [str(seed) for seed in sorted({row["seed"] for row in study.accuracy})],
        "--rows": [f"again/{study.budget}.jsonl"],
    }
    words = [f"{name} {','.join(given)}" for name, given in named.items() if given]
    return " ".join(["python benchmarks/accuracy.py run", *words])


def values(
    study: Study, arm: str, value: Value | None = None, sparsities: Collection[int] | None = None
) -> dict[Unit, float]:
    """``value``, the metric unless another is named, of all rows of ``arm`` that count."""
    read, found = (value or METRIC).of, {}
    for task in study.tasks:
        for sparsity in study.sparsities(task, arm):
            if sparsities is None or sparsity in sparsities:
                for seed, row in study.of(task, arm, sparsity).items():
                    if (number := read(row)) is not None:
                        found[Unit(task, seed, sparsity)] = number
    return found


def dense_beside(
    study: Study, units: Iterable[Unit], arm: str = "dense", value: Value | None = None
) -> dict[Unit, float]:
    """The dense model's number, or that of another arm without sparsity, for each of ``units``, by task and seed."""
    known = {(unit.task, unit.seed): number for unit, number in values(study, arm, value, (0,)).items()}
    return {unit: known[unit.task, unit.seed] for unit in units if (unit.task, unit.seed) in known}


def interval(found: Difference) -> str:
    """In points: ``+1.23 [0.40, 2.06]``."""
    ends = "" if found.low is None or found.high is None else f" [{_points(found.low)}, {_points(found.high)}]"
    return f"{_points(found.mean, '+')}{ends}"


def judge(name: str, found: Mapping[Unit, float]) -> Finding:
    """Whether the differences, one for each pair, are above 0."""
    whole = difference(list(found.values()))
    if whole is None:
        return Finding(NOT_MEASURED, f"{name}: not measured")
    of_task: dict[str, list[float]] = defaultdict(list)
    for unit, number in found.items():
        of_task[unit.task].append(number)
    means = [mean(numbers) for numbers in of_task.values()]
    above, below = (sum(sign * number > 0 for number in means) for sign in (1, -1))
    outcome = UNDECIDED
    if whole.low is not None and whole.low > 0 and above >= AGREEING * len(means):
        outcome = SUPPORTED
    if whole.high is not None and whole.high < 0 and below >= AGREEING * len(means):
        outcome = REFUTED
    pairs = f"{whole.n} pair{'' if whole.n == 1 else 's'}"
    tasks = f"above 0 on {above} of {len(means)} task{'' if len(means) == 1 else 's'}"
    return Finding(outcome, f"{name}: {interval(whole)}, {pairs}, {tasks}: {outcome}")


def above(
    first: str,
    second: str,
    sparsities: tuple[int, ...] | None = None,
    value: Value | None = None,
    *,
    counts: bool = True,
) -> Part:
    """``first`` has more of ``value`` than ``second``, at every sparsity that both have or at those named."""
    return Part((first, second), partial(_above, first, second, sparsities, value), counts)


def _above(first: str, second: str, sparsities: tuple[int, ...] | None, value: Value | None, study: Study) -> Finding:
    found = differences(values(study, first, value, sparsities), values(study, second, value, sparsities))
    name = f"{first} - {second}" + (f" in {value.name}" if value else "")
    finding = judge(name, found)
    ours, theirs = (_collapsed(study, arm, found) for arm in (first, second))
    return (
        Finding(finding.outcome, f"{finding.text} (one class: {ours} and {theirs} runs)") if ours or theirs else finding
    )


def _collapsed(study: Study, arm: str, units: Iterable[Unit]) -> int:
    return sum(study.of(unit.task, arm, unit.sparsity)[unit.seed]["one_class"] for unit in units)


def _verdict(claim: Claim, study: Study) -> Verdict:
    findings = [(part, part.judge(study)) for part in claim.parts]
    arms = [arm for part in claim.parts for arm in part.arms if arm in ARMS]
    outcome = _together([finding.outcome for part, finding in findings if part.counts])
    figures = [finding.text for _, finding in findings]
    if claim.more and outcome != NOT_MEASURED and (text := claim.more(study)):
        figures.append(text)
    return Verdict(claim.id, claim.statement, outcome, "; ".join(figures), command(study, arms))


def _together(outcomes: Collection[str]) -> str:
    """Of several comparisons; one that was not measured leaves the others undecided."""
    if REFUTED in outcomes:
        return REFUTED
    found = set(outcomes)
    return found.pop() if len(found) == 1 else UNDECIDED


# Numbers of a row


def _truncation_loss(ratio: str, row: Row) -> float | None:
    short = at(row, "probes.truncated")
    return None if short is None or short.get(ratio) is None else dev(row) - short[ratio]


def _projection_loss(row: Row) -> float | None:
    before = row.get("before_projection")
    return None if before is None else before - dev(row)


def rank(kind: str, *, shuffled: bool = False) -> Value:
    """A fraction of the full rank, of the weights or of those with their mask shuffled."""
    where = f"probes.{'shuffled' if shuffled else 'spectra'}.{kind}"
    return Value(RANKS[kind], lambda row: at(row, where))


METRIC = Value("the metric", dev)
AT_START = Value("the metric at the start", lambda row: row.get("at_start"))
LOST = {ratio: Value(f"what truncation to {ratio} loses", partial(_truncation_loss, ratio)) for ratio in TRUNCATED}


# What is more than a comparison of two arms


def _rounds_fall(study: Study) -> Finding:
    """What a projection would take away, by rounds: the last entry of each, the state before the first among them."""
    fell = steps = runs = 0
    for task in study.tasks:
        for sparsity in study.sparsities(task, "admm"):
            for row in study.of(task, "admm", sparsity).values():
                entries = [entry for entry in row.get("trace") or () if {"round", "out_of_pattern"} <= entry.keys()]
                by_round = {entry["round"]: entry["out_of_pattern"] for entry in entries}
                found = [by_round[number] for number in sorted(by_round)]
                falls = [after < before for before, after in zip(found, found[1:], strict=False)]
                fell, steps, runs = fell + sum(falls), steps + len(falls), runs + bool(falls)
    if not steps:
        return Finding(NOT_MEASURED, "the part of the weights outside the pattern by rounds: not measured")
    outcome = SUPPORTED if fell == steps else REFUTED
    text = f"the part outside the pattern falls in {fell} of {steps} steps from round to round of {runs} runs"
    return Finding(outcome, f"{text}: {outcome}")


def _projection_is_small(study: Study) -> Finding:
    """Of means: those of ADMM's last projection and of pruning alone."""
    last, alone = values(study, "admm-pull", Value("", _projection_loss)), values(study, "one-shot")
    pruned = differences(dense_beside(study, alone, FINE_TUNED), alone)
    units = [unit for unit in last if unit in pruned]
    if not units:
        return Finding(NOT_MEASURED, "what the last projection loses: not measured")
    ours, theirs = (mean([found[unit] for unit in units]) for found in (last, pruned))
    outcome = UNDECIDED
    if theirs > 0:
        outcome = SUPPORTED if ours <= MOST_OF_ONE_SHOT * theirs else REFUTED
    lost = f"the last projection loses {_points(ours)} points, one-shot pruning {_points(theirs)}"
    return Finding(outcome, f"{lost}, {len(units)} runs of each (a third of it at most, our threshold): {outcome}")


def _flipped(study: Study) -> str:
    shares = []
    for task in study.tasks:
        for sparsity in study.sparsities(task, "admm-srste"):
            for row in study.of(task, "admm-srste", sparsity).values():
                shares += [entry["flipped"] for entry in row.get("trace") or () if entry.get("flipped") is not None]
    return f"of the mask {100 * mean(shares):.3g} % flips from one look to the next" if shares else ""


def _shuffling_raises(study: Study) -> Finding:
    real, control = (
        values(study, "movement-ranks", rank("effective_rank", shuffled=shuffled), RANKS_AT)
        for shuffled in (True, False)
    )
    return judge("movement-ranks, mask shuffled - as trained, in effective rank", differences(real, control))


def _gaps(study: Study) -> str:
    """Movement's effective rank beside gradual magnitude's, as trained and shuffled."""
    other = values(study, "gradual-ranks", rank("effective_rank"), RANKS_AT)
    texts = []
    for shuffled in (False, True):
        ours = values(study, "movement-ranks", rank("effective_rank", shuffled=shuffled), RANKS_AT)
        if found := paired(ours, other):
            texts.append(f"{'shuffled' if shuffled else 'as trained'} {interval(found)}")
    return f"movement-ranks - gradual-ranks: {', '.join(texts)}" if texts else ""


def _loses_less_than_dense(ratio: str, study: Study) -> Finding:
    ours = values(study, "movement-ranks", LOST[ratio], RANKS_AT)
    found = differences(dense_beside(study, ours, value=LOST[ratio]), ours)
    finding = judge(f"dense - movement-ranks in {LOST[ratio].name}", found)
    collapsed = _collapsed(study, "movement-ranks", found)
    return Finding(finding.outcome, finding.text + (f" (one class: {collapsed} runs)" if collapsed else ""))


def _gap_widens(study: Study) -> Finding:
    gaps = differences(values(study, "losparse"), values(study, "losparse-rows"))
    grown = {}
    for task in study.tasks:
        shared = sorted({unit.sparsity for unit in gaps if unit.task == task})
        for unit in gaps:
            lowest = unit._replace(sparsity=shared[0]) if unit.task == task and len(shared) > 1 else None
            if unit.sparsity == shared[-1] and lowest in gaps:
                grown[unit] = gaps[unit] - gaps[lowest]
    return judge("(losparse - losparse-rows) at the highest - at the lowest shared sparsity", grown)


_RANK_ARMS = ("gradual-ranks", "movement-ranks")

CLAIMS = (
    Claim("A1", "ADMM beats the largest weights of each group, in the same steps", (above("admm", "magnitude"),)),
    Claim(
        "A2",
        "ADMM pulls the weights to the pattern, so that the last projection costs little",
        (Part(("admm",), _rounds_fall), Part(("admm-pull", "one-shot"), _projection_is_small)),
    ),
    Claim(
        "A3",
        "SR-STE's moving mask after ADMM does at least as well as the frozen one (supported where it does better)",
        (above("admm-srste", "admm"),),
        _flipped,
    ),
    Claim(
        "L1",
        "Movement pruning leaves lower ranks than gradual magnitude (all but the numerical rank count)",
        tuple(
            above(*_RANK_ARMS, RANKS_AT, rank(kind), counts=kind != "numerical_rank")
            for kind in ("stable_rank", "effective_rank", "rank_90", "numerical_rank")
        ),
    ),
    Claim(
        "L2",
        "Movement's lower rank is more than empty rows and columns: shuffling the mask within their counts raises it",
        (Part(("movement-ranks",), _shuffling_raises),),
        _gaps,
    ),
    Claim(
        "L3",
        "Truncation to a low rank costs less after movement pruning than after gradual magnitude, and than dense",
        tuple(
            part
            for ratio in TRUNCATED
            for part in (
                above(*_RANK_ARMS, RANKS_AT, LOST[ratio]),
                Part(("dense", "movement-ranks"), partial(_loses_less_than_dense, ratio)),
            )
        ),
    ),
    Claim(
        "L4",
        "LPAF's sparsity-aware SVD beats the plain one, before and after training",
        (
            above("lpaf", "lpaf-plain"),
            above("lpaf", "lpaf-plain", value=AT_START),
            # Beside the claim: the same after a pruning that leaves something in few steps.
            above("lpaf-magnitude", "lpaf-magnitude-plain", counts=False),
            above("lpaf-magnitude", "lpaf-magnitude-plain", value=AT_START, counts=False),
        ),
    ),
    Claim(
        "LS1",
        "LoSparse beats its sparse part alone and the SVD alone at the same total",
        (above("losparse", "losparse-rows"), above("losparse", "svd")),
    ),
    Claim(
        "LS2",
        "LoSparse's SVD start beats random factors",
        (above("losparse", "losparse-random"), above("losparse", "losparse-random-residual")),
    ),
    Claim(
        "LS3",
        "LoSparse's low-rank part is worth more at high sparsity than at low",
        (Part(("losparse", "losparse-rows"), _gap_widens),),
    ),
    Claim(
        "S1",
        "SEVEN beats weight times gradient and PLATON",
        (above("seven", "taylor"), above("seven", "platon")),
    ),
    Claim("S2", "SEVEN beats true movement pruning at 90 %", (above("seven", "movement", (90,)),)),
    Claim("S3", "SEVEN's ratio of moments matters: it beats summed scores", (above("seven", "seven-summed"),)),
    Claim(
        "S4",
        "Moments of signed gradients do better than the published code's unsigned ones",
        (above("seven-signed", "seven"),),
    ),
    Claim(
        "SB1",
        "Knowledge-aware pruning, with its teacher, beats gradual magnitude, and this beats one-shot with a held mask",
        (above("knowledge", "gradual"), above("gradual", "magnitude-bitmap")),
    ),
    Claim(
        "SB2",
        "Knowledge-aware pruning does better on the pre-trained model than on the fine-tuned one",
        (above("knowledge", "knowledge-finetuned"),),
    ),
    Claim(
        "SB3",
        "A pruned student beats a dense one of one layer, which has 3.3 times its non-zeros: a sufficient test",
        (above("knowledge", "one-layer"),),
    ),
    Claim(
        "SB4",
        "Each term of the distillation helps",
        tuple(above("knowledge", f"knowledge-no-{term}") for term in ("hidden", "attention", "logits")),
    ),
)


# Targets


def best_dense(study: Study, task: str) -> str | None:
    """What dense means: the better of both ways to train it, on held-out rows."""
    return study.best(task, ("dense", "dense-pretrained"), 0)


def _over_dense(study: Study, task: str, arm: str | None, sparsity: int) -> dict[Unit, float]:
    dense = best_dense(study, task)
    if arm is None or dense is None:
        return {}
    ours = {Unit(task, seed, sparsity): dev(row) for seed, row in study.of(task, arm, sparsity).items()}
    return differences(ours, dense_beside(study, ours, dense))


def _reached(name: str, found: Mapping[Unit, float], least: float) -> Finding:
    """Whether the mean is ``least`` points or more; where that is 0, more."""
    whole = difference(list(found.values()))
    if whole is None:
        return Finding(NOT_MEASURED, f"{name}: not measured")
    points = 100 * whole.mean
    outcome = REACHED if points > least or (points == least and least) else MISSED
    return Finding(outcome, f"{name}: {interval(whole)}, {whole.n} pair{'' if whole.n == 1 else 's'}: {outcome}")


def _all_reached(findings: Collection[Finding]) -> Finding:
    outcomes = [finding.outcome for finding in findings]
    outcome = next((one for one in (MISSED, NOT_MEASURED) if one in outcomes), REACHED)
    return Finding(outcome, "; ".join(finding.text for finding in findings))


def _two_of_four(study: Study) -> Finding:
    found: dict[Unit, float] = {}
    chosen = []
    for task in study.tasks:
        arm = study.best(task, ("admm", f"admm{DISTILLED}"), 50)
        if here := _over_dense(study, task, arm, 50):
            found |= here
            chosen.append(f"{arm} on {task}")
    return _reached(f"2:4 - dense ({', '.join(chosen)})" if chosen else "2:4 - dense", found, -0.5)


def _five_per_cent(study: Study) -> Finding:
    return _all_reached(
        [
            _reached(f"knowledge - dense on {task}", _over_dense(study, task, "knowledge", 95), -2)
            for task in _FIVE_PER_CENT_TASKS
        ]
    )


def _ahead(firsts: tuple[str, ...], second: str, sparsities: tuple[int, ...], least: float, study: Study) -> Finding:
    other = values(study, second, sparsities=sparsities)
    return _all_reached(
        [
            _reached(f"{first} - {second}", differences(values(study, first, sparsities=sparsities), other), least)
            for first in firsts
        ]
    )


# Each with the tasks that it is about, where these are not all that there are.
TARGETS = (
    (
        "T1",
        "2:4 by ADMM, distilled or not as held-out rows choose, is within 0.5 point of dense on average",
        ("admm", f"admm{DISTILLED}", "dense", "dense-pretrained"),
        _two_of_four,
        (),
    ),
    (
        "T2",
        "5 % of the weights by knowledge-aware pruning are within 2 points of dense on SST-2 and on MRPC",
        ("knowledge", "dense", "dense-pretrained"),
        _five_per_cent,
        _FIVE_PER_CENT_TASKS,
    ),
    (
        "T3",
        "LoSparse and LPAF are 2 points ahead of the SVD at the same size",
        ("losparse", "lpaf", "svd"),
        partial(_ahead, ("losparse", "lpaf"), "svd", (50, 75), 2),
        (),
    ),
    (
        "T4",
        "SEVEN is ahead of gradual magnitude at 75 %",
        ("seven", "gradual"),
        partial(_ahead, ("seven",), "gradual", (75,), 0),
        (),
    ),
)


def _points(number: float, sign: str = "") -> str:
    # Adding 0 makes -0.00 a plain zero.
    return f"{round(100 * number, 2) + 0.0:{sign}.2f}"
