"""Multi-domain language modelling from scratch: a small GPT-2 trained dense, then continued as every variant.

    python benchmarks/language.py --data_dir DOMAINS --variant dense extended --stop 500

DOMAINS holds the texts NAME.train and NAME.valid of the domains. The tokenizer, the tokens and the dense checkpoint are
cached in --cache. A variant continues from the same checkpoint on the same batches. Prints, and writes to
`benchmarks/results/language`, the validation loss in nats per token (mean over the domains) and, for mixtures, the same
with the routing shuffled.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import mpoe
from harness import hardware, versions
from mpoe.models import reset_usage, router_statistics, routers, shuffled_routing, take_router_loss

DOMAINS = ("en", "py", "de", "fr", "es", "pl", "ru", "ja")
ROWS, CONTEXT, WARMUP = 32, 128, 100
VARIANTS: dict[str, mpoe.MPOEConfig | None] = {
    "dense": None,
    "extended": mpoe.MPOEConfig(),
    "extended, balancing loss": mpoe.MPOEConfig(balancing="loss"),
    "extended, frozen router": mpoe.MPOEConfig(frozen_router=True),
    "extended, gates of 1": mpoe.MPOEConfig(moe_type="none"),
    "adapter, no router": mpoe.MPOEConfig(moe_type="none", expert_activation="gelu"),
    "+Switch": mpoe.MPOEConfig(mpo_layers=(), balancing="loss"),
}


@dataclass(frozen=True)
class Setup:
    """One experiment; all of it is part of a result.

    Attributes:
        width: Of the model, count.
        layers: Count.
        vocabulary: Tokens of the byte-level BPE, count.
        base_steps: Steps of dense training at a constant rate before the variants, count.
        steps: Steps of a variant, over which its rate decays to a tenth by a cosine, count.
        base_rate: Peak learning rate of the dense training.
        rate: Peak learning rate of a variant.
        seed: Of the initial values, the order of the data, and the routers.
    """

    width: int = 128
    layers: int = 4
    vocabulary: int = 1024
    base_steps: int = 1000
    steps: int = 1500
    base_rate: float = 2e-3
    rate: float = 2e-3
    seed: int = 1


class Corpus:
    """The tokens of all domains.

    Args:
        folder: With NAME.train and NAME.valid.
        cache: Where the tokenizer and the tokens are kept.
        vocabulary: Count.
    """

    def __init__(self, folder: Path, cache: Path, vocabulary: int) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / f"tokenizer-{vocabulary}.json"
        if not file.is_file():
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train([str(folder / f"{name}.train") for name in DOMAINS], trainer)
            tokenizer.save(str(file))
        tokenizer = Tokenizer.from_file(str(file))
        self.tokens = {
            (name, split): self._read(folder / f"{name}.{split}", cache, tokenizer, vocabulary)
            for name in DOMAINS
            for split in ("train", "valid")
        }

    @staticmethod
    def _read(file: Path, cache: Path, tokenizer: Tokenizer, vocabulary: int) -> np.ndarray:
        kept = cache / f"{file.name}.{vocabulary}.npy"
        if not kept.is_file():
            text = file.read_text(encoding="utf-8")
            pieces = [text[start : start + 100_000] for start in range(0, len(text), 100_000)]
            ids = [np.array(piece.ids, dtype=np.uint16) for piece in tokenizer.encode_batch(pieces)]
            np.save(kept, np.concatenate(ids))
        return np.load(kept)

    def batch(self, step: int, seed: int) -> Tensor:
        """Return the training rows of a step, every domain as often: (ROWS, CONTEXT + 1)."""
        draw = np.random.default_rng((seed, step))
        rows = []
        for n in range(ROWS):
            tokens = self.tokens[DOMAINS[n % len(DOMAINS)], "train"]
            start = draw.integers(0, len(tokens) - CONTEXT - 1)
            rows.append(tokens[start : start + CONTEXT + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def validation(self, name: str, windows: int = 32) -> Tensor:
        """Return windows of a domain's validation text at equal distances: (windows, CONTEXT + 1)."""
        tokens = self.tokens[name, "valid"]
        starts = np.linspace(0, len(tokens) - CONTEXT - 2, windows).astype(int)
        return torch.from_numpy(np.stack([tokens[s : s + CONTEXT + 1].astype(np.int64) for s in starts]))


