"""The metrics against their definitions written out, and at the edges where the libraries warn or give nan."""

import math

import numpy as np
import pytest
import sacrebleu
from scipy.stats import rankdata

from mpoe.training.metrics import METRICS, accuracy, bleu, compute_metrics, f1, matthews, pearson, spearman

CLASSIFICATION = [accuracy, f1, matthews]
REGRESSION = [pearson, spearman]


def f1_written_out(predictions, targets):
    hits = sum((p, t) == (1, 1) for p, t in zip(predictions, targets, strict=True))
    return 2 * hits / (sum(predictions == 1) + sum(targets == 1))


def matthews_written_out(predictions, targets):
    """The correlation of the two assignments as one-hot rows (Gorodkin 2004)."""
    one_hot = np.eye(max(*predictions, *targets) + 1)
    x, y = (one_hot[v] - one_hot[v].mean(axis=0) for v in (predictions, targets))
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


def pearson_written_out(predictions, targets):
    return np.corrcoef(predictions, targets)[0, 1]


def spearman_written_out(predictions, targets):
    return pearson_written_out(rankdata(predictions), rankdata(targets))


@pytest.mark.parametrize("num_rows", [9, 41, 341])
@pytest.mark.parametrize(
    ("metric", "oracle", "num_classes"),
    [
        (accuracy, lambda predictions, targets: np.mean(predictions == targets), 2),
        (accuracy, lambda predictions, targets: np.mean(predictions == targets), 3),
        (f1, f1_written_out, 2),
        (matthews, matthews_written_out, 2),
        (matthews, matthews_written_out, 3),
        (matthews, matthews_written_out, 5),
    ],
)
def test_classification_equals_its_definition(metric, oracle, num_classes, num_rows):
    rng = np.random.default_rng(num_rows)
    targets = rng.integers(num_classes, size=num_rows)
    predictions = np.where(rng.random(num_rows) < 0.6, targets, rng.integers(num_classes, size=num_rows))
    assert metric(predictions, targets) == pytest.approx(oracle(predictions, targets), abs=1e-12)


@pytest.mark.parametrize("num_rows", [3, 41, 341])
@pytest.mark.parametrize(("metric", "oracle"), [(pearson, pearson_written_out), (spearman, spearman_written_out)])
def test_correlation_equals_its_definition(metric, oracle, num_rows):
    rng = np.random.default_rng(num_rows)
    targets = np.round(rng.uniform(0, 5, num_rows), 1)
    predictions = np.round(np.clip(targets + rng.normal(size=num_rows), 0, 5) * 5) / 5  # with ties
    assert metric(predictions, targets) == pytest.approx(oracle(predictions, targets), abs=1e-12)


def test_cases_counted_by_hand():
    predictions, targets = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]  # TP 3, FP 1, FN 1, TN 1
    assert accuracy(predictions, targets) == pytest.approx(4 / 6)
    assert f1(predictions, targets) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert matthews(predictions, targets) == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert spearman([0, 1, 4], [0, 0.1, 5]) == pytest.approx(1)


@pytest.mark.parametrize("num_rows", [1, 9, 41])
def test_bleu_is_a_hundredth_of_sacrebleus(num_rows):
    rng = np.random.default_rng(num_rows)
    targets = [" ".join(rng.choice(list("abcdefg"), size=rng.integers(5, 30))) + " ." for _ in range(num_rows)]
    predictions = [text.replace("a", "b", 2).replace("g .", "g") for text in targets]
    expected = sacrebleu.BLEU(force=True).corpus_score(predictions, [targets]).score / 100
    assert 0.1 < expected < 1
    assert bleu(predictions, targets) == bleu(np.array(predictions), np.array(targets)) == pytest.approx(expected)


def test_bleu_counted_by_hand():
    # Of 1- to 4-grams 5 of 6, 3 of 5, 2 of 4 and 1 of 3 are right; nothing is too short.
    score = bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert score == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    # All are right, but 6 words are to match 9: the brevity penalty.
    assert bleu(["a b c d e f"], ["a b c d e f g h i"]) == pytest.approx(math.exp(1 - 9 / 6))


def test_bleu_at_the_ends_of_its_range():
    assert bleu(["a b c d .", "e f g h"], ["a b c d .", "e f g h"]) == 1.0
    assert type(bleu(["a b c d"], ["a b c d"])) is float
    assert bleu(["", ""], ["a b c d", "e"]) == 0.0
    assert bleu(["a"], [""]) == 0.0


