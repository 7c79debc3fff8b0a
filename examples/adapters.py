"""Two tasks on one base: train only experts and routers, save them as adapters, switch between them in place.

Usage: python examples/adapters.py MODEL [OUT]
MODEL is a folder with a T5, for instance the one that `mpoe demo` makes in ~/.cache/mpoe, or a name on the hub.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import mpoe

REVIEWS = ["A warm and witty film.", "Two hours that I will not get back.", "A marvel.", "Dull from start to end."]
TASKS = {"sentiment": ["positive", "negative", "positive", "negative"], "length": ["long", "long", "short", "long"]}


def main(path: str, out: str) -> None:
    """Train an adapter for each task, then load both onto a fresh base."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer([f"review: {review}" for review in REVIEWS], return_tensors="pt", padding=True)
    expected = {}
    for task, answers in TASKS.items():
        model = train(path, batch, tokenizer(answers, return_tensors="pt", padding=True).input_ids)
        mpoe.save_adapter(model, f"{out}/{task}")
        expected[task] = logits_of(model, batch)
        size = (Path(out) / task / "adapter_model.safetensors").stat().st_size
        print(f"{task}: {size / 1e6:.1f} MB in {out}/{task}, for a model of {model.num_parameters() * 4 / 1e6:.1f} MB")

    base = AutoModelForSeq2SeqLM.from_pretrained(path)
    for task in TASKS:
        mpoe.load_adapter(base, f"{out}/{task}", name=task)
    for task in TASKS:
        mpoe.set_adapter(base, task)  # in place: nothing is loaded again
        same = torch.equal(logits_of(base, batch), expected[task])
        print(f"{mpoe.active_adapter(base)}: logits are {'bitwise equal' if same else 'different'}")


def train(path: str, batch: dict, labels: torch.Tensor) -> torch.nn.Module:
    """Ten steps on the experts and routers; the base is frozen."""
    model = AutoModelForSeq2SeqLM.from_pretrained(path)
    model.requires_grad_(False)  # before upcycle: what it adds trains
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, stacks=["encoder"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(10):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Return the logits of the first token of an answer."""
    with torch.no_grad():
        return model.eval()(**batch, decoder_input_ids=torch.zeros(len(REVIEWS), 1, dtype=torch.long)).logits


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "out/adapters")
