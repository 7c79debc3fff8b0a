"""Load the model that is trained: dense, upcycled, with weights of another experiment over it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import deepspeed

from mpoe.config import MPOEConfig
from mpoe.models import (
    NO_CODE,
    clear_load_errors,
    component_modules,
    from_pretrained,
    is_upcycled,
    load_config,
    load_tokenizer,
    mpoe_config,
    upcycle,
)
from mpoe.training.arguments import ModelArguments, TrainableArguments

# Of a mixture's config, what its weights mean. A type says no more than its top_k; sites and ranks are seen in the
# weights, and so is the scale of the experts.
_FUNCTION = (
    "num_experts", "top_k", "layout", "gauge", "is_scale_prob", "expert_bias", "expert_activation", "router_input_norm",
    "routing", "balancing", "balancing_step",
)  # fmt: skip
# The families' names for dropout within the model. A head's own and whole layers' are other things.
_DROPOUTS = (
    "dropout_rate", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "mlp_dropout",
    "embedding_dropout", "resid_dropout", "embed_dropout", "resid_pdrop", "embd_pdrop", "emb_pdrop", "attn_pdrop",
    "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip


def load_model(
    arguments: ModelArguments,
    config: MPOEConfig | None,
    trainable: TrainableArguments | None = None,
    auto_class: Any = AutoModelForSeq2SeqLM,
    options: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and upcycle it if that is asked for and it is dense.

    Args:
        arguments: Which model, and what is loaded over it.
        config: What it becomes; None leaves it as it is.
        trainable: What of it trains; None is all.
        auto_class: Transformers' Auto class that loads it.
        options: For its `from_pretrained`: what the config says otherwise.

    Raises:
        ValueError: A folder that holds no model, or a name that no reachable hub has; a flag that does not fit it.
    """
    path = arguments.model_name_or_path
    components = arguments.components_to_load()
    freezing = None if trainable is None else trainable.freezing()
    overrides = {**(options or {}), **_dropout(path, config_of_model(path), arguments.dropout)}
    with clear_load_errors(path):
        try:
            model = auto_class.from_pretrained(path, **NO_CODE, **overrides)
        except RuntimeError as error:  # weights of other shapes, as of a head for other labels
            raise ValueError(f"its weights do not fit: {' '.join(str(error).split())[:300]}") from error
    tokenizer = load_tokenizer(arguments.tokenizer_name or path)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", len(tokenizer))
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer must be the model's; {arguments.tokenizer_name or path} has one of {len(tokenizer):,} "
            f"tokens, and the model's word embedding has {rows:,} rows: correct tokenizer_name, or resize the embedding"
        )
    if config is not None and not is_upcycled(model):
        upcycle(model, config)
    if arguments.load_experiment is not None:
        load_experiment(model, arguments.load_experiment, components)
    if freezing is not None:
        freezing.apply(model)
    return model, tokenizer


def config_of_model(path: str) -> PreTrainedConfig:
    """The config of what is to be trained.

    Args:
        path: As model_name_or_path.

    Raises:
        ValueError: A folder that holds no model, or a name that no reachable hub has.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"model_name_or_path must be a folder with a config.json; {path} has none")
    return load_config(path)


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Within it, models are loaded whole, though DeepSpeed's ZeRO-3 is to train them.

    Transformers would load them in parts, and upcycling reads whole matrices. DeepSpeed parts them as training begins.

    Args:
        args: The Trainer's.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


@torch.no_grad()
def load_experiment(model: PreTrainedModel, path: str, components: Sequence[str] | None = None) -> None:
    """Take weights from an upcycled model of the same shapes.

    Args:
        model: Gets them.
        path: Folder of a saved model, or a checkpoint of a run.
        components: Of `mpoe.config.COMPONENTS`: only their MPOs, experts and routers; None is the whole model.

    Raises:
        ValueError: A folder without such a model, a component that the two have not in the same modules, or other
            shapes.
    """
    source = from_pretrained(path)
    here, there = mpoe_config(model), mpoe_config(source)
    if here is not None and there is not None and (changes := mixture_changes(there, here, _FUNCTION)):
        raise ValueError(f"the mixture in {path} must be one of these flags ({changes}); repeat those it has")
    for target, other in [(model, source)] if components is None else _pairs(model, source, path, components):
        try:
            target.load_state_dict(other.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the model in {path} must have the same layers, experts and site dimensions; {reason}. Repeat the "
                "flags that it was made with"
            ) from error


def mixture_changes(there: MPOEConfig, now: MPOEConfig, names: Iterable[str]) -> str:
    """What of a saved mixture is otherwise now, for an error message; empty if nothing.

    Args:
        there: The saved mixture's.
        now: What is asked for.
        names: The fields of `MPOEConfig` that count; a `top_k` or `moe_type` that is None is the number or type that it
            comes to.
    """
    saved, asked = copy.copy(there), copy.copy(now)  # unlike `dataclasses.replace`, which would check and warn again
    for config in (saved, asked):
        config.top_k, config.moe_type = config.experts_per_token, config.router_type
    return saved.changes_to(asked, names)


def _pairs(
    model: PreTrainedModel, source: PreTrainedModel, path: str, components: Sequence[str]
) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """The modules of these components and their namesakes in the source."""
    pairs = []
    for component in components:
        here, there = (component_modules(m).get(component, {}) for m in (model, source))
        if not here or here.keys() != there.keys():
            raise ValueError(
                f"load_layer names {component}, so the model and {path} must have its MPOs, experts or routers in the "
                f"same modules; both have them in {_some(here.keys() & there.keys())}, only the model in "
                f"{_some(here.keys() - there.keys())}, only {path} in {_some(there.keys() - here.keys())}. Repeat the "
                f"--mpo_layers, --stacks and --layers that it was made with, or leave {component} out of --load_layer"
            )
        pairs += [(module, there[name]) for name, module in here.items()]
    return pairs


def _some(names: Collection[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(sorted(names)[:shown]) + more if names else "none"


def _dropout(path: str, config: PreTrainedConfig, probability: float | None) -> dict[str, float]:
    """The fields of the model's config that are its dropout."""
    if probability is None:
        return {}
    names = [name for name in _DROPOUTS if hasattr(config, name)]
    if not names:
        raise ValueError(f"dropout must be left out: the config of {path} ({config.model_type}) has no field for it")
    return dict.fromkeys(names, probability)
