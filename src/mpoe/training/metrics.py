"""Scores of predictions against targets, as plain floats in [-1, 1].

An answer that could not be parsed (-1 for a class, nan for a score) counts as the worst possible answer to its row: the
next class after the target, which for two classes is the other one, or the end of the scale farther from the target. So
a model is never better off for not answering; and it may score below 0 in a correlation. Free text needs no parsing.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sacrebleu import corpus_bleu
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

SCALE = (0.0, 5.0)


def accuracy(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return the share of rows that are right.

    Args:
        predictions: Class indices, -1 for an unparsable answer, shape (N,).
        targets: Class indices, shape (N,).

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: If the shapes differ or there are no rows.
    """
    predicted, true = _classes(predictions, targets)
    return float(accuracy_score(true, predicted))


def f1(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return the F1 score of class 1 among two classes.

    Args:
        predictions: Class indices 0 and 1, -1 for an unparsable answer, shape (N,).
        targets: Class indices 0 and 1, shape (N,).

    Returns:
        Between 0 and 1; 0 if no row of class 1 is found.

    Raises:
        ValueError: If the shapes differ, there are no rows, or a class is neither 0 nor 1.
    """
    predicted, true = _classes(predictions, targets)
    if max(predicted.max(), true.max()) > 1:
        raise ValueError(f"f1 needs the classes 0 and 1; got class {max(predicted.max(), true.max())}; use accuracy")
    return float(f1_score(true, predicted, zero_division=0))  # pyright: ignore[reportArgumentType]


def matthews(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return Matthews' correlation coefficient; for more than two classes its generalisation R_K.

    Args:
        predictions: Class indices, -1 for an unparsable answer, shape (N,).
        targets: Class indices, shape (N,).

    Returns:
        Between -1 and 1; 0 if all predictions, or all targets, are one class.

    Raises:
        ValueError: If the shapes differ or there are no rows.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """
    predicted, true = _classes(predictions, targets)
    return 0.0 if _is_constant(predicted, true) else float(matthews_corrcoef(true, predicted))


def pearson(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return Pearson's correlation coefficient.

    Args:
        predictions: Scores in 0..5, nan for an unparsable answer, shape (N,).
        targets: Scores in 0..5, shape (N,).

    Returns:
        Between -1 and 1; 0 if all predictions, or all targets, are equal.

    Raises:
        ValueError: If the shapes differ or there are no rows.
    """
    predicted, true = _scores(predictions, targets)
    return 0.0 if _is_constant(predicted, true) else float(pearsonr(predicted, true)[0])  # pyright: ignore[reportArgumentType]


def spearman(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return Spearman's correlation: Pearson's of the ranks, where ties share the mean rank.

    Args:
        predictions: Scores in 0..5, nan for an unparsable answer, shape (N,).
        targets: Scores in 0..5, shape (N,).

    Returns:
        Between -1 and 1; 0 if all predictions, or all targets, are equal.

    Raises:
        ValueError: If the shapes differ or there are no rows.
    """
    predicted, true = _scores(predictions, targets)
    return 0.0 if _is_constant(predicted, true) else float(spearmanr(predicted, true)[0])  # pyright: ignore[reportArgumentType]


def bleu(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return the corpus BLEU of texts against one reference each, as sacrebleu computes it by default.

    Args:
        predictions: Texts, shape (N,).
        targets: Texts, shape (N,).

    Returns:
        Between 0 and 1: sacrebleu's score / 100.

    Raises:
        ValueError: If the shapes differ, there are no rows, or they are not texts.

    Source: Post, A call for clarity in reporting BLEU scores, 2018.
    """
    predicted, true = np.asarray(predictions), np.asarray(targets)
    _require_pairs(predicted, true)
    if odd := [text for text in (*predicted.tolist(), *true.tolist()) if not isinstance(text, str)]:
        raise ValueError(f"bleu needs texts; got {odd[0]!r}; use the metrics of classes or scores")
    # `force` only keeps sacrebleu from warning of texts with a blank before the full stop.
    score = corpus_bleu(predicted.tolist(), [true.tolist()], force=True).score
    return min(score / 100, 1.0)  # sacrebleu's best is 100.00000000000004


METRICS = {
    "accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman, "bleu": bleu,
}  # fmt: skip


def compute_metrics(names: Iterable[str], predictions: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """Return several metrics of the same predictions.

    Args:
        names: Keys of `METRICS`.
        predictions: As the metrics take them, shape (N,).
        targets: As the metrics take them, shape (N,).

    Returns:
        Each metric by its name, in the order of `names`.

    Raises:
        ValueError: If a name is unknown, the shapes differ or there are no rows.
    """
    names = list(names)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}; got {', '.join(unknown)}; correct the name")
    return {name: METRICS[name](predictions, targets) for name in names}


def _classes(predictions: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    predicted, true = np.asarray(predictions, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    _require_pairs(predicted, true)
    num_classes = max(2, predicted.max() + 1, true.max() + 1)
    return np.where(predicted < 0, (true + 1) % num_classes, predicted), true


def _scores(predictions: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    predicted, true = np.asarray(predictions, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    _require_pairs(predicted, true)
    low, high = SCALE
    farther_end = np.where(true < (low + high) / 2, high, low)
    return np.where(np.isnan(predicted), farther_end, predicted), true


def _require_pairs(predicted: NDArray, true: NDArray) -> None:
    if predicted.shape != true.shape or true.ndim != 1 or true.size == 0:
        raise ValueError(
            f"predictions and targets must both have shape (N,), N >= 1; got {predicted.shape} and {true.shape}; "
            "pass one prediction for each target"
        )


def _is_constant(predicted: NDArray[Any], true: NDArray[Any]) -> bool:
    """Whether a correlation is undefined, which counts as none."""
    return bool((predicted == predicted[0]).all() or (true == true[0]).all())
