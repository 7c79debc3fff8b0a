"""Sliding windows against a plain loop: one forward for every token, with the context that the definition gives it."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mpoe.training.corpus import TokenizedText
from mpoe.training.perplexity import Perplexity, block_and_stride, perplexity, windows
from tiny import tiny_tokenizer


def tiny_gpt2(**options):
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 1, **options})).eval()


def one_by_one(model, tokens, block_size, stride, bos):
    """-log p of every token but an unpredictable first, each from a forward of its own."""
    prefix = [] if bos is None else [bos]
    length = block_size - len(prefix)
    nll = []
    for place in range(1 - len(prefix), len(tokens)):
        # The first window predicts `length` tokens; every further one begins `stride` tokens later.
        window = max(0, math.ceil((place + 1 - length) / stride))
        ids = torch.tensor([*prefix, *tokens[window * stride : place + 1]])
        with torch.no_grad():
            log_p = model(input_ids=ids[None, :-1]).logits[0, -1].log_softmax(-1)
        nll.append(-log_p[ids[-1]].item())
    return nll


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(
    ("num_tokens", "block_size", "stride", "batch_size"),
    [
        (41, 8, 4, 3),
        (41, 8, 7, 1),
        (41, 8, 1, 64),
        (40, 16, 8, 2),
        (5, 8, 4, 3),
        (8, 8, 4, 3),
        (2, 8, 4, 1),
        (9, 8, 3, 2),
    ],
)
def test_it_is_the_loop_over_tokens(num_tokens, block_size, stride, batch_size, bos):
    model, tokens = tiny_gpt2(), np.random.randint(2, 64, num_tokens).astype(np.int32)
    expected = one_by_one(model, tokens.tolist(), block_size, stride, bos)
    found = perplexity(
        model, TokenizedText(tokens, 7), block_size, stride, batch_size, bos, disable_tqdm=True
    )  # fmt: skip
    assert found.tokens == len(expected)
    assert found.nll == pytest.approx(sum(expected), rel=1e-5)
    assert found.metrics()["perplexity"] == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)
    assert found.metrics()["word_perplexity"] == pytest.approx(math.exp(sum(expected) / 7), rel=1e-3)


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("first", [0, 1])
def test_every_token_is_scored_once_with_enough_context(stride, first):
    scored = []
    for window in windows(53, 8, stride, first):
        assert window.end - window.start <= 8
        assert window.start == 0 or window.scored - window.start == 8 - stride
        scored += range(window.scored, window.end)
    assert scored == list(range(first, 53))


def test_a_perplexity_that_is_no_float_is_infinite():
    assert Perplexity(1e6, 10, 10).metrics()["perplexity"] == math.inf


def test_blocks_are_what_the_model_and_the_tokenizer_take():
    tokenizer = tiny_tokenizer()  # at most 128
    assert block_and_stride(tiny_gpt2(), tokenizer, None, None) == (16, 8)
    assert block_and_stride(tiny_gpt2(n_positions=4096), tokenizer, None, 5) == (128, 5)
    tokenizer.model_max_length = 10**30
    assert block_and_stride(tiny_gpt2(n_positions=4096), tokenizer, None, None) == (1024, 512)
    assert block_and_stride(tiny_gpt2(), tokenizer, 12, None) == (12, 6)
    with pytest.raises(ValueError, match="block_size must be at most the model's 16 positions; got 17"):
        block_and_stride(tiny_gpt2(), tokenizer, 17, None)
    with pytest.raises(ValueError, match="stride must be below block_size = 12; got 12"):
        block_and_stride(tiny_gpt2(), tokenizer, 12, 12)
