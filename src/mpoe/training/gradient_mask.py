"""The gradient mask: the update of a central tensor is discarded with a given probability, auxiliaries always move.

All experts of a layer send gradients to its central tensor, so it runs ahead of the auxiliary tensors; the mask slows
it down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mpoe.models import sharing_experts

LEVELS = ("tensor", "element")


class GradientMask:
    """Discards updates of central tensors, in any training loop.

    ```python
    mask = GradientMask(model, prob=0.5)
    for step, batch in enumerate(batches):
        loss = ...; loss.backward()
        mask.before_step(step, optimizer)
        optimizer.step()
        mask.after_step(optimizer)
    ```

    What is discarded is the update itself, not only its gradient: a zero gradient would still move a tensor by momentum
    and weight decay, and still decay the moments. Nothing is rescaled by 1 / (1 - prob). The draws depend on seed, step
    and the place of the tensor in the model alone, so ranks agree, and a resumed run repeats them.

    Args:
        model: Its central tensors that require a gradient are masked.
        prob: Probability p_b of a discarded update, in [0, 1].
        level: "tensor": one draw a step for a whole tensor, as in the paper's figure 2. "element": one for every
            element, as its eq. 4 reads; the optimizer's moments of the element are put back as they were, if they have
            the tensor's shape (Adafactor's factored ones do not).
        seed: >= 0.

    Attributes:
        drawn: Draws so far: tensor updates, or elements, that could have been discarded.
        discarded: Those that were.

    Raises:
        ValueError: A probability or level that makes no sense, or a model without a central tensor to mask.

    Source: MPOE (Gao et al., COLING 2022), §3.2, eq. 4 and algorithm 1.
    """

    def __init__(self, model: nn.Module, prob: float, level: str = "tensor", seed: int = 0) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f"gradient_mask_prob must be in [0, 1]; got {prob}")
        if level not in LEVELS:
            raise ValueError(f"gradient_mask_level must be one of {LEVELS}; got {level!r}")
        # The modules and not their tensors: sharding a model puts others in their place.
        self._masked = [
            experts
            for experts in sharing_experts(model).values()
            if experts.central is not None and experts.central.requires_grad
        ]
        if prob and not self._masked:
            raise ValueError(
                "a gradient mask needs a central tensor that trains; the model has none. Leave gradient_mask_prob out, "
                "or let mpo_layers and update_mpo_layer give it some"
            )
        self.prob = prob
        self.level = level
        self.seed = seed
        self.drawn = 0
        self.discarded = 0
        self._kept: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []

    @property
    def central(self) -> list[Tensor]:
        """The central tensors that are masked."""
        return [experts.central for experts in self._masked if experts.central is not None]

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Draw the masks of a step; to be called after clipping, right before `optimizer.step()`.

        Args:
            step: Optimizer steps done before this one, count.
            optimizer: It is only read.
        """
        rng = np.random.default_rng([self.seed, step])
        if self.level == "tensor":
            for tensor, draw in zip(self.central, rng.random(len(self.central)), strict=True):
                if tensor.grad is not None:
                    self.drawn += 1
                    if draw < self.prob:
                        self.discarded += 1
                        tensor.grad = None  # an optimizer leaves such a tensor, and its state, alone
            return
        for tensor, seed in zip(self.central, rng.integers(2**63, size=len(self.central)).tolist(), strict=True):
            if tensor.grad is not None:
                generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same
                mask = (torch.rand(tensor.shape, generator=generator) < self.prob).to(tensor.device)
                self.drawn += tensor.numel()
                self.discarded += int(mask.sum())
                moments = {name: moment[mask] for name, moment in _moments(optimizer, tensor).items()}
                self._kept.append((tensor, mask, tensor.detach()[mask], moments))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the discarded elements back; at level "tensor" there is nothing to do.

        Args:
            optimizer: The one that has stepped.
        """
        for tensor, mask, values, moments in self._kept:
            tensor[mask] = values
            for name, moment in _moments(optimizer, tensor).items():
                # a moment that was not there before the first step began at 0
                moment[mask] = moments.get(name, torch.zeros((), dtype=moment.dtype, device=moment.device))
        self._kept.clear()


def _moments(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of a tensor, element by element."""
    state = optimizer.state.get(tensor, {})
    return {name: s for name, s in state.items() if isinstance(s, Tensor) and s.shape == tensor.shape}


class GradientMaskCallback(TrainerCallback, ExportableState):
    """A `GradientMask` in Transformers' Trainer; its counts are part of a checkpoint.

    Args:
        mask: Of the model that is trained.
    """

    def __init__(self, mask: GradientMask) -> None:
        self.mask = mask

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; a resumed run has the counts of its checkpoint in `state`."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(saved, dict):
            self.mask.drawn, self.mask.discarded = (saved["attributes"][name] for name in ("drawn", "discarded"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after clipping."""
        self.mask.before_step(state.global_step, kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after the optimizer's step."""
        self.mask.after_step(kwargs["optimizer"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"drawn": self.mask.drawn, "discarded": self.mask.discarded}}
