"""Experts around a base in int8: train the experts, save them as an adapter, load it onto a fresh base in int8.

Usage: python examples/quantized.py MODEL TEXT [STEPS] [OUT]
MODEL is a folder with a causal language model and its tokenizer, or a name on the hub; TEXT a text file. The base is
quantised once and kept in OUT/base-int8. Then the same is done in int8 and in float32, each in a process of its own, so
that their memory can be compared. Needs torchao.
"""

import resource
import subprocess
import sys
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TorchAoConfig

import mpoe
from mpoe.models import memory_bytes

BLOCK, BATCH = 128, 1  # tokens, blocks
JOBS = ("train", "load")


def main(path: str, text: str, steps: int, out: str) -> None:
    """A process for each step, because on Linux a process begins with the peak memory of the one that started it."""
    quantized = f"{out}/base-int8"
    jobs = [(path, "quantize")]
    jobs += [(base, f"{job} {kind}") for base, kind in ((quantized, "int8"), (path, "float32")) for job in JOBS]
    for base, job in jobs:
        subprocess.run([sys.executable, __file__, base, text, str(steps), out, job], check=True)


def quantize(path: str, out: str) -> None:
    """Write the base in int8, with its tokenizer."""
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(f"{out}/base-int8")
    AutoTokenizer.from_pretrained(path).save_pretrained(f"{out}/base-int8")


def run(path: str, text: str, steps: int, out: str, kind: str) -> None:
    """Train and save, and say what memory that took."""
    blocks = blocks_of(path, text)
    model = load(path)
    print(f"{kind}: parameters and buffers of the base {memory_bytes(model) / 1e6:.0f} MB")
    model.requires_grad_(False)  # before upcycle: what it adds trains
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=8))
    print(f"{kind}: of the mixture {memory_bytes(model) / 1e6:.0f} MB; peak memory so far {peak_bytes() / 1e6:.0f} MB")
    train(model, blocks, steps)
    print(f"{kind}: peak memory with training {peak_bytes() / 1e6:.0f} MB")

    folder = mpoe.save_adapter(model, f"{out}/{kind}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{kind}: adapter of {size / 1e6:.0f} MB")
    torch.save(logits_of(model, blocks), f"{out}/{kind}/logits.pt")


def run_again(path: str, text: str, out: str, kind: str) -> None:
    """Load the adapter onto a fresh base and compare the logits with those of the model that was trained."""
    model = mpoe.load_adapter(load(path), f"{out}/{kind}")
    same = torch.equal(logits_of(model, blocks_of(path, text)), torch.load(f"{out}/{kind}/logits.pt"))
    print(f"{kind}: on a fresh base, in a new process, logits are {'equal' if same else 'different'}")


def load(path: str) -> PreTrainedModel:
    """The base, as it is in its folder."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def blocks_of(path: str, text: str) -> torch.Tensor:
    """The text's tokens in blocks of equal length, (blocks, BLOCK); what is left over is dropped."""
    ids = AutoTokenizer.from_pretrained(path)(Path(text).read_text(encoding="utf-8"), verbose=False).input_ids
    blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    if len(blocks) < BATCH:
        sys.exit(f"{text} must have at least {BATCH * BLOCK} tokens; it has {len(ids)}")
    return blocks


def train(model: PreTrainedModel, blocks: torch.Tensor, steps: int) -> None:
    """Train in a plain loop."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(1, steps + 1):
        batch = blocks[torch.randperm(len(blocks), generator=generator)[:BATCH]]
        loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step in (1, steps):
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)


def logits_of(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Of the first block."""
    with torch.no_grad():
        return model.eval()(input_ids=blocks[:1], attention_mask=torch.ones_like(blocks[:1])).logits


def peak_bytes() -> int:
    """The largest resident memory of this process so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    path, text, steps, out, job = [*sys.argv[1:], *["50", "out/quantized", ""][len(sys.argv) - 3 :]]
    if job == "quantize":
        quantize(path, out)
    elif job.startswith("train "):
        run(path, text, int(steps), out, job.removeprefix("train "))
    elif job.startswith("load "):
        run_again(path, text, out, job.removeprefix("load "))
    else:
        main(path, text, int(steps), out)
