"""The demo's real T5 (77 M parameters): the promises hold on weights that somebody trained."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import mpoe
from mpoe.cli.assets import cache_dir
from mpoe.models import count_parameters, sharing_experts

FOLDER = cache_dir() / "traceforge-t5-small-0.2.0"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}; `mpoe demo` makes it"),
]
TEXTS = [
    "Is the sentiment of this review positive or negative? A warm and witty film.",
    "translate English to German: The house is wonderful.",
    "Which is larger, a mouse or an elephant?",
]
LOAD = """
import sys, torch, mpoe
batch, labels, logits = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    assert torch.equal(mpoe.from_pretrained(sys.argv[1])(**batch, labels=labels).logits, logits)
"""


@pytest.fixture(scope="module")
def dense():
    return AutoModelForSeq2SeqLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def batch():
    return dict(AutoTokenizer.from_pretrained(FOLDER)(TEXTS, return_tensors="pt", padding=True))


LABELS = torch.tensor([[1465, 1], [2841, 1], [1465, 1]])


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch, labels=LABELS).logits


@pytest.mark.parametrize("layout", ["extended", "balanced"])
def test_the_function_is_preserved(dense, batch, layout):
    """Logits of this model reach 80, so 1e-4 is five parts in a million."""
    mixture = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(layout=layout))
    difference = (logits_of(mixture, batch) - logits_of(dense, batch)).abs().max().item()
    assert difference <= 1e-4
    generated = [model.generate(**batch, max_new_tokens=20) for model in (dense, mixture)]
    assert torch.equal(*generated)


def test_saved_loaded_in_a_fresh_process_equal(dense, batch, tmp_path):
    mixture = mpoe.upcycle(copy.deepcopy(dense))
    with torch.no_grad():
        for experts in sharing_experts(mixture).values():
            experts.offsets_V.normal_(std=0.01)
    mixture.save_pretrained(tmp_path, max_shard_size="200MB")
    torch.save((batch, LABELS, logits_of(mixture, batch)), tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)


def test_parameters(dense):
    count = count_parameters(mpoe.upcycle(copy.deepcopy(dense)))
    assert count.dense == 76_961_152
    # 16 layers of 3 matrices of 512 and 1024, 8 experts of rank 8; and a router with 8 rows in each layer
    assert count.total == 76_961_152 + 16 * 3 * 8 * 8 * (512 + 1024) + 16 * 8 * 512
