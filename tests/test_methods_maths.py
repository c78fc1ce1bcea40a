"""The formulas that methods share, on numbers worked out by hand and against plain re-implementations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparsebert.formats.common import largest_in_groups
from sparsebert.methods.maths import schedules, scores, thresholds
from sparsebert.methods.maths.schedules import Cubic, Linear, Window, kept_in_group

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf


def places(mask):
    return mask.flatten().nonzero().flatten().tolist()


# Thresholds


@pytest.mark.parametrize(
    "values, count, expected",
    [
        ([3.0, -1.0, 2.0, 5.0], 2, [0, 3]),
        ([3.0, -1.0, 2.0, 5.0], 0, []),
        ([3.0, -1.0, 2.0, 5.0], 4, [0, 1, 2, 3]),
        ([1.0, 2.0, 1.0, 1.0, 2.0], 3, [0, 1, 4]),
        ([0.0] * 7, 3, [0, 1, 2]),
        ([0.0, -0.0, 0.0], 2, [0, 1]),
        ([-3.0, -1.0, -2.0], 1, [1]),
        ([1.0, NAN, 2.0], 1, [1]),
        ([1.0, NAN, 2.0], 2, [1, 2]),
        ([NAN, 1.0, NAN, NAN], 2, [0, 2]),
        ([1.0, INF, -INF, INF], 3, [0, 1, 3]),
        ([7.0], 1, [0]),
        ([], 0, []),
    ],
)
def test_largest(values, count, expected):
    assert places(thresholds.largest(torch.tensor(values), count)) == expected


def test_largest_keeps_the_shape():
    mask = thresholds.largest(torch.arange(12.0).view(3, 4).t(), 5)
    assert mask.shape == (4, 3) and mask.dtype == torch.bool
    # 7 to 11 of rows [0 1 2 3], [4 5 6 7], [8 9 10 11], transposed
    assert mask.t().tolist() == [[False] * 4, [False, False, False, True], [True] * 4]


@pytest.mark.parametrize("count", [-1, 4])
def test_counts_outside_are_refused(count):
    with pytest.raises(ValueError, match=f"count is {count}, expected 0 to 3"):
        thresholds.largest(torch.zeros(3), count)


def test_largest_overall_prefers_earlier_tensors_among_equals():
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[2.0, 3.0], [2.0, 0.0]]), "c": torch.tensor([2.0])}
    # 3 first, then the 2s in the order a, b, b, c
    assert {k: places(v) for k, v in thresholds.largest_overall(parts, 3).items()} == {"a": [1], "b": [0, 1], "c": []}
    assert {k: places(v) for k, v in thresholds.largest_overall(parts, 1).items()} == {"a": [], "b": [1], "c": []}
    assert thresholds.largest_overall(parts, 7)["b"].shape == (2, 2)


def test_an_empty_tensor_takes_part():
    masks = thresholds.largest_overall({"a": torch.zeros(0), "b": torch.tensor([1.0, 2.0])}, 1)
    assert places(masks["b"]) == [1] and masks["a"].shape == (0,)


numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, NAN, INF, -INF]), st.floats(-8, 8, width=32))
lists = st.lists(st.lists(numbers, max_size=33), min_size=1, max_size=4)


def reference(parts, count):
    """A stable sort that takes NaN for the largest."""
    flat = [(0 if math.isnan(x) else 1, -x if not math.isnan(x) else 0.0) for part in parts for x in part]
    return sorted(sorted(range(len(flat)), key=lambda i: flat[i])[:count])


@given(parts=lists, fraction=st.floats(0, 1), small=st.booleans())
@example(parts=[[NAN] * 5, [1.0]], fraction=0.5, small=True)
def test_counts_are_exact_whatever_the_scores(parts, fraction, small):
    """Also on the way that guesses from a sample, forced here on a few numbers, where the guess is often wrong."""
    count = round(fraction * sum(map(len, parts)))
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(thresholds, "_SMALL", 1)
            patch.setattr(thresholds, "_STRIDE", 5)
        masks = thresholds.largest_overall({str(i): torch.tensor(part) for i, part in enumerate(parts)}, count)
    assert torch.cat(list(masks.values())).nonzero().flatten().tolist() == reference(parts, count)


@pytest.mark.parametrize("k", [1, 2, 1_000, 150_000, 299_000, 300_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "periodic", "constant"])
def test_kth_largest_of_many(kind, k):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300_000, generator=generator)
    if kind == "ties":
        values = values.mul(2).round()
    elif kind == "periodic":
        # The sample sees nothing but the largest.
        values[:: thresholds._STRIDE] = 100.0
    elif kind == "constant":
        values.fill_(2.5)
    parts = values.split([100_000, 7, 199_993])
    assert thresholds.kth_largest(parts, k) == values.sort(descending=True).values[k - 1]


def test_the_sample_spares_the_sort(monkeypatch):
    sorted_entries = []
    kth_of = thresholds._kth_of
    monkeypatch.setattr(thresholds, "_kth_of", lambda flat, k: sorted_entries.append(len(flat)) or kth_of(flat, k))
    thresholds.kth_largest(torch.randn(1 << 20), 1 << 18)
    assert len(sorted_entries) == 1 and sorted_entries[0] < (1 << 20) / 8


@pytest.mark.parametrize("k", [0, 3])
def test_kth_largest_refuses_what_is_not_there(k):
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 2"):
        thresholds.kth_largest(torch.zeros(2), k)


def test_largest_in_groups():
    row = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 1.0, NAN, 9.0, 1.0, 2.0]])
    assert [places(r) for r in largest_in_groups(row, 2, 4)] == [[1, 3, 4, 5], [0, 1, 4, 5]]
    assert [places(r) for r in largest_in_groups(row, 1, 8)] == [[1], [4]]
    assert largest_in_groups(row, 4, 4).all() and not largest_in_groups(row, 0, 4).any()
    with pytest.raises(ValueError, match="8 entries a row, expected a multiple of 3"):
        largest_in_groups(row, 2, 3)
    with pytest.raises(ValueError, match="n is 5, expected 0 to 4"):
        largest_in_groups(row, 5, 4)


# Schedules


def test_cubic_golden():
    schedule = Cubic(0.2, total_steps=10, start=2, end=4, every=2)
    # a descent of 4 steps: left = (3/4)^3, (2/4)^3, (1/4)^3, 0 after steps 3 to 6
    assert [schedule.left(t) for t in range(11)] == [1, 1, 1, 27 / 64, 1 / 8, 1 / 64, 0, 0, 0, 0, 0]
    assert [schedule.remaining(t) for t in range(11)] == pytest.approx(
        [1, 1, 1, 0.5375, 0.3, 0.2125, 0.2, 0.2, 0.2, 0.2, 0.2], rel=1e-12
    )
    assert schedule.remaining(2) == 1.0 and schedule.remaining(6) == 0.2
    assert [t for t in range(11) if schedule.due(t)] == [4, 6, 7, 8, 9, 10]
    assert [t for t in range(11) if schedule.falls(t)] == [4, 6, 7]


def test_cubic_without_end_is_due_at_the_last_step():
    schedule = Cubic(0.5, total_steps=7, every=5)
    assert [t for t in range(8) if schedule.due(t)] == [5, 7] == [t for t in range(8) if schedule.falls(t)]
    assert schedule.remaining(7) == 0.5


@given(
    st.floats(0.001, 1), st.integers(1, 400), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(1, 30), st.booleans()
)
def test_schedules_fall_to_their_target(final, total, a, b, every, window):
    start = int(a * total)
    rest = int(b * (total - start))
    schedule: Cubic | Window
    if window:
        schedule = Window(final, total, start, total - start - rest, every)
        due = [t for t in range(1, total + 1) if schedule.due(t)]
    else:
        schedule = Cubic(final, total, start, rest, every)
        due = [t for t in range(1, total + 1) if schedule.falls(t)]
    kept = [schedule.remaining(t) for t in range(total + 1)]
    assert kept[0] == 1 and all(before >= after for before, after in zip(kept, kept[1:], strict=False))
    assert all(kept[t] == 1 for t in range(start + 1))
    # What the masks see: the target, with as many steps left as were asked for.
    assert kept[due[-1]] == final and due[-1] <= total - rest + (0 if window else 1)
    assert all(t > start for t in due)


def test_at_least_one_step_is_left_at_the_target():
    schedule = Cubic(0.1, total_steps=100, start=10, end=1, every=7)
    assert schedule.remaining(99) == 0.1 and [t for t in range(101) if schedule.falls(t)][-2:] == [98, 100]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"start": 6, "end": 4}, r"take 6 \+ 4 steps, expected fewer than the 10"),
        ({"start": 11}, r"take 11 \+ 0 steps, expected fewer than the 10"),
        ({"start": -1}, "start is -1, expected a whole number of steps, 0 or more"),
        ({"end": 1.5}, "end is 1.5, expected a whole number"),
        ({"every": 0}, "every is 0, expected a whole number of steps, 1 or more"),
        ({"final": 0.0}, "final fraction is 0.0"),
        ({"final": NAN}, "final fraction is nan"),
        ({"final": 1.01}, "final fraction is 1.01"),
    ],
)
def test_cubic_misfits_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Cubic(**{"final": 0.5, "total_steps": 10, **values})


def test_window_golden():
    schedule = Window(0.5, total_steps=9, start=2, length=4, every=3)
    assert [t for t in range(10) if schedule.inside(t)] == [3, 4, 5, 6]
    # j = t - 3 of the formula: 1 - (j + 1) / 4 = 3/4, 2/4, 1/4, and the step that the published code leaves out
    assert [schedule.left(t) for t in range(10)] == [1, 1, 1, 27 / 64, 1 / 8, 1 / 64, 0, 0, 0, 0]
    assert schedule.remaining(4) == 0.5625 and schedule.remaining(6) == 0.5
    assert [t for t in range(10) if schedule.due(t)] == [5, 6]
    assert [t for t in range(10) if Window(0.5, 9, 2, 4).due(t)] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "start, length, message",
    [
        (200, 1000, r"ends after 200 \+ 1000 steps, but the training has 780"),
        (0, 0, "length is 0, expected a whole number of steps, 1 or more"),
        (-1, 5, "start is -1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(start, length, message):
    """The first is the published code's RTE setting, which stops far from its target."""
    with pytest.raises(ValueError, match=message):
        Window(0.4, 780, start, length)