@pytest.mark.parametrize("metric", [accuracy, f1, matthews, pearson, spearman])
def test_perfect_answers_score_exactly_one(metric):
    score = metric([0, 1, 1, 0, 1], [0, 1, 1, 0, 1])
    assert type(score) is float
    assert score == 1.0


@pytest.mark.parametrize(
    ("metric", "predictions", "targets"),
    [
        (f1, [0, 0, 0], [1, 0, 1]),
        (f1, [0, 0, 0], [0, 0, 0]),
        (matthews, [1, 1, 1], [1, 0, 1]),
        (matthews, [0, 0, 0], [0, 0, 0]),
        (matthews, [1, 0, 1], [1, 1, 1]),
        (matthews, [1], [1]),
        (pearson, [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]),  # the mean of three 0.1 is not 0.1
        (pearson, [1.0, 2.0, 3.0], [0.1, 0.1, 0.1]),
        (pearson, [2.0], [2.0]),
        (spearman, [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]),
    ],
)
def test_constant_answers_score_zero(metric, predictions, targets):
    assert metric(predictions, targets) == 0.0


@pytest.mark.parametrize("metric", CLASSIFICATION)
def test_unparsable_class_counts_as_the_wrong_one_of_two(metric):
    targets = [1, 1, 0, 0, 1, 0, 1]
    unparsable = [1, -1, -1, 0, 1, 0, 0]
    wrong = [1, 0, 1, 0, 1, 0, 0]
    assert metric(unparsable, targets) == metric(wrong, targets)


@pytest.mark.parametrize("metric", [accuracy, matthews])
def test_unparsable_class_of_three_is_never_worth_more_than_the_right_one(metric):
    targets = np.array([0, 1, 2, 2, 1, 0, 1])
    answers = np.array([0, 1, 2, 1, 1, 0, 2])
    for row in np.flatnonzero(answers == targets):
        unparsable = answers.copy()
        unparsable[row] = -1
        assert metric(unparsable, targets) < metric(answers, targets)


def test_nothing_parsable_does_not_pay():
    targets = [1, 1, 0, 0, 1]
    assert accuracy([-1] * 5, targets) == 0
    assert f1([-1] * 5, targets) == 0
    assert matthews([-1] * 5, targets) == pytest.approx(-1)
    assert matthews([-1] * 4, [0, 1, 2, 2]) < 0
    assert pearson([math.nan] * 4, [0, 1, 4, 5]) < 0
    assert spearman([math.nan] * 4, [0, 1, 4, 5]) < 0


@pytest.mark.parametrize("metric", REGRESSION)
def test_unparsable_score_counts_as_the_farther_end_of_the_scale(metric):
    targets = [0.4, 2.4, 2.6, 4.8, 3.0]
    assert metric([math.nan, math.nan, math.nan, math.nan, 3.0], targets) == metric([5, 5, 0, 0, 3], targets)


def test_compute_metrics_keeps_the_order_of_the_names():
    result = compute_metrics(["f1", "accuracy"], [1, 0, 1], [1, 1, 1])
    assert list(result.items()) == [("f1", pytest.approx(0.8)), ("accuracy", pytest.approx(2 / 3))]
    assert set(METRICS) == {"accuracy", "f1", "matthews", "pearson", "spearman", "bleu"}
    assert compute_metrics(["bleu"], ["a b c d"], np.array(["a b c d"])) == {"bleu": 1.0}


@pytest.mark.parametrize(
    ("names", "predictions", "targets", "message"),
    [
        (["accuracy", "rouge"], [1], [1], "metrics must be among accuracy, f1.*got rouge"),
        (["accuracy"], [1, 0], [1], r"shape \(N,\).*got \(2,\) and \(1,\)"),
        (["pearson"], [], [], r"N >= 1; got \(0,\)"),
        (["matthews"], [[1]], [[1]], r"shape \(N,\)"),
        (["f1"], [2, 1], [1, 1], "f1 needs the classes 0 and 1; got class 2"),
        (["bleu"], [2, 1], [1, 1], "bleu needs texts; got 2"),
        (["bleu"], ["a"], [math.nan], "bleu needs texts; got nan"),
        (["bleu"], [], [], r"N >= 1; got \(0,\)"),
        (["bleu"], ["a", "b"], ["a"], r"got \(2,\) and \(1,\)"),
    ],
)
def test_bad_input_is_one_line(names, predictions, targets, message):
    with pytest.raises(ValueError, match=message) as caught:
        compute_metrics(names, predictions, targets)
    assert "\n" not in str(caught.value)