@dataclass
class Result:
    """What a run found.

    Attributes:
        variant: Its name.
        setup: The experiment.
        parameters: Count.
        losses: Validation loss, nats per token, by the number of steps.
        domains: The last of them for each domain.
        shuffled: The last of them with the routing shuffled; None without routers.
        load: The largest share of assignments that an expert has had in validation, by layer.
        gate_mass: Of the same expert.
        seconds_per_step: Mean wall-clock time, not measured on a quiet machine.
        machine: Hardware, versions and date.
    """

    variant: str
    setup: dict[str, Any]
    parameters: int
    losses: dict[int, float] = field(default_factory=dict)
    domains: dict[str, float] = field(default_factory=dict)
    shuffled: float | None = None
    load: list[float] = field(default_factory=list)
    gate_mass: list[float] = field(default_factory=list)
    seconds_per_step: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)


def new_model(setup: Setup) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights and no dropout."""
    torch.manual_seed(setup.seed)
    config = GPT2Config(
        vocab_size=setup.vocabulary, n_positions=CONTEXT, n_embd=setup.width, n_layer=setup.layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of the next tokens, nats."""
    logits = model(input_ids=rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus) -> dict[str, float]:
    """Return the validation loss of every domain, nats per token."""
    model.eval()
    losses = {name: loss_of(model, corpus.validation(name)).item() for name in DOMAINS}
    model.train()
    return losses


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    values = list(values)
    return sum(values) / len(values)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay on matrices of the base, none on experts, routers, biases and norms."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not any(part in name for part in ("offsets", "router"))
            (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(model: GPT2LMHeadModel, corpus: Corpus, setup: Setup, first: int, steps: int, result: Result) -> None:
    """Train for some steps; the base at a constant rate (`first` is 0), a variant with a decaying one."""
    peak = setup.rate if first else setup.base_rate
    optimizer = torch.optim.AdamW(groups(model), lr=peak, betas=(0.9, 0.95))
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / WARMUP)
        if first:
            rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * step / setup.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, corpus.batch(first + step, setup.seed))
        router_loss = take_router_loss(model)
        if router_loss is not None:
            loss = loss + router_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            result.domains = validate(model, corpus)
            result.losses[step + 1] = mean(result.domains.values())
            result.seconds_per_step = (time.perf_counter() - started) / (step + 1)
            print(f"{result.variant}: {step + 1} steps, {result.losses[step + 1]:.4f} nats, "
                  f"{result.seconds_per_step:.3f} s a step", flush=True)  # fmt: skip


def base_model(corpus: Corpus, setup: Setup, cache: Path) -> GPT2LMHeadModel:
    """Return the dense model that all variants continue from, trained if the cache does not have it."""
    model = new_model(setup)
    name = f"base-{setup.width}-{setup.layers}-{setup.vocabulary}-{setup.base_steps}-{setup.base_rate:g}-{setup.seed}"
    file = cache / f"{name}.pt"
    if not file.is_file():
        train(model, corpus, setup, 0, setup.base_steps, Result("base", asdict(setup), 0))
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def run(variant: str, corpus: Corpus, setup: Setup, cache: Path, stop: int) -> Result:
    """Continue the dense model as a variant."""
    model, config = base_model(corpus, setup, cache), VARIANTS[variant]
    if config is not None:
        model = mpoe.upcycle(model, config)
    result = Result(
        variant, asdict(setup), sum(p.numel() for p in model.parameters()), machine={**hardware(), **versions()}
    )
    train(model, corpus, setup, setup.base_steps, stop, result)
    if routers(model):
        reset_usage(model)
        validate(model, corpus)
        for statistics in router_statistics(model).values():
            fullest = statistics.share.index(max(statistics.share))
            result.load.append(round(statistics.share[fullest], 4))
            result.gate_mass.append(round(statistics.gate_mass[fullest], 4))
        with shuffled_routing(model, setup.seed):
            result.shuffled = mean(validate(model, corpus).values())
        print(f"{variant}: routing shuffled {result.shuffled:.4f} nats; largest load by layer {result.load}, its gate "
              f"mass {result.gate_mass}")  # fmt: skip
    return result


def main() -> None:
    """Run the variants that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(".cache/language"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language"))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["dense", "extended"])
    parser.add_argument("--rate", type=float, default=Setup.rate)
    parser.add_argument("--seed", type=int, default=Setup.seed)
    parser.add_argument("--stop", type=int, help="steps of a variant (default: all that its rate decays over)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setup = Setup(rate=args.rate, seed=args.seed)
    corpus = Corpus(args.data_dir, args.cache, setup.vocabulary)
    args.out.mkdir(parents=True, exist_ok=True)
    for variant in args.variant:
        result = run(variant, corpus, setup, args.cache, args.stop or setup.steps)
        name = f"{variant}-{setup.rate:g}-{setup.seed}-{args.stop or setup.steps}".replace(", ", "-").replace(" ", "-")
        (args.out / f"{name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
