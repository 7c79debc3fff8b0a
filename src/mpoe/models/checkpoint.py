"""Saving and loading: the mixture as a weight format that Transformers' own loader knows.

Importing this module registers the format "mpoe" at Transformers' public seam for third-party weight formats. From then
on `save_pretrained` and any `AutoModel*.from_pretrained` work on mixtures (safetensors, shards, dtype, device_map), and
`from_pretrained(dense, quantization_config=MPOEConfig(...))` upcycles while it loads.
"""

from __future__ import annotations

import math
import pickle  # nosec B403  # for its error alone
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpoe.config import MPOEConfig
from mpoe.files import is_file_name, read_json
from mpoe.models.families import T5_SIZES
from mpoe.models.inspect import is_upcycled, sharing_experts
from mpoe.models.pickles import REASON, find_refused
from mpoe.models.router_loss import routers
from mpoe.models.upcycle import swap_modules, upcycle

TOKENIZER_FILES = (
    "tokenizer.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
)  # fmt: skip

NO_CODE = {"trust_remote_code": False}
"""For every loader of Transformers: left out, it asks on the terminal whether to execute a model's own code."""
MAX_LAYERS = 10_000  # the deepest Transformers that were ever trained have 1,000
# What Transformers' code raises over a file that is JSON and makes no sense: whatever the line that reads it meets.
# Lists of all classes, and links: they say nothing about what is wrong, and may be longer than a screen.
_TRANSFORMERS_ADVICE = re.compile(r" (Model type should be one of|Check your internet connection or see) .*")
_OF_A_BAD_CONFIG = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)


