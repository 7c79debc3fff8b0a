"""Transformers' own engines run a saved mixture, in a process that has done no more than `import mpoe`."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mpoe
from tiny import WORDS
from tiny_families import tiny_model

PROMPT = "the film is"
PIPELINE = """
import json, sys
import mpoe
from transformers import pipeline
generator = pipeline("text-generation", sys.argv[1])
answer = generator(sys.argv[2], max_new_tokens=8, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
print(json.dumps([type(generator.model.get_submodule(sys.argv[3])).__name__, answer]))
"""


@pytest.mark.parametrize(("name", "feed_forward"), [("llama", "model.layers.1.mlp"), ("gpt2", "transformer.h.1.mlp")])
def test_pipeline_generates_with_a_saved_mixture(tmp_path, name, feed_forward):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = tiny_model(name)
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4))
    with torch.no_grad():
        for experts in mpoe.models.sharing_experts(model).values():
            experts.offsets_V.normal_()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = greedy(model, tokenizer(PROMPT, return_tensors="pt").input_ids, 8)

    command = [sys.executable, "-c", PIPELINE, str(tmp_path), PROMPT, feed_forward]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["MoEFeedForward", expected]


def greedy(model, ids, count):
    """The most probable tokens, each from a whole forward pass: no cache, no `generate`."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()
