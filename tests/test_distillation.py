"""The losses of distillation by hand-computed numbers, and the schedule of knowledge-aware pruning."""

import math

import pytest
import torch

from sparsebert.methods.maths import distillation as d
from sparsebert.methods.maths.schedules import Updates, kept_in_group

LN3 = math.log(3.0)


def test_soft_cross_entropy_is_divided_by_the_classes():
    # softmax(ln 3, 0) = (3/4, 1/4), the student's (0, 0) = (1/2, 1/2):
    # -(3/4 ln 1/2 + 1/4 ln 1/2) = ln 2, over 2 classes
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[LN3, 0.0]])
    assert float(d.soft_cross_entropy(student, teacher)) == pytest.approx(math.log(2) / 2)
    # Three classes of 1/3 each on both sides: ln 3 over 3 classes; the mean over a batch of two equal rows is the same.
    assert float(d.soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3))) == pytest.approx(LN3 / 3)


def test_soft_cross_entropy_with_a_temperature():
    # T = 2: the teacher's (2 ln 3, 0) / 2 = (3/4, 1/4), the student's (0, 2 ln 3) / 2 = (1/4, 3/4):
    # -(3/4 ln 1/4 + 1/4 ln 3/4) = 3/4 ln 4 + 1/4 ln 4/3 = ln 4 - 1/4 ln 3, over 2 classes, without a factor T^2
    student, teacher = torch.tensor([[0.0, 2 * LN3]]), torch.tensor([[2 * LN3, 0.0]])
    expected = (math.log(4) - LN3 / 4) / 2
    assert float(d.soft_cross_entropy(student, teacher, 2.0)) == pytest.approx(expected)


def test_kl_divergence_has_the_squared_temperature():
    # The same (3/4, 1/4) and (1/4, 3/4): KL = 3/4 ln 3 + 1/4 ln 1/3 = 1/2 ln 3; times T^2 = 4
    student, teacher = torch.tensor([[0.0, 2 * LN3]]), torch.tensor([[2 * LN3, 0.0]])
    assert float(d.kl_divergence(student, teacher, 2.0)) == pytest.approx(2 * LN3)
    # A second row that agrees: the mean over the batch is half of it.
    more = torch.cat([student, student]), torch.cat([teacher, student])
    assert float(d.kl_divergence(*more, 2.0)) == pytest.approx(LN3)
    assert float(d.kl_divergence(teacher, teacher)) == pytest.approx(0.0, abs=1e-7)


def test_hidden_states_count_every_layer_with_its_own_mean():
    # (1 + 9) / 2 = 5 and 4 / 4 = 1
    student = [torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])]
    teacher = [torch.tensor([[0.0, 0.0]]), torch.zeros(2, 2)]
    assert float(d.hidden_state_loss(student, teacher)) == 6.0


def test_attention_scores_by_hand():
    # hidden 4 in 2 heads of 2; sqrt(2) under each product
    query = torch.tensor([[[1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]])
    key = torch.tensor([[[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 1.0, 1.0]]])
    scores = d.attention_scores(query, key, 2) * math.sqrt(2)
    # head 0: (1,2)(1,0) = 1, (1,2)(0,3) = 6, (0,1)(1,0) = 0, (0,1)(0,3) = 3
    # head 1: (0,1)(2,0) = 0, (0,1)(1,1) = 1, (1,1)(2,0) = 2, (1,1)(1,1) = 2
    torch.testing.assert_close(scores[0], torch.tensor([[[1.0, 6.0], [0.0, 3.0]], [[0.0, 1.0], [2.0, 2.0]]]))
    with pytest.raises(ValueError, match=r"query has shape \(2, 4\), expected \(batch, tokens, hidden\)"):
        d.attention_scores(query[0], key[0], 2)
    with pytest.raises(ValueError, match="a multiple of 3 heads"):
        d.attention_scores(query, key, 3)


def test_low_scores_count_as_zero_on_each_side_by_itself():
    student = torch.tensor([-100.0, -99.0, -10000.0, 3.0]).view(1, 1, 1, 4)
    teacher = torch.tensor([2.0, -101.0, -200.0, 1.0]).view(1, 1, 1, 4)
    # as seen: (0, -99, 0, 3) and (2, 0, 0, 1): (4 + 9801 + 0 + 4) / 4
    assert float(d.attention_score_loss([student], [teacher])) == 9809 / 4


def test_padding_is_no_difference_but_counts_in_the_mean():
    student = torch.tensor([[1.0, 5.0], [2.0, 7.0]]).view(1, 1, 2, 2)
    teacher = torch.zeros(1, 1, 2, 2)
    # The second key is padding: (1 + 4) over all four entries.
    assert float(d.attention_score_loss([student], [teacher], torch.tensor([[1, 0]]))) == 1.25
    # Two layers are summed.
    assert float(d.attention_score_loss([student] * 2, [teacher] * 2, torch.tensor([[1, 0]]))) == 2.5
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 2\), expected \(batch, keys\)"):
        d.attention_score_loss([student], [teacher], torch.ones(1, 1, 2))


