"""What a router cannot see is told to it: the padding of a model's inputs, and how they begin.

A router sees hidden states only. So a hook on every Transformers model that holds mixtures, also on one inside of
another (the model without its head; of an encoder-decoder only these, its stacks), hands over which tokens are real
before they run.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mpoe.nn import MoEFeedForward
from mpoe.nn.grouped import is_known_to_host

PREFIX_TOKENS = 4


def add_padding_hooks(model: PreTrainedModel) -> None:
    """Hand the attention mask of every forward, and the prefixes, to the mixtures; a second call changes nothing.

    The mask stays with a mixture until the next forward, because gradient checkpointing computes a layer again during
    the backward pass.

    Args:
        model: An upcycled model.
    """
    is_encoder_decoder = model.config.is_encoder_decoder
    for stack in model.modules():
        if not isinstance(stack, PreTrainedModel) or not _mixtures(stack, is_encoder_decoder):
            continue
        parameters = list(inspect.signature(stack.forward).parameters)
        places = {name: parameters.index(name) for name in ("input_ids", "attention_mask") if name in parameters}
        is_decoder = is_encoder_decoder and getattr(stack, "is_decoder", "Decoder" in type(stack).__name__)
        ends = _end_tokens(model.config) if is_decoder else None
        hooks = stack._forward_pre_hooks.values()
        if not any(isinstance(hook, partial) and hook.func is _set_token_masks for hook in hooks):
            stack.register_forward_pre_hook(
                partial(_set_token_masks, places=places, ends=ends, own=is_encoder_decoder), with_kwargs=True
            )


def _end_tokens(config: PreTrainedConfig) -> list[int]:
    """The tokens after which a target has ended."""
    tokens = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [token for token in (config.pad_token_id, *tokens) if token is not None]


def _mixtures(stack: nn.Module, own: bool) -> list[MoEFeedForward]:
    """The mixtures of a model; if `own`, without those of models inside of it."""
    found: list[MoEFeedForward] = []
    for child in stack.children():
        if isinstance(child, MoEFeedForward):
            found.append(child)
        elif not (own and isinstance(child, PreTrainedModel)):
            found += _mixtures(child, own)
    return found


@torch.no_grad()
def _prefix(stack: Any, token_ids: Tensor) -> Tensor:
    """How every input begins, (B, D): the sum of its first embeddings, weighed so that their order counts."""
    first = stack.get_input_embeddings()(token_ids[:, :PREFIX_TOKENS]).float()
    weight = torch.arange(1, first.shape[1] + 1, dtype=first.dtype, device=first.device)
    return torch.einsum("bsd,s->bd", first, weight)


def _set_token_masks(
    stack: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    places: dict[str, int],
    ends: list[int] | None,
    own: bool,
) -> None:
    given = {name: args[place] for name, place in places.items() if place < len(args)} | kwargs
    mask, token_ids = given.get("attention_mask"), given.get("input_ids")
    mixtures = _mixtures(stack, own)
    by_prefix = [mixture for mixture in mixtures if mixture.routing == "prefix"]
    if by_prefix:
        prefix = None if token_ids is None else _prefix(stack, token_ids)
        for mixture in by_prefix:
            mixture.prefix = prefix
    if mask is None and ends is not None and isinstance(token_ids, Tensor):
        # Transformers pads targets without a mask. After the target's last token, which is an input too, there is
        # nothing to say; the first input may be one of these tokens, and is real.
        mask = torch.isin(token_ids, torch.tensor(ends, device=token_ids.device), invert=True)
        mask[:, 0] = True
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point()):
        return  # what a model around this one has made of the mask, which it has handed over itself
    if mask is not None and is_known_to_host(mask.device) and bool(mask.all()):
        mask = None  # spares the routers what changes nothing
    for mixture in mixtures:
        mixture.token_mask = None if mask is None else mask.bool()