def test_linear():
    assert [Linear(0.5, 4).at(t) for t in (0, 1, 4, 9)] == [0.5, 0.375, 0.0, 0.0]
    with pytest.raises(ValueError, match="first is 1.5 and steps 4"):
        Linear(1.5, 4)


@pytest.mark.parametrize(
    "n, m, expected",
    [
        (2, 4, {1.0: 4, 0.99: 4, 0.75: 3, 0.7500001: 4, 0.51: 3, 0.5: 2, 0.3: 2}),
        (1, 4, {1.0: 4, 0.6: 3, 0.5: 2, 0.26: 2, 0.25: 1, 0.0: 1}),
        (2, 8, {1.0: 8, 0.9: 8, 0.875: 7, 0.3: 3, 0.25: 2}),
        (1, 16, {1.0: 16, 0.95: 16, 0.5: 8, 0.1: 2, 0.0625: 1, 0.05: 1}),
    ],
)
def test_kept_in_group(n, m, expected):
    assert {r: kept_in_group(r, n, m) for r in expected} == expected


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 4), (2, 8), (3, 8), (1, 16), (7, 16)])
def test_groups_go_down_one_by_one_and_end_at_n(n, m):
    schedule = Cubic(n / m, total_steps=1000, end=1)
    kept = [kept_in_group(schedule.remaining(t), n, m) for t in range(1001)]
    assert sorted(set(kept), reverse=True) == list(range(m, n - 1, -1)) and kept == sorted(kept, reverse=True)
    assert kept[0] == m and kept[-1] == n


