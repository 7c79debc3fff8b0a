"""Four training loops over a tiny LLaMA whose router starts with nearly all tokens at two of its eight experts.

A test with few steps and `make balancing` with many use them.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import mpoe
from mpoe.models import reset_usage, router_statistics, routers
from mpoe.nn import RouterStatistics
from tiny import WORDS, tiny_tokenizer

EXPERTS = 8
ROWS, LENGTH = 64, 12


def skewed_llama(**options: object) -> LlamaForCausalLM:
    """A mixture whose first two experts get nearly all assignments.

    All tokens have a component in common, and the router's first two rows point to it.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, eos_token_id=1))
    with torch.no_grad():
        dense.model.embed_tokens.weight.normal_()
        dense.model.embed_tokens.weight[:, 0] += 3.0
    model = mpoe.upcycle(dense, mpoe.MPOEConfig(num_experts=EXPERTS, **options))
    with torch.no_grad():
        (router,) = routers(model).values()
        router.weight *= 0.4
        router.weight[:, 0] = 0.8 * torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
        if router.balancing is not None:
            router.balancing.reset(router.weight)
    return model.train()


def texts() -> list[str]:
    """Random words."""
    generator = torch.Generator().manual_seed(1)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (LENGTH,), generator=generator).tolist())
        for _ in range(ROWS)
    ]


def rows() -> list[dict[str, torch.Tensor]]:
    """The texts' tokens."""
    encoded = [torch.tensor(tiny_tokenizer()(text)["input_ids"]) for text in texts()]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in encoded]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def spread(model: nn.Module) -> RouterStatistics:
    """Load and gate mass over all rows, in evaluation."""
    reset_usage(model)
    with _evaluating(model):
        model(torch.stack([row["input_ids"] for row in rows()]))
    (statistics,) = router_statistics(model).values()
    return statistics


def trainer(model: nn.Module, folder: Path, steps: int, **options: object) -> None:
    """Transformers' Trainer with its default optimizer; its default rate unless `options` have one."""
    args = TrainingArguments(
        str(folder), max_steps=steps, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", **options,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows()).train()


def accumulation(model: nn.Module, folder: Path, steps: int) -> None:
    """The same with four micro-batches a step."""
    trainer(model, folder, steps, gradient_accumulation_steps=4, per_device_train_batch_size=4)


def sft_trainer(model: nn.Module, folder: Path, steps: int) -> None:
    """TRL's SFTTrainer with its defaults: it computes the loss outside of the model, under gradient checkpointing."""
    import datasets

    trl = pytest.importorskip("trl")  # which the oldest of our ranges do not suffice
    args = trl.SFTConfig(
        str(folder), max_steps=steps, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": texts()})
    trl.SFTTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer()).train()


def plain_loop(model: nn.Module, folder: Path, steps: int, learning_rate: float = 5e-5) -> None:
    """AdamW and `output.loss`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    data = rows()
    for step in range(steps):
        batch = [data[(8 * step + i) % ROWS] for i in range(8)]
        model(**{name: torch.stack([row[name] for row in batch]) for name in batch[0]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


LOOPS: dict[str, Callable[..., None]] = {
    "Trainer": trainer,
    "SFTTrainer": sft_trainer,
    "plain loop": plain_loop,
    "Trainer, 4 micro-batches": accumulation,
}
