"""How good and how varied generated sentences are: BLEU against a corpus and Self-BLEU, as in Texygen.

Everything is in per cent, 0 to 100. A sentence's BLEU is sacrebleu's, with the smoothing and the treatment of short
sentences that Texygen's came with (nltk's `sentence_bleu` with method 1): equal weights for all orders, an order
without a match counts as 0.1 matches, and an order that the sentence is too short for as 0.1 of 1. Sentences are split
into tokens at white space, so samples and references must be tokenised alike beforehand.

Source: Texygen (Zhu et al., SIGIR 2018), §3.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.helpers import extract_all_word_ngrams

SMOOTHING = 0.1
"""Matches that an order without any counts as."""


@dataclass(frozen=True)
class TextScores:
    """What samples scored, and of what.

    Attributes:
        bleu_2: Mean BLEU-2 of the samples against the references, per cent.
        bleu_4: Mean BLEU-4, per cent.
        self_bleu_2: Mean BLEU-2 of a sample against all others, per cent; lower is more varied.
        samples: Scored samples, count.
        empty_samples: Those of them without a token, which score 0, count.
        references: References that each sample was compared with, count.
        self_bleu_samples: Samples that were compared with each other, count.
        seed: What references and samples were drawn with.
    """

    bleu_2: float
    bleu_4: float
    self_bleu_2: float
    samples: int
    empty_samples: int
    references: int
    self_bleu_samples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with how the numbers were computed."""
        return {**asdict(self), "smoothing": f"floor {SMOOTHING}", "tokenization": "white space"}


def score_samples(
    samples: Sequence[str], references: Sequence[str], reference_size: int, self_bleu_size: int, seed: int
) -> TextScores:
    """Score samples against references and each other.

    Args:
        samples: Generated sentences, at least 2.
        references: Sentences of the corpus, at least 1.
        reference_size: References to draw, without replacement; all if there are fewer. Count, >= 1.
        self_bleu_size: Samples to draw for Self-BLEU, likewise. Count, >= 2.
        seed: For both draws, which do not depend on each other.

    Raises:
        ValueError: Too few samples or references, or a size out of range.
    """
    if reference_size < 1 or self_bleu_size < 2:
        raise ValueError(
            f"reference_size must be >= 1 and self_bleu_size >= 2; got {reference_size} and {self_bleu_size}"
        )
    drawn = _draw(references, reference_size, seed)
    compared = _draw(samples, self_bleu_size, seed)
    return TextScores(
        bleu_2=bleu_against_corpus(samples, drawn, 2),
        bleu_4=bleu_against_corpus(samples, drawn, 4),
        self_bleu_2=self_bleu(compared, 2),
        samples=len(samples),
        empty_samples=sum(not sample.split() for sample in samples),
        references=len(drawn),
        self_bleu_samples=len(compared),
        seed=seed,
    )


def bleu_against_corpus(samples: Sequence[str], references: Sequence[str], max_order: int) -> float:
    """Mean BLEU of the samples, each with the whole corpus as its references.

    Args:
        samples: Generated sentences, at least 1; one without tokens scores 0.
        references: Sentences of the corpus, at least 1.
        max_order: The longest n-grams that count, >= 1.

    Returns:
        Per cent.

    Raises:
        ValueError: No samples or no references.
    """
    if not samples or not references:
        raise ValueError(f"samples and references must each be >= 1; got {len(samples)} and {len(references)}")
    most: Counter[tuple[str, ...]] = Counter()
    lengths = set()
    for counts, length in _ngrams(references, max_order):
        lengths.add(length)
        for ngram, count in counts.items():
            most[ngram] = max(count, most[ngram])
    return _mean(
        _bleu({ngram: min(count, most[ngram]) for ngram, count in counts.items()}, length, lengths, max_order)
        for counts, length in _ngrams(samples, max_order)
    )


def self_bleu(samples: Sequence[str], max_order: int) -> float:
    """Mean BLEU of each sample with all other samples as its references; 100 if all are equal.

    Args:
        samples: Generated sentences, at least 2; one without tokens scores 0.
        max_order: The longest n-grams that count, >= 1.

    Returns:
        Per cent; lower is more varied.

    Raises:
        ValueError: Fewer than 2 samples.
    """
    if len(samples) < 2:
        raise ValueError(f"Self-BLEU compares samples with each other, so there must be >= 2; got {len(samples)}")
    # Who leaves itself out still finds the highest count of the others: the second highest of all if its own is the
    # highest. So the n-grams are counted once, not once for each sample.
    most: Counter[tuple[str, ...]] = Counter()
    second: Counter[tuple[str, ...]] = Counter()
    lengths: Counter[int] = Counter()
    rows = _ngrams(samples, max_order)
    for counts, length in rows:
        lengths[length] += 1
        for ngram, count in counts.items():
            second[ngram] = max(second[ngram], min(count, most[ngram]))
            most[ngram] = max(count, most[ngram])
    scores = []
    for counts, length in rows:
        matches = {ngram: count if count < most[ngram] else second[ngram] for ngram, count in counts.items()}
        others = lengths.keys() if lengths[length] > 1 else lengths.keys() - {length}
        scores.append(_bleu(matches, length, others, max_order))
    return _mean(scores)


def _bleu(matches: dict[tuple[str, ...], int], length: int, others: Collection[int], max_order: int) -> float:
    """BLEU of one sentence: its n-grams as often as the references have them, its length, the references' lengths."""
    correct = [0] * max_order
    for ngram, count in matches.items():
        correct[len(ngram) - 1] += count
    score = BLEU.compute_bleu(
        correct=correct,
        # sacrebleu gives 0 to a sentence shorter than max_order, nltk counts one n-gram of an order that has none
        total=[max(1, length - n) for n in range(max_order)],
        sys_len=length,
        ref_len=min(others, key=lambda other: (abs(other - length), other)),
        smooth_method="floor",
        smooth_value=SMOOTHING,
        max_ngram_order=max_order,
    )
    return score.score


def _ngrams(sentences: Iterable[str], max_order: int) -> list[tuple[Counter[tuple[str, ...]], int]]:
    return [extract_all_word_ngrams(sentence, 1, max_order) for sentence in sentences]


def _mean(scores: Iterable[float]) -> float:
    scores = list(scores)
    return math.fsum(scores) / len(scores)


def _draw(sentences: Sequence[str], size: int, seed: int) -> Sequence[str]:
    generator = random.Random(seed)  # nosec B311  # no secret
    return generator.sample(sentences, size) if size < len(sentences) else sentences
