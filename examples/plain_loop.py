"""Upcycle a T5 and train it in a plain PyTorch loop; no Trainer, no Accelerate.

Usage: python examples/plain_loop.py MODEL [OUT]
MODEL is a folder with a T5, for instance the one that `mpoe demo` makes in ~/.cache/mpoe, or a name on the hub.
"""

import sys

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import mpoe
from mpoe.models import count_parameters, expert_shares, reset_usage

REVIEWS = ["A warm and witty film.", "Two hours that I will not get back.", "A marvel.", "Dull from start to end."]
LABELS = ["positive", "negative", "positive", "negative"]


def main(path: str, out: str) -> None:
    """Train for ten steps on four sentences, save, load, compare."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSeq2SeqLM.from_pretrained(path)
    model = mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, stacks=["encoder"]))
    count = count_parameters(model)
    print(f"{count.dense:,} parameters before, {count.total:,} now, {count.whole_experts:,} with whole experts")

    batch = tokenizer([f"sentiment sentence: {review}" for review in REVIEWS], return_tensors="pt", padding=True)
    labels = tokenizer(LABELS, return_tensors="pt", padding=True).input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    reset_usage(model)  # counts tokens per expert from here
    for step in range(10):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    for name, shares in expert_shares(model).items():
        print(name, " ".join(f"{share:.0%}" for share in shares))

    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    loaded = mpoe.from_pretrained(out)
    with torch.no_grad():
        same = torch.equal(loaded(**batch, labels=labels).logits, model(**batch, labels=labels).logits)
    print(f"saved to {out}; loaded, its logits are {'bitwise equal' if same else 'different'}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "plain-loop-out")
