"""BLEU against a corpus and Self-BLEU, against the formula that nltk and Texygen use, written out here."""

import math
import random
from collections import Counter

import pytest
from sacrebleu.metrics.bleu import BLEU

from mpoe.training.text_metrics import bleu_against_corpus, score_samples, self_bleu


def sentences(count, seed, shortest=0):
    """Sentences of few different words, so that n-grams repeat within and between them."""
    rng = random.Random(seed)
    return [" ".join(rng.choices("abcdefghijkl", k=rng.randint(shortest, 12))) for _ in range(count)]


def ngrams(tokens, n):
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu_by_hand(sample, references, max_order):
    """nltk's `sentence_bleu` with uniform weights and smoothing method 1 (epsilon 0.1), in per cent.

    bp · exp(mean of log p_n); p_n = clipped matches / max(1, n-grams), 0.1 / max(1, n-grams) without a match, and 0 in
    all if not even a word matches; bp = exp(1 - r/c) for a sentence of c words shorter than the closest reference, r.
    """
    tokens, references = sample.split(), [reference.split() for reference in references]
    logs = []
    for n in range(1, max_order + 1):
        counts = ngrams(tokens, n)
        matches = sum(min(count, max(ngrams(r, n)[gram] for r in references)) for gram, count in counts.items())
        if n == 1 and matches == 0:
            return 0.0
        logs.append(math.log((matches or 0.1) / max(1, counts.total())))
    closest = min((abs(len(r) - len(tokens)), len(r)) for r in references)[1]
    penalty = 1.0 if len(tokens) > closest else math.exp(1 - closest / len(tokens))
    return 100 * penalty * math.exp(sum(logs) / max_order)


@pytest.mark.parametrize("max_order", [1, 2, 4])
def test_bleu_against_corpus_is_nltks(max_order):
    samples = [*sentences(40, seed=1), "zebra", "a zebra", ""]
    references = sentences(10, seed=2, shortest=3)
    expected = [bleu_by_hand(sample, references, max_order) for sample in samples]
    assert min(expected) == 0
    assert len(set(expected)) > 10, "the cases differ"
    for sample, value in zip(samples, expected, strict=True):
        assert bleu_against_corpus([sample], references, max_order) == pytest.approx(value, rel=1e-12)
    assert bleu_against_corpus(samples, references, max_order) == pytest.approx(sum(expected) / len(samples), rel=1e-12)


@pytest.mark.parametrize("max_order", [2, 4])
def test_a_sentence_long_enough_scores_as_sacrebleus_own(max_order):
    references = sentences(25, seed=2)
    scorer = BLEU(
        max_ngram_order=max_order, smooth_method="floor", smooth_value=0.1, effective_order=False, tokenize="none"
    )
    for sample in sentences(20, seed=3, shortest=max_order):
        expected = scorer.sentence_score(sample, references).score
        assert bleu_against_corpus([sample], references, max_order) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("max_order", [1, 2, 4])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_self_bleu_leaves_each_sample_out(max_order, count):
    samples = sentences(count, seed=count, shortest=4)
    samples[:2] = ["e e", "a e e e e b"]  # the only one so short; the most of one word
    others = [samples[:i] + samples[i + 1 :] for i in range(count)]
    expected = [bleu_by_hand(sample, rest, max_order) for sample, rest in zip(samples, others, strict=True)]
    assert self_bleu(samples, max_order) == pytest.approx(sum(expected) / count, rel=1e-12)


def test_self_bleu_of_equal_and_of_disjoint_samples():
    assert self_bleu(["a b c a b"] * 3, 2) == pytest.approx(100)
    assert self_bleu(["a b c", "d e f", "g h i"], 2) == 0


def test_scores_draw_by_the_seed_and_say_of_what_they_are():
    samples, references = [*sentences(40, seed=1, shortest=2), "", " "], sentences(80, seed=2, shortest=2)
    scores = score_samples(samples, references, reference_size=10, self_bleu_size=20, seed=3)
    assert scores == score_samples(samples, references, 10, 20, seed=3)
    assert scores != score_samples(samples, references, 10, 20, seed=4)
    assert (scores.samples, scores.references, scores.self_bleu_samples) == (42, 10, 20)
    assert scores.empty_samples == 2
    assert scores.to_dict()["smoothing"] == "floor 0.1"
    everything = score_samples(samples, references, reference_size=1000, self_bleu_size=500, seed=3)
    assert (everything.references, everything.self_bleu_samples) == (80, 42)
    assert everything.bleu_4 == bleu_against_corpus(samples, references, 4)
    assert everything.bleu_2 > scores.bleu_2, "more references, more matches"


@pytest.mark.parametrize(
    ("samples", "references", "sizes", "message"),
    [
        ([], ["a"], (1, 2), "must each be >= 1; got 0 and 1"),
        (["a", "b"], [], (1, 2), "must each be >= 1; got 2 and 0"),
        (["a"], ["a"], (1, 2), "there must be >= 2; got 1"),
        (["a", "b"], ["a"], (0, 2), "got 0 and 2"),
        (["a", "b"], ["a"], (1, 1), "got 1 and 1"),
    ],
)
def test_too_little_is_refused(samples, references, sizes, message):
    with pytest.raises(ValueError, match=message):
        score_samples(samples, references, *sizes, seed=0)
