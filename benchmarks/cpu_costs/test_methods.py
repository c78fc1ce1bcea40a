"""Projections, and what methods do to masks and scores at a step: three of BERT-base's twelve layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bert_base
import pytest
import torch
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.formats import bitmap, nm, rows
from sparsebert.formats.common import largest_in_groups
from sparsebert.methods import SEVEN, Run
from sparsebert.methods.maths import thresholds
from sparsebert.methods.maths.projections import Block, Dictionary, Int8Grid, Largest, Scaled

LAYERS = 3
STEPS = 100


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    return bert_base.weights(LAYERS)


def quarter(weight: Tensor) -> int:
    return weight.numel() // 4


PROJECTIONS: dict[str, Callable[[Tensor], Any]] = {
    "nm.project 2:4": lambda w: nm.project(w, 2, 4),
    "nm.magnitude_mask 2:4": lambda w: nm.magnitude_mask(w, 2, 4),
    "nm.magnitude_mask 2:8": lambda w: nm.magnitude_mask(w, 2, 8),
    "nm.magnitude_mask 4:16": lambda w: nm.magnitude_mask(w, 4, 16),
    "largest_in_groups 2:4": lambda w: largest_in_groups(w, 2, 4),
    "bitmap.project 25%": lambda w: bitmap.project(w, quarter(w)),
    "thresholds.largest 25%": lambda w: thresholds.largest(w, quarter(w)),
    "rows.project 10%": lambda w: rows.project(w, rows.row_count(0.1, len(w))),
    "Largest 2:4": Largest(sb.NMConfig(2, 4)),
    "Scaled 2:4": lambda w: Scaled(Largest(sb.NMConfig(2, 4)), torch.ones(w.shape[1]))(w),
    "Block 2 x 4, 4": Block(2, 4, 4),
    "Int8Grid": Int8Grid(),
    "Int8Grid 2:4": Int8Grid(Largest(sb.NMConfig(2, 4))),
}


@pytest.mark.benchmark(group="projections", max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("name", PROJECTIONS)
@torch.no_grad()
def test_projection(name, benchmark, weights):
    benchmark(lambda: [PROJECTIONS[name](weight) for weight in weights])


@pytest.mark.benchmark(group="projections", max_time=0.5, min_rounds=3)
@torch.no_grad()
def test_projection_over_all_layers(benchmark, weights):
    scores = {str(i): weight.abs() for i, weight in enumerate(weights)}
    benchmark(thresholds.largest_overall, scores, sum(map(quarter, weights)))


@pytest.mark.benchmark(group="projections", max_time=0.5, min_rounds=3)
@torch.no_grad()
def test_dictionary(benchmark, weights):
    fitted = Dictionary(2, 4, 4).fit(weights)
    benchmark(lambda: [fitted(weight) for weight in weights])


@pytest.mark.benchmark(group="projections", max_time=0.5, min_rounds=3)
@torch.no_grad()
def test_fit_of_a_dictionary(benchmark, weights):
    benchmark(lambda: Dictionary(2, 4, 4).fit(weights))


def run_of(method: sb.methods.Method, weights: list[Tensor]) -> Run:
    """The method at work on layers of these weights, with gradients."""
    model = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data.copy_(weight)
        layer.weight.grad = torch.randn_like(weight)
    return method.prepare(model, total_steps=STEPS)


def after(run: Run, step: int) -> Callable[[], None]:
    """What the run does after this step, again and again."""

    def call() -> None:
        run.step = step
        run.after_step()

    return call


def gradual(config: Any) -> Callable[[list[Tensor]], Callable[[], None]]:
    def make(weights: list[Tensor]) -> Callable[[], None]:
        run = run_of(sb.methods.GradualMagnitude({"*": config}, every=10), weights)
        return after(run, next(step for step in range(STEPS) if run.schedule.falls(step)))

    return make


def admm_step(weights: list[Tensor]) -> Callable[[], None]:
    run = run_of(sb.methods.ADMM({"*": sb.NMConfig(2, 4)}), weights)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-5)

    def call() -> None:
        run.step = 1
        run.before_step(optimizer)

    return call


def admm_round(weights: list[Tensor]) -> Callable[[], None]:
    run = run_of(sb.methods.ADMM({"*": sb.NMConfig(2, 4)}), weights)
    return after(run, run.round_ends[0])


def seven(due: bool) -> Callable[[list[Tensor]], Callable[[], None]]:
    def make(weights: list[Tensor]) -> Callable[[], None]:
        run = run_of(SEVEN({"*": sb.BitmapConfig(0.5)}), weights)
        window = run.schedule
        return after(run, next(s for s in range(STEPS) if window.inside(s) and window.due(s) == due))

    return make


UPDATES = {
    "gradual magnitude renews 2:4": gradual(sb.NMConfig(2, 4)),
    "gradual magnitude renews bitmap": gradual(sb.BitmapConfig(0.5)),
    "ADMM pulls the gradients": admm_step,
    "ADMM ends a round": admm_round,
    "SEVEN updates its score": seven(due=False),
    "SEVEN updates and renews": seven(due=True),
}


@pytest.mark.benchmark(group="updates", max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("name", UPDATES)
@torch.no_grad()
def test_update(name, benchmark, weights):
    benchmark(UPDATES[name](weights))
