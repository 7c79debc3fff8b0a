"""What trains and how fast: parts of a model frozen or not, and parameter groups with rates of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel, Trainer, TrainingArguments

from mpoe.models import component_modules, routers, sharing_experts
from mpoe.nn import DenseExperts, ExtendedExperts, MPOExperts

PARTS = ("central tensors", "auxiliary tensors", "whole experts", "routers", "embeddings and head", "layer norms")
OTHER = "attention and the rest"


@dataclass(frozen=True)
class Freezing:
    """What stays as it is; the fields are the command line's.

    Attributes:
        freeze_model: All but MPOs, experts and routers.
        freeze_encoder: All of the encoder. An encoder with a head of its own (BERT) is all but that head.
        freeze_embeds: The word embedding, those of positions and token types beside it, and the language-model head.
        freeze_model_but_lm_head: All but the head.
        unfreeze_lm_head: The head trains, whatever the others say. A classification head always does.
        unfreeze_layer_norms: So do the layer norms.
        tensor_learn: Central tensors are frozen: MPOP's lightweight fine-tuning.
        update_mpo_layer: Components whose MPOs, experts and routers train, of `mpoe.config.COMPONENTS`; None is all.
        train_AT_index: Sites whose auxiliary tensors train, from 0, the central site counted; None is all.
    """

    freeze_model: bool = False
    freeze_encoder: bool = False
    freeze_embeds: bool = False
    freeze_model_but_lm_head: bool = False
    unfreeze_lm_head: bool = False
    unfreeze_layer_norms: bool = False
    tensor_learn: bool = False
    update_mpo_layer: tuple[str, ...] | None = None
    train_AT_index: tuple[int, ...] | None = None  # noqa: N815  # the reference spells it so

    def apply(self, model: PreTrainedModel) -> None:
        """Set `requires_grad` of every parameter.

        Args:
            model: Dense or upcycled.

        Raises:
            ValueError: Nothing is left to train, or a flag is about MPOs or the encoder and the model has none.
        """
        mpos = sharing_experts(model).values()
        for flag in ("tensor_learn", "train_AT_index"):
            if not mpos and getattr(self, flag) not in (False, None):
                raise ValueError(f"{flag} is about MPOs; the model has none. Leave it out, or see mpo_layers")
        if self.freeze_model or self.freeze_model_but_lm_head:
            model.requires_grad_(False)
        components = component_modules(model)
        if self.freeze_model and not self.freeze_model_but_lm_head:
            for modules in components.values():
                for module in modules.values():
                    module.requires_grad_(True)
        if self.freeze_encoder:
            encoder = _encoder(model)
            for module in (encoder, encoder.get_input_embeddings()):  # which is not the encoder's own if it is an MPO
                module.requires_grad_(False)
        language_model_head = model.get_output_embeddings()
        if self.freeze_embeds:
            for module in (model.get_input_embeddings(), *_embeddings(model), language_model_head):
                if module is not None:
                    module.requires_grad_(False)
        # A classification head starts anew: without it, nothing is learned.
        if self.unfreeze_lm_head or self.freeze_model_but_lm_head or language_model_head is None:
            for module in _heads(model):
                module.requires_grad_(True)
        if self.unfreeze_layer_norms:
            for name, parameter in model.named_parameters():
                if _is_layer_norm(name):
                    parameter.requires_grad_(True)
        if self.update_mpo_layer is not None:
            for component in components.keys() - set(self.update_mpo_layer):
                for module in components[component].values():
                    module.requires_grad_(False)
        for experts in mpos:
            if self.tensor_learn and experts.central is not None:
                experts.central.requires_grad_(False)
            if self.train_AT_index is not None:
                self._choose_auxiliary(experts)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("something must be left to train; these flags freeze the whole model")

    def _choose_auxiliary(self, experts: MPOExperts | ExtendedExperts) -> None:
        sites, chosen = experts.auxiliary, self.train_AT_index or ()
        if not set(chosen) <= sites.keys():
            raise ValueError(
                f"train_AT_index must name auxiliary sites, of {list(sites)}; got {list(chosen)}. The site between "
                "them is the central tensor, which tensor_learn is about"
            )
        for site, tensor in sites.items():
            if site not in chosen:
                tensor.requires_grad_(False)


@dataclass(frozen=True)
class TrainedPart:
    """One line of the table of what trains.

    Attributes:
        name: What the parameters are.
        trained: Those that require a gradient, count.
        total: All of them, count.
        learning_rate: Peak.
    """

    name: str
    trained: int
    total: int
    learning_rate: float


def trained_parts(model: PreTrainedModel, learning_rate: float, mpo_lr: float | None) -> list[TrainedPart]:
    """What of a model trains, and at which rate; parts that the model has not are left out.

    Args:
        model: After `Freezing.apply`.
        learning_rate: Of everything but MPOs.
        mpo_lr: As for `optimizer_for_mpos`; None is `learning_rate`.
    """
    part_of = {}
    for name, parameter in model.named_parameters():
        part_of[id(parameter)] = "layer norms" if _is_layer_norm(name) else OTHER
    for module in model.modules():
        if isinstance(module, DenseExperts | nn.Embedding):
            kind = "whole experts" if isinstance(module, DenseExperts) else "embeddings and head"
            part_of |= {id(p): kind for p in module.parameters()}
    for head in _heads(model):
        part_of |= {id(p): "embeddings and head" for p in head.parameters()}
    for router in routers(model).values():
        part_of |= {id(p): "routers" for p in router.parameters()}
    for experts in sharing_experts(model).values():
        part_of |= {id(p): "auxiliary tensors" for p in experts.auxiliary.values()}
        part_of |= {id(experts.central): "central tensors"} if experts.central is not None else {}
    rates: dict[str, float] = {} if mpo_lr is None else dict.fromkeys(("central tensors", "auxiliary tensors"), mpo_lr)
    if any(isinstance(experts, ExtendedExperts) for experts in sharing_experts(model).values()):
        rates.pop("central tensors", None)  # which are the base's own weights
    parts = []
    for part in (*PARTS, OTHER):
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if part_of[id(p)] == part]
        if sizes:
            trained = sum(size for size, trains in sizes if trains)
            total = sum(size for size, _ in sizes)
            parts.append(TrainedPart(part, trained, total, rates.get(part, learning_rate)))
    return parts


def optimizer_for_mpos(
    model: PreTrainedModel,
    args: TrainingArguments,
    mpo_lr: float | None = None,
    auxiliary_weight_decay: float | None = None,
    output_lr_ratio: float = 1.0,
) -> tuple[type, dict[str, Any]]:
    """Return the Trainer's optimizer with rates and weight decays of the MPOs' own: its `optimizer_cls_and_kwargs`.

    Args:
        model: After `Freezing.apply`.
        args: The Trainer's: which optimizer, its rate and weight decay.
        mpo_lr: Peak learning rate of central and auxiliary tensors, > 0; layout "extended": of the experts' U and V.
            None is the model's.
        auxiliary_weight_decay: Of auxiliary tensors, >= 0. None is the model's in the layout "balanced", where it pulls
            an expert back to the pre-trained layer, and 0 in the layout "extended".
        output_lr_ratio: Layout "extended": the rate of V over that of U, > 0.

    Raises:
        ValueError: A rate that is not positive, a negative decay, or a model without MPOs.
    """
    if mpo_lr is not None and not mpo_lr > 0:
        raise ValueError(f"mpo_lr must be > 0; got {mpo_lr}. --tensor_learn and --update_mpo_layer freeze MPOs")
    if auxiliary_weight_decay is not None and not auxiliary_weight_decay >= 0:
        raise ValueError(f"auxiliary_weight_decay must be >= 0; got {auxiliary_weight_decay}")
    if not output_lr_ratio > 0:
        raise ValueError(f"output_lr_ratio must be > 0; got {output_lr_ratio}")
    shared = sharing_experts(model).values()
    if not shared:
        raise ValueError(
            "mpo_lr, auxiliary_weight_decay and output_lr_ratio are about MPOs; the model has none. Leave them out"
        )
    extended = [experts for experts in shared if isinstance(experts, ExtendedExperts)]
    if output_lr_ratio != 1 and not extended:
        raise ValueError("output_lr_ratio is for layout 'extended'; the model has another. Leave it out")
    auxiliary = {id(p) for experts in shared for p in experts.auxiliary.values()}
    outputs = {id(experts.offsets_V) for experts in extended}
    factors = outputs | {id(experts.offsets_U) for experts in extended}
    mpo = auxiliary | {id(experts.central) for experts in shared if not isinstance(experts, ExtendedExperts)}
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]  # uses no self
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = mpo_lr if mpo_lr is not None and id(parameter) in mpo else args.learning_rate
            rate *= output_lr_ratio if id(parameter) in outputs else 1.0
            decay = args.weight_decay if name in decayed else 0.0
            if id(parameter) in factors:
                decay = 0.0
            if auxiliary_weight_decay is not None and id(parameter) in auxiliary:
                decay = auxiliary_weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    options["params"] = [
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    ]
    return optimizer, options


def _encoder(model: PreTrainedModel) -> Any:
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING:  # the families that read both ways
        return model.base_model
    raise ValueError(f"freeze_encoder is about an encoder; a {model.config.model_type} model has none. Leave it out")


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """The language-model head, or the modules that a classification model has beside its base."""
    head = model.get_output_embeddings()
    if head is not None:
        return [cast(nn.Module, head)]
    return [module for _, module in model.named_children() if module is not model.base_model]


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Tables outside of the blocks, which are numbered: of words, positions and token types, not T5's distances."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not re.search(r"\.\d+\.", name)
    ]


def _is_layer_norm(name: str) -> bool:
    return re.search(r"layer_?norm|(\b|_)norm\b|\bln_", name, re.IGNORECASE) is not None
