"""Load a finished model for use: dense or mixture, whole or an adapter, of the kind that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from mpoe.models import NO_CODE, clear_load_errors, load_adapter, load_config, load_tokenizer, load_whole
from mpoe.models.adapter_files import adapted_model, is_adapter
from mpoe.training.checkpoint_files import finished_checkpoints
from mpoe.training.run_folder import RESULTS_FILE, RUN_FILE

Kind = Literal["seq2seq", "causal", "classification"]

_CLASSES: dict[Kind, tuple[Any, Any]] = {
    "seq2seq": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "classification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
}


def kind_of(path: str) -> Kind:
    """What a model does, by the architecture in its config; no weights are read.

    Args:
        path: The model's folder, an adapter's folder, or a name on the hub.

    Raises:
        ValueError: No config, an unfinished run, a model that neither writes nor classifies text.
    """
    base = base_of(path)
    try:
        architectures = load_config(base).architectures
    except ValueError as error:
        if not is_adapter(path):
            raise
        raise ValueError(f"the base of the adapter in {path} must be there; {error}") from error
    if is_adapter(path) and (architecture := adapted_model(path).architecture):
        architectures = [architecture]
    for kind in get_args(Kind):
        if isinstance(architectures, list) and architectures and architectures[0] in _CLASSES[kind][1].values():
            return kind
    raise ValueError(
        f"{base} must hold an encoder-decoder, a causal language model or a sequence classifier; the architectures in "
        f"its config are {architectures}: fine-tune it first, or name another"
    )


def load_finished(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer for use: in evaluation mode, on the accelerator if there is one.

    The tokenizer can pad, and pads where the model wants it: a decoder without an encoder goes on from the last token
    of a prompt, so it pads on the left.

    Args:
        path: The model's folder, an adapter's folder (its base is loaded first), or a name on the hub.

    Raises:
        ValueError: As `kind_of`; weights or a tokenizer that are missing, damaged or do not fit.
    """
    kind, base = kind_of(path), base_of(path)
    head = adapted_model(path).head if is_adapter(path) and kind == "classification" else {}
    auto_class = _CLASSES[kind][0]
    if is_adapter(path):  # which may hold the head that its base has not
        with clear_load_errors(base):
            model: PreTrainedModel = auto_class.from_pretrained(base, **NO_CODE, **head)
        load_adapter(model, path)
    else:
        model = load_whole(auto_class, base)
    tokenizer = load_tokenizer(base)
    if tokenizer.pad_token is None:  # any token serves, because the attention mask leaves it out
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if kind == "causal":
        tokenizer.padding_side = "left"
    if model.config.pad_token_id is None:  # a decoder that classifies finds a text's last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def base_of(path: str) -> str:
    """Where a model's config and tokenizer are: the folder or name itself, or that of the adapter's base.

    Args:
        path: The model's folder, an adapter's folder, or a name on the hub.

    Raises:
        ValueError: An unfinished run.
    """
    if (Path(path) / RUN_FILE).is_file() and not (Path(path) / RESULTS_FILE).is_file():
        kept = finished_checkpoints(Path(path))
        meanwhile = f"; until then there is {kept[0]}" if kept else ""
        raise ValueError(
            f"{path} must be a finished run; this one is not: repeat its command, which resumes it{meanwhile}"
        )
    return adapted_model(path).base_name if is_adapter(path) else path


def check_tokens(model: PreTrainedModel, largest: int) -> None:
    """Refuse the tokens of another model's tokenizer.

    Args:
        model: A loaded model.
        largest: The largest token id that its tokenizer gave.

    Raises:
        ValueError: The model's word embedding has no such row.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and largest >= rows:
        raise ValueError(
            f"the tokenizer in {model.name_or_path} must be the model's, whose word embedding has {rows:,} rows; it "
            f"gives token {largest:,}: copy it there again"
        )
