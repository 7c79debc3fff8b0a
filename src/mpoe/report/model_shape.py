"""What the cost model needs to know of a model: sizes and counts, read from the fields of its config; nothing is built.

Shape letters: D model width, F FFN width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
    "t5-3b": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24,
        "num_heads": 32,
    },
    "t5-11b": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24,
        "num_heads": 128,
    },
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "llama-2-70b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip
"""Published sizes that can be costed where no hub is reachable, as fields of a config.

Source: T5 (Raffel et al., JMLR 2020, §3.7); Llama 2 (Touvron et al., 2023, table 1 and the models' config.json).
"""


@dataclass(frozen=True)
class ModelShape:
    """A Transformer by its sizes.

    Attributes:
        name: For titles.
        stacks: Blocks, each with one FFN, of every stack by the stack's name: "encoder", "decoder".
        ffn: The matrices of one FFN as (name, out_features, in_features): two, or three if it is gated.
        d_model: D.
        other_parameters: Everything that is no FFN matrix, tied tables once, count.
        lookup_parameters: Those of them that are looked up and never multiplied with, count.
    """

    name: str
    stacks: dict[str, int]
    ffn: tuple[tuple[str, int, int], ...]
    d_model: int
    other_parameters: int
    lookup_parameters: int

    @property
    def blocks(self) -> int:
        """Blocks of all stacks, count."""
        return sum(self.stacks.values())

    @property
    def ffn_parameters(self) -> int:
        """Elements of the matrices of one FFN, count."""
        return sum(out * inner for _, out, inner in self.ffn)

    @property
    def parameters(self) -> int:
        """All parameters of the dense model, count."""
        return self.other_parameters + self.blocks * self.ffn_parameters


def model_shape(config: Any, name: str) -> ModelShape:
    """Read a model's sizes from its config.

    Args:
        config: A Transformers config, or anything with its attributes.
        name: For titles and messages.

    Raises:
        ValueError: A model type whose fields are not known here, or a size that is no count.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _READERS:
        raise ValueError(
            f"{name} must be of a model type whose sizes are known, one of {', '.join(sorted(_READERS))}; got {kind!r}"
        )
    return _READERS[kind](_Fields(config, name), name)


class _Fields:
    """The fields of a config, checked where they are read."""

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._name = name

    def count(self, field: str, default: int | None = None) -> int:
        value = getattr(self._config, field, None)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{field} in the config of {self._name} must be a count >= 1; got {value!r}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        return bool(getattr(self._config, field, default))


def _t5(fields: _Fields, name: str) -> ModelShape:
    d, f, heads = fields.count("d_model"), fields.count("d_ff"), fields.count("num_heads")
    encoder = fields.count("num_layers")
    decoder = fields.count("num_decoder_layers", default=encoder)
    attention = 4 * d * heads * fields.count("d_kv")
    norms = (2 * encoder + 3 * decoder + 2) * d
    position_bias = 2 * fields.count("relative_attention_num_buckets", default=32) * heads
    table = fields.count("vocab_size") * d
    # T5 v1.1 and flan have a head of their own, but T5Config says "tied" whatever it read.
    untied = not fields.flag("scale_decoder_outputs", default=True)
    up = (("wi_0", f, d), ("wi_1", f, d)) if fields.flag("is_gated_act", default=False) else (("wi", f, d),)
    return ModelShape(
        name=name,
        stacks={"encoder": encoder, "decoder": decoder},
        ffn=(*up, ("wo", d, f)),
        d_model=d,
        other_parameters=(encoder + 2 * decoder) * attention + norms + position_bias + table * (1 + untied),
        lookup_parameters=table * untied,
    )


def _gpt2(fields: _Fields, name: str) -> ModelShape:
    d, layers = fields.count("n_embd"), fields.count("n_layer")
    f = fields.count("n_inner", default=4 * d)
    attention = 4 * d * d + 4 * d
    norms_and_biases = 4 * d + f + d
    table, positions = fields.count("vocab_size") * d, fields.count("n_positions") * d
    untied = not fields.flag("tie_word_embeddings", default=True)
    return ModelShape(
        name=name,
        stacks={"decoder": layers},
        ffn=(("c_fc", f, d), ("c_proj", d, f)),
        d_model=d,
        other_parameters=layers * (attention + norms_and_biases) + 2 * d + table * (1 + untied) + positions,
        lookup_parameters=positions + table * untied,
    )


def _llama(fields: _Fields, name: str, has_qkv_bias: bool = False) -> ModelShape:
    d, f, layers = fields.count("hidden_size"), fields.count("intermediate_size"), fields.count("num_hidden_layers")
    heads = fields.count("num_attention_heads")
    size = fields.count("head_dim", default=d // heads)
    queries, values = heads * size, fields.count("num_key_value_heads", default=heads) * size
    has_bias = fields.flag("attention_bias", default=False)
    attention = 2 * d * (queries + values)
    attention += (queries + 2 * values) * (has_bias or has_qkv_bias) + d * has_bias
    ffn_biases = (2 * f + d) * fields.flag("mlp_bias", default=False)
    table = fields.count("vocab_size") * d
    untied = not fields.flag("tie_word_embeddings", default=False)
    return ModelShape(
        name=name,
        stacks={"decoder": layers},
        ffn=(("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)),
        d_model=d,
        other_parameters=layers * (attention + ffn_biases + 2 * d) + d + table * (1 + untied),
        lookup_parameters=table * untied,
    )


def _qwen2(fields: _Fields, name: str) -> ModelShape:
    return _llama(fields, name, has_qkv_bias=True)


_READERS: dict[str, Callable[[_Fields, str], ModelShape]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "t5": _t5,
}
