"""How far apart the logits of two models are: what an export or another change of a model costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

IGNORED = -100  # label of what is no target, as everywhere in Transformers


@dataclass(frozen=True)
class LogitDifference:
    """Of two models, over the places of a text where each gives logits: its tokens, or the texts of a classifier.

    Attributes:
        places: Count.
        largest: Of all absolute differences, in the logits' own unit, nats.
        mean: Of the same.
        kl: Mean over places of Σ p · log(p / q), p of the first model, q of the second, nats, >= 0.
        same_choice: The share of places where the largest logit is the same one's, in [0, 1].
        losses: The language-modelling losses of both models over the same text, nats per token; None where the batches
            have no next tokens (a classifier).
    """

    places: int
    largest: float
    mean: float
    kl: float
    same_choice: float
    losses: tuple[float, float] | None = None


@torch.inference_mode()
def logit_difference(
    first: PreTrainedModel, second: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> LogitDifference:
    """Run the same batches through two models.

    Args:
        first: In evaluation mode, as is the second.
        second: Of the same vocabulary or labels.
        batches: What both take: `input_ids`, `attention_mask` and, for an encoder-decoder, `labels`.

    Raises:
        ValueError: Logits that are not finite, or not a single place.
    """
    places, largest, total, kl, same, values = 0, 0.0, 0.0, 0.0, 0, 0
    losses, targets = [0.0, 0.0], 0
    for batch in batches:
        both = [_run(model, batch) for model in (first, second)]
        p, q = (_of_places(logits, batch) for logits in both)
        for name, logits in (("first", p), ("second", q)):
            if not logits.isfinite().all():
                raise ValueError(f"logits must be finite to be compared; those of the {name} model are not")
        apart = (p - q).abs()
        places, values = places + len(p), values + p.numel()
        largest, total = max(largest, apart.max().item()), total + apart.sum().item()
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
        if both[0].ndim == 3:
            labels = _next_tokens(first, batch)
            targets += int((labels != IGNORED).sum())
            for n, logits in enumerate(both):
                losses[n] += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum"
                ).item()
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
    if not places:
        raise ValueError("a text to compare logits over must have a token; it has none")
    means = (losses[0] / targets, losses[1] / targets) if targets else None
    return LogitDifference(places, largest, total / values, max(kl / places, 0.0), same / places, means)


def _run(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits, (batch, sequence, classes) or (batch, classes), in float64."""
    return cast(Any, model)(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.cpu().double()


def _of_places(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Those of the places that count, (places, classes)."""
    if logits.ndim < 3:
        return logits
    return logits[batch["labels"].cpu() != IGNORED if "labels" in batch else batch["attention_mask"].cpu().bool()]


def _next_tokens(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The label of every place, (batch, sequence): an encoder-decoder's own, else the next token of the text."""
    if model.config.is_encoder_decoder:
        return batch["labels"]
    tokens = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), IGNORED)
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