def test_masked_scores_take_no_gradient():
    student = torch.tensor([-100.0, 2.0, 3.0]).view(1, 1, 1, 3).requires_grad_()
    d.attention_score_loss([student], [torch.ones(1, 1, 1, 3)], torch.tensor([[1, 1, 0]])).backward()
    # 2 (2 - 1) / 3 at the one that both see
    assert student.grad.flatten().tolist() == pytest.approx([0.0, 2 / 3, 0.0])


@pytest.mark.parametrize(
    "loss",
    [d.kl_divergence, d.soft_cross_entropy, lambda s, t: d.hidden_state_loss([s], [t])],
    ids=["kl_divergence", "soft_cross_entropy", "hidden_state_loss"],
)
def test_only_the_student_learns_and_float64_stays(loss):
    student, teacher = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float64 and value.shape == ()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    # Small types are widened before anything is subtracted.
    assert loss(student.bfloat16(), teacher.half()).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_state_loss: 1 tensors of the student and 2 of the teacher"):
        d.hidden_state_loss([torch.zeros(1)], [torch.zeros(1)] * 2)
    with pytest.raises(ValueError, match="hidden_state_loss: 0 tensors"):
        d.hidden_state_loss([], [])
    with pytest.raises(ValueError, match=r"soft_cross_entropy: student gives \(2, 3\), teacher \(2, 4\)"):
        d.soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4))


def test_the_schedule_by_hand():
    # T = 10, 5 updates: f = 2, C = 5; after 2 steps c = 1: 1 - 0.8 (1 - (4/5)^3) = 1 - 0.8 * 0.488 = 0.6096
    schedule = Updates(0.2, 10, updates=5)
    assert [step for step in range(20) if schedule.due(step)] == [2, 4, 6, 8, 10]
    assert [schedule.remaining(step) for step in (0, 1, 2, 3)] == pytest.approx([1.0, 1.0, 0.6096, 0.6096])
    # c = 4: 1 - 0.8 (1 - 1/125) = 0.2064, then exactly the target
    assert schedule.remaining(8) == pytest.approx(0.2064) and schedule.remaining(10) == 0.2
    # The same descent in 10 of 13 steps, and three steps at the target.
    ended = Updates(0.2, 13, updates=5, end=3)
    assert [ended.remaining(step) for step in range(14)] == [schedule.remaining(step) for step in range(14)]


@pytest.mark.parametrize(
    ("steps", "every", "count"),
    # The published code counts as here, but makes 99 updates in 500 steps and divides by zero at 50. 250 / 100 and
    # 350 / 100 are halves, which go to the even number.
    [(500, 5, 100), (249, 2, 124), (1234, 12, 102), (84612, 846, 100), (50, 1, 50), (250, 2, 125), (350, 4, 87)]
    + [(1, 1, 1)],
)
def test_how_many_updates_there_are(steps, every, count):
    schedule = Updates(0.05, steps)
    due = [step for step in range(steps + 1) if schedule.due(step)]
    assert (schedule.every, len(due), schedule.count) == (every, count, count)
    assert due[-1] == schedule.last <= steps
    kept = [schedule.remaining(step) for step in due]
    assert kept == sorted(kept, reverse=True) and kept[-1] == schedule.remaining(steps) == 0.05


@pytest.mark.parametrize("n", range(1, 16))
@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_the_schedule_ends_at_n_of_m(n, m):
    if n < m:
        schedule = Updates(n / m, 1000)
        kept = [kept_in_group(schedule.remaining(step) - 0.5 / m, n, m) for step in range(1001)]
        assert kept[0] == m and kept == sorted(kept, reverse=True)
        # Long before the end, so that the weights that stay can make up for the others.
        assert kept[900] == kept[-1] == n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": 0.0}, "final fraction is 0.0"),
        ({"updates": 0}, "updates is 0"),
        ({"end": 10}, "the end takes 10 steps, expected fewer than the 10"),
        ({"end": -1}, "end -1 steps"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Updates(**{"final": 0.5, "total_steps": 10, **options})