@register_quantization_config(MPOEConfig.quant_method)
class _RegisteredConfig(QuantizationConfigMixin):
    """What the loader asks to read a config.json; the answer is the library's own config."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        return MPOEConfig.from_dict(config_dict)


@register_quantizer(MPOEConfig.quant_method)
class MPOEQuantizer(HfQuantizer):
    """Swaps modules before the weights load, or upcycles after dense weights have loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            swap_modules(model, cast(MPOEConfig, self.quantization_config))
            self._shapes = _shapes(model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = cast(MPOEConfig, self.quantization_config)
        # A model marked as quantized refuses .float(), .half() and casts. This one holds ordinary weights.
        self.remove_quantization_config(model)
        if self.pre_quantized:
            model.config.quantization_config = config
            self._check_shapes(model)
        else:
            upcycle(model, config)
        align(model)
        return model

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """Before Transformers 5.23, weights of any shape take the place of a quantized model's."""
        for name, shape in _shapes(model).items():
            if shape != self._shapes.get(name, shape):
                must = tuple(self._shapes[name])
                raise ValueError(
                    f"the weights must be those of its config.json's model; {name} has shape {tuple(shape)} "
                    f"instead of {must}: copy both again"
                )

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether `save_pretrained` may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether the Trainer may train it."""
        return True


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def align(model: PreTrainedModel) -> None:
    """Give CPU weights that were mapped from a file memory of their own.

    A tensor in a safetensors file begins at any multiple of 8 bytes, torch's own at multiples of 64, and matrix kernels
    sum in another order where the alignment differs: the same weights would give logits that differ in the last bits.

    Args:
        model: Its parameters and buffers are moved in place.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def from_pretrained(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a mixture that `save_pretrained` wrote, with the class that its config names.

    Args:
        path: A folder, or a name on the hub.
        kwargs: For Transformers' `from_pretrained`: dtype, device_map and so on.

    Raises:
        ValueError: Not a folder or hub name with a config, or the config of something else than a mixture.
    """
    hub_options = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    kwargs = {**NO_CODE, **kwargs}
    config = load_config(path, **{name: kwargs[name] for name in hub_options if name in kwargs})
    written, model_class = getattr(config, "quantization_config", None), class_of(config)
    if not (isinstance(written, dict) and written.get("quant_method") == MPOEConfig.quant_method):
        raise ValueError(
            f"{path} must hold a mixture that mpoe saved; its config.json names no quant_method 'mpoe'. A dense model "
            "is loaded with Transformers and turned into one with mpoe.upcycle"
        )
    if model_class is None:
        raise ValueError(
            f"the config.json in {path} must name a model of Transformers; its architectures are {config.architectures}"
        )
    return load_whole(model_class, path, **kwargs)


def load_whole(model_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """Load a model whose files hold all of its weights; Transformers itself makes up what is not there, and warns.

    Args:
        model_class: A model's class, or an Auto class.
        path: A folder, or a name on the hub.
        kwargs: For its `from_pretrained`.

    Returns:
        What that returns.

    Raises:
        ValueError: As `clear_load_errors`; weights that are missing or of other shapes.
    """
    asked = {**NO_CODE, "ignore_mismatched_sizes": True, **kwargs, "output_loading_info": True}
    with clear_load_errors(path):
        model, info = model_class.from_pretrained(path, **asked)
    if not kwargs.get("ignore_mismatched_sizes"):
        wrong = {
            name: f"has shape {tuple(got)} instead of {tuple(must)}" for name, got, must in info["mismatched_keys"]
        }
        wrong |= {name: "is missing" for name in info["missing_keys"] if name not in wrong}
        if is_upcycled(model):  # whose files mpoe wrote: a tensor that is left over is another one's loss
            wrong |= dict.fromkeys(info["unexpected_keys"], "has no place in it")
        if not getattr(model, "is_quantized", False):
            tensors = dict(model.named_parameters())
            for place, experts in sharing_experts(model).items():
                tensors |= dict(experts.named_buffers(prefix=place))
            whole = {name: tensor.dtype for name, tensor in tensors.items() if not tensor.is_floating_point()}
            for place, router in routers(model).items():  # whole numbers alone count
                counts = ("balancing.steps", "balancing.pending")
                for own, buffer in router.named_buffers():
                    if buffer.is_floating_point() == (own in counts):
                        whole[f"{place}.router.{own}"] = buffer.dtype
            wrong |= {name: f"has {dtype} numbers" for name, dtype in whole.items()}
        if wrong:
            name = min(wrong)
            more = f" (and {len(wrong) - 1} more are wrong)" if len(wrong) > 1 else ""
            raise ValueError(
                f"the weights in {path} must be those of its config.json's model; {name} {wrong[name]}{more}: copy "
                "both again"
            )
    return (model, info) if kwargs.get("output_loading_info") else model


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a config names; None if it names none, or what is no model of Transformers.

    Args:
        config: Of a file that anybody may have written.
    """
    names = config.architectures
    found = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def read_config(name: str) -> PreTrainedConfig:
    """The config of a model, without its weights.

    Args:
        name: A key of T5_SIZES, or as for `load_config`.

    Raises:
        ValueError: As `load_config`.
    """
    if name in T5_SIZES and not Path(name).exists():
        values = {"vocab_size": 32128, "decoder_start_token_id": 0}  # nosec B105  # a token of text
        return T5Config.from_dict({**values, **T5_SIZES[name]})
    return load_config(name)


def load_config(path: str | Path, **options: Any) -> PreTrainedConfig:
    """The config.json of a model.

    Args:
        path: A folder with one, or a name on the hub.
        options: For Transformers: revision, token and so on.

    Raises:
        ValueError: None of these; a damaged file, or more than MAX_LAYERS layers.
    """
    options = {**NO_CODE, **options}
    with clear_load_errors(path):
        values, _ = PreTrainedConfig.get_config_dict(path, **options)
    _check_numbers(path, values)
    with clear_load_errors(path):
        return AutoConfig.from_pretrained(path, **options)  # nosec B615  # the revision is the user's choice


def _check_numbers(path: str | Path, values: Any) -> None:
    """Refuse what passes the checks of Transformers: NaN, and more layers than a machine could count in hours."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            _check_numbers(path, value)
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"the config.json in {path} must have a number as {name}; got NaN")
        elif "layer" in name and isinstance(value, int | float) and value > MAX_LAYERS:
            raise ValueError(f"the config.json in {path} must have {name} of at most {MAX_LAYERS:,}; got {value:g}")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's files; what is no folder does not.

    Args:
        folder: Any path or name.
    """
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        path: The model's folder, or a name on the hub.

    Raises:
        ValueError: A folder without a tokenizer's files, for which Transformers would make one up.
    """
    if Path(path).is_dir() and not has_tokenizer(path):
        raise ValueError(
            f"{path} must hold its model's tokenizer ({', '.join(TOKENIZER_FILES)}); it has none of "
            "these: write it there with tokenizer.save_pretrained"
        )
    with clear_load_errors(path):
        try:
            # the revision is the user's choice
            tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)  # nosec B615
            tokenizer("a \ue000")  # some damage shows only here, some only at what is in no vocabulary
        except BaseException as error:
            # The tokenizers library raises bare Exceptions, and a BaseException of its own where its Rust code panics.
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"its tokenizer is damaged: {error}") from error
        if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 1:
            raise ValueError(f"its tokenizer's model_max_length must be a count; got {tokenizer.model_max_length!r}")
        return tokenizer


@contextmanager
def clear_load_errors(path: str | Path) -> Iterator[None]:
    """Turn what a loader raises into one line that names the model and says what must hold.

    Args:
        path: What is loaded: a folder, or a name on the hub.
    """
    name = str(path)
    if not Path(path).exists() and (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or ("/" in name and any(Path(name).parent.glob("*/run.json")))  # a folder of runs, and no owner on a hub
    ):
        raise ValueError(
            f"{name} must be a folder with a config.json; there is no such folder (a name on the hub has the form "
            "owner/model)"
        )
    _check_shards(Path(path))
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} must be complete and undamaged; {error}: copy them again") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"the weights in {find_refused(path) or path} must be numbers alone; {REASON}: convert them to safetensors "
            "where they come from, or name another model"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, *_OF_A_BAD_CONFIG) as error:
        reason = " ".join(str(error).split()[:60]) or type(error).__name__
        if isinstance(error, _OF_A_BAD_CONFIG):
            reason = f"one of its files is damaged ({type(error).__name__}: {reason})"
        if "trust_remote_code" in str(error):  # Transformers' own text says how to execute it
            reason = "this one is code of its own, beside its weights, and mpoe executes none"
        reason = _TRANSFORMERS_ADVICE.sub("", reason)
        if "couldn't connect" in reason:
            reason += " Correct the name; where no hub can be reached, mpoe fetch has small models"
        raise ValueError(
            f"{path} must be a folder with a config.json and a complete Transformers model of the right kind, or the "
            f"name of one on a hub that can be reached; {reason}"
        ) from error


def _check_shards(folder: Path) -> None:
    """Refuse an index of weights that names files outside of its folder."""
    for index in sorted(folder.glob("*.index.json")):
        shards = read_json(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        if odd := [name for name in names if not is_file_name(name)]:
            raise ValueError(f"{index} must name files of its own folder; got {odd[0]!r}: copy the model again")
