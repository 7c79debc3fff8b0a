"""Which experts the tokens of a text go to, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpoe.models.router_loss import routers
from mpoe.nn import RouterOutput

MOST_TOKENS = 512
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class LayerChoice:
    """What one layer's router decided.

    Attributes:
        experts: Of every token, most probable first; one that dropped the token for want of room is left out.
        probability: Of every token's most probable expert, in [0, 1].
    """

    experts: list[list[int]]
    probability: list[float]


@dataclass(frozen=True)
class TokenRouting:
    """A text's tokens, and the experts of each.

    Attributes:
        title: "Text", or "Answer" for what an encoder-decoder's decoder read.
        pieces: Of every token, what stands before it (spaces), and itself.
        num_experts: Count.
        layers: By the layer's name, in the model's order.
        left_out: Tokens of the text's end that the model did not read, count.
    """

    title: str
    pieces: list[tuple[str, str]]
    num_experts: int
    layers: dict[str, LayerChoice] = field(default_factory=dict)
    left_out: int = 0


@torch.inference_mode()
def route_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[TokenRouting]:
    """Let a mixture read a text, and an encoder-decoder answer it, and note what its routers decide.

    Args:
        model: A mixture in evaluation mode.
        tokenizer: The model's.
        text: At most MOST_TOKENS tokens of it are read, or as many as the tokenizer says that the model can read.

    Returns:
        One for the text, and one for an answer if decoder layers have routers; those without layers are left out.

    Raises:
        ValueError: A model without routers, or a text without a token.
    """
    found = routers(model)
    if not found:
        raise ValueError("a text's tokens have experts in a mixture alone; this model has no routers")
    most = min(MOST_TOKENS, tokenizer.model_max_length)
    length = len(cast(Any, tokenizer)(text, verbose=False)["input_ids"])
    batch: Any = tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
    if not batch["input_ids"].numel():
        raise ValueError("the text must have a token; got an empty one")
    pieces = _pieces(tokenizer, batch, text)
    batch = batch.to(model.device)
    answer: dict[str, Any] = {}
    in_encoder: set[int] = set()
    if model.config.is_encoder_decoder:
        in_encoder = {id(module) for module in model.get_encoder().modules()}
        answer["decoder_input_ids"] = _answer(model, batch)
    decided: dict[str, RouterOutput] = {}

    def keep(name: str) -> Any:
        return lambda router, args, route: decided.__setitem__(name, route)

    handles = [router.register_forward_hook(keep(name)) for name, router in found.items()]
    try:
        model(**batch, **answer)
    finally:
        for handle in handles:
            handle.remove()
    experts = max(router.num_experts for router in found.values())
    texts = [TokenRouting("Text", pieces, experts, left_out=max(0, length - len(pieces)))]
    if answer:
        ids = answer["decoder_input_ids"][0].tolist()
        texts.append(TokenRouting("Answer", [(" ", _shown(tokenizer, token)) for token in ids], experts))
    for name, route in decided.items():
        of_answer = bool(answer) and id(found[name]) not in in_encoder
        texts[of_answer].layers[name] = _choice(route, len(texts[of_answer].pieces))
    return [routing for routing in texts if routing.layers]


def _answer(model: PreTrainedModel, batch: Any) -> torch.Tensor:
    """What an encoder-decoder writes, as its decoder reads it: a start token first, and no end."""
    written = cast(Any, model).generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False, num_beams=1)
    return written[:, :-1] if written.shape[1] > 1 else written


def _choice(route: RouterOutput, tokens: int) -> LayerChoice:
    kept = torch.ones_like(route.expert_index, dtype=torch.bool) if route.kept is None else route.kept
    experts = [
        [expert for expert, is_kept in zip(*of_token, strict=True) if is_kept]
        for of_token in zip(route.expert_index.tolist(), kept.tolist(), strict=True)
    ]
    probability = [round(p, 3) for p in route.probabilities.amax(dim=1).tolist()]
    times = tokens // len(experts)  # where a whole input is routed as one
    return LayerChoice(experts * times, probability * times)


def _pieces(tokenizer: PreTrainedTokenizerBase, batch: Any, text: str) -> list[tuple[str, str]]:
    """Of every token, the spaces before it and its own part of the text; of one that is no part of it, its name."""
    ids = batch["input_ids"][0].tolist()
    if not tokenizer.is_fast:
        return [(" ", _shown(tokenizer, token)) for token in ids]
    pieces, end = [], 0
    for position, token in enumerate(ids):
        span = batch.token_to_chars(0, position)
        if span is None or span.start == span.end:  # a token that the tokenizer has added
            pieces.append((" ", _shown(tokenizer, token)))
            continue
        piece = text[max(span.start, end) : span.end]
        before = text[end : max(span.start, end)] + piece[: len(piece) - len(piece.lstrip())]
        # bytes of one character may be tokens by themselves
        pieces.append((before, piece.strip() or _shown(tokenizer, token)))
        end = max(end, span.end)
    return pieces


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token)).replace("▁", "").replace("Ġ", "") or "␣"