# Scores

# W of the 2 x 2 toy, and its gradients in five steps: constant, flipping its sign, none, now and then.
WEIGHT = torch.tensor([[1.0, 3.0], [-4.0, 2.0]])
GRADIENTS = [torch.tensor([[2.0, 2.0 * (-1) ** i], [0.0, float(i in (0, 4))]]) for i in range(5)]


def seven(signed, alpha1=0.5, alpha2=0.5, weight=WEIGHT, gradients=GRADIENTS, dtype=torch.float32):
    importance, first, second = (torch.zeros(weight.shape, dtype=dtype) for _ in range(3))
    history = []
    for count, gradient in enumerate(gradients, 1):
        scores.update_seven_(
            importance, first, second, weight, gradient, count, alpha1=alpha1, alpha2=alpha2, signed=signed
        )
        history.append([t.flatten().tolist() for t in (first, second, importance)])
    return history


def test_seven_golden_unsigned():
    """a1 = a2 = 1/2. |g| = 2 each time: m = 1, 3/2, 7/4, 15/8, 31/16 and v = 2 m, both corrected 2 and 4, ratio 1, so I
    grows by |W g| = 2, and 6 where W = 3, whatever the signs. g = 1, 0, 0, 0, 1: m = v = 1/2, 1/4, 1/8, 1/16, 17/32;
    I = 2, then nothing, then 2 (17/31) / sqrt(17/31)."""
    late = 2 + 2 * math.sqrt(17 / 31)
    expected = [
        [[1, 1, 0, 1 / 2], [2, 2, 0, 1 / 2], [2, 6, 0, 2]],
        [[3 / 2, 3 / 2, 0, 1 / 4], [3, 3, 0, 1 / 4], [4, 12, 0, 2]],
        [[7 / 4, 7 / 4, 0, 1 / 8], [7 / 2, 7 / 2, 0, 1 / 8], [6, 18, 0, 2]],
        [[15 / 8, 15 / 8, 0, 1 / 16], [15 / 4, 15 / 4, 0, 1 / 16], [8, 24, 0, 2]],
        [[31 / 16, 31 / 16, 0, 17 / 32], [31 / 8, 31 / 8, 0, 17 / 32], [10, 30, 0, late]],
    ]
    for found, wanted in zip(seven(signed=False), expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert a == pytest.approx(b, rel=1e-6)


def test_seven_golden_signed():
    """Only the flipping entry differs: m = 1, -1/2, 3/4, -5/8, 11/16, corrected 2, -2/3, 6/7, -2/3, 22/31, over a root
    of 2: I grows by 6 times 1, 1/3, 3/7, 1/3, 11/31."""
    unsigned, signed = seven(signed=False), seven(signed=True)
    flipping = [[m[1], i[1]] for m, _, i in signed]
    sums = [6, 8, 8 + 18 / 7, 10 + 18 / 7, 10 + 18 / 7 + 66 / 31]
    for found, *wanted in zip(flipping, [1, -1 / 2, 3 / 4, -5 / 8, 11 / 16], sums, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
    for (m, v, i), (n, w, j) in zip(unsigned, signed, strict=True):
        assert v == w and [x[k] for x in (m, i) for k in (0, 2, 3)] == [x[k] for x in (n, j) for k in (0, 2, 3)]
    assert signed[-1][2][1] < unsigned[-1][2][1]


def test_seven_ratio_may_exceed_one():
    """a1 < a2: m forgets a small gradient sooner than v. g = 0, 1 with a1 = 0.8, a2 = 0.9: m' = 0.2 / 0.36 and
    v' = sqrt(0.1 / 0.19), ratio 0.7658; after g = 0, 1, 1, 1: m' = 0.488 / 0.5904, v' = sqrt(0.271 / 0.3439)."""
    one = torch.ones(1)
    history = seven(False, 0.8, 0.9, weight=one, gradients=[0 * one, one, one, one])
    assert history[1][2] == pytest.approx([0.2 / 0.36 / math.sqrt(0.1 / 0.19)], rel=1e-6)
    assert history[3][2][0] - history[2][2][0] == pytest.approx(0.488 / 0.5904 / math.sqrt(0.271 / 0.3439), rel=1e-5)


def plain_seven(weights, gradients, alpha1, alpha2, signed):
    m = v = i = torch.zeros(weights[0].shape, dtype=torch.float64)
    for j, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        w, g = w.double(), g.double() if signed else g.double().abs()
        m = alpha1 * m + (1 - alpha1) * g
        v = alpha2 * v + (1 - alpha2) * g**2
        mh = m / (1 - alpha1 ** (j + 1))
        vh = (v / (1 - alpha2 ** (j + 1))).sqrt() + 1e-9
        i = i + (w * g * mh / vh).abs()
    return i


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block", [1 << 17, 7])
def test_seven_against_a_plain_rule_in_float64(monkeypatch, signed, block):
    monkeypatch.setattr(scores, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    # Down to gradients where the 1e-9 counts.
    scale = 10.0 ** -torch.arange(0, 15, 1.0).unsqueeze(1)
    weights = [torch.randn(15, 11, generator=generator) for _ in range(12)]
    gradients = [(torch.randn(11, 15, generator=generator).t() * scale) for _ in range(12)]
    importance, first, second = torch.zeros(3, 15, 11)
    for j, (w, g) in enumerate(zip(weights, gradients, strict=True), 1):
        scores.update_seven_(importance, first, second, w, g, j, alpha1=0.8, alpha2=0.9, signed=signed)
    expected = plain_seven(weights, gradients, 0.8, 0.9, signed)
    assert torch.allclose(importance.double(), expected, rtol=2e-5, atol=0)


def test_scores_are_kept_in_their_own_dtype():
    weight, gradient = (torch.full((2, 2), 0.5, dtype=torch.bfloat16) for _ in range(2))
    importance, first, second = torch.zeros(3, 2, 2)
    for count in range(1, 1001):
        scores.update_seven_(importance, first, second, weight, gradient, count, alpha1=0.8, alpha2=0.9)
    # bfloat16 would stop at 64, where 0.25 is lost in rounding.
    assert importance.flatten().tolist() == pytest.approx([250.0] * 4, rel=1e-4)


def test_what_cannot_be_updated_in_place_is_refused():
    state = [torch.zeros(3, 2).t() for _ in range(3)]
    with pytest.raises(RuntimeError, match="view"):
        scores.update_seven_(*state, torch.ones(2, 3), torch.ones(2, 3), 1, alpha1=0.8, alpha2=0.9)


def test_platon_golden():
    """b1 = b2 = 1/2. I = 4: S = 2, U = |4 - 2| / 2 = 1. I = 0: S = 1, U = 1/2 + |0 - 1| / 2 = 1."""
    smoothed, uncertainty = torch.zeros(2, 1, 2)
    scores.update_platon_(smoothed, uncertainty, torch.tensor([[4.0, 0.0]]), beta1=0.5, beta2=0.5)
    assert (smoothed.tolist(), uncertainty.tolist()) == ([[2.0, 0.0]], [[1.0, 0.0]])
    scores.update_platon_(smoothed, uncertainty, torch.tensor([[0.0, 1.0]]), beta1=0.5, beta2=0.5)
    assert (smoothed.tolist(), uncertainty.tolist()) == ([[1.0, 0.5]], [[1.0, 0.25]])
    scores.update_platon_(smoothed, None, torch.tensor([[2.0, 0.5]]), beta1=0.75)
    assert smoothed.tolist() == [[1.25, 0.5]]


def test_without_uncertainty_the_mean_of_a_row_may_be_taken_first():
    """LoSparse keeps one number a row: both rules are linear in the sensitivity."""
    full, rows = torch.zeros(2, 5, 7, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    for step in range(13):
        value = torch.rand(5, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for (mean, smoothed), sample in ((full, value), (rows, value.mean(1))):
            if step % 4 == 0:
                scores.update_platon_(smoothed, None, mean, beta1=0.85)
            scores.update_mean_(mean, sample, step % 4 + 1)
    assert rows[1].any()
    torch.testing.assert_close(full.mean(2), rows)


def test_running_mean():
    mean = torch.tensor([9.0])
    for count, value in enumerate([3.0, 6.0, 0.0], 1):
        scores.update_mean_(mean, torch.tensor([value]), count)
    assert mean.tolist() == pytest.approx([3.0])


def test_plain_scores():
    weight, gradient = torch.tensor([-2.0, 3.0]), torch.tensor([4.0, -0.5])
    assert scores.magnitude(weight).tolist() == [2.0, 3.0]
    assert scores.sensitivity(weight, gradient).tolist() == [8.0, 1.5]
    assert weight.tolist() == [-2.0, 3.0]


def test_schedules_count_whole_steps():
    with pytest.raises(ValueError, match="total_steps is 10.0, expected a whole number"):
        schedules.Window(0.5, 10.0, 0, 5)  # type: ignore[arg-type]
