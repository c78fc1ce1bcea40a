"""Scores of whole data sets: by hand, and as scikit-learn and scipy have them."""

from __future__ import annotations

import random

import pytest

from sparsebert.cli import metrics


def test_classification_by_hand():
    # Confusion (label, prediction): (0,0) 2, (0,1) 1, (1,0) 1, (1,1) 3.
    found = metrics.classification([0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1], 2)
    # F1 = 2 * 3 / (4 + 4); Matthews = (3 * 2 - 1 * 1) / sqrt(4 * 4 * 3 * 3).
    assert found == pytest.approx({"accuracy": 5 / 7, "f1": 0.75, "matthews": 5 / 12})


def test_regression_by_hand():
    # Deviations (-1, 0, 1) and (-1, 1, 0): 1 / 2. The tie shares rank 1.5: (1.5, 1.5, 3) against (1, 2, 3).
    assert metrics.regression([1, 2, 3], [1, 3, 2])["pearson"] == pytest.approx(0.5)
    assert metrics.regression([1, 1, 3], [1, 2, 3])["spearman"] == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_is_scikit_learn_s(classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    for _ in range(20):
        labels, predicted = ([draw.randrange(classes) for _ in range(30)] for _ in range(2))
        found = metrics.classification(labels, predicted, classes)
        assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
        assert found["matthews"] == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))
        assert ("f1" in found) == (classes == 2)
        if classes == 2:
            assert found["f1"] == pytest.approx(sklearn.f1_score(labels, predicted))


def test_regression_is_scipy_s():
    scipy = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for _ in range(20):
        # Whole numbers: many ties.
        labels, predicted = ([float(draw.randrange(6)) for _ in range(30)] for _ in range(2))
        found = metrics.regression(labels, predicted)
        assert found["pearson"] == pytest.approx(scipy.pearsonr(labels, predicted)[0])
        assert found["spearman"] == pytest.approx(scipy.spearmanr(labels, predicted)[0])


def test_what_has_no_correlation_scores_0():
    assert metrics.classification([0, 1], [0, 0], 2) == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}
    assert metrics.classification([0, 0], [0, 0], 2) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    assert metrics.regression([1, 2], [3, 3]) == {"pearson": 0.0, "spearman": 0.0}


def test_every_label_needs_a_prediction():
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        metrics.classification([0, 1], [0], 2)
    with pytest.raises(ValueError, match="0 predictions for 0 labels"):
        metrics.regression([], [])
